"""Instruments of an audit: exact where they say so, valid on correct data, awake to wrong data."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import binom, norm

from dpldm_dist.privacy.accounting import GaussianEvent, delta_curve, epsilon
from dpldm_dist.privacy.audit import contribution, noise, one_run, sampling
from dpldm_dist.privacy.audit.one_run import Guesses, TradeOff
from dpldm_dist.privacy.sampling import PoissonSampling, dyadic_rate

CURVE = np.linspace(0.0, 12.0, 97)


def failures(readings):
    return {reading.name for reading in readings if not reading.passed}


def too_many_below(p_values, level):
    """Whether valid p-values could hardly be below ``level`` so often: one in a million."""
    below = int((np.array(p_values) <= level).sum())
    return binom.sf(below - 1, len(p_values), level) < 1e-6


# --- guesses on canaries --------------------------------------------------------------------------


def most_probable(guesses: Guesses, curve: TradeOff) -> float:
    """Largest P(at least so many correct) under the constraints of a trade-off: a linear program.

    Unknown: p_c for c correct guesses. For each tail, the mass of correct guesses within it is
    bounded by that of wrong guesses in the tail that begins one earlier.
    """
    made, canaries = guesses.made, guesses.canaries
    c = np.arange(made + 1)
    rows, limits = [], []
    for start in range(1, made + 1):
        right = np.where(c >= start, c / canaries, 0.0)
        wrong = np.where(c >= start - 1, (made - c) / canaries, 0.0)
        for eps, delta in zip(curve.epsilons_E, curve.deltas_E, strict=True):
            rows += [right - math.exp(eps) * wrong, right - math.exp(-eps) * wrong]
            limits += [delta, 1 - math.exp(-eps) * (1 - delta)]
    found = linprog(
        -(c >= guesses.correct).astype(float),
        A_ub=np.array(rows), b_ub=limits,
        A_eq=np.ones((1, made + 1)), b_eq=[1.0], bounds=(0, 1),
    )  # fmt: skip
    return -found.fun


@pytest.mark.parametrize(
    ("canaries", "made", "correct"), [(10, 10, 8), (20, 10, 10), (40, 40, 32), (30, 6, 6)]
)
@pytest.mark.parametrize(
    "curve",
    [
        TradeOff(np.array([0.5]), np.array([0.01])),
        TradeOff(np.array([1.0]), np.array([0.0])),
        TradeOff(np.array([0.0, 0.5, 1.0, 2.0]), np.array([0.3, 0.1, 0.02, 0.001])),
    ],
)
def test_the_recursion_over_counts_solves_the_linear_program_of_its_theorem(
    canaries, made, correct, curve
):
    guesses = Guesses(canaries, made, correct)
    most = most_probable(guesses, curve)
    assert one_run.refutes(guesses, curve.least_other, level=most * 1.0001) or most > 0.999
    assert not one_run.refutes(guesses, curve.least_other, level=most * 0.9999)


@pytest.mark.parametrize("eps", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.05])
def test_no_count_of_correct_guesses_on_a_leaking_mechanism_is_rarer_than_its_p_value(eps, delta):
    """Each coin is told with probability delta, else flipped with probability 1 / (1 + e^eps): that
    is (eps, delta)-DP, and the number of correct guesses is binomial."""
    canaries = 60
    chance = delta + (1 - delta) / (1 + math.exp(-eps))
    for correct in range(canaries + 1):
        truth = binom.sf(correct - 1, canaries, chance)
        bound = one_run.p_value(Guesses(canaries, canaries, correct), epsilon=eps, delta=delta)
        assert bound >= truth * (1 - 1e-9)
        if delta == 0:
            assert math.isclose(bound, truth, rel_tol=1e-9)


def test_a_lower_bound_exceeds_the_true_epsilon_in_at_most_one_audit_of_twenty():
    generator, true, audits = np.random.default_rng(0), 1.0, 300
    above = 0
    for _ in range(audits):
        included = generator.random(400) < 0.5
        told = generator.random(400) < 1 / (1 + math.exp(-true))
        guesses = one_run.guess(np.where(told, included, ~included).astype(float), included)
        above += one_run.epsilon_bound(guesses, delta=0.0) > true
    assert binom.sf(above - 1, audits, one_run.LEVEL) > 1e-6


def test_guesses_are_made_on_the_extreme_scores_of_both_ends():
    score = np.arange(64.0)
    included = score >= 32
    assert all(one.correct == one.made for one in one_run.guess(score, included))
    assert all(one.correct == 0 for one in one_run.guess(-score, included))
    assert [one.made for one in one_run.guess(score, included)] == [2, 4, 8, 16, 32, 64]


def test_a_trade_off_from_the_accountant_lies_just_below_that_of_the_gaussian():
    deltas = delta_curve([GaussianEvent(1.5, 1.0)], CURVE, delta=1e-5)
    curve = TradeOff(CURVE, np.array(deltas))
    for probability in (1e-4, 0.01, 0.2, 0.5, 0.9, 0.999):
        exact = norm.cdf(norm.ppf(probability) - 1 / 1.5)
        assert exact * 0.99 - 1e-5 <= curve.least_other(probability) <= exact + 1e-9


def test_the_delta_curve_is_the_inverse_of_epsilon():
    events = [GaussianEvent(2.0, 0.25, 24)]
    for delta in (1e-3, 1e-5):
        (found,) = delta_curve(events, [epsilon(events, delta)], delta=1e-5)
        assert math.isclose(found, delta, rel_tol=0.01)


@pytest.mark.parametrize(
    ("share", "proves"), [(1.0, False), (0.5, False), (0.25, True), (0.0, True)]
)
def test_what_a_thousand_canaries_prove_about_too_little_noise(share, proves):
    """Power at the default operating point. Correct code stays far below its claim, half the noise
    is not proved wrong by guesses (the variance is), a quarter and none are."""
    generator, steps, rate, sigma = np.random.default_rng(1), 24, 0.25, 2.0276
    claim = epsilon([GaussianEvent(sigma, rate, steps)], 1e-5)
    included = generator.random(1000) < 0.5
    draws = generator.binomial(steps, rate, 1000) * included
    score = draws + generator.normal(0, 1, 1000) * sigma * share * math.sqrt(steps)
    guesses = one_run.guess(score, included)

    def curve(part):
        events = [GaussianEvent(sigma * part, rate, steps)]
        return TradeOff(CURVE, np.array(delta_curve(events, CURVE, delta=1e-5)))

    assert one_run.refuted_curve(guesses, curve(1.0)) is proves
    assert (one_run.noise_bound(guesses, curve) < 1) is proves
    plain = one_run.epsilon_bound(guesses, delta=1e-5)
    assert (plain > claim) is (share == 0.0)
    if share == 1.0:
        assert plain < 0.5 * claim


# --- noise ----------------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def all_noise_readings(noise_TN: np.ndarray) -> list:
    squares_TK = np.square(noise_TN).reshape(len(noise_TN), 8, -1).sum(2)
    lengths_K = np.full(8, noise_TN.shape[1] // 8)
    return [
        *noise.calibration(noise_TN, where="here"),
        noise.worst_slice(squares_TK, lengths_K, more=0.0, where="here"),
        noise.alike(noise_TN, name="alike"),
        noise.alike(noise_TN[:3], noise_TN[3:], name="restart"),
        noise.repeated_within(noise_TN[0], name="repeated"),
    ]


def test_p_values_of_noise_readings_are_valid_on_normal_numbers():
    found = [all_noise_readings(normal(seed, 8, 320)) for seed in range(250)]
    for reading in zip(*found, strict=True):
        for level in (0.5, 0.05, 0.01):
            assert not too_many_below([r.p_value for r in reading], level), reading[0].name


def forget_a_slice(z):
    z[2, 400:800] = 0
    return z


def skip_a_step(z):
    z[5] = 0
    return z


def use_a_step_again(z):
    z[7] = z[1]
    return z


def share_a_stream(z):
    z[:, 1600:] = z[:, :1600]
    return z


WRONG_NOISE = {
    "missing": lambda z: 0 * z,
    "5 % too little": lambda z: 0.95 * z,
    "5 % too much": lambda z: 1.05 * z,
    "twice as much": lambda z: 2 * z,
    "shifted": lambda z: z + 0.04,
    "uniform of the same variance": lambda z: math.sqrt(12) * (norm.cdf(z) - 0.5),
    "cut off at two deviations": lambda z: np.clip(z, -2, 2) / 0.9594,
    "the same in every step": lambda z: np.tile(z[:1], (8, 1)),
    "the opposite in the next step": lambda z: np.concatenate([z[:4], -z[:4]]),
    "every number twice": lambda z: np.repeat(z[:, ::2], 2, axis=1),
    "forgotten in a slice of a step": forget_a_slice,
    "no step where nobody was drawn": skip_a_step,
    "used again six steps later": use_a_step_again,
    "one stream for two slices": share_a_stream,
}


@pytest.mark.parametrize("wrong", WRONG_NOISE)
def test_wrong_noise_is_seen(wrong):
    assert not failures(all_noise_readings(normal(7, 8, 3200)))
    assert failures(all_noise_readings(WRONG_NOISE[wrong](normal(7, 8, 3200)))), wrong


def test_a_signal_of_known_energy_is_not_taken_for_noise():
    squares, lengths = np.array([[1000.0 + 90.0]]), np.array([1000])
    assert noise.worst_slice(squares * 2, lengths * 2, more=0.0, where="").passed
    loud = np.array([[1000.0 + 500.0]])
    assert not noise.worst_slice(loud, lengths, more=0.0, where="").passed
    assert noise.worst_slice(loud, lengths, more=500.0, where="").passed


# --- sampling -------------------------------------------------------------------------------------


def watched(drawn, rate=0.125, places=8):
    return sampling.selection(drawn, rate=rate, places=places)


def test_the_law_of_repeats_is_that_of_all_sequences_of_coins():
    steps, rate = 9, 0.3
    counted = np.zeros(steps)
    for coins in product((0, 1), repeat=steps):
        repeats = sum(a & b for a, b in pairwise(coins))
        counted[repeats] += rate ** sum(coins) * (1 - rate) ** (steps - sum(coins))
    assert np.allclose(sampling._law_of_repeats(steps, rate), counted, atol=1e-15)


def test_the_law_of_a_sum_is_the_convolution():
    law = np.array([0.5, 0.2, 0.0, 0.3])
    direct = np.convolve(np.convolve(law, law), law)
    assert np.allclose(sampling._sum_law(law, 3), direct, atol=1e-15)


def test_p_values_of_sampling_readings_are_valid_on_independent_coins():
    rate = 0.125
    found = [
        watched(np.random.default_rng(seed).random((48, 32)) < rate, rate) for seed in range(250)
    ]
    for reading in zip(*found, strict=True):
        for level in (0.5, 0.05, 0.01):
            assert not too_many_below([r.p_value for r in reading], level), reading[0].name


def test_the_coins_of_poisson_sampling_pass():
    rate = dyadic_rate(1 / 8)
    coins = PoissonSampling(bytes(range(32)), attempt=1, sample_rate=rate)
    drawn = np.zeros((128, 64), bool)
    for step, shard in product(range(128), range(4)):
        drawn[step, 16 * shard + coins.select(step, shard, 16)] = True
    assert not failures(watched(drawn, rate, places=16))


def turns(steps, records, size):
    """Everybody in turn, in a new order each round, ``size`` a step."""
    generator = np.random.default_rng(3)
    order = np.concatenate([generator.permutation(records) for _ in range(steps)])
    drawn = np.zeros((steps, records), bool)
    for step in range(steps):
        drawn[step, order[step * size : (step + 1) * size]] = True
    return drawn


def fixed_size(steps, records, size):
    generator = np.random.default_rng(4)
    return np.array(
        [np.isin(np.arange(records), generator.permutation(records)[:size]) for _ in range(steps)]
    )


def coins(rate, steps=128, records=32):
    return np.random.default_rng(5).random((steps, records)) < rate


WRONG_DRAWS = {
    "twice the rate": lambda: coins(0.25),
    "two workers share their coins": lambda: np.tile(coins(0.125, records=16), (1, 2)),
    "batches of a fixed size": lambda: fixed_size(128, 32, 4),
    "everybody in turn": lambda: turns(128, 32, 4),
    "the same batch in every step": lambda: np.tile(coins(0.125, steps=1), (128, 1)),
    "the same batch twice": lambda: np.repeat(coins(0.125, steps=64), 2, axis=0),
    "a lane that nobody draws from": lambda: coins(0.125) & (np.arange(32) < 24),
    "at least one of every shard": lambda: (
        coins(0.125) | (~coins(0.125).reshape(128, 4, 8).any(2)).repeat(8, 1) & turns(128, 32, 16)
    ),
    "one record more often": lambda: coins(0.125) | (np.arange(32) == 5) & (coins(0.4)),
}


@pytest.mark.parametrize("wrong", WRONG_DRAWS)
def test_wrong_draws_are_seen(wrong):
    assert not failures(watched(coins(0.125)))
    assert failures(watched(WRONG_DRAWS[wrong]())), wrong


# --- contributions --------------------------------------------------------------------------------


def test_contributions_must_lie_between_what_clipping_leaves_and_the_clip_norm():
    right = np.array([0.95, 0.97, 0.99])
    bounds = {"least": 0.9, "most": 0.995, "where": "here"}
    assert not failures(contribution.contributions(right, **bounds))
    for wrong in (1.5 * right, right / 2, np.append(right, 1.9), np.append(right, 0.0), right[:0]):
        assert failures(contribution.contributions(wrong, **bounds))


def test_what_lies_outside_of_own_rows_is_bounded_by_what_these_leave_of_the_clip_norm():
    own = np.full(100, 0.6)
    assert contribution.remainder(79.9, own, most=1.0).passed
    assert not contribution.remainder(80.1, own, most=1.0).passed


def test_the_scale_of_the_signal_is_tested_with_the_variance_of_coins_and_noise():
    generator, rate, steps, sigma = np.random.default_rng(0), 0.25, 24, 2.0

    def scores(factor):
        draws = generator.binomial(steps, rate, 500)
        return factor * draws + generator.normal(0, sigma * math.sqrt(steps), 500)

    read = [
        contribution.scale(scores(1.0), rate=rate, steps=steps, noise_std=sigma) for _ in range(300)
    ]
    assert not too_many_below([reading.p_value for reading in read], 0.05)
    for factor in (0.5, 2.0, 0.0):
        assert not contribution.scale(
            scores(factor), rate=rate, steps=steps, noise_std=sigma
        ).passed
