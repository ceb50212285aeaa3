"""From a finished integer sum to an update: sum over workers, noise once, divide by a constant.

The noise is bound to what it hides: its key is derived from the attempt's key, the numbers of the
mechanism, the step *and a keyed digest of the finished sum*. So a step that is repeated with the
same sum is the same release, bit for bit, and tells nothing new; on any other sum the noise is
independent, whatever was restored, copied or rolled back. (The manner of AES-GCM-SIV, RFC 8452, and
of deterministic signatures, RFC 6979.)

Shapes: P trainable parameters, flattened in a fixed order.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.blocks import (
    BLOCK,
    block_slices,
    blocks_of,
    converted_,
    flat_length,
)
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.randomness import NOISE_BLOCK, derive_key, integer_noise

_LEAST_STD = 2.0**20  # in grid units: below it, rounding the noise would no longer be negligible
_BLOCKS_OF_THREAD = 4  # blocks of noise that lie beside the sum, for each thread

Bind = Callable[[str, int, str], object]
"""Given purpose, step and digest: makes them durable, or raises, before the noise is drawn."""


class NoisySum:
    """The Gaussian mechanism on integer vectors, over all workers.

    ``key`` is the attempt's. ``std`` is the standard deviation of the noise in units of the integer
    grid; with ``unsafe_no_noise`` it counts as 0, for comparisons that have no privacy claim.
    ``mechanism`` names all public numbers of the mechanism (clip norm, grid, noise). ``bind`` gets
    the digest of a finished sum before its noise is drawn.

    Formal guarantees: the result is S + round(Z) on every worker, with S the exact sum of the
    workers' vectors and Z one draw of N(0, std^2) per coordinate, whatever the number of workers:
    every coordinate has exactly one owner, or the run stops. Z is a function of key, mechanism,
    purpose, step and S: equal in all of them, it is equal in every bit; otherwise it is independent
    (HMAC is assumed to be a pseudo-random function). Since S is an integer vector, S + round(Z) =
    round(S + Z) is post-processing of the Gaussian mechanism on S, so the rounding tells nothing
    about S (Mironov 2012). The noise is drawn only after S is complete and its digest bound.
    Source: Abadi et al. (2016), arXiv 1607.00133, Algorithm 1.
    """

    def __init__(
        self,
        key: bytes,
        *,
        std: float,
        mechanism: str,
        collective: Collective,
        bind: Bind,
        unsafe_no_noise: bool = False,
    ):
        if not unsafe_no_noise and not (math.isfinite(std) and std >= _LEAST_STD):
            raise PrivacyError(
                f"Noise of {std} grid units: expected a finite number of at least 2^20."
            )
        self._key = key
        self._mechanism = mechanism
        self._bind = bind
        self._std = 0.0 if unsafe_no_noise else std
        self._collective = collective

    def release_(self, total_P: Tensor, *, purpose: str, step: int) -> Tensor:
        """In place: this worker's part of a sum, int64 (P,), becomes the noisy sum over all.

        Raises: PrivacyError, and whatever ``bind`` raises; then nothing was released.
        """
        bounds = self.release_slice_(total_P, purpose=purpose, step=step)
        self._collective.gather_slices_(total_P, bounds)
        return total_P

    def release_slice_(self, total_P: Tensor, *, purpose: str, step: int) -> list[int]:
        """The same in this worker's slice; the rest becomes zero. The bounds of all slices.

        Raises: as ``release_``.
        """
        if total_P.dtype != torch.int64:
            raise PrivacyError(f"A sum of {total_P.dtype}: expected exact integers (int64).")
        bounds = block_slices(len(total_P), self._collective.world_size)
        self._collective.sum_slices_(total_P, bounds)
        digest = self._digest(total_P, purpose=purpose, step=step)
        self._bind(purpose, step, digest.hex())
        filled = self._add_noise(total_P, bounds, derive_key(self._key, "noise " + digest.hex()))
        self._require_one_owner(filled, total_P)
        return bounds

    def _digest(self, total_P: Tensor, *, purpose: str, step: int) -> bytes:
        """Keyed digest of everything that the noise depends on. Tells nothing without the key.

        One of the numbers and of the keyed digests of all blocks in order, each of which comes from
        the worker that owns the block: the same for any number of workers.
        """
        what = f"{purpose} {step} {len(total_P)} {self._std!r} {self._mechanism}"
        code = hmac.new(derive_key(self._key, "digest"), what.encode() + b"\0", hashlib.sha256)
        code.update(self._block_digests(total_P))
        return code.digest()

    def _block_digests(self, total_P: Tensor) -> bytes:
        """32 bytes for each block of the finished sum."""
        key, size = derive_key(self._key, "digest of a block"), hashlib.sha256().digest_size
        bounds = block_slices(len(total_P), self._collective.world_size)
        start, stop = bounds[self._collective.rank], bounds[self._collective.rank + 1]
        mine = total_P[start:stop].cpu().numpy().astype("<i8", copy=False)
        found = [
            hmac.digest(key, mine[at : at + BLOCK].data, "sha256")
            for at in range(0, len(mine), BLOCK)
        ]
        table = torch.zeros(blocks_of(len(total_P)) * size, dtype=torch.uint8)
        first = start // BLOCK * size
        table[first : first + len(found) * size] = torch.frombuffer(
            bytearray(b"".join(found)) or bytearray(1), dtype=torch.uint8
        )[: len(found) * size]
        table = table.to(total_P.device)
        self._collective.gather_slices_(table, [blocks_of(bound) * size for bound in bounds])
        return table.cpu().numpy().tobytes()

    def _add_noise(self, total_P: Tensor, bounds: Sequence[int], key: bytes) -> tuple[int, int]:
        """Add this worker's noise in place; the slice that was filled."""
        start, stop = bounds[self._collective.rank], bounds[self._collective.rank + 1]
        some = _BLOCKS_OF_THREAD * torch.get_num_threads() * NOISE_BLOCK
        for at in range(start // some * some, stop, some):
            first, last = max(start, at), min(stop, at + some)
            noise = integer_noise(key, first, last, std=self._std)
            total_P[first:last] += noise.to(total_P.device)
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


@dataclass(frozen=True, eq=False)
class NoisyStep:
    """What a step released.

    ``mean_P`` is the noisy mean gradient in units of clip_norm, float64: whole, or zero outside
    this worker's slice if the update is sharded. ``extra`` holds the noisy sums of the coordinates
    behind the gradient in units of the grid, int64, and ``norm`` is that of the whole gradient: the
    same on all workers. A None is the norm of ``mean_P``.
    """

    mean_P: Tensor
    extra: Tensor
    whole_norm: float | None = None

    @property
    def norm(self) -> float:
        return float(self.mean_P.norm()) if self.whole_norm is None else self.whole_norm


class InnerOptimizer(Protocol):
    """Updates parameters with the gradients that lie in them."""

    def step(self) -> object: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


class DistributedDPOptimizer:
    """Steps an inner optimizer with the private mean of clipped per-record gradients.

    The update's gradient is noisy_sum * grid / clip_norm / divisor: divided by the clip norm, so
    that learning rates do not depend on it, and by a public constant, never by the number of
    records drawn. One worker is the same code. A sum may have ``extra`` coordinates behind the
    gradient, which are released with it and move no parameter.

    ``sharded``: the inner optimizer of each worker has the ``pieces_of`` its slice, ``parameters``
    are all pieces; the noisy sum stays where it was made, and updated parameters are gathered.

    Formal guarantees: parameters change only through released noisy sums, so they are
    post-processing of them; a step always happens, also when no worker drew a record; all workers
    hold the same parameters afterwards. The noise has standard deviation noise_multiplier *
    clip_norm in the sum whatever the number of workers.
    """

    def __init__(
        self,
        inner: InnerOptimizer,
        parameters: Sequence[torch.nn.Parameter],
        noisy_sum: NoisySum,
        *,
        grid: float,
        clip_norm: float,
        divisor: float,
        extra: int = 0,
        schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
        sharded: bool = False,
    ):
        self._inner = inner
        self._schedule = schedule
        self._parameters = list(parameters)
        self._noisy_sum = noisy_sum
        self._extra = extra
        self._sharded = sharded
        self._collective = noisy_sum._collective
        self._scale = grid / clip_norm / divisor

    def step(self, sum_P: Tensor, step: int) -> NoisyStep:
        """Release the sum of ``step``, int64 (P + extra,), and update. ``sum_P`` is used up: the
        mean lies in its memory."""
        self._require_length(len(sum_P))
        if self._sharded:
            noisy, bounds = self._release_slice(sum_P, step)
            rank = self._collective.rank
            self._update(noisy.mean_P, range(bounds[rank], bounds[rank + 1]))
            self._gather_parameters(bounds)
        else:
            noisy = self._release(sum_P, step)
            self._update(noisy.mean_P, range(len(noisy.mean_P)))
        if self._schedule is not None:
            self._schedule.step()
        return noisy

    def _release(self, sum_P: Tensor, step: int) -> NoisyStep:
        return NoisyStep(*self._mean(self._noisy_sum.release_(sum_P, purpose="step", step=step)))

    def _release_slice(self, sum_P: Tensor, step: int) -> tuple[NoisyStep, list[int]]:
        """The release of this worker's slice, and the bounds of all slices of the gradient."""
        bounds = self._noisy_sum.release_slice_(sum_P, purpose="step", step=step)
        mean_P, extra = self._mean(sum_P)
        squared = torch.linalg.vector_norm(mean_P).square()
        self._collective.sum_(extra)  # its owner has it, the others have zeros
        self._collective.sum_(squared)
        bounds = [min(bound, len(mean_P)) for bound in bounds]
        return NoisyStep(mean_P, extra, float(squared.sqrt())), bounds

    def _mean(self, noisy_P: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy sums as mean gradient, float64, in the same memory; and the extra coordinates."""
        gradient_P, extra = noisy_P.tensor_split([len(noisy_P) - self._extra])
        return converted_(gradient_P, torch.float64, scale=self._scale), extra.clone()

    @torch.no_grad()
    def _gather_parameters(self, bounds: Sequence[int]) -> None:
        """Give every worker what each of them updated."""
        flat_P = torch.cat([parameter.flatten() for parameter in self._parameters])
        self._collective.gather_slices_(flat_P, bounds)
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            parameter.copy_(flat_P[start:stop].view_as(parameter))
            start = stop

    def _update(self, mean_P: Tensor, mine: range) -> None:
        """Step the inner optimizer with the gradient of the coordinates ``mine``."""
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            if start in mine:
                parameter.grad = mean_P[start:stop].view_as(parameter).to(parameter.dtype)
            start = stop
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)

    def _require_length(self, found: int) -> None:
        """Refuse a sum of another model before anything is released. Raises: PrivacyError."""
        expected = flat_length(self._parameters) + self._extra
        if found != expected:
            raise PrivacyError(
                f"A sum of {found} coordinates: expected {expected}, one per parameter and "
                f"{self._extra} more."
            )
