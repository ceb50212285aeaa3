"""Checkpoints: atomic, verified, private; kills and flipped bits never yield a wrong state."""

import json
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpldm_dist.errors import RunError
from dpldm_dist.runtime.checkpoint import Checkpoints

FORK_AND_SAVE = """
import json, os, random, select, signal, sys, torch
from dpldm_dist.runtime.checkpoint import Checkpoints
torch.set_num_threads(1)
folder, seed = sys.argv[1:]
generator = random.Random(seed)

def save_forever(pipe):
    checkpoints = Checkpoints(folder, keep=2)
    found = checkpoints.latest()
    step = found.step if found else 0
    while True:
        step += 1
        checkpoints.save(step, {"weight": torch.full((20000,), float(step))}, {"again": step})
        os.write(pipe, f"{step}\\n".encode())

for _ in range(5):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(writing)
    os.close(writing)
    acknowledged = os.read(reading, 4096)  # at least one save is done
    select.select([], [], [], generator.uniform(0, 0.03))  # then any moment of the next ones
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    while more := os.read(reading, 4096):
        acknowledged += more
    os.close(reading)
    found = Checkpoints(folder, keep=2).latest()
    print(json.dumps({
        "signal": os.WTERMSIG(status),
        "acknowledged": int(acknowledged.split()[-1]),
        "found": found.step,
        "whole": bool((found.tensors["weight"] == found.step).all())
        and found.facts == {"again": found.step} and not found.skipped,
    }), flush=True)
"""


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


def test_kills_at_random_moments_never_leave_an_unusable_folder(tmp_path):
    """20 deaths while saving; after each, the newest whole checkpoint is at most one save old."""
    generator = random.Random(20)
    for _ in range(4):
        worker = subprocess.Popen(
            [sys.executable, "-c", FORK_AND_SAVE, str(tmp_path), str(generator.random())],
            stdout=subprocess.PIPE,
            text=True,
        )
        report, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0
        outcomes = [json.loads(line) for line in report.splitlines()]
        assert len(outcomes) == 5
        for outcome in outcomes:
            assert outcome["signal"] == signal.SIGKILL
            assert outcome["found"] >= outcome["acknowledged"] and outcome["whole"]
    assert outcomes[-1]["found"] > 20  # the loop did save between the deaths


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
