"""Starts of runs, each a life that may be cut short: whom to kill, and when."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from dpldm_dist.config import Config
from tests.processes import warm_processes
from tests.soak.inside import (
    OF_A_STEP,
    OF_THE_END,
    RENAME,
    SYNC,
    TORN,
    Errand,
    Place,
    drive,
)
from tests.soak.tiny import arguments

LIMIT_S = 600.0  # who says nothing for longer hangs
START_STEPS = 10  # a start takes about as long as so many steps
_SHARE = 0.6  # of a life within which it is killed: with more workers it is shorter
_POLL_S = 0.002


@dataclass(frozen=True)
class Kill:
    """``kill -9`` of the worker of rank ``victim``, or of the driver (None), once worker 0 has
    worked for ``cpu_s`` seconds of CPU time: a moment that does not depend on the machine's load.
    """

    victim: int | None
    cpu_s: float


@dataclass
class Life:
    """What came of a start. ``killed``: whether it was cut short; ``log``: what it printed;
    ``releases``: (rank, purpose, step, digest) of every noisy sum; ``health``: (step, resident
    bytes, open files) of worker 0; ``cpu_s``: of worker 0."""

    workers: int
    exit_code: int = 0
    killed: bool = False
    log: str = ""
    releases: list[tuple[int, str, int, str]] = field(default_factory=list)
    health: list[tuple[int, int, int]] = field(default_factory=list)
    cpu_s: float = 0.0


class Nest:
    """Where lives begin: a process that has everything imported, and forks the drivers.

    ``temporary``: where all of them would put temporary files.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self._context = warm_processes()
        self._lives = 0

    def live(
        self,
        config: Config,
        *,
        death: Kill | Place | None = None,
        bug: str | None = None,
        health_every: int = 0,
    ) -> Life:
        """One start of ``config``, and its end; nobody of it is left afterwards."""
        self._lives += 1
        log = self._folder / f"life-{self._lives}.log"
        ours, theirs = self._context.Pipe(duplex=False)
        workers = config.run.most_workers
        errand = Errand(
            arguments=tuple(arguments(config)),
            workers=workers,
            notes=theirs,
            log=log,
            temporary=self.temporary,
            die_at=death if isinstance(death, Place) else None,
            bug=bug,
            health_every=health_every,
        )
        driver = self._context.Process(target=drive, args=(errand,))
        driver.start()
        theirs.close()
        life = Life(workers)
        try:
            _follow(life, driver, ours, death if isinstance(death, Kill) else None)
        finally:
            ours.close()
            driver.kill()
            driver.join()
        life.exit_code, life.log = driver.exitcode, log.read_text()
        life.killed = life.exit_code == -signal.SIGKILL or "SIGKILL" in life.log
        return life


def _follow(life: Life, driver: BaseProcess, notes: Connection, kill: Kill | None) -> None:
    """Take notes until all processes of the life are gone; end one of them when its time comes."""
    pids: dict[int | None, int] = {None: driver.pid}
    heard = time.monotonic()
    while True:
        if notes.poll(_POLL_S if kill is not None else 0.1):
            heard = time.monotonic()
            try:
                kind, *facts = notes.recv()
            except EOFError:
                return
            if kind == "worker":
                pids[facts[0]] = facts[1]
            elif kind == "release":
                life.releases.append(tuple(facts))
            else:
                life.health.append(tuple(facts))
            continue
        if 0 in pids:
            life.cpu_s = max(life.cpu_s, _cpu_s(pids[0]))
        if kill is not None and life.cpu_s >= kill.cpu_s and kill.victim in pids:
            _end(pids[kill.victim])
            kill = None
        if time.monotonic() - heard > LIMIT_S:
            for pid in pids.values():
                _end(pid)
            raise AssertionError(f"a life said nothing for {LIMIT_S:.0f} s")


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _cpu_s(pid: int) -> float:
    """CPU time of a process of ours, 0 when it is gone."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # the kernel's clock of another process
    except OSError:
        return 0.0


def any_death(
    chance: random.Random,
    config: Config,
    *,
    workers: int,
    steps: int,
    step_cpu_s: float,
    to_the_end: bool,
) -> Kill | Place:
    """A random moment for a random process: any at all, or one at which much is at stake.

    ``steps``: within how many steps, ``step_cpu_s``: CPU time of worker 0 for one, ``to_the_end``:
    whether these are all that are left.
    """
    match chance.choices(("any", "step", "line", "disk", "end"), (4, 2, 1, 2, 1))[0]:
        case "step":
            name, rank = chance.choice(OF_A_STEP), chance.randrange(workers)
            return Place(name, chance.randint(1, steps), rank)
        case "line":
            return Place(TORN, chance.randint(1, 2 * steps))
        case "disk":
            checkpoints = 1 + steps // config.run.checkpoint_every
            syncs, renames = 2 * steps + 6 * checkpoints, checkpoints + to_the_end
            name, passed = chance.choice(((SYNC, syncs), (RENAME, renames)))
            return Place(name, chance.randint(1, passed))
        case "end" if to_the_end:
            return Place(chance.choice(OF_THE_END))
    moment_s = chance.uniform(0.0, _SHARE * (steps + START_STEPS) * step_cpu_s)
    return Kill(chance.choice([None, *range(workers)]), moment_s)


def crew(config: Config, workers: int) -> Config:
    """The same run on another number of workers."""
    return config.model_copy(update={"run": config.run.model_copy(update={"workers": workers})})


def lives_until_done(
    nest: Nest,
    config: Config,
    chance: random.Random,
    *,
    step_cpu_s: float,
    before: Sequence[Life] = (),
    kills: int | None = None,
) -> list[Life]:
    """All starts of a run, each on 1, 2 or 3 workers: killed ones, and the one that finishes it.

    ``before``: lives that it had. ``kills``: spread about so many over the run; None: kill it as
    long as it lives.
    """
    lives = [*before]
    while not lives or lives[-1].killed:
        workers, left = chance.choice((1, 2, 3)), steps_left(config, lives)
        death, steps = None, left
        if kills is not None and kills > len(lives):
            steps = min(left, 1 + round(1.6 * left / (kills - len(lives))))
        if kills is None or kills > len(lives):
            death = any_death(
                chance,
                config,
                workers=workers,
                steps=steps,
                step_cpu_s=step_cpu_s,
                to_the_end=steps == left,
            )
        lives.append(nest.live(crew(config, workers), death=death))
    return lives


def steps_left(config: Config, lives: Sequence[Life]) -> int:
    """How many steps the next life will do: those since the last checkpoint again."""
    done = max((step for life in lives for _, _, step, _ in life.releases), default=0)
    return config.finetune.steps - done // config.run.checkpoint_every * config.run.checkpoint_every
