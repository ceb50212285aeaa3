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
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import native
from dpldm_dist.privacy.gradients.layers import find_layers, places_of
from dpldm_dist.privacy.gradients.norms import LEAST_RATIO, clip_factors, record_norms
from dpldm_dist.privacy.gradients.operands import (
    MOST_TOKENS,
    Operands,
    Products,
    plain_arithmetic,
)
from dpldm_dist.privacy.gradients.sums import (
    IntegerSum,
    MicrobatchSums,
    RecordSums,
    Scratch,
    record_rounding,
)
from dpldm_dist.privacy.gradients.tape import Tape
from dpldm_dist.privacy.plan import TELEMETRY_NUMBERS
from dpldm_dist.privacy.telemetry import TelemetryQuery

_MOST_UNITS = 2.0**40  # clip_norm in grid units: float64 rounds sums of a microbatch exactly


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
    tokens = records * MOST_TOKENS + 8
    return records * 1.1 * tokens * 2.0**-53 * clip_norm / LEAST_RATIO


@dataclass(frozen=True, eq=False)
class RawRecords:
    """Private values of the records of a microbatch as they are, without noise; float64 (B,).

    ``factor_B`` is what a gradient was multiplied with: 0 for a record that did not count.
    """

    loss_B: Tensor
    norm_B: Tensor
    factor_B: Tensor
    mask_B: Tensor


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
        self._places = places_of(self._parameters)
        self._layers = find_layers(model, self._parameters, self._places)
        self._device = next(iter(self._parameters.values())).device
        self._scratch = Scratch(self._device)
        self._length = sum(p.stop - p.start for p in self._places.values())
        self._told = torch.zeros(TELEMETRY_NUMBERS, dtype=torch.int64, device=self._device)
        self._begin_sum()

    def add(self, losses: Callable[[], Tensor], mask_B: Tensor) -> None:
        """Add the clipped gradients of one microbatch.

        ``losses`` runs the forward pass and returns the loss of every row, (B * K,), record-major;
        ``mask_B`` (bool) is False for padding. Parameters and ``.grad`` are left as they were.
        """
        self._refuse_overflow(len(mask_B))
        terms, loss_B = self._differentiate(losses, mask_B)
        with plain_arithmetic(self._device):
            norms = record_norms(terms, mask_B)
            factor_B = clip_factors(
                norms, mask_B & loss_B.isfinite(), clip_norm=self._clip_norm - self._lost(terms)
            )
            self._sum.add(terms, factor_B)
            if self._telemetry is not None:
                self._told += self._telemetry.encode(loss_B, factor_B).sum(0)
            if self._watch is not None:
                norm_B = norms.square_B.clamp(min=0.0).sqrt()
                self._watch(RawRecords(loss_B, norm_B, factor_B, mask_B))

    def take_sum(self) -> Tensor:
        """The sum in units of ``grid``, int64 (P,), or (P + 3,) with telemetry; the next one starts
        from zero."""
        taken_P = self._sum.take()
        if self._telemetry is not None:
            taken_P[-TELEMETRY_NUMBERS:] += self._told
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
        with _same_dropout():
            terms, _ = self._differentiate(losses, mask_B)
        with plain_arithmetic(self._device):
            norms = record_norms(terms, mask_B)
            upper_B = (norms.square_B + norms.slack_B).clamp(min=0.0).sqrt()
            finite_B = mask_B.to(self._device) & norms.square_B.isfinite() & upper_B.isfinite()
            largest = max(2.0**-40, float(upper_B[finite_B].max())) if finite_B.any() else 1.0
            unit = _unit_of_records(2.0 * largest, grid=0.0)
            total = IntegerSum(partial(self._make_part, 2.0 * largest, grid=unit, unit=unit))
            total.add(terms, finite_B.double())
            ours_P = total.take()[: self._length].double() * unit
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

    def _make_part(
        self, clip_norm: float, *, grid: float, unit: float
    ) -> RecordSums | MicrobatchSums:
        length = self._length + (0 if self._telemetry is None else TELEMETRY_NUMBERS)
        if native.serves(self._device):
            return RecordSums(length, grid=grid, unit=unit)
        return MicrobatchSums(length, grid=grid, clip_norm=clip_norm, scratch=self._scratch)

    def _differentiate(
        self, losses: Callable[[], Tensor], mask_B: Tensor
    ) -> tuple[list[Operands | Products], Tensor]:
        """Operands or products of every layer that the losses depend on (backward stops below), and
        the mean loss of each record, float64 (B,)."""
        tape = Tape(records=len(mask_B), draws=self._draws, device=self._device)
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
        make = partial(self._make_part, self._clip_norm, grid=self._grid, unit=self._unit)
        self._sum = IntegerSum(make)
        self._records = 0
        self._told.zero_()

    def _refuse_overflow(self, records: int) -> None:
        """Every coordinate of the sum stays below 2^62 units of the grid. Raises: PrivacyError."""
        self._records += records
        if self._records * 2.0 * self._clip_norm / self._grid > 2.0**62:
            raise PrivacyError(
                "The integer sum could overflow: take a coarser grid or fewer records."
            )


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
def _same_dropout() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
