"""Private training checks itself: with a planted fault the real stage stops, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dpldm_dist.errors import PrivacyError
from dpldm_dist.models.conditioning import ClassEmbedder
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.privacy import optimizer as optimizer_module
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer
from dpldm_dist.privacy.sampling import Lanes
from dpldm_dist.runtime.checkpoint import Checkpoints
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.finetune.state import TrainingState
from tests.stages.tiny_run import settings


def _no_noise() -> Any:
    return mock.patch.object(
        optimizer_module,
        "integer_noise",
        lambda key, start, stop, std: torch.zeros(stop - start, dtype=torch.int64),
    )


def _a_shard_that_nobody_reads() -> Any:
    original = Lanes.shards_of_worker
    return mock.patch.object(
        Lanes, "shards_of_worker", lambda self, rank, size: original(self, rank, size)[1:]
    )


def _a_loss_that_knows_its_batch() -> Any:
    original = Diffusion.loss_rows

    def loss_rows(self: Diffusion, *arguments: Any) -> Tensor:
        loss_R = original(self, *arguments)
        return loss_R - 0.001 * loss_R.mean()

    return mock.patch.object(Diffusion, "loss_rows", loss_rows)


def _a_buffer_that_follows_the_data() -> Any:
    original = ClassEmbedder.forward

    def forward(self: ClassEmbedder, labels_R: Tensor) -> Tensor:
        with torch.no_grad():
            self.base.mul_(1 + 1e-6 * labels_R.float().mean())
        return original(self, labels_R)

    return mock.patch.object(ClassEmbedder, "forward", forward)


def _a_microbatch_that_is_lost() -> Any:
    original = Lanes.split
    return mock.patch.object(Lanes, "split", lambda self, chosen: list(original(self, chosen))[:-1])


AT_THE_START: dict[str, tuple[Callable[[], Any], str]] = {
    "no noise": (_no_noise, "noise that reaches the weights"),
    "a shard that nobody reads": (_a_shard_that_nobody_reads, "do not own every private record"),
    "a loss that knows its batch": (_a_loss_that_knows_its_batch, "influence each other"),
    "a buffer that follows the data": (_a_buffer_that_follows_the_data, "the buffer embedder.base"),
}


@pytest.mark.parametrize("fault", AT_THE_START)
def test_a_planted_fault_stops_the_run_before_anything_is_released(root, fault):
    plant, reason = AT_THE_START[fault]
    name = fault.replace(" ", "-")
    config = settings(root, name, finetune={"steps": 1})
    run = RunDir(config.run.dir).create()
    with plant(), pytest.raises(PrivacyError, match=reason):
        finetune(config, solo_worker())
    summary = read_ledger(run.ledger)
    assert summary.steps == summary.statistics == 0  # also the statistics before the first step
    assert not any(path.is_file() for path in run.release.rglob("*"))


def test_a_run_that_was_stopped_by_a_check_goes_on_when_the_fault_is_gone(root):
    config = settings(root, "mended", finetune={"steps": 1, "statistics_noise": None})
    run = RunDir(config.run.dir).create()
    with _a_shard_that_nobody_reads(), pytest.raises(PrivacyError):
        finetune(config, solo_worker())
    assert finetune(config, solo_worker()).facts["steps_done"] == 1
    assert read_ledger(run.ledger).steps == 1


def test_a_record_that_is_lost_on_its_way_into_a_step_stops_it_before_its_release(root):
    config = settings(root, "lost", finetune={"steps": 2})
    run = RunDir(config.run.dir).create()
    with _a_microbatch_that_is_lost(), pytest.raises(PrivacyError, match="each exactly once"):
        finetune(config, solo_worker())
    summary = read_ledger(run.ledger)
    assert summary.steps == 1  # charged, as the ledger cannot know
    assert summary.binds == summary.statistics == 1  # the sum of the step was never finished


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_a_frozen_part_that_changes_in_a_step_is_named_and_not_saved(root, what):
    config = settings(root, f"thawed-{what}", finetune={"steps": 3})
    run = RunDir(config.run.dir).create()
    denoisers: list[torch.nn.Module] = []
    original, freeze = DistributedDPOptimizer.step, TrainingState.freeze

    def step(self: DistributedDPOptimizer, *arguments: Any) -> Any:
        if denoisers:
            with torch.no_grad():
                unet, embedder = denoisers[0].unet, denoisers[0].embedder
                (unet.conv_in.weight if what == "parameter" else embedder.base).mul_(1.0001)
        return original(self, *arguments)

    def remember(self: TrainingState) -> None:
        freeze(self)
        denoisers.append(self.denoiser)

    name = {"parameter": r"unet\.conv_in\.weight", "buffer": r"embedder\.base"}[what]
    with (
        mock.patch.object(DistributedDPOptimizer, "step", step),
        mock.patch.object(TrainingState, "freeze", remember),
        pytest.raises(PrivacyError, match=f"changed the {what} {name}"),
    ):
        finetune(config, solo_worker())
    assert Checkpoints(run.checkpoints, keep=2).latest().step == 0
