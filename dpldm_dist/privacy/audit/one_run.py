"""How much privacy loss do guesses prove? Lower bounds on epsilon from one training run.

M canaries are included by independent fair coins. Whoever sees the release guesses some of the
coins: included for the highest scores, left out for the lowest. A private mechanism makes many
correct guesses improbable; so many correct guesses refute it.

Two tests of the same guesses: the one for (epsilon, delta) alone (Steinke, Nasr, Jagielski 2023,
arXiv 2305.08846, Theorem 5.2), and one for the whole trade-off curve of the mechanism, which
refutes more (Mahloujifar, Melis, Chaudhuri 2024, arXiv 2410.22235, Algorithm 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

LEVEL = 0.05  # of a lower bound: it exceeds the truth in at most one audit of twenty
_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the canaries that are guessed
_LARGEST_EPSILON = 50.0
_TOLERANCE = 1e-3  # of an epsilon
_NOISE_TOLERANCE = 1e-2  # of a share of noise, relative


@dataclass(frozen=True)
class Guesses:
    """``correct`` of ``made`` guesses on ``canaries`` fair coins."""

    canaries: int
    made: int
    correct: int


@dataclass(frozen=True)
class TradeOff:
    """Privacy profile of a mechanism: (epsilon_i, delta_i)-DP for each i, in both directions.

    Each pair says that P(S) <= delta + exp(epsilon) Q(S), and that P(S) <= 1 - exp(-epsilon) (1 -
    delta - Q(S)), for all events S and neighbouring laws P and Q.
    """

    epsilons_E: np.ndarray
    deltas_E: np.ndarray

    def least_other(self, probability: float) -> float:
        """Least probability Q(S) of an event with P(S) = ``probability``."""
        growth_E = np.exp(self.epsilons_E)
        steep = (probability - self.deltas_E) / growth_E
        flat = 1 - self.deltas_E - growth_E * (1 - probability)
        return max(0.0, float(steep.max()), float(flat.max()))


def guess(score_M: np.ndarray, included_M: np.ndarray) -> list[Guesses]:
    """What guessing the highest scores in and as many of the lowest out gets right, for several
    numbers of guesses. Ties are broken by position, which is independent of the coins."""
    order = np.argsort(score_M, kind="stable")
    canaries = len(order)
    found = {}
    for share in _SHARES:
        half = int(share * canaries) // 2
        if half:
            lowest, highest = order[:half], order[-half:]
            correct = int((~included_M[lowest]).sum() + included_M[highest].sum())
            found[2 * half] = Guesses(canaries, 2 * half, correct)
    return list(found.values())


def p_value(guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """Probability of at least so many correct guesses under (epsilon, delta)-DP, at most.

    Formal guarantees: an upper bound for every (epsilon, delta)-DP algorithm and every way to guess
    that looks at its output only.
    Source: Steinke et al. (2023), arXiv 2305.08846, Theorem 5.2: with W ~ Binomial(made,
    e^epsilon / (1 + e^epsilon)), P <= P(W >= correct) + 2 M delta max_i P(correct - i <= W <
    correct) / i.
    """
    chance = 1.0 / (1.0 + math.exp(-epsilon))
    beta = float(binom.sf(guesses.correct - 1, guesses.made, chance))
    if guesses.correct == 0 or delta == 0.0:
        return min(1.0, beta)
    below = np.arange(guesses.correct - 1, -1, -1)  # correct - 1, correct - 2, ... 0
    masses = np.cumsum(binom.pmf(below, guesses.made, chance))
    alpha = float((masses / np.arange(1, guesses.correct + 1)).max())
    return min(1.0, beta + 2.0 * guesses.canaries * delta * alpha)


def refutes(guesses: Guesses, least_other: Callable[[float], float], *, level: float) -> bool:
    """Whether at least so many correct guesses have probability below ``level`` under a trade-off.

    ``least_other(p)``: least probability of an event under one hypothesis whose probability is p
    under the other (see TradeOff).

    Formal guarantees: valid for every mechanism within the trade-off, and every way to guess. With
    p_c the probability of c correct of c' guesses among M canaries, changing one coin gives, for
    each j, that an event of probability r_j = sum_(c >= j) c p_c / M has under the other hypothesis
    the probability h_(j-1) = sum_(c >= j-1) (c' - c) p_c / M, by concavity averaged over canaries.
    So h_(j-1) >= least_other(r_j), while r_0 + h_0 = c' / M. If P(at least ``correct``) were
    ``level``, the recursion below would be a lower bound on r_0 + h_0.
    Source: Mahloujifar et al. (2024), arXiv 2410.22235, Theorem 9 and Algorithm 3.
    """
    made, correct = guesses.made, guesses.correct
    most = made / guesses.canaries
    right = level * correct / guesses.canaries
    wrong = level * (made - correct) / guesses.canaries
    for count in range(correct - 1, -1, -1):
        before, wrong = wrong, max(wrong, least_other(right))
        right += count / (made - count) * (wrong - before)
        if right + wrong > most:
            return True
    return False


def epsilon_bound(guesses: Sequence[Guesses], *, delta: float) -> float:
    """Lower bound on epsilon at ``delta``: the best over all numbers of guesses.

    Formal guarantees: above the true epsilon with probability at most ``LEVEL`` (Bonferroni).
    """
    level = LEVEL / max(1, len(guesses))

    def refuted(epsilon: float) -> bool:
        return any(p_value(one, epsilon=epsilon, delta=delta) < level for one in guesses)

    return _largest(refuted, _LARGEST_EPSILON)


def refuted_curve(guesses: Sequence[Guesses], curve: TradeOff) -> bool:
    """Whether any of the ``guesses`` refutes the trade-off, at ``LEVEL`` in all (Bonferroni)."""
    level = LEVEL / max(1, len(guesses))
    return any(refutes(one, curve.least_other, level=level) for one in guesses)


def noise_bound(guesses: Sequence[Guesses], curve_of: Callable[[float], TradeOff]) -> float:
    """How much of the claimed noise there can be at most; infinity if the guesses tell nothing.

    ``curve_of(share)`` is the trade-off of the same mechanism with ``share`` of the noise. More
    noise is more privacy, which is easier to refute: the answer is the least refuted share, to
    1 %. Below 1 it contradicts the claim.
    Formal guarantees: below the true share with probability at most ``LEVEL``.
    """
    low, high = math.log(1 / 64), math.log(64)
    if not refuted_curve(guesses, curve_of(math.exp(high))):
        return math.inf
    while high - low > _NOISE_TOLERANCE:
        middle = (low + high) / 2
        refuted = refuted_curve(guesses, curve_of(math.exp(middle)))
        low, high = (low, middle) if refuted else (middle, high)
    return math.exp(high)


def _largest(refuted: Callable[[float], bool], most: float) -> float:
    """The largest value that is refuted, by bisection; 0 if not even 0 is."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, most
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
