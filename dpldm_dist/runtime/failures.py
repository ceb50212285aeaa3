"""What goes wrong in a worker, as one error of our tree: the root cause, in one line.

When one worker fails, the others lose their connection to it. Such a collateral error says nothing;
the driver shows the error of the worker that failed first. An exception that is not ours may hold
private values in its text: only its class is shown, the rest goes to ``private/``.
"""

from __future__ import annotations

import errno
import os
import signal
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from dpldm_dist.errors import DpldmError, RunError, SavedAndStopped, WorkerError
from dpldm_dist.runtime.rundir import RunDir

_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "socket timeout",
)


class CollateralError(WorkerError):
    """This worker only lost another one: look there for the cause."""


class Preempted(SavedAndStopped):
    """Saved because a machine is about to be taken away; others may go on at once."""


def explain(error: BaseException, *, rank: int, run_dir: Path) -> DpldmError:
    """``error``, raised in worker ``rank``, as an error of our tree that any process can show.

    Our own errors come back as they are. The traceback of any other is written to
    ``private/crash-rank<rank>.log`` (0600) and its text is shown nowhere else.
    """
    if isinstance(error, DpldmError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"Disk full: worker {rank} could not write below {run_dir}. Free some space and give "
            "the same command again."
        )
    where = _write_crash_log(error, rank=rank, run_dir=run_dir)
    if _is_collateral(error):
        return CollateralError(
            f"Worker {rank} lost its connection to another worker, or waited too long for it "
            f"(run.timeout_s). To resume, give the same command again. {where}"
        )
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return DpldmError(
            f"Worker {rank} ran out of memory: lower run.microbatch, or sample.batch and "
            f"pretrain.batch in the public stages. {where}"
        )
    return DpldmError(f"Worker {rank} failed with {type(error).__name__}. {where}")


def explain_death(rank: int, exit_code: int | None) -> WorkerError:
    """The error for a worker that ended without a word; a negative code is minus the signal."""
    if exit_code is not None and exit_code < 0:
        number = -exit_code
        hint = " (often: the machine ran out of memory)" if number == signal.SIGKILL else ""
        return WorkerError(
            f"Worker {rank} was ended by signal {number}, {_signal_name(number)}{hint}. To "
            "resume, give the same command again."
        )
    return WorkerError(
        f"Worker {rank} ended with exit code {exit_code} before it could say why. To resume, "
        "give the same command again."
    )


def root_cause(errors: Mapping[int, DpldmError]) -> DpldmError:
    """The one error to show, of those of all failed workers (by rank; not empty).

    An explanation comes before the death of a process, that before a lost connection; among
    equals the lowest rank. A worker that failed comes before those that saved and stopped.
    """

    def order(item: tuple[int, DpldmError]) -> tuple[int, int]:
        rank, error = item
        if isinstance(error, CollateralError):
            return 3, rank
        if isinstance(error, WorkerError):
            return 1, rank
        return (2 if isinstance(error, SavedAndStopped) else 0), rank

    return min(errors.items(), key=order)[1]


def _is_collateral(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(mark in text for mark in _LOST_PEER)


def _write_crash_log(error: BaseException, *, rank: int, run_dir: Path) -> str:
    run = RunDir(run_dir)
    path = run.private / f"crash-rank{rank}.log"
    lines = "".join(traceback.format_exception(error))
    try:
        run.create(least_free_bytes=0)
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(lines)
    except (OSError, RunError) as problem:
        return f"Its traceback could not be written to {path}: {type(problem).__name__}."
    return f"Its traceback is in {path} (it may hold private values)."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
