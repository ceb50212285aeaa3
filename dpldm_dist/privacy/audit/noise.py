"""Is the noise that reaches the weights Gaussian, of the claimed size, and never used twice?

All functions take noise in units of its claimed standard deviation, so that correct code gives
independent standard normal numbers. Shapes: T steps, N coordinates, K slices of coordinates.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import fft
from scipy.optimize import minimize_scalar
from scipy.stats import chi2, kstwo, norm
from scipy.stats import t as student

from dpldm_dist.privacy.audit.reading import Reading, two_sided

ROUNDING = 1e-3  # share of the variance that float32 weights may add or take away
_MOST_SORTED = 200_000  # numbers whose distribution is compared


def calibration(noise_TN: np.ndarray, *, where: str) -> list[Reading]:
    """Variance, mean, distribution and largest number of noise that carries no signal.

    Formal guarantees: chi-square, normal and Kolmogorov-Smirnov tests and the law of a maximum,
    exact for standard normal numbers, but for an allowance of ``ROUNDING`` in the variance.
    """
    numbers = noise_TN.reshape(-1)
    squares = float(np.square(numbers).sum())
    mean_z = float(numbers.sum()) / math.sqrt(len(numbers))
    chosen = np.sort(numbers[:: max(1, len(numbers) // _MOST_SORTED)])
    distance = _distance_from_normal(chosen)
    return [
        Reading(
            "noise",
            f"variance, {where}",
            squares / len(numbers),
            "1",
            _variance_p(squares, len(numbers), more=0.0),
        ),
        Reading(
            "noise",
            f"mean in its errors, {where}",
            mean_z,
            "0",
            float(2 * norm.sf(abs(mean_z))),
        ),
        Reading(
            "noise",
            f"distance from normal, {where}",
            distance,
            "0",
            float(kstwo.sf(distance, len(chosen))),
        ),
        _largest(float(np.abs(numbers).max()), len(numbers), where),
    ]


def worst_slice(
    squares_TK: np.ndarray, lengths_K: np.ndarray, *, more: float, where: str
) -> Reading:
    """The slice of coordinates in the step whose variance is least like the claimed one.

    ``squares_TK`` are sums of squares of ``lengths_K`` coordinates; up to ``more`` of each sum may
    be signal. Finds noise that a worker forgot, and steps that did not take place. Bonferroni over
    all slices and steps.
    """
    ratios_TK = squares_TK / lengths_K
    p_values_TK = np.array(
        [
            [_variance_p(s, n, more=more) for s, n in zip(row, lengths_K, strict=True)]
            for row in squares_TK
        ]
    )
    worst = np.unravel_index(np.argmin(p_values_TK), p_values_TK.shape)
    return Reading(
        "noise",
        f"variance, worst slice, {where}",
        float(ratios_TK[worst]),
        "1",
        min(1.0, float(p_values_TK[worst]) * p_values_TK.size),
    )


def alike(first_TN: np.ndarray, second_SN: np.ndarray | None = None, *, name: str) -> Reading:
    """The most similar pair of steps: of one run, or of two runs.

    Formal guarantees: the cosine r between a standard normal vector and any other independent
    vector has r sqrt(N - 1) / sqrt(1 - r^2) distributed as Student's t with N - 1 degrees of
    freedom. Bonferroni over all pairs. Finds noise that is used again, whatever the distance.
    """
    others = first_TN if second_SN is None else second_SN
    # a step that has no noise at all is not similar to anything: the variance tests find it
    cosine_TS = _unit_rows(first_TN) @ _unit_rows(others).T
    if second_SN is None:
        cosine_TS = cosine_TS[np.triu_indices(len(first_TN), k=1)]
    if cosine_TS.size == 0:
        return Reading("noise", name, 0.0, "0", 1.0)
    cosine = float(cosine_TS.flat[np.argmax(np.abs(cosine_TS))])
    freedom = first_TN.shape[1] - 1
    statistic = abs(cosine) * math.sqrt(freedom / max(1e-300, 1.0 - min(1.0, cosine**2)))
    p_value = 2 * float(student.sf(statistic, freedom)) * cosine_TS.size
    return Reading("noise", name, cosine, "0", min(1.0, p_value))


def repeated_within(noise_N: np.ndarray, *, name: str) -> Reading:
    """The shift by which the noise of a step is most like itself, over all shifts up to 3 N / 4.

    Finds keystreams that two slices, blocks or workers share. Bonferroni over shifts.

    Formal guarantees: with n = N - k pairs, sum_j z_j z_(j+k) is a quadratic form on paths whose
    moment generating function is at most ((1 + sqrt(1 - 4 s^2)) / 2)^(-n/2), because the
    determinants D_L = D_(L-1) - s^2 D_(L-2) of a path shrink by at least that factor per edge. The
    p-value is Chernoff's bound from it.
    """
    count = len(noise_N)
    spectrum = fft.rfft(noise_N, fft.next_fast_len(2 * count, real=True))
    products = fft.irfft(np.abs(spectrum) ** 2)[1 : max(2, 3 * count // 4 + 1)]
    pairs = count - np.arange(1, len(products) + 1)
    worst = int(np.argmax(np.abs(products) / np.sqrt(pairs)))
    similarity = float(products[worst]) / float(pairs[worst])
    log_p = math.log(2 * len(products)) + _log_tail(abs(similarity), int(pairs[worst]))
    return Reading("noise", name, similarity, "0", math.exp(min(0.0, log_p)))


def _largest(found: float, count: int, where: str) -> Reading:
    """The tail: noise that is cut off has no large numbers, noise on noise has too large ones."""
    log_below = count * math.log1p(-2 * norm.sf(found)) if found > 0 else -math.inf
    typical = float(norm.isf(0.5 / count))
    p_value = two_sided(math.exp(log_below), -math.expm1(log_below))
    return Reading("noise", f"largest number, {where}", found, f"about {typical:.2g}", p_value)


def _variance_p(squares: float, count: int, *, more: float) -> float:
    """Two-sided, for a variance within ``ROUNDING`` of 1 and a signal of energy up to ``more``.

    A fixed signal of energy ``more`` beside the noise can only move the sum up by that and by twice
    its product with the noise, of standard deviation sqrt(more): six of them are allowed.
    """
    low = chi2.cdf(squares / (1 - ROUNDING), count)
    slack = more + (12 * math.sqrt(more) if more else 0.0)
    high = chi2.sf(max(0.0, squares - slack) / (1 + ROUNDING), count)
    return two_sided(float(low), float(high))


def _distance_from_normal(ordered: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of sorted numbers."""
    count, levels = len(ordered), norm.cdf(ordered)
    steps = np.arange(count + 1) / count
    return float(max((steps[1:] - levels).max(), (levels - steps[:-1]).max()))


def _unit_rows(rows_TN: np.ndarray) -> np.ndarray:
    length_T1 = np.linalg.norm(rows_TN, axis=1, keepdims=True)
    return rows_TN / np.where(length_T1 > 0, length_T1, 1.0)


def _log_tail(mean: float, pairs: int) -> float:
    """Logarithm of Chernoff's bound on P(mean of the products of ``pairs`` pairs >= ``mean``)."""

    def exponent(s: float) -> float:
        return pairs * (-0.5 * math.log((1 + math.sqrt(1 - 4 * s * s)) / 2) - s * mean)

    found = minimize_scalar(exponent, bounds=(0.0, 0.5), method="bounded")
    return min(0.0, float(found.fun))
