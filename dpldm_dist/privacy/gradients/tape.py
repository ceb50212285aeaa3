"""Taps the layers during one forward and one backward pass, and keeps what is smallest.

Shapes: those of ``privacy.gradients``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import native
from dpldm_dist.privacy.gradients import patches
from dpldm_dist.privacy.gradients.layers import Layer
from dpldm_dist.privacy.gradients.norms import with_squares
from dpldm_dist.privacy.gradients.operands import (
    MOST_TOKENS,
    Operands,
    Products,
    plain_arithmetic,
    tokens_of,
)

_NUMBERS_WORTH = 64  # inner products' multiplications, twice, that cost as much as a kept number


class Tape:
    """Collects what every tapped layer keeps during one backward pass."""

    def __init__(self, *, records: int, draws: int, device: torch.device):
        self.rows = records * draws
        self.terms: list[Operands | Products] = []
        self._draws = draws
        self._seen: set[str] = set()
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    @contextmanager
    def tapping(self, layers: Sequence[Layer]) -> Iterator[None]:
        """While this is open, a forward pass through the layers is recorded."""
        hooks = [layer.module.register_forward_hook(self._hook(layer)) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, layer: Layer, seen: Tensor, version: int, grad: Tensor) -> None:
        """Called by backward with the gradient of a layer's output; ``seen`` is its input."""
        if layer.name in self._seen:
            raise PrivacyError(
                f"Module {layer.name} ran more than once in a forward pass: expected once. Freeze "
                "it, or give each use its own module."
            )
        if seen._version != version:
            raise PrivacyError(
                f"The input of module {layer.name} was modified in place after the module had read "
                "it: expected it unchanged until the backward pass."
            )
        self._seen.add(layer.name)
        self.terms.append(keep(layer, seen, grad, draws=self._draws))

    def _hook(self, layer: Layer) -> Callable[..., Tensor]:
        def tap(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            seen = args[0].detach()
            if seen.shape[:1] != (self.rows,) or output.shape[:1] != (self.rows,):
                raise PrivacyError(
                    f"Module {layer.name} got an input of {tuple(seen.shape)}: expected {self.rows}"
                    " rows (records times draws) in front. Freeze it, or run it on every row."
                )
            if seen.is_floating_point() and seen.dtype != output.dtype:
                seen = seen.to(output.dtype)  # what the layer computed with under autocast
            if not output.requires_grad:
                output = _Root.apply(output, self._anchor)
            output.register_hook(partial(self._record, layer, seen, seen._version))
            return output

        return tap


class _Root(torch.autograd.Function):
    """The identity, from which a backward pass can start though nothing before it learns."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def keep(layer: Layer, seen: Tensor, grad: Tensor, *, draws: int) -> Operands | Products:
    """What is kept of a layer: its per-record gradients, or what they are made of.

    What is smaller, which is mostly cheaper, too: both take T D O multiplications, then products
    are written and read again, and a Gram form takes T^2 (D + O) / 2 more. Where that is dearer,
    products are kept that take up to twice the memory.
    """
    if layer.kind in ("group_norm", "layer_norm"):
        return _norm_products(layer, seen, grad, draws=draws)
    if layer.kind == "embedding":
        return with_squares(_embedding_operands(layer, seen, grad, draws=draws))
    window = patches.window_of(layer.module, draws) if layer.kind == "conv" else None
    if layer.kind == "conv":
        grad_BTO = patches.fold(grad.flatten(2).mT, draws)
        kept = seen if window is not None else patches.fold(seen.flatten(2).mT, draws)
    else:
        grad_BTO, kept = patches.fold(grad, draws), patches.fold(seen, draws)
    if layer.weight is None:
        bias_BO = _token_sums(grad_BTO)
        return Products(layer, None, bias_BO, _squares(bias_BO))
    tokens, out_width = grad_BTO.shape[1:]
    pixels = tokens if window is None else draws * seen.shape[2] * seen.shape[3]
    width = kept.shape[2] if window is None else kept.shape[1]  # a pixel is read where it lies
    weights = layer.module.weight.numel()
    operands = Operands(layer, kept, grad_BTO, window)
    numbers = tokens * (width + out_width)
    dear = pixels**2 * width + tokens**2 * out_width >= _NUMBERS_WORTH * weights
    small = weights > (2 * numbers if dear else numbers)
    if small and 0 < tokens <= MOST_TOKENS and pixels <= MOST_TOKENS:
        return with_squares(operands)
    weight_BP, square_B = _products(operands)
    if layer.bias is None:
        return Products(layer, weight_BP, None, square_B)
    bias_BO = _token_sums(grad_BTO)
    return Products(layer, weight_BP, bias_BO, square_B + _squares(bias_BO))


def _token_sums(grad_BTO: Tensor) -> Tensor:
    """The gradients of a layer's bias, float32 (B, O)."""
    grad_BTO = grad_BTO.float()
    return native.token_sums(grad_BTO) if native.serves(grad_BTO.device) else grad_BTO.sum(1)


def _products(operands: Operands) -> tuple[Tensor, Tensor]:
    """The gradients of a layer's weight, float32 (B, weights), and their squared norms, (B,)."""
    grad_BTO = operands.grad_BTO.float()
    if native.serves(grad_BTO.device):
        products_BODA, square_B = native.products(grad_BTO, *tokens_of(operands))
        return products_BODA.flatten(1), square_B
    input_BTD = operands.input.float()
    if operands.window is not None:
        input_BTD = patches.tokens(input_BTD, operands.window)
    with plain_arithmetic(grad_BTO.device):
        products_BP = torch.bmm(grad_BTO.mT, input_BTD).flatten(1)
    return products_BP, _squares(products_BP)


def _squares(part_BP: Tensor) -> Tensor:
    """Squared norm of every row, float64 (B,)."""
    return torch.linalg.vector_norm(part_BP, dim=1, dtype=torch.float64).square()


def _norm_products(layer: Layer, seen: Tensor, grad: Tensor, *, draws: int) -> Products:
    """Per-record gradients of a norm's scale (sum of gradient times normalised input) and shift."""
    module, grad = layer.module, grad.float()
    if native.serves(grad.device):
        groups, records = getattr(module, "num_groups", 1), len(grad) // draws
        if layer.kind == "group_norm":
            pair = [tensor.reshape(*tensor.shape[:2], -1) for tensor in (seen, grad)]
        else:
            width = math.prod(module.normalized_shape)
            pair = seen.reshape(-1, width, 1), grad.reshape(-1, width, 1)
        scale_BW, shift_BW = native.norm_products(
            pair[0].float(), pair[1], records=records, groups=groups, eps=module.eps
        )
        return _learning(layer, scale_BW, shift_BW)
    if layer.kind == "group_norm":
        normal = F.group_norm(seen.float(), module.num_groups, eps=module.eps)
        sums, width = tuple(range(2, grad.dim())), grad.shape[1]
    else:
        normal = F.layer_norm(seen.float(), module.normalized_shape, eps=module.eps)
        sums = tuple(range(1, grad.dim() - len(module.normalized_shape)))
        width = math.prod(module.normalized_shape)

    def per_record(tensor: Tensor) -> Tensor:
        rows = tensor.sum(sums) if sums else tensor
        return rows.reshape(-1, draws, width).sum(1)

    return _learning(layer, per_record(grad * normal), per_record(grad))


def _learning(layer: Layer, weight_BP: Tensor, bias_BO: Tensor) -> Products:
    """Those of the two that learn."""
    pairs = ((layer.weight, weight_BP), (layer.bias, bias_BO))
    weight, bias = (part if place is not None else None for place, part in pairs)
    square_B = sum(_squares(part) for part in (weight, bias) if part is not None)
    return Products(layer, weight, bias, square_B)


def _embedding_operands(layer: Layer, seen: Tensor, grad: Tensor, *, draws: int) -> Operands:
    records = len(seen) // draws
    grad_BTO = grad.reshape(records, -1, grad.shape[-1])
    index_BT = seen.reshape(records, -1)
    if index_BT.shape[1] > MOST_TOKENS:
        raise PrivacyError(
            f"Module {layer.name} embeds {index_BT.shape[1]} tokens of a record: expected at most "
            f"{MOST_TOKENS}. Freeze it, or take fewer draws."
        )
    if layer.module.padding_idx is not None:
        grad_BTO = grad_BTO.masked_fill((index_BT == layer.module.padding_idx)[..., None], 0.0)
    return Operands(layer, index_BT, grad_BTO)
