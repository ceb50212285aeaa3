"""Loss, count and clip fraction of a step, released inside the same noisy sum as its gradients.

The integer sum has three further coordinates behind the P gradients. Record b adds to them

    c sqrt(s) (w_1 x_b, w_2, w_3 y_b),    x_b = 2 l_b / L - 1,    y_b = +1 if clipped, else -1,

with l_b the mean loss over its K draws, clipped to [0, L], s the telemetry share, c the norm that
is left of clip_norm C after every rounding, and w_1^2 + w_2^2 + w_3^2 = 1. Its gradient is clipped
to c sqrt(1 - s). So one record adds a vector of norm at most

    sqrt(c^2 (1 - s) + c^2 s (w_1^2 x_b^2 + w_2^2 + w_3^2 y_b^2))  <=  c,

the sensitivity of all P + 3 coordinates together is the C that is accounted, and the noise of
standard deviation sigma C that every coordinate gets covers them: there is no further charge. The
price: gradients are shorter by sqrt(1 - s), as if sigma were larger by s / 2 (0.5 % for the default
share 0.01, at most 1.02 %).

Reading them. Coordinate j divided by its scale c sqrt(s) w_j is a sum over the records of the batch
plus noise of variance v_j = (sigma C / (c sqrt(s) w_j))^2, a public number. Let X, M, Y be the
three noisy sums, n = q N the expected number of records and v_n = n (1 - q) its variance.

    records   M,                       standard error sqrt(v_2)
    loss      L / 2 (1 + X / m),       standard error at most L / 2 sqrt(v_1 + k v_2) / n
    clipped   1 / 2 (1 + Y / m),       standard error at most 1 / 2 sqrt(v_3 + k v_2) / n

m is the best linear estimate of the number of records, n' + k (M - n') with k = v_n / (v_n + v_2):
the noisy count where its noise is below the spread of the coins, the expected number where it is
not. Its mean squared error is k v_2, and |X| <= m, |Y| <= m give the bounds. The reading divides by
whichever is the better and needs no choice. n' is the mean of all noisy counts so far, with q N
counted in as if N were known to 10 %: a generously declared N does not bias the loss for long.
A mean over W steps has standard errors smaller by sqrt(W).

Why these numbers. L = 2: predicting zero has an expected loss of 1 for targets of unit variance,
so a trained model lies far below L and a poor record is still seen. x and y are centred, which
halves the noise against sums over [0, L] and {0, 1}. Of the squared weight the loss has 1/2; the
count, which is its denominator, 3/8; the clip flag 1/8, because nobody needs its second digit. For
2,000 records at sigma 0.86 and s = 0.01 the standard errors of one step are 0.009 (loss), 14
records and 0.007 (clipped).

Shapes: B records of a microbatch; 3 = loss, count, clip flag, in this order.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.plan import TELEMETRY_NUMBERS, ContributionBound, PrivacyPlan

LOSS_BOUND = 2.0  # L: twice the expected loss of predicting zero
WEIGHTS = (math.sqrt(1 / 2), math.sqrt(3 / 8), math.sqrt(1 / 8))
WINDOW = 25  # steps of a moving mean
_DECLARED_WITHIN = 0.1  # relative error that is granted to N as it was declared
_MARGIN = 1.0 - 2.0**-40  # covers the float64 roundings of an encoded record


@dataclass(frozen=True)
class Estimate:
    """A released number, and it minus and plus two standard errors; all in its public range."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Telemetry:
    """What the three numbers of a step, or their mean over some steps, tell."""

    loss: Estimate
    records: Estimate
    clip_fraction: Estimate


@dataclass(frozen=True)
class StandardErrors:
    """Bounds on the standard errors of one step's numbers, from public numbers alone."""

    loss: float
    records: float
    clip_fraction: float


@dataclass(frozen=True)
class TelemetryQuery:
    """How a record becomes three integers, and what their noisy sums say.

    ``norm`` bounds a record's three numbers in L2 norm, ``noise_std`` is the standard deviation of
    the noise (0 in a run without noise); both in the unit of clip_norm. ``grid`` is the unit of the
    integer sum. ``expected_records`` = q N, ``spread_of_records`` = q N (1 - q), its variance.

    Formal guarantees: a record adds integers whose L2 norm times ``grid`` is at most ``norm``,
    whatever its loss; they are a function of the record's own loss and clip factor. One that is
    masked or not finite adds exactly zero. The sum over records is exact: it has no rounding that
    depends on how records are packed. Everything that is read is post-processing of noisy sums.
    """

    norm: float
    grid: float
    noise_std: float
    expected_records: float
    spread_of_records: float

    @staticmethod
    def of(
        plan: PrivacyPlan, bound: ContributionBound, *, unsafe_no_noise: bool = False
    ) -> TelemetryQuery | None:
        """The query of ``plan``; None if its telemetry share is 0."""
        if bound.telemetry == 0.0:
            return None
        return TelemetryQuery(
            norm=bound.telemetry,
            grid=plan.grid,
            noise_std=0.0 if unsafe_no_noise else plan.noise_multiplier * plan.clip_norm,
            expected_records=plan.divisor,
            spread_of_records=plan.divisor * (1.0 - plan.sample_rate),
        )

    def encode(self, loss_B: Tensor, factor_B: Tensor) -> Tensor:
        """The three integers of every record, int64 (B, 3), rounded towards zero.

        ``loss_B``: mean losses, float64. ``factor_B``: clip factors; 0 for records that are masked
        or not finite.
        """
        clipped_B = torch.where(factor_B < 1.0, 1.0, -1.0).to(loss_B)
        value_B3 = torch.stack([centred(loss_B), torch.ones_like(loss_B), clipped_B], 1)
        value_B3 = value_B3 * value_B3.new_tensor(self._scales) * (_MARGIN / self.grid)
        value_B3 = torch.where((factor_B > 0.0)[:, None], value_B3, 0.0)
        return value_B3.trunc().to(torch.int64)

    def read(self, noisy_3: Tensor) -> tuple[float, float, float]:
        """The noisy sums of x, of 1 and of y over the records of a step; a released int64 (3,)."""
        if noisy_3.shape != (TELEMETRY_NUMBERS,):
            raise PrivacyError(
                f"Telemetry of shape {tuple(noisy_3.shape)}: expected the last {TELEMETRY_NUMBERS} "
                "coordinates of a noisy sum."
            )
        pairs = zip(noisy_3.tolist(), self._scales, strict=True)
        loss, count, clipped = (number * self.grid / scale for number, scale in pairs)
        return loss, count, clipped

    @property
    def errors(self) -> StandardErrors:
        """Known before the run: what one step's numbers are worth."""
        of_loss, of_count, of_clipped = self._variances
        of_records = self._trust_in_count * of_count
        return StandardErrors(
            loss=LOSS_BOUND / 2 * math.sqrt(of_loss + of_records) / self.expected_records,
            records=math.sqrt(of_count),
            clip_fraction=0.5 * math.sqrt(of_clipped + of_records) / self.expected_records,
        )

    def telemetry(
        self, sums: tuple[float, float, float], *, steps: int, usual_records: float
    ) -> Telemetry:
        """What the mean over ``steps`` steps of ``read`` sums says.

        ``usual_records``: the expected number of records, as ``usual_records`` estimates it.
        """
        loss, count, clipped = sums
        records = usual_records + self._trust_in_count * (count - usual_records)
        records = max(records, 0.1 * self.expected_records)  # only where the noise is hopeless
        shorter = 1.0 / math.sqrt(steps)
        return Telemetry(
            loss=_estimate(
                LOSS_BOUND / 2 * (1.0 + loss / records), self.errors.loss * shorter, LOSS_BOUND
            ),
            records=_estimate(count, self.errors.records * shorter, math.inf),
            clip_fraction=_estimate(
                0.5 * (1.0 + clipped / records), self.errors.clip_fraction * shorter, 1.0
            ),
        )

    def usual_records(self, total: float, *, steps: int) -> float:
        """The expected records of a step, from the ``total`` of ``steps`` noisy counts."""
        spread = self.spread_of_records + self._variances[1]
        prior = spread / (_DECLARED_WITHIN * self.expected_records) ** 2
        return (prior * self.expected_records + total) / (prior + steps)

    @property
    def _scales(self) -> tuple[float, ...]:
        return tuple(self.norm * weight for weight in WEIGHTS)

    @property
    def _variances(self) -> tuple[float, ...]:
        """Of the noise in the sums that ``read`` gives."""
        return tuple((self.noise_std / scale) ** 2 for scale in self._scales)

    @property
    def _trust_in_count(self) -> float:
        """k: how much of a step's noisy count is news about the number of records."""
        of_count = self._variances[1]
        if of_count == 0.0:
            return 1.0
        return self.spread_of_records / (self.spread_of_records + of_count)


class TelemetryHistory:
    """The noisy sums of all steps so far; part of the training state. Released numbers only."""

    def __init__(self, query: TelemetryQuery) -> None:
        self.query = query
        self._sums = array("d")  # three numbers of each step
        self._records = array("d", [0.0])  # noisy records of the first 0, 1, 2, ... steps

    def add(self, noisy_3: Tensor) -> None:
        """One step's noisy sums, int64 (3,)."""
        self._append(self.query.read(noisy_3))

    def over(self, window: int, *, steps: int | None = None) -> Telemetry:
        """What the last ``window`` of the first ``steps`` steps say together (None: all so far)."""
        steps = self._steps if steps is None else steps
        first = max(0, steps - window)
        last = self._sums[TELEMETRY_NUMBERS * first : TELEMETRY_NUMBERS * steps]
        loss, count, clipped = (
            math.fsum(last[number::TELEMETRY_NUMBERS]) / (steps - first)
            for number in range(TELEMETRY_NUMBERS)
        )
        usual = self.query.usual_records(self._records[steps], steps=steps)
        return self.query.telemetry(
            (loss, count, clipped), steps=steps - first, usual_records=usual
        )

    def fall_of_loss(self) -> float:
        """How far the loss fell from the first steps to the last, in standard errors: what a run
        does that learns. Needs two steps."""
        window = min(WINDOW, self._steps // 2)
        first, last = self.over(window, steps=window).loss.value, self.over(window).loss.value
        return (first - last) / (self.query.errors.loss * math.sqrt(2.0 / window))

    def state(self) -> Tensor:
        """Everything that ``load`` needs, float64 (steps, 3)."""
        return torch.from_numpy(np.array(self._sums)).reshape(-1, TELEMETRY_NUMBERS)

    def load(self, state: Tensor) -> None:
        """Go on from ``state()``."""
        self._sums, self._records = array("d"), array("d", [0.0])
        for loss, count, clipped in state.tolist():
            self._append((loss, count, clipped))

    @property
    def _steps(self) -> int:
        return len(self._records) - 1

    def _append(self, sums: tuple[float, float, float]) -> None:
        self._sums.extend(sums)
        self._records.append(self._records[-1] + sums[1])


def centred(loss_B: Tensor) -> Tensor:
    """x: the loss clipped to [0, L], as a number in [-1, 1]."""
    return (loss_B * (2.0 / LOSS_BOUND) - 1.0).clamp(-1.0, 1.0)


def _estimate(value: float, error: float, highest: float) -> Estimate:
    """``value`` with two standard errors to both sides, within [0, highest]."""
    low, middle, high = (
        min(max(number, 0.0), highest) for number in (value - 2 * error, value, value + 2 * error)
    )
    return Estimate(middle, low, high)
