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
from dpldm_dist.errors import ConfigError, DataError, PrivacyError, RunError
from dpldm_dist.models.directory import load_model
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import describe, finetune
from dpldm_dist.stages.finetune.preparation import trainable_model
from dpldm_dist.stages.finetune.private_data import PrivateData
from dpldm_dist.stages.mechanism import plan_of
from tests.stages.tiny_run import (
    SHARD_RECORDS,
    TEST_KEY,
    latent_shards,
    public_model,
    released_weights,
    settings,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    public_model(folder / "model")
    latent_shards(folder / "latents")
    return folder


def run(config):
    RunDir(config.run.dir).create()
    return finetune(config, solo_worker())


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


def test_three_microbatch_sizes_release_the_same_weights_within_1e_6(root):
    found = []
    for microbatch in (2, 5, 16):
        name = f"microbatch-{microbatch}"
        changes = {"dir": str(root / name), "microbatch": microbatch, "unsafe_test_key": TEST_KEY}
        # plain SGD: Adam's division by small second moments would magnify rounding
        plain = {"optimizer": "sgd", "learning_rate": 0.01, "embedder_grad_scale": 1.0}
        run(settings(root, name, run=changes, finetune=plain))
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


@pytest.mark.parametrize(
    ("place", "lost"),
    [("after the charge:4", 1), ("after the release:4", 0), ("while saving:6", 0)],
)
def test_ledger_entries_equal_executed_steps_after_kill_9_and_resume(root, place, lost):
    name = place.replace(" ", "-").replace(":", "-")
    config = settings(root, name, privacy={"noise_multiplier": 2.0, "reserve_steps": 10})
    assert crash(config, place).returncode == -9
    resumed = crash(config, "nowhere:0")
    assert resumed.returncode == 0, resumed.stderr
    summary, released = read_ledger(RunDir(config.run.dir).ledger), trace(config)
    steps = [entry for entry in released if entry["purpose"] == "noise"]
    assert summary.steps == len(steps) + lost  # charged first: at most one charge without a release
    assert summary.statistics == 1
    assert summary.attempts == 2
    assert sorted({entry["step"] for entry in steps}) == list(range(10))
    repeated = [e for e in steps if sum(o["step"] == e["step"] for o in steps) > 1]
    assert repeated or lost
    assert len({tuple(entry["head"]) for entry in released}) == len(
        released
    )  # never the same noise


def test_a_killed_worker_is_named_and_the_run_resumes_on_another_number_of_workers(root):
    changes = {"dir": str(root / "elastic"), "workers": 2}
    config = settings(
        root, "elastic", privacy={"noise_multiplier": 2.0, "reserve_steps": 10}, run=changes
    )
    broken = crash(config, "after the charge:4", rank=1)
    assert (
        broken.returncode != 0
        and "WorkerError" in broken.stderr
        and "worker 1" in broken.stderr.lower()
    )
    run(settings(root, "elastic", privacy={"noise_multiplier": 2.0, "reserve_steps": 10}))
    assert read_ledger(RunDir(config.run.dir).ledger).steps == 10 + 5 - 3  # 0..4, then 3..9


def test_the_budget_is_never_exceeded_whatever_is_repeated(root):
    config = settings(root, "budget")  # calibrated for exactly ten steps
    assert crash(config, "after the release:5").returncode == -9
    manifest = run(config)
    summary = read_ledger(RunDir(config.run.dir).ledger)
    assert summary.epsilon <= config.privacy.epsilon
    assert summary.steps == 10 and manifest.facts["steps_done"] == 7  # 6 steps, then 3..6
    assert math.isclose(manifest.facts["epsilon"], summary.epsilon)


# --- refusals -------------------------------------------------------------------------------------


def test_a_finished_run_does_nothing_when_asked_again(root):
    config = settings(root, "finished")
    first = run(config)
    size = RunDir(config.run.dir).ledger.stat().st_size
    assert run(config) == first
    assert RunDir(config.run.dir).ledger.stat().st_size == size


def test_another_plan_or_other_data_on_an_old_ledger_is_refused(root):
    name = "refusals"
    config = settings(root, name)
    assert crash(config, "after the release:4").returncode == -9
    other = latent_shards(root / "other", skip=(0, SHARD_RECORDS - 1))
    wrong = {
        "privacy.epsilon|noise_multiplier": {"privacy": {"epsilon": 30.0}},
        "data": {"data": {"private": {"latents": str(other)}}},
        "finetune.learning_rate": {"finetune": {"learning_rate": 0.5}},
    }
    for said, changes in wrong.items():
        with pytest.raises(RunError) as caught:
            run(settings(root, name, **changes))
        assert any(part.rpartition(".")[2] in str(caught.value) for part in said.split("|")), said
    run(config)


def test_a_damaged_shard_stops_the_run_with_its_name(root):
    folder = latent_shards(root / "damaged")
    path = folder / "latents-00003.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"latents-00003\.tar"):
        run(settings(root, "on-damaged", data={"private": {"latents": str(folder)}}))


def test_too_few_declared_records_and_an_impossible_budget_are_refused(root):
    with pytest.raises(ConfigError, match=r"privacy\.records"):
        run(settings(root, "few", privacy={"records": 79}))
    with pytest.raises(PrivacyError, match="costs epsilon"):
        run(settings(root, "dear", privacy={"noise_multiplier": 0.3}))


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
    run(config)
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
        manifest = run(config)
        assert manifest.facts["claim"] is False and manifest.facts["epsilon"] is None
        assert math.isinf(read_ledger(RunDir(config.run.dir).ledger).epsilon)


def test_nothing_private_lies_outside_the_private_folder_or_is_printed(root, tmp_path):
    """Canaries: keys of records, their latents as bytes and numbers, the run key, batch sizes."""
    path = tmp_path / "run.json"
    config = settings(root, "canary", run={"dir": str(root / "canary"), "workers": 2})
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
    key = run_dir.key.read_bytes()
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


def test_a_copied_run_directory_never_repeats_its_noise(root):
    """Two lives of one directory (a copy, a snapshot) have the same key, ledger and attempt."""
    config = settings(root, "original", finetune={"steps": 4})
    assert crash(config, "after the charge:1").returncode == -9
    shutil.copytree(root / "original", root / "copy")
    heads = set()
    for name in ("original", "copy"):
        other = settings(root, name, finetune={"steps": 4})
        before = len(trace(other))
        assert crash(other, "nowhere:0").returncode == 0
        new = [tuple(entry["head"]) for entry in trace(other)[before:]]
        assert len(new) == 4 and heads.isdisjoint(new)
        heads.update(new)


def test_releases_without_their_ledger_are_refused(root):
    config = settings(root, "no-ledger", finetune={"steps": 3})
    assert crash(config, "after the release:1").returncode == -9
    RunDir(config.run.dir).ledger.unlink()
    with pytest.raises(RunError, match="ledger that is gone"):
        run(config)


def test_a_run_without_noise_must_lie_in_a_private_folder(root):
    changes = {"dir": str(root / "open"), "unsafe_no_noise": True}
    with pytest.raises(PrivacyError, match="below a folder named private"):
        run(settings(root, "open", run=changes))


def test_tensorboard_carries_no_clock_times_of_private_steps(root):
    run(settings(root, "timeless", finetune={"steps": 3}))
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
        run(settings(root, "on-doubled", data=data))
    run(settings(root, "allowed", data=data, privacy={"allow_duplicates": True}))
