"""Ray's processes on one node of a Slurm job: started, watched, and gone without a trace.

``python -m dpldm_dist.runtime.slurm_ray ADDRESS`` prints the addresses of the nodes that have
joined the Ray at ADDRESS, as a JSON list, whenever they change.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dpldm_dist.errors import ConfigError
from dpldm_dist.runtime.rundir import private_files
from dpldm_dist.runtime.slurm_job import Ports

_PREFIX = "dpldm-slurm-"
_OBJECT_STORE_BYTES = 80 * 2**20  # only orders pass through it
_LONGEST_FOLDER = 40  # characters: a socket's path has 107, and Ray puts 66 behind the folder
_END_S = 8.0  # that Ray has to end by itself
_MOST_LOG_BYTES = 1 << 20  # of each log file, its end
_MOST_LOGS = 200
_LOOK_EVERY_S = 0.3
_SUBREAPER = 36  # Linux: PR_SET_CHILD_SUBREAPER
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # An end means: the job is over. Without it `ray start` waits half a minute for its own tasks.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}
_DEFAULTS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_raylet_start_wait_time_s": "120",
    # It looks at the memory of the whole node, also other jobs'. Slurm polices ours.
    "RAY_memory_monitor_refresh_ms": "0",
}


@dataclass(frozen=True)
class RayNode:
    """Ray on this node: its process, and where its token lies. ``log``: what `ray start` said."""

    process: asyncio.subprocess.Process
    log: Path

    def last_word(self) -> str:
        """The last line of its log."""
        try:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line]
        except OSError:
            return "nothing"
        return lines[-1][:300] if lines else "nothing"


@contextmanager
def folder_for_ray(base: str, *, job: int) -> Iterator[Path]:
    """A new 0700 folder on this node for Ray's sockets and logs; what dead jobs left is removed.

    A folder whose maker lives is locked, so nobody removes another job's.
    Raises: ConfigError if sockets in it would have too long a path, or it cannot be made.
    """
    if len(base) > _LONGEST_FOLDER - len(_PREFIX) - 20:
        raise ConfigError(
            f"DPLDM_FOLDER_FOR_RAY = {base} is too long a path for Ray's sockets: expected at most "
            f"{_LONGEST_FOLDER - len(_PREFIX) - 20} characters, as /tmp."
        )
    _remove_leftovers(Path(base))
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{job}-", dir=base))
    except OSError as error:
        raise ConfigError(f"Cannot make a folder in {base}: {error.strerror}.") from None
    lock = os.open(folder / "alive", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def write_token(folder: Path, token: str) -> None:
    """Put the job's token where Ray reads it (0600), and say so to all processes started later."""
    path = folder / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.update(_ENVIRONMENT | {"RAY_AUTH_TOKEN_PATH": str(path)})
    os.environ.pop("RAY_ADDRESS", None)


def head_options(address: str, ports: Ports, *, dashboard: bool) -> list[str]:
    return [
        "--head",
        f"--node-ip-address={address}",
        f"--port={ports.gcs}",
        f"--ray-client-server-port={ports.client}",
        f"--dashboard-port={ports.dashboard}",
        "--dashboard-host=127.0.0.1",
        f"--include-dashboard={str(dashboard).lower()}",
    ]


def member_options(address: str, *, head: str) -> list[str]:
    return [f"--address={head}", f"--node-ip-address={address}"]


@asynccontextmanager
async def ray_here(
    options: Sequence[str],
    *,
    slots: int,
    gpus: bool,
    ports: Ports,
    folder: Path,
    logs: Path,
) -> AsyncIterator[RayNode]:
    """Ray on this node within. ``slots``: workers it has room for; ``gpus``: with a GPU each.

    Afterwards none of its processes is left, and its logs lie in ``logs``.
    """
    with private_files():
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "ray-start.log").touch()
    _adopt_orphans()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
        *options,
        f"--num-cpus={slots}",
        f"--num-gpus={slots if gpus else 0}",
        f"--temp-dir={folder}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--dashboard-agent-listen-port={ports.agent}",
        f"--metrics-export-port={ports.metrics}",
    ]
    with open(logs / "ray-start.log", "ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # signals of Slurm are for the task alone
            umask=0o077,
        )
    try:
        yield RayNode(process, logs / "ray-start.log")
    finally:
        await _end(process)
        end_descendants()
        collect_logs(folder / "session_latest" / "logs", logs)


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def collect_logs(source: Path, target: Path) -> None:
    """Copy the ends of the log files in ``source``; what cannot be read is passed over."""
    files = sorted(path for path in source.glob("*") if path.is_file() and not path.is_symlink())
    for path in files[:_MOST_LOGS]:
        with suppress(OSError), open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MOST_LOG_BYTES))
            content = file.read(_MOST_LOG_BYTES)
            if content:
                with private_files():
                    (target / path.name).write_bytes(content)


def end_descendants() -> None:
    """Kill every process below this one, also those whose parents are gone."""
    for _ in range(3):  # what a dying process had started a moment before shows in the next look
        found = _descendants(os.getpid())
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.05)


def _adopt_orphans() -> None:
    """Processes whose parents die become children of this one (Linux), so that we find them."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def _descendants(ancestor: int) -> list[int]:
    """Processes below ``ancestor`` that are not yet dead."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found = [ancestor]
    for above in found:  # it grows while we look
        found += [pid for pid, parent in parents.items() if parent == above]
    return found[1:]


def _remove_leftovers(base: Path) -> None:
    """Remove our own folders whose makers are dead."""
    for folder in base.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / "alive", os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def main(address: str) -> None:
    from ray._raylet import GcsClient

    seen: list[str] | None = None
    client = None
    while True:
        try:
            client = client or GcsClient(address=address)
            alive = sorted(
                info.node_manager_address
                for info in client.get_all_node_info().values()
                if info.state == 0
            )
        except Exception:  # not up yet, or busy: whoever started us has a deadline
            client = None
        else:
            if alive != seen:
                print(json.dumps(alive), flush=True)
                seen = alive
        time.sleep(_LOOK_EVERY_S)


if __name__ == "__main__":
    main(sys.argv[1])
