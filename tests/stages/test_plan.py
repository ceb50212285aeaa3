"""``dpldm plan``: the numbers that a run would have, without touching any data."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace

import pytest
import torch

from dpldm_dist.cli import main
from dpldm_dist.config import parse_config, with_changes
from dpldm_dist.errors import ConfigError, PrivacyError
from dpldm_dist.models.conditioning import ClassEmbedder
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.trainable import select_trainable
from dpldm_dist.models.unet import build_unet
from dpldm_dist.privacy.accounting import GaussianEvent, epsilon
from dpldm_dist.privacy.ledger import PrivacyLedger
from dpldm_dist.runtime.rundir import RunDir, dataset_budget_file
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.mechanism import reservation_of
from dpldm_dist.stages.plan import (
    Cost,
    cost_of,
    describe,
    mechanism_of,
    plan,
    trainable_parameters,
)


def config_with(**sections):
    config = parse_config(
        {
            "privacy": {"epsilon": 5.0, "delta": 1e-5, "clip_norm": 0.5, "records": 2000},
            "finetune": {"steps": 50, "batch": 100},
            "model": {"block_channels": [16, 32], "norm_groups": 8, "context_dim": 16},
        }
    )
    return with_changes(config, **sections)


def test_plan_says_how_well_the_training_loss_will_be_known_and_what_that_costs(capsys):
    plan(config_with(finetune={"batch": 500}), solo_worker())
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if "training loss of a step" in line)
    assert re.search(r"± 0\.\d+ of 0 to 2 \(for 0\.5% more noise\)", row)
    plan(config_with(privacy={"telemetry_share": 0.0}), solo_worker())
    assert "not released" in capsys.readouterr().out


def test_plan_prints_the_cost_by_every_accountant_and_relation(capsys):
    config = config_with(finetune={"statistics_noise": 15.0}, privacy={"reserve_steps": 5})
    assert plan(config, solo_worker()) is None
    printed = capsys.readouterr().out
    mechanism = mechanism_of(config)
    release = GaussianEvent(15.0, 1.0)
    delta = mechanism.delta - mechanism.overflow_delta

    def cost(steps, **options):
        events = [replace(mechanism.step_event, count=steps), release]
        return f"{epsilon(events, delta, **options):.4f}"

    rows = (re.split(r"   +", line.strip(), maxsplit=1) for line in printed.splitlines())
    shown = dict(row for row in rows if len(row) == 2)
    assert shown["noise multiplier"] == f"{mechanism.noise_multiplier:.4f} (calibrated)"
    assert shown["add or remove one record, PLD (number of record)"] == cost(50)
    assert shown["replace one record by another, PLD"] == cost(50, relation="replace_one")
    for steps in (0, 10, 50):
        assert shown[f"after {steps} steps"].startswith(cost(steps))
    assert shown["after 55 steps (reserve used up)"].startswith(cost(55))
    assert f"{epsilon([release], delta):.4f}" in printed
    for words in ("PRV", "RDP", "expected records per step", "1e-11", "share of the whole epsilon"):
        assert words in printed
    assert "\x1b" not in printed  # no colours where there is no terminal


def test_the_cost_is_within_the_budget_and_confirmed():
    cost = cost_of(mechanism_of(config_with()))
    assert cost.pld <= 5.0
    assert cost.agree
    assert cost.pld < cost.replace_one
    assert cost.pld < cost.rdp


def test_accountants_that_disagree_are_reported():
    assert not Cost(pld=1.0, prv=1.02, rdp=1.1, replace_one=2.0).agree
    assert not Cost(pld=1.0, prv=1.0, rdp=0.9, replace_one=2.0).agree
    assert Cost(pld=100.0, prv=math.inf, rdp=110.0, replace_one=200.0).agree


def test_plan_touches_no_data_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text(
        "[privacy]\nepsilon = 5.0\ndelta = 1e-5\nclip_norm = 1.0\nrecords = 2000\n"
        "[finetune]\nsteps = 20\nbatch = 100\n"
        '[data.private]\nsource = "/nowhere/at/all"\n[run]\ndir = "runs/none"\n'
    )
    assert main(["plan", "--config", "config.toml"]) == 0
    assert "noise multiplier" in capsys.readouterr().out
    assert main(["plan", "--config", "config.toml", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == describe(config_with())
    assert os.listdir(tmp_path) == ["config.toml"]


def test_plan_needs_a_declared_number_of_records():
    with pytest.raises(ConfigError, match=r"privacy\.records is not set"):
        mechanism_of(config_with(privacy={"records": None}))


@pytest.mark.parametrize("missing", ["privacy", "finetune"])
def test_plan_needs_the_private_sections(missing):
    tree = config_with().model_dump()
    with pytest.raises(ConfigError, match=rf"\[{missing}\] is missing"):
        mechanism_of(parse_config({**tree, missing: None}))


@pytest.mark.parametrize("workers", [5, [1, 5]])
def test_workers_that_would_have_no_records_are_refused(workers):
    with pytest.raises(ConfigError, match=r"5 is more than privacy.lanes = 4"):
        mechanism_of(config_with(run={"workers": workers}))


def test_a_budget_that_cannot_be_met_is_refused():
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        mechanism_of(config_with(privacy={"noise_multiplier": 0.5}))
    with pytest.raises(PrivacyError, match="releases beside the steps"):
        mechanism_of(config_with(finetune={"statistics_noise": 0.5}))


@pytest.mark.parametrize("trainable", ["transformer", "attention", "output-blocks", "lora"])
def test_the_parameters_shown_are_those_that_would_learn(trainable):
    config = config_with(finetune={"trainable": trainable, "first_block": 2})
    unet = build_unet(
        latent_channels=4,
        latent_size=4,
        block_channels=(16, 32),
        layers_per_block=1,
        heads=4,
        context_dim=16,
        norm_groups=8,
        seed=0,
    )
    denoiser = Denoiser(unet, ClassEmbedder(torch.zeros(11, 1, 16)))
    real = select_trainable(denoiser, trainable=trainable, first_block=2, lora_rank=8)
    in_unet = sum(p.numel() for name, p in real.items() if name.startswith("unet"))
    assert trainable_parameters(config) == in_unet > 0


def test_the_parameters_of_a_foreign_model_are_not_guessed(tmp_path):
    assert trainable_parameters(config_with(model={"init": tmp_path})) is None


# --- the budget that all runs on the private data share -----------------------------------------


def budget_rows(config, capsys):
    """The rows of that section, and all that was printed."""
    plan(config, solo_worker())
    printed = capsys.readouterr().out
    rows = (re.split(r"   *", line.strip(), maxsplit=1) for line in printed.splitlines())
    return dict(row for row in rows if len(row) == 2), printed


def with_budget(tmp_path, epsilon=20.0, **privacy):
    shared = {"dataset_epsilon": epsilon, "dataset_delta": 1e-5, **privacy}
    return config_with(privacy=shared, run={"dir": str(tmp_path / "run")})


def start_run(config, name):
    """Another run of the same config: only its ledger."""
    mechanism = mechanism_of(config)
    path = RunDir(config.run.dir).private / name / "ledger.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    reserve = reservation_of(config, mechanism)
    with PrivacyLedger.open(path, mechanism.facts(), reserve=reserve) as ledger:
        ledger.open_attempt({}, workers=1)


def test_without_a_budget_of_the_data_set_plan_says_nothing_of_one(tmp_path, capsys):
    _, printed = budget_rows(config_with(run={"dir": str(tmp_path / "run")}), capsys)
    assert "all runs" not in printed


def test_plan_says_what_a_budget_of_the_data_set_would_hold_before_the_first_run(tmp_path, capsys):
    config = with_budget(tmp_path)
    rows, printed = budget_rows(config, capsys)
    assert rows["left"] == "100.00%"
    assert rows["for all runs together"] == "epsilon 20 at delta 1e-05"
    assert "admitted" in rows["a new run of this config"]
    assert f"Its file: {dataset_budget_file(config)}" in printed
    assert not dataset_budget_file(config).exists()  # plan makes nothing
    assert f"reads   {dataset_budget_file(config)} (the budget of the data set)" not in describe(
        config
    )


def test_plan_tells_before_a_start_exactly_what_the_start_is_told(tmp_path, capsys):
    config = with_budget(tmp_path, epsilon=9.0)
    fits = int(budget_rows(config, capsys)[0]["such runs that still fit"])
    assert fits > 1
    for run in range(fits):
        rows, _ = budget_rows(config, capsys)
        assert rows["such runs that still fit"] == str(fits - run)
        assert "admitted" in rows["a new run of this config"]
        start_run(config, str(run))
    rows, printed = budget_rows(config, capsys)
    assert rows["runs so far"] == f"{fits}, 0 finished"
    assert "refused" in rows["a new run of this config"]
    with pytest.raises(PrivacyError) as caught:
        start_run(config, "one more")
    reason = printed.split("would be refused: ")[1].splitlines()[0]
    assert reason in str(caught.value)
    assert f"reads   {dataset_budget_file(config)} (the budget of the data set)" in describe(config)


def test_plan_shows_what_the_run_of_this_directory_holds(tmp_path, capsys):
    config = with_budget(tmp_path)
    start_run(config, ".")
    rows, _ = budget_rows(config, capsys)
    asked = rows["a new run of this config"].split()[2].rstrip(":")
    assert rows["the run in run.dir holds"] == asked


def test_plan_says_when_a_run_would_be_the_only_one_for_ever(tmp_path, capsys):
    config = with_budget(tmp_path, epsilon=5.0)  # that of the run itself
    rows, _ = budget_rows(config, capsys)
    assert rows["a new run of this config"] == "admitted, as the only one for ever"
    assert "such runs that still fit" not in rows
    start_run(config, "first")
    rows, printed = budget_rows(config, capsys)
    assert rows["left"] == "0.00%"
    assert "no other is ever admitted" in printed


def test_plan_says_when_the_config_names_another_budget_than_the_file(tmp_path, capsys):
    start_run(with_budget(tmp_path), "first")
    _, printed = budget_rows(with_budget(tmp_path, epsilon=30.0), capsys)
    assert "another budget than the file" in printed
    rows, _ = budget_rows(with_budget(tmp_path, epsilon=20.0), capsys)
    assert "admitted" in rows["a new run of this config"]


@pytest.mark.parametrize("half", [{"dataset_epsilon": 3.0}, {"dataset_delta": 1e-5}])
def test_half_a_budget_of_the_data_set_is_refused(half):
    with pytest.raises(ConfigError, match="expected both numbers, or none"):
        config_with(privacy=half)
