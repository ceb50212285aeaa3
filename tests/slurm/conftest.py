"""One Slurm cluster for all tests of this folder; without one they are skipped, but never in CI."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.sandbox import SlurmSandbox, why_not
from tests.slurm.tiny_job import TinyJob
from tests.stages.tiny_run import latent_shards, public_model


@pytest.fixture(scope="module")  # not longer: a machine has one at a time
def slurm(tmp_path_factory) -> Iterator[SlurmSandbox]:
    reason = why_not()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with SlurmSandbox(shares=[tmp_path_factory.getbasetemp()]) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def made_up_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    public_model(folder / "model")
    latent_shards(folder / "latents")
    return folder


@pytest.fixture
def tiny_job(slurm, tmp_path, made_up_data) -> Iterator[Callable[[str], TinyJob]]:
    """``tiny_job(name)``: a run directory and a config of its own. No job outlives its test."""
    yield lambda name: TinyJob(slurm, tmp_path / name, made_up_data)
    slurm.clear()
