"""A graceful stop: somebody asks, all workers agree on one step, save, and leave with exit code 75.

Who asks touches ``private/stop`` of the run, from any machine that sees the run directory: the
driver when it gets SIGTERM or SIGUSR1, a Slurm task that is preempted, or a person. Loops look at
it where they can save, and decide together.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpldm_dist.errors import SavedAndStopped
from dpldm_dist.runtime.rundir import RunDir, private_files

if TYPE_CHECKING:
    from dpldm_dist.runtime.worker import Worker

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TERMINATED = 128 + signal.SIGTERM


def stop_file(run: RunDir) -> Path:
    """The file whose existence asks the run to save and stop."""
    return run.private / "stop"


def ask_to_stop(run: RunDir) -> None:
    """Ask the workers of ``run``, wherever they are, to save and stop. Twice is fine."""
    with private_files():
        run.private.mkdir(parents=True, exist_ok=True)
        stop_file(run).touch()


def forget_stop(run: RunDir) -> None:
    """A new start is not stopped by what its predecessor was asked."""
    stop_file(run).unlink(missing_ok=True)


class StopRequest:
    """Whether the run was asked to stop, as all its workers see it.

    Formal guarantees: :meth:`agreed` gives every worker the same answer at the same call, so that
    all save after the same step. It depends on nothing private.
    """

    def __init__(self, run: RunDir, worker: Worker):
        self._file = stop_file(run)
        self._worker = worker

    def asked(self) -> bool:
        """Whether this worker sees a request, or that its machine is taken away; another one may
        not yet."""
        return self._worker.preempted() or self._file.exists()

    def agreed(self) -> bool:
        """Whether any worker sees the request. Every worker calls it, at the same point."""
        return bool(self._worker.most(int(self.asked())))

    def leave(self, what: str) -> SavedAndStopped:
        """The error to raise once everything is saved. ``what``: of which the steps were saved."""
        return SavedAndStopped(
            f"Stopped on request, {what} saved. To go on, give the same command."
        )


@contextmanager
def stop_on_signals(runs: Sequence[RunDir], *, grace_s: float) -> Iterator[None]:
    """In a driver: SIGTERM and SIGUSR1 ask ``runs`` to save and stop; earlier requests are void.

    A second signal, or ``grace_s`` seconds without an end, ends the process at once (exit 143): all
    that was durable stays so. Outside the main thread nothing is changed.
    """
    for run in runs:
        forget_stop(run)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(grace_s, _leave_late, args=(grace_s,))
    timer.daemon = True
    try:
        with handled(SIGNALS, _asker(runs, timer)):
            yield
    finally:
        timer.cancel()


@contextmanager
def handled(numbers: Sequence[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within, these signals go to ``handler``; afterwards where they went before."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)


def ask_on_signals(runs: Sequence[RunDir]) -> None:
    """In a worker: from now on SIGTERM and SIGUSR1 ask ``runs`` to save and stop."""

    def handle(number: int, _frame: Any) -> None:
        for run in runs:
            ask_to_stop(run)

    for number in SIGNALS:
        signal.signal(number, handle)


def _asker(runs: Sequence[RunDir], timer: threading.Timer) -> Callable[[int, Any], None]:
    asked = False

    def handle(number: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise SystemExit(128 + number)
        asked = True
        name = signal.Signals(number).name
        print(f"{name}: saving and stopping; once more to leave at once.", file=sys.stderr)
        for run in runs:
            ask_to_stop(run)
        timer.start()

    return handle


def _leave_late(grace_s: float) -> None:
    print(f"Not saved within {grace_s:.0f} s (run.stop_grace_s): leaving.", file=sys.stderr)
    os._exit(TERMINATED)
