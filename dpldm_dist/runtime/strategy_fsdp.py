"""Frozen weights divided over the workers (FSDP2), for networks that one device does not hold.

The trainable parameters stay whole, and FSDP never sees them: nothing here touches a private
gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from dpldm_dist.config import RunConfig
from dpldm_dist.runtime.worker import Worker


def shards_frozen(run: RunConfig, worker: Worker) -> bool:
    """Whether each worker holds a shard of the frozen weights only. Then all workers must make
    equally many passes through the model: each pass gathers the weights from everybody."""
    return run.strategy == "fsdp" and worker.world_size > 1


def shard_frozen(
    model: nn.Module,
    layers: Sequence[nn.Module],
    parameters: Iterable[nn.Parameter],
    *,
    run: RunConfig,
    worker: Worker,
) -> None:
    """In place: divide all weights of ``model`` but ``parameters`` over the workers, if the run
    does.

    ``layers``: modules of ``model`` that run one after the other. A pass gathers the weights of one
    at a time (FSDP fetches the next one meanwhile), on the way forward and on the way back, and
    those of no layer throughout. Weights go to the device of the worker layer after layer.

    Formal guarantees: ``parameters`` stay what they are, whole on every worker, and their gradients
    go through no collective. Losses and gradients have the bits of the whole model.
    """
    if not shards_frozen(run, worker):
        return
    learning = set(parameters)
    mesh = init_device_mesh(worker.device.type, (worker.world_size,))
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=learning)
        module.register_forward_pre_hook(_hide, prepend=True, with_kwargs=True)
        module.register_forward_pre_hook(_show, with_kwargs=True)
    for layer, later in pairwise(layers):
        layer.register_forward_hook(partial(_let_go_on_the_way_back, later))


class _Hidden:
    """Inputs of a module that FSDP passes on untouched.

    It would put a node of its own before all inputs, to notice the end of a backward pass. There
    the gradients of an input that is read twice are added before those from other modules: another
    order than without FSDP, so other bits.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.args = args
        self.kwargs = kwargs


def _hide(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return (_Hidden(args, kwargs),), {}


def _show(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args[0].args, args[0].kwargs


def _let_go_on_the_way_back(
    later: FSDPModule, module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    """When the gradient comes to ``output``, the layer after it is done: autograd goes through
    operations in the reverse of their order."""
    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: later.reshard())


def _tensors(output: Any) -> Iterator[Tensor]:
    for value in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


@torch.no_grad()
def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each parameter, whole, one after the other. Every worker takes part."""
    for name, parameter in model.named_parameters():
        yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
