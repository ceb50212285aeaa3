"""A long run that is killed again and again, beside a copy of it that is left alone.

Both have the same key, coins and noise, so every bit that they release must be the same. The one
that is left alone shows whether a process that lives for long grows.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpldm_dist.config import Config
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.stages.mechanism import plan_of
from tests.soak.inside import Place
from tests.soak.lives import START_STEPS, Life, Nest, lives_until_done
from tests.soak.tiny import OWN_KEY, Tiny
from tests.soak.verdict import faults, released_files

HEALTH_EVERY = 50  # steps
EPSILON_READINGS = 20  # of a run, about
LARGEST_SLOPE = 1.0  # MB of resident memory per 1,000 steps
LARGEST_GROWTH_MB = 64.0
SHARED_MEMORY = Path("/dev/shm")
TENSORS = "torch_*"  # all that a worker could leave there; other programs have files of their own


@dataclass(frozen=True)
class Figures:
    """What a soak came to. ``steps``: noisy ones, of both runs, repeated ones too; ``repeated``:
    those that a killed run did again; ``grown_MB`` of resident memory, its ``slope`` in MB per 1,000
    steps and ``files``: most open files less fewest, in the second half of the run left alone;
    ``step_ms``: CPU time of its steps; ``faults``: all that is wrong."""

    seed: int
    steps: int
    repeated: int
    kills: int
    starts: int
    ledger_lines: int
    epsilon: float
    rss_MB: float
    grown_MB: float
    slope: float
    files: int
    step_ms: float
    seconds: float
    faults: list[str]


def soak(folder: Path, *, steps: int, kills: int, seed: int) -> Figures:
    """``steps`` noisy steps, half of them in a run that is killed ``kills`` times."""
    started, shared = time.monotonic(), set(SHARED_MEMORY.glob(TENSORS))
    tiny, chance = Tiny.make(folder), random.Random(seed)
    nest = Nest(folder)
    killed = _config(tiny, "killed", steps // 2)
    alone = _config(tiny, "alone", steps // 2)
    first = nest.live(killed, death=Place("after the charge"))
    shutil.copytree(killed.run.dir, alone.run.dir)
    unbroken = nest.live(alone, health_every=HEALTH_EVERY)
    assert unbroken.exit_code == 0, unbroken.log
    step_cpu_s = unbroken.cpu_s / (steps // 2 + START_STEPS)
    lives = lives_until_done(
        nest, killed, chance, step_cpu_s=step_cpu_s, before=[first], kills=kills
    )
    found = faults(killed, lives, released_files(RunDir(alone.run.dir)))
    found += faults(alone, [first, unbroken], released_files(RunDir(killed.run.dir)))
    found += [
        f"{path} was left behind" for path in _nobodys(set(SHARED_MEMORY.glob(TENSORS)) - shared)
    ]
    found += [f"{path} was left behind" for path in nest.temporary.rglob("*")]
    window = steps // 2 // EPSILON_READINGS
    rss_MB, grown_MB, slope, files = growth(unbroken.health, window=window)
    if grown_MB > LARGEST_GROWTH_MB:
        found.append(f"memory grew by {grown_MB:.0f} MB")
    if slope > LARGEST_SLOPE:
        found.append(f"memory grows by {slope:.2f} MB in 1,000 steps")
    if files:
        found.append(f"open files differ by {files}")
    ended = sum(life.killed for life in lives)
    if ended < kills:
        found.append(f"the run was over after {ended} kills")
    done = sum(_steps_of(life) for life in lives)
    summary = read_ledger(RunDir(killed.run.dir).ledger)
    return Figures(
        seed=seed,
        steps=done + _steps_of(unbroken),
        repeated=done - summary.steps,
        kills=ended,
        starts=len(lives) + 1,
        ledger_lines=len(summary.hashes),
        epsilon=summary.epsilon,
        rss_MB=rss_MB,
        grown_MB=grown_MB,
        slope=slope,
        files=files,
        step_ms=1e3 * step_cpu_s,
        seconds=time.monotonic() - started,
        faults=found,
    )


def growth(
    health: Sequence[tuple[int, int, int]], *, window: int
) -> tuple[float, float, float, int]:
    """(resident MB at the end, MB more than at the start, MB per 1,000 steps, spread of open files),
    over the second half of ``health``: (step, resident bytes, open files).

    The slope is that within windows of ``window`` steps, between which epsilon is read: a reading
    leaves plans of Fourier transforms behind, of which scipy keeps sixteen at most.
    """
    step, resident, files = np.array(health[len(health) // 2 :], dtype=float).T
    steps, sizes = step / 1e3, resident / 1e6
    of_window = step // window
    for number in np.unique(of_window):
        inside = of_window == number
        steps[inside] -= steps[inside].mean()
        sizes[inside] -= sizes[inside].mean()
    slope = float(steps @ sizes / (steps @ steps))
    spread = int(files.max() - files.min())
    return resident[-1] / 1e6, float(resident[-1] - resident[0]) / 1e6, slope, spread


def _nobodys(paths: set[Path]) -> set[Path]:
    """Those of ``paths`` that no process of this machine uses."""
    used = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            used += maps.read_text()
    return {path for path in paths if str(path) not in used}


def _config(tiny: Tiny, name: str, steps: int) -> Config:
    finetune = {"batch": 3}
    checkpoints = {"checkpoint_every": 20, **OWN_KEY["run"]}
    config = tiny.config(name, steps=steps, finetune=finetune, run=checkpoints)
    noise = {"noise_multiplier": plan_of(config, records=80).noise_multiplier}
    return tiny.config(name, steps=steps, finetune=finetune, run=checkpoints, privacy=noise)


def _steps_of(life: Life) -> int:
    return sum(rank == 0 and purpose == "step" for rank, purpose, _, _ in life.releases)
