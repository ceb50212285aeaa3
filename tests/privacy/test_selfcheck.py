"""What a run checks of itself, on real processes: right code passes, every planted bug is caught."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import optimizer as optimizer_module
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisySum
from dpldm_dist.privacy.randomness import derive_key, integer_noise
from dpldm_dist.privacy.sampling import Lanes, PoissonSampling, dyadic_rate
from dpldm_dist.privacy.selfcheck import (
    ALPHA,
    FrozenState,
    RecordTally,
    measure_noise,
    prove_ownership,
    refuse_different_parameters,
    same_on_all_workers,
)
from dpldm_dist.runtime.collective import SoloCollective
from tests.processes import on_workers

KEY = bytes(range(32))
CPU = torch.device("cpu")
SHARD_RECORDS = (50, 31, 0, 77, 20, 3)
LANES = 3


def said(check: Callable[..., object], *arguments: Any) -> str:
    """What a check says: nothing, or the PrivacyError's text."""
    try:
        check(*arguments)
    except PrivacyError as error:
        return str(error)
    return ""


def everything(collective: Collective) -> dict[str, Any]:
    """All that the tests below ask of a group of workers: starting one costs more than to ask."""
    return {
        "ownership": ownership_outcomes(collective),
        "tally": tally_outcomes(collective),
        "noise": measured(collective),
        "noise bugs": noise_outcomes(collective) if collective.world_size == 2 else {},
        "parameters": parameter_outcomes(collective) if collective.world_size == 2 else [],
    }


@cache
def asked(workers: int) -> list[dict[str, Any]]:
    return on_workers(workers, everything)


# --- ownership ------------------------------------------------------------------------------------


def ids_of(shard: int, records: int) -> np.ndarray:
    return np.arange(records) | shard << 40


def own(collective: Collective, change: Callable[[list, int], list] | None = None) -> None:
    """The proof on the shards that ``Lanes`` gives this worker, changed on purpose or not."""
    lanes = Lanes(SHARD_RECORDS, lanes=LANES, cap=10_000, microbatch=4)
    mine = lanes.shards_of_worker(collective.rank, collective.world_size)
    owned = [ids_of(shard, SHARD_RECORDS[shard]) for shard in mine]
    if change is not None:
        owned = change(owned, collective.rank)
    prove_ownership(KEY, owned, SHARD_RECORDS, collective=collective, device=CPU)


def _all_workers_own_everything(owned: list, rank: int) -> list:
    return [ids_of(shard, records) for shard, records in enumerate(SHARD_RECORDS)]


def _swap_one_for_a_double(owned: list, rank: int) -> list:
    """As many as there should be, but one record twice and another never."""
    return [np.where(ids == ids[-1], ids[0], ids) if len(ids) else ids for ids in owned]


WRONG_OWNERS = {
    "a shard is lost": lambda owned, rank: owned[1:] if rank == 0 else owned,
    "a shard is owned twice": lambda owned, rank: owned + owned[:1] if rank == 1 else owned,
    "everybody owns everything": _all_workers_own_everything,
    "one record is lost": lambda owned, rank: [owned[0][1:], *owned[1:]] if rank else owned,
    "one record for another": lambda owned, rank: (
        _swap_one_for_a_double(owned, rank) if rank else owned
    ),
    "a shard of another number": lambda owned, rank: [ids + (1 << 40) for ids in owned],
}


def ownership_outcomes(collective: Collective) -> dict[str, str]:
    found = {"right": said(own, collective)}
    return found | {name: said(own, collective, change) for name, change in WRONG_OWNERS.items()}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_owners_that_training_has_pass(workers):
    assert all(outcome["ownership"]["right"] == "" for outcome in asked(workers))


@pytest.mark.parametrize("wrong", WRONG_OWNERS)
def test_lost_doubled_or_exchanged_records_are_caught_on_every_worker(wrong):
    for outcome in asked(2):
        text = outcome["ownership"][wrong]
        assert "exactly once" in text
        assert not any(digit in text for digit in "0123456789")  # counts are private


def test_any_single_record_that_is_lost_doubled_or_exchanged_is_noticed():
    records = np.concatenate([ids_of(s, n) for s, n in enumerate(SHARD_RECORDS)])
    proof = {"collective": SoloCollective(), "device": CPU}
    generator = np.random.default_rng(0)
    for place in generator.choice(len(records), 40, replace=False):
        other = records[(place + 1) % len(records)]
        for owned in (
            np.delete(records, place),
            np.append(records, records[place]),
            np.where(records == records[place], other, records),
        ):
            with pytest.raises(PrivacyError):
                prove_ownership(KEY, [owned], SHARD_RECORDS, **proof)
    prove_ownership(KEY, [generator.permutation(records)], SHARD_RECORDS, **proof)
    prove_ownership(KEY, [part for part in records[:, None]], SHARD_RECORDS, **proof)


# --- records of a step ----------------------------------------------------------------------------


def tally_step(
    collective: Collective, step: int, *, rate: float = 0.4, bug: str = "", heard: Any = None
) -> None:
    """The loop of a step with its tally; ``bug`` breaks it on worker 0."""
    lanes = Lanes(SHARD_RECORDS, lanes=LANES, cap=10_000, microbatch=4)
    sampling = PoissonSampling(KEY, attempt=0, sample_rate=dyadic_rate(rate))
    tally = RecordTally(KEY, lanes=LANES, collective=heard or collective, device=CPU)
    broken = bug if collective.rank == 0 else ""
    mine = list(lanes.of_worker(collective.rank, collective.world_size))
    if broken == "a lane is skipped":
        mine = mine[1:]
    if broken == "a lane is worked on twice":
        mine = mine + [1]
    for lane in mine:
        chosen = lanes.select(sampling, step, lane)
        tally.drawn(lane, chosen.ids)
        parts = [part.ids for part in lanes.split(chosen)]
        if broken == "a microbatch is lost":
            parts = parts[:-1]
        if broken == "a microbatch is doubled":
            parts = [*parts, parts[0]]
        if broken == "a record is doubled instead of another":
            parts[0] = np.where(parts[0] == parts[0][0], parts[0][1], parts[0])
        if broken == "the step of the draw differs":
            parts = [part.ids for part in lanes.split(lanes.select(sampling, step + 1, lane))]
        for ids in parts:
            tally.processed(lane, ids)
    tally.settle()


WRONG_STEPS = (
    "a lane is skipped",
    "a lane is worked on twice",
    "a microbatch is lost",
    "a microbatch is doubled",
    "a record is doubled instead of another",
    "the step of the draw differs",
)


def tally_outcomes(collective: Collective) -> dict[str, str]:
    found = {}
    for rate in (1.0, 0.4, 0.005):  # with the last, most lanes draw nothing
        found |= {
            f"right {rate} {step}": said(lambda r, s: tally_step(collective, s, rate=r), rate, step)
            for step in range(4)
        }
    for bug in WRONG_STEPS:
        found[bug] = said(lambda name: tally_step(collective, 5, bug=name), bug)
    return found


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_steps_whose_records_were_lost_doubled_or_exchanged_are_caught_on_every_worker(workers):
    for outcome in asked(workers):
        for name, text in outcome["tally"].items():
            assert ("exactly once" in text) == (name in WRONG_STEPS), name
            assert not any(digit in text for digit in "0123456789"), name


class _Listening(SoloCollective):
    """Notes what is exchanged."""

    def __init__(self) -> None:
        self.heard: list[torch.Tensor] = []

    def sum_(self, tensor: torch.Tensor) -> None:
        self.heard.append(tensor.clone())


def test_the_tally_exchanges_nothing_that_depends_on_the_batch():
    listening = _Listening()
    for step, rate in ((0, 0.4), (1, 0.4), (2, 1.0), (3, 0.005)):
        tally_step(SoloCollective(), step, rate=rate, heard=listening)
    first, *others = listening.heard
    assert len(others) == 3 and all(torch.equal(first, other) for other in others)


def test_a_step_after_a_fault_starts_from_nothing():
    tally = RecordTally(KEY, lanes=1, collective=SoloCollective(), device=CPU)
    tally.drawn(0, np.arange(5))
    with pytest.raises(PrivacyError):
        tally.settle()
    tally.drawn(0, np.arange(3))
    tally.processed(0, np.arange(3))
    tally.settle()


# --- the noise that arrives -----------------------------------------------------------------------

SIGMA, CLIP_NORM, GRID, DIVISOR = 0.8, 0.25, 2.0**-32, 64.0
SHAPES = ((40, 50), (1001,), (7, 11, 130))  # four blocks
P = sum(math.prod(shape) for shape in SHAPES)


def measure(
    collective: Collective,
    *,
    adam: bool = False,
    quiet: bool = False,
    expected: float = SIGMA / DIVISOR,
    dtype: torch.dtype = torch.float32,
    divisor: float = DIVISOR,
) -> Any:
    """The real path, from a sum of zeros to moved weights."""
    copies = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    inner = torch.optim.Adam(copies, lr=0.1) if adam else torch.optim.SGD(copies, lr=0.1)
    optimizer = DistributedDPOptimizer(
        inner,
        copies,
        NoisySum(
            KEY,
            std=SIGMA * CLIP_NORM / GRID,
            mechanism="trial",
            collective=collective,
            bind=lambda *_: None,
            unsafe_no_noise=quiet,
        ),
        grid=GRID,
        clip_norm=CLIP_NORM,
        divisor=divisor,
        schedule=torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0),
    )
    zeros_P = torch.zeros(P, dtype=torch.int64)
    return measure_noise(
        lambda: optimizer.step(zeros_P, 0),
        inner,
        copies,
        expected_std=expected,
        collective=collective,
    )


def _noise(change: Callable[..., torch.Tensor]) -> Any:
    """The noise of a slice, changed."""
    return mock.patch.object(
        optimizer_module,
        "integer_noise",
        lambda key, start, stop, std: change(key, start, stop, std),
    )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _an_update_per_microbatch() -> Any:
    original = DistributedDPOptimizer.step

    def step(self: Any, sum_P: torch.Tensor, step: int) -> Any:
        original(self, sum_P, step)
        return original(self, sum_P, step + 1)

    return mock.patch.object(DistributedDPOptimizer, "step", step)


def _weights_change_behind_the_optimizer() -> Any:
    original = DistributedDPOptimizer.step

    def step(self: Any, sum_P: torch.Tensor, step: int) -> Any:
        result = original(self, sum_P, step)
        with torch.no_grad():
            self._parameters[1][3] += 1e-3
        return result

    return mock.patch.object(DistributedDPOptimizer, "step", step)


def _one_worker_has_other_weights() -> Any:
    original = NoisySum.release_

    def release(self: Any, sum_P: torch.Tensor, **named: Any) -> torch.Tensor:
        released = original(self, sum_P, **named)
        if _rank() == 1:
            released[17] += 1 << 28
        return released

    return mock.patch.object(NoisySum, "release_", release)


def _every_worker_adds_noise() -> Any:
    original = NoisySum.release_

    def release(self: Any, sum_P: torch.Tensor, **named: Any) -> torch.Tensor:
        released = original(self, sum_P, **named)
        own_key = derive_key(KEY, "more", _rank())
        more = integer_noise(own_key, 0, len(released), std=self._std)
        self._collective.sum_(more)
        return released + more

    return mock.patch.object(NoisySum, "release_", release)


def _no_update() -> Any:
    return mock.patch.object(DistributedDPOptimizer, "step", lambda self, sum_P, step: None)


NOISE_BUGS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no noise": (lambda: _noise(lambda k, a, b, s: torch.zeros(b - a).long()), {}, "deviation is"),
    "one worker adds none": (
        lambda: _noise(lambda k, a, b, s: integer_noise(k, a, b, std=s) * (1 - _rank())),
        {},
        "deviation is",
    ),
    "sigma squared": (
        lambda: _noise(lambda k, a, b, s: integer_noise(k, a, b, std=s * SIGMA)),
        {},
        "deviation is",
    ),
    "sigma over root two": (
        lambda: _noise(lambda k, a, b, s: integer_noise(k, a, b, std=s / math.sqrt(2))),
        {},
        "deviation is",
    ),
    "ten per cent too little": (
        lambda: _noise(lambda k, a, b, s: integer_noise(k, a, b, std=s * 0.9)),
        {},
        "deviation is",
    ),
    "every worker adds noise": (_every_worker_adds_noise, {}, "deviation is"),
    "divided by the number of workers": (nullcontext, {"divisor": 2 * DIVISOR}, "deviation is"),
    "a shifted mean": (
        lambda: _noise(lambda k, a, b, s: integer_noise(k, a, b, std=s * 0.99) + int(s * 0.12)),
        {},
        "mean is not zero",
    ),
    "all workers draw the same": (
        lambda: _noise(lambda k, a, b, s: integer_noise(k, 0, b - a, std=s)),
        {},
        "workers 0 and 1 drew the same noise",
    ),
    "lost in half precision": (
        nullcontext,
        {"dtype": torch.float16, "divisor": 2.0**40, "expected": SIGMA / 2.0**40},
        "deviation is",
    ),
    "an update per microbatch": (_an_update_per_microbatch, {}, "made 2 updates"),
    "weights change elsewhere": (_weights_change_behind_the_optimizer, {}, "did not move"),
    "no update at all": (_no_update, {}, "deviation is"),
    "other weights on one worker": (_one_worker_has_other_weights, {}, "differ between"),
    "noise where none should be": (nullcontext, {"expected": 0.0}, "told to have none"),
}


def noise_outcomes(collective: Collective) -> dict[str, str]:
    found = {}
    for name, (bug, settings, _) in NOISE_BUGS.items():
        with bug():
            found[name] = said(lambda rest: measure(collective, **rest), settings)
    return found


@pytest.mark.parametrize("bug", NOISE_BUGS)
def test_noise_that_is_missing_wrong_or_repeated_is_caught_on_every_worker(bug):
    reason = NOISE_BUGS[bug][2]
    texts = [outcome["noise bugs"][bug] for outcome in asked(2)]
    assert any(reason in text for text in texts), texts
    assert all(reason in text or "another worker measured a fault" in text for text in texts)


def measured(collective: Collective) -> list[Any]:
    quiet = {"quiet": True, "expected": 0.0}
    return [measure(collective), measure(collective, adam=True), measure(collective, **quiet)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_stated_noise_reaches_the_weights_of_every_worker(workers):
    readings = [outcome["noise"] for outcome in asked(workers)]
    assert all(reading == readings[0] for reading in readings)  # the same numbers everywhere
    plain, adam, quiet = readings[0]
    for reading in (plain, adam):
        assert reading.low < reading.measured_std < reading.high
        assert math.isclose(reading.measured_std, SIGMA / DIVISOR, rel_tol=4 / math.sqrt(2 * P))
    assert math.isclose(plain.moved, 0.1 * plain.measured_std * math.sqrt(P), rel_tol=1e-5)
    assert math.isclose(
        adam.moved, 0.1 * math.sqrt(P), rel_tol=1e-3
    )  # Adam's first step: lr * sign
    assert quiet.measured_std == quiet.moved == 0.0


def test_the_bounds_are_those_of_chi_square_at_the_stated_alpha():
    reading = measure(SoloCollective())
    width = (reading.high - reading.low) / reading.expected_std
    six_sigma = 2 * 6.11 / math.sqrt(2 * P)  # the normal limit: 6.11 standard errors at 1e-9
    assert ALPHA == 1e-9 and math.isclose(width, six_sigma, rel_tol=0.01)


# --- what must not move ---------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.learning = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4).requires_grad_(False)
        self.register_buffer("table", torch.tensor([1.0, float("nan"), 0.0]))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.kept = torch.zeros(2)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.norm(self.frozen(self.learning(rows)))


TRAINABLE = ["learning.weight", "learning.bias"]


def _set(path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Net], None]:
    def apply(model: Net) -> None:
        owner, _, name = path.rpartition(".")
        tensor = getattr(model.get_submodule(owner), name)
        tensor.data = change(tensor.data.clone())

    return apply


def _lowest_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int32).view(-1)[0] ^= 1
    return tensor


CHANGES: dict[str, tuple[Callable[[Net], object], str]] = {
    "a bit of a frozen weight": (
        _set("frozen.weight", _lowest_bit),
        r"the parameter frozen\.weight",
    ),
    "a bit of a buffer": (_set("table", _lowest_bit), "the buffer table"),
    "the sign of a zero": (_set("table", lambda t: t * torch.tensor([1.0, 1.0, -1.0])), "table"),
    "a buffer that is not saved": (_set("hidden", lambda t: t + 1), "the buffer hidden"),
    "a tensor beside the buffers": (_set("kept", lambda t: t + 1), "the tensor .kept"),
    "statistics of a frozen batch norm": (
        lambda model: model.train()(torch.randn(8, 4)),
        r"the buffer norm\.running_mean",
    ),
    "the type of a buffer": (_set("hidden", lambda t: t.double()), "the buffer hidden"),
    "a new buffer": (
        lambda model: model.frozen.register_buffer("seen", torch.zeros(1)),
        r"the buffer frozen\.seen",
    ),
    "a buffer that is gone": (lambda model: delattr(model, "hidden"), "the buffer hidden"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_what_is_frozen_is_named(change):
    model = Net().eval()
    state = FrozenState(model, TRAINABLE)
    state.verify()
    how, name = CHANGES[change]
    how(model)
    with pytest.raises(PrivacyError, match=name):
        state.verify()


def test_trainable_parameters_may_change_and_passes_in_eval_mode_change_nothing():
    model = Net().eval()
    state = FrozenState(model, TRAINABLE)
    with torch.no_grad():
        for name in TRAINABLE:
            model.get_parameter(name).add_(1.0)
    model(torch.randn(8, 4)).sum().backward()
    state.verify()


def test_a_trainable_name_that_is_not_in_the_model_is_refused():
    with pytest.raises(PrivacyError, match=r"learning\.wait is not in the model"):
        FrozenState(Net(), ["learning.wait"])


def parameter_outcomes(collective: Collective) -> list[Any]:
    torch.manual_seed(0)
    parameters = {name: torch.randn(50) for name in ("first", "second", "third")}
    found = [
        said(refuse_different_parameters, parameters, collective),
        same_on_all_workers(parameters.values(), collective),
    ]
    if collective.rank == 1:
        _lowest_bit(parameters["second"])
        parameters["third"][0] = -0.0
    else:
        parameters["third"][0] = 0.0
    return [
        *found,
        said(refuse_different_parameters, parameters, collective),
        same_on_all_workers([parameters["first"]], collective),
        same_on_all_workers([parameters["third"]], collective),
    ]


def test_one_bit_that_differs_between_workers_is_noticed_by_all_and_named():
    for outcome in asked(2):
        right, same, said_, first, third = outcome["parameters"]
        assert right == "" and same is True and first is True and third is False
        assert "values of second" in said_
