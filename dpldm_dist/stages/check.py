"""``dpldm check``: is this machine, or this cluster, fit for a run? One table, nothing private."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
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
from dpldm_dist.errors import ConfigError, DpldmError, RunError
from dpldm_dist.privacy import native
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.memory import free_memory
from dpldm_dist.runtime.probes import (
    PROBE_BYTES,
    allocation_here,
    probe,
    seconds,
    software,
    token_of_ray,
)
from dpldm_dist.runtime.rundir import RunDir, closed_dataset_dir, private_files, require_free
from dpldm_dist.runtime.worker import Worker, cores, resolved_device

_APPENDS = 20
_LEAST_MEMORY_BYTES = 512 * 2**20  # free, per worker of a machine
_MOST_CLOCK_S = 60.0  # by which clocks may differ; a few minutes are too much for Slurm and TLS
_SLOW_GB_PER_S = 0.05  # between machines; below, the workers probably use the wrong network


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
        _try("private data", lambda: _private_data(config)),
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
        f"Start {run.crew} workers by the launcher '{run.launcher}' and time their all-reduce.",
        f"Write and remove {PROBE_BYTES >> 20} MB in {run.dir}, and test its file locks.",
    ]


def measure_group(config: Config, worker: Worker) -> None:
    """In every worker: look at machine and peers, and write what was seen for the driver to read.

    Raises: RunError if the run directory is not shared by all workers.
    """
    folder = _probe_folder(config.run)
    facts = probe(folder, worker)
    (folder / f"worker-{worker.rank}.json").write_text(json.dumps(facts))


def _try(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, look())
    except DpldmError as error:
        return Finding(what, "", error)
    except OSError as error:
        return Finding(what, "", RunError(f"{what}: {error.strerror} ({error.filename})."))


def _software() -> str:
    return f"{software()}, {platform.platform()}"


def _device(run: RunConfig) -> str:
    if run.launcher == "ray" and run.ray_address != "local":
        return f"run.device = {run.device}, decided by the cluster"
    if resolved_device(run) == "cpu":
        return f"cpu ({torch.cuda.device_count()} GPUs found), {_engine()}"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GB" for gpu in names)


def _engine() -> str:
    """Who computes per-record gradients on a CPU."""
    if native.serves(torch.device("cpu")):
        return f"gradient engine with {native.name()}"
    return (
        "gradient engine without compiled kernels: slower, not wrong. Where there is a C compiler "
        "(gcc) and an x86-64 processor, install this package again"
    )


def _cores(run: RunConfig) -> str:
    note = ": slower, not wrong" if run.most_workers > cores() else ""
    return f"{cores()} for {run.crew} workers{note}"


def _memory(run: RunConfig) -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, free_memory()
    wanted = _LEAST_MEMORY_BYTES * run.most_workers
    if free < wanted and run.ray_address == "local":
        raise RunError(
            f"{free / 2**30:.1f} GB of memory are free, expected {wanted / 2**30:.1f} GB for "
            f"run.workers = {run.crew}: lower run.workers or end other programs."
        )
    return f"{free / 2**30:.1f} GB free of {total / 2**30:.1f} GB"


def _private_data(config: Config) -> str:
    found = [
        closed_dataset_dir(config, which, what).is_dir()
        for which in ("private", "heldout")
        for what in ("images", "latents")
    ]
    if not any(found):
        return "none yet"
    if config.data.allow_shared_files:
        return "not looked at (data.allow_shared_files)"
    return "closed to other users"


def _run_directory(run: RunConfig) -> str:
    directory = RunDir(run.dir).create()
    require_free(directory.root, 2 * PROBE_BYTES)
    folder = _probe_folder(run)
    shutil.rmtree(folder, ignore_errors=True)
    with private_files():
        folder.mkdir()
    return f"{directory.root}, {shutil.disk_usage(directory.root).free / 2**30:.1f} GB free"


def _disk_speed(run: RunConfig) -> str:
    """Writing and flushing one large file, and the small appends of a ledger."""
    path = _probe_folder(run) / "probe"
    content = os.urandom(PROBE_BYTES)
    with open(path, "wb") as file:
        large_s = seconds(lambda: _append(file, content))
    with open(path, "ab") as file:
        append_s = statistics.median(
            seconds(lambda: _append(file, content[:250])) for _ in range(_APPENDS)
        )
    path.unlink()
    return f"{PROBE_BYTES / 2**20 / large_s:.0f} MB/s, {append_s * 1e3:.1f} ms per ledger entry"


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
        written = sorted(folder.glob("worker-*.json"), key=lambda p: int(p.stem.split("-")[1]))
        facts = [json.loads(path.read_text()) for path in written]
    except DpldmError as error:
        return [Finding(f"workers ({run.launcher})", "", error)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    findings = [
        _try(f"worker {rank}", lambda fact=fact: _one_worker(fact, facts))
        for rank, fact in enumerate(facts)
    ]
    findings += [
        _try("shared storage", lambda: _storage(facts, run)),
        _try("equal software", lambda: _equal_software(facts)),
        _try("clocks", lambda: _clocks(facts)),
        _try("all-reduce", lambda: _speed(facts)),
    ]
    if run.launcher == "ray":
        findings.append(_try("Ray's token", lambda: token_of_ray(run)))
    if allocation_here() is not None:
        findings.append(_try("Slurm job", lambda: _slurm_job(facts)))
    return findings


def _one_worker(fact: dict[str, Any], facts: list[dict[str, Any]]) -> str:
    here = sum(other["host"] == fact["host"] for other in facts)
    gigabytes, wanted = fact["memory_free"] / 2**30, here * _LEAST_MEMORY_BYTES / 2**30
    if gigabytes < wanted:
        raise RunError(
            f"{gigabytes:.1f} GB of memory are free on {fact['host']}, expected {wanted:.1f} GB "
            f"for {here} workers there: lower run.workers or end other programs."
        )
    network = f"{fact['address']} {fact['interface']}".strip()
    return (
        f"{fact['host']} ({network}), {fact['device']} ({fact['device_name']}), "
        f"{fact['threads']} threads of {fact['cores']} cores, {gigabytes:.1f} GB free"
    )


def _storage(facts: list[dict[str, Any]], run: RunConfig) -> str:
    """Files of one worker reach the others; a lock that one holds is refused to the others."""
    unlocked = [fact["host"] for fact in facts if fact["second_lock"]]
    if unlocked:
        raise RunError(
            f"File locks at {run.dir} do not reach {', '.join(dict.fromkeys(unlocked))}: two runs "
            "could spend one budget twice. Set run.dir to a file system whose flock all machines "
            "share."
        )
    seen_s = max(fact["seen_s"] for fact in facts)
    return f"a file is seen by all workers within {seen_s:.1f} s; locks hold between them"


def _equal_software(facts: list[dict[str, Any]]) -> str:
    for fact in facts:
        if fact["software"] != facts[0]["software"]:
            raise RunError(
                f"{fact['host']} has {fact['software']}, {facts[0]['host']} has "
                f"{facts[0]['software']}: use one environment or container on all machines."
            )
    return "the same on all workers"


def _clocks(facts: list[dict[str, Any]]) -> str:
    worst = max(facts, key=lambda fact: abs(fact["clock_ahead_s"]))
    apart_s = abs(worst["clock_ahead_s"])
    if apart_s > _MOST_CLOCK_S:
        raise RunError(
            f"The clocks of {worst['host']} and {facts[0]['host']} are {apart_s:.0f} s apart: "
            "have them set by NTP."
        )
    return f"at most {apart_s:.2f} s apart"


def _speed(facts: list[dict[str, Any]]) -> str:
    if len(facts) == 1:
        return "one worker: none needed"
    reduce_s = max(fact["reduce_s"] for fact in facts)
    barrier_s = max(fact["barrier_s"] for fact in facts)
    rate = PROBE_BYTES / 2**30 / reduce_s
    several = len({fact["host"] for fact in facts}) > 1
    slow = ": slow, see whether the workers use the right network" if rate < _SLOW_GB_PER_S else ""
    return (
        f"{PROBE_BYTES / 2**20:.0f} MB in {reduce_s * 1e3:.0f} ms ({rate:.2f} GB/s), barrier "
        f"{barrier_s * 1e3:.2f} ms{slow if several else ''}"
    )


def _slurm_job(facts: list[dict[str, Any]]) -> str:
    """Raises: ConfigError if nodes of the allocation are left idle."""
    allocation = allocation_here()
    assert allocation is not None
    hosts = {fact["host"].partition(".")[0] for fact in facts}
    idle = [node for node in allocation.nodes if node not in hosts]
    if idle:
        raise ConfigError(
            f"Job {allocation.job} has {len(allocation.nodes)} nodes, and no worker runs on "
            f"{', '.join(idle)}: give the command through slurm/check.sbatch, or raise run.workers."
        )
    return (
        f"{allocation.job}: workers on {', '.join(allocation.nodes)}; {allocation.cpus} CPUs and "
        f"{allocation.gpus} GPUs on each"
    )


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
