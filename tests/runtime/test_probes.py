"""What every worker looks at for ``dpldm check``: its peers, the shared storage, Ray's token."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dpldm_dist.config import RunConfig
from dpldm_dist.errors import PrivacyError, RunError
from dpldm_dist.runtime import probes
from dpldm_dist.runtime.worker import Worker
from tests.processes import on_workers


def looks(collective, here, elsewhere):
    """One worker's facts; the same where locks do nothing; what a worker on another disk gets."""
    probes.PROBE_BYTES = 2**16
    worker = Worker(collective.rank, collective.world_size, 0, torch.device("cpu"), collective)
    sound = probes.probe(here, worker)
    lock, probes.RunDir.lock = probes.RunDir.lock, lambda self: nullcontext()
    unlocked = probes.probe(here, worker)
    probes.RunDir.lock = lock
    try:
        apart = probes.probe(elsewhere if worker.rank else here, worker)
    except RunError as error:
        apart = str(error)
    return sound, unlocked, apart


def test_workers_notice_storage_and_locks_that_they_do_not_share(tmp_path):
    for rank, found in enumerate(on_workers(2, looks, tmp_path, tmp_path / "elsewhere")):
        sound, unlocked, apart = found
        assert sound["seen_s"] < 60 and not sound["second_lock"]
        assert abs(sound["clock_ahead_s"]) < 60 and sound["reduce_s"] > 0
        assert unlocked["second_lock"] == (rank == 1)
        assert "Worker 1 does not see" in apart, "all workers say so"


def test_a_ray_that_lets_strangers_in_is_refused(tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("ab")
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    run = RunConfig(launcher="ray", ray_address="192.0.2.1:6379")
    with pytest.raises(PrivacyError, match="whoever reaches its ports can run code as you"):
        probes.token_of_ray(run)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    token.chmod(0o644)
    with pytest.raises(PrivacyError, match=r"mode 0644.*chmod 600"):
        probes.token_of_ray(run)
    token.chmod(0o600)
    assert "mode 0600" in probes.token_of_ray(run)
    assert "one of its own" in probes.token_of_ray(RunConfig())
