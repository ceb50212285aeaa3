"""Promises of the distributed mechanism, each a check that runs on real workers.

A check raises AssertionError when the promise is broken; ``PLANTED_BUGS`` breaks each on purpose.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from dpldm_dist.errors import BudgetReached
from dpldm_dist.privacy import optimizer as optimizer_module
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.optimizer import Bind, DistributedDPOptimizer, NoisySum
from dpldm_dist.privacy.randomness import derive_key, integer_noise
from dpldm_dist.privacy.sampling import Lanes, PoissonSampling, dyadic_rate
from dpldm_dist.runtime.collective import GroupCollective

KEY = bytes(range(32))
SIGMA, CLIP_NORM, GRID = 0.8, 0.25, 2.0**-32
STD = SIGMA * CLIP_NORM / GRID
P = 60_000


def mechanism(
    collective: Collective,
    *,
    key: bytes = KEY,
    std: float = STD,
    name: str = "numbers of the plan",
    bind: Bind = lambda purpose, step, digest: None,
    unsafe_no_noise: bool = False,
) -> NoisySum:
    return NoisySum(
        key,
        std=std,
        mechanism=name,
        collective=collective,
        bind=bind,
        unsafe_no_noise=unsafe_no_noise,
    )


def released(
    of: NoisySum, part: torch.Tensor, *, purpose: str = "step", step: int = 0
) -> torch.Tensor:
    """The noisy sum; ``part`` of this worker is left as it is."""
    return of.release_(part.clone(), purpose=purpose, step=step)


def noisy_zero(
    collective: Collective, *, step: int = 0, length: int = P, **changes: Any
) -> torch.Tensor:
    nothing = torch.zeros(length, dtype=torch.int64)
    return released(mechanism(collective, **changes), nothing, step=step)


def same_on_all_workers(collective: Collective, value: torch.Tensor) -> bool:
    highest, lowest = value.clone(), -value
    collective.max_(highest)
    collective.max_(lowest)
    return torch.equal(highest, -lowest)


def noise_has_the_stated_std_whatever_the_number_of_workers(collective: Collective) -> None:
    drawn = noisy_zero(collective).double() * GRID
    assert math.isclose(float(drawn.std()), SIGMA * CLIP_NORM, rel_tol=4 / math.sqrt(2 * P))
    assert abs(float(drawn.mean())) < 5 * SIGMA * CLIP_NORM / math.sqrt(P)


def the_sum_is_exact_and_the_same_on_all_workers(collective: Collective) -> None:
    mine = torch.arange(1000, dtype=torch.int64) * (collective.rank + 1) - 10**12
    total = torch.arange(1000, dtype=torch.int64) * sum(range(1, collective.world_size + 1))
    total -= collective.world_size * 10**12
    exact = released(mechanism(collective, unsafe_no_noise=True), mine, step=3)
    assert torch.equal(exact, total)
    noisy = released(mechanism(collective), mine, step=3)
    spread = float((noisy - total).double().std()) / STD
    assert abs(spread - 1) < 6 / math.sqrt(2 * 1000)
    assert same_on_all_workers(collective, noisy)


def no_noise_is_used_twice(collective: Collective) -> None:
    """Other step, purpose, key, noise multiplier or mechanism: other noise, on the same sum."""
    drawn = [noisy_zero(collective, step=step, length=5000) for step in range(3)]
    drawn.append(noisy_zero(collective, key=bytes(32), length=5000))
    drawn.append(noisy_zero(collective, name="another clip norm", length=5000))
    drawn.append(noisy_zero(collective, std=2 * STD, length=5000) // 2)
    nothing = torch.zeros(5000, dtype=torch.int64)
    drawn.append(released(mechanism(collective), nothing, purpose="statistics"))
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            both = (one.double() * other.double()).mean() / STD**2
            assert abs(float(both)) < 6 / math.sqrt(5000)
    values = torch.cat([one for index, one in enumerate(drawn) if index != 5])
    assert len(torch.unique(values)) == len(values)  # a chance repeat: below 1e-5


def the_same_sum_is_the_same_release_and_another_sum_has_other_noise(
    collective: Collective,
) -> None:
    """A step that is repeated after a restart, on the same data and on other data."""
    one = torch.zeros(5000, dtype=torch.int64)
    other = one.clone()
    other[17] += 1 if collective.rank == 0 else 0  # the least that a sum can differ by
    first = released(mechanism(collective), one)
    again = released(mechanism(collective), one)
    assert torch.equal(first, again)
    changed = released(mechanism(collective), other)
    spread = float((changed - first).double().std()) / STD
    assert abs(spread / math.sqrt(2) - 1) < 6 / math.sqrt(2 * 5000)


def the_digest_is_bound_before_any_noise_is_drawn(collective: Collective) -> None:
    seen: list[str] = []

    def refuse(purpose: str, step: int, digest: str) -> None:
        seen.append(digest)
        raise BudgetReached("no more")

    drawn: list[int] = []
    noise = optimizer_module.integer_noise

    def watched(key: bytes, start: int, stop: int, *, std: float) -> torch.Tensor:
        drawn.append(start)
        return noise(key, start, stop, std=std)

    with mock.patch.object(optimizer_module, "integer_noise", watched):
        try:
            noisy_zero(collective, length=100, bind=refuse)
        except BudgetReached:
            pass
        else:
            raise AssertionError("released although it could not be bound")
    assert not drawn and len(seen) == 1 and len(bytes.fromhex(seen[0])) == 32


def the_digest_names_the_sum_and_needs_the_key(collective: Collective) -> None:
    def digest_of(total: torch.Tensor, **changes: Any) -> str:
        seen: list[str] = []

        def note(purpose: str, step: int, digest: str) -> None:
            seen.append(digest)

        released(mechanism(collective, bind=note, **changes), total)
        return seen[0]

    one = torch.zeros(100, dtype=torch.int64)
    other = one.clone()
    other[3] += 1 if collective.rank == 0 else 0
    found = [digest_of(one), digest_of(other), digest_of(one, key=bytes(32))]
    assert digest_of(one) == found[0] and len(set(found)) == 3
    plain = hashlib.sha256(one.numpy().tobytes()).hexdigest()
    assert plain not in found


def an_update_is_the_noisy_sum_over_clip_norm_and_the_public_divisor(
    collective: Collective,
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    divisor = 64.0
    optimizer = DistributedDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [parameter],
        mechanism(collective),
        grid=GRID,
        clip_norm=CLIP_NORM,
        divisor=divisor,
    )
    mine = torch.full((1000,), int(3 * CLIP_NORM / GRID), dtype=torch.int64)
    noisy = released(mechanism(collective), mine)
    noise = (noisy - mine * collective.world_size).double() * GRID
    optimizer.step(mine.clone(), step=0)
    wanted = -(3 * CLIP_NORM * collective.world_size + noise) / CLIP_NORM / divisor
    assert torch.allclose(parameter.detach().double(), wanted, rtol=1e-6, atol=1e-9)


def a_worker_without_records_still_takes_the_step(collective: Collective) -> None:
    parameter = torch.nn.Parameter(torch.zeros(50))
    optimizer = DistributedDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [parameter],
        mechanism(collective),
        grid=GRID,
        clip_norm=CLIP_NORM,
        divisor=1.0,
    )
    for step in range(4):
        before = parameter.detach().clone()
        optimizer.step(torch.zeros(50, dtype=torch.int64), step)
        assert (parameter != before).all()
        assert same_on_all_workers(collective, parameter.detach())


def every_record_is_owned_once_and_drawn_alike_for_every_number_of_workers(
    collective: Collective,
) -> None:
    shard_records = [50, 31, 0, 77, 20]
    sampling = PoissonSampling(KEY, attempt=0, sample_rate=dyadic_rate(0.4))
    lanes = Lanes(shard_records, lanes=3, cap=10_000, microbatch=8)

    def count(rank: int, world_size: int) -> torch.Tensor:
        table = torch.zeros(5, 100, dtype=torch.int64)
        for lane in lanes.of_worker(rank, world_size):
            for part in lanes.microbatches(sampling, 7, lane):
                table[part.shards, part.places] += 1
        return table

    together = count(collective.rank, collective.world_size)
    collective.sum_(together)
    assert int(together.max()) <= 1
    assert torch.equal(together, count(0, 1))


CHECKS: dict[str, Callable[[Collective], None]] = {
    check.__name__: check
    for check in (
        noise_has_the_stated_std_whatever_the_number_of_workers,
        the_sum_is_exact_and_the_same_on_all_workers,
        no_noise_is_used_twice,
        the_same_sum_is_the_same_release_and_another_sum_has_other_noise,
        the_digest_is_bound_before_any_noise_is_drawn,
        the_digest_names_the_sum_and_needs_the_key,
        an_update_is_the_noisy_sum_over_clip_norm_and_the_public_divisor,
        a_worker_without_records_still_takes_the_step,
        every_record_is_owned_once_and_drawn_alike_for_every_number_of_workers,
    )
}


# --- planted bugs: (what is broken, the check that must notice, on 2 workers) ------------------------


def _every_worker_adds_noise() -> Any:
    def release(self: NoisySum, sum_P: torch.Tensor, *, purpose: str, step: int) -> torch.Tensor:
        total = sum_P.clone()
        key = derive_key(KEY, f"of worker {self._collective.rank}", step)
        self._add_noise(total, [0] * (self._collective.rank + 1) + [len(total)] * 9, key)
        self._collective.sum_(total)
        return total

    return mock.patch.object(NoisySum, "release_", release)


def _every_worker_claims_the_whole_vector() -> Any:
    original = NoisySum._add_noise

    def claim(self: NoisySum, total: torch.Tensor, bounds: Any, key: bytes) -> tuple[int, int]:
        original(self, total, bounds, key)
        return 0, len(total)

    return mock.patch.object(NoisySum, "_add_noise", claim)


def _nobody_adds_noise() -> Any:
    return mock.patch.object(
        optimizer_module,
        "integer_noise",
        lambda key, a, b, std: torch.zeros(b - a, dtype=torch.int64),
    )


def _noise_of(change: Callable[[float], float]) -> Any:
    return mock.patch.object(
        optimizer_module,
        "integer_noise",
        lambda key, a, b, std: integer_noise(key, a, b, std=change(std)),
    )


def _sigma_squared() -> Any:
    return _noise_of(lambda std: std * SIGMA)


def _noise_divided_by_root_two() -> Any:
    return _noise_of(lambda std: std / math.sqrt(2))


def _noise_without_the_clip_norm() -> Any:
    return _noise_of(lambda std: std / CLIP_NORM)


def _mean_for_sum() -> Any:
    original = GroupCollective.sum_slices_

    def mean(self: GroupCollective, tensor: torch.Tensor, bounds: Any) -> None:
        original(self, tensor, bounds)
        tensor //= self.world_size

    return mock.patch.object(GroupCollective, "sum_slices_", mean)


def _digest_of(change: Callable[..., tuple[Any, str, int]]) -> Any:
    """The noise is bound to less than it should be."""
    original = NoisySum._digest

    def digest(self: NoisySum, total: torch.Tensor, *, purpose: str, step: int) -> bytes:
        total, purpose, step = change(total, purpose, step)
        return original(self, total, purpose=purpose, step=step)

    return mock.patch.object(NoisySum, "_digest", digest)


def _same_noise_each_step() -> Any:
    return _digest_of(lambda total, purpose, step: (total, purpose, 0))


def _same_noise_for_each_purpose() -> Any:
    return _digest_of(lambda total, purpose, step: (total, "step", step))


def _noise_replayed_on_a_different_sum() -> Any:
    return _digest_of(lambda total, purpose, step: (torch.zeros_like(total), purpose, step))


def _fresh_noise_on_the_same_sum() -> Any:
    counter = itertools.count()
    return mock.patch.object(
        optimizer_module,
        "integer_noise",
        lambda key, a, b, std: integer_noise(
            derive_key(key, "fresh", next(counter)), a, b, std=std
        ),
    )


def _noise_without_the_mechanism() -> Any:
    original = NoisySum.__init__

    def forgetful(self: NoisySum, key: bytes, **rest: Any) -> None:
        original(self, key, **(rest | {"mechanism": ""}))

    return mock.patch.object(NoisySum, "__init__", forgetful)


def _digest_without_the_key() -> Any:
    original = NoisySum._digest

    def digest(self: NoisySum, total: torch.Tensor, **rest: Any) -> bytes:
        with mock.patch.object(self, "_key", bytes(32)):
            return original(self, total, **rest)

    return mock.patch.object(NoisySum, "_digest", digest)


def _bound_after_the_noise() -> Any:
    release = NoisySum.release_

    def late(self: NoisySum, sum_P: torch.Tensor, *, purpose: str, step: int) -> torch.Tensor:
        bind, bound = self._bind, []
        self._bind = lambda *what: bound.append(what)
        noisy = release(self, sum_P, purpose=purpose, step=step)
        self._bind = bind
        bind(*bound[0])
        return noisy

    return mock.patch.object(NoisySum, "release_", late)


def _divided_by_the_number_of_workers() -> Any:
    original = DistributedDPOptimizer.__init__

    def wrong(self: Any, inner: Any, parameters: Any, noisy_sum: Any, **rest: Any) -> None:
        rest["divisor"] *= noisy_sum._collective.world_size
        original(self, inner, parameters, noisy_sum, **rest)

    return mock.patch.object(DistributedDPOptimizer, "__init__", wrong)


def _empty_workers_skip_the_step() -> Any:
    original = DistributedDPOptimizer.step

    def skipping(self: Any, sum_P: torch.Tensor, step: int) -> Any:
        return original(self, sum_P, step) if bool(sum_P.any()) else None

    return mock.patch.object(DistributedDPOptimizer, "step", skipping)


def _the_draw_depends_on_the_worker() -> Any:
    original = PoissonSampling.select

    def select(self: PoissonSampling, step: int, shard: int, records: int) -> np.ndarray:
        return original(self, step + torch.distributed.get_rank(), shard, records)

    return mock.patch.object(PoissonSampling, "select", select)


def _shards_are_read_by_two_workers() -> Any:
    return mock.patch.object(Lanes, "of_worker", lambda self, rank, world_size: range(self._lanes))


PLANTED_BUGS: dict[str, tuple[Callable[[], Any], str]] = {
    "every worker adds noise": (
        _every_worker_adds_noise,
        "noise_has_the_stated_std_whatever_the_number_of_workers",
    ),
    "owner counts are wrong": (
        _every_worker_claims_the_whole_vector,
        "noise_has_the_stated_std_whatever_the_number_of_workers",
    ),
    "nobody adds noise": (
        _nobody_adds_noise,
        "noise_has_the_stated_std_whatever_the_number_of_workers",
    ),
    "sigma squared": (_sigma_squared, "noise_has_the_stated_std_whatever_the_number_of_workers"),
    "sigma over root two": (
        _noise_divided_by_root_two,
        "noise_has_the_stated_std_whatever_the_number_of_workers",
    ),
    "noise without the clip norm": (
        _noise_without_the_clip_norm,
        "noise_has_the_stated_std_whatever_the_number_of_workers",
    ),
    "mean for sum": (_mean_for_sum, "the_sum_is_exact_and_the_same_on_all_workers"),
    "same noise each step": (_same_noise_each_step, "no_noise_is_used_twice"),
    "same noise for each purpose": (_same_noise_for_each_purpose, "no_noise_is_used_twice"),
    "noise does not hang on the mechanism": (
        _noise_without_the_mechanism,
        "no_noise_is_used_twice",
    ),
    "noise replayed on a different sum": (
        _noise_replayed_on_a_different_sum,
        "the_same_sum_is_the_same_release_and_another_sum_has_other_noise",
    ),
    "fresh noise on the same sum": (
        _fresh_noise_on_the_same_sum,
        "the_same_sum_is_the_same_release_and_another_sum_has_other_noise",
    ),
    "bound after the noise": (
        _bound_after_the_noise,
        "the_digest_is_bound_before_any_noise_is_drawn",
    ),
    "digest without the key": (
        _digest_without_the_key,
        "the_digest_names_the_sum_and_needs_the_key",
    ),
    "divided by the number of workers": (
        _divided_by_the_number_of_workers,
        "an_update_is_the_noisy_sum_over_clip_norm_and_the_public_divisor",
    ),
    "empty workers skip the step": (
        _empty_workers_skip_the_step,
        "a_worker_without_records_still_takes_the_step",
    ),
    "the draw depends on the worker": (
        _the_draw_depends_on_the_worker,
        "every_record_is_owned_once_and_drawn_alike_for_every_number_of_workers",
    ),
    "shards are read by two workers": (
        _shards_are_read_by_two_workers,
        "every_record_is_owned_once_and_drawn_alike_for_every_number_of_workers",
    ),
}


@contextmanager
def planted(bug: str | None) -> Iterator[None]:
    if bug is None:
        yield
        return
    with PLANTED_BUGS[bug][0]():
        yield


def outcomes(collective: Collective, wanted: list[tuple[str | None, str]]) -> list[str]:
    """For each (planted bug, check): "" if the check passed, else what it said."""
    found = []
    for bug, check in wanted:
        try:
            with planted(bug):
                CHECKS[check](collective)
            found.append("")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        collective.barrier()
    return found
