"""``dpldm ledger``: shows what the files prove, and refuses those that prove nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from dpldm_dist.cli import main
from dpldm_dist.config import parse_config
from dpldm_dist.privacy.accounting import GaussianEvent, epsilon, epsilon_prv, epsilon_rdp
from dpldm_dist.privacy.dataset_ledger import Request, Reservation
from dpldm_dist.privacy.ledger import PrivacyLedger, read_ledger
from dpldm_dist.runtime.rundir import RunDir, dataset_budget_file
from dpldm_dist.stages.ledger import describe, ledger

PLAN = {"epsilon": 3.0, "delta": 1e-5, "overflow_delta": 1e-9}
STEP = GaussianEvent(20.0, 1.0)
BUDGET = (4.0, 1e-5)
DIGESTS = [f"{number:x}" * 64 for number in (10, 11, 12)]


@pytest.fixture
def config(tmp_path):
    config = parse_config({"run": {"dir": str(tmp_path / "run")}})
    RunDir(config.run.dir).create()
    return config


def record(config, *, steps=5, reserve=True, plan=PLAN):
    """A ledger with two attempts, three starts, and one step that ended in two sums."""
    run = RunDir(config.run.dir)
    request = Request((GaussianEvent(20.0, 1.0, count=steps + 2),), 1e-9, "image", "add_or_remove")
    wanted = Reservation(dataset_budget_file(config), request, budget=BUDGET) if reserve else None
    with PrivacyLedger.open(run.ledger, plan, reserve=wanted) as found:
        found.open_attempt({"key": "a"}, workers=2)
        for step in range(steps):
            found.charge(STEP, "step", step)
            found.bind("step", step, DIGESTS[0])
        found.open_attempt({"key": "a"}, workers=1)
        found.bind("step", 0, DIGESTS[1])
        found.note_checkpoint(steps)
        nonce = found.open_attempt({"key": "b"}, workers=1).nonce
    return run.ledger, nonce


def run_cli(config, *words):
    return main(["ledger", *words, "--set", f"run.dir={config.run.dir}"])


def shown_rows(printed):
    rows = (re.split(r"   *", line.strip(), maxsplit=1) for line in printed.splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_a_ledger_is_shown_with_epsilon_computed_from_the_file_by_three_accountants(config, capsys):
    path, _ = record(config)
    assert run_cli(config, "show") == 0
    rows = shown_rows(capsys.readouterr().out)
    events = read_ledger(path).events
    delta = 1e-5 - 1e-9
    assert len(events) == 2
    assert rows["epsilon spent, PLD (number of record)"] == f"{epsilon(events, delta):.6f}"
    assert rows["the same by PRV (cross-check)"] == f"{epsilon_prv(events, delta):.6f}"
    assert rows["the same by RDP (cross-check, looser)"] == f"{epsilon_rdp(events, delta):.6f}"
    assert rows["attempts, starts"] == "2, 3"
    assert rows["noisy steps charged"] == "5"
    assert rows["finished sums; steps with several"] == "6; 1"
    assert rows["sealed"] == "not yet"
    entry, digest = read_ledger(path).head
    assert rows[f"head, entry {entry}"] == digest
    assert rows["for all its runs together"] == "epsilon 4 at delta 1e-05"
    assert "reserved" in rows[f"run {read_ledger(path).run_id}"]


def test_neither_nonces_nor_digests_of_sums_are_shown(config, capsys):
    path, nonce = record(config)
    for action in ("show", "verify"):
        assert run_cli(config, action) == 0
        printed = capsys.readouterr().out
        assert read_ledger(path).run_id in printed or action == "verify"
        assert nonce.hex() not in printed
        assert not any(digest in printed for digest in DIGESTS)


def test_a_run_without_a_claim_shows_no_epsilon(config, capsys):
    record(config, reserve=False, plan={**PLAN, "claim": False})
    for action in ("show", "verify"):
        assert run_cli(config, action) == 0
        printed = capsys.readouterr().out
        assert "no privacy claim" in printed
        assert "PLD" not in printed


def test_a_sound_ledger_is_verified_also_when_its_end_was_torn(config, capsys):
    path, _ = record(config)
    assert run_cli(config, "verify") == 0
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[-1][:40])
    whole = path.read_bytes()
    assert run_cli(config, "verify") == 0
    assert run_cli(config, "show") == 0
    assert "40 bytes, never acknowledged" in capsys.readouterr().out
    assert path.read_bytes() == whole  # nothing is repaired by looking


@pytest.mark.parametrize("line", [0, 2, 5])
def test_a_damaged_line_is_named_with_exit_code_4(config, capsys, line):
    path, _ = record(config)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"attempt":1', b'"attempt":2').replace(b"3.0", b"9.0")
    path.write_bytes(b"".join(lines))
    for words in (["verify"], ["show"], ["verify", str(path)]):
        assert run_cli(config, *words) == 4
        assert f"line {line + 1} " in capsys.readouterr().err


def test_a_damaged_budget_of_the_data_set_is_named_too(config, capsys):
    record(config)
    place = dataset_budget_file(config)
    place.write_bytes(place.read_bytes().replace(b"20.0", b"80.0"))
    assert run_cli(config, "verify") == 4
    assert re.search(r"budget.jsonl, line \d", capsys.readouterr().err)


def forge_higher_charges(path):
    """The same ledger, consistent, but with more steps in one charge than the budget pays for."""
    import hashlib

    previous, lines = "", []
    for line in path.read_text().splitlines():
        body = json.loads(line)["body"]
        if body["kind"] == "charge" and body["step"] == 3:
            body["count"] = 10**5
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256((previous + text).encode()).hexdigest()
        lines.append(f'{{"body":{text},"hash":"{previous}"}}\n')
    path.write_text("".join(lines))


def test_a_consistent_ledger_above_its_budget_is_not_verified(config, capsys):
    path, _ = record(config, reserve=False)
    assert run_cli(config, "verify") == 0
    forge_higher_charges(path)
    assert run_cli(config, "verify") == 4
    assert "expected at most its budget" in capsys.readouterr().err


def test_a_run_that_was_rolled_back_is_not_verified(config, capsys):
    path, _ = record(config)
    shutil.copy(path, path.with_name("old"))
    record(config)
    assert run_cli(config, "verify") == 0
    shutil.copy(path.with_name("old"), path)
    assert run_cli(config, "verify") == 4
    assert "lacks the entry" in capsys.readouterr().err


def test_a_budget_that_was_rolled_back_is_not_verified(config, capsys):
    place = dataset_budget_file(config)
    record(config)
    lines = place.read_bytes().splitlines(keepends=True)
    place.write_bytes(lines[0])
    assert run_cli(config, "verify") == 4
    assert "does not know the run" in capsys.readouterr().err


@pytest.mark.parametrize("known", [True, False])
def test_a_run_of_another_budget_is_not_verified(config, capsys, known):
    path, _ = record(config, reserve=known)
    other = config.model_copy(
        update={"run": config.run.model_copy(update={"dir": config.run.dir.with_name("other")})}
    )
    RunDir(other.run.dir).create()
    record(other)
    shutil.copy(dataset_budget_file(other), dataset_budget_file(config))
    assert run_cli(config, "verify") == 4
    assert ("another budget" if known else "names no budget") in capsys.readouterr().err
    assert run_cli(config, "verify", str(path)) == 0  # the file by itself is sound


def test_what_is_no_ledger_is_an_error_and_never_a_hang(config, tmp_path, capsys):
    assert run_cli(config, "show") == 6
    assert "No ledger" in capsys.readouterr().err
    assert run_cli(config, "show", str(tmp_path / "missing")) == 6
    os.mkfifo(tmp_path / "pipe")
    assert run_cli(config, "show", str(tmp_path / "pipe")) == 6
    for number, content in enumerate((b"", b"\n", b"[" * 10**5, b'{"body":[]}\n', b"\xff\n")):
        (tmp_path / str(number)).write_bytes(content)
        assert run_cli(config, "verify", str(tmp_path / str(number))) == 4


def test_a_ledger_in_use_can_be_shown(config):
    run = RunDir(config.run.dir)
    with PrivacyLedger.open(run.ledger, PLAN) as writing:
        writing.open_attempt({"key": "a"}, workers=1)
        assert ledger(config, "verify")[run.ledger].starts == 1


def test_a_dry_run_names_the_files(config):
    assert describe(config, "show") == [
        f"reads   {RunDir(config.run.dir).ledger}",
        f"reads   {dataset_budget_file(config)}",
    ]
    assert describe(config, "show", "some.jsonl") == ["reads   some.jsonl"]


def test_it_loads_no_trainer():
    code = "import sys, dpldm_dist.stages.ledger; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(shown.stdout.split())
    assert "dpldm_dist.privacy.ledger" in loaded
    trainer = ("dpldm_dist.models", "dpldm_dist.data", "dpldm_dist.stages.finetune")
    trainer += ("dpldm_dist.privacy.optimizer", "dpldm_dist.privacy.gradients", "diffusers")
    assert not loaded & set(trainer)
