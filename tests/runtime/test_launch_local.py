"""Local launcher: real processes, real gloo groups, real deaths."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stages_for_tests as stages

from dpldm_dist.config import Config, parse_config
from dpldm_dist.errors import DpldmError, WorkerError
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir


def config_for(
    folder: Path, *, workers: int | list[int], seed: int = 0, timeout_s: float = 60.0
) -> Config:
    run = {"dir": str(folder), "workers": workers, "timeout_s": timeout_s, "device": "cpu"}
    return parse_config({"run": run, "sample": {"seed": seed}})


def start(stage, config: Config) -> None:
    RunDir(config.run.dir).create()
    launch([Job(stage, config)], run=config.run)


@pytest.mark.parametrize("asked", [1, 2, 3, [1, 2]], ids=str)
def test_all_workers_run_every_job_in_one_group(tmp_path, asked):
    config = config_for(tmp_path, workers=asked)
    workers = config.run.most_workers  # of a range this launcher takes the most
    RunDir(tmp_path).create()
    jobs = [Job(stages.add_up, config), Job(stages.add_up_again, config)]
    launch(jobs, run=config.run)
    notes = [
        json.loads((tmp_path / "release" / f"worker-{rank}.json").read_text())
        for rank in range(workers)
    ]
    assert [note["total"] for note in notes] == [workers * (workers + 1) // 2] * workers
    processes = [note["process"] for note in notes]
    assert len(set(processes)) == workers
    assert (os.getpid() in processes) == (workers == 1)
    for rank in range(workers):
        again = json.loads((tmp_path / "release" / f"again-{rank}.json").read_text())
        assert again["processes"] == processes


@pytest.mark.parametrize("number", range(len(stages._classes())))
def test_every_error_class_comes_back_as_itself(tmp_path, number):
    kind = sorted(stages._classes())[number]
    with pytest.raises(DpldmError) as caught:
        start(stages.fail_on_last, config_for(tmp_path, workers=2, seed=number))
    assert type(caught.value) is stages._classes()[kind]
    assert str(caught.value) == f"{kind}: found this, expected that, do so."


@pytest.mark.parametrize("workers", [1, 2])
def test_a_foreign_exception_shows_its_class_and_hides_its_text(tmp_path, workers):
    with pytest.raises(DpldmError) as caught:
        start(stages.crash_on_last, config_for(tmp_path, workers=workers))
    log = tmp_path / "private" / f"crash-rank{workers - 1}.log"
    assert "ValueError" in str(caught.value) and str(log) in str(caught.value)
    assert "31337" not in str(caught.value) and caught.value.exit_code == 1
    assert "31337" in log.read_text() and log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(stages.die_on_last, "signal 9, SIGKILL"), (stages.leave_on_last, "exit code 9")],
)
def test_a_dead_worker_is_named_within_ten_seconds(tmp_path, stage, expected):
    with pytest.raises(WorkerError, match="Worker 2 .*" + expected):
        start(stage, config_for(tmp_path, workers=3))
    died = json.loads((tmp_path / "release" / "death.json").read_text())
    assert time.monotonic() - died < 10


def test_a_hung_worker_ends_the_run_after_the_timeout(tmp_path):
    with pytest.raises(WorkerError, match="run.timeout_s"):
        start(stages.hang_on_last, config_for(tmp_path, workers=2, timeout_s=2.0))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_leave_with_their_driver(tmp_path, number):
    driver = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("driver_for_tests.py")), str(tmp_path)],
        stderr=subprocess.DEVNULL,
    )
    workers = [_wait_for_note(tmp_path / "release" / f"process-{rank}.json") for rank in range(2)]
    driver.send_signal(number)
    assert driver.wait(timeout=10) != 0
    deadline = time.monotonic() + 10
    while any(_alive(process) for process in workers):
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.02)


def test_released_files_become_readable_and_private_ones_stay_closed(tmp_path):
    start(stages.add_up, config_for(tmp_path, workers=2))
    previous = os.umask(0o022)
    try:
        RunDir(tmp_path).share()
    finally:
        os.umask(previous)
    assert (tmp_path / "release" / "worker-0.json").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


def test_a_function_that_workers_cannot_find_is_refused(tmp_path):
    with pytest.raises(TypeError, match="module-level"):
        start(lambda config, worker: None, config_for(tmp_path, workers=1))


def _wait_for_note(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.02)
    return json.loads(path.read_text())


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
