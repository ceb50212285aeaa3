"""How model and optimizer are held by several workers.

Private training takes :func:`private_update` only: it gets finished gradients, with their noise in
them. It never takes :func:`replicate`: a wrapper that averages gradients over workers would reduce
the private sum a second time, and outside the noise mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpldm_dist.config import RunConfig
from dpldm_dist.runtime.worker import Worker


def replicate(model: nn.Module, worker: Worker, *, run: RunConfig) -> nn.Module:
    """``model`` with gradients averaged over the workers, or itself when there is one.

    ``run.strategy`` chooses how; "ddp": whole replicas. The caller draws its share of a batch and
    scales nothing.
    """
    model.to(worker.device)
    if worker.world_size == 1:
        return model
    assert run.strategy == "ddp"  # the only one that config.py knows
    devices = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def bare(model: nn.Module) -> nn.Module:
    """The module inside :func:`replicate`'s result: the one to save, copy and take names from."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# --- private training -----------------------------------------------------------------------------

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


class PrivateUpdate(Protocol):
    """Updates parameters with a finished gradient. Every worker calls every method."""

    optimizer: torch.optim.Optimizer
    """Whose learning rate a schedule sets."""
    parameters: list[nn.Parameter]
    """Where the finished gradient is to be put before ``step``, in the order of the flat vector."""

    def step(self) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """``name/slot`` -> the whole tensor: the same for any strategy and number of workers."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state()`` of an update of the same parameters."""


def refuse_for_private_training(run: RunConfig) -> None:
    """Raises: ConfigError for a strategy that could change a finished private gradient."""
    if run.strategy == "deepspeed":
        from dpldm_dist.runtime import strategy_deepspeed

        strategy_deepspeed.refuse_for_private_training(run.deepspeed)


def private_update(
    parameters: Mapping[str, nn.Parameter],
    make_optimizer: MakeOptimizer,
    *,
    run: RunConfig,
    worker: Worker,
) -> PrivateUpdate:
    """How ``run.strategy`` updates ``parameters`` as they are now. Raises: ConfigError."""
    if run.strategy == "deepspeed":
        from dpldm_dist.runtime.strategy_deepspeed import ZeroUpdate

        return ZeroUpdate(parameters, make_optimizer, run=run, worker=worker)
    return WholeUpdate(parameters, make_optimizer)


class WholeUpdate:
    """Every worker updates everything, from the same gradient."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], make_optimizer: MakeOptimizer):
        self._named = dict(parameters)
        self.parameters = list(parameters.values())
        self.optimizer = make_optimizer(self.parameters)

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{slot}": torch.as_tensor(value)
            for name, parameter in self._named.items()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
            if value is not None
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            prefix = f"{name}/"
            slots = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            if slots:
                self.optimizer.state[parameter] = {
                    slot: value.to(parameter.device) if value.dim() else value
                    for slot, value in slots.items()
                }
