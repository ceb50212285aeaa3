"""The public numbers of the mechanism, fixed before any private record is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from scipy.stats import binom

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.accounting import GaussianEvent, calibrate_noise_multiplier, epsilon
from dpldm_dist.privacy.sampling import dyadic_rate

GRID_BITS = 30  # the integer grid divides clip_norm's power of two by 2^30
MOST_TELEMETRY = 0.02  # of the squared clip norm
TELEMETRY_NUMBERS = 3  # loss, count and clip flag, behind the gradients
_OVERFLOW_SHARE = 1e-6  # share of delta that pays for the cap on records per step


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything that accounting and the mechanism need, and nothing private.

    ``sample_rate`` is a multiple of 2^-40. ``clip_norm`` bounds what one record adds to a sum, in
    L2 norm, including every rounding. ``batch_cap``: a batch has at most so many records, but for a
    probability of at most ``overflow_delta`` over all steps, which is taken off delta.
    ``records`` is N as declared to the public, ``divisor`` the constant q * N by which every noisy
    sum is divided. ``statistics_noise`` is the noise multiplier of one release over all records
    before the first step, None if there is none. ``telemetry_share`` is the share of the squared
    clip norm that loss, count and clip flag of a record take (``privacy/telemetry.py``).
    """

    epsilon: float
    delta: float
    overflow_delta: float
    unit: str
    relation: str
    records: int
    sample_rate: float
    steps: int
    reserve_steps: int
    noise_multiplier: float
    statistics_noise: float | None
    clip_norm: float
    telemetry_share: float
    draws: int
    lanes: int
    batch_cap: int
    microbatch: int

    @property
    def divisor(self) -> float:
        return self.sample_rate * self.records

    @property
    def most_charges(self) -> int:
        """Steps that may ever be charged, repeated ones too: what ``overflow_delta`` covers."""
        return 2 * (self.steps + self.reserve_steps)

    @property
    def step_event(self) -> GaussianEvent:
        """What one noisy step costs."""
        return GaussianEvent(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)

    @property
    def statistics_events(self) -> tuple[GaussianEvent, ...]:
        """What the release before the first step costs: nothing, or one unsubsampled Gaussian."""
        if self.statistics_noise is None:
            return ()
        return (GaussianEvent(noise_multiplier=self.statistics_noise, sample_rate=1.0),)

    @property
    def accounting_delta(self) -> float:
        """The delta at which the composition of all charges is reported."""
        return self.delta - self.overflow_delta

    @property
    def grid(self) -> float:
        """Unit of the integer sums, a power of two: clip_norm is 2^30 to 2^31 of them."""
        return 2.0 ** (math.floor(math.log2(self.clip_norm)) - GRID_BITS)

    def facts(self) -> dict[str, object]:
        """Plain public numbers, for ledgers, manifests and reports."""
        return asdict(self)

    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON of all fields."""
        text = json.dumps(self.facts(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def make_plan(
    *,
    epsilon: float,
    delta: float,
    clip_norm: float,
    records: int,
    batch: int,
    steps: int,
    draws: int = 1,
    reserve_steps: int = 0,
    noise_multiplier: float | None = None,
    statistics_noise: float | None = None,
    telemetry_share: float = 0.0,
    unit: str = "image",
    lanes: int = 1,
    microbatch: int = 64,
) -> PrivacyPlan:
    """Calibrated plan: the smallest noise whose whole cost stays within (epsilon, delta).

    With ``noise_multiplier`` given, it is checked instead. ``batch`` is the expected number of
    records per step. Raises: PrivacyError if the budget cannot be met.
    """
    if not 0.0 <= telemetry_share <= MOST_TELEMETRY:
        raise PrivacyError(
            f"privacy.telemetry_share = {telemetry_share}: expected in [0, {MOST_TELEMETRY}]."
        )
    if batch > records:
        raise PrivacyError(
            f"finetune.batch = {batch}: expected at most the {records} records declared."
        )
    sample_rate = dyadic_rate(batch / records)
    charges = steps + reserve_steps
    overflow_delta = delta * _OVERFLOW_SHARE
    others = () if statistics_noise is None else (GaussianEvent(statistics_noise, 1.0),)
    if noise_multiplier is None:
        noise_multiplier = calibrate_noise_multiplier(
            epsilon=epsilon,
            delta=delta - overflow_delta,
            sample_rate=sample_rate,
            steps=charges,
            others=others,
        )
    plan = PrivacyPlan(
        epsilon=epsilon,
        delta=delta,
        overflow_delta=overflow_delta,
        unit=unit,
        relation="add_or_remove_one",
        records=records,
        sample_rate=sample_rate,
        steps=steps,
        reserve_steps=reserve_steps,
        noise_multiplier=noise_multiplier,
        statistics_noise=statistics_noise,
        clip_norm=clip_norm,
        telemetry_share=telemetry_share,
        draws=draws,
        lanes=lanes,
        batch_cap=_batch_cap(records, sample_rate, draws=2 * charges, failure=overflow_delta),
        microbatch=microbatch,
    )
    _refuse_over_budget(plan, others)
    return plan


@dataclass(frozen=True)
class ContributionBound:
    """Norms to which a record is clipped; unit of clip_norm.

    ``gradient`` is that of its gradient, ``telemetry`` that of its three numbers behind it. The
    root of the sum of their squares is what is left of clip_norm after every rounding.
    """

    gradient: float
    telemetry: float


def contribution_bound(
    plan: PrivacyPlan, *, parameters: int, accumulation_error: float
) -> ContributionBound:
    """The norms to which a record is clipped so that the *computed integer sum* moves by at most
    ``plan.clip_norm`` when the record is added or removed.

    A further record can re-pack every microbatch of every lane (also by moving other records to
    other shards). A batch within ``batch_cap`` fills at most M = floor(batch_cap / microbatch) +
    lanes microbatches, with the record and without it, and each computed one is off its exact value
    by at most half a grid unit in each coordinate, sqrt(P + 3) / 2 units in norm with telemetry,
    plus ``accumulation_error`` (same unit as clip_norm; from the gradient engine). So the sum moves
    by at most the clipped norm plus M (sqrt(P + 3) grid + 2 accumulation_error), which is taken off
    here. What is left is split by ``telemetry_share``.
    Raises: PrivacyError if more than a tenth of clip_norm would go.
    """
    coordinates = parameters + (TELEMETRY_NUMBERS if plan.telemetry_share else 0)
    microbatches = plan.batch_cap // plan.microbatch + plan.lanes
    slack = microbatches * (math.sqrt(coordinates) * plan.grid + 2.0 * accumulation_error)
    if slack > 0.1 * plan.clip_norm:
        raise PrivacyError(
            f"Rounding would take {slack / plan.clip_norm:.0%} of clip_norm for {parameters} "
            f"parameters and microbatches of {plan.microbatch}: raise run.microbatch or lower "
            "privacy.lanes."
        )
    joint = plan.clip_norm - slack
    return ContributionBound(
        gradient=joint * math.sqrt(1.0 - plan.telemetry_share),
        telemetry=joint * math.sqrt(plan.telemetry_share),
    )


def _batch_cap(records: int, sample_rate: float, *, draws: int, failure: float) -> int:
    """Smallest cap that Binomial(records + 1, q) exceeds in none of ``draws`` draws, but for a
    probability of at most ``failure``."""
    if sample_rate == 1.0:
        return records + 1
    cap = int(binom.isf(failure / draws, records + 1, sample_rate))
    while binom.sf(cap, records + 1, sample_rate) > failure / draws:
        cap += 1
    return min(cap, records + 1)


def _refuse_over_budget(plan: PrivacyPlan, others: Sequence[GaussianEvent]) -> None:
    step = plan.step_event
    charged = GaussianEvent(
        step.noise_multiplier, step.sample_rate, plan.steps + plan.reserve_steps
    )
    cost = epsilon([charged, *others], plan.accounting_delta)
    if cost > plan.epsilon:
        raise PrivacyError(
            f"privacy.noise_multiplier = {plan.noise_multiplier} costs epsilon {cost:.3f} over"
            f" {plan.steps + plan.reserve_steps} steps: expected at most {plan.epsilon}. Raise it,"
            " take fewer steps, or leave it out to have it calibrated."
        )
