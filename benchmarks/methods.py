"""Ways to get the gradient of a microbatch: the sum of clipped per-record gradients, or plain.

Each method takes a cell that it may use up (hooks, modes, attributes) and returns what runs one
step. A step leaves its result where its library leaves it; ``Step.result`` fetches it, outside of
what is timed.

Shapes: B records, K draws of each, R = B * K rows (record-major), P numbers that learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cells import Cell
from dpldm_dist.privacy.gradients import PerRecordGradients

GRID = 2.0**-30  # in units of clip_norm
VMAP_NUMBERS = 2**28  # per-record gradients that vmap may hold at once: 1 GiB


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
        return torch.cat([p.grad.flatten().double() for p in cell.parameters.values()])

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

    return Step(run, lambda: engine.take_sum().double() * grid, lambda: None)


def _forgetting(cell: Cell, *attributes: str) -> Callable[[], None]:
    def forget() -> None:
        for parameter in cell.parameters.values():
            for attribute in attributes:
                setattr(parameter, attribute, None)

    return forget


METHODS: Mapping[str, Callable[[Cell, float], Step]] = {"nonprivate": nonprivate, "ours": ours}
