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
from dpldm_dist.runtime.worker import solo_worker
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
