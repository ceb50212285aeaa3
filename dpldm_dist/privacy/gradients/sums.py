"""The clipped sum: every record rounded by itself in compiled kernels, or in float64 by PyTorch.

Shapes: those of ``privacy.gradients``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import native
from dpldm_dist.privacy.blocks import COPIED, converted_
from dpldm_dist.privacy.gradients import patches
from dpldm_dist.privacy.gradients.operands import Operands, Products, by_input, tokens_of

_COPIED_TOKENS = (2**16, 1024)  # tokens that lie in float64 at a time: on a device, on a CPU


class IntegerSum:
    """The sum of any number of records, made of parts that hold so many each.

    Formal guarantees: exact, and the same whatever a part holds, where records are rounded one by
    one; where a microbatch is rounded, it is rounded once or refused. 62 bits are enough for the
    records that ``PerRecordGradients`` lets in.
    """

    def __init__(self, make_part: Callable[[], RecordSums | MicrobatchSums]):
        self._make_part = make_part
        self._part: RecordSums | MicrobatchSums | None = None
        self._records = 0  # in the part
        self._sum_P: Tensor | None = None

    def add(self, terms: Sequence[Operands | Products], factor_B: Tensor) -> None:
        """Add sum_b factor_b G_b. The first part is made here, after a backward pass: activations
        are gone then."""
        most = self._open_part().most_records
        for some_B, records in _divided(factor_B, most):
            if self._records + records > most:
                self._settle()
            self._open_part().add(terms, some_B)
            self._records += records

    def take(self) -> Tensor:
        """The sum in units of the grid, int64; the next one starts from zero."""
        self._settle()
        taken_P, self._sum_P = self._sum_P, None
        return taken_P

    def _open_part(self) -> RecordSums | MicrobatchSums:
        if self._part is None:
            self._part = self._make_part()
        return self._part

    def _settle(self) -> None:
        whole_P = self._open_part().whole()
        self._sum_P = whole_P if self._sum_P is None else self._sum_P.add_(whole_P)
        self._part, self._records = None, 0


def _divided(factor_B: Tensor, most: int) -> Iterator[tuple[Tensor, int]]:
    """The factors of at most ``most`` records, all others 0; and the number of those records."""
    records = len(factor_B)
    if records <= most:
        yield factor_B, records
        return
    for start in range(0, records, most):
        some_B = torch.zeros_like(factor_B)
        some_B[start : start + most] = factor_B[start : start + most]
        yield some_B, min(most, records - start)


class RecordSums:
    """The sum of records that compiled kernels round one by one, in five bytes a coordinate.

    ``unit``: what a record is rounded to, a multiple of ``grid``.

    Formal guarantees: what a record adds depends on it alone, and sums are exact for up to
    ``most_records``. What records of factor 0 hold counts for nothing.
    """

    most_records = int(native.Total.MOST / (native.LARGEST + 1))

    def __init__(self, length: int, *, grid: float, unit: float):
        self._unit = unit
        self._multiple = round(unit / grid)
        self._total_P = native.Total.zeros(length)

    def add(self, terms: Sequence[Operands | Products], factor_B: Tensor) -> None:
        """Add sum_b round(factor_b G_b / unit)."""
        factor_B = factor_B / self._unit
        for term in reversed(terms):  # the last ones may still be in the processor's cache
            if isinstance(term, Products):
                for place, rows in ((term.layer.weight, term.weight), (term.layer.bias, term.bias)):
                    if place is not None:
                        part_P = self._total_P.view(place, -1)
                        native.add_rows(rows, factor_B, out_P=part_P)
            elif term.layer.kind == "embedding":
                self._add_rows_of_table(term, factor_B)
            else:
                self._add_contraction(term, factor_B)

    def whole(self) -> Tensor:
        """The sum in units of the grid, int64 (P,)."""
        length = len(self._total_P.low)
        whole_P = torch.empty(length, dtype=torch.int64, device="cpu")
        for start in range(0, length, COPIED):
            part = slice(start, start + COPIED)
            whole_P[part] = self._total_P.whole(part).mul_(self._multiple)
        return whole_P

    def _add_contraction(self, term: Operands, factor_B: Tensor) -> None:
        layer, (input_BTD, pairs) = term.layer, tokens_of(term)
        shape = term.grad_BTO.shape[2], input_BTD.shape[2], -1
        native.add_records(
            *(term.grad_BTO.float(), input_BTD, factor_B, pairs),
            weight_ODA=self._total_P.view(layer.weight, *shape),
            bias_O=None if layer.bias is None else self._total_P.view(layer.bias, -1),
        )

    def _add_rows_of_table(self, term: Operands, factor_B: Tensor) -> None:
        """An embedding's sum: every token's gradient, rounded, goes to its row of the table."""
        out_B = (factor_B == 0).nonzero().flatten()
        grad_BTO = term.grad_BTO.double().mul_(factor_B[:, None, None]).round_()
        table_NO = _table(term, _fill(grad_BTO, out_B))
        self._total_P.view(term.layer.weight, *table_NO.shape).add(table_NO)


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


def _table(operands: Operands, grad_BTO: Tensor) -> Tensor:
    """Every token's gradient in its row of the table, float64 (N, O)."""
    table_NO = torch.zeros_like(operands.layer.module.weight, dtype=torch.float64)
    return table_NO.index_add_(0, operands.input.flatten(), grad_BTO.flatten(0, 1))


# --- without compiled kernels ---------------------------------------------------------------------


class MicrobatchSums:
    """The sum of microbatches that PyTorch contracts in float64 and that are rounded to the grid.

    Formal guarantees: sums of rounded microbatches are exact for up to ``most_records`` records,
    each clipped to ``clip_norm``.
    """

    def __init__(self, length: int, *, grid: float, clip_norm: float, scratch: Scratch):
        self.most_records = int(2.0**52 * grid / (2.0 * clip_norm))
        self._grid, self._scratch = grid, scratch
        self._sum_P = torch.zeros(length, dtype=torch.float64, device=scratch.device)

    def add(self, terms: Sequence[Operands | Products], factor_B: Tensor) -> None:
        """Add round(sum_b factor_b G_b / grid). Raises: PrivacyError for too many records."""
        if len(factor_B) > self.most_records:
            raise PrivacyError(
                f"A microbatch of {len(factor_B)} records: expected at most {self.most_records} "
                "with this clip_norm and grid."
            )
        weighted_sum(terms, factor_B, self._scratch, self._add)

    def whole(self) -> Tensor:
        """The sum in units of the grid, int64 (P,). It takes the memory: nothing may be added."""
        return converted_(self._sum_P, torch.int64)

    def _add(self, place: slice, values: Tensor) -> None:
        self._sum_P[place] += values.mul_(1.0 / self._grid).round_()


def weighted_sum(
    terms: Sequence[Operands | Products],
    factor_B: Tensor,
    scratch: Scratch,
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
    for group in by_input(terms):
        if group[0].layer.kind == "embedding":
            _emit_rows(group[0], factor_B, out_B, emit)
        else:
            _emit_contractions(group, factor_B, scratch, emit)


def _emit_contractions(
    group: Sequence[Operands],
    factor_B: Tensor,
    scratch: Scratch,
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
    emit(operands.layer.weight, _table(operands, grad_BTO).flatten())


class Scratch:
    """Work space that is kept from layer to layer: fresh pages cost more than the copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._space: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        length = math.prod(shape)
        space = self._space.get((name, dtype))
        if space is None or len(space) < length:
            space = torch.empty(length, dtype=dtype, device=self.device)
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
