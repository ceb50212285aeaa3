"""Real runs on one data set keep to one budget: reserve, resume, settle, and are refused."""

from __future__ import annotations

import shutil

import pytest

from dpldm_dist.cli import main
from dpldm_dist.errors import PrivacyError, SavedAndStopped
from dpldm_dist.privacy.dataset_ledger import read_dataset_ledger
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime.rundir import RunDir, dataset_budget_file
from dpldm_dist.runtime.stopping import ask_to_stop, forget_stop
from tests.stages.tiny_run import latent_shards, public_model, run_alone, settings


@pytest.fixture
def root(tmp_path):
    public_model(tmp_path / "model")
    latent_shards(tmp_path / "latents")
    return tmp_path


def member(root, name, *, steps=4, **privacy):
    """A run that may cost epsilon 30 of the data set's 70."""
    numbers = {"epsilon": 30.0, "delta": 1e-3, "dataset_epsilon": 70.0, "dataset_delta": 1e-3}
    return settings(root, name, finetune={"steps": steps}, privacy={**numbers, **privacy})


def test_runs_reserve_from_one_budget_settle_and_are_refused(root, capsys):
    first, second = member(root, "first"), member(root, "second")
    place = dataset_budget_file(first)
    assert place == root / "budget.jsonl"  # beside the shards
    RunDir(first.run.dir).create()
    ask_to_stop(RunDir(first.run.dir))
    with pytest.raises(SavedAndStopped):
        run_alone(first)
    (share,) = read_dataset_ledger(place).shares
    assert not share.settled
    forget_stop(RunDir(first.run.dir))
    run_alone(first)  # goes on, with what it reserved
    run_alone(second)
    whole = read_dataset_ledger(place)
    for config, share in zip((first, second), whole.shares, strict=True):
        ledger = read_ledger(RunDir(config.run.dir).ledger)
        assert ledger.run_id == share.run_id
        assert set(share.events) == set(ledger.events)  # settled at the seal
        assert share.settled
    assert whole.shares[0].starts == 2
    size = place.stat().st_size
    with pytest.raises(PrivacyError, match="refuses this run"):
        run_alone(member(root, "greedy", steps=40, noise_multiplier=0.5, epsilon=2000.0))
    assert place.stat().st_size == size
    for action in ("show", "verify"):
        words = [
            "--set",
            f"run.dir={first.run.dir}",
            "--set",
            f"data.private.latents={root}/latents",
        ]
        assert main(["ledger", action, *words]) == 0
    assert f"run {whole.shares[1].run_id}" in capsys.readouterr().out


def test_a_copy_of_a_run_directory_is_refused_by_the_budget(root):
    config = member(root, "one")
    RunDir(config.run.dir).create()
    ask_to_stop(RunDir(config.run.dir))
    with pytest.raises(SavedAndStopped):
        run_alone(config)
    shutil.copytree(config.run.dir, root / "copy", symlinks=True)
    for name in ("one", "copy"):
        forget_stop(RunDir(root / name))
    run_alone(member(root, "copy"))
    with pytest.raises(PrivacyError, match="another copy of the run directory went on"):
        run_alone(config)


def test_the_released_manifest_names_no_place_of_the_budget(root):
    config = member(root, "named", dataset_ledger=str(root / "elsewhere.jsonl"))
    run_alone(config)
    assert (root / "elsewhere.jsonl").is_file()
    assert not (root / "budget.jsonl").exists()
    for path in RunDir(config.run.dir).release.rglob("*.json"):
        assert "elsewhere" not in path.read_text()
