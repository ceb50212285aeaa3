"""Runs that are killed again and again, on real processes: the acid test of exact replay.

``python -m tests.soak`` does the same for longer.
"""

from __future__ import annotations

import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dpldm_dist.config import Config
from dpldm_dist.errors import SavedAndStopped
from dpldm_dist.privacy import native
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime.rundir import RunDir
from tests.soak.bugs import BUGS, HARMLESS
from tests.soak.inside import Place
from tests.soak.lives import LIMIT_S, START_STEPS, Nest, crew, lives_until_done
from tests.soak.tiny import OWN_KEY, STEPS, Tiny, arguments
from tests.soak.verdict import faults, released_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def nest(tmp_path_factory):
    return Nest(tmp_path_factory.mktemp("lives"))


@pytest.fixture(scope="module")
def unbroken(tiny, nest):
    """What a run of the fixed key releases when nothing happens to it, and its CPU time per step."""
    config = tiny.config("unbroken")
    life = nest.live(config)
    assert life.exit_code == 0, life.log
    return released_files(RunDir(config.run.dir)), life.cpu_s / (STEPS + START_STEPS)


# --- kill -9 --------------------------------------------------------------------------------------


def test_35_random_kills_change_no_bit_of_what_a_run_of_a_fixed_key_releases(tiny, nest, unbroken):
    chance, kills, runs = random.Random(0), 0, 0
    released, step_cpu_s = unbroken
    while kills < 35:
        config, runs = tiny.config(f"fixed-{runs}"), runs + 1
        lives = lives_until_done(nest, config, chance, step_cpu_s=step_cpu_s)
        assert faults(config, lives, released) == []
        kills += sum(life.killed for life in lives)
    assert runs > 1


def test_15_random_kills_change_no_bit_of_what_a_run_of_its_own_key_releases(tiny, nest, unbroken):
    """It is compared with a copy of its directory, made after the first kill, that runs on."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    chance, kills, runs = random.Random(seed), 0, 0
    while kills < 15:
        config, runs = tiny.config(f"own-{runs}", **OWN_KEY), runs + 1
        place = Place("after the charge", chance.randint(1, STEPS + 1))
        first = nest.live(crew(config, chance.choice((1, 2, 3))), death=place)
        twin = tiny.config(f"twin-{runs}", run={**OWN_KEY["run"], "dir": f"{config.run.dir}-twin"})
        shutil.copytree(config.run.dir, twin.run.dir)
        assert nest.live(twin).exit_code == 0
        lives = lives_until_done(nest, config, chance, step_cpu_s=unbroken[1], before=[first])
        assert faults(config, lives, released_files(RunDir(twin.run.dir))) == []
        kills += sum(life.killed for life in lives)


@pytest.mark.parametrize(
    ("bug", "noticed"),
    [
        (None, None),
        ("a repeated step gets fresh noise", "step 4 was released in"),
        ("the noise comes from torch's generator", "step 4 was released in"),
        ("a repeated step is charged again", "step 4 was charged 2 times"),
        ("what a record draws depends on the number of workers", "the ledger says rebound ="),
        ("a checkpoint lacks the optimizer's memory", "step 5 was released in"),
    ],
)
def test_a_planted_bug_is_noticed_after_two_kills(tiny, nest, unbroken, bug, noticed):
    found = faults_after_two_kills(tiny, nest, unbroken, bug)
    if bug is None:
        assert found == []
    else:
        assert any(line.startswith(noticed) for line in found), found


def faults_after_two_kills(tiny, nest, unbroken, bug: str | None) -> list[str]:
    """One worker that is killed, then two of whom one is, then three to the end."""
    name = "without-bug" if bug is None else bug.replace(" ", "-")
    lives = [
        nest.live(tiny.config(name, workers=workers), death=death, bug=bug)
        for workers, death in (
            (1, Place("after the update", 7)),
            (2, Place("after the release", 3, rank=1)),
            (3, None),
        )
    ]
    assert bug is not None or [life.killed for life in lives] == [True, True, False]
    return faults(tiny.config(name), lives, unbroken[0])


@pytest.mark.skipif(not native.serves(torch.device("cpu")), reason="no compiled kernels here")
@pytest.mark.parametrize("bug", HARMLESS)
def test_how_records_are_packed_changes_no_released_bit(tiny, nest, unbroken, bug):
    """Records are rounded one by one, and integers added: there is nothing to notice."""
    assert faults_after_two_kills(tiny, nest, unbroken, bug) == []


def test_every_planted_bug_is_tried():
    tried = test_a_planted_bug_is_noticed_after_two_kills.pytestmark[0].args[1]
    assert {bug for bug, _ in tried} == {None, *BUGS}


# --- damage, budget -------------------------------------------------------------------------------


def test_a_flipped_bit_in_the_newest_checkpoint_costs_nothing_but_time(tiny, nest, unbroken):
    config = tiny.config("flipped")
    lives = [nest.live(config, death=Place("after the update", 10))]
    newest = max(RunDir(config.run.dir).checkpoints.glob("*-step-00000008"))
    flip_a_bit(newest / "tensors.safetensors", random.Random(0))
    lives.append(nest.live(crew(config, 2)))
    assert f"{newest} is damaged" in lives[1].log
    assert min(step for _, purpose, step, _ in lives[1].releases if purpose == "step") == 4
    assert faults(config, lives, unbroken[0]) == []


def test_what_a_kill_leaves_half_written_in_a_release_is_gone_at_the_end(tiny, nest, unbroken):
    config = tiny.config("half-written")
    lives = [nest.live(config, death=Place("before the manifest"))]
    release = RunDir(config.run.dir).release
    (release / ".manifest.json.7.partial").write_text("{")
    for name in ("model.part", "model.old"):
        (release / name / "unet").mkdir(parents=True)
    lives.append(nest.live(config))
    assert faults(config, lives, unbroken[0]) == []


def flip_a_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def test_a_run_whose_budget_is_reached_says_so_and_a_restart_does_nothing(tiny, nest):
    """Other microbatches make a new attempt; what it repeats is charged, and then missing."""
    config = tiny.config("spent", **OWN_KEY)
    assert nest.live(config, death=Place("after the release", 8)).killed  # seven steps are charged
    other = tiny.config("spent", run={**OWN_KEY["run"], "microbatch": 5})
    last = nest.live(crew(other, 2))
    assert last.exit_code == 0 and f"Budget reached after 9 of {STEPS} steps." in last.log
    ledger = RunDir(config.run.dir).ledger
    summary = read_ledger(ledger)
    assert (summary.steps, summary.attempts, summary.sealed) == (STEPS, 2, True)
    assert summary.epsilon <= summary.budget
    before, released = ledger.read_bytes(), released_files(RunDir(config.run.dir))
    again = nest.live(other)
    assert again.exit_code == 0 and again.releases == []
    assert ledger.read_bytes() == before
    assert released_files(RunDir(config.run.dir)) == released


# --- the command line as it is --------------------------------------------------------------------


def test_a_command_that_is_killed_and_told_to_stop_goes_on_when_given_again(tiny, nest):
    """Its own processes, imports and all, with two workers and with one: kill -9 of the driver, then
    the signals that ask it to save."""
    unbroken = tiny.config("unbroken-30", steps=30)
    assert nest.live(unbroken).exit_code == 0
    config = tiny.config("by-hand", steps=30)
    for workers, number, exit_code in (
        (2, signal.SIGKILL, -signal.SIGKILL),
        (1, signal.SIGKILL, -signal.SIGKILL),
        (2, signal.SIGTERM, SavedAndStopped.exit_code),
        (1, signal.SIGUSR1, SavedAndStopped.exit_code),
    ):
        with command(crew(config, workers)) as driver:
            wait_for_steps(RunDir(config.run.dir), 3, driver)
            driver.send_signal(number)
            said = driver.communicate(timeout=LIMIT_S)[0]
        assert driver.returncode == exit_code, said
        asked = number != signal.SIGKILL
        assert ("saved. To go on, give the same command" in said) == asked, said
    with command(config) as driver:
        said = driver.communicate(timeout=LIMIT_S)[0]
    assert driver.returncode == 0, said
    summary = read_ledger(RunDir(config.run.dir).ledger)
    assert (summary.steps, summary.statistics, summary.attempts) == (30, 1, 1)
    assert (summary.starts, summary.rebound) == (5, 0)
    found = released_files(RunDir(config.run.dir))
    assert found == released_files(RunDir(unbroken.run.dir))


@contextmanager
def command(config: Config) -> Iterator[subprocess.Popen]:
    """``dpldm finetune`` with this config; it is gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "dpldm_dist", *arguments(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def wait_for_steps(run: RunDir, more: int, driver: subprocess.Popen) -> None:
    """Until the ledger has so many more finished sums than now."""
    before, deadline = finished_sums(run), time.monotonic() + LIMIT_S
    while finished_sums(run) < before + more:
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "no step is made"
        time.sleep(0.005)


def finished_sums(run: RunDir) -> int:
    return run.ledger.read_bytes().count(b'"kind":"bind"') if run.ledger.exists() else 0
