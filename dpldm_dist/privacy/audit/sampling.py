"""Was every record drawn with the stated probability, independently of everything else?

Exact tests on who was drawn when, bool ``drawn_TN``. Each statistic is a whole number, and its law
under independent coins is computed by convolution. Shapes: T steps, N records, S shards of P
places, N = S P, record n at place n mod P of shard n // P.
"""

from __future__ import annotations

import numpy as np
from scipy import fft
from scipy.stats import binom

from dpldm_dist.privacy.audit.reading import Reading, two_sided

_NEGLIGIBLE = 1e-18  # probability of a value that is left out of a law


def selection(drawn_TN: np.ndarray, *, rate: float, places: int) -> list[Reading]:
    """All sampling tests. ``rate`` is the probability that the accountant believes in, in (0, 1);
    ``places`` is the number of records per shard.

    Formal guarantees: under independent coins of probability ``rate`` every p-value is valid (exact
    or by Bonferroni), up to 1e-9 of rounding.
    """
    steps, records = drawn_TN.shape
    per_record_N, per_step_T = drawn_TN.sum(0), drawn_TN.sum(1)
    total = int(drawn_TN.sum())
    return [
        Reading(
            "sampling",
            "records drawn in all",
            total,
            f"{steps * records * rate:.4g}",
            _binomial_p(total, steps * records, rate),
        ),
        _worst_record(per_record_N, steps, rate),
        _dispersion("variance of batch sizes, relative", per_step_T, records, rate),
        _dispersion("variance of draws, relative", per_record_N, steps, rate),
        _worst_pair(drawn_TN, rate),
        _same_place(drawn_TN, rate, places),
        _empty_shards(drawn_TN, rate, places),
        _again(drawn_TN, rate),
    ]


def _worst_record(per_record_N: np.ndarray, steps: int, rate: float) -> Reading:
    p_values = [_binomial_p(int(count), steps, rate) for count in per_record_N]
    worst = int(np.argmin(p_values))
    return Reading(
        "sampling",
        "draws of the least typical record",
        float(per_record_N[worst]),
        f"{steps * rate:.4g}",
        min(1.0, p_values[worst] * len(p_values)),
    )


def _dispersion(name: str, counts_n: np.ndarray, trials: int, rate: float) -> Reading:
    """Sum of (count - centre)^2 over n independent Binomial(trials, rate) counts: too large where
    coins are shared, too small where the size of a batch or the turns of a record are fixed."""
    centre, variance = round(trials * rate), trials * rate * (1 - rate)
    found = int(np.square(counts_n.astype(np.int64) - centre).sum())
    values = np.arange(trials + 1)
    law = np.bincount(np.square(values - centre), weights=binom.pmf(values, trials, rate))
    tails = _tails(_sum_law(law, len(counts_n)), found)
    off_centre = (trials * rate - centre) ** 2
    ratio = found / (len(counts_n) * (variance + off_centre))
    return Reading("sampling", name, ratio, "1", two_sided(*tails))


def _worst_pair(drawn_TN: np.ndarray, rate: float) -> Reading:
    """The two records that were drawn together most often: coins that two workers share."""
    steps, records = drawn_TN.shape
    together_NN = drawn_TN.astype(np.int32).T @ drawn_TN.astype(np.int32)
    pairs = together_NN[np.triu_indices(records, k=1)]
    most = int(pairs.max(initial=0))
    p_value = float(binom.sf(most - 1, steps, rate**2)) * len(pairs)
    name, expected = "most steps that draw one pair", f"{steps * rate**2:.3g} for most"
    return Reading("sampling", name, most, expected, min(1.0, p_value))


def _same_place(drawn_TN: np.ndarray, rate: float, places: int) -> Reading:
    """Pairs of records at the same place of two shards that were drawn in one step: what workers
    with equal seeds draw together."""
    steps, records = drawn_TN.shape
    shards = records // places
    together = drawn_TN.reshape(steps, shards, places).sum(1)
    found = int((together * (together - 1) // 2).sum())
    counts = np.arange(shards + 1)
    law = np.bincount(counts * (counts - 1) // 2, weights=binom.pmf(counts, shards, rate))
    tails = _tails(_sum_law(law, steps * places), found)
    expected = f"{steps * places * shards * (shards - 1) / 2 * rate**2:.4g}"
    name = "pairs of one place drawn together"
    return Reading("sampling", name, found, expected, two_sided(*tails))


def _empty_shards(drawn_TN: np.ndarray, rate: float, places: int) -> Reading:
    """Shards from which a step drew nobody: none where such draws are repeated or left out."""
    steps, records = drawn_TN.shape
    shards = records // places
    found = int((~drawn_TN.reshape(steps, shards, places).any(2)).sum())
    empty = (1 - rate) ** places
    expected, name = f"{steps * shards * empty:.4g}", "shards that drew nobody"
    return Reading("sampling", name, found, expected, _binomial_p(found, steps * shards, empty))


def _again(drawn_TN: np.ndarray, rate: float) -> Reading:
    """Records drawn in two consecutive steps: too many where coins are used again, too few where
    nobody is drawn twice in a row."""
    steps, records = drawn_TN.shape
    found = int((drawn_TN[1:] & drawn_TN[:-1]).sum())
    tails = _tails(_sum_law(_law_of_repeats(steps, rate), records), found)
    expected = f"{(steps - 1) * records * rate**2:.4g}"
    return Reading("sampling", "draws in two steps running", found, expected, two_sided(*tails))


def _law_of_repeats(steps: int, rate: float) -> np.ndarray:
    """Law of the number of successes that follow a success, among ``steps`` coins."""
    last_off, last_on = np.zeros(steps), np.zeros(steps)
    last_off[0], last_on[0] = 1 - rate, rate
    for _ in range(steps - 1):
        both = last_off + last_on
        last_on = rate * (last_off + np.concatenate([[0.0], last_on[:-1]]))
        last_off = (1 - rate) * both
    return last_off + last_on


def _sum_law(law: np.ndarray, count: int) -> np.ndarray:
    """Law of the sum of ``count`` independent numbers of law ``law`` on 0, 1, 2, ..."""
    law = law[: int(np.flatnonzero(law > _NEGLIGIBLE)[-1]) + 1]
    length = (len(law) - 1) * count + 1
    size = fft.next_fast_len(length, real=True)
    return np.clip(fft.irfft(fft.rfft(law, size) ** count, size)[:length], 0.0, None)


def _tails(law: np.ndarray, found: int) -> tuple[float, float]:
    """P(at most ``found``) and P(at least ``found``)."""
    return float(law[: found + 1].sum()), float(law[found:].sum())


def _binomial_p(count: int, trials: int, rate: float) -> float:
    return two_sided(
        float(binom.cdf(count, trials, rate)), float(binom.sf(count - 1, trials, rate))
    )
