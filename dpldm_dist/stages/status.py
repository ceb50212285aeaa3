"""``dpldm status [RUN]``: where a run stands, from what it wrote. Loads no trainer."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import rich.box
import rich.console
import rich.markup
import rich.table

from dpldm_dist.config import Config
from dpldm_dist.errors import DpldmError, RunError
from dpldm_dist.privacy.ledger import LedgerSummary, read_ledger
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.starts import last_start
from dpldm_dist.runtime.stopping import stop_file


@dataclass(frozen=True)
class Status:
    """What is known of a run. ``holder``: who holds its directory; ``progress``: of the stage that
    ran last; ``checkpoint``: (steps, age in seconds) of the newest of private training;
    ``trouble``: why the ledger cannot be read."""

    state: Literal["running", "stopped", "finished", "not started"]
    holder: str | None
    stopping: bool
    start: dict[str, Any] | None
    progress: dict[str, Any] | None
    ledger: LedgerSummary | None
    checkpoint: tuple[int, float] | None
    trouble: str | None = None


def status(config: Config, run: str | None = None) -> Status:
    """Print where ``run`` (default: ``run.dir``) stands, and return it. Changes nothing.

    Raises: RunError if there is no such run.
    """
    directory = RunDir(Path(run) if run is not None else config.run.dir)
    found = status_of(directory)
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False, title=str(directory.root))
    for name, value in _rows(directory, found):
        table.add_row(name, rich.markup.escape(value))
    rich.console.Console().print(table)
    return found


def describe(config: Config, run: str | None = None) -> list[str]:
    """What ``status`` would do, for --dry-run."""
    return [f"reads   {RunDir(Path(run) if run is not None else config.run.dir).root}"]


def status_of(run: RunDir) -> Status:
    """Where ``run`` stands. Raises: RunError if it cannot be read, or there is none."""
    try:
        if not run.private.is_dir():
            raise RunError(f"{run.root} is no run directory: it has no private/.")
        next(run.private.iterdir(), None)
    except OSError as error:
        raise RunError(f"Cannot read {run.private}: {error.strerror}.") from None
    ledger, trouble = _ledger(run)
    holder, start = run.holder(), last_start(run)
    return Status(
        state=_state(run, holder, start, ledger),
        holder=holder,
        stopping=holder is not None and stop_file(run).exists(),
        start=start,
        progress=_progress(run),
        ledger=ledger,
        checkpoint=_checkpoint(run),
        trouble=trouble,
    )


def _state(
    run: RunDir, holder: str | None, start: dict[str, Any] | None, ledger: LedgerSummary | None
) -> Literal["running", "stopped", "finished", "not started"]:
    if holder is not None:
        return "running"
    if (run.release / "manifest.json").is_file():
        return "finished"
    return "not started" if start is None and ledger is None else "stopped"


def _ledger(run: RunDir) -> tuple[LedgerSummary | None, str | None]:
    if not run.ledger.exists():
        return None, None
    try:
        return read_ledger(run.ledger), None
    except DpldmError as error:
        return None, str(error)


def _progress(run: RunDir) -> dict[str, Any] | None:
    try:
        found = json.loads(run.progress.read_text())
    except (OSError, ValueError):
        return None
    return (
        found if isinstance(found, dict) and {"what", "step", "total_steps"} <= set(found) else None
    )


def _checkpoint(run: RunDir) -> tuple[int, float] | None:
    """(steps, age) of the newest checkpoint, by its name; whether it is whole, a restart sees."""
    try:
        names = sorted(path for path in run.checkpoints.iterdir() if path.name[0].isdigit())
        if not names:
            return None
        age_s = max(0.0, time.time() - names[-1].stat().st_mtime)
        return int(names[-1].name.rpartition("-")[2]), age_s
    except (OSError, ValueError):
        return None


def _rows(run: RunDir, found: Status) -> list[tuple[str, str]]:
    rows = [("state", _state_in_words(found))]
    rows += _stage_rows(found)
    if found.trouble is not None:
        rows.append(("ledger", found.trouble))
    if found.ledger is not None:
        rows += _ledger_rows(found.ledger)
    if found.checkpoint is not None:
        steps, age_s = found.checkpoint
        rows.append(("last checkpoint", f"after {steps} noisy steps, {_ago(age_s)}"))
    if found.start is not None:
        rows += _start_rows(found.start)
    return rows


def _state_in_words(found: Status) -> str:
    if found.holder is not None:
        stopping = ", asked to save and stop" if found.stopping else ""
        return f"running: {found.holder}{stopping}"
    hint = {
        "stopped": ": to go on, give the same command again",
        "finished": ": a model is released",
    }
    return found.state + hint.get(found.state, "")


def _stage_rows(found: Status) -> list[tuple[str, str]]:
    if found.progress is None:
        return []
    facts = found.progress
    text = f"{facts['what']}, {facts['step']} of {facts['total_steps']}"
    rows = [("stage", text)]
    left_s = facts.get("seconds_left")
    if found.holder is not None and facts.get("state") == "running" and left_s is not None:
        rows.append(("time left", _span(left_s)))
    return rows


def _ledger_rows(ledger: LedgerSummary) -> list[tuple[str, str]]:
    planned = ledger.plan.get("steps", "?")
    rows = [("noisy steps charged", f"{ledger.steps} of {planned}")]
    if ledger.claim:
        left = max(0.0, ledger.budget - ledger.epsilon)
        rows.append(
            (
                "epsilon",
                f"{ledger.epsilon:.4f} spent of {ledger.budget:g} at delta {ledger.delta:g}, "
                f"{left:.4f} left",
            )
        )
    else:
        rows.append(("epsilon", "none: this run makes no privacy claim"))
    again = f", {ledger.rebound} steps with another sum" if ledger.rebound else ""
    return [*rows, ("attempts", f"{ledger.attempts} in {ledger.starts} starts{again}")]


def _start_rows(start: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        hosts = [worker["host"] for worker in start["workers"]]
        devices = sorted({worker["device"] for worker in start["workers"]})
        rows = [("last start", f"{start['stage']}, {_ago(time.time() - start['time'])}")]
        nodes = ", ".join(dict.fromkeys(hosts))
        rows.append(("workers", f"{len(hosts)} on {nodes} ({', '.join(devices)})"))
        if start["slurm"] is not None:
            job = start["slurm"]
            rows.append(("Slurm job", f"{job['job']}, start {job['restart'] + 1}"))
        if start["ray_job"] is not None:
            rows.append(("Ray job", start["ray_job"]))
    except (KeyError, TypeError):  # of another version
        return []
    return rows


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
