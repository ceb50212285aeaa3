"""``dpldm status``: where a run stands, from files alone, without torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpldm_dist.cli import main
from dpldm_dist.config import parse_config
from dpldm_dist.errors import RunError
from dpldm_dist.privacy.accounting import GaussianEvent
from dpldm_dist.privacy.ledger import PrivacyLedger
from dpldm_dist.runtime.rundir import RunDir, private_files
from dpldm_dist.runtime.starts import note_start
from dpldm_dist.runtime.stopping import ask_to_stop
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.status import status, status_of

STEP = GaussianEvent(20.0, 1.0)  # not subsampled: its accounting takes no time
LINEAGE = {"key": "5e", "data": "c0", "layout": "64", "arithmetic": "cpu"}
HOLD = """
import sys
from dpldm_dist.runtime.rundir import RunDir
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run").create()


def write_ledger(run: RunDir, *, steps: int, claim: bool = True) -> float:
    """A ledger of ``steps`` charges; what it says was spent."""
    genesis = {"epsilon": 2.0, "delta": 1e-5, "steps": 10, "claim": claim}
    with private_files(), PrivacyLedger.open(run.ledger, genesis) as ledger:
        ledger.open_attempt(LINEAGE, workers=2)
        for step in range(steps):
            ledger.charge(STEP, "step", step)
            ledger.bind("step", step, hashlib.sha256(bytes([step])).hexdigest())
        return ledger.spent()


def write_start(run: RunDir, **facts) -> None:
    given = {"driver": {"host": "n1", "process": 5}, "slurm": None, "ray_job": None}
    note_start(run, "finetune", given | facts, solo_worker())


def shown(capsys, run: RunDir) -> str:
    status(parse_config({"run": {"dir": str(run.root)}}))
    return " ".join(capsys.readouterr().out.split())


def test_a_place_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run directory"):
        status_of(RunDir(tmp_path / "nothing"))


def test_a_new_run_has_not_started(run):
    assert status_of(run).state == "not started"


def test_a_run_whose_directory_is_held_is_running_and_its_holder_is_named(run, capsys):
    write_start(run)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.root)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout.readline() == "held\n"
        assert status_of(run).state == "running" and not status_of(run).stopping
        ask_to_stop(run)
        assert f"running: process {holder.pid} on" in (text := shown(capsys, run))
        assert "asked to save and stop" in text
        holder.stdin.close()
    assert status_of(run).state == "stopped"


def test_a_look_never_keeps_a_start_from_its_directory(run, monkeypatch):
    with run.lock():
        pass
    look = os.open(run.root / ".lock", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)  # as `holder` does for a moment
    monkeypatch.setattr("dpldm_dist.runtime.rundir.time.sleep", lambda _: os.close(look))
    with run.lock():
        assert status_of(run).state == "running"


def test_a_stopped_run_says_how_to_go_on_and_what_it_spent(run, capsys):
    spent = write_ledger(run, steps=4)
    (run.checkpoints / "00000002-step-00000003").mkdir(parents=True)
    (run.checkpoints / ".part-00000003").mkdir()
    write_start(run, slurm={"job": 12, "restart": 1}, ray_job="raysubmit_x")
    found = status_of(run)
    assert found.state == "stopped" and found.checkpoint[0] == 3
    assert found.ledger.steps == 4 and found.ledger.epsilon == spent
    text = shown(capsys, run)
    assert "give the same command again" in text
    assert f"{spent:.4f} spent of 2 at delta 1e-05, {2 - spent:.4f} left" in text
    assert "noisy steps charged 4 of 10" in text and "1 in 1 starts" in text
    assert "after 3 noisy steps" in text
    assert "Slurm job 12, start 2" in text and "raysubmit_x" in text
    assert "workers 1 on" in text


def test_the_time_left_is_shown_only_while_somebody_works(run, capsys):
    facts = {"what": "private fine-tuning", "step": 4, "total_steps": 9, "state": "running"}
    run.progress.write_text(json.dumps(facts | {"seconds_left": 3725, "facts": {}}))
    assert "private fine-tuning, 4 of 9" in (text := shown(capsys, run))
    assert "time left" not in text
    with run.lock():
        assert "time left 1 h 2 min" in shown(capsys, run)


def test_a_run_with_a_released_model_is_finished(run):
    write_ledger(run, steps=2)
    (run.release / "manifest.json").write_text("{}")
    assert status_of(run).state == "finished"


def test_a_run_without_a_claim_shows_no_epsilon(run, capsys):
    write_ledger(run, steps=2, claim=False)
    assert "no privacy claim" in (text := shown(capsys, run)) and "spent" not in text


def test_a_damaged_ledger_is_said_and_the_rest_is_shown(run, capsys):
    write_ledger(run, steps=2)
    content = run.ledger.read_bytes()
    run.ledger.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    text = shown(capsys, run)
    assert "ledger" in text and "line 1" in text and "epsilon" not in text.replace("Epsilon", "")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"workers": 3}', '{"what": 1}'])
def test_notes_that_cannot_be_read_are_passed_over(run, content, capsys):
    (run.private / "start.json").write_text(content)
    run.progress.write_text(content)
    assert "state" in shown(capsys, run)


def test_a_look_changes_nothing(run):
    write_ledger(run, steps=2)
    write_start(run)
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    status_of(run)
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("*")} == before


def test_status_answers_without_torch_and_shows_no_secret(run):
    write_ledger(run, steps=3)
    write_start(run)
    nonces = [json.loads(line)["body"].get("nonce") for line in run.ledger.read_text().splitlines()]
    code = "import sys\nfrom dpldm_dist.cli import main\ncode = main(['status', sys.argv[1]])\n"
    code += "print([m for m in ('torch', 'ray', 'diffusers', 'opacus') if m in sys.modules], code)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.root)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert not any(nonce in done.stdout for nonce in nonces if nonce)


def test_the_command_takes_a_run_or_a_config(run, tmp_path, capsys):
    assert main(["status", str(run.root)]) == 0
    assert main(["status", "--set", f"run.dir={run.root}"]) == 0
    assert main(["status", str(tmp_path / "nothing")]) == 6
    assert "no run directory" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "nothing"), "--dry-run"]) == 0
    assert not Path(tmp_path / "nothing").exists()
