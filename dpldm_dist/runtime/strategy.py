"""How model and optimizer are held by several workers.

Private training takes :func:`private_update` only: it gets finished gradients, with their noise in
them. It never takes :func:`replicate`: a wrapper that averages gradients over workers would reduce
the private sum a second time, and outside the noise mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpldm_dist.config import RunConfig
from dpldm_dist.errors import ConfigError
from dpldm_dist.privacy.blocks import block_slices, flat_length, pieces_of
from dpldm_dist.runtime.worker import Worker


def replicate(model: nn.Module, worker: Worker) -> nn.Module:
    """``model`` with gradients averaged over the workers, or itself when there is one.

    The caller draws its share of a batch and scales nothing.
    """
    model.to(worker.device)
    if worker.world_size == 1:
        return model
    devices = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def bare(model: nn.Module) -> nn.Module:
    """The module inside :func:`replicate`'s result: the one to save, copy and take names from."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def checkpoint_activations(model: nn.Module, *, run: RunConfig) -> None:
    """In place, if the run does: blocks keep their inputs only, and compute the rest again on the
    way back. Losses and gradients have the same bits. Raises: ConfigError."""
    if not run.activation_checkpointing:
        return
    able = [m for m in model.modules() if getattr(m, "_supports_gradient_checkpointing", False)]
    if not able:
        raise ConfigError(
            f"run.activation_checkpointing: no part of {type(model).__name__} can compute its "
            "activations again, as in a VQ autoencoder. For this stage give "
            "--set run.activation_checkpointing=false."
        )
    for module in able:
        module.enable_gradient_checkpointing()


class PublicModel(Protocol):
    """A model in public training, with its AdamW. Every worker calls every method."""

    module: Callable[..., Any]
    """Answers losses of this worker's rows."""

    def step(self, loss: Tensor, rate: float) -> None:
        """Update with the gradient of the mean of ``loss`` over workers, of norm 1 at most."""

    def followed(self) -> dict[str, Tensor]:
        """What this worker holds of every parameter, float32: whole, or its part."""

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of what workers hold in the manner of ``followed``."""

    def parts(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this worker holds of whole tensors."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """``name/slot`` -> the whole tensor: the same for any strategy and number of workers."""

    def load(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None: ...

    def finish(self, averages: Mapping[str, Tensor]) -> None:
        """Put whole ``averages`` into the model that was given, and let go of all else."""


def public_model(
    objective: nn.Module, *, weight_decay: float, run: RunConfig, worker: Worker
) -> PublicModel:
    """``objective`` held as ``run.strategy`` says. Raises: ConfigError."""
    if run.strategy == "fsdp":
        raise ConfigError(
            "run.strategy = fsdp: expected ddp or deepspeed in public training, where no weights "
            "are frozen. Set run.strategy=deepspeed and run.deepspeed.zero_stage=3."
        )
    if run.strategy == "deepspeed":
        from dpldm_dist.runtime.strategy_deepspeed import ZeroModel

        return ZeroModel(objective, weight_decay=weight_decay, run=run, worker=worker)
    return Replicas(objective, weight_decay=weight_decay, run=run, worker=worker)


def public_optimizer(
    parameters: Iterable[nn.Parameter], *, weight_decay: float, fused: bool | None = None
) -> torch.optim.Optimizer:
    """AdamW as public training uses it; the rate is set in each step."""
    return torch.optim.AdamW(
        parameters, 0.0, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused
    )


class Replicas:
    """The whole model on every worker."""

    def __init__(
        self, objective: nn.Module, *, weight_decay: float, run: RunConfig, worker: Worker
    ):
        checkpoint_activations(objective, run=run)
        self.module = replicate(objective, worker)
        self._named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self._optimizer = public_optimizer(
            self._named.values(),
            weight_decay=weight_decay,
            fused=worker.device.type == "cpu",  # one kernel for all parameters
        )

    def step(self, loss: Tensor, rate: float) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self._named.values(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def followed(self) -> dict[str, Tensor]:
        return dict(self._named)

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(parts)

    def parts(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(wholes)

    def optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{slot}": torch.as_tensor(value)
            for name, parameter in self._named.items()
            for slot, value in self._optimizer.state[parameter].items()
        }

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(parameters[name])
            prefix = f"{name}/"
            self._optimizer.state[parameter] = {
                slot.removeprefix(prefix): value.to(parameter.device) if value.dim() else value
                for slot, value in state.items()
                if slot.startswith(prefix)
            }

    @torch.no_grad()
    def finish(self, averages: Mapping[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(averages[name])


# --- private training -----------------------------------------------------------------------------

SHARD_FROM = 1 << 17
"""Parameters from which on workers share the update: measured, see docs/architecture.md."""

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


class PrivateUpdate(Protocol):
    """Updates parameters with a finished gradient. Every worker calls every method."""

    optimizer: torch.optim.Optimizer
    """Whose learning rate a schedule sets."""
    parameters: list[nn.Parameter]
    """Where the finished gradient is to be put before ``step``, in the order of the flat vector."""
    bounds: list[int] | None
    """Of the slices of the flat vector, if each worker updates its own; else None."""

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
    extra: int = 0,
) -> PrivateUpdate:
    """How the run updates ``parameters`` as they are now. Raises: ConfigError.

    ``extra``: coordinates that lie behind the gradient in a sum.
    """
    if run.strategy == "deepspeed":
        from dpldm_dist.runtime.strategy_deepspeed import ZeroUpdate

        return ZeroUpdate(parameters, make_optimizer, run=run, worker=worker)
    length = flat_length(parameters.values())
    bounds = None
    if shares_update(length, run=run, worker=worker):
        bounds = _gradient_slices(length, extra=extra, worker=worker)
    return PiecewiseUpdate(parameters, make_optimizer, worker=worker, bounds=bounds)


def shares_update(length: int, *, run: RunConfig, worker: Worker) -> bool:
    """Whether each worker updates its own slice of ``length`` parameters."""
    if run.strategy == "deepspeed" or worker.world_size == 1 or run.update == "whole":
        return False
    return run.update == "sharded" or length >= SHARD_FROM


def own_slice(length: int, *, extra: int, worker: Worker) -> range:
    """The coordinates of a gradient of ``length`` that this worker updates, if they are shared."""
    bounds = _gradient_slices(length, extra=extra, worker=worker)
    return range(bounds[worker.rank], bounds[worker.rank + 1])


def _gradient_slices(length: int, *, extra: int, worker: Worker) -> list[int]:
    """Where the slices of a sum cut the gradient in it."""
    return [min(bound, length) for bound in block_slices(length + extra, worker.world_size)]


class PiecewiseUpdate:
    """Updates all parameters on every worker, or on each its own slice: the same bits.

    An optimizer works on ``pieces_of`` the parameters, whose make-up does not depend on who updates
    them; its state exists for the pieces of this worker only.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        make_optimizer: MakeOptimizer,
        *,
        worker: Worker,
        bounds: list[int] | None,
    ):
        self._named = dict(parameters)
        self._length = flat_length(parameters.values())
        self._worker = worker
        self.bounds = bounds
        self.parameters = pieces_of(list(parameters.values()))
        mine = range(self._length)
        if bounds is not None:
            mine = range(bounds[worker.rank], bounds[worker.rank + 1])
        self._own = [(start, p) for start, p in self._placed() if start in mine]
        # an optimizer wants at least one parameter, and a worker may own none
        self._none = [] if self._own else [nn.Parameter(torch.zeros(0, device=worker.device))]
        self.optimizer = make_optimizer([piece for _, piece in self._own] or self._none)

    def step(self) -> None:
        for piece in self._none:
            piece.grad = torch.zeros_like(piece)
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state(self) -> dict[str, Tensor]:
        first = (self._none or [piece for _, piece in self._own])[0]
        found: dict[str, Tensor] = {}
        kept = self.optimizer.state.get(first, {})
        for slot in sorted(kept):  # gathered one by one: in the same order on every worker
            value = kept[slot]
            if not torch.is_tensor(value):
                continue
            whole = self._gathered(slot) if slot != "step" else None
            for name, start, parameter in self._starts():
                found[f"{name}/{slot}"] = (
                    value
                    if whole is None
                    else whole[start : start + parameter.numel()].view_as(parameter)
                )
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        for slot in sorted({name.rpartition("/")[2] for name in state}):
            saved = [state[f"{name}/{slot}"] for name in self._named]
            if slot == "step":  # one number, of which every piece keeps its own
                for _, piece in self._own:
                    self.optimizer.state[piece][slot] = saved[0].clone()
                continue
            whole_P = torch.cat([value.flatten() for value in saved])
            for start, piece in self._own:
                part = whole_P[start : start + piece.numel()]
                self.optimizer.state[piece][slot] = part.to(piece.device, copy=True)

    def _gathered(self, slot: str) -> Tensor:
        """One slot of the optimizer's state, whole. Every worker takes part."""
        like = self.parameters[0]
        whole_P = torch.zeros(self._length, dtype=like.dtype, device=like.device)
        for start, piece in self._own:
            whole_P[start : start + piece.numel()] = self.optimizer.state[piece][slot]
        if self.bounds is not None:
            self._worker.collective.gather_slices_(whole_P, self.bounds)
        return whole_P

    def _placed(self) -> Iterator[tuple[int, nn.Parameter]]:
        start = 0
        for piece in self.parameters:
            yield start, piece
            start += piece.numel()

    def _starts(self) -> Iterator[tuple[str, int, nn.Parameter]]:
        start = 0
        for name, parameter in self._named.items():
            yield name, start, parameter
            start += parameter.numel()
