"""The plan: its cap, its clip norm, and plans that are refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.accounting import epsilon
from dpldm_dist.privacy.plan import contribution_bound, make_plan
from dpldm_dist.privacy.randomness import new_key
from dpldm_dist.privacy.sampling import Lanes, PoissonSampling


def plan_with(**changes):
    numbers = {
        "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.75, "records": 4000, "batch": 500, "steps": 40,
        "noise_multiplier": 2.0, "lanes": 3, "microbatch": 16,
    }  # fmt: skip
    return make_plan(**{**numbers, **changes})


def test_a_calibrated_plan_costs_at_most_its_budget_and_little_less():
    plan = plan_with(noise_multiplier=None, statistics_noise=10.0, reserve_steps=5)
    charged = replace(plan.step_event, count=plan.steps + plan.reserve_steps)
    cost = epsilon([charged, *plan.statistics_events], plan.accounting_delta)
    assert 0.99 * plan.epsilon < cost <= plan.epsilon


def test_the_cap_of_a_batch_binds_with_less_than_the_probability_that_delta_pays_for():
    plan = plan_with()
    tail = binom.sf(plan.batch_cap, plan.records + 1, plan.sample_rate)
    assert tail * plan.most_charges <= plan.overflow_delta
    assert plan.accounting_delta + plan.overflow_delta == pytest.approx(plan.delta, rel=1e-12)
    assert binom.sf(plan.batch_cap - 1, plan.records + 1, plan.sample_rate) * plan.most_charges > (
        plan.overflow_delta
    )


def test_the_clip_norm_pays_for_the_rounding_of_every_microbatch_of_every_lane():
    plan, parameters, error = plan_with(), 10_000, 1e-7
    bound = contribution_bound(plan, parameters=parameters, accumulation_error=error).gradient
    paid = (plan.clip_norm - bound) / (math.sqrt(parameters) * plan.grid + 2 * error)
    sampling = PoissonSampling(new_key(), attempt=1, sample_rate=plan.sample_rate)
    placements = [[4000], [1, 3999], [500] * 8, [334] * 11 + [326], [4001]]
    for shards in placements:  # a record more may move all others to other shards and lanes
        lanes = Lanes(shards, lanes=plan.lanes, cap=plan.batch_cap, microbatch=plan.microbatch)
        for step in range(50):
            filled = sum(
                1 for lane in range(plan.lanes) for _ in lanes.microbatches(sampling, step, lane)
            )
            assert filled <= paid + 1e-6


def test_the_grid_is_a_power_of_two_far_below_the_clip_norm():
    for clip_norm in (1e-6, 0.75, 1.0, 3.0):
        plan = plan_with(clip_norm=clip_norm)
        assert math.frexp(plan.grid)[0] == 0.5
        assert 2.0**30 <= plan.clip_norm / plan.grid < 2.0**31


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 4001}, "at most the 4000 records"),
        ({"noise_multiplier": 0.4}, "costs epsilon"),
        ({"epsilon": 1e-9, "noise_multiplier": None}, "epsilon"),
    ],
)
def test_an_impossible_plan_is_refused_in_one_line(changes, said):
    with pytest.raises(PrivacyError, match=said) as caught:
        plan_with(**changes)
    assert "\n" not in str(caught.value)


def test_a_model_so_large_that_rounding_matters_is_refused():
    with pytest.raises(PrivacyError, match="Rounding would take"):
        contribution_bound(plan_with(microbatch=2), parameters=10**16, accumulation_error=0.0)


def test_every_field_changes_the_digest():
    plan = plan_with()
    digests = {plan.digest()}
    for name, value in plan.facts().items():
        other = "other" if isinstance(value, str) else (np.nextafter(value, 9e9) if value else 7.0)
        digests.add(replace(plan, **{name: other}).digest())
    assert len(digests) == 1 + len(plan.facts())
