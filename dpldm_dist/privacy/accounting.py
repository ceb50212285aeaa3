"""What Gaussian releases cost: epsilon at a given delta, and the noise that meets a budget.

The number of record is the privacy loss distribution (PLD) of dp-accounting, pessimistic, so that
every printed epsilon is an upper bound. Two independent accountants stand beside it: Renyi (RDP)
and Opacus' PRV. The central-limit (GDP) accountant is not offered: it reports too little.

Sources: Doroshenko et al. (2022), arXiv 2207.04380 (PLD, "connect the dots"); Mironov et al.
(2019), arXiv 1908.10530 (RDP); Gopi et al. (2021), arXiv 2106.02848 (PRV).
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Literal

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import rdp_privacy_accountant as rdp
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp

from dpldm_dist.errors import PrivacyError

Relation = Literal["add_or_remove_one", "replace_one"]

LARGEST_NOISE_MULTIPLIER = 1e4  # no calibration looks further
SMALLEST_NOISE_MULTIPLIER = 0.1  # nor below: no budget in use would allow it
LARGEST_COUNT = 1_000_000
# Beyond these the numbers mean nothing, and the accountants divide by zero or never end.
LEAST_ACCOUNTED_NOISE, LARGEST_ACCOUNTED_NOISE = 1e-6, 1e6
LEAST_SAMPLE_RATE = 2.0**-40  # coins know no smaller one
LEAST_DELTA = 1e-30
LARGEST_EPSILON = 5_000.0  # above, no accountant is asked: the answer is infinity
_DECIMALS = 4  # of a calibrated noise multiplier
# A calibration aims this share below its target. The pessimism left in an epsilon is smaller (see
# `epsilon`), so no shorter run of the same noise can come out above the target by it.
_MARGIN = 1e-4
_RESIDUAL = 2e-5  # pessimism aimed at, as a share of epsilon
_SMALL_EPSILON = 0.02  # below it, the shares meant here are shares of this
_CONVERGED = 0.005  # largest change of epsilon by a grid ten times finer, as a share of it
_WIDEST_INTERVAL, _NARROWEST_INTERVAL = 1e-2, 1e-5  # of the grid of privacy losses
_MOST_POINTS = 2_000_000
# Orders of RDP where it only guides.
_FEW_ORDERS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 1024)
_PRV_LARGEST_EPSILON = 60.0  # above about 100 its grid exhausts the memory
_PRV_MOST_POINTS = 4_000_000
_RELATIONS = {
    "add_or_remove_one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}


@dataclass(frozen=True)
class GaussianEvent:
    """``count`` releases of a sum of vectors of norm at most C, plus Gaussian noise.

    noise_multiplier: standard deviation of the noise over C. sample_rate: probability with which
    each record takes part, independently of all others (Poisson); 1.0: all take part.
    Raises: PrivacyError unless noise_multiplier is positive and from LEAST_ACCOUNTED_NOISE to
    LARGEST_ACCOUNTED_NOISE, 0 < sample_rate <= 1 and not below LEAST_SAMPLE_RATE, and count is a
    whole number from 0 to LARGEST_COUNT.
    """

    noise_multiplier: float
    sample_rate: float
    count: int = 1

    def __post_init__(self) -> None:
        sigma = _finite("noise_multiplier", self.noise_multiplier)
        rate = _finite("sample_rate", self.sample_rate)
        if not sigma > 0:
            raise PrivacyError(f"noise_multiplier = {sigma}: expected more than 0.")
        if not LEAST_ACCOUNTED_NOISE <= sigma <= LARGEST_ACCOUNTED_NOISE:
            raise PrivacyError(
                f"noise_multiplier = {sigma}: expected from {LEAST_ACCOUNTED_NOISE} to "
                f"{LARGEST_ACCOUNTED_NOISE:g}."
            )
        if not 0 < rate <= 1:
            raise PrivacyError(f"sample_rate = {rate}: expected in (0, 1].")
        if rate < LEAST_SAMPLE_RATE:
            raise PrivacyError(f"sample_rate = {rate}: expected at least {LEAST_SAMPLE_RATE:g}.")
        object.__setattr__(self, "noise_multiplier", sigma)
        object.__setattr__(self, "sample_rate", rate)
        object.__setattr__(self, "count", _whole("count", self.count))


def epsilon(
    events: Sequence[GaussianEvent], delta: float, *, relation: Relation = "add_or_remove_one"
) -> float:
    """Epsilon at ``delta`` of all ``events`` together; a release may depend on those before it.

    ``relation``: neighbouring data sets differ by one record more or less, or ("replace_one") by
    the content of one record. The second has its own dominating pair, the subsampled Gaussian at +C
    against the one at -C; it is never derived from the first number.

    Formal guarantees: an upper bound. Privacy losses are rounded pessimistically to a grid whose
    interval is predicted so that the excess is about 2e-5 of epsilon, and is narrowed tenfold (down
    to 1e-5) while that changes epsilon by more than 0.5 % and 1e-4; the excess shrinks with the
    square of the interval. Infinity where RDP already exceeds LARGEST_EPSILON, and where the number
    cannot be computed. 0.0 for no events.
    Raises: PrivacyError on input out of range, before any computation.
    """
    _check(events, delta, relation)
    groups = _grouped(events)
    if not groups:
        return 0.0
    rough = _rdp_epsilon(groups, delta, orders=_FEW_ORDERS)
    if rough > LARGEST_EPSILON:
        return math.inf
    interval = _loss_interval(groups, delta, rough)
    found = _pld_epsilon(groups, delta, relation, 10 * interval)
    while True:
        wider, found = found, min(found, _pld_epsilon(groups, delta, relation, interval))
        converged = wider - found <= _CONVERGED * max(found, _SMALL_EPSILON)  # False for infinities
        interval /= 10
        if converged or interval < _narrowest(groups):
            return found


def delta_curve(
    events: Sequence[GaussianEvent], epsilons: Sequence[float], *, delta: float
) -> list[float]:
    """Delta of all ``events`` together at each of ``epsilons``, adding or removing one record.

    Formal guarantees: upper bounds, as in :func:`epsilon`, on a grid as fine as that for ``delta``.
    Raises: PrivacyError on input out of range.
    """
    _check(events, delta, "add_or_remove_one")
    for number in epsilons:
        _finite("epsilon", number)
    groups = _grouped(events)
    if not groups:
        return [0.0 for _ in epsilons]
    rough = _rdp_epsilon(groups, delta, orders=_FEW_ORDERS)
    interval = _loss_interval(groups, delta, min(rough, LARGEST_EPSILON))
    total = _composition(groups, "add_or_remove_one", interval)
    return [float(d) for d in total.get_delta_for_epsilon(list(epsilons))]


def epsilon_rdp(events: Sequence[GaussianEvent], delta: float) -> float:
    """Cross-check: epsilon by Renyi DP, add or remove one record. 5 to 20 % above PLD.

    Raises: PrivacyError on input out of range.
    """
    _check(events, delta, "add_or_remove_one")
    groups = _grouped(events)
    return _rdp_epsilon(groups, delta) if groups else 0.0


def epsilon_prv(events: Sequence[GaussianEvent], delta: float) -> float:
    """Cross-check: epsilon by Opacus' PRV accountant (its upper bound), add or remove one record.

    Infinity where its grid would be too large to compute, which is an upper bound too.
    Raises: PrivacyError on input out of range.
    """
    _check(events, delta, "add_or_remove_one")
    groups = _grouped(events)
    if not groups:
        return 0.0
    rough = _rdp_epsilon(groups, delta)
    if rough > _PRV_LARGEST_EPSILON:
        return math.inf
    eps_error = min(0.01, max(1e-3, 0.002 * rough))
    total = sum(event.count for event in groups)
    mesh = eps_error / math.sqrt(total * math.log(12e3 / delta) / 2)
    width = 2 * (max(rough, _rdp_epsilon(groups, delta / 8e3 / total)) + 3)
    if width / mesh > _PRV_MOST_POINTS:
        return math.inf
    from opacus.accountants import PRVAccountant  # here: it loads torch, which nothing else needs

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sample_rate, e.count) for e in groups]
    with _quiet():
        try:
            return max(0.0, float(accountant.get_epsilon(delta, eps_error=eps_error)))
        except (ArithmeticError, ValueError, RuntimeError, MemoryError):
            return math.inf


def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    others: Sequence[GaussianEvent] = (),
) -> float:
    """Smallest noise multiplier, to 4 decimals rounded up, for ``steps`` steps beside ``others``.

    Formal guarantees: ``steps`` steps of it and ``others`` together cost at most ``epsilon`` at
    ``delta`` by :func:`epsilon`. RDP brackets it, PLD narrows it down and checks the result.
    Raises: PrivacyError if ``others`` alone cost too much, or no noise multiplier up to
    LARGEST_NOISE_MULTIPLIER is enough.
    """
    target = _budget(epsilon)
    _check(others, delta, "add_or_remove_one")
    if _whole("steps", steps) < 1:
        raise PrivacyError(f"steps = {steps}: expected at least 1.")

    def events(sigma: float) -> list[GaussianEvent]:
        return [GaussianEvent(sigma, sample_rate, steps), *others]

    def log_excess(log_sigma: float) -> float:
        cost = min(_epsilon(events(math.exp(log_sigma)), delta), LARGEST_EPSILON)
        return math.log(max(cost, 1e-12) / (target * (1 - _MARGIN)))

    low, high = _bracket(log_excess, events, target, delta)
    sigma = (
        low
        if low == high
        else math.exp(brentq(log_excess, math.log(low), math.log(high), xtol=1e-5))
    )
    sigma = math.ceil(sigma * 10**_DECIMALS) / 10**_DECIMALS
    while _epsilon(events(sigma), delta) > target * (1 - _MARGIN):
        sigma = math.ceil(sigma * (1 + 1e-5) * 10**_DECIMALS) / 10**_DECIMALS
    return sigma


def affordable_steps(
    event: GaussianEvent,
    *,
    spent: Sequence[GaussianEvent],
    epsilon: float,
    delta: float,
    most: int = LARGEST_COUNT,
) -> int:
    """How many more releases of ``event``, its count aside, the budget pays for after ``spent``.

    most: no larger answer is of use; where it is the answer, it comes after one composition.

    Formal guarantees: that many together with ``spent`` cost at most ``epsilon`` by
    :func:`epsilon`, and one more costs more, unless the answer is ``most``.
    Raises: PrivacyError on input out of range.
    """
    target = _budget(epsilon)
    _check([event, *spent], delta, "add_or_remove_one")

    def affords(count: int) -> bool:
        return _epsilon([*spent, replace(event, count=count)], delta) <= target

    countable = LARGEST_COUNT - sum(e.count for e in spent if _same_kind(e, event))
    if _whole("most", most) < countable and affords(most):
        return most
    if not affords(0) or not affords(1):
        return 0
    most = min(most, countable)
    low, high = 1, 2  # low is affordable; high is not, once the loop is left
    while high < most and affords(high):
        low, high = high, 2 * high
    if high >= most:
        if affords(most):
            return most
        high = most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if affords(middle) else (low, middle)
    return low


def epsilon_curve(
    event: GaussianEvent, *, others: Sequence[GaussianEvent], delta: float, steps: Sequence[int]
) -> list[float]:
    """Epsilon of ``others`` and ``n`` releases of ``event``, for each n of ``steps``."""
    return [epsilon([replace(event, count=n), *others], delta) for n in steps]


def renyi_divergence(events: Sequence[GaussianEvent], order: int) -> float:
    """Renyi divergence of whole ``order`` that ``events`` together cost, adding or removing one.

    For one release, with sample rate q and noise multiplier s, it is
    log(sum_k C(order, k) (1 - q)^(order - k) q^k exp(k (k - 1) / (2 s^2))) / (order - 1); those of
    several releases add up, whatever each learns from those before it. Rounded up by a bound on the
    errors of the sum.
    Raises: PrivacyError on input out of range.
    Source: Mironov et al. (2019), arXiv 1908.10530, sections 3.2 and 3.3.
    """
    _check(events, 0.5, "add_or_remove_one")
    _check_order(order)
    return math.fsum(
        event.count * _renyi_of_one(event.noise_multiplier, event.sample_rate, order)
        for event in events
    )


def renyi_budget(order: int, *, epsilon: float, delta: float) -> float:
    """The largest Renyi divergence of ``order`` that is (epsilon, delta)-DP; may be negative.

    Raises: PrivacyError on input out of range.
    Source: Canonne, Kamath and Steinke (2020), arXiv 2004.00010, proposition 12.
    """
    _check((), delta, "add_or_remove_one")
    _check_order(order)
    return _budget(epsilon) - math.log1p(-1 / order) + math.log(order * delta) / (order - 1)


_epsilon = epsilon  # under this name where a budget is called epsilon


def _bracket(
    log_excess: Callable[[float], float],
    events: Callable[[float], list[GaussianEvent]],
    target: float,
    delta: float,
) -> tuple[float, float]:
    """Noise multipliers on either side of the one sought; the same one twice if that is enough."""
    smallest, largest = SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER
    others = events(largest)[1:]
    if others and _epsilon(others, delta) > target * (1 - _MARGIN):
        raise PrivacyError(
            f"epsilon = {target} at delta = {delta:.3g} is used up by the releases beside the "
            "steps: give them more noise, or raise the budget."
        )
    if log_excess(math.log(smallest)) <= 0:
        return smallest, smallest
    high = smallest
    while (
        high < largest and _rdp_epsilon(_grouped(events(high)), delta, orders=_FEW_ORDERS) > target
    ):
        high = min(2 * high, largest)
    while log_excess(math.log(high)) > 0:  # next to never: RDP lies above PLD
        if high == largest:
            raise PrivacyError(
                f"epsilon = {target} at delta = {delta:.3g} cannot be met with a noise multiplier "
                f"of at most {largest:g}: take fewer steps, a smaller sample rate, or more budget."
            )
        high = min(2 * high, largest)
    low = high / 2
    while log_excess(math.log(low)) <= 0:
        low, high = low / 2, low
    return low, high


@lru_cache(maxsize=1024)
def _renyi_of_one(sigma: float, rate: float, order: int) -> float:
    if rate == 1.0:
        return order / (2 * sigma**2)
    k = np.arange(order + 1)
    parts = np.stack(
        [
            np.full(order + 1, gammaln(order + 1)),
            -gammaln(k + 1),
            -gammaln(order - k + 1),
            (order - k) * math.log1p(-rate),
            k * math.log(rate),
            k * (k - 1) / (2 * sigma**2),  # log of the k-th moment of the likelihood ratio
        ]
    )
    log_terms = parts.sum(0)
    log_sum = float(logsumexp(log_terms))
    sizes = np.abs(parts).sum(0) + abs(log_sum)
    rounding = 8 * np.finfo(float).eps * float(np.exp(log_terms - log_sum) @ sizes)  # upwards
    return (max(0.0, log_sum) + rounding) / (order - 1)


def _grouped(events: Sequence[GaussianEvent]) -> tuple[GaussianEvent, ...]:
    """One event per distinct (noise multiplier, sample rate), in order, none of count 0."""
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        kind = (event.noise_multiplier, event.sample_rate)
        counts[kind] = counts.get(kind, 0) + event.count
    groups = (GaussianEvent(*kind, count=_whole("count", n)) for kind, n in counts.items())
    return tuple(event for event in groups if event.count)


def _pld_epsilon(
    groups: Sequence[GaussianEvent], delta: float, relation: str, interval: float
) -> float:
    try:
        return float(_composition(groups, relation, interval).get_epsilon_for_delta(delta))
    except (ArithmeticError, ValueError, MemoryError):
        return math.inf


def _composition(
    groups: Sequence[GaussianEvent], relation: str, interval: float
) -> pld.PrivacyLossDistribution:
    total = None
    for event in groups:
        part = _composed_loss(event, relation, interval)
        total = part if total is None else total.compose(part)
    return total


def _composed_loss(
    event: GaussianEvent, relation: str, interval: float
) -> pld.PrivacyLossDistribution:
    if event.sample_rate == 1.0:  # n Gaussians are one with its noise divided by sqrt(n)
        return _loss(event.noise_multiplier / math.sqrt(event.count), 1.0, relation, interval)
    single = _loss(event.noise_multiplier, event.sample_rate, relation, interval)
    return single.self_compose(event.count)


@lru_cache(maxsize=4)  # megabytes each
def _loss(sigma: float, rate: float, relation: str, interval: float) -> pld.PrivacyLossDistribution:
    return pld.from_gaussian_mechanism(
        sigma,
        sampling_prob=rate,
        value_discretization_interval=interval,
        neighboring_relation=_RELATIONS[relation],
    )


def _loss_interval(groups: Sequence[GaussianEvent], delta: float, rough: float) -> float:
    """Grid on which rounding should add about ``_RESIDUAL`` of epsilon; 1, 2 or 5 times 10^k.

    "Connect the dots" adds a variance of about interval^2 / 6 per release. For a total loss close
    to Gaussian with deviation s, epsilon = s^2 / 2 + z s, so a variance v adds v (1/2 + z / 2s).
    """
    z = math.sqrt(2 * math.log(1 / delta))
    wanted = max(rough, _SMALL_EPSILON)
    deviation = math.sqrt(z * z + 2 * wanted) - z
    releases = sum(1 if event.sample_rate == 1.0 else event.count for event in groups)
    per_variance = 0.5 + z / (2 * deviation)
    interval = math.sqrt(6 * _RESIDUAL * wanted / (releases * per_variance))
    interval = max(min(interval, _WIDEST_INTERVAL), _narrowest(groups))
    power = 10.0 ** math.floor(math.log10(interval))
    return max(step * power for step in (1, 2, 5) if step * power <= interval * (1 + 1e-9))


def _narrowest(groups: Sequence[GaussianEvent]) -> float:
    """Finest interval in use: grids of more than about ``_MOST_POINTS`` points take too long."""
    widest = max(2 / e.noise_multiplier**2 + 20 / e.noise_multiplier for e in groups)
    return max(_NARROWEST_INTERVAL, widest / _MOST_POINTS)


def _rdp_epsilon(
    groups: Sequence[GaussianEvent], delta: float, *, orders: Sequence[float] | None = None
) -> float:
    accountant = rdp.RdpAccountant(orders)
    with _quiet():
        for event in groups:
            one = dp_accounting.GaussianDpEvent(event.noise_multiplier)
            if event.sample_rate < 1.0:
                one = dp_accounting.PoissonSampledDpEvent(event.sample_rate, one)
            accountant.compose(one, event.count)
        return float(accountant.get_epsilon(delta))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the accountants on single Renyi orders: every order alone is an upper bound."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _same_kind(one: GaussianEvent, other: GaussianEvent) -> bool:
    return replace(one, count=1) == replace(other, count=1)


def _check(events: Sequence[GaussianEvent], delta: float, relation: str) -> None:
    for event in events:
        if not isinstance(event, GaussianEvent):
            raise PrivacyError(f"An event of type {type(event).__name__}: expected GaussianEvent.")
    if not 0 < _finite("delta", delta) < 1:
        raise PrivacyError(f"delta = {delta}: expected in (0, 1).")
    if delta < LEAST_DELTA:
        raise PrivacyError(f"delta = {delta}: expected at least {LEAST_DELTA}.")
    if relation not in _RELATIONS:
        raise PrivacyError(f"relation = {relation!r}: expected one of {', '.join(_RELATIONS)}.")


def _budget(epsilon: float) -> float:
    if not _finite("epsilon", epsilon) > 0:
        raise PrivacyError(f"epsilon = {epsilon}: expected more than 0.")
    return float(epsilon)


def _check_order(order: int) -> None:
    if _whole("order", order) < 2:
        raise PrivacyError(f"order = {order}: expected at least 2.")


def _finite(name: str, value: object) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise OverflowError
        return float(value)
    except OverflowError:  # of a whole number, too
        raise PrivacyError(f"{name} = {_shown(value)}: expected a finite number.") from None


def _whole(name: str, value: object) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or not 0 <= value <= LARGEST_COUNT
    ):
        raise PrivacyError(
            f"{name} = {_shown(value)}: expected a whole number up to {LARGEST_COUNT}."
        )
    return int(value)


def _shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a number of more than {sys.get_int_max_str_digits()} digits"
