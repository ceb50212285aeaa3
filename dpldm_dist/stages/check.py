"""``dpldm check``: is this machine, or this cluster, fit for a run? One table, nothing private."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table
import torch

from dpldm_dist.config import Config, RunConfig
from dpldm_dist.errors import DpldmError, RunError
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir, private_files, require_free
from dpldm_dist.runtime.worker import Worker, cores, resolved_device

_PROBE_BYTES = 32 * 2**20
_APPENDS = 20
_REDUCTIONS = 5
_LEAST_MEMORY_BYTES = 512 * 2**20  # free, per worker on this machine


@dataclass(frozen=True)
class Finding:
    """One line of the table; ``error`` says what is wrong and what to do."""

    what: str
    found: str
    error: DpldmError | None = None


def check(config: Config, worker: Worker) -> list[Finding]:
    """Test the machine and the workers, print a table, raise if anything is wrong.

    Runs on the driver (``worker`` is not used) and launches the configured workers itself. Leaves
    nothing behind but the run directory. Raises: the error of the first line that is wrong.
    """
    run = config.run
    findings = [
        _try("software", _software),
        _try("device", lambda: _device(run)),
        _try("cores", lambda: _cores(run)),
        _try("memory", lambda: _memory(run)),
        _try("run directory", lambda: _run_directory(run)),
    ]
    if findings[-1].error is None:
        findings += [
            _try("disk speed", lambda: _disk_speed(run)),
            _try("file locks", lambda: _locks(run)),
            *_workers(config),
        ]
    _print(findings)
    for finding in findings:
        if finding.error is not None:
            raise finding.error
    return findings


def describe(config: Config) -> list[str]:
    """What ``check`` would do, for --dry-run."""
    run = config.run
    return [
        f"Start {run.workers} workers by the launcher '{run.launcher}' and time their all-reduce.",
        f"Write and remove {_PROBE_BYTES >> 20} MB in {run.dir}, and test its file locks.",
    ]


def measure_group(config: Config, worker: Worker) -> None:
    """In every worker: time the collectives, and write what was seen for the driver to read.

    The integer sum must be exact; every worker must see the files of all others.
    Raises: RunError if the run directory is not shared by all workers.
    """
    folder = _probe_folder(config.run)
    buffer = torch.ones(_PROBE_BYTES // 8, dtype=torch.int64, device=worker.device)
    worker.collective.sum_(buffer)  # connects all peers; not timed
    assert bool((buffer == worker.world_size).all()), "an integer sum is not exact"
    seconds = statistics.median(
        _seconds(lambda: _reduce(buffer, worker)) for _ in range(_REDUCTIONS)
    )
    facts = {
        "host": socket.gethostname(),
        "address": _address(),
        "device": str(worker.device),
        "threads": torch.get_num_threads(),
        "reduce_s": seconds,
        "barrier_s": statistics.median(
            _seconds(worker.collective.barrier) for _ in range(_REDUCTIONS)
        ),
    }
    (folder / f"worker-{worker.rank}.json").write_text(json.dumps(facts))
    worker.collective.barrier()
    missing = [r for r in range(worker.world_size) if not (folder / f"worker-{r}.json").is_file()]
    if missing:
        raise RunError(
            f"Worker {worker.rank} on {facts['host']} does not see in {folder} what workers "
            f"{missing} wrote: set run.dir to storage that all machines share."
        )


def _try(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, look())
    except DpldmError as error:
        return Finding(what, "", error)
    except OSError as error:
        return Finding(what, "", RunError(f"{what}: {error.strerror} ({error.filename})."))


def _software() -> str:
    return f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"


def _device(run: RunConfig) -> str:
    if run.launcher == "ray" and run.ray_address != "local":
        return f"run.device = {run.device}, decided by the cluster"
    if resolved_device(run) == "cpu":
        return f"cpu ({torch.cuda.device_count()} GPUs found)"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GB" for gpu in names)


def _cores(run: RunConfig) -> str:
    note = ": slower, not wrong" if run.workers > cores() else ""
    return f"{cores()} for {run.workers} workers{note}"


def _memory(run: RunConfig) -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    free = max(free, _reclaimable())
    if free < _LEAST_MEMORY_BYTES * run.workers and run.ray_address == "local":
        raise RunError(
            f"{free / 2**30:.1f} GB of memory are free, expected "
            f"{_LEAST_MEMORY_BYTES * run.workers / 2**30:.1f} GB for run.workers = {run.workers}: "
            "lower run.workers or end other programs."
        )
    return f"{free / 2**30:.1f} GB free of {total / 2**30:.1f} GB"


def _reclaimable() -> int:
    """Bytes that Linux could give to a new program (the page cache included), or 0."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 0


def _run_directory(run: RunConfig) -> str:
    directory = RunDir(run.dir).create()
    require_free(directory.root, 2 * _PROBE_BYTES)
    folder = _probe_folder(run)
    shutil.rmtree(folder, ignore_errors=True)
    with private_files():
        folder.mkdir()
    return f"{directory.root}, {shutil.disk_usage(directory.root).free / 2**30:.1f} GB free"


def _disk_speed(run: RunConfig) -> str:
    """Writing and flushing one large file, and the small appends of a ledger."""
    path = _probe_folder(run) / "probe"
    content = os.urandom(_PROBE_BYTES)
    with open(path, "wb") as file:
        large_s = _seconds(lambda: _append(file, content))
    with open(path, "ab") as file:
        append_s = statistics.median(
            _seconds(lambda: _append(file, content[:250])) for _ in range(_APPENDS)
        )
    path.unlink()
    return f"{_PROBE_BYTES / 2**20 / large_s:.0f} MB/s, {append_s * 1e3:.1f} ms per ledger entry"


def _append(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _locks(run: RunConfig) -> str:
    probe = RunDir(_probe_folder(run))
    with probe.lock():
        try:
            with probe.lock():
                pass
        except RunError:
            return "a second start is refused"
    raise RunError(
        f"File locks do nothing at {run.dir}: two runs could spend one budget twice. Set run.dir "
        "to a file system with flock."
    )


def _workers(config: Config) -> list[Finding]:
    run, folder = config.run, _probe_folder(config.run)
    try:
        launch([Job(measure_group, config)], run=run)
        facts = [
            json.loads((folder / f"worker-{rank}.json").read_text()) for rank in range(run.workers)
        ]
    except DpldmError as error:
        return [Finding(f"workers ({run.launcher})", "", error)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    findings = [
        Finding(
            f"worker {rank}",
            f"{fact['host']} ({fact['address']}), {fact['device']}, {fact['threads']} threads",
        )
        for rank, fact in enumerate(facts)
    ]
    return [*findings, Finding("all-reduce", _speed(facts))]


def _speed(facts: list[dict[str, Any]]) -> str:
    if len(facts) == 1:
        return "one worker: none needed"
    reduce_s = max(fact["reduce_s"] for fact in facts)
    barrier_s = max(fact["barrier_s"] for fact in facts)
    return (
        f"{_PROBE_BYTES / 2**20:.0f} MB in {reduce_s * 1e3:.0f} ms "
        f"({_PROBE_BYTES / 2**30 / reduce_s:.2f} GB/s), barrier {barrier_s * 1e3:.2f} ms"
    )


def _reduce(buffer: torch.Tensor, worker: Worker) -> None:
    worker.collective.sum_(buffer)
    buffer[:1].item()  # waits for the device


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _address() -> str:
    """The address from which this machine would talk to others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _probe_folder(run: RunConfig) -> Path:
    return RunDir(run.dir).private / "check"


def _print(findings: list[Finding]) -> None:
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False)
    for finding in findings:
        good = finding.error is None
        table.add_row(
            "[green]ok[/green]" if good else "[red]wrong[/red]",
            finding.what,
            rich.markup.escape(finding.found if good else str(finding.error)),
        )
    rich.console.Console().print(table)
