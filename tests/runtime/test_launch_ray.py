"""Ray launcher on a real Ray: same jobs, same errors, nothing left behind."""

import json
import os
import signal
import stat
from pathlib import Path

import pytest
import ray
import stages_for_tests as stages

from dpldm_dist.config import Config, parse_config
from dpldm_dist.errors import BringUpError, DpldmError, PrivacyError, WorkerError
from dpldm_dist.runtime import launch_ray
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir


def config_for(folder: Path, *, seed: int = 0, address: str = "local", workers: int = 2) -> Config:
    run = {"dir": str(folder), "workers": workers, "launcher": "ray", "device": "cpu"}
    run |= {"ray_address": address, "timeout_s": 60.0}
    return parse_config({"run": run, "sample": {"seed": seed}})


@pytest.fixture(scope="module")
def joined_ray(tmp_path_factory):
    """One Ray for all tests that find this process joined already."""
    with launch_ray.ray_cluster(config_for(tmp_path_factory.mktemp("run")).run):
        yield


def test_a_ray_of_our_own_runs_all_jobs_and_leaves_nothing(tmp_path, capfd):
    config = config_for(tmp_path)
    RunDir(tmp_path).create()
    before = dict(os.environ), set(Path("/tmp").glob("dpldm-*")), signal.getsignal(signal.SIGINT)
    home = Path.home() / ".ray" / "auth_token"
    token_before = home.exists()
    launch([Job(stages.add_up, config), Job(stages.add_up_again, config)], run=config.run)
    after = dict(os.environ), set(Path("/tmp").glob("dpldm-*")), signal.getsignal(signal.SIGINT)
    assert after == before and home.exists() == token_before and not ray.is_initialized()
    notes = [
        json.loads((tmp_path / "release" / f"worker-{rank}.json").read_text()) for rank in (0, 1)
    ]
    assert [note["total"] for note in notes] == [3, 3]
    assert notes[0]["folder"] == os.getcwd()
    again = json.loads((tmp_path / "release" / "again-1.json").read_text())
    assert again["processes"] == [note["process"] for note in notes]
    assert list((tmp_path / "private").iterdir()) == []
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err == "", "only our own progress is shown"


def test_files_of_our_ray_are_closed_to_other_users(joined_ray):
    folder = Path(os.environ["RAY_TMPDIR"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode) == 0o600


def test_an_error_comes_back_as_itself_and_not_as_the_lost_connection(joined_ray, tmp_path):
    number = sorted(stages._classes()).index("PrivacyError")
    config = config_for(tmp_path, seed=number)
    with pytest.raises(PrivacyError) as caught:
        launch([Job(stages.fail_on_last, config)], run=config.run)
    assert str(caught.value) == "PrivacyError: found this, expected that, do so."
    assert ray.is_initialized(), "a Ray that was joined before stays joined"


def test_every_error_class_passes_through_ray(joined_ray):
    @ray.remote(num_cpus=1)
    def fail(error):
        raise error

    for name, kind in stages._classes().items():
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            ray.get(fail.remote(kind(f"{name}: one line.")))
        failure = ray.train.WorkerGroupError("", {0: caught.value})
        explained = launch_ray.explain_ray(failure)
        assert type(explained) is kind and str(explained) == f"{name}: one line."


def test_a_foreign_exception_shows_its_class_and_hides_its_text(joined_ray, tmp_path):
    config = config_for(tmp_path)
    with pytest.raises(DpldmError) as caught:
        launch([Job(stages.crash_on_last, config)], run=config.run)
    log = tmp_path / "private" / "crash-rank1.log"
    assert type(caught.value) is DpldmError and "ValueError" in str(caught.value)
    assert "31337" not in str(caught.value) and "31337" in log.read_text()
    for path in Path(os.environ["RAY_TMPDIR"]).rglob("*.log"):
        assert "31337" not in path.read_text(errors="replace"), path


def test_a_killed_worker_is_named(joined_ray, tmp_path):
    config = config_for(tmp_path)
    with pytest.raises(WorkerError, match="(Worker 1|A worker) died"):
        launch([Job(stages.die_on_last, config)], run=config.run)


def test_too_small_a_cluster_is_refused_at_once(joined_ray, tmp_path):
    config = config_for(tmp_path, workers=3)
    with pytest.raises(BringUpError, match="2 CPUs where 3 are needed"):
        launch([Job(stages.add_up, config)], run=config.run)


def test_the_interface_of_an_address_is_found():
    assert launch_ray.interface_of("127.0.0.1") == "lo"
    assert launch_ray.interface_of("203.0.113.77") is None
