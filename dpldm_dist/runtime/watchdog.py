"""Ends a worker that has stopped working: one that is stuck outside of a collective.

A worker that waits in a collective is ended by the collective's own timeout. One that waits for
anything else (a dead file server, a lock) would wait for ever, and its peers with it.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpldm_dist.runtime.rundir import private_files

STALLED = 86
"""Exit code of a worker that was ended because it did nothing."""
_LEAST_BUSY = 0.002  # share of a period; a thread that only looks whether something came takes less
_LOOKS = 20  # per period


def patience_s(timeout_s: float) -> float:
    """Seconds without work after which a worker is stuck: a collective gives up before that."""
    return 1.1 * timeout_s + 2


@contextmanager
def watched(report: Path, *, limit_s: float) -> Iterator[None]:
    """Within: if this thread does next to nothing for ``limit_s`` seconds, the process ends.

    Work is CPU time of the thread, so no step, however long, is ended while it computes. Where it
    stood is written to ``report`` (names and lines of code, no values; 0600), and the exit code is
    ``STALLED``. A report of an earlier process is kept under another name, with a number.
    """
    _put_aside(report)
    done = threading.Event()
    clock = _cpu_clock()
    watcher = threading.Thread(
        target=_watch, args=(clock, report, limit_s, done), name="watchdog", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _put_aside(report: Path) -> None:
    if report.exists():
        names = (report.with_name(f"{report.stem}-{i}{report.suffix}") for i in itertools.count(1))
        report.rename(next(name for name in names if not name.exists()))


def _cpu_clock() -> int:
    """The clock of this thread's CPU time, readable by other threads."""
    clock = getattr(time, "pthread_getcpuclockid", None)  # not on every system
    return clock(threading.get_ident()) if clock else time.CLOCK_PROCESS_CPUTIME_ID


def _watch(clock: int, report: Path, limit_s: float, done: threading.Event) -> None:
    since, worked_s = time.monotonic(), time.clock_gettime(clock)
    while not done.wait(limit_s / _LOOKS):
        now, now_worked_s = time.monotonic(), time.clock_gettime(clock)
        if now_worked_s - worked_s > _LEAST_BUSY * limit_s:
            since, worked_s = now, now_worked_s
        elif now - since > limit_s:
            _end(report)


def _end(report: Path) -> None:
    try:
        with private_files(), open(report, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    finally:
        os._exit(STALLED)
