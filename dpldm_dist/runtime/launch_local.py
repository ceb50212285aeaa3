"""Workers as processes of this machine: spawned, joined over loopback, watched by their pipes.

Each worker holds one end of a pipe. It reports its end through it; when the driver is gone, the
pipe closes and the worker leaves at once. Gloo and the store listen on 127.0.0.1 only.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpldm_dist.config import RunConfig
from dpldm_dist.errors import DpldmError, SavedAndStopped
from dpldm_dist.runtime.collective import GroupCollective
from dpldm_dist.runtime.failures import explain, explain_death, root_cause
from dpldm_dist.runtime.jobs import do_jobs
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.stopping import ask_on_signals
from dpldm_dist.runtime.worker import Worker, set_threads, worker_device

_LOOPBACK = "127.0.0.1"
_GRACE_S = 3.0  # for the other workers to say what they saw, once one has failed
_DONE = "done"


@dataclass(frozen=True)
class _Child:
    rank: int
    process: BaseProcess
    pipe: Connection


def launch_local(order: dict[str, Any], *, run: RunConfig) -> None:
    """Run ``order`` (see jobs.job_order) on ``run.workers`` spawned processes.

    Raises: the root cause (see failures.root_cause). No process outlives the call.
    """
    store = _loopback_store(run.workers)
    with _children(order, run=run, port=store.port) as children:
        errors = _watch(children, run=run)
    if errors:
        raise root_cause(errors)


def _loopback_store(workers: int) -> dist.TCPStore:
    """A store on a free port. We listen ourselves: torch's own server answers on all interfaces."""
    listener = socket.create_server((_LOOPBACK, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        _LOOPBACK,
        port,
        workers,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


@contextmanager
def _children(order: dict[str, Any], *, run: RunConfig, port: int) -> Iterator[list[_Child]]:
    """Started workers; all are gone afterwards, also after KeyboardInterrupt."""
    context = multiprocessing.get_context("spawn")
    children: list[_Child] = []
    try:
        for rank in range(run.workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, order, port, theirs), name=f"worker-{rank}"
            )
            process.start()
            theirs.close()  # so that a dead worker closes the pipe
            children.append(_Child(rank, process, ours))
        yield children
    finally:
        _end(children)


def _watch(children: list[_Child], *, run: RunConfig) -> dict[int, DpldmError]:
    """Wait until all workers are done, or some failed; the errors by rank."""
    errors: dict[int, DpldmError] = {}
    waiting = {child.process.sentinel: child for child in children}
    deadline: float | None = None
    while waiting:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        for sentinel in wait(list(waiting), timeout=left):
            child = waiting.pop(sentinel)
            error = _last_word(child)
            if error is not None:
                errors[child.rank] = error
                deadline = time.monotonic() + _patience_s(error, run=run)
    return errors


def _patience_s(error: DpldmError, *, run: RunConfig) -> float:
    return run.timeout_s if isinstance(error, SavedAndStopped) else _GRACE_S


def _last_word(child: _Child) -> DpldmError | None:
    """What a worker that has ended reported: nothing if it is done, else its error."""
    child.process.join()
    try:
        word = child.pipe.recv() if child.pipe.poll() else None
    except EOFError:
        word = None
    if isinstance(word, DpldmError):
        return word
    return None if word == _DONE else explain_death(child.rank, child.process.exitcode)


def _end(children: list[_Child]) -> None:
    for child in children:
        child.process.kill()  # SIGTERM asks to save; by now there is nobody to save with
    for child in children:
        child.process.join()
        child.pipe.close()


def _work(rank: int, order: dict[str, Any], port: int, pipe: Connection) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which ends us
    ask_on_signals([RunDir(job["config"]["run"]["dir"]) for job in order["jobs"]])
    threading.Thread(target=_leave_with_driver, args=(pipe,), daemon=True).start()
    run = RunConfig.model_validate(order["run"])
    try:
        _join_group_and_work(rank, order, port, run)
    except BaseException as error:
        pipe.send(explain(error, rank=rank, run_dir=Path(run.dir)))
        os._exit(1)  # no destructor may wait for the peers
    pipe.send(_DONE)


def _leave_with_driver(pipe: Connection) -> None:
    try:
        pipe.recv()  # the driver never sends: this ends when the driver does
    except (EOFError, OSError):
        os._exit(1)


def _join_group_and_work(rank: int, order: dict[str, Any], port: int, run: RunConfig) -> None:
    interface = "lo0" if sys.platform == "darwin" else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    set_threads(run, workers_here=run.workers)
    device = worker_device(run, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=run.timeout_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.TCPStore(_LOOPBACK, port, run.workers, is_master=False, timeout=timeout),
        rank=rank,
        world_size=run.workers,
        timeout=timeout,
    )
    do_jobs(order, Worker(rank, run.workers, rank, device, GroupCollective(device)))
    dist.destroy_process_group()
