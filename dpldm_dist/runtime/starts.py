"""Who runs a stage and where: ``private/start.json``, written at every start, for ``status``."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dpldm_dist.runtime.rundir import RunDir

if TYPE_CHECKING:
    from dpldm_dist.runtime.worker import Worker

_WIDTH = 256  # bytes in which every worker presents itself


def driver_facts(environment: Mapping[str, str]) -> dict[str, Any]:
    """In the driver: its host and process, and the job of Slurm or Ray that it belongs to."""
    slurm = None
    if environment.get("SLURM_JOB_ID", "").isdigit():
        restart = int(environment.get("SLURM_RESTART_COUNT") or 0)
        slurm = {"job": int(environment["SLURM_JOB_ID"]), "restart": restart}
    return {
        "driver": {"host": socket.gethostname(), "process": os.getpid()},
        "slurm": slurm,
        "ray_job": _ray_job(environment),
    }


def note_start(run: RunDir, stage: str, facts: Mapping[str, Any], worker: Worker) -> None:
    """In every worker, at the same point: gather who they are; worker 0 writes it down (0600)."""
    me = {"host": socket.gethostname()[:100], "device": str(worker.device)}
    everyone = [json.loads(text) for text in _gather(json.dumps(me), worker)]
    if worker.rank == 0:
        note = {**facts, "stage": stage, "time": round(time.time()), "workers": everyone}
        part = (run.private / "start.json").with_suffix(".part")
        part.write_text(json.dumps(note) + "\n")
        part.replace(run.private / "start.json")


def last_start(run: RunDir) -> dict[str, Any] | None:
    """What the last start noted; None if there was none, or it cannot be read."""
    try:
        note = json.loads((run.private / "start.json").read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _gather(text: str, worker: Worker) -> list[str]:
    """Every worker's text, by rank."""
    import torch  # here: ``status`` reads notes without it

    everyone = torch.zeros(worker.world_size * _WIDTH, dtype=torch.uint8, device=worker.device)
    mine = bytearray(text.encode().ljust(_WIDTH))
    first = worker.rank * _WIDTH
    everyone[first : first + _WIDTH] = torch.frombuffer(mine, dtype=torch.uint8)
    bounds = [rank * _WIDTH for rank in range(worker.world_size + 1)]
    worker.collective.gather_slices_(everyone, bounds)
    found = bytes(everyone.cpu().tolist())
    return [found[start : start + _WIDTH].decode() for start in bounds[:-1]]


def _ray_job(environment: Mapping[str, str]) -> str | None:
    """The name under which this driver was submitted to a Ray cluster, or None."""
    try:
        facts = json.loads(environment["RAY_JOB_CONFIG_JSON_ENV_VAR"])
        return str(facts["metadata"]["job_submission_id"])
    except (KeyError, TypeError, ValueError):
        return None
