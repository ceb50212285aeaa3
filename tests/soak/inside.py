"""Inside a process of a life: it says what it releases, and dies where it was told to.

A life is one start of a run. Its driver is ``dpldm finetune`` itself, ``cli.main``; where the real
launcher spawns workers, they are forked here, so that a start costs no imports. All else is real:
the launcher's pipes and watching, gloo over loopback, files, locks, signals.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from dpldm_dist import cli
from dpldm_dist.privacy.chain import ChainFile
from dpldm_dist.privacy.ledger import PrivacyLedger, SharedLedger
from dpldm_dist.privacy.optimizer import NoisySum
from dpldm_dist.runtime import launch_local
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.stages.finetune import publication
from dpldm_dist.stages.finetune.state import TrainingState
from tests.soak.bugs import plant

TRIAL = "a step without records"  # the self-check of a start, which is about no data
OF_A_STEP = (
    "before the charge",
    "after the charge",
    "before the bind",
    "after the bind",
    "after the release",
    "after the update",
)
"""Places that every worker passes once in a step; worker 0 alone comes to the others."""
TORN = "in the middle of a line of the ledger"
SYNC, RENAME = "before a file is on disk", "before a file has its name"
OF_THE_END = (
    "before the model",
    "before the manifest",
    "before the seal",
    "before the end of the key",
)


@dataclass(frozen=True)
class Place:
    """Where the worker of ``rank`` ends itself, as by ``kill -9``: when it comes to ``name`` for
    the ``visit``-th time of its life, from 1."""

    name: str
    visit: int = 1
    rank: int = 0


@dataclass(frozen=True)
class Errand:
    """What a life is about. ``notes``: where its processes say what they do; they hold it open
    until they are gone. ``temporary``: where temporary files belong. ``bug``: a planted one, see
    ``bugs.py``. ``health_every``: steps after which worker 0 notes its memory and open files, 0 for
    never."""

    arguments: tuple[str, ...]
    workers: int
    notes: Connection
    log: Path
    temporary: Path
    die_at: Place | None = None
    bug: str | None = None
    health_every: int = 0


_errand: Errand
_visits: Counter[str] = Counter()


def drive(errand: Errand) -> None:
    """The life of the driver, which with one worker is the worker."""
    global _errand
    _errand = errand
    tempfile.tempdir = os.environ["TMPDIR"] = str(errand.temporary)
    _write_into(errand.log)
    launch_local.multiprocessing = _Forking
    launch_local._work = _work
    if errand.workers == 1:
        _begin(0)
    sys.exit(cli.main(list(errand.arguments)))


def _work(rank: int, *rest: Any) -> None:
    _begin(rank)
    _real_work(rank, *rest)


_real_work = launch_local._work


class _Forking:
    """Stands in for the module ``multiprocessing`` in the launcher."""

    Pipe = staticmethod(multiprocessing.Pipe)

    @classmethod
    def get_context(cls, method: str) -> type[_Forking]:
        return cls

    @staticmethod
    def Process(**facts: Any) -> multiprocessing.Process:  # the name that a context has
        return _ForkedWorker(**facts)


class _ForkedWorker(multiprocessing.get_context("fork").Process):
    """A forked worker that has no file open which a spawned one would not have."""

    def start(self) -> None:
        kept = {0, 1, 2, _errand.notes.fileno(), self._args[3].fileno()}
        self._not_mine = {int(name) for name in os.listdir("/proc/self/fd")} - kept
        super().start()

    def run(self) -> None:
        for descriptor in self._not_mine:
            with suppress(OSError):  # the one that listed the others
                os.close(descriptor)
        super().run()


def _write_into(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)


def _begin(rank: int) -> None:
    torch.set_num_threads(1)
    _errand.notes.send(("worker", rank, os.getpid()))
    if _errand.bug is not None:
        plant(_errand.bug, rank)
    _note_releases(rank)
    _mark_places(rank)
    if _errand.health_every and rank == 0:
        _note_health(_errand.health_every)


# --- places ---------------------------------------------------------------------------------------


def _mark_places(rank: int) -> None:
    for owner, name, before, after in (
        (SharedLedger, "charge", "before the charge", "after the charge"),
        (SharedLedger, "bind", "before the bind", "after the bind"),
        (TrainingState, "tick", None, "after the update"),
        (os, "fsync", SYNC, None),
        (os, "rename", RENAME, None),
        (os, "replace", RENAME, None),
        (publication, "save_model", "before the model", None),
        (publication, "describe_files", "before the manifest", None),
        (PrivacyLedger, "seal", "before the seal", None),
        (RunDir, "destroy_key", "before the end of the key", None),
    ):
        setattr(owner, name, _between(getattr(owner, name), rank, before, after))
    write = ChainFile._write

    def torn(self: ChainFile, line: bytes, *, size_before: int) -> None:
        half = line[: len(line) // 2]
        _come_to(TORN, rank, last_words=lambda: os.write(self._descriptor, half))
        write(self, line, size_before=size_before)

    ChainFile._write = torn


def _between(
    function: Callable[..., Any], rank: int, before: str | None, after: str | None
) -> Callable[..., Any]:
    def passing(*arguments: Any, **named: Any) -> Any:
        _come_to(before, rank)
        found = function(*arguments, **named)
        _come_to(after, rank)
        return found

    return passing


def _come_to(
    name: str | None, rank: int, *, last_words: Callable[[], object] = lambda: None
) -> None:
    if name is None:
        return
    _visits[name] += 1
    if _errand.die_at == Place(name, _visits[name], rank):
        last_words()
        os.kill(os.getpid(), signal.SIGKILL)


# --- notes ----------------------------------------------------------------------------------------


def _note_releases(rank: int) -> None:
    release = NoisySum.release_

    def noted(self: NoisySum, total_P: torch.Tensor, *, purpose: str, step: int) -> torch.Tensor:
        noisy_P = release(self, total_P, purpose=purpose, step=step)
        if self._mechanism != TRIAL:
            digest = hashlib.sha256(noisy_P.numpy().tobytes()).hexdigest()
            _errand.notes.send(("release", rank, purpose, step, digest))
            _come_to("after the release", rank)
        return noisy_P

    NoisySum.release_ = noted


def _note_health(every: int) -> None:
    tick = TrainingState.tick

    def noted(self: TrainingState, noisy: Any) -> None:
        tick(self, noisy)
        if self.step % every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            _errand.notes.send(("health", self.step, pages * os.sysconf("SC_PAGE_SIZE"), files))

    TrainingState.tick = noted
