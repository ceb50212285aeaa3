"""Run a function on a real gloo group of processes and collect what each returns."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import queue
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dpldm_dist.runtime.collective import GroupCollective, SoloCollective

ROOT = Path(__file__).parents[1]


def warm_processes() -> Any:
    """A context whose processes are forked from one that has imported everything (tests/warm.py)."""
    context = multiprocessing.get_context("forkserver")
    # pytest: a child imports the program that its parent began with
    context.set_forkserver_preload(["pytest", "tests.warm"])
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        multiprocessing.forkserver.ensure_running()
    return context


def on_workers(
    world_size: int, function: Callable[..., Any], *arguments: Any, limit_s: int = 120
) -> list[Any]:
    """``function(collective, *arguments)`` on each of ``world_size`` processes; results by rank.

    An exception of a process is returned in its place as ``(class name, message)``. No result
    within ``limit_s`` is a failure.
    """
    if world_size == 1:
        return [_outcome(function, SoloCollective(), arguments)]
    context = warm_processes()
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(
                target=_work,
                args=(rank, world_size, str(Path(folder) / "store"), function, arguments, results),
            )
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        found = dict(_next(results, workers, limit_s) for _ in workers)
        for worker in workers:
            worker.join(timeout=60)
            assert worker.exitcode == 0
    return [found[rank] for rank in range(world_size)]


def _next(results: Any, workers: list[Any], limit_s: int) -> tuple[int, Any]:
    """The next result; a process that died without one fails the test at once."""
    for _ in range(10 * limit_s):
        try:
            return pickle.loads(results.get(timeout=0.1))
        except queue.Empty:
            dead = [w.exitcode for w in workers if w.exitcode not in (None, 0)]
            assert not dead, f"a worker died with exit code {dead[0]}"
    raise AssertionError(f"no result within {limit_s} s")


def _work(
    rank: int, world_size: int, store: str, function: Any, arguments: Any, results: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    outcome = _outcome(function, GroupCollective(torch.device("cpu")), arguments)
    results.put(
        pickle.dumps((rank, outcome))
    )  # tensors as bytes: no file of this process is needed
    results.close()
    results.join_thread()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads have aborted a process that was already done, at its very end


def _outcome(function: Any, collective: Any, arguments: Any) -> Any:
    try:
        return function(collective, *arguments)
    except Exception as error:
        return type(error).__name__, str(error)
