"""Privacy bugs planted in the real trainer, each with the instrument of the audit that must see it.

A bug is a set of patches on every worker while the legs of an audit run. The trainer's own
self-checks are off here: they would stop some of these runs before the audit could see anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch

from dpldm_dist.audit import verdict
from dpldm_dist.audit.legs import jobs
from dpldm_dist.config import parse_config
from dpldm_dist.privacy import accounting, gradients, optimizer, plan, randomness
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.gradients import PerRecordGradients
from dpldm_dist.privacy.ledger import SharedLedger
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisyStep, NoisySum
from dpldm_dist.privacy.randomness import derive_key, integer_noise
from dpldm_dist.privacy.sampling import Lanes, PoissonSampling, Selection, dyadic_rate
from dpldm_dist.privacy.selfcheck import RecordTally
from dpldm_dist.runtime.collective import GroupCollective
from dpldm_dist.runtime.rundir import private_files
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages import finetune as finetune_module
from dpldm_dist.stages.finetune.state import TrainingState

NOISE, RESTARTS = ("noisy",), ("noisy", "other-weights")
EMPTY = ("noisy", "other-data")
ALL_AT_ONCE, SMALL = ("reference",), ("selection",)


@dataclass(frozen=True)
class Bug:
    """``plant`` gives the patches; ``legs`` are those that show it; ``seen_by``: an instrument."""

    plant: Callable[[], list[Any]]
    legs: tuple[str, ...]
    seen_by: str


def method(owner: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """A patch that replaces ``owner.name`` by ``change(the original)``."""
    return mock.patch.object(owner, name, change(getattr(owner, name)))


def noise_of(draw: Callable[[bytes, int, int, float], torch.Tensor]) -> list[Any]:
    def drawn(key: bytes, start: int, stop: int, *, std: float) -> torch.Tensor:
        return draw(key, start, stop, std)

    return [mock.patch.object(optimizer, "integer_noise", drawn)]


def no_noise() -> list[Any]:
    return noise_of(lambda key, start, stop, std: torch.zeros(stop - start, dtype=torch.int64))


def noise_divided(divisor: float) -> list[Any]:
    return noise_of(
        lambda key, start, stop, std: integer_noise(key, start, stop, std=std / divisor)
    )


def noise_over_the_workers() -> list[Any]:
    return noise_divided(2)


def noise_over_its_root() -> list[Any]:
    return noise_divided(2**0.5)


def sigma_squared() -> list[Any]:
    return noise_divided(1 / 2.0)  # sigma is about 2 here


def every_worker_adds_noise() -> list[Any]:
    def change(release: Any) -> Any:
        def noisier(self: NoisySum, sum_P: torch.Tensor, *, purpose: str, step: int) -> Any:
            key = derive_key(self._key, f"worker {self._collective.rank} {purpose}", step)
            mine = integer_noise(key, 0, len(sum_P), std=self._std)
            with no_noise()[0]:
                return release(self, sum_P + mine, purpose=purpose, step=step)

        return noisier

    return [method(NoisySum, "release_", change)]


def uniform_noise() -> list[Any]:
    def draw(key: bytes, start: int, stop: int, std: float) -> torch.Tensor:
        words = randomness.words(key, stop)[start:]
        centred = randomness.uniform_from_words(words) - 0.5
        return torch.from_numpy(np.rint(centred * std * 12**0.5).astype(np.int64))

    return noise_of(draw)


def noise_cut_off() -> list[Any]:
    return noise_of(
        lambda key, start, stop, std: integer_noise(key, start, stop, std=std).clamp(
            -int(2 * std), int(2 * std)
        )
    )


def one_worker_forgets_its_noise() -> list[Any]:
    def change(add: Any) -> Any:
        def forgetful(self: NoisySum, total_P: torch.Tensor, bounds: Any, key: bytes) -> Any:
            kept = total_P.clone()
            filled = add(self, total_P, bounds, key)
            if self._collective.rank == 0:
                total_P.copy_(kept)
            return filled

        return forgetful

    return [method(NoisySum, "_add_noise", change)]


def workers_share_a_keystream() -> list[Any]:
    return noise_of(lambda key, start, stop, std: integer_noise(key, 0, stop - start, std=std))


def noise_not_bound_to(ignored: str) -> list[Any]:
    """The key of the noise forgets the step, or the sum."""

    def change(digest: Any) -> Any:
        def forgetful(self: NoisySum, total_P: torch.Tensor, *, purpose: str, step: int) -> bytes:
            total_P = torch.zeros_like(total_P)
            return digest(self, total_P, purpose=purpose, step=0 if ignored == "step" else step)

        return forgetful

    return [method(NoisySum, "_digest", change)]


def same_noise_in_every_step() -> list[Any]:
    return noise_not_bound_to("step")


def noise_reused_on_another_sum() -> list[Any]:
    return noise_not_bound_to("sum")


def noise_reused_on_other_data() -> list[Any]:
    def one_key(config: Any, run_key: bytes, attempt: Any) -> bytes:
        return derive_key(run_key, "attempt")

    return [mock.patch.object(finetune_module, "attempt_key", one_key), *noise_not_bound_to("sum")]


def no_clipping() -> list[Any]:
    return [
        mock.patch.object(gradients, "clip_factors", lambda norms, mask_B, **rest: mask_B.double())
    ]


def twice_the_clip_norm() -> list[Any]:
    def change(factors: Any) -> Any:
        return lambda norms, mask_B, *, clip_norm: factors(norms, mask_B, clip_norm=2 * clip_norm)

    return [method(gradients, "clip_factors", change)]


def clipped_after_averaging() -> list[Any]:
    """The mean gradient of a microbatch is clipped, and counts for all of its records."""

    def factors(norms: Any, mask_B: torch.Tensor, *, clip_norm: float, **rest: Any) -> Any:
        count = mask_B.sum().clamp(min=1)
        mean = norms.square_B[mask_B].sum().sqrt() / count  # gradients are orthogonal here
        return (clip_norm / mean).clamp(max=1.0) * mask_B.double()

    return [mock.patch.object(gradients, "clip_factors", factors)]


def layers_clipped_one_by_one() -> list[Any]:
    def add(self: PerRecordGradients, losses: Any, mask_B: torch.Tensor) -> None:
        terms, _ = self._differentiate(losses, mask_B)
        for term in terms:
            factor_B = gradients.clip_factors(
                gradients.record_norms([term], mask_B),
                mask_B,
                clip_norm=self._clip_norm,
            )
            self._sum.add([term], factor_B)

    return [mock.patch.object(PerRecordGradients, "add", add)]


def every_draw_clipped_by_itself() -> list[Any]:
    def change(add: Any) -> Any:
        def by_draw(self: PerRecordGradients, losses: Any, mask_B: torch.Tensor) -> None:
            draws, self._draws = self._draws, 1
            try:
                add(self, losses, mask_B.repeat_interleave(draws))
            finally:
                self._draws = draws

        return by_draw

    return [method(PerRecordGradients, "add", change)]


def telemetry_outside_of_the_clip() -> list[Any]:
    def change(bound: Any) -> Any:
        def generous(plan_: Any, **rest: Any) -> Any:
            found = bound(plan_, **rest)
            whole = (found.gradient**2 + found.telemetry**2) ** 0.5
            return plan.ContributionBound(gradient=whole, telemetry=found.telemetry)

        return generous

    from dpldm_dist.stages import mechanism

    return [method(mechanism, "contribution_bound", change)]


def mean_over_workers() -> list[Any]:
    def change(sum_: Any) -> Any:
        def mean(self: GroupCollective, tensor: torch.Tensor, bounds: Any) -> None:
            sum_(self, tensor, bounds)
            if tensor.numel() > 1000:
                tensor.div_(self.world_size, rounding_mode="floor")

        return mean

    return [method(GroupCollective, "sum_slices_", change)]


def only_one_worker_counts() -> list[Any]:
    def change(release: Any) -> Any:
        def deaf(self: NoisySum, total_P: torch.Tensor, **rest: Any) -> torch.Tensor:
            return release(self, total_P * (self._collective.rank == 0), **rest)

        return deaf

    return [method(NoisySum, "release_", change)]


def records_read_by_all_workers() -> list[Any]:
    return [
        mock.patch.object(Lanes, "of_worker", lambda self, rank, world: range(self._lanes)),
    ]


def divided_by_the_records_drawn() -> list[Any]:
    drawn = [0]

    def count(add: Any) -> Any:
        def counted(self: PerRecordGradients, losses: Any, mask_B: torch.Tensor) -> None:
            drawn[0] += int(mask_B.sum())
            add(self, losses, mask_B)

        return counted

    def change(step: Any) -> Any:
        def normalised(self: DistributedDPOptimizer, sum_P: torch.Tensor, number: int) -> Any:
            total = torch.tensor([drawn[0]])
            self._noisy_sum._collective.sum_(total)
            drawn[0] = 0
            self._public = getattr(self, "_public", self._scale)
            self._scale = self._public * self._divisor / max(1, int(total))
            return step(self, sum_P, number)

        return normalised

    def remember(init: Any) -> Any:
        def made(self: DistributedDPOptimizer, *parts: Any, divisor: float, **rest: Any) -> None:
            init(self, *parts, divisor=divisor, **rest)
            self._divisor = divisor

        return made

    return [
        method(PerRecordGradients, "add", count),
        method(DistributedDPOptimizer, "step", change),
        method(DistributedDPOptimizer, "__init__", remember),
    ]


def empty_batches_dropped() -> list[Any]:
    """No step while some worker has drawn nobody."""

    def change(step: Any) -> Any:
        def skipping(self: DistributedDPOptimizer, sum_P: torch.Tensor, number: int) -> Any:
            nobody = torch.tensor([int(not sum_P.any())])
            self._noisy_sum._collective.max_(nobody)
            if not nobody.item():
                return step(self, sum_P, number)
            length = sum(p.numel() for p in self._parameters)
            return NoisyStep(torch.zeros(length, dtype=torch.float64), sum_P[length:])

        return skipping

    return [method(DistributedDPOptimizer, "step", change)]


def coins(change: Callable[[Any, Any, int, int, int], np.ndarray]) -> list[Any]:
    """Lanes whose shards are drawn one by one, by ``change``(sampling, its select, step, shard,
    records)."""

    def replaced(_: Any) -> Any:
        def drawn(self: Lanes, sampling: PoissonSampling, step: int, lane: int) -> Selection:
            shards, select = self._shards[lane], PoissonSampling.select
            found = [
                change(sampling, select, step, int(shard), int(self._records_S[shard]))
                for shard in shards
            ]
            empty = [np.zeros(0, np.int64)]
            owners = np.repeat(shards, [len(places) for places in found])
            return Selection(owners[: self._cap], np.concatenate(found or empty)[: self._cap])

        return drawn

    return [method(Lanes, "select", replaced)]


def workers_share_coins() -> list[Any]:
    return coins(lambda self, select, step, shard, n: select(self, step, shard // 2, n))


def same_coins_in_every_step() -> list[Any]:
    return coins(lambda self, select, step, shard, n: select(self, 0, shard, n))


def shuffled_batches() -> list[Any]:
    """Every shard gives the next of its records, in a new order every round."""

    def turn(self: Any, select: Any, step: int, shard: int, n: int) -> np.ndarray:
        size = max(1, round(n * self._threshold / 2**40))
        rounds, place = divmod(step * size, n)
        order = np.random.default_rng([rounds, shard]).permutation(n)
        return np.sort(order[place : place + size])

    return coins(turn)


def nobody_left_out() -> list[Any]:
    """A shard from which nobody was drawn is asked again."""

    def again(self: Any, select: Any, step: int, shard: int, n: int) -> np.ndarray:
        for more in range(100):
            chosen = select(self, step + 1000 * more, shard, n)
            if len(chosen):
                break
        return chosen

    return coins(again)


def twice_the_rate() -> list[Any]:
    def change(init: Any) -> Any:
        def eager(self: PoissonSampling, key: bytes, *, attempt: int, sample_rate: float) -> None:
            init(self, key, attempt=attempt, sample_rate=dyadic_rate(min(1.0, 2 * sample_rate)))

        return eager

    return [method(PoissonSampling, "__init__", change)]


def every_other_step_charged() -> list[Any]:
    def change(record: Any) -> Any:
        def skipping(self: SharedLedger, *parts: Any, **rest: Any) -> Any:
            step = rest.get("step", parts[1] if len(parts) > 1 else None)
            return None if step is not None and step % 2 else record(self, *parts, **rest)

        return skipping

    return [method(SharedLedger, "charge", change), method(SharedLedger, "bind", change)]


BUGS: dict[str, Bug] = {
    "noise is missing": Bug(no_noise, NOISE, "noise"),
    "noise divided by the workers": Bug(noise_over_the_workers, NOISE, "noise"),
    "noise divided by the root of the workers": Bug(noise_over_its_root, NOISE, "noise"),
    "sigma squared": Bug(sigma_squared, NOISE, "noise"),
    "noise on every worker": Bug(every_worker_adds_noise, NOISE, "noise"),
    "noise is uniform": Bug(uniform_noise, NOISE, "noise"),
    "noise is cut off": Bug(noise_cut_off, NOISE, "noise"),
    "one worker forgets its noise": Bug(one_worker_forgets_its_noise, NOISE, "noise"),
    "workers share a keystream": Bug(workers_share_a_keystream, NOISE, "noise"),
    "the same noise in every step": Bug(same_noise_in_every_step, NOISE, "noise"),
    "noise used again on another sum": Bug(noise_reused_on_another_sum, RESTARTS, "noise"),
    "noise used again on other data": Bug(noise_reused_on_other_data, EMPTY, "noise"),
    "empty batches are dropped": Bug(empty_batches_dropped, EMPTY, "noise"),
    "no clipping": Bug(no_clipping, ALL_AT_ONCE, "contribution"),
    "twice the clip norm": Bug(twice_the_clip_norm, ALL_AT_ONCE, "contribution"),
    "clipped after averaging": Bug(clipped_after_averaging, ALL_AT_ONCE, "contribution"),
    "layers clipped one by one": Bug(layers_clipped_one_by_one, ALL_AT_ONCE, "contribution"),
    "every draw clipped by itself": Bug(every_draw_clipped_by_itself, ALL_AT_ONCE, "contribution"),
    "telemetry outside of the clip": Bug(
        telemetry_outside_of_the_clip, ALL_AT_ONCE, "contribution"
    ),
    "mean over the workers": Bug(mean_over_workers, ALL_AT_ONCE, "contribution"),
    "only one worker counts": Bug(only_one_worker_counts, ALL_AT_ONCE, "contribution"),
    "records read by all workers": Bug(records_read_by_all_workers, ALL_AT_ONCE, "contribution"),
    "divided by the records drawn": Bug(divided_by_the_records_drawn, SMALL, "contribution"),
    "workers share coins": Bug(workers_share_coins, SMALL, "sampling"),
    "the same coins in every step": Bug(same_coins_in_every_step, SMALL, "sampling"),
    "shuffled batches": Bug(shuffled_batches, SMALL, "sampling"),
    "nobody is left out": Bug(nobody_left_out, SMALL, "sampling"),
    "twice the rate": Bug(twice_the_rate, SMALL, "sampling"),
    "every other step is charged": Bug(every_other_step_charged, NOISE, "ledger"),
}


@contextmanager
def planted(bug: str | None) -> Iterator[None]:
    """Within: ``bug`` is in the trainer, and its self-checks are off. None: the trainer as it is."""
    with ExitStack() as stack:
        stack.enter_context(remembered_accountant())
        if bug is not None:
            nothing = {"side_effect": None, "return_value": None}
            for owner, name in (
                (finetune_module, "check_start"),
                (RecordTally, "settle"),
                (TrainingState, "freeze"),
            ):
                stack.enter_context(mock.patch.object(owner, name, mock.Mock(**nothing)))
            for patch in BUGS[bug].plant():
                stack.enter_context(patch)
        yield


@cache
def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    return cache(function)


_PURE = [(accounting, "_pld_epsilon"), (accounting, "_rdp_epsilon"), (verdict, "delta_curve")]


@contextmanager
def remembered_accountant() -> Iterator[None]:
    """Numbers of the accountant are pure functions, and all runs ask for the same: each is computed
    once in a process."""

    def asking(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*given: Any, **named: Any) -> Any:
            frozen = [tuple(one) if isinstance(one, list) else one for one in given]
            return _remembering(function)(*frozen, **named)

        return ask

    with ExitStack() as stack:
        for owner, name in _PURE:
            stack.enter_context(method(owner, name, asking))
        yield


def run_legs(collective: Collective, wanted: list[tuple[str | None, dict[str, str]]]) -> list[str]:
    """On a worker: for each (bug, configs of legs in JSON), run them; what the trainer refused."""
    rank, world = collective.rank, collective.world_size
    worker = Worker(rank, world, rank, torch.device("cpu"), collective)
    refused = []
    for bug, texts in wanted:
        legs = {name: parse_config(json.loads(text)) for name, text in texts.items()}
        said = ""
        try:
            with planted(bug), private_files():
                for job in jobs(legs):
                    job.stage(job.config, worker)
                    collective.barrier()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        refused.append(said)
        collective.barrier()
    return refused
