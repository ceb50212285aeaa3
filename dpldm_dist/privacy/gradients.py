"""Sum of clipped per-record gradients by book-keeping: one forward and one backward pass.

Each trainable layer is tapped: its input and its output's gradient are kept, and autograd computes
no weight gradient at all. Norms of all records come from those operands, by the cheaper of two
forms; then the clipped sum is one weighted contraction per layer (Li et al. 2022, arXiv 2110.05679;
Bu et al. 2023, arXiv 2210.00038).

Shapes: B records of a microbatch, K draws of each, R = B * K rows (record-major), T tokens of a
record in a layer (its draws count as tokens), D and O widths of a layer's input and output,
P trainable parameters, flattened in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import native, patches
from dpldm_dist.privacy.plan import TELEMETRY_NUMBERS
from dpldm_dist.privacy.telemetry import TelemetryQuery

Kind = Literal["linear", "conv", "group_norm", "layer_norm", "embedding"]

_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: "linear",
    nn.Conv2d: "conv",
    nn.GroupNorm: "group_norm",
    nn.LayerNorm: "layer_norm",
    nn.Embedding: "embedding",
}

_UNIT = 2.0**-24  # rounding of float32
_MOST_TOKENS = 4096  # of a record, for layers whose operands enter a contraction
_LEAST_RATIO = 2.0**-8  # of a norm to its Cauchy bound
_MOST_UNITS = 2.0**40  # clip_norm in grid units: float64 rounds sums of a microbatch exactly
_LARGEST_SQUARE = float(torch.finfo(torch.float32).max)
_COPIED_TOKENS = (2**16, 1024)  # tokens that lie in float64 at a time: on a device, on a CPU
_CONVERTED_NUMBERS = 2**20  # of a sum that become integers at a time
_STACKED_NUMBERS = 2**20  # Gram matrices handled by one operation


def accumulation_error(*, records: int, clip_norm: float) -> float:
    """Bound on the L2 distance between a microbatch's computed sum and the exact sum of its clipped
    gradients, before rounding to the grid. Unit of ``clip_norm``; public numbers only.

    Derivation. In a layer, record b is G_b = sum_t g_bt a_bt^T, entering with factor c_b. Sums of n
    products in any order, fused or not, are off by at most gamma_n = n u / (1 - n u) times the sum
    of absolute terms (Higham 2002, section 3.1), u = 2^-53. In Frobenius norm this is gamma
    sum_b c_b A_b with the Cauchy bound A_b = sum_t |g_bt| |a_bt|, and over all layers A_b is the
    root of the sum of squares. Norms count as at least a share 2^-8 of the computed A_b, so
    c_b A_b <= 1.1 clip_norm 2^8; 1.1 covers the float32 rounding of A_b. n = 4096 records + 8.

    A layer that keeps G_b itself has A_b = |G_b| and n = records. Where records are rounded one by
    one (``privacy/native``), sums over them are exact: the rounding of a record is part of the norm
    to which it is clipped, not of this bound.
    """
    tokens = records * _MOST_TOKENS + 8
    return records * 1.1 * tokens * 2.0**-53 * clip_norm / _LEAST_RATIO


@dataclass(frozen=True)
class _Layer:
    """A module with trainable parameters, and where they lie among the P."""

    name: str
    module: nn.Module
    kind: Kind
    weight: slice | None
    bias: slice | None


@dataclass(frozen=True, eq=False)
class Operands:
    """What a layer's gradients are made of: ``grad_BTO`` and ``input``, (B, T, D); (B, T) of an
    embedding; of a convolution that sees through a ``window``, its images (R, C, H, W).

    ``squares_4B`` are those of ``RecordNorms``, where they were computed at once: while the
    gradient was still in the processor's cache.
    """

    layer: _Layer
    input: Tensor
    grad_BTO: Tensor
    window: patches.Window | None = None
    squares_4B: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Products:
    """A layer's per-record gradients themselves, float32: (B, weights), (B, biases) or None."""

    layer: _Layer
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class RawRecords:
    """Private values of the records of a microbatch as they are, without noise; float64 (B,).

    ``factor_B`` is what a gradient was multiplied with: 0 for a record that did not count.
    """

    loss_B: Tensor
    norm_B: Tensor
    factor_B: Tensor
    mask_B: Tensor


@dataclass(frozen=True, eq=False)
class RecordNorms:
    """Of each record over all layers, float64 (B,): the computed squared norm; a bound on how far
    the exact one can lie above it; the square of the Cauchy bound on absolute sums; and the square
    of a bound on how far the gradient that enters a sum is from that of the stored operands."""

    square_B: Tensor
    slack_B: Tensor
    absolute_square_B: Tensor
    own_square_B: Tensor


class PerRecordGradients:
    """Clips each record's gradient and adds it to an integer sum.

    The gradient of a record is that of the mean of its K rows' losses with respect to
    ``parameters``; all layers share one L2 norm. ``grid`` is the unit of the sum, a power of two.
    With ``telemetry``, three coordinates behind the P gradients say what it promises. ``watch`` is
    shown raw private values of every microbatch: for runs without a privacy claim.
    Kinds of layers: Linear, Conv2d without groups, GroupNorm, LayerNorm, Embedding, their biases;
    so adapters of peft, too.

    Formal guarantees: exact per-record gradients of the stored operands are scaled to norm at most
    ``clip_norm``; a microbatch's sum is off the exact sum of those by at most
    ``accumulation_error`` and half a unit of the grid per coordinate. A masked record, and one
    whose loss is not finite or whose squared norm is not a finite float32, contributes exactly zero
    to all coordinates and changes no bit of what the others contribute. A parameter that two
    modules share, or a module that runs twice in a pass, is refused; parameters that are used
    without their module are refused by ``verify``.
    What is assumed: rows of the model do not mix (batch norm is refused), and a row's numbers do
    not depend on its place in a microbatch of fixed shape.

    Raises: PrivacyError naming the module or parameter that cannot be handled.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        clip_norm: float,
        draws: int,
        grid: float,
        telemetry: TelemetryQuery | None = None,
        watch: Callable[[RawRecords], None] | None = None,
    ):
        _check_numbers(clip_norm=clip_norm, draws=draws, grid=grid)
        self._of_model = list(model.parameters())
        self._parameters = dict(parameters)
        self._clip_norm = clip_norm
        self._draws = draws
        self._grid = grid
        self._telemetry = telemetry
        self._watch = watch
        self._unit = _unit_of_records(clip_norm, grid)
        self._places = _places(self._parameters)
        self._layers = find_layers(model, self._parameters, self._places)
        self._device = next(iter(self._parameters.values())).device
        self._scratch = _Scratch(self._device)
        self._length = sum(p.stop - p.start for p in self._places.values())
        self._begin_sum()

    def add(self, losses: Callable[[], Tensor], mask_B: Tensor) -> None:
        """Add the clipped gradients of one microbatch.

        ``losses`` runs the forward pass and returns the loss of every row, (B * K,), record-major;
        ``mask_B`` (bool) is False for padding. Parameters and ``.grad`` are left as they were.
        """
        self._count(len(mask_B))
        terms, loss_B = self._differentiate(losses, mask_B)
        with _plain_arithmetic(self._device):
            norms = record_norms(terms, mask_B)
            factor_B = clip_factors(
                norms, mask_B & loss_B.isfinite(), clip_norm=self._clip_norm - self._lost(terms)
            )
            part_P = self._part()
            self._sum(terms, factor_B, part_P, grid=self._grid, unit=self._unit)
            if self._telemetry is not None:
                part_P[-TELEMETRY_NUMBERS:] += self._telemetry.encode(loss_B, factor_B).sum(0)
            if self._watch is not None:
                norm_B = norms.square_B.clamp(min=0.0).sqrt()
                self._watch(RawRecords(loss_B, norm_B, factor_B, mask_B))

    def take_sum(self) -> Tensor:
        """The sum in units of ``grid``, int64 (P,), or (P + 3,) with telemetry; the next one starts
        from zero."""
        self._settle()
        taken_P = self._sum_P
        self._begin_sum()
        return taken_P

    def verify(
        self, losses: Callable[[], Tensor], mask_B: Tensor, *, tolerance: float = 1e-3
    ) -> None:
        """Refuse a model whose unclipped per-record gradients do not add up to autograd's gradient.

        That is so when a trainable parameter is used without calling its module, as in
        ``F.linear(x, layer.weight)``. To be called once, on public data, before the first ``add``;
        ``losses`` must give the same result each time. ``tolerance`` is relative to a parameter's
        gradient; take 0.03 under bf16 autocast. Nothing is added to the sum.
        Raises: PrivacyError naming the parameter.
        """
        ours_P = torch.zeros(self._length, dtype=torch.float64, device=self._device)
        with _same_dropout():
            terms, _ = self._differentiate(losses, mask_B)
        with _plain_arithmetic(self._device):
            norms = record_norms(terms, mask_B)
            upper_B = (norms.square_B + norms.slack_B).clamp(min=0.0).sqrt()
            finite_B = mask_B.to(self._device) & norms.square_B.isfinite() & upper_B.isfinite()
            largest = max(2.0**-40, float(upper_B[finite_B].max())) if finite_B.any() else 1.0
            unit = _unit_of_records(2.0 * largest, grid=0.0)
            self._sum(terms, finite_B.double(), ours_P, grid=unit, unit=unit)
            ours_P *= unit
        with _same_dropout():
            theirs_P = self._autograd(losses, mask_B)
        floor = 1e-3 * tolerance * float(theirs_P.norm())
        for name, place in self._places.items():
            off = float((ours_P[place] - theirs_P[place]).norm())
            if not off <= tolerance * float(theirs_P[place].norm()) + floor:
                raise PrivacyError(
                    f"Per-record gradients of {name} do not add up to its gradient: expected each "
                    "parameter to be used only by calling its own module, once per forward pass. "
                    "Freeze it, or call the module instead of using its weight."
                )

    def _lost(self, terms: Sequence[Operands | Products]) -> float:
        """The part of ``clip_norm`` that pays for rounding a record. Raises: PrivacyError."""
        if not native.serves(self._device):
            return 0.0
        lost = record_rounding(terms, self._unit)
        if lost > 0.1 * self._clip_norm:
            raise PrivacyError(
                f"Rounding would take {lost / self._clip_norm:.0%} of clip_norm: expected a finer "
                "grid."
            )
        return lost

    def _sum(
        self,
        terms: Sequence[Operands | Products],
        factor_B: Tensor,
        out_P: Tensor,
        *,
        grid: float,
        unit: float,
    ) -> None:
        """Add sum_b factor_b G_b to ``out_P``, in whole numbers of ``grid``."""
        if native.serves(self._device):
            add_records(terms, factor_B, out_P, grid=grid, unit=unit)
            return

        def add_rounded(place: slice, values: Tensor) -> None:
            out_P[place] += values.mul_(1.0 / grid).round_()

        weighted_sum(terms, factor_B, self._scratch, add_rounded)

    def _differentiate(
        self, losses: Callable[[], Tensor], mask_B: Tensor
    ) -> tuple[list[Operands | Products], Tensor]:
        """Operands or products of every layer that the losses depend on (backward stops below), and
        the mean loss of each record, float64 (B,)."""
        tape = _Tape(records=len(mask_B), draws=self._draws, device=self._device)
        with _trainable(self._of_model, ()), tape.tapping(self._layers):
            with torch.enable_grad():
                loss_R = _rows(losses(), tape.rows)
            if not loss_R.requires_grad:
                raise PrivacyError(
                    "The losses do not depend on any trainable layer: expected a forward pass "
                    "through the model with autograd on."
                )
            loss_R.backward(self._seed(loss_R, mask_B))
        return tape.terms, loss_R.detach().double().view(-1, self._draws).mean(1)

    def _autograd(self, losses: Callable[[], Tensor], mask_B: Tensor) -> Tensor:
        """Gradient of the sum over records by autograd alone, float64 (P,)."""
        learning = list(self._parameters.values())
        with _trainable(self._of_model, learning), torch.enable_grad():
            loss_R = _rows(losses(), len(mask_B) * self._draws)
            seed_R = self._seed(loss_R, mask_B)
            found = torch.autograd.grad(loss_R, learning, seed_R, allow_unused=True)
        pairs = zip(found, learning, strict=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs]
        )

    def _seed(self, loss_R: Tensor, mask_B: Tensor) -> Tensor:
        """What backward starts from: 1 / K in rows of records (their mean), 0 in padding."""
        weight_B = mask_B.to(loss_R.device, loss_R.dtype) / self._draws
        return weight_B.repeat_interleave(self._draws)

    def _begin_sum(self) -> None:
        self._sum_P: Tensor | None = None
        self._part_P: Tensor | None = None
        self._records = self._part_records = 0

    def _part(self) -> Tensor:
        """The float64 part of the sum, made after a backward pass: activations are gone then."""
        if self._part_P is None:
            length = self._length + (0 if self._telemetry is None else TELEMETRY_NUMBERS)
            self._part_P = torch.zeros(length, dtype=torch.float64, device=self._device)
        return self._part_P

    def _count(self, records: int) -> None:
        """Refuse what could overflow: every coordinate stays below 2^62 units, and below 2^52 in
        the float64 part, where sums of integers are exact."""
        self._records += records
        if self._most_units(self._records) > 2.0**62:
            raise PrivacyError(
                "The integer sum could overflow: take a coarser grid or fewer records."
            )
        if self._part_records and self._most_units(self._part_records + records) > 2.0**52:
            self._settle()
        self._part_records += records

    def _most_units(self, records: int) -> float:
        return records * 2.0 * self._clip_norm / self._grid

    def _settle(self) -> None:
        """Move the float64 part, whole numbers all, into the int64 sum, which takes its memory."""
        part_P = self._part()
        whole_P = part_P.view(torch.int64)
        for place in range(0, len(part_P), _CONVERTED_NUMBERS):
            chunk = slice(place, place + _CONVERTED_NUMBERS)
            whole_P[chunk] = part_P[chunk].to(torch.int64)
        self._sum_P = whole_P if self._sum_P is None else self._sum_P.add_(whole_P)
        self._part_P = None
        self._part_records = 0


# --- norms and clipping ---------------------------------------------------------------------------


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
        total_4B[0] += _product_squares(products)
    total_4B[2] = total_4B[0]  # the norm of a product is its Cauchy bound
    total_4B[3] = total_4B[0] * (1.1 * _UNIT) ** 2  # its factor is applied in float32
    waiting: list[Operands] = []
    for operands in (term for term in terms if isinstance(term, Operands)):
        if operands.squares_4B is None:
            waiting.append(operands)
        else:
            total_4B += operands.squares_4B
    pending: list[list[Operands]] = []
    for group in _by_input(waiting):
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
    upper_B = torch.maximum(upper_B, _LEAST_RATIO * norms.absolute_square_B.sqrt())
    upper_B = upper_B * (1.0 + 2.0**-40)  # covers the float64 roundings on the way here
    # An inner product that overflowed may make the square -inf: asked before it is cut at 0.
    finite_B = norms.square_B.isfinite()
    finite_B &= upper_square_B + norms.absolute_square_B <= _LARGEST_SQUARE
    factor_B = (clip_norm / upper_B).clamp(max=1.0)
    return torch.where(finite_B & mask_B, factor_B, torch.zeros_like(factor_B))


def _with_squares(operands: Operands) -> Operands:
    """The same with their ``squares_4B``, where compiled kernels serve the device."""
    if not native.serves(operands.grad_BTO.device):
        return operands
    grad_BTO, input_BTD, pairs, pairs_BTT = operands.grad_BTO.float(), None, None, None
    length = native.product_roundings(grad_BTO.shape[2])
    if operands.layer.kind == "embedding":  # the input is one-hot
        pairs_BTT = (operands.input[:, :, None] == operands.input[:, None, :]).float()
    else:
        input_BTD, pairs = _tokens(operands)
        length += native.product_roundings(input_BTD.shape[2]) + len(pairs.starts) - 2
    gamma = 1.1 * length * _UNIT
    squares_4B = native.norms(
        *(grad_BTO, input_BTD),
        pairs=None if operands.window is None else pairs,
        input_BTT=pairs_BTT,
        bias=operands.layer.bias is not None,
        # Numbers below 2^-126 may have been rounded to less: a floor that gamma makes their bound.
        floor=length * 2.0**-126 / gamma,
        gamma=gamma,
        own=1.1 * native.sum_roundings(grad_BTO.shape[1]) * _UNIT,
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


def _product_squares(products: Products) -> Tensor:
    """Squared norm of each record in one layer, (B,)."""
    parts = [part for part in (products.weight, products.bias) if part is not None]
    return sum(torch.linalg.vector_norm(p, dim=1, dtype=torch.float64).square() for p in parts)


def _stackable(pending: Sequence[Sequence[Operands]], group: Sequence[Operands]) -> bool:
    """Few large operations cost less than many small ones, as long as they stay small enough."""
    records, tokens = group[0].grad_BTO.shape[:2]
    same = pending[0][0].grad_BTO.shape[1] == tokens
    return same and (len(pending) + 1) * records * tokens**2 <= _STACKED_NUMBERS


# --- the clipped sum ------------------------------------------------------------------------------


def record_rounding(terms: Sequence[Operands | Products], unit: float) -> float:
    """How far the whole units that a record adds can lie from its clipped gradient, in L2 norm.

    Half a unit for each coordinate; for an embedding, whose tokens are rounded one by one and may
    meet in a row, for each token and width.
    """
    squares = 0
    for term in terms:
        if term.layer.kind == "embedding":
            tokens, width = term.grad_BTO.shape[1:]
            squares += tokens**2 * width
        else:
            places = (term.layer.weight, term.layer.bias)
            squares += sum(p.stop - p.start for p in places if p is not None)
    return 0.5 * unit * math.sqrt(squares)


def add_records(
    terms: Sequence[Operands | Products],
    factor_B: Tensor,
    out_P: Tensor,
    *,
    grid: float,
    unit: float,
) -> None:
    """Add sum_b round(factor_b G_b / unit) unit / grid to ``out_P``: float64, integers all.

    What a record adds depends on it alone; what those with factor 0 hold counts for nothing.
    """
    factor_B, step = factor_B / unit, unit / grid
    for term in reversed(terms):  # the last ones may still be in the processor's cache
        layer = term.layer
        weight_P = None if layer.weight is None else out_P[layer.weight]
        bias_P = None if layer.bias is None else out_P[layer.bias]
        if isinstance(term, Products):
            for rows, out in ((term.weight, weight_P), (term.bias, bias_P)):
                if out is not None:
                    native.add_rows(rows, factor_B, step=step, out_P=out)
        elif layer.kind == "embedding":
            _add_rows_of_table(term, factor_B, weight_P, step)
        else:
            input_BTD, pairs = _tokens(term)
            weight_ODA = weight_P.view(term.grad_BTO.shape[2], input_BTD.shape[2], -1)
            native.add_records(
                *(term.grad_BTO.float(), input_BTD, factor_B, pairs),
                step=step,
                weight_ODA=weight_ODA,
                bias_O=bias_P,
            )


def _tokens(operands: Operands) -> tuple[Tensor, native.Pairs]:
    """The input tokens of a layer, float32 (B, T, D), and which of them meet which outputs."""
    seen, window = operands.input.float(), operands.window
    if window is None:
        return seen, native.straight(seen.shape[1])
    return patches.pixels(seen, window), patches.pairs(window, *seen.shape[2:])


def _add_rows_of_table(operands: Operands, factor_B: Tensor, out_P: Tensor, step: float) -> None:
    """An embedding's sum: every token's gradient, rounded, goes to its row of the table."""
    out_B = (factor_B == 0).nonzero().flatten()
    grad_BTO = operands.grad_BTO.double().mul_(factor_B[:, None, None]).round_()
    grad_NO = _fill(grad_BTO, out_B).mul_(step).flatten(0, 1)
    out_P.view_as(operands.layer.module.weight).index_add_(0, operands.input.flatten(), grad_NO)


def weighted_sum(
    terms: Sequence[Operands | Products],
    factor_B: Tensor,
    scratch: _Scratch,
    emit: Callable[[slice, Tensor], None],
) -> None:
    """Calls ``emit`` with the place and the float64 values of sum_b factor_b G_b, layer by layer.

    Operands of records with factor 0 are replaced by zeros first: 0 * NaN is NaN. The values are
    work space: ``emit`` may change them and must not keep them.
    """
    out_B = (factor_B == 0).nonzero().flatten()
    for products in (term for term in terms if isinstance(term, Products)):
        layer = products.layer
        for place, part in ((layer.weight, products.weight), (layer.bias, products.bias)):
            if part is not None:
                emit(place, factor_B @ _fill(part.double(), out_B))
    for group in _by_input(terms):
        if group[0].layer.kind == "embedding":
            _emit_rows(group[0], factor_B, out_B, emit)
        else:
            _emit_contractions(group, factor_B, scratch, emit)


def _emit_contractions(
    group: Sequence[Operands],
    factor_B: Tensor,
    scratch: _Scratch,
    emit: Callable[[slice, Tensor], None],
) -> None:
    """One product in float64 for all layers that read the same input, their outputs side by side;
    over some records after the other, so that copies in float64 stay small."""
    first, widths = group[0], [operands.grad_BTO.shape[2] for operands in group]
    records, tokens = first.grad_BTO.shape[:2]
    weights = first.layer.module.weight[0].numel()
    out = scratch.zeros("sum", (sum(widths), weights))
    bias_O = scratch.zeros("bias", (sum(widths),)) if first.layer.bias is not None else None
    step = max(1, _COPIED_TOKENS[factor_B.device.type == "cpu"] // tokens)
    for start in range(0, records, step):
        chunk = slice(start, start + step)
        factor_b11 = factor_B[chunk, None, None]
        out_b = (factor_b11 == 0).flatten().nonzero().flatten()
        if first.window is None:
            seen = first.input[chunk]
        else:
            draws = first.window.draws
            rows = slice(start * draws, (start + step) * draws)
            seen = patches.tokens(first.input[rows], first.window)
        input_bTD = scratch.copy("input", seen)
        grad_bTO = scratch.take("grad", (*input_bTD.shape[:2], sum(widths)), torch.float64)
        for operands, columns_bTO in zip(group, grad_bTO.split(widths, 2), strict=True):
            columns_bTO.copy_(operands.grad_BTO[chunk])
        _fill(grad_bTO.mul_(factor_b11), out_b)
        grad_NO, input_ND = grad_bTO.flatten(0, 1), _fill(input_bTD, out_b).flatten(0, 1)
        out.addmm_(grad_NO.T, input_ND)
        if bias_O is not None:
            bias_O += grad_NO.sum(0)
    if bias_O is not None:
        for operands, part_O in zip(group, bias_O.split(widths), strict=True):
            emit(operands.layer.bias, part_O)
    for operands, sum_OD in zip(group, out.split(widths), strict=True):
        emit(operands.layer.weight, sum_OD.flatten())


def _emit_rows(
    operands: Operands, factor_B: Tensor, out_B: Tensor, emit: Callable[[slice, Tensor], None]
) -> None:
    """An embedding's sum: every token's gradient goes to its row of the table."""
    grad_BTO = _fill(operands.grad_BTO.double().mul_(factor_B[:, None, None]), out_B)
    table_NO = torch.zeros_like(operands.layer.module.weight, dtype=torch.float64)
    table_NO.index_add_(0, operands.input.flatten(), grad_BTO.flatten(0, 1))
    emit(operands.layer.weight, table_NO.flatten())


def _by_input(terms: Sequence[Operands | Products]) -> list[list[Operands]]:
    """Operands grouped by the tensor that their layers read, and by whether they have a bias."""
    groups: dict[Any, list[Operands]] = {}
    for operands in (term for term in terms if isinstance(term, Operands)):
        tensor = operands.input
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault((key, operands.layer.bias is None), []).append(operands)
    return list(groups.values())


class _Scratch:
    """Work space that is kept from layer to layer: fresh pages cost more than the copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._space: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        length = math.prod(shape)
        space = self._space.get((name, dtype))
        if space is None or len(space) < length:
            space = torch.empty(length, dtype=dtype, device=self._device)
            self._space[name, dtype] = space
        return space[:length].view(*shape)

    def zeros(self, name: str, shape: Sequence[int]) -> Tensor:
        """Zeros in float64."""
        return self.take(name, shape, torch.float64).zero_()

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` in float64."""
        return self.take(name, tensor.shape, torch.float64).copy_(tensor)


def _fill(tensor: Tensor, out_B: Tensor) -> Tensor:
    """Zeros in the records ``out_B``, in place."""
    return tensor.index_fill_(0, out_B, 0.0) if len(out_B) else tensor


# --- what a layer keeps ---------------------------------------------------------------------------


class _Tape:
    """Collects what every tapped layer keeps during one backward pass."""

    def __init__(self, *, records: int, draws: int, device: torch.device):
        self.rows = records * draws
        self.terms: list[Operands | Products] = []
        self._draws = draws
        self._seen: set[str] = set()
        self._anchor = torch.zeros((), device=device, requires_grad=True)

    @contextmanager
    def tapping(self, layers: Sequence[_Layer]) -> Iterator[None]:
        """While this is open, a forward pass through the layers is recorded."""
        hooks = [layer.module.register_forward_hook(self._hook(layer)) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, layer: _Layer, seen: Tensor, version: int, grad: Tensor) -> None:
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

    def _hook(self, layer: _Layer) -> Callable[..., Tensor]:
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


def keep(layer: _Layer, seen: Tensor, grad: Tensor, *, draws: int) -> Operands | Products:
    """What is kept of a layer: its per-record gradients, or the operands if those are smaller.

    Smaller is cheaper, too: products take T D O multiplications and D O numbers, a Gram form
    T^2 (D + O) multiplications and T (D + O) numbers.
    """
    if layer.kind in ("group_norm", "layer_norm"):
        return _norm_products(layer, seen, grad, draws=draws)
    if layer.kind == "embedding":
        return _with_squares(_embedding_operands(layer, seen, grad, draws=draws))
    window = patches.window_of(layer.module, draws) if layer.kind == "conv" else None
    if layer.kind == "conv":
        grad_BTO = patches.fold(grad.flatten(2).mT, draws)
        kept = seen if window is not None else patches.fold(seen.flatten(2).mT, draws)
    else:
        grad_BTO, kept = patches.fold(grad, draws), patches.fold(seen, draws)
    if layer.weight is None:
        return Products(layer, None, _token_sums(grad_BTO))
    tokens, out_width = grad_BTO.shape[1:]
    pixels = tokens if window is None else draws * seen.shape[2] * seen.shape[3]
    width = kept.shape[2] if window is None else kept.shape[1]  # a pixel is read where it lies
    weights = layer.module.weight.numel()
    operands = Operands(layer, kept, grad_BTO, window)
    small = weights > tokens * (width + out_width)
    if small and 0 < tokens <= _MOST_TOKENS and pixels <= _MOST_TOKENS:
        return _with_squares(operands)
    bias_BO = None if layer.bias is None else _token_sums(grad_BTO)
    return Products(layer, _products(operands), bias_BO)


def _token_sums(grad_BTO: Tensor) -> Tensor:
    """The gradients of a layer's bias, float32 (B, O)."""
    grad_BTO = grad_BTO.float()
    return native.token_sums(grad_BTO) if native.serves(grad_BTO.device) else grad_BTO.sum(1)


def _products(operands: Operands) -> Tensor:
    """The gradients of a layer's weight, float32 (B, weights)."""
    grad_BTO = operands.grad_BTO.float()
    if native.serves(grad_BTO.device):
        return native.products(grad_BTO, *_tokens(operands)).flatten(1)
    input_BTD = operands.input.float()
    if operands.window is not None:
        input_BTD = patches.tokens(input_BTD, operands.window)
    with _plain_arithmetic(grad_BTO.device):
        return torch.bmm(grad_BTO.mT, input_BTD).flatten(1)


def _norm_products(layer: _Layer, seen: Tensor, grad: Tensor, *, draws: int) -> Products:
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
        weight, bias = layer.weight is not None, layer.bias is not None
        return Products(layer, scale_BW if weight else None, shift_BW if bias else None)
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

    return Products(
        layer,
        None if layer.weight is None else per_record(grad * normal),
        None if layer.bias is None else per_record(grad),
    )


def _embedding_operands(layer: _Layer, seen: Tensor, grad: Tensor, *, draws: int) -> Operands:
    records = len(seen) // draws
    grad_BTO = grad.reshape(records, -1, grad.shape[-1])
    index_BT = seen.reshape(records, -1)
    if index_BT.shape[1] > _MOST_TOKENS:
        raise PrivacyError(
            f"Module {layer.name} embeds {index_BT.shape[1]} tokens of a record: expected at most "
            f"{_MOST_TOKENS}. Freeze it, or take fewer draws."
        )
    if layer.module.padding_idx is not None:
        grad_BTO = grad_BTO.masked_fill((index_BT == layer.module.padding_idx)[..., None], 0.0)
    return Operands(layer, index_BT, grad_BTO)


# --- which layers ---------------------------------------------------------------------------------


def find_layers(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], places: Mapping[str, slice]
) -> list[_Layer]:
    """The modules that own ``parameters``. Raises: PrivacyError for what cannot be handled."""
    place_of = {id(parameter): places[name] for name, parameter in parameters.items()}
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    owner_of: dict[int, str] = {}
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(
                f"Module {path} is a batch norm, which couples records: use GroupNorm."
            )
        own = {n: p for n, p in module._parameters.items() if p is not None and id(p) in place_of}
        for name, parameter in own.items():
            if id(parameter) in owner_of:
                raise PrivacyError(
                    f"Parameter {name_of[id(parameter)]} is shared by {owner_of[id(parameter)]} and"
                    f" {path}.{name}: expected one module per parameter. Freeze it or untie it."
                )
            owner_of[id(parameter)] = f"{path}.{name}"
        if own:
            layers.append(_layer(path, module, {n: place_of[id(p)] for n, p in own.items()}))
    lost = [name_of[key] for key in place_of if key not in owner_of]
    if lost:
        raise PrivacyError(
            f"Parameter {lost[0]} is not in the model: expected parameters of its modules."
        )
    return layers


def _layer(path: str, module: nn.Module, own: Mapping[str, slice]) -> _Layer:
    """A layer of a kind that the engine knows. Raises: PrivacyError with the reason otherwise."""
    kind = next(
        (
            k
            for t, k in _KINDS.items()
            if isinstance(module, t) and type(module).forward is t.forward
        ),
        None,
    )
    if kind is None or not set(own) <= {"weight", "bias"}:
        raise PrivacyError(
            f"Module {path} ({type(module).__name__}) has trainable parameters of its own: expected"
            " Linear, Conv2d, GroupNorm, LayerNorm or Embedding. Freeze it."
        )
    if kind == "conv" and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        raise PrivacyError(
            f"Module {path} is a convolution with groups = {module.groups}, padding = "
            f"{module.padding!r} ({module.padding_mode}): expected one group and zeros, in numbers."
        )
    if kind == "embedding" and (module.max_norm is not None or module.scale_grad_by_freq):
        raise PrivacyError(
            f"Module {path} has max_norm or scale_grad_by_freq, which couple records: expected "
            "neither."
        )
    return _Layer(path, module, kind, own.get("weight"), own.get("bias"))


def _places(parameters: Mapping[str, nn.Parameter]) -> dict[str, slice]:
    """Where each parameter lies in the flattened vector."""
    if not parameters or len({id(p) for p in parameters.values()}) < len(parameters):
        raise PrivacyError("Trainable parameters: expected at least one, and each only once.")
    places, start = {}, 0
    for name, parameter in parameters.items():
        places[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return places


def _check_numbers(*, clip_norm: float, draws: int, grid: float) -> None:
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise PrivacyError(f"clip_norm = {clip_norm}: expected a positive finite number.")
    if draws < 1:
        raise PrivacyError(f"draws = {draws}: expected at least 1.")
    if not (math.isfinite(grid) and grid > 0) or math.frexp(grid)[0] != 0.5:
        raise PrivacyError(f"grid = {grid}: expected a power of two.")
    if not clip_norm / grid <= _MOST_UNITS:
        raise PrivacyError(
            f"clip_norm is {clip_norm / grid:.3g} grid units: expected at most 2^40."
        )


def _unit_of_records(clip_norm: float, grid: float) -> float:
    """A power of two: what a record adds to a coordinate is at most ``native.LARGEST`` of it."""
    return max(grid, 2.0 ** math.ceil(math.log2(clip_norm)) / native.LARGEST)


def _rows(loss_R: Tensor, rows: int) -> Tensor:
    if loss_R.shape != (rows,):
        raise PrivacyError(
            f"Losses of shape {tuple(loss_R.shape)}: expected one per row, ({rows},)."
        )
    return loss_R


@contextmanager
def _trainable(
    parameters: Sequence[nn.Parameter], learning: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Within it exactly ``learning`` requires gradients; afterwards all is as before."""
    chosen = {id(parameter) for parameter in learning}
    changed = [p for p in parameters if p.requires_grad != (id(p) in chosen)]
    try:
        for parameter in changed:
            parameter.requires_grad_(not parameter.requires_grad)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not parameter.requires_grad)


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
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


@contextmanager
def _same_dropout() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
