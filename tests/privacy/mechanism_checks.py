"""Promises of the distributed mechanism, each a check that runs on real workers.

A check raises AssertionError when the promise is broken; ``PLANTED_BUGS`` breaks each on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from dpldm_dist.privacy import optimizer as optimizer_module
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisySum
from dpldm_dist.privacy.randomness import derive_key, integer_noise
from dpldm_dist.privacy.sampling import Lanes, PoissonSampling, dyadic_rate
from dpldm_dist.runtime.collective import GroupCollective

KEY = bytes(range(32))
SIGMA, CLIP_NORM, GRID = 0.8, 0.25, 2.0**-32
STD = SIGMA * CLIP_NORM / GRID
P = 60_000


def noisy_zero(
    collective: Collective, *, step: int = 0, attempt: int = 0, length: int = P
) -> torch.Tensor:
    mechanism = NoisySum(KEY, attempt=attempt, std=STD, collective=collective)
    return mechanism.release(torch.zeros(length, dtype=torch.int64), purpose="noise", step=step)


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
    released = NoisySum(KEY, attempt=0, std=STD, collective=collective).release(
        mine, purpose="noise", step=3
    )
    total = torch.arange(1000, dtype=torch.int64) * sum(range(1, collective.world_size + 1))
    total -= collective.world_size * 10**12
    noise = integer_noise(derive_key(KEY, "noise", 0, 3), 0, 1000, std=STD)
    assert torch.equal(released, total + noise)
    assert same_on_all_workers(collective, released)


def no_noise_is_used_twice(collective: Collective) -> None:
    drawn = [
        noisy_zero(collective, step=s, attempt=a, length=5000) for s in range(3) for a in range(2)
    ]
    assert len(torch.unique(torch.cat(drawn))) == 6 * 5000  # a chance repeat: below 1e-6
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            both = (one.double() * other.double()).mean() / STD**2
            assert abs(float(both)) < 6 / math.sqrt(5000)


def noise_differs_when_the_sum_differs_after_a_restart(collective: Collective) -> None:
    """The same step on other data (after a crash) belongs to a new attempt: its noise is fresh."""
    one = torch.zeros(5000, dtype=torch.int64)
    other = one + (1 if collective.rank == 0 else 0)
    first = NoisySum(KEY, attempt=0, std=STD, collective=collective)
    second = NoisySum(KEY, attempt=1, std=STD, collective=collective)
    difference = second.release(other, purpose="noise", step=0) - first.release(
        one, purpose="noise", step=0
    )
    spread = float(difference.double().std()) / STD
    assert abs(spread / math.sqrt(2) - 1) < 6 / math.sqrt(2 * 5000)


def an_update_is_the_noisy_sum_over_clip_norm_and_the_public_divisor(
    collective: Collective,
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    divisor = 64.0
    optimizer = DistributedDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [parameter],
        NoisySum(KEY, attempt=0, std=STD, collective=collective),
        grid=GRID,
        clip_norm=CLIP_NORM,
        divisor=divisor,
    )
    mine = torch.full((1000,), int(3 * CLIP_NORM / GRID), dtype=torch.int64)
    optimizer.step(mine, step=0)
    noise = integer_noise(derive_key(KEY, "noise", 0, 0), 0, 1000, std=STD).double() * GRID
    wanted = -(3 * CLIP_NORM * collective.world_size + noise) / CLIP_NORM / divisor
    assert torch.allclose(parameter.detach().double(), wanted, rtol=1e-6, atol=1e-9)


def a_worker_without_records_still_takes_the_step(collective: Collective) -> None:
    parameter = torch.nn.Parameter(torch.zeros(50))
    optimizer = DistributedDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [parameter],
        NoisySum(KEY, attempt=0, std=STD, collective=collective),
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
        noise_differs_when_the_sum_differs_after_a_restart,
        an_update_is_the_noisy_sum_over_clip_norm_and_the_public_divisor,
        a_worker_without_records_still_takes_the_step,
        every_record_is_owned_once_and_drawn_alike_for_every_number_of_workers,
    )
}


# --- planted bugs: (what is broken, the check that must notice, on 2 workers) ------------------------


def _every_worker_adds_noise() -> Any:
    def release(self: NoisySum, sum_P: torch.Tensor, *, purpose: str, step: int) -> torch.Tensor:
        total = sum_P.clone()
        self._add_noise(
            total, [0] * (self._collective.rank + 1) + [len(total)] * 9, purpose=purpose, step=step
        )
        self._collective.sum_(total)
        return total

    return mock.patch.object(NoisySum, "release", release)


def _every_worker_claims_the_whole_vector() -> Any:
    original = NoisySum._add_noise

    def claim(self: NoisySum, total: torch.Tensor, bounds: Any, **rest: Any) -> tuple[int, int]:
        original(self, total, bounds, **rest)
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
    original = GroupCollective.sum_

    def mean(self: GroupCollective, tensor: torch.Tensor) -> None:
        original(self, tensor)
        if tensor.numel() > 10:
            tensor //= self.world_size

    return mock.patch.object(GroupCollective, "sum_", mean)


def _key_without(position: int) -> Any:
    def forgetful(key: bytes, purpose: str, *numbers: int) -> bytes:
        return derive_key(key, purpose, *(0 if i == position else n for i, n in enumerate(numbers)))

    return mock.patch.object(optimizer_module, "derive_key", forgetful)


def _same_noise_each_step() -> Any:
    return _key_without(1)


def _noise_replayed_on_a_different_sum() -> Any:
    return _key_without(0)


def _divided_by_the_number_of_workers() -> Any:
    original = DistributedDPOptimizer.__init__

    def wrong(self: Any, inner: Any, parameters: Any, noisy_sum: Any, **rest: Any) -> None:
        rest["divisor"] *= noisy_sum._collective.world_size
        original(self, inner, parameters, noisy_sum, **rest)

    return mock.patch.object(DistributedDPOptimizer, "__init__", wrong)


def _empty_workers_skip_the_step() -> Any:
    original = DistributedDPOptimizer.step

    def skipping(self: Any, sum_P: torch.Tensor, step: int) -> float:
        return original(self, sum_P, step) if bool(sum_P.any()) else 0.0

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
    "noise replayed on a different sum": (
        _noise_replayed_on_a_different_sum,
        "noise_differs_when_the_sum_differs_after_a_restart",
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
