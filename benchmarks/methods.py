"""Ways to get the gradient of a microbatch: the sum of clipped per-record gradients, or plain.

Each method takes a cell that it may use up (hooks, modes, attributes) and returns what runs one
step. A step leaves its result where its library leaves it; ``Step.result`` fetches it, outside of
what is timed.

Shapes: B records, K draws of each, R = B * K rows (record-major), P numbers that learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cells import Cell
from dpldm_dist.privacy.gradients import PerRecordGradients

GRID = 2.0**-30  # in units of clip_norm
VMAP_NUMBERS = 2**29  # per-record gradients that vmap may hold at once: 2 GiB


class Unsupported(Exception):
    """A method cannot do a cell; the text says why."""


@dataclass(frozen=True)
class Step:
    """``run`` is one step of one microbatch. ``result`` is the clipped sum (P,) that it left, in
    units of the gradient; the plain gradient for the baseline. ``forget`` frees that result."""

    run: Callable[[], None]
    result: Callable[[], Tensor]
    forget: Callable[[], None]
    note: str = ""


def nonprivate(cell: Cell, clip_norm: float) -> Step:
    """The gradient of the batch's mean loss; frozen parameters have none."""

    def run() -> None:
        for parameter in cell.parameters.values():
            parameter.grad = None
        cell.losses(cell.denoiser).mean().backward()

    def result() -> Tensor:
        return _flat(p.grad for p in cell.parameters.values())

    return Step(run, result, _forgetting(cell, "grad"))


def ours(cell: Cell, clip_norm: float) -> Step:
    """``PerRecordGradients``: clipped, rounded to the grid, added as integers."""
    grid = 2.0 ** torch.tensor(clip_norm * GRID).log2().floor().item()
    engine = PerRecordGradients(
        cell.denoiser, cell.parameters, clip_norm=clip_norm, draws=cell.draws, grid=grid
    )
    mask_B = torch.ones(cell.records, dtype=torch.bool, device=cell.device)

    def run() -> None:
        engine.add(lambda: cell.losses(cell.denoiser), mask_B)

    def forget() -> None:
        engine.take_sum()

    return Step(run, lambda: engine.take_sum().double() * grid, forget)


def opacus_hooks(cell: Cell, clip_norm: float) -> Step:
    """Opacus with its rules for each layer kind: per-record gradients, then its optimizer's sum."""
    from opacus import GradSampleModule

    cell.denoiser.train()
    return _opacus(
        cell, clip_norm, GradSampleModule(cell.denoiser, loss_reduction="sum", strict=False)
    )


def opacus_functorch(cell: Cell, clip_norm: float) -> Step:
    """Opacus with ``vmap`` inside each layer."""
    from opacus import GradSampleModule

    cell.denoiser.train()
    wrapped = GradSampleModule(
        cell.denoiser, loss_reduction="sum", strict=False, force_functorch=True
    )
    return _opacus(cell, clip_norm, wrapped)


def opacus_ew(cell: Cell, clip_norm: float) -> Step:
    """Opacus with PyTorch's expanded weights; they want labels with a second axis."""
    from opacus.grad_sample import GradSampleModuleExpandedWeights

    cell.denoiser.train()
    table = cell.denoiser.embedder.delta
    table.register_forward_pre_hook(lambda module, inputs: inputs[0][:, None])
    table.register_forward_hook(lambda module, inputs, output: output[:, 0])
    wrapped = GradSampleModuleExpandedWeights(cell.denoiser, loss_reduction="sum")
    return _opacus(cell, clip_norm, wrapped)


def _opacus(cell: Cell, clip_norm: float, wrapped: nn.Module) -> Step:
    """A step by Opacus's optimizer, up to the noise. It knows rows, not records: a record's K
    gradients are averaged in between."""
    from opacus.optimizers import DPOptimizer

    learning = list(cell.parameters.values())
    optimizer = DPOptimizer(
        torch.optim.SGD(learning, lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        cell.losses(wrapped).sum().backward()
        if cell.draws > 1:
            for parameter in learning:
                rows = parameter.grad_sample
                parameter.grad_sample = rows.view(-1, cell.draws, *rows.shape[1:]).mean(1)
        optimizer.clip_and_accumulate()

    return Step(
        run,
        lambda: _flat(p.summed_grad for p in learning),
        _forgetting(cell, "grad", "grad_sample", "summed_grad"),
        "its rows averaged into records before its optimizer" if cell.draws > 1 else "",
    )


def opacus_ghost(cell: Cell, clip_norm: float) -> Step:
    """Opacus's ghost clipping: norms in a first backward pass, the sum in a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    if cell.draws > 1:
        raise Unsupported("takes the norm of each row: the norm of a mean of K rows is not there")
    cell.denoiser.train()
    learning = list(cell.parameters.values())
    wrapped = GradSampleModuleFastGradientClipping(
        cell.denoiser, loss_reduction="sum", strict=False, max_grad_norm=clip_norm
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(learning, lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=None,
        loss_reduction="sum",
    )

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_R = cell.losses(wrapped)
        DPTensorFastGradientClipping(wrapped, optimizer, loss_R, "sum").backward()

    return Step(run, lambda: _flat(p.grad for p in learning), _forgetting(cell, "grad"))


def vmap(cell: Cell, clip_norm: float) -> Step:
    """``torch.func``: the gradient function of one record, mapped over the records, in chunks."""
    learning = {name: p.detach() for name, p in cell.parameters.items()}
    chunk = max(1, min(cell.records, VMAP_NUMBERS // cell.count))
    found: list[dict[str, Tensor]] = []

    def loss(parameters: Mapping[str, Tensor], *tensors: Tensor) -> Tensor:
        def denoiser(*inputs: Tensor) -> Tensor:
            return torch.func.functional_call(cell.denoiser, parameters, inputs)

        return cell.losses(denoiser, *tensors).mean()

    per_record = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0, 0))

    def run() -> None:
        found.clear()
        for start in range(0, cell.records, chunk):
            parts = [x.unflatten(0, (-1, cell.draws))[start : start + chunk] for x in cell.tensors]
            summed = clipped_sum(per_record(learning, *parts), clip_norm)
            if found:
                summed = {name: found[0][name].add_(part) for name, part in summed.items()}
            found[:] = [summed]

    cell.denoiser.requires_grad_(False)
    return Step(run, lambda: _flat(found[0].values()), found.clear, f"chunks of {chunk} records")


def clipped_sum(grads: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """Sum of per-record gradients (B, ...), each scaled to a joint L2 norm of at most
    ``clip_norm``."""
    square_B = sum(grad.flatten(1).square().sum(1) for grad in grads.values())
    factor_B = (clip_norm / square_B.sqrt()).clamp(max=1.0)
    return {name: torch.einsum("b,b...", factor_B, grad) for name, grad in grads.items()}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def _forgetting(cell: Cell, *attributes: str) -> Callable[[], None]:
    def forget() -> None:
        for parameter in cell.parameters.values():
            for attribute in attributes:
                setattr(parameter, attribute, None)

    return forget


METHODS: Mapping[str, Callable[[Cell, float], Step]] = {
    "nonprivate": nonprivate,
    "ours": ours,
    "opacus-hooks": opacus_hooks,
    "opacus-ghost": opacus_ghost,
    "opacus-ew": opacus_ew,
    "opacus-functorch": opacus_functorch,
    "vmap": vmap,
}
