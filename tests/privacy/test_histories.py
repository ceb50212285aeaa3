"""Whatever happens to a run, its ledgers account for at least what it released.

Scripted histories of a small trainer, whose releases are known: ``Truth`` composes them. The
ledgers are read a second time by code of this file, which shares nothing with the package: raw
lines, hashes, dp-accounting. At last bugs are planted, one for each promise, and each must be found.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from dpldm_dist.errors import BudgetReached, DpldmError, PrivacyError
from dpldm_dist.privacy import chain, dataset_ledger, ledger
from dpldm_dist.privacy.accounting import GaussianEvent, affordable_steps
from dpldm_dist.privacy.dataset_ledger import Request, Reservation, read_dataset_ledger
from dpldm_dist.privacy.ledger import PrivacyLedger, read_ledger

DELTA = 1e-5
STEP = GaussianEvent(1.0, 0.25)  # sampled: two sums of one step cost more than two steps
STATISTICS = GaussianEvent(4.0, 1.0)
GENESIS = {"epsilon": 12.0, "delta": DELTA}
LINEAGE = {"key": "a", "data": "a", "layout": "64", "arithmetic": "cpu"}
BUDGET = (16.0, DELTA)


def composed(events):
    """Epsilon of {(sigma, rate): count} by dp-accounting alone, on a grid of its own."""
    total = pld.identity(5e-4)
    for (sigma, rate), count in events.items():
        one = pld.from_gaussian_mechanism(
            sigma, sampling_prob=rate, value_discretization_interval=5e-4
        )
        total = total.compose(one.self_compose(count))
    return total.get_epsilon_for_delta(DELTA)


class Truth:
    """What was released, seen from outside: which coins, which sum, which noise."""

    def __init__(self):
        self._sums = defaultdict(set)  # (coins, event) -> the different sums released under them

    def release(self, attempt, what, step, total, event):
        """The same sum under the same coins has the same noise: it is the same release."""
        self._sums[attempt.nonce, what, step, event].add(total)

    def events(self):
        """k sums of norm C under one set of coins are one of norm sqrt(k) C."""
        found = Counter()
        for (*_, event), totals in self._sums.items():
            sigma = event.noise_multiplier / math.sqrt(len(totals))
            found[sigma, event.sample_rate] += event.count
        return found


def read_independently(path):
    """{(sigma, rate): count} from the raw lines, checking the chain on the way."""
    previous, charged, digests, sealed = "", {}, defaultdict(set), False
    for line in path.read_bytes().splitlines():
        entry = json.loads(line)
        body = entry["body"]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256((previous + text).encode()).hexdigest()
        assert entry["hash"] == previous
        assert not sealed
        sealed = body["kind"] == "seal"
        if body["kind"] in ("charge", "bind"):
            place = body["attempt"], body["what"], body["step"]
        if body["kind"] == "charge":
            assert place not in charged
            charged[place] = body["noise_multiplier"], body["sample_rate"], body["count"]
        if body["kind"] == "bind":
            digests[place].add(body["digest"])
    events = Counter()
    for place, (sigma, rate, count) in charged.items():
        events[sigma / math.sqrt(max(1, len(digests[place]))), rate] += count
    return events


class Trainer:
    """A run directory, and what its starts do to it. A start that fails releases no more."""

    def __init__(self, folder):
        self.path = folder / "run" / "ledger.jsonl"
        self.copy = folder / "copy" / "ledger.jsonl"
        self.shared = folder / "budget.jsonl"
        self.survivor = self.path  # of two copies, the one that may go on
        self.truth = Truth()
        self.refused = []
        self.path.parent.mkdir()
        self.copy.parent.mkdir()

    def opened(self, path=None):
        request = Request((replace(STEP, count=3),), 1e-11, "image", "add_or_remove_one")
        reserve = Reservation(self.shared, request, budget=BUDGET)
        return PrivacyLedger.open(path or self.path, GENESIS, reserve=reserve)

    def start(self, steps, *, crash=None, sums="", path=None, **lineage):
        """Steps ``steps``; ``crash``: (step, point) at which the process dies. ``sums``: another
        text makes other sums of the same steps."""
        try:
            with self.opened(path) as run:
                attempt = run.open_attempt({**LINEAGE, **lineage}, workers=1)
                sums = f"{sums} of {lineage.get('data')}"
                for step in steps:
                    if not self._step(run, attempt, "step", step, STEP, crash, sums):
                        return
                run.note_checkpoint(step + 1)
        except DpldmError as error:
            self.refused.append(error)

    def statistics(self, *, sums="", crash=None):
        with self.opened() as run:
            attempt = run.open_attempt(LINEAGE, workers=1)
            self._step(run, attempt, "statistics", 0, STATISTICS, crash, sums)

    def _step(self, run, attempt, what, step, event, crash, sums):
        run.charge(event, what, step)
        if crash == (step, "charged"):
            return False
        total = f"{attempt.nonce.hex()} {what} {step} {sums}"  # a function of coins and data
        run.bind(what, step, hashlib.sha256(total.encode()).hexdigest())
        if crash == (step, "bound"):
            return False
        self.truth.release(attempt, what, step, total, event)
        return crash != (step, "released")

    def tear(self, kept):
        """As if the process had died while it wrote the last line."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        self.path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])


# --- what can happen ------------------------------------------------------------------------------


def unbroken(run):
    run.start(range(6))


def crash_after_the_charge(run):
    run.start(range(6), crash=(2, "charged"))
    run.start(range(6))


def crash_after_the_bind(run):
    run.start(range(6), crash=(2, "bound"))
    run.start(range(6))


def crash_after_the_release(run):
    run.start(range(6), crash=(4, "released"))
    run.start(range(2, 6))


def many_crashes(run):
    for step in range(5):
        for point in ("charged", "bound", "released"):
            run.start(range(max(0, step - 2), 6), crash=(step, point))
    run.start(range(2, 6))


def a_repeated_step_ends_in_another_sum(run):
    run.start(range(5))
    run.start(range(3, 6), sums="other hardware")


def a_repeated_step_ends_in_three_sums(run):
    for sums in ("", "one", "two"):
        run.start(range(4), sums=sums)


def another_sum_was_bound_but_not_released(run):
    run.start(range(4))
    run.start(range(4), sums="other", crash=(1, "bound"))
    run.start(range(1, 5))


def changed_data(run):
    run.start(range(4))
    run.start(range(2, 5), data="changed")


def a_lost_key(run):
    run.start(range(4), crash=(3, "bound"))
    run.start(range(2, 5), key="new")


def another_layout_and_back(run):
    run.start(range(3))
    run.start(range(1, 4), layout="32")
    run.start(range(1, 4))


def a_fresh_attempt_with_other_sums(run):
    run.start(range(3))
    run.start(range(3), arithmetic="gpu")
    run.start(range(3), arithmetic="gpu", sums="again")


def statistics_with_another_sum(run):
    run.statistics(crash=(0, "bound"))
    run.statistics(sums="other")
    run.start(range(3))


def a_torn_charge(run):
    run.start(range(4), crash=(3, "charged"))
    run.tear(60)
    run.start(range(2, 6), sums="other")


def a_torn_bind(run):
    run.start(range(4), crash=(3, "bound"))
    run.tear(60)
    run.start(range(2, 6))


def a_bind_that_lacks_its_end_of_line(run):
    run.start(range(4))
    lines = run.path.read_bytes().splitlines(keepends=True)
    run.path.write_bytes(b"".join(lines[:-1])[:-1])  # the checkpoint, and an end of line
    run.start(range(2, 5), sums="other")


def the_budget_is_reached(run):
    run.start(range(200))
    run.start(range(200), sums="other")
    run.start(range(200), data="changed")


def a_rollback(run):
    newest = run.copy.with_name("newest")
    run.start(range(2))
    shutil.copy(run.path, run.copy)
    run.start(range(5))
    shutil.copy(run.path, newest)
    shutil.copy(run.copy, run.path)
    run.start(range(5), sums="other data")
    run.start(range(5), data="other data")
    shutil.copy(newest, run.path)  # as the refusal says
    run.start(range(4, 6))


def a_fork(run):
    run.start(range(2))
    shutil.copy(run.path, run.copy)
    run.start(range(5), path=run.copy)
    run.start(range(5), sums="other data")
    run.survivor = run.copy


def a_fork_while_both_run(run):
    run.start(range(2))
    shutil.copy(run.path, run.copy)
    with run.opened() as one, run.opened(run.copy) as other:
        for life, sums in ((one, ""), (other, "other")):
            try:
                attempt = life.open_attempt(LINEAGE, workers=1)
                for step in range(2, 5):
                    run._step(life, attempt, "step", step, STEP, None, sums)
            except PrivacyError as error:
                run.refused.append(error)


def going_on_after_the_seal(run):
    run.start(range(2))
    with run.opened() as sealed:
        sealed.seal()
    run.start(range(4))


def a_trainer_that_forgets_to_charge(run):
    with run.opened() as forgetful:
        attempt = forgetful.open_attempt(LINEAGE, workers=1)
        try:
            forgetful.bind("step", 0, "0a" * 32)
            run.truth.release(attempt, "step", 0, "sum", STEP)
        except PrivacyError as error:
            run.refused.append(error)


HISTORIES = [
    unbroken,
    crash_after_the_charge,
    crash_after_the_bind,
    crash_after_the_release,
    many_crashes,
    a_repeated_step_ends_in_another_sum,
    a_repeated_step_ends_in_three_sums,
    another_sum_was_bound_but_not_released,
    changed_data,
    a_lost_key,
    another_layout_and_back,
    a_fresh_attempt_with_other_sums,
    statistics_with_another_sum,
    a_torn_charge,
    a_torn_bind,
    a_bind_that_lacks_its_end_of_line,
    the_budget_is_reached,
    a_rollback,
    a_fork,
    a_fork_while_both_run,
    going_on_after_the_seal,
    a_trainer_that_forgets_to_charge,
]
REFUSED = {the_budget_is_reached, a_rollback, a_fork, a_fork_while_both_run}
REFUSED |= {going_on_after_the_seal, a_trainer_that_forgets_to_charge}
EXACT = {unbroken, crash_after_the_charge, crash_after_the_bind, crash_after_the_release}
EXACT |= {many_crashes, a_repeated_step_ends_in_three_sums, a_torn_charge, a_torn_bind}


def check(history, folder):
    """Raises: AssertionError if the ledgers account for less than was released, or for more where
    nothing was lost."""
    run = Trainer(folder)
    try:
        history(run)
        reported = read_ledger(run.survivor)
        shares = read_dataset_ledger(run.shared).shares
    except DpldmError as error:
        raise AssertionError(str(error)) from error
    truth, independent = run.truth.events(), read_independently(run.survivor)
    tolerance = 1e-3  # two grids of privacy losses
    assert reported.epsilon >= composed(truth) * (1 - tolerance)
    assert reported.epsilon == pytest.approx(composed(independent), rel=tolerance)
    assert reported.epsilon <= GENESIS["epsilon"]
    assert bool(run.refused) == (history in REFUSED)
    if history in EXACT:
        assert truth == independent
    reserved = Counter()
    for event in shares[0].events:
        reserved[event.noise_multiplier, event.sample_rate] += event.count
    assert all(count <= reserved[kind] for kind, count in independent.items())


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
def test_the_reported_epsilon_is_never_below_what_was_released(history, tmp_path):
    check(history, tmp_path)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 20))]
)
def test_random_histories_are_never_reported_below_what_was_released(seed, tmp_path):
    random_ = random.Random(seed)

    def history(run):
        for _ in range(12):
            first = random_.randrange(4)
            run.start(
                range(first, first + random_.randint(1, 4)),
                crash=random_.choice(
                    [None, *((step, p) for step in range(6) for p in ("charged", "bound"))]
                ),
                sums=random_.choice(["", "", "", "other"]),
                data=random_.choice(["a", "a", "a", "a", "b"]),
            )
        REFUSED.discard(history)
        if run.refused:
            assert all(isinstance(error, BudgetReached) for error in run.refused)
            REFUSED.add(history)

    check(history, tmp_path)


# --- several runs on one data set ---------------------------------------------------------------


def fill_the_budget(folder, *, first, then):
    """Runs one after the other until none is let in; every other one stops early. All settle.

    Raises: AssertionError if all of them together cost more than the budget of the data set.
    """
    spent, lost = Counter(), 0
    for number in range(10):
        path, steps = folder / str(number) / "ledger.jsonl", then if number else first
        path.parent.mkdir()
        request = Request((replace(STEP, count=steps),), 1e-11, "image", "add_or_remove_one")
        reserve = Reservation(folder / "budget.jsonl", request, budget=BUDGET)
        try:
            with PrivacyLedger.open(path, {**GENESIS, "epsilon": 20.0}, reserve=reserve) as run:
                run.open_attempt(LINEAGE, workers=1)
                for step in range(steps // 2 if number % 2 else steps):
                    run.charge(STEP, "step", step)
                run.seal()
        except PrivacyError:
            lost += 1
        spent += read_independently(path) if path.exists() else Counter()
        if lost > 2:
            break
    assert composed(spent) <= BUDGET[0]
    assert lost > 2
    return spent


def go_on_beyond_the_reservation(folder):
    """One run that reserves little and spends until it is stopped, beside one that holds the rest.

    Raises: AssertionError if both together cost more than the budget of the data set.
    """
    spent = Counter()
    for name, reserved, wanted in (("a", 1, 1), ("b", 50, 50), ("a", 1, 60)):
        path = folder / name / "ledger.jsonl"
        path.parent.mkdir(exist_ok=True)
        request = Request((replace(STEP, count=reserved),), 1e-11, "image", "add_or_remove_one")
        reserve = Reservation(folder / "budget.jsonl", request, budget=BUDGET)
        try:
            with PrivacyLedger.open(path, {**GENESIS, "epsilon": 20.0}, reserve=reserve) as run:
                run.open_attempt(LINEAGE, workers=1)
                for step in range(wanted):
                    run.charge(STEP, "step", step)
        except BudgetReached:
            pass
    for name in "ab":
        spent += read_independently(folder / name / "ledger.jsonl")
    assert composed(spent) <= BUDGET[0]
    return spent


def whole_budget():
    return affordable_steps(STEP, spent=(), epsilon=BUDGET[0], delta=DELTA - 1e-11)


def test_runs_that_settle_fill_the_budget_and_never_pass_it(tmp_path):
    spent = fill_the_budget(tmp_path, first=15, then=15)
    assert composed(spent) > 0.5 * BUDGET[0]


def test_a_run_that_spends_on_is_stopped_at_the_budget(tmp_path):
    spent = go_on_beyond_the_reservation(tmp_path)
    assert composed(spent) > 0.5 * BUDGET[0]


def test_a_run_that_is_alone_stays_alone(tmp_path):
    spent = fill_the_budget(tmp_path, first=whole_budget(), then=5)
    assert sum(spent.values()) == whole_budget()


# --- planted bugs -----------------------------------------------------------------------------


def digests_count_as_one(patch):
    patch.setattr(ledger._Charged, "kind", lambda self, digests: ledger._kind_of(self.event))


def digests_count_as_so_many_steps(patch):
    def repriced(counts, charged):
        kind = ledger._kind_of(charged.event)
        return {**counts, kind: counts[kind] + charged.event.count}

    patch.setattr(ledger, "_repriced", repriced)


def a_replay_is_charged_again(patch):
    charge = PrivacyLedger.charge

    def again(self, event, what, step=None):
        self._book.here.pop((what, step), None)
        return charge(self, event, what, step)

    patch.setattr(PrivacyLedger, "charge", again)
    patch.setattr(ledger._Charges, "_fault_of_charge", lambda self, body: "")


def a_start_forgets_what_was_charged(patch):
    def forgetful(event, *, spent, **budget):
        return affordable_steps(event, spent=(), **budget)

    patch.setattr(ledger, "affordable_steps", forgetful)


def other_data_go_on_with_the_old_coins(patch):
    """The nonce of a new attempt is that of the one before."""
    patch.setattr(ledger.secrets, "token_hex", lambda n: "0a" * n)


def a_bind_needs_no_charge(patch):
    patch.setattr(PrivacyLedger, "bind", lambda self, what, step, digest: 1)


def a_seal_seals_nothing(patch):
    patch.setattr(ledger._Charges, "sealed", property(lambda self: False, lambda self, value: None))


def a_repair_cuts_a_whole_line_too(patch):
    read_all = chain._read_all

    def cut_more(descriptor, path, noun):
        content = read_all(descriptor, path, noun)
        whole, _, torn = content.rpartition(b"\n")
        if path.name != "ledger.jsonl" or not torn:
            return content
        shorter = whole[: whole.rindex(b"\n") + 1]
        path.write_bytes(shorter)
        return shorter

    patch.setattr(chain, "_read_all", cut_more)


def a_start_leaves_no_trace(patch):
    """Two copies that start have equal heads: neither is told from the other."""
    token_hex = ledger.secrets.token_hex
    patch.setattr(ledger.secrets, "token_hex", lambda n: "0a" * n if n == 8 else token_hex(n))


def heads_are_not_looked_at(patch):
    patch.setattr(dataset_ledger, "_refuse_other_life", lambda path, share, run: None)


def more_is_not_reserved(patch):
    patch.setattr(Reservation, "cover", lambda self, run, events: None)


def settled_runs_are_forgotten(patch):
    left = dataset_ledger._left

    def forgetful(terms, shares, *, rounding=1e-9):
        return left(terms, [share for share in shares if not share.settled], rounding=rounding)

    patch.setattr(dataset_ledger, "_left", forgetful)


def reservations_are_forgotten(patch):
    left = dataset_ledger._left

    def forgetful(terms, shares, *, rounding=1e-9):
        return left(terms, [share for share in shares if share.settled], rounding=rounding)

    patch.setattr(dataset_ledger, "_left", forgetful)


def nothing_is_spent_when_a_run_settles(patch):
    patch.setattr(dataset_ledger, "_as_lists", lambda events: [[1e4, 1.0, 1]])


def others_join_a_run_that_was_alone(patch):
    patch.setattr(dataset_ledger, "_occupied", lambda others: "")
    patch.setattr(dataset_ledger._Shares, "_fault_of_reserve", lambda *_: "")
    left = dataset_ledger._left
    patch.setattr(
        dataset_ledger,
        "_left",
        lambda terms, shares, *, rounding=1e-9: left(
            terms, [replace(s, alone=False) for s in shares if not s.alone], rounding=rounding
        ),
    )


PLANTED = [
    (digests_count_as_one, a_repeated_step_ends_in_another_sum),
    (digests_count_as_one, statistics_with_another_sum),
    (digests_count_as_so_many_steps, a_repeated_step_ends_in_three_sums),
    (a_replay_is_charged_again, crash_after_the_release),
    (a_start_forgets_what_was_charged, the_budget_is_reached),
    (other_data_go_on_with_the_old_coins, changed_data),
    (a_bind_needs_no_charge, a_trainer_that_forgets_to_charge),
    (a_seal_seals_nothing, going_on_after_the_seal),
    (a_repair_cuts_a_whole_line_too, a_torn_charge),
    (a_start_leaves_no_trace, a_fork_while_both_run),
    (heads_are_not_looked_at, a_rollback),
    (heads_are_not_looked_at, a_fork_while_both_run),
    (more_is_not_reserved, crash_after_the_charge),
]


@pytest.mark.parametrize(
    ("bug", "history"), PLANTED, ids=lambda function: getattr(function, "__name__", "")
)
def test_a_planted_bug_is_found(bug, history, tmp_path, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check(history, tmp_path)


def many_small_runs(folder):
    fill_the_budget(folder, first=15, then=15)


def one_run_and_then_others(folder):
    fill_the_budget(folder, first=whole_budget(), then=5)


@pytest.mark.parametrize(
    ("bug", "course"),
    [
        (settled_runs_are_forgotten, many_small_runs),
        (nothing_is_spent_when_a_run_settles, many_small_runs),
        (others_join_a_run_that_was_alone, one_run_and_then_others),
        (reservations_are_forgotten, go_on_beyond_the_reservation),
        (more_is_not_reserved, go_on_beyond_the_reservation),
    ],
    ids=lambda function: function.__name__,
)
def test_a_planted_bug_of_the_budget_is_found(bug, course, tmp_path, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        course(tmp_path)
