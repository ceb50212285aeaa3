"""Private fine-tuning as a whole, on real processes: invariance, sensitivity, crashes, leaks."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpldm_dist.cli import main
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.errors import ConfigError, DataError, PrivacyError, RunError, SavedAndStopped
from dpldm_dist.models.directory import load_model
from dpldm_dist.privacy.gradients import PerRecordGradients
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.stopping import ask_to_stop, forget_stop
from dpldm_dist.runtime.tracking import Progress
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import describe, finetune
from dpldm_dist.stages.finetune.preparation import trainable_model
from dpldm_dist.stages.finetune.private_data import PrivateData
from dpldm_dist.stages.mechanism import plan_of
from tests.stages.tiny_run import (
    SHARD_RECORDS,
    TEST_KEY,
    latent_shards,
    released_weights,
    run_alone,
    settings,
)

ROOT = Path(__file__).parents[2]


# --- invariance -----------------------------------------------------------------------------------


def test_1_2_and_3_workers_release_the_same_bits_also_when_workers_draw_nothing(root):
    """Ten noisy steps; with an expected batch of 1 over 3 lanes, most workers draw nothing."""
    for workers in (1, 2, 3):
        jobs = [
            Job(
                finetune,
                settings(
                    root,
                    f"{batch}-on-{workers}",
                    finetune={"batch": batch},
                    run={
                        "dir": str(root / f"{batch}-on-{workers}"),
                        "workers": workers,
                        "unsafe_test_key": TEST_KEY,
                    },
                ),
            )
            for batch in (20, 1)
        ]
        for job in jobs:
            RunDir(job.config.run.dir).create()
        launch(jobs, run=jobs[0].config.run)
    for batch in (20, 1):
        alone = released_weights(root, f"{batch}-on-1")
        for workers in (2, 3):
            together = released_weights(root, f"{batch}-on-{workers}")
            assert alone.keys() == together.keys()
            for name, value in alone.items():
                assert torch.equal(value, together[name]), (batch, workers, name)


def test_three_microbatch_sizes_train_the_same_weights_within_1e_6_but_for_their_noise(root):
    closed = RunDir(root / "microbatches").create().private
    found = []
    for microbatch in (2, 5, 16):
        name = closed.relative_to(root) / f"of-{microbatch}"
        changes = {
            "dir": str(root / name), "microbatch": microbatch, "unsafe_test_key": TEST_KEY,
            "unsafe_no_noise": True,  # the noise is bound to the bits of the sum, which may differ
        }  # fmt: skip
        # plain SGD: Adam's division by small second moments would magnify rounding
        plain = {"optimizer": "sgd", "learning_rate": 0.01, "embedder_grad_scale": 1.0}
        run_alone(settings(root, name, run=changes, finetune=plain))
        found.append(released_weights(root, name))
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.allclose(value, other[name], rtol=0, atol=1e-6), name


# --- sensitivity ----------------------------------------------------------------------------------


def noiseless_sum(
    root: Path, latents: Path, step: int, *, batch: int = 60, lanes: int = 3
) -> torch.Tensor:
    """The integer sum of one step over ``latents``, in units of clip_norm."""
    config = settings(
        root, finetune={"batch": batch}, privacy={"noise_multiplier": 50.0, "lanes": lanes}
    )
    plan = plan_of(config, records=80)
    shards = LatentShards(latents)
    public = load_model(root / "model")
    denoiser, parameters = trainable_model(config, public, shards, solo_worker())
    denoiser.embedder.grad_scale = 5.0
    data = PrivateData(config, plan, shards, bytes(32), 1, public.diffusion, solo_worker())
    gradients = data.gradients(denoiser, parameters)
    for part in data.microbatches(step):
        gradients.add(data.losses(denoiser, part), part.mask_B)
    return gradients.take_sum().double() * (plan.grid / plan.clip_norm)


def test_removing_one_record_moves_the_sum_by_at_most_the_clip_norm(root):
    whole = [noiseless_sum(root, root / "latents", step) for step in range(3)]
    moved = []
    for shard in (0, 2, 4):
        folder = latent_shards(root / f"without-{shard}", skip=(shard, SHARD_RECORDS - 1))
        for step, total in enumerate(whole):
            moved.append(float((total - noiseless_sum(root, folder, step)).norm()))
    assert max(moved) <= 1.0
    assert max(moved) > 0.5  # the record took part at least once, and its gradient was clipped


def test_removing_a_person_with_several_images_moves_the_sum_by_at_most_the_clip_norm(root):
    people = {"images": 4, "views": 2}
    whole = latent_shards(root / "people", **people)
    fewer = latent_shards(root / "fewer-people", skip=(1, SHARD_RECORDS - 1), **people)
    moved = [
        float((noiseless_sum(root, whole, s) - noiseless_sum(root, fewer, s)).norm())
        for s in range(3)
    ]
    assert 0.5 < max(moved) <= 1.0


def test_a_record_that_is_not_finite_counts_as_absent(root):
    place = (2, SHARD_RECORDS - 1)
    spoilt = latent_shards(root / "spoilt", spoil=place)
    absent = latent_shards(root / "absent", skip=place)
    for step in range(3):
        difference = noiseless_sum(root, spoilt, step) - noiseless_sum(root, absent, step)
        assert float(difference.norm()) < 1e-5  # rounding to the grid, in units of clip_norm


# --- crashes --------------------------------------------------------------------------------------


def crash(config, place: str, *, rank: int = 0) -> subprocess.CompletedProcess:
    """Run in a process of its own that is killed at ``place``."""
    path = Path(config.run.dir).with_suffix(".json")
    path.write_text(config.model_dump_json())
    environment = {**os.environ, "DPLDM_TEST_CRASH": place, "DPLDM_TEST_CRASH_RANK": str(rank)}
    return subprocess.run(
        [sys.executable, "-m", "tests.stages.crashing_finetune", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def trace(config) -> list[dict]:
    lines = (Path(config.run.dir) / "private" / "trace.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def unbroken(root):
    """What a run of a fixed key releases when nothing happens to it."""
    run_alone(
        settings(root, "unbroken", run={"dir": str(root / "unbroken"), "unsafe_test_key": TEST_KEY})
    )
    return released_weights(root, "unbroken")


def same_weights(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("place", "workers"),
    [
        ("after the charge:4", (1, 2)),
        ("before the bind:4", (2, 1)),
        ("after the bind:4", (1, 3)),
        ("after the release:4", (3, 1)),
        ("while saving:6", (1, 1)),
        ("while saving:0", (1, 1)),
    ],
)
def test_a_killed_run_ends_in_the_same_bits_without_an_extra_charge(root, unbroken, place, workers):
    name = place.replace(" ", "-").replace(":", "-")
    first, then = (
        settings(
            root,
            name,
            run={"dir": str(root / name), "workers": count, "unsafe_test_key": TEST_KEY},
        )
        for count in workers
    )
    broken = crash(first, place)
    assert broken.returncode != 0
    resumed = crash(then, "nowhere:0")
    assert resumed.returncode == 0, resumed.stderr
    summary = read_ledger(RunDir(then.run.dir).ledger)
    assert (summary.steps, summary.statistics, summary.rebound) == (10, 1, 0)
    assert (summary.attempts, summary.starts) == (1, 2)
    releases = {}
    for entry in trace(then):  # a repeated step is the same release
        head = releases.setdefault((entry["purpose"], entry["step"]), entry["head"])
        assert head == entry["head"]
    assert same_weights(unbroken, released_weights(root, name))


def test_without_a_fixed_key_a_killed_run_also_repeats_its_releases(root):
    config = settings(root, "own-key")
    assert crash(config, "after the release:4").returncode == -9
    assert crash(config, "nowhere:0").returncode == 0
    heads = {}
    for entry in trace(config):
        heads.setdefault((entry["purpose"], entry["step"]), set()).add(tuple(entry["head"]))
    assert len(heads) == 11 and all(len(found) == 1 for found in heads.values())
    summary = read_ledger(RunDir(config.run.dir).ledger)
    assert summary.steps == 10 and summary.sealed
    assert not RunDir(config.run.dir).key.exists()  # nobody can make the noise again


def test_a_killed_worker_is_named_and_the_run_resumes_on_another_number_of_workers(root):
    changes = {"dir": str(root / "elastic"), "workers": 2}
    broken = crash(settings(root, "elastic", run=changes), "after the charge:4", rank=1)
    assert (
        broken.returncode != 0
        and "WorkerError" in broken.stderr
        and "worker 1" in broken.stderr.lower()
    )
    run_alone(settings(root, "elastic"))
    assert read_ledger(RunDir(root / "elastic").ledger).steps == 10


def test_another_microbatch_other_data_or_a_lost_key_opens_a_new_attempt_that_is_charged(root):
    changed = latent_shards(root / "changed", spoil=(0, SHARD_RECORDS - 1))
    lives = {
        "microbatch": {"run": {"microbatch": 5}},
        "data": {"data": {"private": {"latents": str(changed)}}},
        "key": {},
    }
    for name, changes in lives.items():
        affordable = {"noise_multiplier": 2.0, "reserve_steps": 10}
        first = settings(root, f"other-{name}", privacy=affordable)
        assert crash(first, "after the release:4").returncode == -9
        if name == "key":
            RunDir(first.run.dir).key.unlink()
        changes["run"] = {"dir": first.run.dir, **changes.get("run", {})}
        run_alone(settings(root, f"other-{name}", privacy=affordable, **changes))
        summary = read_ledger(RunDir(first.run.dir).ledger)
        assert (summary.attempts, summary.rebound) == (2, 0), name
        assert summary.steps == 5 + 7, name  # 0..4, then again from the checkpoint of step 3


def test_a_step_that_ends_in_another_sum_is_released_with_its_own_noise_and_accounted(
    root, monkeypatch
):
    """Hardware that does not repeat its sums: every later sum is off by one grid unit."""
    config = settings(root, "other-sums", privacy={"noise_multiplier": 2.0})
    assert crash(config, "after the release:4").returncode == -9
    before = read_ledger(RunDir(config.run.dir).ledger)
    take_sum = PerRecordGradients.take_sum
    monkeypatch.setattr(PerRecordGradients, "take_sum", lambda self: take_sum(self) + 1)
    run_alone(config)
    after = read_ledger(RunDir(config.run.dir).ledger)
    assert before.rebound == 0 and after.rebound == 2  # steps 3 and 4
    assert (after.steps, after.attempts) == (10, 1)
    counts = {round(e.noise_multiplier, 9): e.count for e in after.events if e.sample_rate < 1}
    assert counts == {2.0: 8, round(2.0 / math.sqrt(2), 9): 2}


def test_the_budget_is_never_exceeded_whatever_is_repeated(root, monkeypatch):
    config = settings(root, "budget")  # calibrated for exactly ten steps
    assert crash(config, "after the release:5").returncode == -9
    take_sum = PerRecordGradients.take_sum
    monkeypatch.setattr(PerRecordGradients, "take_sum", lambda self: take_sum(self) + 1)
    manifest = run_alone(config)
    summary = read_ledger(RunDir(config.run.dir).ledger)
    assert summary.epsilon <= config.privacy.epsilon
    assert manifest.facts["steps_done"] < 10
    assert math.isclose(manifest.facts["epsilon"], summary.epsilon)
    size = RunDir(config.run.dir).ledger.stat().st_size
    assert run_alone(config) == manifest  # a restart does nothing
    assert RunDir(config.run.dir).ledger.stat().st_size == size


def test_a_request_to_stop_saves_after_the_step_and_the_next_start_goes_on(root, unbroken):
    name, asked = "stopped", []
    config = settings(root, name, run={"dir": str(root / name), "unsafe_test_key": TEST_KEY})

    class AskedInStep5(Progress):
        def advance(self, step, **facts):
            super().advance(step, **facts)
            if step == 5 and not asked:
                asked.append(step)
                ask_to_stop(RunDir(config.run.dir))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpldm_dist.stages.finetune.Progress", AskedInStep5)
        with pytest.raises(SavedAndStopped, match="5 of 10 noisy steps saved"):
            run_alone(config)
    forget_stop(RunDir(config.run.dir))
    run_alone(config)
    assert read_ledger(RunDir(config.run.dir).ledger).steps == 10
    assert same_weights(unbroken, released_weights(root, name))


# --- refusals -------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing_when_asked_again(root):
    config = settings(root, "finished")
    first = run_alone(config)
    size = RunDir(config.run.dir).ledger.stat().st_size
    assert run_alone(config) == first
    assert RunDir(config.run.dir).ledger.stat().st_size == size


def test_another_plan_on_an_old_ledger_is_refused(root):
    name = "refusals"
    config = settings(root, name)
    assert crash(config, "after the release:4").returncode == -9
    wrong = {
        "privacy.epsilon|noise_multiplier": {"privacy": {"epsilon": 30.0}},
        "finetune.learning_rate": {"finetune": {"learning_rate": 0.5}},
    }
    for said, changes in wrong.items():
        with pytest.raises(RunError) as caught:
            run_alone(settings(root, name, **changes))
        assert any(part.rpartition(".")[2] in str(caught.value) for part in said.split("|")), said
    run_alone(config)


def test_a_damaged_shard_stops_the_run_with_its_name(root):
    folder = latent_shards(root / "damaged")
    path = folder / "latents-00003.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"latents-00003\.tar"):
        run_alone(settings(root, "on-damaged", data={"private": {"latents": str(folder)}}))


def test_too_few_declared_records_and_an_impossible_budget_are_refused(root):
    with pytest.raises(ConfigError, match=r"privacy\.records"):
        run_alone(settings(root, "few", privacy={"records": 79}))
    with pytest.raises(PrivacyError, match="costs epsilon"):
        run_alone(settings(root, "dear", privacy={"noise_multiplier": 0.3}))


def test_the_dry_run_reads_and_writes_nothing(root, capsys):
    config = settings(root, "dry")
    assert any("noise multiplier" in line for line in describe(config))
    assert not Path(config.run.dir).exists()


# --- what is released -----------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["attention", "output-blocks", "lora"])
def test_every_trainable_set_learns_its_parameters_and_leaves_the_others(root, trainable):
    config = settings(
        root,
        f"only-{trainable}",
        finetune={"trainable": trainable, "first_block": 2, "steps": 2, "learning_rate": 0.1},
        privacy={"noise_multiplier": 1.0},
    )
    run_alone(config)
    before, after = (
        load_model(root / "model").unet.state_dict(),
        released_weights(root, f"only-{trainable}"),
    )
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all(".attentions." in name for name in changed)
    if trainable in ("attention", "lora"):
        assert all(".attn1." in name or ".attn2." in name for name in changed)
    else:
        assert not any(name.startswith("down_blocks.0") for name in changed)


def test_a_run_without_claim_has_no_epsilon_anywhere(root):
    (root / "private").mkdir(mode=0o700)
    unsafe = {"keyed": {"unsafe_test_key": TEST_KEY}, "private/quiet": {"unsafe_no_noise": True}}
    for name, changes in unsafe.items():
        config = settings(
            root, name, run={"dir": str(root / name), **changes}, finetune={"steps": 2}
        )
        manifest = run_alone(config)
        assert manifest.facts["claim"] is False and manifest.facts["epsilon"] is None
        assert math.isinf(read_ledger(RunDir(config.run.dir).ledger).epsilon)


def test_nothing_private_lies_outside_the_private_folder_or_is_printed(root, tmp_path):
    """Canaries: keys of records, their latents as bytes and numbers, the run key, batch sizes."""
    path = tmp_path / "run.json"
    config = settings(root, "canary", run={"dir": str(root / "canary"), "workers": 2})
    key = RunDir(config.run.dir).create().run_key()  # it is destroyed at the end
    path.write_text(config.model_dump_json())
    shown = subprocess.run(
        [sys.executable, "-m", "tests.stages.crashing_finetune", str(path)],
        cwd=ROOT, capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    run_dir = RunDir(config.run.dir)
    records = LatentShards(root / "latents").records(0, np.arange(SHARD_RECORDS))
    half = records.moments.astype(np.float16)
    canaries = [f"s0r{place}".encode() for place in range(10, SHARD_RECORDS)]
    canaries += [half[place].tobytes()[:16] for place in range(SHARD_RECORDS)]
    canaries += [records.moments[place].tobytes()[:16] for place in range(SHARD_RECORDS)]
    canaries += [key, key.hex().encode(), LatentShards(root / "latents").manifest.digest.encode()]
    files = [p for p in run_dir.root.rglob("*") if p.is_file() and run_dir.private not in p.parents]
    assert len(files) > 8
    for content in [shown.stdout, shown.stderr, *(p.read_bytes() for p in files)]:
        for canary in canaries:
            assert canary not in content
    for path in [run_dir.private, *run_dir.private.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_command_line_names_the_missing_section(tmp_path, capsys):
    assert main(["finetune", "--set", f"run.dir={tmp_path}"]) == 2
    assert "[privacy] is missing" in capsys.readouterr().err


def test_a_copied_run_directory_repeats_its_noise_only_on_the_same_sum(root):
    """Two lives of one directory (a copy, a snapshot) have the same key, ledger and attempt."""
    config = settings(root, "original", finetune={"steps": 4})
    assert crash(config, "after the charge:1").returncode == -9
    shutil.copytree(root / "original", root / "copy")
    shutil.copytree(root / "original", root / "copy-on-other-data")
    spoilt = latent_shards(root / "other-records", spoil=(0, SHARD_RECORDS - 1))
    heads = {}
    for name, data in [
        ("original", "latents"),
        ("copy", "latents"),
        ("copy-on-other-data", spoilt),
    ]:
        other = settings(
            root,
            name,
            finetune={"steps": 4},
            data={"private": {"latents": str(root / data)}},
        )
        before = len(trace(other))
        run_again = crash(other, "nowhere:0")
        assert run_again.returncode in (0, 4), run_again.stderr
        heads[name] = [tuple(entry["head"]) for entry in trace(other)[before:]]
    assert heads["original"] == heads["copy"]
    assert set(heads["copy-on-other-data"]).isdisjoint(heads["original"])


def test_releases_without_their_ledger_are_refused(root):
    config = settings(root, "no-ledger", finetune={"steps": 3})
    assert crash(config, "after the release:1").returncode == -9
    RunDir(config.run.dir).ledger.unlink()
    with pytest.raises(RunError, match="ledger that is gone"):
        run_alone(config)


def test_a_run_without_noise_must_lie_in_a_private_folder(root):
    changes = {"dir": str(root / "open"), "unsafe_no_noise": True}
    with pytest.raises(PrivacyError, match="below a folder named private"):
        run_alone(settings(root, "open", run=changes))


def test_tensorboard_carries_no_clock_times_of_private_steps(root):
    run_alone(settings(root, "timeless", finetune={"steps": 3}))
    folder = root / "timeless" / "release" / "tensorboard" / "finetune"
    events = EventAccumulator(str(folder)).Reload()
    for tag in events.Tags()["scalars"]:
        times = {(event.step, event.wall_time) for event in events.Scalars(tag)}
        assert times <= {(step, 946684800.0 + step) for step in range(4)}, tag


def test_equal_images_in_different_records_are_refused(root):
    folder = latent_shards(root / "doubled")
    manifest = Manifest.read(folder, "latents")
    replace(manifest, facts={**manifest.facts, "duplicates": 1}).write(folder, private=True)
    data = {"private": {"latents": str(folder)}}
    with pytest.raises(PrivacyError, match="equal content"):
        run_alone(settings(root, "on-doubled", data=data))
    run_alone(settings(root, "allowed", data=data, privacy={"allow_duplicates": True}))
