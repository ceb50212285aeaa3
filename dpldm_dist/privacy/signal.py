"""How much of the training is signal: the summed noisy gradients beside noise alone.

The noisy mean gradient of step t is m_t = g_t + z_t, with z_t normal noise of standard deviation
u = sigma / (q N) in each of P coordinates (in units of clip_norm).

**The walk.** Over t steps the noise walks at random: |z_1 + ... + z_t| = u sqrt(t) chi_P, which is
u sqrt(P t) up to a relative standard error of 1 / sqrt(2 P); a gradient that keeps its direction
grows like t. So r_t = |m_1 + ... + m_t| / (u sqrt(P t)) is 1 for pure noise, with a known error,
and sqrt(1 + |g_1 + ... + g_t|^2 / (u^2 P t)) else; 1 / r_t^2 is the share of the squared length
that noise explains. It is a fair picture of size and a weak test: among many parameters the noise
is long, and a gradient that turns round on the way cancels.

**The alignment.** Let a_t = m_{t-1} + d m_{t-2} + d^2 m_{t-3} + ..., d = 0.8, be the direction of
the steps before. It is known before z_t is drawn, so without a signal the projection
zeta_t = <m_t, a_t> / (u |a_t|) is *exactly* a standard normal number, independent of those before,
for any P; and so is (zeta_2 + ... + zeta_t) / sqrt(t - 1), the alignment after t steps. A gradient
that lasts for a few steps pushes it up, and parameters that swing around a minimum push it down.
Noise alone takes it beyond 5 at any step of a run of 20,000 with a probability below 2e-4: the
chance at one fixed step, 6e-7, counts 25 log(steps) times (Pickands 1969, for sums of t normal
numbers over sqrt(t)). The verdict asks for that.

Nothing here reads private data: noisy gradients are released, and u, P and t are public.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.blocks import COPIED

MOST_OF_NOISE = 5.0  # standard errors of alignment that noise alone does not reach
_MEMORY = 0.8  # d: how much a step counts among the steps before, from one step to the next


@dataclass(frozen=True)
class Signal:
    """The walk after some steps; lengths in units of clip_norm.

    ``walk`` is the length of the sum of all noisy gradients, ``noise_alone`` what noise alone is
    expected to give, ``error`` the relative standard error of that. ``step_ratio`` compares the
    last step alone with its noise in the same way. ``alignment`` is in standard errors,
    ``most_alignment`` the largest size that it had so far.
    """

    steps: int
    walk: float
    noise_alone: float
    step_ratio: float
    error: float
    alignment: float
    most_alignment: float

    @property
    def ratio(self) -> float:
        return self.walk / self.noise_alone

    @property
    def noise_share(self) -> float:
        """Share of the squared length of the walk that noise explains, at most 1."""
        return min(1.0, self.ratio**-2)

    @property
    def is_pure_noise(self) -> bool:
        """Whether the steps never agreed more than noise alone lets them."""
        return self.most_alignment < MOST_OF_NOISE

    def in_words(self) -> str:
        """What to think of it, in two sentences."""
        digits = max(0, 1 - math.floor(math.log10(self.error)))
        size = (
            f"After {self.steps:,} steps the summed gradients are {self.ratio:.{digits}f} times as "
            f"long as noise alone would make them (1 ± {self.error:.{digits}f}): noise explains "
            f"{self.noise_share:.1%} of their squared length."
        )
        agreement = f"Steps agreed with those before them by up to {self.most_alignment:.1f}"
        if self.is_pure_noise:
            return (
                f"{size} {agreement} standard errors, which noise alone can do: the training cannot"
                " be told from pure noise."
            )
        return f"{size} {agreement} standard errors; noise alone stays below {MOST_OF_NOISE:g}."


class RandomWalk:
    """The running sum of noisy gradients; part of the training state. Released numbers only.

    ``step_std``: standard deviation of the noise in each coordinate of a noisy mean gradient, in
    units of clip_norm: noise multiplier over divisor. ``mine``: what this worker keeps of the
    vectors; ``sum_`` then adds a tensor over workers in place.
    """

    def __init__(
        self,
        parameters: int,
        *,
        step_std: float,
        mine: slice = slice(None),
        sum_: Callable[[Tensor], None] = lambda tensor: None,
    ) -> None:
        if not (math.isfinite(step_std) and step_std > 0):
            raise PrivacyError(f"Noise of {step_std} in a step: expected a positive number.")
        self._parameters, self._mine, self._sum_ = parameters, mine, sum_
        self._sum_Q = torch.zeros(parameters, dtype=torch.float32)[mine].clone()
        self._before_Q = torch.zeros_like(self._sum_Q)
        self._step_std = step_std
        self._numbers = array("d")  # of each step: length of the walk and of the step, alignments

    def add(self, mean_P: Tensor) -> None:
        """One step's noisy mean gradient, (P,), in units of clip_norm."""
        mean_Q = mean_P[self._mine]
        alignment, most = self._next_alignment(mean_Q)
        self._sum_Q = self._sum_Q.to(mean_Q.device).add_(mean_Q)
        self._before_Q = self._before_Q.to(mean_Q.device).mul_(_MEMORY).add_(mean_Q)
        walk, last = self._products((self._sum_Q, self._sum_Q), (mean_Q, mean_Q))
        self._numbers.extend((math.sqrt(walk), math.sqrt(last), alignment, most))

    def signal(self, steps: int | None = None) -> Signal:
        """The walk after ``steps`` steps (None: all so far), at least one."""
        steps = self._steps if steps is None else steps
        walk, last, alignment, most = self._of_step(steps)
        one_step = self._step_std * math.sqrt(self._parameters)
        return Signal(
            steps=steps,
            walk=walk,
            noise_alone=one_step * math.sqrt(steps),
            step_ratio=last / one_step,
            error=1.0 / math.sqrt(2.0 * self._parameters),
            alignment=alignment,
            most_alignment=most,
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that ``load`` needs, whole. Every worker takes part."""
        steps = torch.from_numpy(np.array(self._numbers)).reshape(-1, 4)
        return {
            "sum": self._whole(self._sum_Q),
            "before": self._whole(self._before_Q),
            "steps": steps,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state()``. Raises: PrivacyError if it is of another number of parameters."""
        if state["sum"].shape != (self._parameters,):
            raise PrivacyError(
                f"A saved walk of {state['sum'].numel()} parameters: expected {self._parameters}."
            )
        self._sum_Q = state["sum"][self._mine].clone()
        self._before_Q = state["before"][self._mine].clone()
        self._numbers = array("d", state["steps"].flatten().tolist())

    @property
    def _steps(self) -> int:
        return len(self._numbers) // 4

    def _of_step(self, number: int) -> array[float]:
        """What was noted of a step, counted from 1."""
        return self._numbers[4 * number - 4 : 4 * number]

    def _whole(self, part_Q: Tensor) -> Tensor:
        whole_P = part_Q.new_zeros(self._parameters)
        whole_P[self._mine] = part_Q
        self._sum_(whole_P)  # zeros but for one worker
        return whole_P

    def _next_alignment(self, mean_Q: Tensor) -> tuple[float, float]:
        """Alignment with the new step counted in, and the largest size that it had."""
        earlier = self._steps
        if earlier == 0:
            return 0.0, 0.0
        before_Q = self._before_Q.to(mean_Q.device)
        along, squared = self._products((mean_Q, before_Q), (before_Q, before_Q))
        projection = along / math.sqrt(squared) / self._step_std
        _, _, alignment, most = self._of_step(earlier)
        alignment = (alignment * math.sqrt(earlier - 1) + projection) / math.sqrt(earlier)
        return alignment, max(most, abs(alignment))

    def _products(self, *pairs: tuple[Tensor, Tensor]) -> list[float]:
        """Inner products over the whole vector, in float64."""
        found = torch.stack([_inner_product(one, other) for one, other in pairs])
        self._sum_(found)
        return found.tolist()


def _inner_product(one_Q: Tensor, other_Q: Tensor) -> Tensor:
    """In float64, of a part at a time."""
    parts = zip(one_Q.split(COPIED), other_Q.split(COPIED), strict=True)
    return sum(
        (a.double() @ b.double() for a, b in parts), one_Q.new_zeros((), dtype=torch.float64)
    )
