"""Batch, steps, noise and draws for a budget and so many draws of records. Not a stage.

The criterion. The noisy mean of a step is a signal of size proportional to B g(K) under noise of
standard deviation sigma in every coordinate. Noises of T steps are independent, so what the steps
tell together grows as

    S = sqrt(T) (B / sigma) g(K)

At a fixed privacy budget sigma is a function of B / N and T, and sqrt(T) B / (sigma N) rises to a
limit: the total noise of Sander, Stock and Sablayrolles (2023), "TAN without a burn", arXiv
2210.03403. In the limit (sigma above about 2) a larger batch buys nothing but fewer steps; below it
every doubling helps. By the central limit theorem for subsampled Gaussians (Bu, Dong, Long and Su
2020, arXiv 1911.11607) the limit is mu, with delta = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu -
mu/2), and the share that is reached is sqrt(ln(1 + u^2)) / u, u = mu N / (B sqrt(T)).

K draws of a record cost K times the computing and no privacy (Dockhorn et al. 2023, arXiv
2210.09929, "noise multiplicity"). A record's clipped gradient has a fixed norm; averaging its draws
leaves more of it to what records have in common: g(K)^2 = (1 + kappa) / (1 + kappa / K), with kappa
the variance of draws over that of everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.stats import norm

KAPPA = 3.0
"""On handwritten digits at epsilon 10, batch 512, 60 steps, K = 4 gave the Frechet distance of K =
1 with a batch of 1,024 (23.2 and 23.1, from 25.0): g(4) is about 1.5, so kappa about 3."""
LEAST_STEPS = 100
"""Fewer steps cannot move far: Adam moves a parameter by at most the learning rate in each."""
_NEAR = 0.98  # of the best signal: among such, fewer draws, then fewer steps
_MOST_DRAWS = 32
_MOST_STEPS = 25_600
_LEAST_BATCH = 64


@dataclass(frozen=True)
class Proposal:
    """batch, steps, draws (K), signal: S / N; share: of what the budget could give at K = 1."""

    batch: int
    steps: int
    draws: int
    signal: float
    share: float

    @property
    def rows(self) -> int:
        """Draws of records over the whole run: what is paid for in GPU-hours."""
        return self.batch * self.steps * self.draws


def limit_of_signal(*, epsilon: float, delta: float) -> float:
    """mu: what sqrt(T) B / (sigma N) can reach within (epsilon, delta)."""

    def excess(mu: float) -> float:
        first = norm.cdf(-epsilon / mu + mu / 2)
        second = math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2))
        return first - second - delta

    return float(brentq(excess, 1e-4, 1e3))


def share_of_signal(rounds: float, limit: float) -> float:
    """sqrt(T) B / (sigma N) over its limit, for ``rounds`` = sqrt(T) B / N."""
    u = limit / rounds
    return math.sqrt(math.log1p(u * u)) / u


def gain_of_draws(draws: int) -> float:
    """g(K)."""
    return math.sqrt((1 + KAPPA) / (1 + KAPPA / draws))


def propose(*, epsilon: float, delta: float, records: int, rows: float) -> list[Proposal]:
    """The best choice within ``rows`` draws of records, then for comparison the best one of each
    smaller batch. Empty if not even the least choice fits.

    The best is the cheapest, then the one of fewest steps, among those that reach 98 % of the
    highest signal. Noise is not calibrated here: ``make_plan`` does that exactly.
    """
    limit = limit_of_signal(epsilon=epsilon, delta=delta)
    found = [p for p in _choices(limit, records) if p.rows <= rows]
    if not found:
        return []
    best = _best(found)
    smaller = sorted({p.batch for p in found if p.batch < best.batch}, reverse=True)[:4]
    return [best, *(_best([p for p in found if p.batch == batch]) for batch in smaller)]


def _best(found: list[Proposal]) -> Proposal:
    highest = max(p.signal for p in found)
    near = [p for p in found if p.signal >= _NEAR * highest]
    return min(near, key=lambda p: (p.rows, p.steps, p.draws))


def _choices(limit: float, records: int) -> Iterator[Proposal]:
    """Batches and draws that are powers of two, steps that double from the least on."""
    batch = _LEAST_BATCH
    while batch <= records:
        steps = LEAST_STEPS
        while steps <= _MOST_STEPS:
            share = share_of_signal(math.sqrt(steps) * batch / records, limit)
            for log_draws in range(int(math.log2(_MOST_DRAWS)) + 1):
                draws = 1 << log_draws
                signal = share * limit * gain_of_draws(draws)
                yield Proposal(batch, steps, draws, signal, share)
            steps *= 2
        batch *= 2
