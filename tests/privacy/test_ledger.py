"""The ledger: durable before it returns, never above the budget, and every damage noticed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import random
import resource
import secrets
import shutil
import signal
import stat
from contextlib import contextmanager
from dataclasses import replace

import pytest

from dpldm_dist.errors import BudgetReached, PrivacyError, RunError
from dpldm_dist.privacy.accounting import GaussianEvent, affordable_steps, epsilon
from dpldm_dist.privacy.ledger import PrivacyLedger, SharedLedger, read_ledger
from tests.processes import on_workers

PLAN = {"epsilon": 2.0, "delta": 1e-5, "noise_multiplier": 20.0, "unit": "image", "draws": 4}
STEP = GaussianEvent(20.0, 1.0)  # not subsampled: its accounting takes no time
CHEAP_STEP = GaussianEvent(1000.0, 1.0)
STATISTICS = GaussianEvent(30.0, 1.0)
LINEAGE = {"key": "5e", "data": "c0", "layout": "64", "arithmetic": "cpu"}
OTHER_LINEAGE = {**LINEAGE, "data": "c1"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def charged(path, steps=3, plan=PLAN):
    """An open ledger with ``steps`` steps charged in one attempt."""
    ledger = PrivacyLedger.open(path, plan)
    ledger.open_attempt(LINEAGE, workers=1)
    for step in range(steps):
        assert ledger.charge(STEP, "step", step)
    return ledger


def digest_of(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def full_ledger(path):
    """A closed ledger with an entry of every kind but a repair; its heads after each checkpoint."""
    with PrivacyLedger.open(path, PLAN) as ledger:
        ledger.open_attempt(LINEAGE, workers=1)
        ledger.charge(STATISTICS, "statistics")
        heads = [ledger.note_checkpoint(0)]
        for step in range(2):
            ledger.charge(STEP, "step", step)
            ledger.bind("step", step, digest_of(step))
        heads.append(ledger.note_checkpoint(2))
        ledger.open_attempt(OTHER_LINEAGE, workers=2)
        ledger.charge(STEP, "step", 2)
        heads.append(ledger.note_checkpoint(3))
    return heads


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def forge(path, bodies):
    """Write a chain whose hashes are right, whatever the bodies say. An independent writer."""
    previous, lines = "", []
    for seq, body in enumerate(bodies):
        text = canonical({"seq": seq, **body})
        previous = hashlib.sha256((previous + text).encode()).hexdigest()
        lines.append(f'{{"body":{text},"hash":"{previous}"}}\n')
    path.write_text("".join(lines))
    path.chmod(0o600)


def forged_genesis(plan=PLAN):
    digest = hashlib.sha256(canonical(plan).encode()).hexdigest()
    return {"kind": "genesis", "format": 2, "run_id": "00", "plan": plan, "digest": digest}


@contextmanager
def child(action):
    """``action(say)`` in a forked process; gives (its id, a file of the lines that it says)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            action(lambda text: os.write(writer, f"{text}\n".encode()))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "r") as said:
        try:
            yield pid, said
        finally:
            with_killed(pid)


def with_killed(pid):
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


# --- what an entry is -------------------------------------------------------------------------


def test_a_ledger_says_what_was_charged(path):
    heads = full_ledger(path)
    summary = read_ledger(path)
    assert summary.steps == 3
    assert summary.statistics == 1
    assert (summary.attempts, summary.starts, summary.binds, summary.rebound) == (2, 2, 2, 0)
    assert summary.checkpoints == 3
    assert summary.plan == PLAN
    assert (summary.budget, summary.delta) == (2.0, 1e-5)
    assert summary.events == (STATISTICS, GaussianEvent(20.0, 1.0, count=3))
    assert summary.epsilon == epsilon(summary.events, 1e-5)
    assert summary.head == heads[-1]


def test_the_chain_is_what_its_description_says(path):
    heads = full_ledger(path)
    previous = ""
    for seq, line in enumerate(path.read_text().splitlines()):
        entry = json.loads(line)
        previous = hashlib.sha256((previous + canonical(entry["body"])).encode()).hexdigest()
        assert entry["hash"] == previous
        assert entry["body"]["seq"] == seq
    assert heads[-1] == (seq, previous)


def test_only_the_user_can_read_a_ledger(path):
    charged(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(PrivacyError, match="chmod 600"):
        PrivacyLedger.open(path, PLAN)


def test_part_of_delta_can_pay_for_something_else(path):
    plan = {**PLAN, "overflow_delta": 9e-6}
    with charged(path, plan=plan) as ledger:
        assert ledger.spent() == epsilon([GaussianEvent(20.0, 1.0, count=3)], 1e-5 - 9e-6)
    assert read_ledger(path).epsilon > epsilon([GaussianEvent(20.0, 1.0, count=3)], 1e-5)


def test_a_run_without_a_claim_has_no_epsilon(path):
    with charged(path, plan={**PLAN, "claim": False}) as ledger:
        assert ledger.spent() == math.inf
    assert read_ledger(path).epsilon == math.inf


def test_a_charge_needs_an_attempt(path):
    with PrivacyLedger.open(path, PLAN) as ledger, pytest.raises(RunError, match="open_attempt"):
        ledger.charge(STEP, "step", 0)


def test_a_new_attempt_charges_repeated_steps_again(path):
    with charged(path, steps=3) as ledger:
        once = ledger.spent()
    with PrivacyLedger.open(path, PLAN) as ledger:
        assert ledger.spent() == once  # what an interrupted attempt may have released stays charged
        attempt = ledger.open_attempt(OTHER_LINEAGE, workers=1)
        assert (attempt.number, attempt.replays) == (2, False)
        assert ledger.charge(STEP, "step", 2)
        assert ledger.spent() == epsilon([GaussianEvent(20.0, 1.0, count=4)], 1e-5) > once
    assert read_ledger(path).attempts == 2


def test_nothing_follows_a_seal(path):
    with charged(path) as ledger:
        head = ledger.seal()
        assert ledger.seal() == head
        for write in (
            lambda: ledger.charge(STEP, "step", 3),
            lambda: ledger.charge(STEP, "step", 2),  # charged before: nothing to write, but late
            lambda: ledger.bind("step", 2, digest_of("late")),
            lambda: ledger.note_checkpoint(3),
        ):
            with pytest.raises(RunError, match="sealed"):
                write()
    assert read_ledger(path).sealed
    with PrivacyLedger.open(path, PLAN) as ledger, pytest.raises(RunError, match="sealed"):
        ledger.open_attempt(LINEAGE, workers=1)


def test_a_closed_ledger_takes_nothing(path):
    ledger = charged(path)
    ledger.close()
    ledger.close()
    with pytest.raises(RunError, match="closed"):
        ledger.charge(STEP, "step", 3)


# --- attempts, replays and digests ---------------------------------------------------------------


def test_a_start_with_the_same_lineage_goes_on_with_the_same_attempt(path):
    with PrivacyLedger.open(path, PLAN) as ledger:
        first = ledger.open_attempt(LINEAGE, workers=1)
    with PrivacyLedger.open(path, PLAN) as ledger:
        again = ledger.open_attempt(dict(reversed(LINEAGE.items())), workers=3)
    assert (first.number, first.replays) == (1, False)
    assert (again.number, again.nonce, again.replays) == (1, first.nonce, True)
    summary = read_ledger(path)
    assert (summary.attempts, summary.starts) == (1, 2)


@pytest.mark.parametrize("name", LINEAGE)
def test_another_key_data_layout_or_arithmetic_opens_a_new_attempt(path, name):
    with PrivacyLedger.open(path, PLAN) as ledger:
        first = ledger.open_attempt(LINEAGE, workers=1)
        other = ledger.open_attempt({**LINEAGE, name: "other"}, workers=1)
        back = ledger.open_attempt(LINEAGE, workers=1)  # only the last attempt can go on
    assert [first.number, other.number, back.number] == [1, 2, 3]
    assert not (first.replays or other.replays or back.replays)
    assert len({first.nonce, other.nonce, back.nonce}) == 3
    assert all(len(attempt.nonce) == 32 for attempt in (first, other, back))


def test_an_attempt_does_not_show_its_nonce(path):
    with PrivacyLedger.open(path, PLAN) as ledger:
        attempt = ledger.open_attempt(LINEAGE, workers=1)
    assert attempt.nonce.hex() not in repr(attempt)
    assert repr(attempt.nonce) not in repr(attempt)


def test_two_starts_of_two_copies_have_different_heads(path, tmp_path):
    charged(path).close()
    copy = tmp_path / "copy.jsonl"
    shutil.copy(path, copy)
    with PrivacyLedger.open(path, PLAN) as one, PrivacyLedger.open(copy, PLAN) as other:
        assert one.head == other.head
        one.open_attempt(LINEAGE, workers=1)
        other.open_attempt(LINEAGE, workers=1)
        assert one.head != other.head
        assert not other.contains(one.head)


def test_a_repeated_step_is_charged_once(path):
    charged(path, steps=3).close()
    with PrivacyLedger.open(path, PLAN) as ledger:
        ledger.open_attempt(LINEAGE, workers=1)
        size = path.stat().st_size
        assert [ledger.charge(STEP, "step", step) for step in (1, 2)] == [False, False]
        assert path.stat().st_size == size
        assert ledger.charge(STEP, "step", 3)
        assert ledger.charge(STATISTICS, "statistics")
        assert not ledger.charge(STATISTICS, "statistics", 0)
    assert read_ledger(path).events == (GaussianEvent(20.0, 1.0, count=4), STATISTICS)


@pytest.mark.parametrize("other", [GaussianEvent(19.0, 1.0), GaussianEvent(20.0, 1.0, count=2)])
def test_a_repeated_step_keeps_its_price(path, other):
    with charged(path, steps=1) as ledger:
        with pytest.raises(PrivacyError, match="was charged as 1 x"):
            ledger.charge(other, "step", 0)
        assert ledger.events() == (STEP,)


def test_the_same_sum_again_costs_nothing(path):
    with charged(path, steps=2) as ledger:
        once = ledger.spent()
        assert ledger.bind("step", 0, digest_of("sum")) == 1
        size = path.stat().st_size
        assert ledger.bind("step", 0, digest_of("sum")) == 1
        assert path.stat().st_size == size
        assert ledger.spent() == once
    with PrivacyLedger.open(path, PLAN) as ledger:
        ledger.open_attempt(LINEAGE, workers=1)
        assert ledger.bind("step", 0, digest_of("sum")) == 1
        assert ledger.spent() == once


def test_k_digests_cost_one_release_with_the_noise_over_sqrt_k(path):
    with charged(path, steps=3) as ledger:
        for digests in range(1, 5):
            assert ledger.bind("step", 1, digest_of(digests)) == digests
            rest = GaussianEvent(20.0, 1.0, count=2)
            wanted = epsilon([rest, GaussianEvent(20.0 / math.sqrt(digests), 1.0)], 1e-5)
            assert ledger.spent() == pytest.approx(wanted, rel=1e-12)
            fresh = affordable_steps(STEP, spent=ledger.events(), epsilon=2.0, delta=1e-5)
            assert ledger.affordable_steps(STEP) == fresh
        assert ledger.bind("step", 1, digest_of(1)) == 4  # any of its earlier sums
        spent = ledger.spent()
    summary = read_ledger(path)
    assert (summary.binds, summary.rebound, summary.epsilon) == (4, 1, spent)


def test_what_was_asked_with_a_bound_does_not_change_what_is_affordable_later(path):
    with charged(path, steps=0) as ledger:
        fresh = affordable_steps(STEP, spent=(), epsilon=2.0, delta=1e-5)
        for most in (2, 1, fresh + 1, 3):
            assert ledger.affordable_steps(STEP, most=most) == min(most, fresh)
    with charged(path, steps=0) as ledger:
        assert ledger.affordable_steps(STEP, most=2) == 2
        for step in range(fresh):  # beyond what was asked for, up to the budget
            assert ledger.charge(STEP, "step", step)
        with pytest.raises(BudgetReached):
            ledger.charge(STEP, "step", fresh)


def test_two_sums_of_a_sampled_step_cost_more_than_two_steps(path):
    step = GaussianEvent(0.8, 0.01)
    plan = {**PLAN, "epsilon": 8.0}
    with PrivacyLedger.open(path, plan) as ledger:
        ledger.open_attempt(LINEAGE, workers=1)
        ledger.charge(step, "step", 0)
        ledger.bind("step", 0, digest_of("a"))
        ledger.bind("step", 0, digest_of("b"))
        assert ledger.spent() > epsilon([replace(step, count=2)], 1e-5)


def test_a_bind_needs_the_charge_of_its_attempt(path):
    with charged(path, steps=1) as ledger:
        for what, step in (("step", 1), ("statistics", None)):
            with pytest.raises(PrivacyError, match="bound before it was charged"):
                ledger.bind(what, step, digest_of("sum"))
        ledger.open_attempt(OTHER_LINEAGE, workers=1)
        with pytest.raises(PrivacyError, match="bound before it was charged"):
            ledger.bind("step", 0, digest_of("sum"))
        with pytest.raises(PrivacyError, match="64 hexadecimal digits"):
            ledger.bind("step", 0, "sum")
    assert read_ledger(path).binds == 0


def test_a_further_digest_above_the_budget_is_refused_and_not_written(path):
    with charged(path, steps=0) as ledger:
        most = ledger.affordable_steps(STEP)
        for step in range(most):
            ledger.charge(STEP, "step", step)
            ledger.bind("step", step, digest_of(step))
        size, spent = path.stat().st_size, ledger.spent()
        with pytest.raises(BudgetReached):
            ledger.bind("step", 0, digest_of("other"))
        assert path.stat().st_size == size
        assert ledger.bind("step", 0, digest_of(0)) == 1  # the same sum is free, budget or not
        assert ledger.spent() == spent <= PLAN["epsilon"]


def test_what_is_bound_in_a_row_can_be_replayed(path):
    with charged(path, steps=8) as ledger:
        assert ledger.replayable_until == 0
        for step, until in ((3, 4), (4, 5), (6, 5), (5, 7), (3, 7)):
            ledger.bind("step", step, digest_of((step, until)))
            assert ledger.replayable_until == until
        ledger.open_attempt(OTHER_LINEAGE, workers=1)
        assert ledger.replayable_until == 0


def test_a_ledger_of_another_format_is_refused_with_its_format(path):
    forge(path, [{**forged_genesis(), "format": 1}])
    for function in (read_ledger, lambda p: PrivacyLedger.open(p, PLAN)):
        with pytest.raises(PrivacyError, match="has format 1, this version reads 2"):
            function(path)


# --- the budget -------------------------------------------------------------------------------


def test_the_budget_is_never_passed_and_fully_usable(path):
    with charged(path, steps=0) as ledger:
        ledger.charge(STATISTICS, "statistics")
        with pytest.raises(BudgetReached):
            for step in range(1000):
                ledger.charge(STEP, "step", step)
        assert not ledger.affords(STEP)
        size = path.stat().st_size
        with pytest.raises(PrivacyError):
            ledger.charge(STEP, "step", step)
        assert path.stat().st_size == size  # a refused charge is not written
        assert ledger.spent() <= PLAN["epsilon"]
    summary = read_ledger(path)
    assert summary.steps == step > 10
    assert summary.epsilon <= PLAN["epsilon"] < epsilon([*summary.events, STEP], 1e-5)


def test_the_budget_holds_over_restarts_and_changing_releases(path):
    random_ = random.Random(7)
    refused = 0
    for start in range(100):
        with PrivacyLedger.open(path, PLAN) as ledger:
            ledger.open_attempt({"key": str(start)}, workers=1)
            for step in range(3):
                event, what = random_.choice([(STEP, "step"), (STATISTICS, "statistics")])
                most = ledger.affordable_steps(event)
                if not most:
                    with pytest.raises(PrivacyError):
                        ledger.charge(event, what, step)
                    refused += 1
                    break
                ledger.charge(replace(event, count=random_.randint(1, most)), what, step)
            assert ledger.spent() <= PLAN["epsilon"]
        if refused:
            return
    pytest.fail("a hundred attempts did not reach the budget")


def test_what_is_affordable_is_known_without_counting_again(path):
    with charged(path, steps=1) as ledger:
        for place, event in enumerate((STEP, STATISTICS, STEP)):
            ledger.charge(event, "step", 2 * place + 1)
            ledger.charge(event, "step", 2 * place + 2)
            fresh = affordable_steps(event, spent=ledger.events(), epsilon=2.0, delta=1e-5)
            assert ledger.affordable_steps(event) == fresh


def test_a_charge_of_many_counts_as_many(path):
    with charged(path, steps=0) as ledger:
        most = ledger.affordable_steps(STEP)
        with pytest.raises(PrivacyError):
            ledger.charge(GaussianEvent(20.0, 1.0, count=most + 1), "step", 0)
        ledger.charge(GaussianEvent(20.0, 1.0, count=most), "step", 0)
        assert not ledger.affords(STEP)
        with pytest.raises(PrivacyError, match="at least 1"):
            ledger.charge(GaussianEvent(20.0, 1.0, count=0), "step", 0)
        with pytest.raises(PrivacyError, match="expected one of"):
            ledger.charge(STEP, "mean", 0)


# --- crashes ----------------------------------------------------------------------------------


def charge_for_ever(path):
    def action(say):
        with PrivacyLedger.open(path, PLAN) as ledger:
            ledger.open_attempt({"key": secrets.token_hex(4)}, workers=1)
            say("open")
            for step in range(1000):
                ledger.charge(CHEAP_STEP, "step", step)
                say(step)

    return action


def test_every_acknowledged_charge_survives_kill_9(path):
    seed = random.randrange(10**6)
    print("seed", seed)  # pytest shows it when the test fails
    random_ = random.Random(seed)
    total = 0
    for _ in range(30):
        with child(charge_for_ever(path)) as (pid, said):
            heard = [said.readline() for _ in range(1 + random_.randrange(8))]
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            heard += said.readlines()
        total += sum(line.strip().isdigit() for line in heard if line.endswith("\n"))
        on_disk = read_ledger(path).steps
        assert total <= on_disk <= total + 1  # at most one was durable, but not yet acknowledged
        total = on_disk
    assert read_ledger(path).attempts == 30


def test_a_charge_is_on_disk_before_it_is_acknowledged(path, monkeypatch):
    ledger = charged(path)
    calls = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *a: calls.append("write") or write(*a))
    monkeypatch.setattr(os, "fsync", lambda *a: calls.append("fsync") or fsync(*a))
    ledger.charge(STEP, "step", 3)
    assert calls == ["write", "fsync"]
    ledger.close()


def test_the_name_of_a_new_ledger_is_durable_too(path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor):
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    PrivacyLedger.open(path, PLAN).close()
    assert synced == [False, True]


@pytest.mark.parametrize("kept", [1, 12, 100, -2])
def test_a_torn_last_line_is_cut_off_and_the_repair_recorded(path, kept):
    heads = full_ledger(path)
    whole = path.read_bytes()
    *_, last = whole.splitlines(keepends=True)
    path.write_bytes(whole + last[:kept])  # a write that never came to its end
    before = read_ledger(path)
    assert before.torn_bytes == len(last[:kept])
    with PrivacyLedger.open(path, PLAN) as ledger:
        assert ledger.contains(heads[-1])
        assert ledger.open_attempt(LINEAGE, workers=1).number == 3
    after = read_ledger(path)
    assert (after.repairs, after.torn_bytes) == (1, 0)
    assert after.events == before.events
    repair = json.loads(path.read_bytes()[len(whole) :].splitlines()[0])["body"]
    assert (repair["cut_bytes"], repair["completed"]) == (len(last[:kept]), False)


def test_a_torn_end_of_zeros_is_cut_off(path):
    full_ledger(path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:40] + b"\0" * 100)
    PrivacyLedger.open(path, PLAN).close()
    assert path.read_bytes().startswith(whole)
    assert read_ledger(path).repairs == 1


def test_a_whole_last_line_without_its_end_still_counts(path):
    charged(path, steps=3).close()
    path.write_bytes(path.read_bytes()[:-1])
    assert read_ledger(path).steps == 3
    with PrivacyLedger.open(path, PLAN) as ledger:
        assert ledger.spent() == epsilon([GaussianEvent(20.0, 1.0, count=3)], 1e-5)
    assert (read_ledger(path).steps, read_ledger(path).repairs) == (3, 1)


def test_a_crash_while_the_ledger_is_made_leaves_nothing_in_the_way(path):
    charged(path, steps=0).close()
    path.write_bytes(path.read_bytes()[:30])
    charged(path).close()
    assert (read_ledger(path).steps, read_ledger(path).repairs) == (3, 1)


# --- damage -----------------------------------------------------------------------------------


def test_a_change_of_any_single_byte_is_refused(path):
    full_ledger(path)
    whole = path.read_bytes()
    steps = read_ledger(path).steps  # unchanged, it is accepted
    random_ = random.Random(3)
    for position in range(len(whole)):
        end_of_line = position >= len(whole) - 2 or whole[position] == 10
        for value in {random_.randrange(256), *((0, 10, 32) if end_of_line else ())}:
            value = whole[position] ^ 1 if value == whole[position] else value
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            if position == len(whole) - 1 and value == 0:
                assert read_ledger(path).steps == steps  # only the end of the last line is gone
                continue
            with pytest.raises(PrivacyError, match=r"line \d+ .*restore the file"):
                read_ledger(path)


def test_a_damaged_ledger_is_refused_and_left_as_it_is(path):
    full_ledger(path)
    whole = path.read_bytes()
    number = whole.index(b'"noise_multiplier":20.0')
    damaged = whole.replace(b'"noise_multiplier":20.0', b'"noise_multiplier":80.0')
    path.write_bytes(damaged)
    with pytest.raises(PrivacyError, match="line 1 "):
        PrivacyLedger.open(path, PLAN)
    later = whole[: number + 30] + damaged[number + 30 :]
    path.write_bytes(later)
    with pytest.raises(PrivacyError, match="line 6 does not continue the chain"):
        PrivacyLedger.open(path, PLAN)
    assert path.read_bytes() == later


@pytest.mark.parametrize("change", ["drop", "repeat", "swap", "empty", "spaces"])
def test_lines_that_are_lost_moved_or_rewritten_are_refused(path, change):
    full_ledger(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for place in range(len(lines) - 1):
        changed = list(lines)
        if change == "drop":
            del changed[place]
        elif change == "repeat":
            changed.insert(place, lines[place])
        elif change == "swap":
            changed[place : place + 2] = reversed(lines[place : place + 2])
        elif change == "empty":
            changed.insert(place, b"\n")
        else:
            changed[place] = lines[place].replace(b":", b": ", 1)
        path.write_bytes(b"".join(changed))
        with pytest.raises(PrivacyError, match="line"):
            read_ledger(path)


def test_a_cut_is_noticed_by_every_checkpoint_behind_it(path):
    heads = full_ledger(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        path.write_bytes(b"".join(lines[:kept]))
        with PrivacyLedger.open(path, PLAN) as ledger:
            for seq, digest in heads:
                assert ledger.contains((seq, digest)) == (seq < kept)
                assert ledger.contains([seq, digest]) == (seq < kept)


def test_a_cut_anywhere_keeps_exactly_the_whole_entries_before_it(path):
    heads = full_ledger(path)
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for kept in range(first, len(whole), 7):
        path.write_bytes(whole[:kept])
        entries = whole[: kept + 1].count(b"\n")  # one that lacks but its end of line is whole
        assert read_ledger(path).head[0] == entries - 1
        with PrivacyLedger.open(path, PLAN) as ledger:
            assert ledger.contains(heads[-1]) is False


def test_another_ledger_contains_no_foreign_head(path, tmp_path):
    heads = full_ledger(path)
    with charged(tmp_path / "other", steps=20) as other:
        assert not any(other.contains(head) for head in heads)
        for nonsense in [
            (),
            (0,),
            "ab",
            (True, "x"),
            (-1, ""),
            (0, None),
            ("0", heads[0][1]),
            None,
        ]:
            assert not other.contains(nonsense)


def test_a_lost_middle_of_zeros_is_not_taken_for_a_torn_line(path):
    charged(path, steps=30).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096] + b"\0" * 4096)
    with pytest.raises(PrivacyError):
        PrivacyLedger.open(path, PLAN)
    path.write_bytes(b"\0" * len(whole))
    with pytest.raises(PrivacyError):
        PrivacyLedger.open(path, PLAN)


ATTEMPT = {"kind": "attempt", "attempt": 1, "nonce": "0e" * 32, "lineage": LINEAGE}
START = {"kind": "start", "attempt": 1, "workers": 2, "token": "0f" * 8}
CHARGE = {"kind": "charge", "what": "step", "step": 0, "attempt": 1, "count": 1}
CHARGE |= {"noise_multiplier": 20.0, "sample_rate": 1.0}
BIND = {"kind": "bind", "what": "step", "step": 0, "attempt": 1, "digest": "0d" * 32}
OPENED = [forged_genesis(), ATTEMPT, START]


@pytest.mark.parametrize(
    "bodies",
    [
        [ATTEMPT],
        [forged_genesis({"epsilon": 2.0})],
        [forged_genesis({"epsilon": -1.0, "delta": 1e-5})],
        [forged_genesis({**PLAN, "claim": 0})],
        [{**forged_genesis(), "digest": "00"}],
        [{**forged_genesis(), "format": 1}],
        [forged_genesis(), forged_genesis()],
        [forged_genesis(), CHARGE],
        [forged_genesis(), START],
        [forged_genesis(), {**ATTEMPT, "attempt": 2}],
        [forged_genesis(), {**ATTEMPT, "nonce": "0E" * 32}],
        [forged_genesis(), {**ATTEMPT, "nonce": "0e"}],
        [forged_genesis(), {**ATTEMPT, "lineage": {"key": 1}}],
        [forged_genesis(), ATTEMPT, {**START, "attempt": 2}],
        [forged_genesis(), ATTEMPT, {**START, "workers": 0}],
        [forged_genesis(), ATTEMPT, {**START, "token": ""}],
        [*OPENED, {**CHARGE, "count": -3}],
        [*OPENED, {**CHARGE, "count": 0}],
        [*OPENED, {**CHARGE, "count": True}],
        [*OPENED, {**CHARGE, "count": 10**6}, {**CHARGE, "step": 1}],
        [*OPENED, {**CHARGE, "sample_rate": 0.0}],
        [*OPENED, {**CHARGE, "sample_rate": 2.0}],
        [*OPENED, {**CHARGE, "noise_multiplier": -20.0}],
        [*OPENED, {**CHARGE, "noise_multiplier": "20"}],
        [*OPENED, {**CHARGE, "noise_multiplier": math.inf}],
        [*OPENED, {**CHARGE, "what": "mean"}],
        [*OPENED, {**CHARGE, "step": -1}],
        [*OPENED, {**CHARGE, "step": None}],
        [*OPENED, {**CHARGE, "attempt": 2}],
        [*OPENED, {**CHARGE, "extra": 1}],
        [*OPENED, CHARGE, CHARGE],
        [*OPENED, BIND],
        [*OPENED, CHARGE, {**BIND, "step": 1}],
        [*OPENED, CHARGE, {**BIND, "what": "statistics"}],
        [*OPENED, CHARGE, {**BIND, "digest": "0D" * 32}],
        [*OPENED, CHARGE, {**BIND, "digest": "0d" * 31}],
        [*OPENED, CHARGE, BIND, BIND],
        [*OPENED, CHARGE, {**ATTEMPT, "attempt": 2}, {**BIND, "attempt": 2}],
        [*OPENED, CHARGE, {**ATTEMPT, "attempt": 2}, BIND],
        [*OPENED, {"kind": "refund"}],
        [*OPENED, {"kind": "seal"}, CHARGE],
        [*OPENED, CHARGE, {"kind": "seal"}, BIND],
        [forged_genesis(), {**ATTEMPT, "seq": 5}],
    ],
)
def test_entries_that_cannot_be_are_refused_even_with_right_hashes(path, bodies):
    forge(path, [*OPENED, CHARGE, BIND, {**BIND, "digest": "00" * 32}])
    assert read_ledger(path).binds == 2  # the same writer, with possible entries, is accepted
    forge(path, bodies)
    with pytest.raises(PrivacyError, match=r"line \d"):
        read_ledger(path)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[" * 100_000, b"null\n", b"\xff\xfe\n", b'{"body":1}\n']
)
def test_a_file_that_is_no_ledger_is_refused(path, content):
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(PrivacyError):
        read_ledger(path)
    if content:
        with pytest.raises(PrivacyError):
            PrivacyLedger.open(path, PLAN)


def test_what_is_no_file_is_refused(path, tmp_path):
    with pytest.raises(RunError, match="Cannot read"):
        read_ledger(path)
    with pytest.raises(RunError, match="Cannot open"):
        PrivacyLedger.open(tmp_path / "missing" / "ledger.jsonl", PLAN)
    os.mkfifo(path, 0o600)
    for function in (read_ledger, lambda p: PrivacyLedger.open(p, PLAN)):
        with pytest.raises(RunError, match="regular file"):
            function(path)
        with pytest.raises(RunError):
            function(tmp_path)


# --- other plans, other processes -------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"noise_multiplier": 10.0},
            "opened for noise_multiplier=20.0, this config says 10.0: use a new",
        ),
        ({"epsilon": 3.0}, "opened for epsilon=2.0, this config says 3.0"),
        ({"unit": "patient"}, "opened for unit=image, this config says patient"),
        ({"claim": False}, "opened for claim=null, this config says false"),
    ],
)
def test_another_plan_is_refused_and_named(path, change, message):
    charged(path).close()
    whole = path.read_bytes()
    with pytest.raises(RunError, match=message):
        PrivacyLedger.open(path, {**PLAN, **change})
    with pytest.raises(RunError, match="opened for draws=4"):
        PrivacyLedger.open(path, {name: value for name, value in PLAN.items() if name != "draws"})
    assert path.read_bytes() == whole
    PrivacyLedger.open(path, PLAN).close()


@pytest.mark.parametrize(
    "change", [{"epsilon": math.nan}, {"delta": 1.0}, {"epsilon": None}, {"overflow_delta": 1e-4}]
)
def test_a_plan_without_a_sound_budget_is_refused(path, change):
    with pytest.raises(PrivacyError):
        PrivacyLedger.open(path, {**PLAN, **change})
    assert not path.exists()


def test_a_second_process_is_refused_while_the_first_holds_the_ledger(path):
    def hold(say):
        with charged(path):
            say("open")
            signal.pause()

    with child(hold) as (_, said):
        assert said.readline() == "open\n"
        with pytest.raises(RunError, match="busy: another process holds it") as caught:
            PrivacyLedger.open(path, PLAN)
        assert "\n" not in str(caught.value)
        assert read_ledger(path).steps == 3  # reading needs no lock
    PrivacyLedger.open(path, PLAN).close()  # its death gave the lock back


def test_a_writer_that_no_lock_stopped_is_noticed(path, monkeypatch):
    first = charged(path)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # as on a file system without locks
    second = PrivacyLedger.open(path, PLAN)
    second.open_attempt(LINEAGE, workers=1)
    with pytest.raises(RunError, match="changed or replaced"):
        first.charge(STEP, "step", 3)
    second.charge(STEP, "step", 3)
    assert read_ledger(path).steps == 4
    first.close()
    second.close()


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_ledger_replaced_under_its_writer_is_noticed(path, tmp_path, how):
    ledger = charged(path)
    if how == "replaced":
        (tmp_path / "copy").write_bytes(path.read_bytes())
        os.replace(tmp_path / "copy", path)
    else:
        path.unlink()
    with pytest.raises(RunError, match="changed or replaced"):
        ledger.charge(STEP, "step", 3)
    ledger.close()


# --- a disk that fails ------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1, 100, 1000])
def test_a_full_disk_acknowledges_nothing_and_leaves_no_half_line(path, room):
    charged(path).close()

    def fill(say):
        with PrivacyLedger.open(path, PLAN) as ledger:
            ledger.open_attempt(LINEAGE, workers=1)
            most = path.stat().st_size + room
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            for step in range(3, 100):
                try:
                    ledger.charge(STEP, "step", step)
                except RunError as error:
                    say(error)
                    try:
                        ledger.charge(STEP, "step", step)
                    except RunError as again:
                        say(again)
                    return
                say("charged")

    with child(fill) as (_, said):
        *acknowledged, first, second = said.read().splitlines()
    assert "could not be written" in first
    assert "Nothing was charged" in first
    assert "failed to write before" in second
    assert acknowledged == ["charged"] * (room // 200)
    summary = read_ledger(path)
    assert (summary.steps, summary.torn_bytes) == (3 + len(acknowledged), 0)
    PrivacyLedger.open(path, PLAN).close()


def test_an_fsync_that_fails_acknowledges_nothing(path, monkeypatch):
    ledger = charged(path)
    size, spent = path.stat().st_size, ledger.spent()
    fsync = os.fsync

    def fail(_):
        monkeypatch.setattr(os, "fsync", fsync)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="Input/output error"):
        ledger.charge(STEP, "step", 3)
    assert path.stat().st_size == size
    assert ledger.spent() == spent
    ledger.close()
    assert read_ledger(path).steps == 3


# --- several workers --------------------------------------------------------------------------


def share(collective, path):
    """On every worker: what each call gave or raised."""
    seen = []

    def note(call):
        try:
            seen.append(call())
        except Exception as error:
            seen.append((type(error).__name__, str(error)))

    mine = digest_of(f"of worker {collective.rank}")
    note(lambda: SharedLedger.open(path, {**PLAN, "unit": "patient"}, collective=collective))
    ledger = SharedLedger.open(path, PLAN, collective=collective)
    note(lambda: ledger.open_attempt(OTHER_LINEAGE, workers=collective.world_size))
    note(lambda: ledger.affords(STEP))
    most = ledger.affordable_steps(STEP)
    note(lambda: most)
    note(lambda: ledger.charge(STEP, "step", 0))
    note(lambda: ledger.charge(STEP, "step", 0))
    note(lambda: ledger.bind("step", 0, digest_of("sum")))
    note(lambda: ledger.bind("step", 1, digest_of("sum")))
    note(lambda: ledger.replayable_until)
    note(lambda: ledger.charge(GaussianEvent(20.0, 1.0, count=most - 1), "step", 1))
    note(lambda: ledger.charge(STEP, "step", 2))
    note(lambda: ledger.bind("step", 1, mine))
    note(lambda: ledger.note_checkpoint(2))
    note(lambda: ledger.contains(ledger.head))
    note(lambda: ledger.contains((1, "no")))
    note(ledger.spent)
    note(ledger.events)
    note(ledger.seal)
    note(lambda: ledger.charge(STEP, "step", 3))
    ledger.close()
    unclaimed = path.with_name("unclaimed.jsonl")
    ledger = SharedLedger.open(unclaimed, {**PLAN, "claim": False}, collective=collective)
    note(ledger.spent)
    ledger.close()
    return seen


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_workers_see_the_same_and_fail_alike(path, world_size):
    charged(path, steps=0).close()
    results = on_workers(world_size, share, path)
    assert all(result == results[0] for result in results)
    other_plan, attempt, affords, most, *rest = results[0]
    assert other_plan[0] == "RunError"
    assert (attempt.number, len(attempt.nonce), attempt.replays) == (2, 32, False)
    assert affords
    assert rest[:3] == [True, False, 1]
    assert rest[3][0] == "PrivacyError"
    assert rest[4:6] == [1, True]
    assert rest[6][0] == "BudgetReached"
    head, rest = rest[8], rest[9:]
    assert rest[:2] == [True, False]
    assert rest[3] == (GaussianEvent(20.0, 1.0, count=most),)
    assert rest[2] == epsilon(rest[3], 1e-5)
    assert rest[5][0] == "RunError"
    assert rest[6] == math.inf  # no claim, no number
    summary = read_ledger(path)
    assert summary.steps == most
    assert summary.head[0] == head[0] + 1  # the seal follows the checkpoint


def test_workers_whose_finished_sums_differ_all_stop_and_nothing_is_bound(path):
    charged(path, steps=0).close()
    for result in on_workers(3, share, path):
        kind, message = result[11]
        assert kind == "RunError"
        assert "differ between workers" in message
    assert read_ledger(path).binds == 1  # only the digest on which they agreed
