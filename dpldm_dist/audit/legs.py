"""The data sets of an audit, and the jobs between its runs. No private data is read anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from dpldm_dist.audit.point import Point, canary_latents, restart_step
from dpldm_dist.config import Config
from dpldm_dist.data.latents import LatentRecord, write_latent_shard, write_latents_manifest
from dpldm_dist.errors import SavedAndStopped
from dpldm_dist.runtime.checkpoint import Checkpoint, Checkpoints
from dpldm_dist.runtime.jobs import Job
from dpldm_dist.runtime.rundir import RunDir, private_files
from dpldm_dist.runtime.stopping import StopRequest
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.finetune import finetune

_NO_VARIANCE = -20.0  # log-variance of a canary's posterior: its latent is the same in every draw
_NUDGE = 1e-3  # relative change of restored weights


def jobs(legs: Mapping[str, Config]) -> list[Job]:
    """What the workers do for ``legs``, in this order, in one start."""
    order = [
        (finetune, "reference"),
        (until_restart, "noisy"),
        (copy_with_other_weights, "other-weights"),
        (copy_noisy_run, "other-data"),
        (finetune, "noisy"),
        (finetune, "other-weights"),
        (finetune, "other-data"),
        (finetune, "selection"),
        *((drop_model, name) for name in legs),
    ]
    return [Job(stage, legs[name]) for stage, name in order if name in legs]


def write_data(config: Config, folder: Path, point: Point, included_M: np.ndarray) -> None:
    """The four sets of records in ``folder``: all canaries, the included ones, one, and a few."""
    latents = canary_latents(point.canaries, point.latent_shape).numpy()
    chosen = {
        "all": np.arange(point.canaries),
        "included": np.flatnonzero(included_M),
        "one": np.flatnonzero(included_M)[:1],
        "few": np.arange(point.selection_records),
    }
    for name, canaries in chosen.items():
        _write_set(config, folder / name, latents, canaries)


def until_restart(config: Config, worker: Worker) -> None:
    """The noisy run up to its restart: it is told that its machine is taken away, saves and stops.

    Raises: SavedAndStopped if somebody else asked it to stop.
    """
    asked_at = count(1)

    def preempted() -> bool:
        return worker.preempted() or next(asked_at) >= restart_step(config.finetune.steps)

    try:
        finetune(config, replace(worker, preempted=preempted))
    except SavedAndStopped:
        if StopRequest(RunDir(config.run.dir), worker).agreed():
            raise


def copy_noisy_run(config: Config, worker: Worker) -> None:
    """Make this run a copy of the stopped noisy run, as a snapshot of its directory would be."""
    _copy(config, worker, nudge=0.0)


def copy_with_other_weights(config: Config, worker: Worker) -> None:
    """The same, with weights that are a little different: its sums will be others."""
    _copy(config, worker, nudge=_NUDGE)


def drop_model(config: Config, worker: Worker) -> None:
    """Remove the copy of the network from a finished run; the table of classes stays."""
    if worker.rank == 0:
        model = RunDir(config.run.dir).released_model
        for part in ("unet", "vae"):
            shutil.rmtree(model / part, ignore_errors=True)
    worker.collective.barrier()


def _write_set(config: Config, folder: Path, latents: np.ndarray, canaries: np.ndarray) -> None:
    """Two shards per lane at least, so that lanes and shards both take part in what is tested."""
    per_shard = max(1, -(-len(canaries) // (2 * config.privacy.lanes)))
    images, views = config.data.max_images_per_unit, 1 + config.data.flips
    entries = []
    for number, start in enumerate(range(0, len(canaries), per_shard)):
        records = []
        for canary in canaries[start : start + per_shard]:
            mean = latents[canary]
            moments = np.concatenate([mean, np.full_like(mean, _NO_VARIANCE)])
            copies = np.broadcast_to(moments, (images, views, *moments.shape))
            records.append(LatentRecord(f"canary{canary}", copies, [int(canary)] * images))
        name = f"latents-{number:05d}.tar"
        entries.append(
            write_latent_shard(
                folder, name, records, images_per_record=images, source="audit", private=True
            )
        )
    write_latents_manifest(
        folder,
        entries,
        classes=[str(n) for n in range(len(latents))],
        config={},
        parents={},
        private=True,
        facts={"unit": config.data.unit},
    )


def _copy(config: Config, worker: Worker, *, nudge: float) -> None:
    if worker.rank == 0:
        run = RunDir(config.run.dir)
        source = RunDir(run.root.parent / "noisy")
        with private_files():
            shutil.copyfile(source.key, run.key)
            shutil.copyfile(source.ledger, run.ledger)
        *_, saved = Checkpoints(source.checkpoints, keep=1).history()
        copies = Checkpoints(run.checkpoints, keep=config.run.checkpoint_keep)
        copies.save(saved.step, _nudged(saved, nudge), saved.facts)
    worker.collective.barrier()


def _nudged(saved: Checkpoint, nudge: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = dict(saved.tensors)
    for name in sorted(tensors):
        if name.startswith("parameter/"):
            factor = 1 + nudge * torch.randn(tensors[name].shape, generator=generator)
            tensors[name] = tensors[name] * factor
    return tensors
