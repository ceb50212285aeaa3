"""Ray launcher on a real Ray: same jobs, same errors, nothing left behind."""

import fcntl
import json
import os
import shutil
import signal
import stat
import threading
import time
from pathlib import Path

import finetune_for_tests as tiny
import numpy as np
import pytest
import ray
import stages_for_tests as stages
import torch

from dpldm_dist.config import Config, parse_config
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.errors import (
    BringUpError,
    DpldmError,
    PrivacyError,
    RunError,
    SavedAndStopped,
    WorkerError,
)
from dpldm_dist.models.directory import load_model
from dpldm_dist.runtime import launch_ray
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.policies_ray import RuledTrainer, explain_ray
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.stopping import SIGNALS, stop_file, stop_on_signals
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.encode import encode
from dpldm_dist.stages.pretrain import pretrain
from tests.stages.tiny_data import tiny_config, write_images


def config_for(folder: Path, *, seed: int = 0, **changes: object) -> Config:
    run = {"dir": str(folder), "workers": 2, "launcher": "ray", "device": "cpu", "timeout_s": 60.0}
    return parse_config({"run": run | changes, "sample": {"seed": seed}})


def surroundings() -> tuple[object, ...]:
    """What a launch must leave as it was."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)]
    ours = set(Path("/tmp").glob("dpldm-*")) - set(Path("/tmp").glob("dpldm-test-*"))
    return dict(os.environ), ours, handlers


def totals(folder: Path, workers: int) -> list[int]:
    notes = [folder / "release" / f"total-{rank}.json" for rank in range(workers)]
    return [json.loads(note.read_text()) for note in notes]


@pytest.fixture(scope="module")
def joined_ray(tmp_path_factory):
    """One Ray for all tests that find this process joined already."""
    with launch_ray.ray_cluster(config_for(tmp_path_factory.mktemp("run")).run):
        yield


def test_a_ray_of_our_own_runs_all_jobs_and_leaves_nothing(tmp_path, capfd):
    config = config_for(tmp_path)
    RunDir(tmp_path).create()
    before = surroundings()
    home = Path.home() / ".ray" / "auth_token"
    token_before = home.exists()
    launch([Job(stages.add_up, config), Job(stages.add_up_again, config)], run=config.run)
    assert surroundings() == before and home.exists() == token_before and not ray.is_initialized()
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


def test_an_error_that_would_come_back_is_shown_as_itself_and_not_tried_again(
    joined_ray, tmp_path, capfd
):
    number = sorted(stages._classes()).index("PrivacyError")
    config = config_for(tmp_path, seed=number)
    with pytest.raises(PrivacyError) as caught:
        launch([Job(stages.fail_on_last, config)], run=config.run)
    assert str(caught.value) == "PrivacyError: found this, expected that, do so."
    assert len(list((tmp_path / "private").glob("started-*"))) == 2, "each worker started once"
    assert "Starting again" not in capfd.readouterr().err
    assert ray.is_initialized(), "a Ray that was joined before stays joined"


def test_every_error_class_passes_through_ray(joined_ray, tmp_path):
    @ray.remote(num_cpus=1)
    def fail(error):
        raise error

    for name, kind in stages._classes().items():
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            ray.get(fail.remote(kind(f"{name}: one line.")))
        failure = ray.train.WorkerGroupError("", {0: caught.value})
        explained = explain_ray(failure, run=RunDir(tmp_path))
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


def test_killed_workers_are_replaced_and_the_model_and_ledger_are_those_of_an_unbroken_run(
    joined_ray, tmp_path, capfd
):
    config = tiny.tiny_config(tmp_path, "killed", workers=2, launcher="ray")
    RunDir(config.run.dir).create()
    stages.give_order(config.run.dir, "die", step=4, rank=1)
    stages.give_order(config.run.dir, "die", step=7, rank=0)
    launch([Job(tiny.finetune, config)], run=config.run)
    weights, ledger = tiny.weights_and_ledger(config)
    unbroken = tiny.unbroken_weights(tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in unbroken.items())
    assert (ledger.steps, ledger.attempts, ledger.starts) == (tiny.STEPS, 1, 3)
    told = capfd.readouterr().err
    assert told.count("died") == told.count("Starting again") == 2, "the user is told of each"


def test_deepspeed_in_rays_workers_releases_the_bits_of_one_process_without_it(
    joined_ray, tmp_path
):
    """ZeRO-2 on two workers, one of which dies on the way."""
    zero = {"strategy": "deepspeed", "deepspeed": {"zero_stage": 2}}
    config = tiny.tiny_config(tmp_path, "zero", workers=2, launcher="ray", **zero)
    RunDir(config.run.dir).create()
    stages.give_order(config.run.dir, "die", step=4, rank=1)
    launch([Job(tiny.finetune, config)], run=config.run)
    weights, ledger = tiny.weights_and_ledger(config)
    alone = tiny.unbroken_weights(tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in alone.items())
    assert (ledger.steps, ledger.attempts, ledger.starts) == (tiny.STEPS, 1, 2)


def test_zero_3_in_rays_workers_learns_from_public_images_what_one_process_learns(
    joined_ray, tmp_path
):
    config = tiny_config(tmp_path / "alone")
    write_images(config, "public")
    encode(config, solo_worker())
    shutil.copytree(tmp_path / "alone", tmp_path / "zero")
    pretrain(config, solo_worker())
    zero = {"strategy": "deepspeed", "deepspeed": {"zero_stage": 3}}
    run = {"workers": 2, "launcher": "ray", "timeout_s": 60.0, **zero}
    config = tiny_config(tmp_path / "zero", run=run)
    launch([Job(pretrain, config)], run=config.run)
    alone, together = (
        dict(load_model(RunDir(tmp_path / name).public_model).unet.named_parameters())
        for name in ("alone", "zero")
    )
    apart = torch.cat([(alone[name] - together[name]).abs().flatten() for name in alone])
    assert apart.median() < 1e-6 and apart.max() < 2e-2  # Adam, where a gradient is near zero


def test_rays_files_hold_no_key_nonce_digest_or_latent(joined_ray, tmp_path):
    steps = {"steps": 2}
    config = tiny.tiny_config(
        tmp_path, "quiet", finetune=steps, workers=2, launcher="ray", unsafe_test_key=None
    )
    run = RunDir(config.run.dir).create()
    key = run.run_key()
    launch([Job(tiny.finetune, config)], run=config.run)
    entries = [json.loads(line)["body"] for line in run.ledger.read_text().splitlines()]
    texts = [entry[name] for entry in entries for name in ("nonce", "digest") if name in entry]
    moments = LatentShards(config.data.private.latents).records(0, np.array([0])).moments
    secrets = [key, key.hex().encode(), *(text.encode() for text in texts)]
    secrets += [bytes.fromhex(text) for text in texts]
    secrets += [moments.astype(np.float16).tobytes()[:64], moments.tobytes()[:64]]
    assert len(texts) > 4 and _holding(run.private, secrets), "the search finds them where they are"
    assert _holding(Path(os.environ["RAY_TMPDIR"]), secrets) == []


def _holding(folder: Path, secrets: list[bytes]) -> list[Path]:
    """Files below ``folder`` that hold one of ``secrets``."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if any(secret in path.read_bytes() for secret in secrets)]


def test_hung_workers_are_replaced(joined_ray, tmp_path, monkeypatch, capfd):
    ends, fit = [], RuledTrainer.fit
    monkeypatch.setattr(RuledTrainer, "fit", lambda trainer: ends.append(fit(trainer)))
    config = config_for(tmp_path, seed=12, timeout_s=4.0, max_failures=10)
    RunDir(tmp_path).create()
    stages.give_order(tmp_path, "hang", step=7, rank=0)  # worker 1 waits for it
    for rank in (0, 1):  # nobody is left who waits in a collective
        stages.give_order(tmp_path, "hang", step=11, rank=rank)
    launching = threading.Thread(
        target=launch, args=[[Job(stages.count, config)]], kwargs={"run": config.run}, daemon=True
    )
    launching.start()
    launching.join(400)
    assert not launching.is_alive(), "it hangs"
    assert totals(tmp_path, 2) == [stages.unbroken_total(12)] * 2
    assert {start["from"] for start in stages.starts(tmp_path)} == {0, 5, 10}
    assert "did nothing for longer than run.timeout_s" in capfd.readouterr().err
    report = next((tmp_path / "private").glob("stalled-rank*.log"))
    assert "in obey" in report.read_text(), "it says where the worker stood"
    assert stat.S_IMODE(report.stat().st_mode) == 0o600
    assert ends[0].metrics == {"steps": 10}, "all that Ray is told of a checkpoint"


def test_workers_are_replaced_as_often_as_asked_and_no_more(joined_ray, tmp_path):
    config = config_for(tmp_path, max_failures=1)
    with pytest.raises(WorkerError, match="(Worker 1|A worker) died"):
        launch([Job(stages.die_on_last, config)], run=config.run)
    assert len(list((tmp_path / "private").glob("started-1-*"))) == 2


def test_a_run_asked_to_stop_saves_with_code_75_and_goes_on_when_started_again(
    joined_ray, tmp_path
):
    config, run = config_for(tmp_path, seed=12), RunDir(tmp_path).create()
    held = stages.give_order(tmp_path, "wait", step=8)

    def ask() -> None:
        while not (run.private / "waiting").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop_file(run).exists():
            time.sleep(0.05)
        held.unlink()

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(SavedAndStopped) as caught, stop_on_signals([run], grace_s=300):
        launch([Job(stages.count, config)], run=config.run)
    asking.join()
    assert caught.value.exit_code == 75 and "9 steps" in str(caught.value)
    with stop_on_signals([run], grace_s=300):
        launch([Job(stages.count, config)], run=config.run)
    assert [start["from"] for start in stages.starts(tmp_path)] == [0, 9]
    assert totals(tmp_path, 2) == [stages.unbroken_total(12)] * 2


def test_a_machine_that_does_not_see_the_run_directory_is_refused(tmp_path):
    with pytest.raises(RunError, match="set run.dir to storage that all machines share"):
        launch_ray._require_shared(tmp_path / "notes", 1)


def test_a_replaced_worker_is_waited_for_until_it_lets_go_of_the_ledger(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    launch_ray._await_predecessor(ledger, limit_s=60)  # there is none yet
    ledger.touch()
    holder = open(ledger, "a")  # noqa: SIM115
    fcntl.flock(holder, fcntl.LOCK_EX)
    waiting = threading.Thread(
        target=launch_ray._await_predecessor, args=[ledger], kwargs={"limit_s": 60}
    )
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    holder.close()
    waiting.join(60)
    assert not waiting.is_alive()


def test_too_small_a_cluster_is_refused_at_once(joined_ray, tmp_path):
    config = config_for(tmp_path, workers=3)
    with pytest.raises(BringUpError, match="2 CPUs where 3 are needed"):
        launch([Job(stages.add_up, config)], run=config.run)


def test_the_interface_of_an_address_is_found():
    assert launch_ray.interface_of("127.0.0.1") == "lo"
    assert launch_ray.interface_of("203.0.113.77") is None
