"""Stages as jobs for a group of workers: named by module, described by a plain dict.

Workers get the *name* of a stage and its config, never a pickled function: nothing but public
settings crosses a process or a network.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpldm_dist.config import Config, RunConfig, parse_config
from dpldm_dist.errors import BringUpError
from dpldm_dist.runtime.rundir import RunDir, private_files
from dpldm_dist.runtime.starts import driver_facts, note_start
from dpldm_dist.runtime.stopping import StopRequest
from dpldm_dist.runtime.worker import Worker

_SECONDS = "stage_seconds.json"
Stage = Callable[[Config, Worker], Any]


@dataclass(frozen=True)
class Job:
    """One stage to run on all workers: a module-level function and its config.

    ``timed``: its seconds are noted in the run, for ``stage_seconds``. ``noted``: who runs it, and
    where, is noted there too, for ``status``.
    """

    stage: Stage
    config: Config
    timed: bool = False
    noted: bool = False


def job_order(jobs: Sequence[Job], *, run: RunConfig) -> dict[str, Any]:
    """Everything that a worker must know, JSON-able: jobs, run settings, where the driver is."""
    return {
        "folder": os.getcwd(),
        "path": [entry for entry in sys.path if entry],
        "run": run.model_dump(mode="json"),
        "driver": driver_facts(os.environ),
        "jobs": [
            {
                "stage": stage_name(job.stage),
                "config": job.config.model_dump(mode="json"),
                "timed": job.timed,
                "noted": job.noted,
            }
            for job in jobs
        ],
    }


def do_jobs(order: dict[str, Any], worker: Worker) -> None:
    """In a worker: run the jobs of ``order`` one after another.

    A barrier ends each job, so the next one finds on every worker what the last one wrote.
    Raises: SavedAndStopped if the run is asked to stop between two of them.
    """
    _stand_where_the_driver_stands(order)
    with private_files():
        for job in order["jobs"]:
            config, started = parse_config(job["config"]), time.monotonic()
            stop = StopRequest(RunDir(config.run.dir), worker)
            if stop.agreed():
                raise stop.leave("all stages before")
            if job["noted"]:
                stage = job["stage"].rpartition(":")[2]
                note_start(RunDir(config.run.dir), stage, order["driver"], worker)
            find_stage(job["stage"])(config, worker)
            worker.collective.barrier()
            if job["timed"] and worker.rank == 0:
                _note_seconds(RunDir(config.run.dir), job["stage"], time.monotonic() - started)


def stage_name(stage: Stage) -> str:
    """``module:function`` of a module-level function. Raises: TypeError for any other."""
    name = f"{stage.__module__}:{stage.__qualname__}"
    if stage.__module__ == "__main__" or "<" in name or find_stage(name) is not stage:
        raise TypeError(f"{name} cannot run in workers: expected a module-level function")
    return name


def find_stage(name: str) -> Stage:
    """The function that :func:`stage_name` named."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def run_dirs(jobs: Sequence[Job]) -> list[RunDir]:
    """The run directories of the jobs, each once."""
    return [RunDir(root) for root in dict.fromkeys(job.config.run.dir for job in jobs)]


def stage_seconds(run: RunDir) -> dict[str, float]:
    """Seconds that each timed stage took, over all its starts."""
    path = run.private / _SECONDS
    return json.loads(path.read_text()) if path.is_file() else {}


def _note_seconds(run: RunDir, stage: str, seconds: float) -> None:
    if run.private.is_dir():
        name, spent = stage.rpartition(":")[2].lstrip("_"), stage_seconds(run)
        spent[name] = round(spent.get(name, 0.0) + seconds, 1)
        (run.private / _SECONDS).write_text(json.dumps(spent) + "\n")


def _stand_where_the_driver_stands(order: dict[str, Any]) -> None:
    """Same working folder, so that relative paths mean the same; same modules within reach.

    Raises: BringUpError if this machine does not have the folder and the run directory needs it.
    """
    sys.path.extend(entry for entry in order["path"] if entry not in sys.path)
    folder = Path(order["folder"])
    if folder.is_dir():
        os.chdir(folder)
    elif not Path(order["run"]["dir"]).is_absolute():
        raise BringUpError(
            f"Machine {socket.gethostname()} has no folder {folder}: start from a folder that "
            "all machines share, or give run.dir and data paths as absolute shared paths."
        )
