"""From observations to a verdict: every instrument's readings, the lower bound, pass or fail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from dpldm_dist.audit.observe import NoisyRun, Observations
from dpldm_dist.audit.point import DELTA
from dpldm_dist.privacy.accounting import GaussianEvent, delta_curve, epsilon
from dpldm_dist.privacy.audit import contribution, noise, sampling
from dpldm_dist.privacy.audit.one_run import (
    LEVEL,
    Guesses,
    TradeOff,
    epsilon_bound,
    guess,
    noise_bound,
)
from dpldm_dist.privacy.audit.reading import Reading, exact

_ROUNDING = 1e-4  # of float32 weights, relative
_CURVE = np.linspace(0.0, 12.0, 97)  # epsilons at which a trade-off is taken


@dataclass(frozen=True)
class Verdict:
    """What an audit found.

    ``claim``: epsilon of the audited run at ``delta``, from its ledger. ``lower_bound``: what the
    guesses prove, by (epsilon, delta) alone; ``lower_bound_curve``: by the whole trade-off curve;
    each exceeds the truth in at most one audit of twenty. ``noise_share``: the share of the claimed
    noise that there can be at most by the latter, None if the guesses tell nothing.
    """

    claim: float
    delta: float
    lower_bound: float
    lower_bound_curve: float
    noise_share: float | None
    guesses: tuple[Guesses, ...]
    readings: tuple[Reading, ...]

    @property
    def passed(self) -> bool:
        return all(reading.passed for reading in self.readings)

    def facts(self) -> dict[str, Any]:
        """Plain values, for ``audit.json``."""
        tree = asdict(self)
        for entry, reading in zip(tree["readings"], self.readings, strict=True):
            entry["passed"] = reading.passed
        return {"passed": self.passed, **tree}


def judge(seen: Observations) -> Verdict:
    """Ask every instrument. Formal guarantees: correct code fails a statistical reading with
    probability at most its alpha (1e-6), and the canary readings with at most 5 % together, in
    practice never, because the bounds lie far below what is true of correct code."""
    claim = seen.noisy.ledger.epsilon
    guesses = guess(seen.scores_M, seen.included_M)
    lower = epsilon_bound(guesses, delta=DELTA)
    share, lower_curve = _curve_bound(seen, guesses)
    readings = [
        *_noise_readings(seen),
        *sampling.selection(seen.selection.drawn_TN, rate=seen.selection_rate, places=seen.places),
        *_contribution_readings(seen),
        *_ledger_readings(seen),
        _canary_reading("epsilon proved by (epsilon, delta)", lower, claim),
        _canary_reading("epsilon proved by trade-off curve", lower_curve, claim),
    ]
    return Verdict(
        claim=claim,
        delta=DELTA,
        lower_bound=lower,
        lower_bound_curve=lower_curve,
        noise_share=share if math.isfinite(share) else None,
        guesses=tuple(guesses),
        readings=tuple(readings),
    )


def failed(readings: Sequence[Reading]) -> list[Reading]:
    """Those that failed, the least likely first."""
    return sorted((r for r in readings if not r.passed), key=lambda reading: reading.p_value)


def _noise_readings(seen: Observations) -> list[Reading]:
    noisy, weights, data = seen.noisy, seen.other_weights, seen.other_data
    # what records leave in coordinates that are not their own, over the noise: the batch has at
    # most this share of all canaries, and their parts add up or not
    outside = seen.plan.sample_rate * (seen.reference.outside / seen.plan.noise_multiplier) ** 2
    return [
        *noise.calibration(noisy.blank_TN, where="blank rows"),
        *noise.calibration(data.blank_TN, where="empty batches"),
        _worst_slice(noisy, outside, "noisy run"),
        _worst_slice(weights, outside, "other weights"),
        _worst_slice(data, 0.0, "other data"),
        noise.alike(noisy.blank_TN, name="cosine of the two closest steps"),
        noise.alike(
            noisy.blank_TN[seen.restart :],
            weights.blank_TN,
            name="cosine with restart, other weights",
        ),
        noise.alike(
            noisy.blank_TN,
            data.blank_TN,
            name="cosine with restart, other data",
        ),
        noise.repeated_within(noisy.first_P, name="cosine of a step, shifted"),
    ]


def _worst_slice(steps: NoisyRun, more: float, where: str) -> Reading:
    return noise.worst_slice(steps.squares_TK, steps.lengths_K, more=more, where=where)


def _contribution_readings(seen: Observations) -> list[Reading]:
    least, most = seen.least, seen.most * (1 + _ROUNDING)
    plan, own_M = seen.plan, np.linalg.norm(seen.reference.own_MD, axis=1)
    own = float(own_M.mean())
    return [
        *contribution.contributions(own_M, least=least, most=most, where="all at once"),
        *contribution.contributions(
            seen.selection.norms, least=least, most=most, where="small batches"
        ),
        contribution.remainder(seen.reference.outside, own_M, most=most),
        contribution.scale(
            seen.scores_M[seen.included_M],
            rate=plan.sample_rate,
            steps=plan.steps,
            noise_std=plan.noise_multiplier / own if own > 0 else math.inf,
        ),
    ]


def _ledger_readings(seen: Observations) -> list[Reading]:
    """Every step that moved the weights was charged, with the noise and rate that were claimed."""
    step, steps = seen.plan.step_event, seen.plan.steps
    found = []
    for name in ("noisy", "other_weights", "other_data"):
        events = getattr(seen, name).ledger.events
        charged = sum(e.count for e in events if e == replace(step, count=e.count))
        text = f"steps charged, {name.replace('_', ' ')} run"
        found.append(exact("ledger", text, charged, f"at least {steps}", holds=charged >= steps))
    return found


def _canary_reading(name: str, bound: float, claim: float) -> Reading:
    """Fails when the bound contradicts the claim at the level of the bound."""
    return Reading("canaries", name, bound, f"at most {claim:.4g}", float(bound <= claim), LEVEL)


def _curve_bound(seen: Observations, guesses: Sequence[Guesses]) -> tuple[float, float]:
    """(most noise that there can be as a share of the claimed one, epsilon that goes with it)."""
    plan = seen.plan

    def events(share: float) -> list[GaussianEvent]:
        noise_multiplier = share * plan.noise_multiplier
        return [GaussianEvent(noise_multiplier, plan.sample_rate, plan.steps)]

    @lru_cache(maxsize=64)
    def curve(share: float) -> TradeOff:
        deltas = delta_curve(events(share), _CURVE.tolist(), delta=DELTA)
        return TradeOff(_CURVE, np.array(deltas))

    share = noise_bound(guesses, curve)
    return share, epsilon(events(share), DELTA) if math.isfinite(share) else 0.0
