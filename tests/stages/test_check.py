"""``dpldm check`` on this machine: says what it found, and what is wrong."""

import pytest

from dpldm_dist.config import Config, parse_config
from dpldm_dist.errors import BringUpError, ConfigError, DpldmError, RunError
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages import check as stage


def config_for(folder, **run) -> Config:
    return parse_config({"run": {"dir": str(folder), "device": "cpu", "timeout_s": 60.0} | run})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fit_machine_is_called_ok(tmp_path, capsys, workers):
    findings = stage.check(config_for(tmp_path, workers=workers), solo_worker())
    shown = capsys.readouterr().out
    assert all(finding.error is None for finding in findings) and "wrong" not in shown
    for what in ["torch", "disk speed", "file locks", "all-reduce", f"worker {workers - 1}"]:
        assert what in shown
    assert list((tmp_path / "private").iterdir()) == []


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="Cannot make the run directory"):
        stage.check(config_for(tmp_path / "file"), solo_worker())
    assert "wrong" in capsys.readouterr().out


def test_a_missing_gpu_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="run.device=cpu"):
        stage.check(config_for(tmp_path, device="cuda"), solo_worker())


def test_a_ray_address_where_nobody_listens_is_named(tmp_path, capsys):
    config = config_for(tmp_path, launcher="ray", workers=2, ray_address="127.0.0.1:9")
    with pytest.raises(BringUpError, match="Nothing answers at run.ray_address"):
        stage.check(config, solo_worker())
    assert "wrong" in capsys.readouterr().out
    assert list((tmp_path / "private").iterdir()) == []


def test_locks_that_do_nothing_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    with pytest.raises(DpldmError, match="File locks do nothing"):
        stage.check(config_for(tmp_path), solo_worker())


def test_dry_run_touches_nothing(tmp_path):
    lines = stage.describe(config_for(tmp_path / "run", workers=2))
    assert "2 workers" in lines[0] and not (tmp_path / "run").exists()
