"""Accounting against closed forms, independent accountants and published operating points."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from dpldm_dist.cli import COMMANDS
from dpldm_dist.config import Config
from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.accounting import (
    LARGEST_NOISE_MULTIPLIER,
    SMALLEST_NOISE_MULTIPLIER,
    GaussianEvent,
    affordable_steps,
    calibrate_noise_multiplier,
    epsilon,
    epsilon_curve,
    epsilon_prv,
    epsilon_rdp,
)

# (sample rate, steps, noise multiplier, delta) -> epsilon, by dp-accounting's PLD on a fixed grid of
# 1e-5 (not the grid that `epsilon` picks): 20 settings of the paper's experiments and around them.
GOLDEN = {
    # DP-LDM's configs: CIFAR-10, batch 2000 of 50,000, 30 epochs, for epsilon 10, 5 and 1
    (0.04, 750, 0.858, 1e-5): 9.985410,
    (0.04, 750, 1.232, 1e-5): 4.986709,
    (0.04, 750, 4.243, 1e-5): 0.989687,
    # MNIST, batch 2000 of 60,000, 200 epochs, for epsilon 10 and 1
    (1 / 30, 6000, 1.472, 1e-5): 9.987913,
    (1 / 30, 6000, 9.775, 1e-5): 0.989149,
    # CelebA at 32 pixels, batch 2048, for epsilon 1; at 64 pixels, batch 8192, 70 epochs, for 10
    (0.0125, 4000, 3.477, 1e-6): 0.988971,
    (0.05, 1400, 1.245, 1e-6): 9.989161,
    # CelebA-HQ with captions, batch 256 of about 27,000 and 24,000, for epsilon 10
    (0.0094, 106, 0.4275, 1e-5): 9.968374,
    (256 / 24_000, 940, 0.552, 1e-5): 9.989113,
    # the size of ImageNet at epsilon 8, and CIFAR-10 in 100 large steps at epsilon 1
    (0.0127, 3950, 0.839, 1e-6): 7.922158,
    (0.1, 100, 3.98, 1e-5): 0.988665,
    # CIFAR-10 with longer training and larger batches (2,000, 5,000 and 10,000 of 50,000)
    (0.04, 1250, 0.9806, 1e-5): 9.990086,
    (0.1, 500, 1.339, 1e-5): 9.986454,
    (0.2, 250, 1.763, 1e-5): 9.990117,
    (0.2, 1000, 3.263, 1e-5): 9.987154,
    (0.2, 1000, 23.87, 1e-5): 0.989711,
    # the demo's size: batches of 512 and 1024 of 4,000 digits, for epsilon 10 and 1
    (0.128, 60, 0.836, 1e-5): 10.005684,
    (0.128, 60, 3.946, 1e-5): 0.999678,
    (0.256, 120, 1.604, 1e-5): 9.992556,
    (0.256, 60, 7.590, 1e-5): 0.999395,
}
AGREEMENT = {"rel": 0.005, "abs": 0.005}  # asked of two accountants that work differently
PACKAGE = Path(__file__).parents[2] / "dpldm_dist"


def golden_event(setting):
    rate, steps, sigma, delta = setting
    return GaussianEvent(sigma, rate, steps), delta


def gaussian_epsilon(sigma, delta, *, sensitivity=1.0):
    """Exact epsilon of one Gaussian release. Balle and Wang (2018), arXiv 1805.06530, Theorem 8."""
    ratio = sensitivity / sigma

    def excess(eps):
        tail = math.exp(eps + norm.logcdf(-ratio / 2 - eps / ratio))
        return norm.cdf(ratio / 2 - eps / ratio) - tail - delta

    return brentq(excess, 0, 200, xtol=1e-12) if excess(0) > 0 else 0.0


def one_step_epsilon(sigma, rate, delta, *, lower):
    """Exact epsilon of one step: (1 - q) N(0) + q N(1) against (1 - q) N(0) + q N(lower).

    The likelihood ratio grows with x, so the worst event is a half line.
    """

    def log_density(x, mode):
        return math.log((1 - rate) * norm.pdf(x, 0, sigma) + rate * norm.pdf(x, mode, sigma))

    def mass_above(x, mode):
        return (1 - rate) * norm.sf(x, 0, sigma) + rate * norm.sf(x, mode, sigma)

    def excess(eps):
        def loss(x):
            return log_density(x, 1.0) - log_density(x, lower) - eps

        if loss(30 * sigma) < 0:
            return -delta
        cut = brentq(loss, -30 * sigma, 30 * sigma, xtol=1e-13)
        return mass_above(cut, 1.0) - math.exp(eps) * mass_above(cut, lower) - delta

    return brentq(excess, 1e-9, 100, xtol=1e-10)


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 25])
@pytest.mark.parametrize("sigma", [0.7, 4.0, 50.0])
def test_without_subsampling_epsilon_is_that_of_the_gaussian_mechanism(sigma, count):
    exact = gaussian_epsilon(sigma / math.sqrt(count), 1e-5)
    found = epsilon([GaussianEvent(sigma, 1.0, count)], 1e-5)
    assert exact - 1e-9 <= found <= exact * 1.001 + 1e-4


@pytest.mark.parametrize("sigma", [0.7, 4.0, 50.0])
def test_replacing_a_record_without_subsampling_is_twice_the_sensitivity(sigma):
    exact = gaussian_epsilon(sigma, 1e-5, sensitivity=2.0)
    found = epsilon([GaussianEvent(sigma, 1.0)], 1e-5, relation="replace_one")
    assert exact - 1e-9 <= found <= exact * 1.001 + 1e-4


@pytest.mark.parametrize(("sigma", "rate"), [(0.6, 0.04), (1.0, 0.3), (0.5, 0.01)])
@pytest.mark.parametrize(("relation", "lower"), [("add_or_remove_one", 0.0), ("replace_one", -1.0)])
def test_one_subsampled_step_costs_what_its_own_pair_of_distributions_says(
    sigma, rate, relation, lower
):
    exact = one_step_epsilon(sigma, rate, 1e-4, lower=lower)
    found = epsilon([GaussianEvent(sigma, rate)], 1e-4, relation=relation)
    assert exact - 1e-6 <= found <= exact * 1.001 + 1e-4


# --- golden settings and independent accountants ----------------------------------------------


@pytest.mark.parametrize("setting", GOLDEN, ids=str)
def test_pld_agrees_with_its_golden_value_and_with_two_other_accountants(setting):
    event, delta = golden_event(setting)
    found = epsilon([event], delta)
    # the excess that `epsilon` promises on its own, coarser grid is 2e-5 of epsilon
    assert found == pytest.approx(GOLDEN[setting], rel=1e-4)
    assert abs(epsilon_prv([event], delta) - found) <= 0.005 * found + 0.005
    assert found < epsilon_rdp([event], delta) < 1.25 * found


def test_twenty_settings_are_compared():
    assert len(GOLDEN) == 20


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_the_central_limit_accountant_is_never_offered(path):
    """It stays up to 30 % below the truth. No name, option or text but a docstring may hold it."""
    tree = ast.parse(path.read_text())
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        names = [node.value] if isinstance(node, ast.Constant) and node not in docstrings else []
        names += [getattr(node, field, "") for field in ("id", "attr", "name", "arg", "module")]
        for name in names:
            assert not re.search(r"gdp|clt|GaussianAccountant", str(name)), name


def test_no_option_chooses_the_accountant():
    options = json.dumps(Config.model_json_schema()) + json.dumps(list(COMMANDS))
    assert "epsilon" in options
    for word in ("gdp", "prv", "rdp", "accountant"):
        assert word not in options.lower()


def test_replace_one_is_its_own_number():
    event = GaussianEvent(4.243, 0.04, 750)
    replaced = epsilon([event], 1e-5, relation="replace_one")
    assert replaced == pytest.approx(2.0645, rel=1e-3)
    # group privacy bounds it: removing, then adding, at epsilon e costs (2e, (1 + e^e) delta)
    half = epsilon([event], 1e-5 / (1 + math.exp(replaced / 2)))
    assert epsilon([event], 1e-5) < replaced < 2 * half


def test_a_tiny_rate_gets_a_grid_fine_enough_for_it():
    # 0.085 on a grid of 1e-3, 0.0400 on 1e-4, 0.0380 on 1e-5
    assert epsilon([GaussianEvent(1.0, 1e-4, 10_000)], 1e-5) == pytest.approx(0.0380, abs=5e-4)


def test_a_release_over_all_records_adds_to_the_steps():
    steps, release = GaussianEvent(0.858, 0.04, 750), GaussianEvent(10.0, 1.0)
    both = epsilon([steps, release], 1e-5)
    assert both == pytest.approx(9.99901, rel=1e-4)
    assert epsilon([steps], 1e-5) < both < epsilon([steps], 1e-5) + epsilon([release], 1e-5)
    assert epsilon_prv([steps, release], 1e-5) == pytest.approx(both, **AGREEMENT)


def test_events_of_different_kinds_compose():
    events = [
        GaussianEvent(0.858, 0.04, 500),
        GaussianEvent(1.0, 0.02, 300),
        GaussianEvent(2.0, 0.1),
    ]
    found = epsilon(events, 1e-5)
    assert epsilon_prv(events, 1e-5) == pytest.approx(found, **AGREEMENT)
    assert max(epsilon([event], 1e-5) for event in events) < found < epsilon_rdp(events, 1e-5)


def test_only_the_total_count_of_a_kind_matters():
    split = [GaussianEvent(2.0, 0.04, 30), GaussianEvent(3.0, 1.0), GaussianEvent(2.0, 0.04, 70)]
    merged = [GaussianEvent(2.0, 0.04, 100), GaussianEvent(3.0, 1.0)]
    assert epsilon(split, 1e-5) == epsilon(merged, 1e-5)


def test_steps_repeated_after_a_crash_are_paid_for():
    once = epsilon([GaussianEvent(0.9806, 0.04, 1250)], 1e-5)
    with_a_tenth_again = epsilon([GaussianEvent(0.9806, 0.04, 1375)], 1e-5)
    assert (once, with_a_tenth_again) == (
        pytest.approx(9.99, abs=0.01),
        pytest.approx(10.54, abs=0.02),
    )


def test_fresh_noise_on_the_same_batch_is_no_second_step():
    # its event is (q, sigma / sqrt 2), dearer than two steps: why a restart draws fresh coins too
    others = GaussianEvent(0.6, 0.01, 99)
    repeated = epsilon([others, GaussianEvent(0.6 / math.sqrt(2), 0.01)], 1e-5)
    assert repeated > epsilon([others, GaussianEvent(0.6, 0.01, 2)], 1e-5) + 1.0


def test_nothing_released_costs_nothing():
    for accountant in (epsilon, epsilon_rdp, epsilon_prv):
        assert accountant([], 1e-5) == 0.0
        assert accountant([GaussianEvent(1.0, 0.5, count=0)], 1e-5) == 0.0


@pytest.mark.parametrize(
    "event",
    [
        GaussianEvent(1e-6, 0.5),
        GaussianEvent(1e-3, 0.5),
        GaussianEvent(0.05, 0.001, 1_000_000),
        GaussianEvent(0.01, 1.0, 1_000_000),
    ],
    ids=str,
)
def test_hopeless_noise_costs_infinity_at_once(event):
    for accountant in (epsilon, epsilon_prv):
        assert in_a_process_of_one_second(lambda: accountant([event], 1e-5)) == "inf"  # noqa: B023


@pytest.mark.parametrize("delta", [1e-30, 1 - 1e-16])
@pytest.mark.parametrize("rate", [2.0**-40, 1 - 1e-16, 1.0])
@pytest.mark.parametrize("sigma", [1e-6, 1.0, 1e6])
def test_the_ends_of_every_range_get_a_number_that_is_no_less_than_zero(sigma, rate, delta):
    for accountant in (epsilon, epsilon_rdp):
        assert accountant([GaussianEvent(sigma, rate)], delta) >= 0.0


# --- calibration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps", "others"),
    [
        (10.0, 1e-5, 0.04, 750, ()),
        (1.0, 1e-5, 0.04, 750, ()),
        (1.0, 1e-5, 0.2, 1000, ()),
        (0.1, 1e-6, 0.0125, 300, ()),
        (10.0, 1e-5, 0.04, 750, (GaussianEvent(10.0, 1.0),)),
        (3.0, 1e-5, 1.0, 1, ()),
    ],
)
def test_calibrated_noise_meets_the_budget_and_wastes_next_to_none(
    target, delta, rate, steps, others
):
    sigma = calibrate_noise_multiplier(
        epsilon=target, delta=delta, sample_rate=rate, steps=steps, others=others
    )
    assert sigma == round(sigma, 4)
    assert epsilon([GaussianEvent(sigma, rate, steps), *others], delta) <= target
    less = sigma * 0.999 - 2e-4
    assert epsilon([GaussianEvent(less, rate, steps), *others], delta) > target


def test_the_budget_pays_for_exactly_the_steps_it_was_calibrated_for():
    sigma = calibrate_noise_multiplier(epsilon=1.0, delta=1e-5, sample_rate=0.04, steps=100)
    event = GaussianEvent(sigma, 0.04)
    affordable = affordable_steps(event, spent=(), epsilon=1.0, delta=1e-5)
    assert affordable == 100
    assert (
        affordable_steps(event, spent=[GaussianEvent(sigma, 0.04, 40)], epsilon=1.0, delta=1e-5)
        == 60
    )
    release = GaussianEvent(20.0, 1.0)
    after_release = affordable_steps(event, spent=[release], epsilon=1.0, delta=1e-5)
    assert 0 < after_release < 100
    assert epsilon([GaussianEvent(sigma, 0.04, after_release), release], 1e-5) <= 1.0
    assert epsilon([GaussianEvent(sigma, 0.04, after_release + 1), release], 1e-5) > 1.0


def test_asking_for_at_most_so_many_steps_gives_no_other_answer():
    event = GaussianEvent(2.0, 0.04)
    release = GaussianEvent(20.0, 1.0)
    for spent in ((), (release,), (replace(event, count=30), release)):
        budget = {"spent": spent, "epsilon": 1.0, "delta": 1e-5}
        all_of_them = affordable_steps(event, **budget)
        assert all_of_them > 2
        for most in (0, 1, all_of_them - 1, all_of_them, all_of_them + 1, 10 * all_of_them):
            assert affordable_steps(event, **budget, most=most) == min(most, all_of_them)


def test_a_spent_budget_affords_nothing():
    spent = [GaussianEvent(1.0, 0.04, 1000)]
    assert affordable_steps(GaussianEvent(50.0, 0.01), spent=spent, epsilon=1.0, delta=1e-5) == 0
    assert affordable_steps(GaussianEvent(0.5, 1.0), spent=(), epsilon=1.0, delta=1e-5) == 0


def test_a_generous_budget_gets_the_smallest_noise_in_use():
    sigma = calibrate_noise_multiplier(epsilon=4000.0, delta=1e-5, sample_rate=1e-3, steps=1)
    assert sigma == SMALLEST_NOISE_MULTIPLIER


def test_a_budget_that_no_noise_meets_is_refused_with_the_bound():
    with pytest.raises(PrivacyError, match=f"at most {LARGEST_NOISE_MULTIPLIER:g}"):
        calibrate_noise_multiplier(epsilon=1e-4, delta=1e-9, sample_rate=1.0, steps=100_000)


def test_a_budget_used_up_by_the_other_releases_is_refused():
    with pytest.raises(PrivacyError, match="releases beside the steps"):
        calibrate_noise_multiplier(
            epsilon=1.0, delta=1e-5, sample_rate=0.04, steps=10, others=[GaussianEvent(1.0, 1.0)]
        )


def test_the_curve_rises_to_the_whole_cost():
    event, release = GaussianEvent(1.0, 0.02), GaussianEvent(10.0, 1.0)
    curve = epsilon_curve(event, others=[release], delta=1e-5, steps=[0, 10, 100, 200])
    assert curve == sorted(curve)
    assert curve[0] == epsilon([release], 1e-5)
    assert curve[-1] == epsilon([GaussianEvent(1.0, 0.02, 200), release], 1e-5)


# --- hostile input ----------------------------------------------------------------------------

NOT_NUMBERS = [math.nan, math.inf, -math.inf, "1", None, True, 1j, 10**400, [1.0], np.bool_(True)]


def refused(match, function, *arguments, **options):
    """In one line, and before a second of processor time is over: a process of its own is killed by
    the kernel then, wherever it hangs."""
    outcome = in_a_process_of_one_second(lambda: function(*arguments, **options))
    assert outcome.startswith("PrivacyError: "), outcome
    assert re.search(match, outcome) and outcome.isprintable()


def in_a_process_of_one_second(call):
    """What came of ``call`` in a forked process: its result or error as a text, or "killed"."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL)  # ends the process, also within C
            signal.setitimer(signal.ITIMER_VIRTUAL, 1.0)
            text = repr(call())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    ended = os.waitpid(process, 0)[1]
    return "killed" if os.WIFSIGNALED(ended) else text


def test_an_accountant_that_hangs_is_killed_and_seen(monkeypatch):
    def spin():
        while True:
            pass

    assert in_a_process_of_one_second(spin) == "killed"
    assert in_a_process_of_one_second(lambda: 3) == "3"
    monkeypatch.setattr(GaussianEvent, "__post_init__", lambda self: None)  # a check forgotten
    with pytest.raises(AssertionError):
        refused("noise", lambda: epsilon_rdp([GaussianEvent(math.nan, 0.5, 10)], 1e-5))


def name_of(value):
    return repr(value)[:12]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.0, -0.0, -1.0, 5e-324, 1e-9, 1e9], ids=name_of)
def test_noise_that_is_none_is_refused(value):
    refused("noise_multiplier", GaussianEvent, value, 0.5)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.0, -0.1, 1.5, 5e-324, 1 + 1e-9], ids=name_of)
def test_a_rate_that_is_no_probability_is_refused(value):
    refused("sample_rate", GaussianEvent, 1.0, value)


@pytest.mark.parametrize(
    "value",
    [*NOT_NUMBERS, -1, 1.5, 10**7, 10**5000],
    ids=lambda v: "long" if type(v) is int else name_of(v),
)
def test_a_count_that_is_no_count_is_refused(value):
    refused("count", GaussianEvent, 1.0, 0.5, value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.0, 1.0, -1e-5, 2.0, 5e-324], ids=name_of)
@pytest.mark.parametrize("accountant", [epsilon, epsilon_rdp, epsilon_prv])
def test_a_delta_out_of_range_is_refused(accountant, value):
    refused("delta", accountant, [GaussianEvent(1.0, 0.5)], value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0.0, -1.0], ids=name_of)
def test_a_budget_that_is_none_is_refused(value):
    event = GaussianEvent(1.0, 0.5)
    refused(
        "epsilon", calibrate_noise_multiplier, epsilon=value, delta=1e-5, sample_rate=0.1, steps=10
    )
    refused("epsilon", affordable_steps, event, spent=(), epsilon=value, delta=1e-5)


@pytest.mark.parametrize(
    ("option", "value"), [("sample_rate", math.nan), ("steps", 0), ("steps", 0.5), ("delta", 0.0)]
)
def test_a_calibration_out_of_range_is_refused(option, value):
    good = {"epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.1, "steps": 10}
    refused(option, calibrate_noise_multiplier, **{**good, option: value})


def test_an_unknown_relation_or_event_is_refused():
    refused("relation", epsilon, [GaussianEvent(1.0, 0.5)], 1e-5, relation="gdp")
    refused("expected GaussianEvent", epsilon, [(1.0, 0.5, 1)], 1e-5)


def test_more_releases_than_can_be_counted_are_refused():
    many = [GaussianEvent(1.0, 0.5, 10**6), GaussianEvent(1.0, 0.5, 1)]
    refused("count", epsilon, many, 1e-5)
