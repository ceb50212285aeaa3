"""Checkpoints: atomic, verified, private; kills and flipped bits never yield a wrong state."""

import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from unittest import mock

import pytest
import torch

from dpldm_dist.errors import RunError
from dpldm_dist.runtime.checkpoint import Checkpoints

# A parent that has torch already forks a child for every death.
FORK_AND_DIE = """
import json, os, random, select, signal, sys, torch
from pathlib import Path
from dpldm_dist.runtime import checkpoint
from dpldm_dist.runtime.checkpoint import Checkpoints
torch.set_num_threads(1)

def save(folder, step):
    weight = torch.full((20000,), float(step))
    Checkpoints(folder, keep=2).save(step, {"weight": weight}, {"again": step})

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def child_dies(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])

def state(folder):
    found = Checkpoints(folder, keep=2).latest()
    assert found is not None, "no checkpoint"
    whole = bool((found.tensors["weight"] == found.step).all())
    return found.step, whole and found.facts == {"again": found.step} and not found.skipped

def at_random_moments(folder, deaths):
    generator = random.Random(20)
    for _ in range(deaths):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            step = state(folder)[0] if any(folder.iterdir()) else 0
            while True:
                step += 1
                save(folder, step)
                os.write(writing, b"%d " % step)
        os.close(writing)
        acknowledged = os.read(reading, 4096)  # at least one save is done
        select.select([], [], [], generator.uniform(0, 0.03))  # then any moment of the next ones
        os.kill(child, signal.SIGKILL)
        died = os.WTERMSIG(os.waitpid(child, 0)[1])
        while more := os.read(reading, 4096):
            acknowledged += more
        os.close(reading)
        step, whole = state(folder)
        yield {"signal": died, "least": int(acknowledged.split()[-1]), "step": step, "whole": whole}

def at_named_points(folder):
    # every call that changes the folder, and the middle of every file
    names = ("mkdir", "fsync", "rename", "unlink", "rmdir")
    originals = {name: getattr(os, name) for name in names}
    durably = checkpoint._write_durably
    place = 0
    while True:
        place += 1
        here = folder / str(place)
        save(here, 1)
        save(here, 2)
        reading, writing = os.pipe()

        def until(place=place):
            passed = []
            def point(name):
                passed.append(name)
                if len(passed) == place:
                    os.write(writing, name.encode())
                    die()
            def counted(name):
                def call(*arguments, **named):
                    point(f"before {name} {sum(name in p for p in passed) + 1}")
                    return originals[name](*arguments, **named)
                return call
            def half(path, content):
                passed.append(f"within {path.name}")
                if len(passed) == place:
                    path.write_bytes(content[: len(content) // 2])
                    os.write(writing, passed[-1].encode())
                    die()
                durably(path, content)
            for name in names:
                setattr(os, name, counted(name))
            checkpoint._write_durably = half
            save(here, 3)

        died = child_dies(until)
        os.close(writing)
        name = os.read(reading, 4096).decode()
        os.close(reading)
        step, whole = state(here)
        save(here, 4)
        left = sorted(path.name for path in here.iterdir())
        yield {"signal": died, "step": step, "whole": whole, "place": name, "left": left}
        if died == 0:
            return

folder = Path(sys.argv[1])
(folder / "random").mkdir()

def planted(bug, change):
    if os.fork():
        os.wait()
        return
    exec(change, globals())
    outcomes, error = [], ""
    try:
        outcomes.extend(at_named_points(folder / bug))
    except Exception as caught:
        error = str(caught) if isinstance(caught, AssertionError) else type(caught).__name__
    print(json.dumps(["planted", {"bug": bug, "outcomes": outcomes, "error": error}]), flush=True)
    os._exit(0)

for outcome in at_random_moments(folder / "random", 20):
    print(json.dumps(["random", outcome]), flush=True)
for outcome in at_named_points(folder / "named"):
    print(json.dumps(["named", outcome]), flush=True)
for bug, change in json.loads(sys.argv[2]).items():
    planted(bug, change)
"""


PLANTED = {
    "in place": """
        def in_place(self, step, contents):
            path = self._folder / f"00000001-step-{step:08d}"
            for old in self._saved():
                old.rename(path)
            path.mkdir(exist_ok=True)
            for name, content in contents.items():
                (path / name).unlink(missing_ok=True)
                checkpoint._write_durably(path / name, content)
            return path
        Checkpoints._write = in_place
    """,
    "old ones go first": """
        write = Checkpoints._write
        def eager(self, step, contents):
            for old in self._saved():
                self._remove(old)
            return write(self, step, contents)
        Checkpoints._write = eager
    """,
    "the name comes first": """
        def named_first(self, step, contents):
            saved = self._saved()
            number = int(saved[-1].name[:8]) + 1 if saved else 1
            path = self._folder / f"{number:08d}-step-{step:08d}"
            path.mkdir()
            for old in [*saved, path][: -self._keep]:
                self._remove(old)
            for name, content in reversed(contents.items()):
                checkpoint._write_durably(path / name, content)
            return path
        Checkpoints._write = named_first
    """,
}


def save(folder: Path, *steps: int, keep: int = 2) -> list[Path]:
    checkpoints = Checkpoints(folder, keep)
    return [
        checkpoints.save(step, {"weight": torch.full((100,), float(step))}, {"head": f"h{step}"})
        for step in steps
    ]


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    base = torch.randn(6, 4)
    tensors = {
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "count": torch.tensor(2**62),
        "transposed": base.T,
        "view": base[2:4],
        "empty": torch.zeros(0, 5),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    Checkpoints(tmp_path, 1).save(7, tensors, {"head": "ab", "numbers": [1, 2.5, None]})
    found = Checkpoints(tmp_path, 1).latest()
    assert found.step == 7 and found.facts == {"head": "ab", "numbers": [1, 2.5, None]}
    assert found.tensors.keys() == tensors.keys() and found.skipped == ()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert _bytes(found.tensors[name]) == _bytes(tensor)


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "nothing", 1).latest() is None


def test_only_the_newest_ones_stay(tmp_path):
    paths = save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(tmp_path.iterdir()) == paths[2:]


def test_the_last_save_counts_after_a_fall_back_to_a_lower_step(tmp_path):
    save(tmp_path, 10, 20)
    save(tmp_path, 12)
    assert Checkpoints(tmp_path, 2).latest().step == 12


def test_no_other_user_can_read_a_checkpoint(tmp_path):
    (path,) = save(tmp_path / "checkpoints", 1)
    assert all(item.stat().st_mode & 0o077 == 0 for item in [path.parent, path, *path.iterdir()])


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "manifest.json"])
def test_any_flipped_bit_falls_back_to_the_checkpoint_before_and_says_so(tmp_path, name, caplog):
    newest = save(tmp_path, 1, 2)[-1]
    file = newest / name
    good = file.read_bytes()
    generator = random.Random(name)
    for _ in range(100):
        bad = bytearray(good)
        bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
        file.write_bytes(bytes(bad))
        found = Checkpoints(tmp_path, 2).latest()
        assert found.step == 1 and torch.equal(found.tensors["weight"], torch.ones(100))
        assert str(newest) in found.skipped[0] and str(newest) in caplog.text
    file.write_bytes(good)  # unchanged input is accepted
    assert Checkpoints(tmp_path, 2).latest().step == 2


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_torn_file_falls_back_to_the_checkpoint_before(tmp_path, name, damage):
    file = save(tmp_path, 1, 2)[-1] / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    assert Checkpoints(tmp_path, 2).latest().step == 1


def test_a_checkpoint_under_another_step_is_damaged(tmp_path):
    newest = save(tmp_path, 1, 2)[-1]
    newest.rename(newest.with_name("00000002-step-00000009"))
    assert Checkpoints(tmp_path, 2).latest().step == 1


def test_nothing_but_damage_stops_the_run(tmp_path):
    for path in save(tmp_path, 1, 2):
        (path / "facts.json").unlink()
    with pytest.raises(RunError, match="All 2 checkpoints .* damaged"):
        Checkpoints(tmp_path, 2).latest()


def test_a_full_disk_leaves_the_checkpoint_before_and_no_half_one(tmp_path):
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # files cannot grow beyond 4096 bytes
    try:
        with pytest.raises(RunError, match="The one before is intact"):
            Checkpoints(tmp_path, 2).save(2, {"weight": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(list(tmp_path.iterdir())) == 1
    assert Checkpoints(tmp_path, 2).latest().step == 1


@pytest.fixture(scope="module")
def deaths(tmp_path_factory) -> dict[str, list]:
    """What 20 deaths at random moments, one at every named point, and those of planted bugs left
    behind."""
    folder = tmp_path_factory.mktemp("deaths")
    bugs = json.dumps({bug: dedent(change) for bug, change in PLANTED.items()})
    told = subprocess.run(
        [sys.executable, "-c", FORK_AND_DIE, str(folder), bugs],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    found: dict[str, list] = {"random": [], "named": [], "planted": []}
    for line in told.stdout.splitlines():
        kind, outcome = json.loads(line)
        found[kind].append(outcome)
    return found


def test_20_kills_at_random_moments_leave_no_unusable_folder(deaths):
    """After each, the newest whole checkpoint is the last acknowledged one, or a newer one."""
    outcomes = deaths["random"]
    assert len(outcomes) == 20
    for outcome in outcomes:
        assert outcome["signal"] == signal.SIGKILL
        assert outcome["step"] >= outcome["least"] and outcome["whole"]
    assert outcomes[-1]["step"] > 20  # the loop did save between the deaths


def test_a_kill_at_any_point_of_saving_leaves_this_checkpoint_or_the_one_before(deaths):
    *outcomes, unbroken = deaths["named"]
    for outcome in outcomes:
        assert outcome["signal"] == signal.SIGKILL
        assert outcome["step"] in (2, 3) and outcome["whole"], outcome
    assert unbroken["signal"] == 0 and unbroken["step"] == 3
    places = [outcome["place"] for outcome in outcomes]
    assert len(set(places)) == len(places) >= 15
    for named in ("within tensors", "within facts", "within manifest", "before fsync 1",
                  "before rename 1", "before rename 2", "before unlink 1", "before rmdir 1"):  # fmt: skip
        assert any(place.startswith(named) for place in places), named
    found = [outcome["step"] for outcome in outcomes]
    assert found == sorted(found) and {2, 3} == set(found)  # the new one from one point on


def test_the_save_after_a_death_clears_what_it_left(deaths):
    for outcome in deaths["named"]:
        names = outcome["left"]
        assert len(names) == 2 and names[-1].endswith("-step-00000004"), outcome
        assert not any(name.startswith(".") for name in names), outcome


@pytest.mark.parametrize("bug", PLANTED)
def test_a_save_that_is_not_atomic_is_caught_by_these_kills(deaths, bug):
    """Planted bugs: a death at one of the points loses a checkpoint, or leaves none."""
    (outcome,) = [outcome for outcome in deaths["planted"] if outcome["bug"] == bug]
    wrong = [o for o in outcome["outcomes"] if o["step"] not in (2, 3) or not o["whole"]]
    assert wrong or outcome["error"] in ("RunError", "no checkpoint"), outcome


def test_a_checkpoint_that_was_found_damaged_does_not_count_as_kept(tmp_path):
    """With two to keep: the whole one must not make room while a damaged one stays."""
    first, second = save(tmp_path, 1, 2)
    (second / "facts.json").write_bytes(b"{}")
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest().step == 1
    third = checkpoints.save(3, {"weight": torch.zeros(3)}, {})
    assert sorted(tmp_path.iterdir()) == [first, third]
    (third / "facts.json").write_bytes(b"{}")
    assert Checkpoints(tmp_path, keep=2).latest().step == 1


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "much longer"])
def test_what_is_no_plain_file_of_the_right_size_is_passed_over_and_not_waited_for(
    tmp_path, name, kind
):
    (tmp_path / "checkpoints").mkdir()
    file = save(tmp_path / "checkpoints", 1, 2)[-1] / name
    file.rename(tmp_path / "aside")
    if kind == "link":
        file.symlink_to(tmp_path / "aside")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.write_bytes((tmp_path / "aside").read_bytes() + bytes(10_000))
    assert Checkpoints(tmp_path / "checkpoints", 2).latest().step == 1


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b'{"step": "2", "facts": {}}', b'{"step": 2, "facts": []}', b"\xff"]
)
def test_facts_of_another_form_are_passed_over_although_their_manifest_vouches_for_them(
    tmp_path, content
):
    newest = save(tmp_path, 1, 2)[-1]
    (newest / "facts.json").write_bytes(content)
    names = ("tensors.safetensors", "facts.json")
    files = {
        name: {
            "bytes": len((newest / name).read_bytes()),
            "sha256": hashlib.sha256((newest / name).read_bytes()).hexdigest(),
        }
        for name in names
    }
    forged = json.dumps({"files": files, "format": 1}, sort_keys=True).encode()
    (newest / "manifest.json").write_bytes(forged)
    assert Checkpoints(tmp_path, 2).latest().step == 1


def test_an_old_checkpoint_that_cannot_be_removed_now_goes_with_a_later_save(tmp_path):
    """A network disk keeps files that somebody has open."""
    save(tmp_path, 1)
    with mock.patch.object(os, "unlink", side_effect=OSError(errno.EBUSY, "busy")):
        save(tmp_path, 2, 3)
        assert Checkpoints(tmp_path, 2).latest().step == 3
    save(tmp_path, 4)
    assert len(list(tmp_path.iterdir())) == 2


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
