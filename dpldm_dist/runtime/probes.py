"""What ``dpldm check`` has every worker look at: its machine, its peers, and the shared storage.

All workers call :func:`probe` at the same point. The facts hold nothing private.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import stat
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpldm_dist.config import RunConfig
from dpldm_dist.errors import ConfigError, PrivacyError, RunError
from dpldm_dist.runtime.memory import free_memory
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.slurm_job import Allocation
from dpldm_dist.runtime.worker import Worker, cores

PROBE_BYTES = 32 * 2**20
_REDUCTIONS = 5
_PATIENCE_S = 65.0  # network file systems may show a new file only after a minute


def probe(folder: Path, worker: Worker) -> dict[str, Any]:
    """The facts of this worker. ``folder``: an existing one in the run directory.

    Raises: RunError if this worker does not see what worker 0 writes there.
    """
    seen_s = _seconds_until_seen(folder, worker)
    reduce_s, barrier_s = _collectives(worker)
    return {
        "host": socket.gethostname(),
        "address": address_of_this_machine(),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME", ""),
        "device": str(worker.device),
        "device_name": _device_name(worker.device),
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "memory_free": free_memory(),
        "software": software(),
        "seen_s": seen_s,
        "second_lock": _second_lock(folder, worker),
        "clock_ahead_s": _clock_ahead(worker),
        "reduce_s": reduce_s,
        "barrier_s": barrier_s,
    }


def software() -> str:
    """What must be the same on all machines."""
    return (
        f"dpldm_dist {importlib.metadata.version('dpldm_dist')}, Python "
        f"{platform.python_version()}, torch {torch.__version__}"
    )


def allocation_here() -> Allocation | None:
    """The Slurm job that this process is part of, or None."""
    known = {"SLURM_JOB_ID", "SLURM_JOB_NODELIST"} <= os.environ.keys()
    return Allocation.read(os.environ) if known else None


def token_of_ray(run: RunConfig) -> str:
    """How the Ray of ``run`` keeps strangers out.

    Raises: PrivacyError if it lets anybody in who reaches its ports, or others can read its token;
    ConfigError if there is none to read.
    """
    if run.ray_address == "local":
        return "one of its own for every start"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise PrivacyError(
            f"The Ray at {run.ray_address} is joined without a token: whoever reaches its ports "
            "can run code as you, beside the private data. Start it, and dpldm, with "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE."
        )
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path is None:
        given = "RAY_AUTH_TOKEN" in os.environ
        return "from the environment" if given else "of this user (~/.ray/auth_token)"
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH = {path}: {error.strerror}.") from None
    if mode & 0o077:
        raise PrivacyError(
            f"Other users may read the token {path} (mode {mode:04o}): chmod 600 it."
        )
    return f"{path}, mode {mode:04o}"


def address_of_this_machine() -> str:
    """The address from which it would talk to others (nothing is sent), or that of its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:  # no way out of this network
            pass
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _seconds_until_seen(folder: Path, worker: Worker) -> float:
    """Until this worker reads what worker 0 has just written."""
    path, content = folder / "seen-by-all", worker.collective.broadcast_bytes(os.urandom(16))
    if worker.rank == 0:
        path.write_bytes(content)
    worker.collective.barrier()
    started, seen = time.monotonic(), False
    while not seen and time.monotonic() - started < _PATIENCE_S:
        seen = _reads(path, content)
        if not seen and not folder.is_dir():
            break  # another disk: waiting would not help
    seconds = time.monotonic() - started
    blind = worker.most(0 if seen else worker.rank + 1)
    if blind:
        raise RunError(
            f"Worker {blind - 1} does not see in {folder} what worker 0 wrote: set "
            "run.dir to storage that all machines share."
        )
    return seconds


def _reads(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        time.sleep(0.05)
        return False


def _second_lock(folder: Path, worker: Worker) -> bool:
    """Whether this worker could take the lock that worker 0 holds: then locks do nothing here."""
    probe, taken = RunDir(folder / "lock"), False
    if worker.rank == 0:
        with probe.lock():
            worker.collective.barrier()  # it is held
            worker.collective.barrier()  # all have tried
        return False
    worker.collective.barrier()
    try:
        with probe.lock():
            taken = True
    except RunError:
        pass
    worker.collective.barrier()
    return taken


def _clock_ahead(worker: Worker) -> float:
    """Seconds by which this machine's clock is ahead of worker 0's, within a barrier's length."""
    worker.collective.barrier()
    now = time.time()
    return now - float(worker.collective.broadcast_json(now))


def _collectives(worker: Worker) -> tuple[float, float]:
    """Seconds of an integer all-reduce of PROBE_BYTES, and of a barrier."""
    buffer = torch.ones(PROBE_BYTES // 8, dtype=torch.int64, device=worker.device)
    worker.collective.sum_(buffer)  # connects all peers; not timed
    assert bool((buffer == worker.world_size).all()), "an integer sum is not exact"

    def reduce() -> None:
        worker.collective.sum_(buffer)
        buffer[:1].item()  # waits for the device

    return (
        statistics.median(seconds(reduce) for _ in range(_REDUCTIONS)),
        statistics.median(seconds(worker.collective.barrier) for _ in range(_REDUCTIONS)),
    )


def seconds(call: Callable[[], object]) -> float:
    """How long ``call`` takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
