"""How much of the training is signal: the summed noisy gradients beside noise alone.

The noisy mean gradient of a step is g_t + z_t, with z_t normal noise of standard deviation
u = sigma / (q N) in each of P coordinates (in units of clip_norm). Over t steps the noise walks at
random, |z_1 + ... + z_t| = u sqrt(t) chi_P, which is u sqrt(P t) up to a relative standard error of
1 / sqrt(2 P); a gradient that keeps its direction grows like t. So

    r_t = |sum of the noisy gradients| / (u sqrt(P t))

is 1 for pure noise, with a known error, and sqrt(1 + |sum of g|^2 / (u^2 P t)) else. 1 / r_t^2 is
the share of the squared length that noise explains. Nothing here reads private data: noisy
gradients are released, and u, P and t are public.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpldm_dist.errors import PrivacyError

_CERTAIN = 4.0  # standard errors above which a walk is not called pure noise


@dataclass(frozen=True)
class Signal:
    """The walk after some steps; lengths in units of clip_norm.

    ``walk`` is the length of the sum of all noisy gradients, ``noise_alone`` what noise alone is
    expected to give, ``error`` the relative standard error of that. ``step_ratio`` compares the
    last step alone with its noise in the same way.
    """

    steps: int
    walk: float
    noise_alone: float
    step_ratio: float
    error: float

    @property
    def ratio(self) -> float:
        return self.walk / self.noise_alone

    @property
    def noise_share(self) -> float:
        """Share of the squared length of the walk that noise explains, at most 1."""
        return min(1.0, self.ratio**-2)

    @property
    def is_pure_noise(self) -> bool:
        """Whether the walk is no longer than what noise alone gives but for a chance of 3e-5."""
        return self.ratio < 1.0 + _CERTAIN * self.error

    def in_words(self) -> str:
        """One sentence for people."""
        start = (
            f"After {self.steps:,} steps the summed gradients are {self.ratio:.3g} times as long as"
            f" noise alone would make them (1 ± {self.error:.1g})"
        )
        if self.is_pure_noise:
            return f"{start}: they cannot be told from pure noise."
        return f"{start}: noise explains {self.noise_share:.0%} of their squared length."


class RandomWalk:
    """The running sum of noisy gradients; part of the training state. Released numbers only.

    ``step_std``: standard deviation of the noise in each coordinate of a noisy mean gradient, in
    units of clip_norm: noise multiplier over divisor.
    """

    def __init__(self, parameters: int, *, step_std: float) -> None:
        if not (math.isfinite(step_std) and step_std > 0):
            raise PrivacyError(f"Noise of {step_std} in a step: expected a positive number.")
        self._sum_P = torch.zeros(parameters, dtype=torch.float32)
        self._step_std = step_std
        self._norms: list[tuple[float, float]] = []

    def add(self, mean_P: Tensor) -> None:
        """One step's noisy mean gradient, (P,), in units of clip_norm."""
        self._sum_P = self._sum_P.to(mean_P.device).add_(mean_P)
        self._norms.append((float(self._sum_P.double().norm()), float(mean_P.norm())))

    def signal(self, steps: int | None = None) -> Signal:
        """The walk after ``steps`` steps (None: all so far), at least one."""
        steps = len(self._norms) if steps is None else steps
        walk, last = self._norms[steps - 1]
        one_step = self._step_std * math.sqrt(len(self._sum_P))
        return Signal(
            steps=steps,
            walk=walk,
            noise_alone=one_step * math.sqrt(steps),
            step_ratio=last / one_step,
            error=1.0 / math.sqrt(2.0 * len(self._sum_P)),
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that ``load`` needs."""
        norms = torch.tensor(self._norms, dtype=torch.float64).reshape(-1, 2)
        return {"sum": self._sum_P, "norms": norms}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state()``. Raises: PrivacyError if it is of another number of parameters."""
        if state["sum"].shape != self._sum_P.shape:
            raise PrivacyError(
                f"A saved walk of {state['sum'].numel()} parameters: expected {len(self._sum_P)}."
            )
        self._sum_P = state["sum"].clone()
        self._norms = [(walk, step) for walk, step in state["norms"].tolist()]
