"""Who updates what from a private step: the same bits, once, whoever does it."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from dpldm_dist.config import Config, parse_config
from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.blocks import BLOCK
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisySum
from dpldm_dist.privacy.selfcheck import measure_noise
from dpldm_dist.runtime.checkpoint import Checkpoints
from dpldm_dist.runtime.collective import GroupCollective, SoloCollective
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.strategy import PrivateUpdate, private_update, shares_update
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.finetune import finetune
from tests.privacy.mechanism_checks import CLIP_NORM, GRID, SIGMA, mechanism
from tests.processes import on_workers
from tests.stages.test_finetune import crash
from tests.stages.tiny_run import (
    TEST_KEY,
    latent_shards,
    public_model,
    released_weights,
    settings,
)

WIDE, NARROW = (101, 150, 7), (41, 30, 2)  # rows of parameters of 61 each: 4 blocks, and 2
EXTRA = 5


def made(
    collective: Collective, who: str, rows: tuple[int, ...] = WIDE, *, extra: int = EXTRA
) -> tuple[dict[str, torch.nn.Parameter], PrivateUpdate, DistributedDPOptimizer]:
    parameters = {f"p{i}": torch.nn.Parameter(torch.full((n, 61), 0.1)) for i, n in enumerate(rows)}
    run = parse_config({"run": {"update": who}}).run
    worker = Worker(collective.rank, collective.world_size, 0, torch.device("cpu"), collective)
    update = private_update(
        parameters, partial(torch.optim.Adam, lr=0.01), run=run, worker=worker, extra=extra
    )
    optimizer = DistributedDPOptimizer(
        update,
        update.parameters,
        mechanism(collective),
        grid=GRID,
        clip_norm=CLIP_NORM,
        divisor=20.0,
        extra=extra,
        sharded=update.bounds is not None,
    )
    return parameters, update, optimizer


def run(
    collective: Collective,
    who: str,
    rows: tuple[int, ...] = WIDE,
    *,
    steps: range = range(6),
    begun: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """Steps whose sums follow the parameters: one wrong bit changes all later noise."""
    parameters, update, optimizer = made(collective, who, rows)
    if begun is not None:
        start = 0
        for parameter in parameters.values():
            stop = start + parameter.numel()
            parameter.data.copy_(begun[0][start:stop].view_as(parameter))
            start = stop
        update.load(begun[1])
    norms, extras = [], []
    for step in steps:
        flat_P = torch.cat(
            [p.detach().flatten() for p in parameters.values()] + [torch.ones(EXTRA)]
        )
        sum_P = (torch.sin(7 * flat_P).double() / GRID / 100).to(torch.int64)
        noisy = optimizer.step(sum_P * (collective.rank == 0), step)
        norms.append(noisy.norm)
        extras.append(noisy.extra)
    return {
        "parameters": torch.cat([p.detach().flatten() for p in parameters.values()]),
        "state": update.state(),
        "norms": norms,
        "extras": torch.stack(extras),
        "owned": sum(v["exp_avg"].numel() for v in update.optimizer.state.values()),
    }


def everything(collective: Collective) -> dict[str, Any]:
    found = {(who, rows): run(collective, who, rows) for who in ("whole", "sharded")
             for rows in (WIDE, NARROW)}  # fmt: skip
    half = run(collective, "sharded", steps=range(3))
    begun = half["parameters"], half["state"]
    found["resumed"] = run(collective, "whole", steps=range(3, 6), begun=begun)
    found["resumed sharded"] = run(collective, "sharded", steps=range(3, 6), begun=begun)
    found["begun"] = begun
    found["bugs"] = {bug: trial(collective, bug) for bug in PLANTED}
    return found


@pytest.fixture(scope="module")
def alone():
    return {rows: run(SoloCollective(), "auto", rows) for rows in (WIDE, NARROW)}


@pytest.fixture(scope="module")
def together():
    """Number of workers -> what each of them found."""
    return {workers: on_workers(workers, everything) for workers in (2, 3)}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return torch.equal(one["parameters"], other["parameters"]) and all(
        torch.equal(value, other["state"][name]) for name, value in one["state"].items()
    )


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("who", ["whole", "sharded"])
def test_steps_and_optimizer_state_have_the_bits_of_one_process(alone, together, workers, who):
    """With two blocks, a worker of three owns none."""
    for found in together[workers]:
        for rows in (WIDE, NARROW):
            assert same(alone[rows], found[who, rows])
            assert torch.equal(alone[rows]["extras"], found[who, rows]["extras"])
            assert found[who, rows]["norms"] == pytest.approx(alone[rows]["norms"], rel=1e-12)


def test_the_optimizer_state_of_a_worker_is_that_of_its_slice(together):
    length = 61 * sum(WIDE)
    for workers, found in together.items():
        owned = [one["sharded", WIDE]["owned"] for one in found]
        assert sum(owned) == length and max(owned) <= length // workers + BLOCK
        assert [one["whole", WIDE]["owned"] for one in found] == [length] * workers


def test_a_sharded_state_goes_on_whole_and_on_another_number_of_workers(alone, together):
    for found in together.values():
        for one in found:
            assert same(alone[WIDE], one["resumed"]) and same(alone[WIDE], one["resumed sharded"])
    on_one = run(SoloCollective(), "auto", steps=range(3, 6), begun=together[3][0]["begun"])
    assert same(alone[WIDE], on_one)


def test_few_parameters_are_updated_by_everybody_and_many_in_slices():
    config = parse_config({"run": {"workers": 2}}).run
    worker = Worker(0, 2, 0, torch.device("cpu"), SoloCollective())
    assert not shares_update(10_000, run=config, worker=worker)
    assert shares_update(100_000_000, run=config, worker=worker)


# --- planted bugs ---------------------------------------------------------------------------------


def _two_owners() -> Any:
    original = NoisySum._add_noise

    def add(self: NoisySum, total: torch.Tensor, bounds: Any, key: bytes) -> tuple[int, int]:
        wider = [*bounds]
        wider[1] += 1  # the first worker's last block is the second's too
        if self._collective.rank == 0:
            return original(self, total, wider, key)
        return original(self, total, bounds, key)

    return mock.patch.object(NoisySum, "_add_noise", add)


def _a_slice_that_nobody_updates() -> Any:
    original = torch.optim.Adam.step

    def step(self: Any, closure: Any = None) -> Any:
        return original(self, closure) if torch.distributed.get_rank() != 1 else None

    return mock.patch.object(torch.optim.Adam, "step", step)


def _parameters_are_not_gathered() -> Any:
    return mock.patch.object(
        DistributedDPOptimizer, "_gather_parameters", lambda self, bounds: None
    )


def _a_slice_without_noise() -> Any:
    original = NoisySum._add_noise

    def add(self: NoisySum, total: torch.Tensor, bounds: Any, key: bytes) -> tuple[int, int]:
        before = total.clone()
        filled = original(self, total, bounds, key)
        if self._collective.rank == 1:
            total.copy_(before)
        return filled

    return mock.patch.object(NoisySum, "_add_noise", add)


def _a_mean_over_workers() -> Any:
    original = DistributedDPOptimizer._update

    def update(self: Any, mean_P: torch.Tensor, mine: range) -> None:
        original(self, mean_P / self._collective.world_size, mine)

    return mock.patch.object(DistributedDPOptimizer, "_update", update)


def _everybody_sums_only_its_own() -> Any:
    """Nothing is summed: with a sum of zeros the noise alone cannot tell, the bits of steps do."""
    return mock.patch.object(GroupCollective, "sum_slices_", lambda self, tensor, bounds: None)


PLANTED: dict[str, tuple[Any, str]] = {
    "none": (contextlib.nullcontext, ""),
    "noise added by two owners": (_two_owners, "exactly once"),
    "a slice that nobody updates": (_a_slice_that_nobody_updates, "reaches the weights"),
    "parameters are not gathered": (_parameters_are_not_gathered, "differ between the workers"),
    "a slice without noise": (_a_slice_without_noise, "standard deviation"),
    "a mean over workers": (_a_mean_over_workers, "standard deviation"),
}


def trial(collective: Collective, bug: str) -> str:
    """What the check of a start says of a sharded update with a planted bug."""
    with PLANTED[bug][0]():
        _, update, optimizer = made(collective, "sharded", extra=0)
        with torch.no_grad():
            for piece in update.parameters:
                piece.zero_()
        try:
            measure_noise(
                lambda: optimizer.step(torch.zeros(61 * sum(WIDE), dtype=torch.int64), 0),
                update.optimizer,
                update.parameters,
                expected_std=SIGMA / 20.0,
                collective=collective,
                bounds=update.bounds,
            )
        except PrivacyError as error:
            return str(error)
        finally:
            collective.barrier()
    return ""


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_of_a_sharded_update_is_caught_before_a_step(together, bug):
    for found in together.values():
        texts = [one["bugs"][bug] for one in found]
        assert any(PLANTED[bug][1] in text for text in texts) and all(
            bool(text) == (bug != "none") for text in texts
        )


def unsummed(collective: Collective) -> dict[str, Any]:
    with _everybody_sums_only_its_own():
        return run(collective, "sharded")


def test_a_sum_that_lacks_a_worker_changes_the_release(alone):
    assert not same(alone[WIDE], on_workers(2, unsummed)[1])


# --- the real stage -------------------------------------------------------------------------------


def test_private_training_in_slices_releases_what_one_process_releases(tmp_path):
    public_model(tmp_path / "model")
    latent_shards(tmp_path / "latents")
    for workers in (1, 2):
        place = {"dir": str(tmp_path / f"on-{workers}"), "workers": workers}
        config = settings(
            tmp_path,
            finetune={"steps": 4, "statistics_noise": None},
            run={**place, "update": "sharded", "unsafe_test_key": TEST_KEY},
        )
        RunDir(config.run.dir).create()
        launch([Job(finetune, config)], run=config.run)
    alone, two = (released_weights(tmp_path, f"on-{workers}") for workers in (1, 2))
    assert alone.keys() == two.keys() and all(torch.equal(alone[n], two[n]) for n in alone)
    saved = [Checkpoints(RunDir(tmp_path / f"on-{n}").checkpoints, keep=2).latest() for n in (1, 2)]
    for name, value in saved[0].tensors.items():
        assert torch.allclose(value, saved[1].tensors[name], rtol=1e-12, atol=0), name


@pytest.mark.soak
@pytest.mark.parametrize("place", ["before the bind", "after the bind", "after the release"])
def test_a_run_in_slices_that_is_killed_repeats_its_releases_on_another_number_of_workers(
    tmp_path, place
):
    public_model(tmp_path / "model")
    latent_shards(tmp_path / "latents")

    def config(name: str, workers: int) -> Config:
        run = {"dir": str(tmp_path / name), "workers": workers, "update": "sharded"}
        return settings(tmp_path, name, run=run | {"unsafe_test_key": TEST_KEY})

    def start(config: Config) -> None:
        RunDir(config.run.dir).create()
        launch([Job(finetune, config)], run=config.run)

    start(config("unbroken", 1))
    assert crash(config("killed", 3), f"{place}:5").returncode != 0
    start(config("killed", 2))
    unbroken, killed = (released_weights(tmp_path, name) for name in ("unbroken", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in unbroken.items())
    summary = read_ledger(RunDir(tmp_path / "killed").ledger)
    assert summary.steps == 10  # no extra charge
