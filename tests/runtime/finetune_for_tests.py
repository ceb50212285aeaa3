"""The real fine-tuning stage, on a tiny run, under the orders of ``stages_for_tests.give_order``."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import stages_for_tests as stages

from dpldm_dist.config import Config
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import Worker, solo_worker
from dpldm_dist.stages import finetune as stage
from dpldm_dist.stages.finetune.private_data import PrivateData
from tests.stages.tiny_run import TEST_KEY, latent_shards, public_model, released_weights, settings

STEPS = 10  # of the tiny run


def tiny_config(
    root: Path, name: str, *, finetune: Mapping[str, Any] = MappingProxyType({}), **run: Any
) -> Config:
    """Of a run ``root/name`` with a fixed key, so that two runs can be compared bit by bit."""
    if not (root / "model").exists():
        public_model(root / "model")
        latent_shards(root / "latents")
    changes = {
        "dir": str(root / name),
        "unsafe_test_key": TEST_KEY,
        "timeout_s": 60.0,
        "threads": 1,
    }
    enough = {"noise_multiplier": 5.0} if finetune else {}  # for the budget, with more steps
    return settings(root, name, run=changes | run, finetune=dict(finetune), privacy=enough)


def unbroken_weights(root: Path) -> dict[str, Any]:
    """What one worker releases when nothing happens to it."""
    config = tiny_config(root, "unbroken")
    RunDir(config.run.dir).create()
    stage.finetune(config, solo_worker())
    return released_weights(root, "unbroken")


def weights_and_ledger(config: Config) -> tuple[dict[str, Any], Any]:
    root = Path(config.run.dir)
    return released_weights(root.parent, root.name), read_ledger(RunDir(root).ledger)


def finetune(config: Config, worker: Worker) -> Any:
    """Orders are obeyed where it hurts: a step is charged, and not yet released."""
    run, microbatches = RunDir(config.run.dir), PrivateData.microbatches
    stages.note_start(run, worker, step=-1)

    def obedient(self: PrivateData, step: int) -> Any:
        stages.obey(run, worker, step)
        return microbatches(self, step)

    PrivateData.microbatches = obedient
    try:
        return stage.finetune(config, worker)
    finally:
        PrivateData.microbatches = microbatches
