"""Curves of a run: what they show, how they survive a restart, and raw values beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dpldm_dist.data.manifest import Manifest
from dpldm_dist.errors import PrivacyError, RunError
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.privacy.optimizer import NoisyStep
from dpldm_dist.privacy.telemetry import LOSS_BOUND
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.tracking import SIGNAL, TELEMETRY, Tracker
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.finetune.curves import ROWS, Curves
from dpldm_dist.stages.mechanism import plan_of, telemetry_query
from dpldm_dist.stages.report import report
from tests.stages.tiny_run import settings

P = 500


def curves(tmp_path: Path, **changes: dict) -> Curves:
    config = settings(tmp_path, **changes)
    return Curves(config, plan_of(config, records=80), {"weight": nn.Parameter(torch.zeros(P))})


def noisy_steps(tmp_path: Path, count: int, *, signal: float = 0.0) -> list[NoisyStep]:
    """Pure noise as a run of ``settings`` would have it, and a constant gradient besides."""
    config = settings(tmp_path)
    plan = plan_of(config, records=80)
    std = plan.noise_multiplier / plan.divisor
    generator = torch.Generator().manual_seed(3)
    return [
        NoisyStep(
            std * (torch.randn(P, generator=generator, dtype=torch.float64) + signal),
            torch.randint(0, 2**30, (3,), generator=generator),
        )
        for _ in range(count)
    ]


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def test_curves_go_on_after_a_restart_as_if_unbroken(tmp_path):
    steps = noisy_steps(tmp_path, 30)
    whole, first, resumed = (curves(tmp_path) for _ in range(3))
    for noisy in steps:
        whole.add(noisy)
    for noisy in steps[:11]:
        first.add(noisy)
    resumed.load(first.state(), steps=11)
    for noisy in steps[11:]:
        resumed.add(noisy)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    whole.write(tmp_path / "whole.json")
    resumed.write(tmp_path / "resumed.json")
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "resumed.json").read_bytes()


@pytest.mark.parametrize("steps", [0, 1, ROWS, ROWS + 1, 2 * ROWS + 7])
def test_the_released_file_has_at_most_500_rows_and_the_last_step(tmp_path, steps):
    found = curves(tmp_path)
    for noisy in noisy_steps(tmp_path, 1) * steps:
        found.add(noisy)
    found.write(tmp_path / "telemetry.json")
    rows = json.loads((tmp_path / "telemetry.json").read_text())["rows"]
    assert len(rows) <= ROWS and (len(rows) > 0) == (steps > 0)
    assert not steps or rows[-1]["step"] == steps


def test_every_quantity_is_shown_with_its_error_bars(tmp_path):
    found = curves(tmp_path)
    with Tracker(tmp_path / "events", solo_worker(), start_step=0) as tracker:
        for noisy in noisy_steps(tmp_path, 3):
            found.add(noisy)
            found.show(tracker)
    shown = events(tmp_path / "events")
    assert set(shown.Tags()["scalars"]) == {*TELEMETRY, *SIGNAL}
    for tag in shown.Tags()["scalars"]:
        assert [event.step for event in shown.Scalars(tag)] == [1, 2, 3]


def test_pure_noise_is_told_to_the_user_and_a_signal_is_not(tmp_path):
    noise, signal = curves(tmp_path), curves(tmp_path)
    assert noise.hint() is None and noise.in_words() is None  # before the first step
    for found, strength in ((noise, 0.0), (signal, 0.5)):
        for noisy in noisy_steps(tmp_path, 40, signal=strength):
            found.add(noisy)
    assert signal.hint() is None
    line = noise.hint()
    assert line is not None and "\n" not in line
    assert line.startswith(noise.in_words())
    for words in ("After 40 steps", "pure noise", "Raise finetune.batch", "privacy.epsilon"):
        assert words in line


def test_a_loss_that_falls_is_learning_also_where_the_gradients_show_none(tmp_path):
    config = settings(tmp_path)
    query = telemetry_query(config, plan_of(config, records=80), parameters=P)
    found, records = curves(tmp_path), 20
    for step, noisy in enumerate(noisy_steps(tmp_path, 60)):  # the loss of all goes from 2 to 0
        loss_B = torch.full((records,), 2.0 - step / 30, dtype=torch.float64)
        found.add(
            NoisyStep(noisy.mean_P, query.encode(loss_B, torch.ones(records).double()).sum(0))
        )
    assert found.hint() is None and "The training loss fell by" in found.in_words()


def test_a_run_without_noise_has_no_walk_and_one_without_a_share_no_telemetry(tmp_path):
    quiet = curves(tmp_path, run={"dir": str(tmp_path), "unsafe_no_noise": True})
    bare = curves(tmp_path, privacy={"telemetry_share": 0.0})
    assert (quiet.extra, bare.extra) == (3, 0)
    for noisy in noisy_steps(tmp_path, 2):
        quiet.add(noisy)
        bare.add(NoisyStep(noisy.mean_P, noisy.extra[:0]))
    assert set(quiet.state()) == {"telemetry"} and set(bare.state()) == {
        "walk/sum",
        "walk/before",
        "walk/steps",
    }
    assert quiet.hint() is None
    for found, has, lacks in ((quiet, "loss", "walk"), (bare, "walk", "loss")):
        found.write(tmp_path / "curves.json")
        row = json.loads((tmp_path / "curves.json").read_text())["rows"][-1]
        assert has in row and lacks not in row


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(root):
    """A finished run that wrote raw private values; its noise is small enough to compare."""
    config = settings(
        root,
        "watched",
        privacy={"epsilon": 400.0, "noise_multiplier": 0.1, "telemetry_share": 0.02},
        run={"dir": str(root / "watched"), "unsafe_diagnostics": True},
    )
    RunDir(config.run.dir).create()
    finetune(config, solo_worker())
    return config


def test_the_released_loss_is_the_true_loss_within_its_error_bars(watched):
    run = RunDir(watched.run.dir)
    shown, raw = events(run.tensorboard / "finetune"), events(run.diagnostics)
    errors = json.loads(run.telemetry.read_text())["standard_errors"]
    for name in ("loss", "records", "clip_fraction"):
        released = [event.value for event in shown.Scalars(f"private/{name}")]
        true = [event.value for event in raw.Scalars(f"raw/{name}")]
        assert len(released) == len(true) == watched.finetune.steps
        pulls = [(r - t) / errors[name] for r, t in zip(released, true, strict=True)]
        # A sum of n squared normal numbers: n, and 4 standard errors of it.
        n = len(pulls)
        assert sum(pull**2 for pull in pulls) <= n + 4 * math.sqrt(2 * n), name
        assert any(pulls)
    assert errors["loss"] < 0.1 * LOSS_BOUND  # or nothing was compared
    # Whether ten steps can be told from noise is chance; nothing else is said.
    lines = json.loads(run.progress.read_text()).get("lines", [])
    assert all("cannot be told from pure noise" in line for line in lines)
    quantiles = [raw.Scalars(f"raw/gradient_norm_{q}")[-1].value for q in (10, 50, 90)]
    assert 0 < quantiles[0] <= quantiles[1] <= quantiles[2]


def test_raw_values_void_the_claim_and_lie_in_the_private_folder_only(watched):
    run = RunDir(watched.run.dir)
    facts = Manifest.read(run.release, "model").facts
    assert (facts["claim"], facts["epsilon"]) == (False, None)
    assert facts["unsafe"] == ["run.unsafe_diagnostics"]
    assert math.isinf(read_ledger(run.ledger).epsilon)
    report(watched, solo_worker())
    page = (run.release / "report.html").read_text()
    assert "NO PRIVACY CLAIM" in page and "run.unsafe_diagnostics" in page
    assert "What training did" not in page
    for path in [run.diagnostics, *run.diagnostics.iterdir()]:
        assert path.stat().st_mode & 0o077 == 0
    for path in run.release.rglob("*"):
        assert not path.is_file() or b"raw/" not in path.read_bytes()


def test_raw_values_cannot_be_switched_on_in_a_run_with_a_claim(root):
    config = settings(root, "switched", finetune={"steps": 2})
    run = RunDir(config.run.dir).create()
    finetune(config, solo_worker())
    other = settings(
        root,
        "switched",
        finetune={"steps": 2},
        run={"dir": config.run.dir, "unsafe_diagnostics": True},
    )
    with pytest.raises(RunError, match="unsafe_diagnostics"):
        finetune(other, solo_worker())
    (run.release / "manifest.json").unlink()
    with pytest.raises((RunError, PrivacyError)):
        finetune(other, solo_worker())
    assert not run.diagnostics.exists()


def test_the_report_shows_loss_and_signal_and_says_in_words_what_training_did(root):
    config = settings(  # so much noise that nothing can be learned
        root, "reported", finetune={"steps": 4, "batch": 2}, privacy={"noise_multiplier": 2.0}
    )
    run = RunDir(config.run.dir).create()
    manifest = finetune(config, solo_worker())
    (said,) = json.loads(run.progress.read_text())["lines"]  # what the driver prints
    assert "pure noise. Raise finetune.batch" in said
    assert "telemetry.json" in manifest.files and manifest.facts["telemetry_share"] == 0.01
    report(config, solo_worker())
    page = (run.release / "report.html").read_text()
    assert (
        "What training did" in page
        and "training loss" in page
        and "length over that of noise" in page
    )
    assert json.loads(run.telemetry.read_text())["signal"] in page
    run.telemetry.write_text("{}")
    with pytest.raises(Exception, match=r"telemetry\.json is damaged"):
        report(config, solo_worker())
