"""DeepSpeed's ZeRO behind the names of this package. The only file that imports ``deepspeed``.

Public interfaces only: ``initialize``, the engine's forward, backward and step, the ``safe_*``
accessors of ``deepspeed.utils``, and ``set_accelerator``. Nothing is compiled on a CPU.

What DeepSpeed would do unasked and a private update must not: scale a gradient to norm 1 (its
default ``gradient_clipping`` is 1.0), average over accumulated micro-batches, reduce in half
precision, skip a step whose loss overflowed. All of it is switched off or refused by name.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpldm_dist.config import DeepSpeedConfig, RunConfig
from dpldm_dist.errors import ConfigError
from dpldm_dist.runtime.strategy import checkpoint_activations, public_optimizer
from dpldm_dist.runtime.worker import Worker

_MOST_BUCKET = 50_000_000  # elements; DeepSpeed's own half a billion is 2 GB on every worker
Reduction = Literal["mean", "sum"]

_OURS = {
    "optimizer": "the stage makes it",
    "scheduler": "the stage sets the learning rate",
    "gradient_clipping": "the stage sets it: 1.0 for public training, none for private training,"
    " whose finished gradient has its noise in it and would lose its scale",
    "gradient_accumulation_steps": "a step has one gradient; accumulated, DeepSpeed would divide it"
    " once more. Set the batch instead",
    "train_batch_size": "set pretrain.batch, autoencoder.batch or finetune.batch",
    "train_micro_batch_size_per_gpu": "set run.microbatch",
    "fp16": "loss scaling skips a step when a gradient overflows, which depends on the records. Set"
    " run.deepspeed.bf16 for public training",
    "bf16": "set run.deepspeed.bf16",
    "torch_autocast": "set run.deepspeed.bf16",
    "amp": "set run.deepspeed.bf16",
    "communication_data_type": "gradients are reduced in float32",
    "gradient_allreduce_op": "the stage sets it",
    "prescale_gradients": "the finished gradient has its scale",
    "gradient_predivide_factor": "the finished gradient has its scale",
    "compression_training": "it changes what is trained",
    "zero_optimization.stage": "set run.deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "set run.deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "set run.deepspeed.offload_parameters",
    "zero_optimization.round_robin_gradients": "parameters keep their order",
    "zero_optimization.zero_quantized_gradients": "a compressed gradient is not the released one",
    "zero_optimization.zero_quantized_weights": "compressed weights differ between the workers",
}
_HARMLESS = {  # what may be set for private training: speed and memory only
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_scatter",
    "wall_clock_breakdown",
    "steps_per_print",
}
_COMPRESSING = ("OneBit", "ZeroOne", "1bit", "Muon")


# --- what a config may ask for --------------------------------------------------------------------


def refuse_for_public_training(settings: DeepSpeedConfig) -> None:
    """Raises: ConfigError for options that this package decides."""
    for name, _ in _leaves(settings.options):
        for ours, reason in _OURS.items():
            if name == ours or name.startswith(ours + "."):
                raise ConfigError(f"run.deepspeed.options.{name}: remove it; {reason}.")
    if settings.offload_parameters and settings.zero_stage != 3:
        raise ConfigError(
            f"run.deepspeed.offload_parameters with zero_stage = {settings.zero_stage}: only ZeRO-3"
            " shards parameters. Set run.deepspeed.zero_stage=3."
        )
    if settings.offload_optimizer and settings.zero_stage == 0:
        raise ConfigError(
            "run.deepspeed.offload_optimizer with zero_stage = 0: expected 1, 2 or 3. Raise "
            "run.deepspeed.zero_stage."
        )


def refuse_for_private_training(settings: DeepSpeedConfig) -> None:
    """What DeepSpeed may not do to a finished private gradient.

    Raises: ConfigError that names the option and says why.
    """
    refuse_for_public_training(settings)
    if settings.zero_stage == 3:
        raise ConfigError(
            "run.deepspeed.zero_stage = 3: private training clips the gradient of every record over"
            " whole layers, and ZeRO-3 holds none of them whole; its hooks would gather and reduce "
            "at every microbatch, of which workers have different numbers. Expected 0, 1 or 2: give"
            " finetune --set run.deepspeed.zero_stage=2."
        )
    if settings.bf16:
        raise ConfigError(
            "run.deepspeed.bf16: the bound on what one record adds is proved for float32. Give "
            "finetune --set run.deepspeed.bf16=false."
        )
    for name, _ in _leaves(settings.options):
        if name not in _HARMLESS:
            raise ConfigError(
                f"run.deepspeed.options.{name}: what it does to a finished private gradient is not "
                f"known. Remove it; private training takes {', '.join(sorted(_HARMLESS))}."
            )


def refuse_compressing(optimizer: torch.optim.Optimizer) -> None:
    """Raises: ConfigError for an optimizer that exchanges or rounds gradients on its own."""
    kind = type(optimizer).__name__
    if any(kind.lower().startswith(name.lower()) for name in _COMPRESSING):
        raise ConfigError(
            f"Optimizer {kind}: it compresses what workers exchange, so they would not apply the "
            "released gradient. Expected adam or sgd."
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        inside = isinstance(value, Mapping) and value
        found += _leaves(value, f"{prefix}{name}.") if inside else [(prefix + name, value)]
    return found


def engine_config(
    settings: DeepSpeedConfig, *, workers: int, parameters: int, clip: float, reduction: Reduction
) -> dict[str, Any]:
    """What the engine is told. ``clip`` 0: gradients keep their norm, which is not its default."""
    bucket = min(_MOST_BUCKET, -(-parameters // 1024) * 1024)  # DeepSpeed wants it even
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "round_robin_gradients": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_param_persistence_threshold"] = 0
        if settings.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
    options = dict(settings.options)
    zero |= options.pop("zero_optimization", {})
    return options | {
        "train_batch_size": workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "gradient_allreduce_op": reduction,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


# --- the engine -----------------------------------------------------------------------------------


def start_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    settings: DeepSpeedConfig,
    worker: Worker,
    clip: float,
    reduction: Reduction,
) -> Any:
    """DeepSpeed's engine of ``module`` with ``optimizer``."""
    deepspeed = _deepspeed(worker)
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=engine_config(
            settings,
            workers=worker.world_size,
            parameters=parameters,
            clip=clip,
            reduction=reduction,
        ),
        dist_init_required=False,
    )
    require_clip(engine, clip)
    return engine


def require_clip(engine: Any, clip: float) -> None:
    """What DeepSpeed does when nobody tells it, it must not do here."""
    found = float(engine.gradient_clipping())
    assert found == clip, f"DeepSpeed clips to {found}, told {clip}"


def _deepspeed(worker: Worker) -> Any:
    """The library, quiet, on this worker's device and process group."""
    os.environ["DS_ACCELERATOR"] = worker.device.type  # read once, when it is imported
    os.environ["LOCAL_RANK"] = str(worker.local_rank)
    import deepspeed
    from deepspeed.accelerator import set_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if worker.device.type == "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        class WithoutCompiler(CPU_Accelerator):
            """DeepSpeed would compile a shared-memory all-reduce; gloo does without."""

            def create_op_builder(self, op_name: str) -> Any:
                return None

        set_accelerator(WithoutCompiler())
    if not dist.is_initialized():  # one worker alone
        kinds = "cpu:gloo,cuda:nccl" if worker.device.type == "cuda" else "gloo"
        dist.init_process_group(kinds, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(
        dist_backend="nccl" if worker.device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        dist_init_required=False,
    )
    return deepspeed


# --- public training ----------------------------------------------------------------------------


class ZeroModel:
    """A copy of a model in DeepSpeed's hands; the one that was given changes in ``finish`` only.

    Weights, gradients, averages and the optimizer's state are float32; ``bf16`` computes in
    bfloat16 inside the model. What is saved is whole and in this package's format, so it goes on at
    another number of workers, at another ZeRO stage or without DeepSpeed; DeepSpeed's own universal
    checkpoints would do the first of these, and are pickles, which this package never opens.
    """

    def __init__(
        self, objective: nn.Module, *, weight_decay: float, run: RunConfig, worker: Worker
    ):
        settings = run.deepspeed
        refuse_for_public_training(settings)
        self._given = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        model = copy.deepcopy(objective).to(worker.device)
        checkpoint_activations(model, run=run)
        self._named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._sharded = settings.zero_stage == 3
        self._optimizer = public_optimizer(self._named.values(), weight_decay=weight_decay)
        self._linear = torch.nn.functional.linear  # ZeRO-3's engine puts its own there
        with self._own_linear():
            self._engine = start_engine(
                _InBfloat16(model) if settings.bf16 else model,
                self._optimizer,
                settings=settings,
                worker=worker,
                clip=1.0,
                reduction="mean",
            )
        self._state = OptimizerState(self._named, self._optimizer, sharded=self._sharded)
        self._state.make(self._empty_step)

    def module(self, *inputs: Tensor) -> Any:
        with self._own_linear():
            return self._engine(*inputs)

    def step(self, loss: Tensor, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with self._own_linear():  # checkpointed activations are computed again here
            self._engine.backward(loss)
        self._engine.step()

    def followed(self) -> dict[str, Tensor]:
        if not self._sharded:
            return dict(self._named)
        from deepspeed.utils import safe_get_local_fp32_param

        return {name: safe_get_local_fp32_param(p) for name, p in self._named.items()}

    def whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._sharded:
            return {name: part.detach() for name, part in parts.items()}
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: self._lent(name, part, safe_get_full_fp32_param) for name, part in parts.items()
        }

    def parts(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._sharded:
            return dict(wholes)
        return {name: _part_like(own, wholes[name]) for name, own in self.followed().items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        return self._state.whole()

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            _write_parameter(parameter, parameters[name].to(parameter.device))
        if self._sharded:  # what the optimizer keeps beside what the model computes with
            for name, part in self.parts(parameters).items():
                self._set_part(name, part)
        self._state.load(state)

    @torch.no_grad()
    def finish(self, averages: Mapping[str, Tensor]) -> None:
        for name, parameter in self._given.items():
            parameter.copy_(averages[name])

    def _empty_step(self) -> None:
        import deepspeed

        parameters = list(self._named.values())
        with deepspeed.zero.GatheredParameters(parameters):  # as whole as they were a moment ago
            self._engine.backward(torch.stack([(p * 0.0).sum() for p in parameters]).sum())
        self._engine.step()

    @contextmanager
    def _own_linear(self) -> Iterator[None]:
        """Within: the ``linear`` that the engine chose. DeepSpeed puts one that keeps no gathered
        weight in its place in the whole process, and would leave it to every other model."""
        functional = torch.nn.functional
        before, functional.linear = functional.linear, self._linear
        try:
            yield
        finally:
            self._linear, functional.linear = functional.linear, before

    def _lent(self, name: str, part: Tensor, read: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """What ``read`` finds while the parameter's part is ``part``."""
        own = self.followed()[name].clone()
        self._set_part(name, part)
        found = read(self._named[name]).detach().cpu().clone()
        self._set_part(name, own)
        return found

    def _set_part(self, name: str, part: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(self._named[name], part)


class _InBfloat16(nn.Module):
    """Computes in bfloat16 where that is safe; weights and losses stay float32."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return self.inner(*inputs)


def _write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Into what the model computes with and, below ZeRO-3, what the optimizer keeps."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
    if parameter.shape == value.shape:
        safe_set_full_fp32_param(parameter, value)


def _part_like(own: Tensor, whole: Tensor) -> Tensor:
    """This worker's part of ``whole``, as ZeRO-3 cuts it: equal parts, the last one padded.

    (DeepSpeed's own setters of whole tensors fail where the parts do not come out even.)
    """
    padded = own.new_zeros(own.numel() * dist.get_world_size())
    padded[: whole.numel()] = whole.flatten()
    return padded.view(-1, own.numel())[dist.get_rank()].view_as(own).clone()


# --- private training -----------------------------------------------------------------------------


class ZeroUpdate:
    """Updates parameters with a *finished* gradient through DeepSpeed's ZeRO-0, 1 or 2.

    The model is not wrapped: records' gradients never pass through DeepSpeed. The engine holds the
    trainable parameters only, and its loss is the sum of <parameter, finished gradient>, whose
    gradient is that gradient. One worker gives it and the others give zeros, of which DeepSpeed
    takes the *sum*: a mean of equal numbers would be rounded, and the next step's sum, to which
    its noise is bound, would be another.

    Formal guarantees: what the optimizer gets is the finished gradient in every bit, whatever the
    number of workers; nothing is averaged, clipped, accumulated or skipped.
    Raises: ConfigError for settings that would break this.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        make_inner: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
        *,
        run: RunConfig,
        worker: Worker,
    ):
        refuse_for_private_training(run.deepspeed)
        self.bounds = None
        self._gives = worker.rank == 0
        self._named = dict(parameters)
        self.parameters = list(parameters.values())
        self.optimizer = make_inner(self.parameters)
        refuse_compressing(self.optimizer)
        self._engine = start_engine(
            _Products(self.parameters),
            self.optimizer,
            settings=run.deepspeed,
            worker=worker,
            clip=0.0,
            reduction="sum",
        )
        self._state = OptimizerState(self._named, self.optimizer)
        self._state.make(lambda: self._apply([torch.zeros_like(p) for p in self.parameters]))

    def step(self) -> None:
        """Update with the gradients that lie in ``parameters``."""
        gradients = [p.grad for p in self.parameters]
        self.zero_grad()
        if not self._gives:
            gradients = [torch.zeros_like(gradient) for gradient in gradients]
        self._apply(gradients)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """``name/slot`` -> the whole tensor. Every worker takes part."""
        return self._state.whole()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state()`` of any update of the same parameters."""
        self._state.load(state)

    @torch.enable_grad()
    def _apply(self, gradients: list[Tensor]) -> None:
        self._engine.backward(self._engine(gradients))
        self._engine.step()


class _Products(nn.Module):
    """A loss whose gradient is what it is given."""

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self._learning = nn.ParameterList(parameters)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        pairs = zip(self._learning, gradients, strict=True)
        return torch.stack([(p * g).sum() for p, g in pairs]).sum()


# --- the optimizer's state, whole -----------------------------------------------------------------


class OptimizerState:
    """Reads and writes the state of an optimizer whose shards DeepSpeed spread over workers.

    What is read is whole and does not depend on strategy, ZeRO stage or the number of workers.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        sharded: bool = False,
    ):
        self._sharded = sharded  # ZeRO-3
        self._parameters = dict(parameters)
        self._optimizer = optimizer
        self._slots: list[str] = []

    def make(self, empty_step: Callable[[], None]) -> None:
        """Let the state come into being by a step that changes nothing, and set it to zero."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        empty_step()
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for entry in self._entries():
            for slot, value in entry.items():
                if torch.is_tensor(value):
                    value.zero_()
                    if value.dim() and slot not in self._slots:
                        self._slots.append(slot)

    def whole(self) -> dict[str, Tensor]:
        """``name/slot`` -> whole tensor. Every worker takes part."""
        found = {}
        counts = {
            slot: value
            for entry in self._entries()
            for slot, value in entry.items()
            if torch.is_tensor(value) and not value.dim()
        }
        for name, parameter in self._parameters.items():
            for slot in self._slots:
                found[f"{name}/{slot}"] = self._read(parameter, slot)
            found |= {f"{name}/{slot}": value.clone() for slot, value in counts.items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            for slot in self._slots:
                self._write(parameter, slot, state[f"{name}/{slot}"])
        first = next(iter(self._parameters))
        for entry in self._entries():
            for slot, value in entry.items():
                if torch.is_tensor(value) and not value.dim():
                    value.copy_(state[f"{first}/{slot}"])

    def _entries(self) -> list[dict[str, Any]]:
        return list(self._optimizer.state.values())

    def _read(self, parameter: nn.Parameter, slot: str) -> Tensor:
        if parameter in self._optimizer.state:  # ZeRO-0: every worker has all of it
            return self._optimizer.state[parameter][slot].detach().cpu().clone()
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, slot).detach().cpu().clone()

    def _write(self, parameter: nn.Parameter, slot: str, value: Tensor) -> None:
        value = value.to(parameter.device)
        if parameter in self._optimizer.state:
            self._optimizer.state[parameter][slot].copy_(value)
            return
        from deepspeed import utils

        if self._sharded:
            own = utils.safe_get_local_optimizer_state(parameter, slot)
            utils.safe_set_local_optimizer_state(parameter, _part_like(own, value), slot)
            return
        utils.safe_set_full_optimizer_state(parameter, value, slot)
