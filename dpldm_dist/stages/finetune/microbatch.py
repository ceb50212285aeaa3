"""How many records a forward pass takes where ``run.microbatch`` is "auto": measured once, kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import torch

from dpldm_dist.config import Config
from dpldm_dist.data.files import write_file
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.errors import ConfigError
from dpldm_dist.models.directory import load_model
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.runtime.memory import MemoryWatch, free_bytes
from dpldm_dist.runtime.rundir import KEY_BYTES, RunDir
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.finetune.preparation import public_model_dir, trainable_model
from dpldm_dist.stages.finetune.private_data import PrivateData
from dpldm_dist.stages.mechanism import microbatch_record

_SPARED = "activation_checkpointing"
_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of the free memory: the rest is for what grows, and for pieces


def with_settled_microbatch(
    config: Config, plan: PrivacyPlan, run: RunDir, latents: LatentShards, worker: Worker
) -> PrivacyPlan:
    """``plan`` with the microbatch of this run. All workers take part and agree.

    Where it is "auto" and no start has settled it yet, passes over 2, 4, 8, ... made-up records are
    run and their memory is measured, as far as every worker's device holds them and a lane fills
    them. The last that fits is written to ``public/microbatch.json``, and later starts use it.
    Raises: ConfigError if not even two records fit, or if it was measured with less memory.
    """
    if config.run.microbatch != "auto":
        return plan
    if not worker.collective.broadcast_json(microbatch_record(run) is not None):
        most = int(_SHARE[worker.device.type] * free_bytes(worker))
        measured = _measure(config, plan, run, latents, worker, most=most)
        fits = [records for records, peak in measured if _all(peak <= most, worker)]
        if not fits:
            raise ConfigError(
                f"run.microbatch = auto: a pass over two records takes {measured[0][1]:,} bytes; "
                f"expected at most {most:,} on this worker, or less on another. Lower "
                "finetune.draws, take a smaller model, set run.activation_checkpointing=true, or "
                "divide the model over workers (run.strategy = fsdp)."
            )
        if worker.rank == 0:
            _record(config, run, fits[-1], measured, most, worker.device)
        worker.collective.barrier()
    record = worker.collective.broadcast_json(microbatch_record(run))
    if record.get(_SPARED) and not config.run.activation_checkpointing:
        raise ConfigError(
            f"{run.microbatch} was measured with run.activation_checkpointing = true, and passes "
            "without it take more memory: expected the same. Set it, or give "
            "run.microbatch as a number."
        )
    return replace(plan, microbatch=record["microbatch"])


def candidates(*, batch: float, lanes: int) -> list[int]:
    """2, 4, 8, ... up to what holds the records that a lane draws in a step: more is padding."""
    filled = max(2, math.ceil(batch / lanes))
    return [2**power for power in range(1, math.ceil(math.log2(filled)) + 1)]


def foretold(measured: list[tuple[int, int]], records: int) -> int:
    """Bytes of a larger pass, on the line through the last two (records, bytes)."""
    if len(measured) < 2:
        return 0
    (fewer, less), (last, peak) = measured[-2:]
    return peak + (records - last) * max(0, peak - less) // (last - fewer)


def _measure(
    config: Config,
    plan: PrivacyPlan,
    run: RunDir,
    latents: LatentShards,
    worker: Worker,
    *,
    most: int,
) -> list[tuple[int, int]]:
    """(records, bytes) of passes on a copy of the public model, until the next would not fit."""
    public = load_model(public_model_dir(config, run))
    denoiser, parameters = trainable_model(config, public, latents, worker)
    watch = MemoryWatch(worker.device)
    measured: list[tuple[int, int]] = []
    for records in candidates(batch=plan.divisor, lanes=plan.lanes):
        if not _all(foretold(measured, records) <= most, worker):
            break
        data = PrivateData(
            config,
            replace(plan, microbatch=records),
            latents,
            bytes(KEY_BYTES),
            0,
            public.diffusion,
            worker,
        )
        data.try_out(denoiser, parameters)
        measured.append((records, watch.peak()))
    return measured


def _all(holds: bool, worker: Worker) -> bool:
    """Whether it holds for every worker."""
    return not worker.most(int(not holds))


def _record(
    config: Config,
    run: RunDir,
    chosen: int,
    measured: list[tuple[int, int]],
    most: int,
    device: torch.device,
) -> None:
    facts = {
        "microbatch": chosen,
        "device": device.type,
        _SPARED: config.run.activation_checkpointing,
        "bytes_at_most": most,
        "bytes_by_records": dict(measured),
    }
    write_file(run.microbatch, (json.dumps(facts, indent=1) + "\n").encode(), private=False)
