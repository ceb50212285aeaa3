"""The watchdog ends a process that does nothing, and no process that works."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dpldm_dist.runtime.watchdog import STALLED, watched

WATCHED = """
import json, os, sys, threading, time
from pathlib import Path
from dpldm_dist.runtime.watchdog import watched

def stuck_here():
    threading.Event().wait()

def busy(seconds):
    while time.thread_time() < seconds:
        pass

def looking():  # as a loop does that waits for a file
    while True:
        time.sleep(0.2)

with watched(Path(sys.argv[1]), limit_s=1.0):
    busy(3.0)  # three limits long
    if sys.argv[2] == "stuck":
        stuck_here()
    if sys.argv[2] == "looking":
        looking()
time.sleep(2.5)  # it ended: nobody watches any more
print("done")
"""


def run(report: Path, what: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WATCHED, str(report), what]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_process_that_works_is_left_alone(tmp_path):
    ended = run(tmp_path / "stalled.log", "works")
    assert (ended.returncode, ended.stdout) == (0, "done\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["stuck", "looking"])
def test_a_process_that_does_nothing_is_ended_and_says_where_it_stood(tmp_path, what):
    report = tmp_path / "stalled.log"
    assert run(report, what).returncode == STALLED
    assert f"in {what if what == 'looking' else 'stuck_here'}" in report.read_text()
    assert stat.S_IMODE(report.stat().st_mode) == 0o600


def test_an_earlier_report_is_kept(tmp_path):
    report = tmp_path / "stalled.log"
    for text in ("first", "second"):
        report.write_text(text)
        with watched(report, limit_s=60.0):
            assert not report.exists()
    kept = sorted(path.read_text() for path in tmp_path.iterdir())
    assert kept == ["first", "second"]
