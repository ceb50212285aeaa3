"""Joint norms of records over all layers, and the factors to which they are clipped.

Shapes: those of ``privacy.gradients``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpldm_dist.privacy import native
from dpldm_dist.privacy.gradients import patches
from dpldm_dist.privacy.gradients.operands import UNIT, Operands, Products, by_input, tokens_of

LEAST_RATIO = 2.0**-8  # of a norm to its Cauchy bound
_LARGEST_SQUARE = float(torch.finfo(torch.float32).max)
_STACKED_NUMBERS = 2**20  # Gram matrices handled by one operation


@dataclass(frozen=True, eq=False)
class RecordNorms:
    """Of each record over all layers, float64 (B,): the computed squared norm; a bound on how far
    the exact one can lie above it; the square of the Cauchy bound on absolute sums; and the square
    of a bound on how far the gradient that enters a sum is from that of the stored operands."""

    square_B: Tensor
    slack_B: Tensor
    absolute_square_B: Tensor
    own_square_B: Tensor


def record_norms(terms: Sequence[Operands | Products], mask_B: Tensor) -> RecordNorms:
    """Joint norms over all layers, from inner products of operands; sums of their products float64.

    |G|^2 = sum_st (g_s . g_t)(a_s . a_t). Each product of two computed inner products is off by at
    most gamma |g_s| |g_t| |a_s| |a_t|, so the sum is off by at most gamma A^2 with A the Cauchy
    bound sum_t |g_t| |a_t| and gamma = 1.1 n u for the n roundings behind them: in float64, u =
    2^-53, n = D + O + 8; in compiled kernels, u = 2^-24, and n is some 30. A bias is a weight on a
    constant input of 1.
    """
    total_4B = torch.zeros(4, len(mask_B), dtype=torch.float64, device=mask_B.device)
    for products in (term for term in terms if isinstance(term, Products)):
        total_4B[0] += products.square_B
    total_4B[2] = total_4B[0]  # the norm of a product is its Cauchy bound
    total_4B[3] = total_4B[0] * (1.1 * UNIT) ** 2  # its factor is applied in float32
    waiting: list[Operands] = []
    for operands in (term for term in terms if isinstance(term, Operands)):
        if operands.squares_4B is None:
            waiting.append(operands)
        else:
            total_4B += operands.squares_4B
    pending: list[list[Operands]] = []
    for group in by_input(waiting):
        if pending and not _stackable(pending, group):
            total_4B[:3] += _gram_norms(pending)
            pending = []
        pending.append(group)
    if pending:
        total_4B[:3] += _gram_norms(pending)
    return RecordNorms(*total_4B)


def clip_factors(norms: RecordNorms, mask_B: Tensor, *, clip_norm: float) -> Tensor:
    """What each record is multiplied with, float64 (B,): min(1, clip_norm / norm).

    Norms are taken at their upper error bound, and as at least 2^-8 of their Cauchy bound. Masked
    records and those whose squared norm is not a finite float32 get 0.
    """
    upper_square_B = (norms.square_B + norms.slack_B).clamp(min=0.0)
    upper_B = upper_square_B.sqrt() + norms.own_square_B.sqrt()
    upper_B = torch.maximum(upper_B, LEAST_RATIO * norms.absolute_square_B.sqrt())
    upper_B = upper_B * (1.0 + 2.0**-40)  # covers the float64 roundings on the way here
    # An inner product that overflowed may make the square -inf: asked before it is cut at 0.
    finite_B = norms.square_B.isfinite()
    finite_B &= upper_square_B + norms.absolute_square_B <= _LARGEST_SQUARE
    factor_B = (clip_norm / upper_B).clamp(max=1.0)
    return torch.where(finite_B & mask_B, factor_B, torch.zeros_like(factor_B))


def with_squares(operands: Operands) -> Operands:
    """The same with their ``squares_4B``, where compiled kernels serve the device."""
    if not native.serves(operands.grad_BTO.device):
        return operands
    grad_BTO, input_BTD, pairs, pairs_BTT = operands.grad_BTO.float(), None, None, None
    length = native.product_roundings(grad_BTO.shape[2])
    if operands.layer.kind == "embedding":  # the input is one-hot
        pairs_BTT = (operands.input[:, :, None] == operands.input[:, None, :]).float()
    else:
        input_BTD, pairs = tokens_of(operands)
        length += native.product_roundings(input_BTD.shape[2]) + len(pairs.starts) - 2
    gamma = 1.1 * length * UNIT
    squares_4B = native.norms(
        *(grad_BTO, input_BTD),
        pairs=None if operands.window is None else pairs,
        input_BTT=pairs_BTT,
        bias=operands.layer.bias is not None,
        # Numbers below 2^-126 may have been rounded to less: a floor that gamma makes their bound.
        floor=length * 2.0**-126 / gamma,
        gamma=gamma,
        own=1.1 * native.sum_roundings(grad_BTO.shape[1]) * UNIT,
    )
    return replace(operands, squares_4B=squares_4B)


def _gram_norms(groups: Sequence[Sequence[Operands]]) -> Tensor:
    """The first three squares of ``RecordNorms`` by PyTorch, (3, B), of G groups; each reads one
    input."""
    records, tokens = groups[0][0].grad_BTO.shape[:2]
    grams_2GBTT = groups[0][0].grad_BTO.new_empty(
        2, len(groups), records, tokens, tokens, dtype=torch.float64
    )
    lengths = [
        _grams(group, *pair) for group, pair in zip(groups, grams_2GBTT.unbind(1), strict=True)
    ]
    gamma_G1 = 1.1 * (grams_2GBTT.new_tensor(lengths)[:, None] + 8) * 2.0**-53
    grad_GBTT, input_GBTT = grams_2GBTT
    lengths_GBT = (x.diagonal(dim1=2, dim2=3) for x in grams_2GBTT)
    absolute_square_GB = math.prod(lengths_GBT).sqrt().sum(2).square()
    square_B = grad_GBTT.mul_(input_GBTT).sum((0, 2, 3))
    slack_B = (gamma_G1 * absolute_square_GB).sum(0)
    return torch.stack([square_B, slack_B, absolute_square_GB.sum(0)])


def _grams(group: Sequence[Operands], grad_BTT: Tensor, input_BTT: Tensor) -> int:
    """Inner products of a group's output gradients and of its input, float64, into the buffers;
    returns the length of the sums behind them. Layers that read the same are one layer with their
    outputs side by side."""
    first, length = group[0], sum(operands.grad_BTO.shape[2] for operands in group)
    for operands in group:
        grad_BTO = operands.grad_BTO.double()
        grad_BTT.baddbmm_(grad_BTO, grad_BTO.mT, beta=float(operands is not first))
    if first.layer.kind == "embedding":  # the input is one-hot
        input_BTT.copy_(first.input[:, :, None] == first.input[:, None, :])
        return length
    if first.window is not None:
        patches.gram(first.input.double(), first.window, out_BTT=input_BTT)
        length += first.window.area * first.input.shape[1]
    else:
        input_BTD = first.input.double()
        torch.bmm(input_BTD, input_BTD.mT, out=input_BTT)
        length += first.input.shape[2]
    if first.layer.bias is not None:
        input_BTT += 1.0
    return length


def _stackable(pending: Sequence[Sequence[Operands]], group: Sequence[Operands]) -> bool:
    """Few large operations cost less than many small ones, as long as they stay small enough."""
    records, tokens = group[0].grad_BTO.shape[:2]
    same = pending[0][0].grad_BTO.shape[1] == tokens
    return same and (len(pending) + 1) * records * tokens**2 <= _STACKED_NUMBERS
