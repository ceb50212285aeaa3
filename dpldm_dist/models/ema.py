"""Exponential moving average of parameters, one tick per step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpldm_dist.errors import DataError


class EMA:
    """average <- d average + (1 - d) parameters, with d = min(decay, (1 + n) / (10 + n)) at tick n.

    The ramp lets the average forget the starting point quickly in a short run.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self._updates = 0
        self.averages = {name: value.detach().clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor] | None = None) -> None:
        """One tick; call it once after every step. ``parameters``: as they are now, if the ones
        that are followed were replaced."""
        self._parameters = self._parameters if parameters is None else dict(parameters)
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        averages = [self.averages[name] for name in self._parameters]
        torch._foreach_lerp_(averages, [p.detach() for p in self._parameters.values()], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Everything that ``load`` needs, as tensors."""
        return {**self.averages, "ema_updates": torch.tensor(self._updates)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state()`` of an equal EMA. Raises: DataError naming what is missing."""
        for name, average in self.averages.items():
            if name not in state or state[name].shape != average.shape:
                raise DataError(f"The saved average lacks {name} of shape {tuple(average.shape)}.")
            average.copy_(state[name])
        self._updates = int(state["ema_updates"])

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Write the averages into ``parameters`` (the followed ones if None)."""
        for name, value in (self._parameters if parameters is None else parameters).items():
            value.copy_(self.averages[name])
