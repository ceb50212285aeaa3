"""One budget for all runs on a data set: exactly what it affords is admitted, whatever happens."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import stat
from dataclasses import replace

import dp_accounting
import pytest
from dp_accounting.rdp import rdp_privacy_accountant as rdp

from dpldm_dist.errors import BudgetReached, PrivacyError, RunError
from dpldm_dist.privacy.accounting import (
    GaussianEvent,
    affordable_steps,
    epsilon,
    renyi_budget,
    renyi_divergence,
)
from dpldm_dist.privacy.dataset_ledger import (
    Request,
    Reservation,
    new_terms,
    read_dataset_ledger,
    reservation_for,
)
from dpldm_dist.privacy.ledger import PrivacyLedger, SharedLedger, read_ledger
from tests.processes import on_workers

EPSILON, DELTA = 2.0, 1e-5
BUDGET = (EPSILON, DELTA)
STEP = GaussianEvent(20.0, 1.0)  # not subsampled: its accounting takes no time
STATISTICS = GaussianEvent(30.0, 1.0)
PLAN = {"epsilon": 4.0, "delta": 1e-5}  # of the runs: never what stops them here
LINEAGE = {"key": "5e", "data": "c0"}


@pytest.fixture
def shared(tmp_path):
    """The file of the budget."""
    return tmp_path / "budget.jsonl"


def request_for(steps, event=STEP, **changes):
    request = Request((replace(event, count=steps),), 1e-11, "image", "add_or_remove_one")
    return replace(request, **changes)


def reservation(shared, steps, *, budget=BUDGET, **changes):
    return Reservation(shared, request_for(steps, **changes), budget=budget)


def start(path, reserve, plan=PLAN, lineage=LINEAGE):
    """A run that has started: its open ledger."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ledger = PrivacyLedger.open(path, plan, reserve=reserve)
    ledger.open_attempt(lineage, workers=1)
    return ledger


def run_to_the_end(path, reserve, *, steps):
    with start(path, reserve) as ledger:
        for step in range(steps):
            ledger.charge(STEP, "step", step)
        ledger.seal()
    return ledger.run_id


def most_steps(event=STEP, first=None):
    """How many steps a filter holds that was opened for ``first`` (default: ten steps)."""
    terms = new_terms(epsilon=EPSILON, delta=DELTA, request=first or request_for(10))
    return math.floor(terms.renyi_budget * (1 - 1e-9) / renyi_divergence([event], terms.order))


def digest_of(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


# --- prices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "rate", "order"),
    [(0.43, 0.0094, 2), (0.43, 0.0094, 9), (1.2, 0.05, 32), (30.0, 1.0, 64), (3.0, 0.001, 256)],
)
def test_the_divergence_is_that_of_another_implementation_and_never_less(sigma, rate, order):
    accountant = rdp.RdpAccountant([order])
    event = dp_accounting.GaussianDpEvent(sigma)
    if rate < 1:
        event = dp_accounting.PoissonSampledDpEvent(rate, event)
    accountant.compose(event, 3)
    wanted = float(accountant._rdp[0])
    found = renyi_divergence([GaussianEvent(sigma, rate, count=3)], order)
    assert wanted * (1 - 1e-12) <= found <= wanted * (1 + 1e-9)


def test_a_divergence_next_to_nothing_is_rounded_up():
    sigma, rate = 1e3, 1e-5  # log(1 + x) with an x that a float cannot hold beside 1
    assert renyi_divergence([GaussianEvent(sigma, rate)], 2) >= rate**2 / sigma**2


@pytest.mark.parametrize("order", [1, 0, -2, 2.5, True, "4", math.nan])
def test_an_order_that_cannot_be_is_refused(order):
    with pytest.raises(PrivacyError, match="order"):
        renyi_divergence([STEP], order)
    with pytest.raises(PrivacyError, match="order"):
        renyi_budget(order, epsilon=1.0, delta=1e-5)


@pytest.mark.parametrize("order", [3, 7, 64])
def test_the_budget_of_an_order_is_the_inverse_of_the_known_conversion(order):
    budget = renyi_budget(order, epsilon=9.0, delta=1e-6)
    assert rdp.compute_epsilon([order], [budget], 1e-6)[0] == pytest.approx(9.0, rel=1e-12)


@pytest.mark.parametrize(
    "event", [GaussianEvent(0.43, 0.0094), GaussianEvent(1.2, 0.05), GaussianEvent(30.0, 1.0)]
)
def test_the_order_is_the_one_that_holds_most_copies_of_the_first_plan(event):
    request = request_for(100, event)
    terms = new_terms(epsilon=8.0, delta=1e-5, request=request)

    def copies(order):
        most = renyi_budget(order, epsilon=8.0, delta=1e-5 - terms.overflow_delta)
        return most / renyi_divergence(request.events, order)

    assert copies(terms.order) == max(copies(order) for order in range(2, 65))


def test_what_the_filter_holds_never_costs_more_by_privacy_loss_distributions():
    for event in (STEP, GaussianEvent(1.1, 0.05), GaussianEvent(0.6, 0.01)):
        terms = new_terms(epsilon=8.0, delta=DELTA, request=request_for(10, event))
        count = math.floor(terms.renyi_budget / renyi_divergence([event], terms.order))
        assert 5 < epsilon([replace(event, count=count)], DELTA) <= 8


# --- reserving --------------------------------------------------------------------------------


def test_runs_reserve_before_they_start_until_the_budget_is_used_up(shared, tmp_path):
    most = most_steps()
    first, second = most // 2, most - most // 2
    start(tmp_path / "a" / "ledger", reservation(shared, 10)).close()
    with pytest.raises(PrivacyError, match="refuses this run"):
        start(tmp_path / "b" / "ledger", reservation(shared, most))
    start(tmp_path / "c" / "ledger", reservation(shared, first - 10)).close()
    start(tmp_path / "d" / "ledger", reservation(shared, second)).close()
    with pytest.raises(PrivacyError, match="refuses this run"):
        start(tmp_path / "e" / "ledger", reservation(shared, 1))
    summary = read_dataset_ledger(shared)
    assert sum(share.events[0].count for share in summary.shares) == most
    assert read_ledger(tmp_path / "b" / "ledger").starts == 0  # it was refused before it started


def test_a_refusal_says_what_is_left_what_was_asked_and_what_to_do(shared, tmp_path):
    start(tmp_path / "a" / "ledger", reservation(shared, 10)).close()
    summary = read_dataset_ledger(shared)
    asked, left = summary.terms.cost(request_for(500).events), summary.left
    with pytest.raises(PrivacyError) as caught:
        start(tmp_path / "b" / "ledger", reservation(shared, 500))
    for part in (
        f"asks for {asked:.2%}",
        f"{left:.2%} is left",
        "1 other run(s)",
        "Take fewer steps",
    ):
        assert part in str(caught.value)
    assert "wait for the 1 that are not finished" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_run_finds_its_reservation(shared, tmp_path):
    most = most_steps()
    for _ in range(3):
        start(tmp_path / "a" / "ledger", reservation(shared, most)).close()
    summary = read_dataset_ledger(shared)
    assert [(share.starts, share.events[0].count) for share in summary.shares] == [(3, most)]


def test_a_finished_run_gives_back_what_it_did_not_spend(shared, tmp_path):
    most = most_steps()
    run_to_the_end(tmp_path / "a" / "ledger", reservation(shared, most), steps=4)
    summary = read_dataset_ledger(shared)
    assert summary.shares[0].settled
    assert summary.shares[0].events == (replace(STEP, count=4),)
    with pytest.raises(PrivacyError):  # what was spent is not forgotten
        start(tmp_path / "b" / "ledger", reservation(shared, most - 3))
    start(tmp_path / "c" / "ledger", reservation(shared, most - 4)).close()


def test_a_run_that_died_before_it_settled_settles_when_it_is_sealed_again(shared, tmp_path):
    path = tmp_path / "a" / "ledger"
    with start(path, reservation(shared, 20)) as ledger:
        ledger.charge(STEP, "step", 0)
        ledger._file.append({"kind": "seal"})  # and then the machine went down
    assert not read_dataset_ledger(shared).shares[0].settled
    for _ in range(2):
        with PrivacyLedger.open(path, PLAN, reserve=reservation(shared, 20)) as ledger:
            ledger.seal()
    (share,) = read_dataset_ledger(shared).shares
    assert (share.settled, share.events) == (True, (STEP,))


def test_a_run_that_needs_more_reserves_more_first(shared, tmp_path):
    path, most = tmp_path / "a" / "ledger", most_steps()
    with start(path, reservation(shared, 10)) as ledger:
        for step in range(most):
            ledger.charge(STEP, "step", step)
            (share,) = read_dataset_ledger(shared).shares
            assert share.events[0].count >= step + 1
        size = path.stat().st_size
        with pytest.raises(BudgetReached, match="refuses this run"):
            ledger.charge(STEP, "step", most)
        assert path.stat().st_size == size  # nothing of it is in the run's own ledger
    assert len(shared.read_text().splitlines()) < 20  # not an entry for every step


def test_a_new_attempt_reserves_what_it_repeats(shared, tmp_path):
    path = tmp_path / "a" / "ledger"
    with start(path, reservation(shared, 4)) as ledger:
        for step in range(4):
            ledger.charge(STEP, "step", step)
    start(tmp_path / "b" / "ledger", reservation(shared, most_steps() - 5)).close()
    with start(path, reservation(shared, 4), lineage={"key": "other"}) as ledger:
        ledger.charge(STEP, "step", 2)
        with pytest.raises(BudgetReached):
            ledger.charge(STEP, "step", 3)
    assert read_ledger(path).steps == 5


def test_a_step_that_ends_in_another_sum_reserves_its_higher_price(shared, tmp_path):
    path = tmp_path / "a" / "ledger"
    with start(path, reservation(shared, 6)) as ledger:
        for step in range(3):
            ledger.charge(STEP, "step", step)
        ledger.bind("step", 0, digest_of("a"))
        ledger.bind("step", 0, digest_of("b"))
        ledger.charge(STEP, "step", 3)
    (share,) = read_dataset_ledger(shared).shares
    halved = GaussianEvent(20.0 / math.sqrt(2), 1.0)
    assert set(share.events) == {replace(STEP, count=5), halved}  # in place of a reserved step
    other = most_steps() - 7  # the two sums cost two of these steps: seven are gone
    start(tmp_path / "b" / "ledger", reservation(shared, other)).close()
    with start(path, reservation(shared, 6)) as ledger:
        ledger.bind("step", 1, digest_of("c"))
        with pytest.raises(BudgetReached):
            ledger.bind("step", 1, digest_of("d"))
    assert read_ledger(path).rebound == 1


# --- the run that is alone ----------------------------------------------------------------------


def alone_steps():
    """More steps than the filter holds, and no more than privacy loss distributions allow."""
    most = affordable_steps(STEP, spent=(), epsilon=EPSILON, delta=DELTA - 1e-11)
    terms = new_terms(epsilon=EPSILON, delta=DELTA, request=request_for(most))
    assert terms.cost(request_for(most).events) > 1
    return most


def test_a_first_run_may_use_the_whole_budget_by_privacy_loss_distributions(shared, tmp_path):
    most = alone_steps()
    with pytest.raises(PrivacyError, match="may cost epsilon"):
        start(tmp_path / "b" / "ledger", reservation(shared, most + 1))
    assert not shared.exists()  # a refused first run fixes nothing
    run_to_the_end(tmp_path / "a" / "ledger", reservation(shared, most), steps=2)
    (share,) = read_dataset_ledger(shared).shares
    assert share.alone
    assert share.settled


def test_nothing_is_ever_admitted_beside_a_run_that_is_alone_not_even_when_it_stopped_early(
    shared, tmp_path
):
    run_to_the_end(tmp_path / "a" / "ledger", reservation(shared, alone_steps()), steps=1)
    assert read_dataset_ledger(shared).left == 0
    with pytest.raises(PrivacyError, match="no other is ever admitted"):
        start(tmp_path / "b" / "ledger", reservation(shared, 1))


def test_a_run_that_is_alone_may_repeat_what_its_budget_still_pays_for(shared, tmp_path):
    path, most = tmp_path / "a" / "ledger", alone_steps()
    with start(path, reservation(shared, most)) as ledger:
        for step in range(most - 1):
            ledger.charge(STEP, "step", step)
    with start(path, reservation(shared, most), lineage={"key": "other"}) as ledger:
        ledger.charge(STEP, "step", most - 2)
        with pytest.raises(BudgetReached, match="may cost epsilon"):
            ledger.charge(STEP, "step", most - 1)


def test_a_first_run_within_the_filter_is_never_extended_beyond_it(shared, tmp_path):
    most = most_steps()
    assert most < alone_steps()
    with start(tmp_path / "a" / "ledger", reservation(shared, 10)) as ledger:
        for step in range(most):
            ledger.charge(STEP, "step", step)
        with pytest.raises(BudgetReached):  # although privacy loss distributions would allow it
            ledger.charge(STEP, "step", most)


def test_only_the_first_run_can_be_alone(shared, tmp_path):
    start(tmp_path / "a" / "ledger", reservation(shared, 1)).close()
    with pytest.raises(PrivacyError, match="refuses"):
        start(tmp_path / "b" / "ledger", reservation(shared, alone_steps()))


# --- terms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [(3.0, DELTA), (EPSILON, 2e-5)])
def test_a_budget_is_fixed_by_the_first_run(shared, tmp_path, other):
    start(tmp_path / "a" / "ledger", reservation(shared, 1)).close()
    whole = shared.read_bytes()
    with pytest.raises(PrivacyError, match="fixed in advance"):
        start(tmp_path / "b" / "ledger", reservation(shared, 1, budget=other))
    assert shared.read_bytes() == whole
    start(tmp_path / "c" / "ledger", reservation(shared, 1, budget=None)).close()


def test_a_file_that_is_there_is_obeyed_whether_or_not_the_config_names_a_budget(shared, tmp_path):
    request = request_for(1)
    nobody = {"dataset_epsilon": None, "dataset_delta": None}
    assert reservation_for(shared, request, **nobody) is None
    wanted = {"dataset_epsilon": 2, "dataset_delta": DELTA}
    start(tmp_path / "a" / "ledger", reservation_for(shared, request, **wanted)).close()
    start(tmp_path / "b" / "ledger", reservation_for(shared, request, **nobody)).close()
    assert len(read_dataset_ledger(shared).shares) == 2


def test_records_of_another_unit_need_a_budget_of_their_own(shared, tmp_path):
    start(tmp_path / "a" / "ledger", reservation(shared, 1)).close()
    with pytest.raises(PrivacyError, match="unit = image, this run patient"):
        start(tmp_path / "b" / "ledger", reservation(shared, 1, unit="patient"))


def test_the_caps_of_all_plans_share_the_delta_that_is_set_aside(shared, tmp_path):
    third = 1e-3 * DELTA / 3 * 0.999
    for name in "abc":
        reserve = reservation(shared, 1, overflow_delta=third)
        run_to_the_end(tmp_path / name / "ledger", reserve, steps=1)
    with pytest.raises(PrivacyError, match="set aside"):  # also those of settled runs count
        start(tmp_path / "d" / "ledger", reservation(shared, 1, overflow_delta=third))


def test_a_run_without_a_claim_is_refused(shared, tmp_path):
    with pytest.raises(PrivacyError, match="without a privacy claim"):
        start(tmp_path / "a" / "ledger", reservation(shared, 1), plan={**PLAN, "claim": False})


def test_a_run_keeps_the_budget_it_began_with(shared, tmp_path):
    path = tmp_path / "a" / "ledger"
    start(path, reservation(shared, 5)).close()
    with pytest.raises(RunError, match="opened for dataset_ledger="):
        start(path, None)
    with pytest.raises(RunError, match="opened for dataset_ledger="):
        start(path, reservation(tmp_path / "fresh.jsonl", 5))
    start(path, reservation(shared, 5)).close()


def test_a_run_that_began_without_a_budget_is_not_let_in_later(shared, tmp_path):
    path = tmp_path / "a" / "ledger"
    start(path, None).close()
    with pytest.raises(RunError, match="opened for dataset_ledger=null"):
        start(path, reservation(shared, 5))


def test_only_the_user_can_read_the_budget(shared, tmp_path):
    start(tmp_path / "a" / "ledger", reservation(shared, 5)).close()
    assert stat.S_IMODE(shared.stat().st_mode) == 0o600
    shared.chmod(0o640)
    with pytest.raises(PrivacyError, match="chmod 600"):
        start(tmp_path / "b" / "ledger", reservation(shared, 5))


# --- copies and old states ----------------------------------------------------------------------


def charged_run(path, shared, steps=5):
    with start(path, reservation(shared, steps)) as ledger:
        for step in range(steps):
            ledger.charge(STEP, "step", step)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_run_that_was_put_back_to_an_older_state_is_refused(shared, tmp_path, steps):
    path, old = tmp_path / "a" / "ledger", tmp_path / "old"
    charged_run(path, shared, steps=5)
    shutil.copy(path, old)
    with start(path, reservation(shared, 5)) as ledger:  # its second start
        for step in range(5, 5 + steps):
            ledger.charge(STEP, "step", step)
    shutil.copy(old, path)
    whole = shared.read_bytes(), path.read_bytes()
    with pytest.raises(PrivacyError, match="rolled back, or another copy"):
        start(path, reservation(shared, 5))
    assert (shared.read_bytes(), path.read_bytes()) == whole


def test_of_two_copies_only_the_first_that_starts_goes_on(shared, tmp_path):
    path, copy = tmp_path / "a" / "ledger", tmp_path / "copy"
    charged_run(path, shared)
    shutil.copy(path, copy)
    start(copy, reservation(shared, 5)).close()
    with pytest.raises(PrivacyError, match="rolled back, or another copy"):
        start(path, reservation(shared, 5))
    start(copy, reservation(shared, 5)).close()


def test_two_copies_that_open_at_the_same_time_do_not_both_start(shared, tmp_path):
    path, copy = tmp_path / "a" / "ledger", tmp_path / "copy"
    charged_run(path, shared)
    shutil.copy(path, copy)
    with (
        PrivacyLedger.open(path, PLAN, reserve=reservation(shared, 5)) as one,
        PrivacyLedger.open(copy, PLAN, reserve=reservation(shared, 5)) as other,
    ):
        one.open_attempt(LINEAGE, workers=1)
        with pytest.raises(PrivacyError, match="rolled back, or another copy"):
            other.open_attempt(LINEAGE, workers=1)


@pytest.mark.parametrize(
    "action",
    [
        lambda ledger: ledger.note_checkpoint(6),
        lambda ledger: ledger.seal(),
        lambda ledger: [ledger.charge(STEP, "step", step) for step in range(6, 100)],
    ],
)
def test_a_running_run_notices_that_a_copy_of_it_went_on(shared, tmp_path, action):
    path, copy = tmp_path / "a" / "ledger", tmp_path / "copy"
    with start(path, reservation(shared, 5)) as ledger:
        shutil.copy(path, copy)
        start(copy, reservation(shared, 5)).close()
        size = path.stat().st_size
        ledger.charge(STEP, "step", 0)  # it was reserved: nobody is asked
        with pytest.raises(PrivacyError, match="rolled back, or another copy"):
            action(ledger)
        assert read_ledger(path).checkpoints == 0
        assert not read_ledger(path).sealed
        assert path.stat().st_size > size


def test_a_run_that_spent_is_not_let_into_a_budget_that_forgot_it(shared, tmp_path):
    path, old = tmp_path / "a" / "ledger", tmp_path / "old"
    start(tmp_path / "first" / "ledger", reservation(shared, 1)).close()
    shutil.copy(shared, old)
    charged_run(path, shared)
    shutil.copy(old, shared)
    with pytest.raises(PrivacyError, match="does not know this run"):
        start(path, reservation(shared, 5))


def test_an_extension_that_the_file_forgot_is_reserved_again(shared, tmp_path):
    path, old = tmp_path / "a" / "ledger", tmp_path / "old"
    with start(path, reservation(shared, 2)) as ledger:
        shutil.copy(shared, old)
        for step in range(9):
            ledger.charge(STEP, "step", step)
    shutil.copy(old, shared)
    start(path, reservation(shared, 2)).close()
    assert read_dataset_ledger(shared).shares[0].events[0].count >= 9


def test_a_budget_that_is_gone_is_not_made_anew_for_a_run_that_knew_it(shared, tmp_path):
    path = tmp_path / "a" / "ledger"
    charged_run(path, shared)
    shared.unlink()
    with pytest.raises(RunError, match="opened for dataset_ledger="):
        start(path, reservation(shared, 5))
    shared.unlink()
    with pytest.raises(PrivacyError, match="gone or empty"):
        start(path, reservation(shared, 5, budget=None))
    assert not shared.exists()


# --- several processes --------------------------------------------------------------------------


def member(number, folder, shared, steps, go, results):
    """A member of a sweep: waits for all others, then starts."""
    go.wait()
    try:
        start(
            folder / str(number) / "ledger", Reservation(shared, request_for(steps), budget=BUDGET)
        )
        results.put("admitted")
    except PrivacyError as error:
        results.put("refused" if "refuses this run" in str(error) else str(error))


def sweep(folder, shared, steps, members):
    """What ``members`` processes that start at once are told."""
    context = multiprocessing.get_context("fork")
    go, results = context.Event(), context.Queue()
    started = [
        context.Process(target=member, args=(n, folder, shared, steps, go, results))
        for n in range(members)
    ]
    for process in started:
        process.start()
    go.set()
    found = [results.get(timeout=300) for _ in started]
    for process in started:
        process.join(timeout=60)
        assert process.exitcode == 0
    return sorted(found)


@pytest.mark.parametrize(("members", "affordable"), [(8, 3), (6, 6)])
def test_of_a_sweep_that_starts_at_once_exactly_the_affordable_members_run(
    shared, tmp_path, members, affordable
):
    per_member = request_for(1)
    steps = most_steps(first=per_member) // affordable  # the order does not depend on their number
    told = sweep(tmp_path, shared, steps, members)
    assert told == ["admitted"] * affordable + ["refused"] * (members - affordable)
    assert len(read_dataset_ledger(shared).shares) == affordable


def test_of_runs_that_want_the_whole_budget_exactly_one_gets_it(shared, tmp_path):
    told = sweep(tmp_path, shared, alone_steps(), 4)
    assert told == ["admitted", "refused", "refused", "refused"]


def reserve_for_ever(number, folder, shared):
    for run in range(1000):
        start(folder / f"{number}-{run}" / "ledger", reservation(shared, 1, event=CHEAP)).close()


CHEAP = GaussianEvent(1e4, 1.0)


def test_no_kill_leaves_the_budget_unusable_or_a_run_without_its_reservation(shared, tmp_path):
    random_ = random.Random(11)
    context = multiprocessing.get_context("fork")
    for round_ in range(6):
        running = [
            context.Process(target=reserve_for_ever, args=(f"{round_}-{n}", tmp_path, shared))
            for n in range(2)
        ]
        wanted = (shared.stat().st_size if shared.exists() else 0) + random_.randrange(400, 2000)
        for process in running:
            process.start()
        while not shared.exists() or shared.stat().st_size < wanted:
            assert any(process.is_alive() for process in running)
        for process in running:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        known = {share.run_id for share in read_dataset_ledger(shared).shares}
        for path in tmp_path.glob("*/ledger"):
            if path.stat().st_size and b"\n" in path.read_bytes():
                summary = read_ledger(path)
                assert summary.run_id in known or summary.starts == 0
    assert len(known) >= 6


def share_on_workers(collective, path, shared):
    reserve = reservation(shared, 2)
    ledger = SharedLedger.open(path, PLAN, collective=collective, reserve=reserve)
    ledger.open_attempt(LINEAGE, workers=collective.world_size)
    told = [ledger.charge(STEP, "step", 0)]
    try:
        ledger.charge(replace(STEP, count=150), "step", 1)
    except BudgetReached as error:
        told.append(str(error))
    ledger.close()
    return told


def test_all_workers_of_a_run_learn_of_a_refusal(shared, tmp_path):
    one, other = on_workers(2, share_on_workers, tmp_path / "ledger", shared)
    assert one == other
    assert one[0] is True
    assert "asks for" in one[1]
    assert len(read_dataset_ledger(shared).shares) == 1


# --- damage -------------------------------------------------------------------------------------


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


GENESIS = {"kind": "genesis", "format": 1, "ledger_id": "0a" * 16, "order": 12, "unit": "image"}
GENESIS |= {"relation": "add_or_remove_one", "epsilon": 2.0, "delta": 1e-5, "overflow_delta": 1e-8}
RESERVE = {"kind": "reserve", "run_id": "0b" * 16, "events": [[20.0, 1.0, 5]], "alone": False}
RESERVE |= {"overflow_delta": 1e-11}
OTHER = {**RESERVE, "run_id": "0c" * 16}
START = {"kind": "start", "run_id": "0b" * 16, "entry": 2, "hash": "0d" * 32}
SETTLE = {"kind": "settle", "run_id": "0b" * 16, "events": [[20.0, 1.0, 2]]}
ALONE = {**RESERVE, "alone": True, "events": [[20.0, 1.0, 86]]}


@pytest.mark.parametrize(
    "bodies",
    [
        [RESERVE],
        [{**GENESIS, "format": 2}],
        [{**GENESIS, "ledger_id": "x"}],
        [{**GENESIS, "order": 1}],
        [{**GENESIS, "epsilon": -1.0}],
        [{**GENESIS, "epsilon": 0.01}],
        [{**GENESIS, "overflow_delta": 1e-5}],
        [{**GENESIS, "delta": 1.0}],
        [GENESIS, START],
        [GENESIS, SETTLE],
        [GENESIS, {**RESERVE, "run_id": "b"}],
        [GENESIS, {**RESERVE, "events": []}],
        [GENESIS, {**RESERVE, "events": [[20.0, 1.0]]}],
        [GENESIS, {**RESERVE, "events": [[20.0, 1.0, -5]]}],
        [GENESIS, {**RESERVE, "events": [[20.0, 1.0, 5.0]]}],
        [GENESIS, {**RESERVE, "events": [[20.0, 1.0, True]]}],
        [GENESIS, {**RESERVE, "events": [[20.0, 2.0, 5]]}],
        [GENESIS, {**RESERVE, "events": [[20.0, 1.0, 5], [20.0, 1.0, 5]]}],
        [GENESIS, {**RESERVE, "events": [[20.0, 1.0, 5000]]}],
        [GENESIS, {**RESERVE, "overflow_delta": -1.0}],
        [GENESIS, RESERVE, {**RESERVE, "alone": True}],
        [GENESIS, RESERVE, {**RESERVE, "overflow_delta": 2e-11}],
        [GENESIS, RESERVE, {**OTHER, "alone": True}],
        [GENESIS, RESERVE, {**OTHER, "events": [[20.0, 1.0, 80]]}],
        [GENESIS, ALONE, OTHER],
        [GENESIS, {**ALONE, "events": [[20.0, 1.0, 700]]}],
        [GENESIS, RESERVE, {**START, "hash": "0D" * 32}],
        [GENESIS, RESERVE, {**SETTLE, "events": [[20.0, 1.0, 6]]}],
        [GENESIS, RESERVE, SETTLE, RESERVE],
        [GENESIS, RESERVE, SETTLE, SETTLE],
        [GENESIS, RESERVE, {"kind": "refund"}],
    ],
)
def test_entries_that_cannot_be_are_refused_even_with_right_hashes(shared, bodies):
    for possible in (
        [GENESIS, RESERVE, START, OTHER, SETTLE, OTHER, START],
        [GENESIS, ALONE, START],
    ):
        forge(shared, possible)
        assert read_dataset_ledger(shared).shares[0].starts >= 1
    forge(shared, bodies)
    with pytest.raises(PrivacyError, match=r"line \d|admitted more than its budget"):
        read_dataset_ledger(shared)


def test_a_change_of_any_byte_is_refused(shared, tmp_path):
    run_to_the_end(tmp_path / "a" / "ledger", reservation(shared, 5), steps=2)
    whole = shared.read_bytes()
    assert read_dataset_ledger(shared).shares[0].settled
    for position in range(0, len(whole) - 1, 3):
        changed = bytes([whole[position] ^ 1])
        shared.write_bytes(whole[:position] + changed + whole[position + 1 :])
        with pytest.raises(PrivacyError, match=r"line \d"):
            read_dataset_ledger(shared)


def test_a_torn_end_is_cut_off_and_the_repair_recorded(shared, tmp_path):
    start(tmp_path / "a" / "ledger", reservation(shared, 5)).close()
    whole = shared.read_bytes()
    shared.write_bytes(whole + whole.splitlines()[-1][:50])
    assert read_dataset_ledger(shared).torn_bytes == 50
    start(tmp_path / "b" / "ledger", reservation(shared, 5)).close()
    summary = read_dataset_ledger(shared)
    assert (summary.repairs, len(summary.shares), summary.torn_bytes) == (1, 2, 0)


def test_a_crash_while_the_budget_is_made_leaves_nothing_in_the_way(shared, tmp_path):
    start(tmp_path / "a" / "ledger", reservation(shared, 5)).close()
    shared.write_bytes(shared.read_bytes()[:40])
    start(tmp_path / "b" / "ledger", reservation(shared, 5)).close()
    assert len(read_dataset_ledger(shared).shares) == 1


# --- the promise ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 20))]
)
def test_whatever_runs_do_all_they_spent_is_within_the_budget(shared, tmp_path, seed):
    """Random runs, crashes, new attempts, other sums and seals; then all ledgers are added up."""
    random_ = random.Random(seed)
    kinds = GaussianEvent(18.0, 1.0), GaussianEvent(25.0, 1.0)
    refused = 0
    for number in range(30):
        path = tmp_path / str(random_.randrange(6)) / "ledger"
        event = kinds[int(path.parent.name) % 2]
        try:
            with start(
                path,
                reservation(shared, random_.randint(1, 6), event=event),
                lineage={"n": str(number)},
            ) as ledger:
                for step in range(random_.randint(1, 8)):
                    ledger.charge(event, "step", step)
                    for digest in range(random_.randint(0, 2)):
                        ledger.bind("step", step, digest_of(digest))
                if random_.random() < 0.15:
                    ledger.seal()
        except (PrivacyError, RunError):
            refused += 1
    spent = [event for path in tmp_path.glob("*/ledger") for event in read_ledger(path).events]
    terms = read_dataset_ledger(shared).terms
    assert renyi_divergence(spent, terms.order) <= terms.renyi_budget
    assert 0 < epsilon(spent, DELTA) <= EPSILON
    assert refused
