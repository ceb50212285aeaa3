"""Frozen weights divided over workers: the same release, equally many passes, shards that stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dpldm_dist.config import Config, parse_config
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.errors import ConfigError
from dpldm_dist.models.directory import load_model
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.selfcheck import FrozenState
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.strategy import public_model as hold_publicly
from dpldm_dist.runtime.strategy import shard_frozen
from dpldm_dist.runtime.worker import Worker, solo_worker
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.finetune.preparation import trainable_model
from dpldm_dist.stages.finetune.private_data import PrivateData
from dpldm_dist.stages.finetune.state import TrainingState
from dpldm_dist.stages.mechanism import plan_of
from tests.processes import on_workers
from tests.stages.tiny_run import TEST_KEY, latent_shards, public_model, settings

STEPS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    public_model(folder / "model")
    latent_shards(folder / "latents")
    return folder


def private(root: Path, name: str, *, strategy: str = "fsdp", **finetune: Any) -> Config:
    """Twelve noisy steps of a fixed key in two lanes; most steps draw about three records."""
    chosen = {"steps": STEPS, "batch": 3, "optimizer": "adam", "trainable": "attention"}
    return settings(
        root,
        name,
        finetune=chosen | finetune,
        privacy={"noise_multiplier": 2.0, "lanes": 2},
        run={
            "dir": str(root / name),
            "strategy": strategy,
            "unsafe_test_key": TEST_KEY,
            "microbatch": 2,
        },
    )


def worker_of(collective: Collective) -> Worker:
    rank, world_size = collective.rank, collective.world_size
    return Worker(rank, world_size, rank, torch.device("cpu"), collective)


def run_all(collective: Collective, *configs: Config) -> None:
    for config in configs:
        if collective.rank == 0:
            RunDir(config.run.dir).create()
        collective.barrier()
        finetune(config, worker_of(collective))


def run_alone(config: Config) -> None:
    RunDir(config.run.dir).create()
    finetune(config, solo_worker())
