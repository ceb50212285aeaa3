"""From a finished integer sum to an update: sum over workers, noise once, divide by a constant.

Shapes: P trainable parameters, flattened in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.collective import Collective, even_slices
from dpldm_dist.privacy.randomness import derive_key, integer_noise

_LEAST_STD = 2.0**20  # in grid units: below it, rounding the noise would no longer be negligible


class NoisySum:
    """The Gaussian mechanism on integer vectors, over all workers.

    ``std`` is the standard deviation of the noise in units of the integer grid; with
    ``unsafe_no_noise`` it counts as 0, for comparisons that have no privacy claim.

    Formal guarantees: the result is S + round(Z) on every worker, with S the exact sum of the
    workers' vectors and Z one draw of N(0, std^2) per coordinate, whatever the number of workers:
    every coordinate has exactly one owner, or the run stops. Noise of another purpose, attempt or
    step is independent. Since S is an integer vector, S + round(Z) = round(S + Z) is
    post-processing of the Gaussian mechanism on S, so the rounding tells nothing about S
    (Mironov 2012). The noise is drawn only after S is complete.
    Source: Abadi et al. (2016), arXiv 1607.00133, Algorithm 1.
    """

    def __init__(
        self,
        key: bytes,
        *,
        attempt: int,
        std: float,
        collective: Collective,
        unsafe_no_noise: bool = False,
    ):
        if not unsafe_no_noise and not (math.isfinite(std) and std >= _LEAST_STD):
            raise PrivacyError(
                f"Noise of {std} grid units: expected a finite number of at least 2^20."
            )
        self._key = key
        self._attempt = attempt
        self._std = 0.0 if unsafe_no_noise else std
        self._collective = collective

    def release(self, sum_P: Tensor, *, purpose: str, step: int) -> Tensor:
        """Noisy sum over all workers. int64 (P,); ``sum_P`` is this worker's part, int64 (P,)."""
        if sum_P.dtype != torch.int64:
            raise PrivacyError(f"A sum of {sum_P.dtype}: expected exact integers (int64).")
        total_P = sum_P.clone()
        self._collective.sum_(total_P)
        bounds = even_slices(len(total_P), self._collective.world_size)
        filled = self._add_noise(total_P, bounds, purpose=purpose, step=step)
        self._require_one_owner(filled, total_P)
        self._collective.gather_slices_(total_P, bounds)
        return total_P

    def _add_noise(
        self, total_P: Tensor, bounds: Sequence[int], *, purpose: str, step: int
    ) -> tuple[int, int]:
        """Add this worker's noise in place; the slice that was filled."""
        start, stop = bounds[self._collective.rank], bounds[self._collective.rank + 1]
        key = derive_key(self._key, purpose, self._attempt, step)
        total_P[start:stop] += integer_noise(key, start, stop, std=self._std).to(total_P.device)
        return start, stop

    def _require_one_owner(self, filled: tuple[int, int], total_P: Tensor) -> None:
        """Every coordinate got noise from exactly one worker. Raises: PrivacyError otherwise."""
        table = torch.zeros(
            self._collective.world_size, 2, dtype=torch.int64, device=total_P.device
        )
        table[self._collective.rank] = torch.tensor(filled)
        self._collective.sum_(table)
        covered = 0
        for start, stop in sorted(tuple(row) for row in table.tolist()):
            if start != covered:
                break
            covered = stop
        else:
            if covered == len(total_P):
                return
        raise PrivacyError(
            "Noise was not added exactly once to every coordinate; nothing was released. This is a"
            " bug: please report it."
        )


class DistributedDPOptimizer:
    """Steps an inner optimizer with the private mean of clipped per-record gradients.

    The update's gradient is noisy_sum * grid / clip_norm / divisor: divided by the clip norm, so
    that learning rates do not depend on it, and by a public constant, never by the number of
    records drawn. One worker is the same code.

    Formal guarantees: parameters change only through released noisy sums, so they are
    post-processing of them; a step always happens, also when no worker drew a record; all workers
    hold the same parameters afterwards. The noise has standard deviation noise_multiplier *
    clip_norm in the sum whatever the number of workers.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        parameters: Sequence[torch.nn.Parameter],
        noisy_sum: NoisySum,
        *,
        grid: float,
        clip_norm: float,
        divisor: float,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    ):
        self._inner = inner
        self._schedule = schedule
        self._parameters = list(parameters)
        self._noisy_sum = noisy_sum
        self._scale = grid / clip_norm / divisor

    def step(self, sum_P: Tensor, step: int) -> float:
        """Release the sum of ``step`` and update. Returns the norm of the noisy mean, a released
        number in units of clip_norm."""
        noisy_P = self._noisy_sum.release(sum_P, purpose="noise", step=step)
        mean_P = noisy_P.double() * self._scale
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            parameter.grad = mean_P[start:stop].view_as(parameter).to(parameter.dtype)
            start = stop
        if start != len(mean_P):
            raise PrivacyError(
                f"A sum of {len(mean_P)} coordinates for {start} parameters: expected as many."
            )
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)
        if self._schedule is not None:
            self._schedule.step()
        return float(mean_P.norm())
