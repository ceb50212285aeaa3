"""The run directory: who may read what, who holds it, where the key comes from."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dpldm_dist.config import parse_config
from dpldm_dist.errors import ConfigError, PrivacyError, RunError
from dpldm_dist.runtime.rundir import RunDir, dataset_dir, private_files, require_free

HOLD = """
import sys, signal
from dpldm_dist.runtime.rundir import RunDir
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    signal.pause()
"""
ASK_FOR_KEY = """
import sys
from dpldm_dist.runtime.rundir import RunDir
run = RunDir(sys.argv[1]).create()
sys.stdin.readline()
print(run.run_key().hex())
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_user_can_enter_the_private_folder(tmp_path):
    (tmp_path / "private").mkdir(mode=0o755)  # made by hand, or by an older version
    run = RunDir(tmp_path).create().create()
    assert mode(run.private) == 0o700
    with private_files():
        (run.private / "folder").mkdir()
        (run.private / "file").write_text("")
    assert mode(run.private / "folder") == 0o700 and mode(run.private / "file") == 0o600


def test_sharing_opens_what_is_released_and_nothing_else(tmp_path):
    run = RunDir(tmp_path).create()
    with private_files():
        (run.release / "samples").mkdir()
        for folder in [run.release / "samples", run.public, run.private]:
            (folder / "file").write_text("")
    previous = os.umask(0o027)
    try:
        run.share()
    finally:
        os.umask(previous)
    assert mode(run.release / "samples") == 0o750
    assert mode(run.release / "samples" / "file") == mode(run.public / "file") == 0o640
    assert mode(run.private) == 0o700 and mode(run.private / "file") == 0o600


def test_a_second_start_is_refused_until_the_first_is_gone(tmp_path):
    run = RunDir(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError) as caught, run.lock():
        pass
    expected = f"{tmp_path} is busy: process {holder.pid} on {socket.gethostname()} holds it"
    assert expected in str(caught.value) and caught.value.exit_code == 6
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with run.lock():
        pass


def test_the_key_is_made_once_whoever_asks_first(tmp_path):
    askers = [
        subprocess.Popen(
            [sys.executable, "-c", ASK_FOR_KEY, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for asker in askers:
        asker.stdin.write("go\n")
        asker.stdin.flush()
    keys = {asker.communicate()[0].strip() for asker in askers}
    assert keys == {RunDir(tmp_path).run_key().hex()} and len(keys.pop()) == 64
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["key"]
    assert mode(tmp_path / "private" / "key") == 0o600


def test_a_destroyed_key_leaves_no_link_to_it_that_a_killed_start_had_made(tmp_path):
    run = RunDir(tmp_path).create()
    key = run.run_key()
    os.link(run.key, run.private / "key.0011223344556677.part")
    descriptor = os.open(run.key, os.O_RDONLY)  # the bytes themselves, whatever names they have
    run.destroy_key()
    run.destroy_key()
    assert list(run.private.iterdir()) == []
    content = os.read(descriptor, 2 * len(key))
    os.close(descriptor)
    assert content == bytes(len(key))


def test_two_runs_have_different_keys(tmp_path):
    keys = [RunDir(tmp_path / name).create().run_key() for name in ("a", "b")]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620])
def test_a_key_that_others_could_read_is_refused(tmp_path, bits):
    run = RunDir(tmp_path).create()
    run.run_key()
    run.key.chmod(bits)
    with pytest.raises(PrivacyError, match="expected 0600"):
        run.run_key()


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_damaged_key_is_refused(tmp_path, content):
    run = RunDir(tmp_path).create()
    with private_files():
        run.key.write_bytes(content)
    with pytest.raises(PrivacyError, match=f"found {len(content)} bytes, expected 32"):
        run.run_key()


def test_a_link_in_place_of_the_key_is_refused(tmp_path):
    run = RunDir(tmp_path).create()
    with private_files():
        (tmp_path / "elsewhere").write_bytes(b"x" * 32)
    run.key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PrivacyError, match="Cannot read the key"):
        run.run_key()


def test_a_pipe_in_place_of_the_key_is_refused_and_not_waited_for(tmp_path):
    run = RunDir(tmp_path).create()
    os.mkfifo(run.key, 0o600)
    with pytest.raises(PrivacyError, match=r"Cannot read the key|damaged"):
        run.run_key()


def test_a_test_key_is_used_and_not_stored(tmp_path):
    run = RunDir(tmp_path).create()
    assert run.run_key("ab" * 32) == b"\xab" * 32 and not run.key.exists()
    for text in ["", "ab", "zz" * 32, "ab" * 33]:
        with pytest.raises(ConfigError, match="64 hexadecimal digits"):
            run.run_key(text)


def test_a_full_disk_is_said_before_the_start(tmp_path):
    with pytest.raises(RunError, match="Disk nearly full"):
        require_free(tmp_path, 2**62)
    with pytest.raises(RunError, match="Disk nearly full"):
        RunDir(tmp_path).create(least_free_bytes=2**62)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot make the run directory"):
        RunDir(tmp_path / "file" / "run").create()


def test_paths_are_absolute_and_data_sets_can_lie_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"private": {"latents": "shared/latents"}}
    config = parse_config({"run": {"dir": "runs/a"}, "data": data})
    root = tmp_path / "runs" / "a"
    assert RunDir(config.run.dir).ledger == root / "private" / "ledger.jsonl"
    assert dataset_dir(config, "public", "images") == root / "public" / "images"
    assert dataset_dir(config, "private", "images") == root / "private" / "images"
    assert dataset_dir(config, "heldout", "latents") == root / "private" / "heldout-latents"
    assert dataset_dir(config, "private", "latents") == tmp_path / "shared" / "latents"
