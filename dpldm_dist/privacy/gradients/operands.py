"""What a layer's per-record gradients are made of, or the gradients themselves.

Shapes: those of ``privacy.gradients``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpldm_dist.privacy import native
from dpldm_dist.privacy.gradients import patches
from dpldm_dist.privacy.gradients.layers import Layer

UNIT = 2.0**-24  # rounding of float32
MOST_TOKENS = 4096  # of a record, for layers whose operands enter a contraction


@dataclass(frozen=True, eq=False)
class Operands:
    """What a layer's gradients are made of: ``grad_BTO`` and ``input``, (B, T, D); (B, T) of an
    embedding; of a convolution that sees through a ``window``, its images (R, C, H, W).

    ``squares_4B`` are those of ``RecordNorms``, where they were computed at once: while the
    gradient was still in the processor's cache.
    """

    layer: Layer
    input: Tensor
    grad_BTO: Tensor
    window: patches.Window | None = None
    squares_4B: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Products:
    """A layer's per-record gradients themselves, float32: (B, weights), (B, biases) or None; and
    the squared norm of both together, float64 (B,)."""

    layer: Layer
    weight: Tensor | None
    bias: Tensor | None
    square_B: Tensor


def tokens_of(operands: Operands) -> tuple[Tensor, native.Pairs]:
    """The input tokens of a layer, float32 (B, T, D), and which of them meet which outputs."""
    seen, window = operands.input.float(), operands.window
    if window is None:
        return seen, native.straight(seen.shape[1])
    return patches.pixels(seen, window), patches.pairs(window, *seen.shape[2:])


def by_input(terms: Sequence[Operands | Products]) -> list[list[Operands]]:
    """Operands grouped by the tensor that their layers read, and by whether they have a bias."""
    groups: dict[Any, list[Operands]] = {}
    for operands in (term for term in terms if isinstance(term, Operands)):
        tensor = operands.input
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault((key, operands.layer.bias is None), []).append(operands)
    return list(groups.values())


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """No autocast, and float32 products that are float32 (no TF32, no bf16)."""
    before = torch.get_float32_matmul_precision()
    if before == "highest" and not torch.is_autocast_enabled(device.type):
        with torch.no_grad():
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
