"""``dpldm check`` on this machine: says what it found, and what is wrong."""

import pytest

from dpldm_dist.config import Config, parse_config, with_changes
from dpldm_dist.errors import BringUpError, ConfigError, DpldmError, PrivacyError, RunError
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages import check as stage
from tests.stages.tiny_run import latent_shards


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


def test_private_data_that_others_could_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_workers", lambda _: [])  # this line does not need them

    def line(config):
        return {f.what: f.found for f in stage.check(config, solo_worker())}["private data"]

    run = {"dir": str(tmp_path / "run"), "device": "cpu"}
    config = parse_config({"run": run, "data": {"private": {"latents": str(tmp_path / "l")}}})
    assert line(config) == "none yet"
    latent_shards(tmp_path / "l")
    assert line(config) == "closed to other users"
    (tmp_path / "l" / "latents-00001.tar").chmod(0o640)
    with pytest.raises(PrivacyError, match=r"latents-00001\.tar .*chmod"):
        stage.check(config, solo_worker())
    assert "not looked at" in line(with_changes(config, data={"allow_shared_files": True}))


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


def facts_of(**changes):
    """What a fit worker sees."""
    fit = {
        "host": "n1", "address": "192.0.2.1", "interface": "eth0", "device": "cpu",
        "device_name": "x86_64", "threads": 2, "cores": 4, "memory_free": 2**34,
        "software": "torch 1", "seen_s": 0.1, "second_lock": False, "clock_ahead_s": 0.0,
        "reduce_s": 0.01, "barrier_s": 0.001,
    }  # fmt: skip
    return fit | changes


def test_machines_that_do_not_fit_together_are_named(tmp_path):
    run, one = config_for(tmp_path).run, facts_of()
    other = facts_of(host="n2", second_lock=True, software="torch 2", clock_ahead_s=-100.0)
    with pytest.raises(RunError, match="locks at .* do not reach n2"):
        stage._storage([one, other], run)
    with pytest.raises(RunError, match="n2 has torch 2, n1 has torch 1"):
        stage._equal_software([one, other])
    with pytest.raises(RunError, match="n2 and n1 are 100 s apart"):
        stage._clocks([one, other])
    with pytest.raises(RunError, match=r"0.8 GB of memory are free on n1, expected 1.0 GB"):
        stage._one_worker(facts_of(memory_free=800 * 2**20), [one, one])
    slow = facts_of(host="n2", reduce_s=10.0)
    assert "right network" in stage._speed([one, slow])
    assert "right network" not in stage._speed([one, facts_of(host="n2")])


def test_idle_nodes_of_a_slurm_job_are_named(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    with pytest.raises(ConfigError, match=r"no worker runs on n2: .*check.sbatch"):
        stage._slurm_job([facts_of()])
    assert "workers on n1, n2" in stage._slurm_job([facts_of(), facts_of(host="n2.cluster")])
