"""The durable record of everything a run may have released, and so of its epsilon.

One line per entry (the file is a chain, see ``chain.py``), of these kinds:

    genesis     format, run_id, plan (public numbers fixed for the run), digest of the plan
    attempt     attempt (from 1), nonce: a lineage of coins and noise; lineage: what it hangs on
    start       attempt, workers, token: a process began to work on the attempt
    charge      noise_multiplier, sample_rate, count, what ("step" or "statistics"), step, attempt
    bind        what, step, attempt, digest: the keyed digest of a finished sum, before its noise
    checkpoint  step: weights after this many steps are about to be saved
    repair      cut_bytes, completed: what a crash in the middle of a write had left behind
    seal        nothing is ever charged again

A charge is durable before any gradient of its step, a bind before the noise that it pays for. The
noise is a function of the attempt, the step and the digest. So a step that is run again and ends in
the same sum is the same release: it costs nothing. Its k different sums are k releases under *one*
set of coins: together they cost what one release with the noise multiplier divided by sqrt(k)
costs, which is more than k charges. The chain cannot show that lines are missing at its end: so
checkpoints and reports carry a head, and the data-set ledger notes one at every start.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from dpldm_dist import errors
from dpldm_dist.errors import BudgetReached, DpldmError, PrivacyError, RunError
from dpldm_dist.privacy.accounting import (
    LARGEST_COUNT,
    GaussianEvent,
    affordable_steps,
    epsilon,
)
from dpldm_dist.privacy.chain import (
    REPAIR_FIELDS,
    ChainFile,
    Head,
    as_json,
    canonical,
    contains,
    is_a,
    is_hex,
    read_chain,
)
from dpldm_dist.privacy.collective import Collective

FORMAT = 2
PURPOSES = ("step", "statistics")
NONCE_BYTES = 32
_DIGEST_DIGITS = 64
_TOKEN_DIGITS = 16

Kind = tuple[float, float]  # noise multiplier and sample rate


@dataclass(frozen=True)
class Attempt:
    """A lineage of coins and noise. ``nonce``: what its keys are made from, never shown.

    ``replays``: an earlier start worked on it, so repeated steps may be the same releases again.
    """

    number: int
    nonce: bytes = field(repr=False)
    replays: bool


@dataclass(frozen=True)
class LedgerSummary:
    """What a ledger file says, verified line by line.

    ``epsilon``: spent so far at ``delta``, infinity for a run without a privacy claim. ``delta``:
    of the whole claim; ``overflow_delta`` of it is not available to the composition. ``budget``:
    the epsilon that is never passed. ``steps``, ``statistics``: releases charged, of all attempts.
    ``binds``: finished sums; ``rebound``: charges with more than one of them. ``starts``: how often
    a process began. ``torn_bytes``: left by a crash in the middle of a write, never acknowledged.
    """

    run_id: str
    plan: dict[str, Any]
    claim: bool
    budget: float
    delta: float
    overflow_delta: float
    events: tuple[GaussianEvent, ...]
    epsilon: float
    steps: int
    statistics: int
    attempts: int
    starts: int
    binds: int
    rebound: int
    checkpoints: int
    repairs: int
    sealed: bool
    head: Head
    torn_bytes: int
    hashes: tuple[str, ...] = field(repr=False)

    def contains(self, head: Sequence[Any]) -> bool:
        """Whether the chain goes through ``head``: False for another ledger, or one cut before."""
        return contains(self.hashes, head)


class Reserve(Protocol):
    """Who must agree before a run spends: the budget that it shares with other runs."""

    def prepare(self) -> str:
        """A name for that budget, which the genesis of the run then carries."""

    def admit(self, run: PrivacyLedger) -> None:
        """Set aside what the run may spend. Raises: PrivacyError if it may not, or was rolled back
        or copied."""

    def note_start(self, run: PrivacyLedger) -> None:
        """Note the head of a run that starts. Raises: PrivacyError as ``admit``."""

    def cover(self, run: PrivacyLedger, events: Sequence[GaussianEvent]) -> None:
        """Make sure that ``events``, all that the run will then have spent, are set aside.

        Raises: PrivacyError, and the run must not spend them.
        """

    def check(self, run: PrivacyLedger) -> None:
        """Raises: PrivacyError if another copy of the run went on since it started."""

    def settle(self, run: PrivacyLedger) -> None:
        """Give back what the finished run did not spend."""


class PrivacyLedger:
    """The one writer of a ledger file. Make it with :meth:`open`; it holds a lock until closed.

    Formal guarantees: when :meth:`charge` or :meth:`bind` returns, its entry survives a crash of
    the process or the machine (as far as the disk honours fsync). The charges of the file, each
    priced by the number of its digests, never cost more than the budget of its genesis. When a
    write fails, nothing of it counts and nothing is acknowledged.
    """

    def __init__(self, file: ChainFile, book: _Charges, reserve: Reserve | None):
        self._file = file
        self._book = book
        self._reserve = reserve
        self._attempt: int | None = None
        self._affordable: dict[Kind, tuple[int, int]] = {}  # how many, and at most asked for
        self._spent: float | None = None

    @classmethod
    def open(
        cls, path: Path | str, genesis: dict[str, Any], *, reserve: Reserve | None = None
    ) -> PrivacyLedger:
        """Create the ledger for ``genesis``, or open the one that was created for the same.

        genesis: plain JSON values, among them ``epsilon`` and ``delta``, the budget;
        ``overflow_delta``, if there, is the part of delta that pays for something else; ``claim``
        False marks a run without a privacy claim, whose ``spent()`` is infinite.
        reserve: asked before anything is spent, if the run shares a budget with others; the genesis
        then names it as ``dataset_ledger``.
        A line torn by a crash, never acknowledged, is cut off, and the repair recorded.
        Raises: RunError if another process holds it, it was opened for another genesis, or it
        cannot be written; PrivacyError if it is damaged or readable by others.
        """
        if reserve is not None:
            genesis = {**genesis, "dataset_ledger": reserve.prepare()}
        path, plan, book = Path(path), _checked_plan(genesis), _Charges()
        file = ChainFile.open(path, book)
        try:
            if file.chain.hashes:
                _refuse_other_plan(path, book.plan, plan)
            digest = hashlib.sha256(canonical(plan)).hexdigest()
            run_id = secrets.token_hex(16)
            file.mend({"format": FORMAT, "run_id": run_id, "plan": plan, "digest": digest})
            ledger = cls(file, book, reserve)
            if reserve is not None:
                reserve.admit(ledger)
            return ledger
        except BaseException:
            file.close()
            raise

    def open_attempt(self, lineage: Mapping[str, str], *, workers: int) -> Attempt:
        """Begin to work, on the last attempt if its lineage is the same, else on a new one.

        lineage: texts without anything private that fix what coins, draws and sums hang on: key,
        data, layout of microbatches, arithmetic. workers: how many start; only recorded.
        Within an attempt a step that ends in the same sum is the same release. A new attempt has
        fresh coins *and* fresh noise: its steps are new releases, and are charged again. Whatever
        earlier attempts may have released stays charged.
        Raises: RunError if the ledger is sealed or cannot be written; PrivacyError if the reserve
        knows of another life of this ledger.
        """
        lineage = _checked_lineage(lineage)
        book = self._book
        replays = book.attempts > 0 and book.lineage == lineage
        if not replays:
            number, nonce = book.attempts + 1, secrets.token_hex(NONCE_BYTES)
            self._append("attempt", attempt=number, nonce=nonce, lineage=lineage)
        token = secrets.token_hex(_TOKEN_DIGITS // 2)  # two lives of one file differ from here on
        self._append("start", attempt=book.attempts, workers=workers, token=token)
        if self._reserve is not None:
            self._reserve.note_start(self)
        self._attempt = book.attempts
        return Attempt(book.attempts, bytes.fromhex(book.nonce), replays)

    def charge(self, event: GaussianEvent, what: str, step: int | None = None) -> bool:
        """Record, durably, that ``event`` is about to be released. Call it before the release.

        step: its number from 0; None means 0 for "statistics". False, and nothing is written, if
        this attempt charged this step before.
        Raises: BudgetReached, and nothing is written, if all charges with this one would cost more
        than the budget; PrivacyError if the step was charged as another event; RunError if it could
        not be written, or no attempt is open.
        """
        self._file.refuse_to_write("charge")
        self._require_attempt("charge")
        place = what, _checked_place(what, step)
        if event.count < 1:
            raise PrivacyError(f"A charge for {event.count} releases: expected at least 1.")
        before = self._book.here.get(place)
        if before is not None:
            if before.event != event:
                raise PrivacyError(
                    f"{what} {place[1]} was charged as {_named(before.event)}, now it is "
                    f"{_named(event)}: an attempt has one price per step. This is a bug."
                )
            return False
        if not self.affords(event):
            raise BudgetReached(
                f"The budget is reached: one more {what} would bring epsilon above "
                f"{self._book.budget} at delta {self._book.delta}. Nothing was released for it."
            )
        self._cover([*self.events(), event])
        self._append("charge", what=what, step=place[1], attempt=self._attempt, **asdict(event))
        kind = _kind_of(event)
        # one more of the same kind leaves the number that was affordable in all unchanged
        many, most = self._affordable[kind]
        self._affordable = {kind: (many - event.count, most - event.count)}
        self._spent = None
        return True

    def bind(self, what: str, step: int | None, digest: str) -> int:
        """Record, durably, the keyed digest of a finished sum. Call it before its noise is made.

        digest: 64 hexadecimal digits. Nothing is written if this attempt bound it to this step
        before: then the release is the same. Returns k, how many digests the step has: k of them
        cost what one release with the noise multiplier divided by sqrt(k) costs.
        Raises: BudgetReached, and nothing is written, if a further digest would cost more than the
        budget; PrivacyError if the step was not charged in this attempt; RunError if it could not
        be written.
        """
        self._file.refuse_to_write("bind")
        self._require_attempt("bind")
        place = what, _checked_place(what, step)
        if not is_hex(digest, _DIGEST_DIGITS):
            raise PrivacyError(f"A digest must be {_DIGEST_DIGITS} hexadecimal digits.")
        charged = self._book.here.get(place)
        if charged is None:
            raise PrivacyError(
                f"{what} {place[1]} is bound before it was charged in this attempt. This is a bug."
            )
        if digest in charged.digests:
            return len(charged.digests)
        if charged.digests:
            events = self._book.events_after_another_digest(charged)
            if epsilon(events, self._book.accounting_delta) > self._book.budget:
                raise BudgetReached(
                    f"The budget is reached: {what} {place[1]} ended in another sum than before, "
                    f"and a further release of it would bring epsilon above {self._book.budget} at "
                    f"delta {self._book.delta}. Nothing was released for it."
                )
            self._cover(events)
            self._affordable, self._spent = {}, None
        self._append("bind", what=what, step=place[1], attempt=self._attempt, digest=digest)
        return len(charged.digests)

    def affords(self, event: GaussianEvent) -> bool:
        """Whether the budget pays for ``event`` (its count of releases) on top of all charges."""
        known, _ = self._affordable.get(_kind_of(event), (0, 0))
        return known >= event.count or self.affordable_steps(event) >= event.count

    def affordable_steps(self, event: GaussianEvent, *, most: int = LARGEST_COUNT) -> int:
        """How many more releases of ``event``, its count aside, the budget pays for, at most
        ``most``."""
        kind = _kind_of(event)
        many, asked = self._affordable.get(kind, (0, 0))
        if many == asked < most:  # it may pay for more than was asked
            many = affordable_steps(
                replace(event, count=1),
                spent=self._book.events,
                epsilon=self._book.budget,
                delta=self._book.accounting_delta,
                most=most,
            )
            self._affordable[kind] = (many, most)
        return min(many, most)

    def spent(self) -> float:
        """Epsilon of all charges of all attempts; infinity for a run without a privacy claim."""
        if self._spent is None:
            self._spent = self._book.spent()
        return self._spent

    def note_checkpoint(self, step: int) -> Head:
        """Record that weights after ``step`` steps are saved; the head for them to carry."""
        if self._reserve is not None:
            self._reserve.check(self)
        self._append("checkpoint", step=step)
        return self.head

    def contains(self, head: Sequence[Any]) -> bool:
        """Whether this chain goes through ``head``: False for another ledger, or one cut before."""
        return self._file.chain.contains(head)

    @property
    def head(self) -> Head:
        return self._file.chain.head

    @property
    def run_id(self) -> str:
        return self._book.run_id

    @property
    def claim(self) -> bool:
        """Whether the run may state an epsilon."""
        return self._book.claim

    @property
    def replayable_until(self) -> int:
        """First step that the current attempt has not bound, counted on from its first step."""
        return self._book.replayable_until

    @property
    def lineage(self) -> dict[str, str]:
        """That of the last attempt; empty before the first."""
        return dict(self._book.lineage)

    def paid_steps(self, since: int) -> int:
        """How many steps of the current attempt, from number ``since`` on, are charged already."""
        return sum(what == "step" and step >= since for what, step in self._book.here)

    def events(self) -> tuple[GaussianEvent, ...]:
        """All charges, one event per distinct sample rate and noise over sqrt(digests)."""
        return self._book.events

    def seal(self) -> Head:
        """Record that the run is finished: nothing is charged any more. Twice is fine."""
        if self._reserve is not None:
            self._reserve.check(self)
        if not self._book.sealed:
            self._append("seal")
        if self._reserve is not None:
            self._reserve.settle(self)
        return self.head

    def close(self) -> None:
        """Give the lock back. Closing twice is fine."""
        self._file.close()

    def __enter__(self) -> PrivacyLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cover(self, events: Sequence[GaussianEvent]) -> None:
        if self._reserve is not None:
            self._reserve.cover(self, events)

    def _append(self, kind: str, **fields: Any) -> None:
        self._file.append({"kind": kind, **fields})

    def _require_attempt(self, kind: str) -> None:
        if self._attempt is None:
            raise RunError(f"A {kind} without an attempt: call open_attempt first. This is a bug.")


class SharedLedger:
    """A ledger that all workers of a run share: worker 0 acts, every worker learns the outcome.

    Every worker calls every method, in the same order. An error of worker 0 is raised on all of
    them, as the same class with the same message, so that all stop at the same point.
    """

    def __init__(self, ledger: PrivacyLedger | None, collective: Collective):
        self._ledger = ledger
        self._collective = collective

    @classmethod
    def open(
        cls,
        path: Path | str,
        genesis: dict[str, Any],
        *,
        collective: Collective,
        reserve: Reserve | None = None,
    ) -> SharedLedger:
        """:meth:`PrivacyLedger.open` on worker 0. What other workers give is not looked at."""
        shared = cls(None, collective)
        opened: list[PrivacyLedger] = []
        shared._on_worker_0(
            lambda: opened.append(PrivacyLedger.open(path, genesis, reserve=reserve))
        )
        return cls(opened[0] if opened else None, collective)

    def open_attempt(self, lineage: Mapping[str, str], *, workers: int) -> Attempt:
        """:meth:`PrivacyLedger.open_attempt`: the same on every worker; worker 0's lineage."""

        def action() -> dict[str, Any]:
            attempt = self._here.open_attempt(lineage, workers=workers)
            return {**asdict(attempt), "nonce": attempt.nonce.hex()}

        found = self._on_worker_0(action)
        return Attempt(**{**found, "nonce": bytes.fromhex(found["nonce"])})

    def charge(self, event: GaussianEvent, what: str, step: int | None = None) -> bool:
        """:meth:`PrivacyLedger.charge`: durable before it returns on any worker."""
        return self._on_worker_0(lambda: self._here.charge(event, what, step))

    def bind(self, what: str, step: int | None, digest: str) -> int:
        """:meth:`PrivacyLedger.bind`: durable before it returns on any worker.

        Raises: RunError on every worker, and nothing is written, if the workers give different
        digests: then their finished sums differ.
        """
        if not self._collective.all_equal(digest.encode()):
            raise RunError(
                f"The finished sums of {what} {step} differ between workers: expected the same "
                "bits on all of them. Nothing was released for it. Check the network and the "
                "memory of the machines with `dpldm check`, and start again."
            )
        return self._on_worker_0(lambda: self._here.bind(what, step, digest))

    def affords(self, event: GaussianEvent) -> bool:
        return self._on_worker_0(lambda: self._here.affords(event))

    def affordable_steps(self, event: GaussianEvent, *, most: int = LARGEST_COUNT) -> int:
        return self._on_worker_0(lambda: self._here.affordable_steps(event, most=most))

    def spent(self) -> float:
        spent = self._on_worker_0(
            lambda: _finite_or_none(self._here.spent())
        )  # JSON has no infinity
        return math.inf if spent is None else spent

    def note_checkpoint(self, step: int) -> Head:
        return _as_head(self._on_worker_0(lambda: self._here.note_checkpoint(step)))

    def contains(self, head: Sequence[Any]) -> bool:
        return self._on_worker_0(lambda: self._here.contains(head))

    @property
    def head(self) -> Head:
        return _as_head(self._on_worker_0(lambda: self._here.head))

    @property
    def replayable_until(self) -> int:
        return self._on_worker_0(lambda: self._here.replayable_until)

    @property
    def lineage(self) -> dict[str, str]:
        """:attr:`PrivacyLedger.lineage`, on every worker."""
        return self._on_worker_0(lambda: self._here.lineage)

    def paid_steps(self, since: int) -> int:
        """:meth:`PrivacyLedger.paid_steps`."""
        return self._on_worker_0(lambda: self._here.paid_steps(since))

    def events(self) -> tuple[GaussianEvent, ...]:
        events = self._on_worker_0(lambda: [asdict(event) for event in self._here.events()])
        return tuple(GaussianEvent(**event) for event in events)

    def seal(self) -> Head:
        return _as_head(self._on_worker_0(lambda: self._here.seal()))

    def close(self) -> None:
        """Give the lock back; no worker needs to wait for it."""
        if self._ledger is not None:
            self._ledger.close()

    @property
    def _here(self) -> PrivacyLedger:
        assert self._ledger is not None, "only worker 0 has the ledger"
        return self._ledger

    def _on_worker_0(self, action: Callable[[], Any]) -> Any:
        outcome: dict[str, Any] = {}
        failure: Exception | None = None
        if self._collective.rank == 0:
            try:
                outcome = {"value": action()}
            except Exception as error:
                failure = error
                known = isinstance(error, DpldmError)  # what others say could hold anything
                outcome = {
                    "error": type(error).__name__,
                    "message": str(error) if known else "a bug",
                }
        outcome = self._collective.broadcast_json(outcome)
        if failure is not None:
            raise failure
        if "error" in outcome:
            raise _error_class(outcome["error"])(outcome["message"])
        return outcome["value"]


def read_ledger(path: Path | str) -> LedgerSummary:
    """Verify a ledger line by line and compute its epsilon from the file alone. Changes nothing.

    Raises: RunError if it cannot be read, PrivacyError naming the line if it is damaged.
    """
    book = _Charges()
    chain = read_chain(Path(path), book)
    return LedgerSummary(
        run_id=book.run_id,
        plan=book.plan,
        claim=book.claim,
        budget=book.budget,
        delta=book.delta,
        overflow_delta=book.delta - book.accounting_delta,
        events=book.events,
        epsilon=book.spent(),
        steps=book.releases["step"],
        statistics=book.releases["statistics"],
        attempts=book.attempts,
        starts=book.starts,
        binds=book.binds,
        rebound=book.rebound,
        checkpoints=book.checkpoints,
        repairs=book.repairs,
        sealed=book.sealed,
        head=chain.head,
        torn_bytes=chain.torn_bytes,
        hashes=tuple(chain.hashes),
    )


@dataclass(slots=True)
class _Charged:
    """A charge of the current attempt, and the digests that were bound to it. Small: a long run
    holds one for every step."""

    event: GaussianEvent
    digests: tuple[str, ...] = ()

    def kind(self, digests: int) -> Kind:
        """What each of its releases is priced as, with so many digests."""
        sigma, rate = _kind_of(self.event)
        return sigma / math.sqrt(max(1, digests)), rate


@dataclass
class _Charges:
    """What the entries of a ledger mean."""

    noun = "Ledger"
    remedy = "Epsilon cannot be known from it: restore the file from a copy, or use a new run.dir."
    fields = {  # noqa: RUF012 - never changed
        "genesis": {"format": int, "run_id": str, "plan": dict, "digest": str},
        "attempt": {"attempt": int, "nonce": str, "lineage": dict},
        "start": {"attempt": int, "workers": int, "token": str},
        "charge": {
            "noise_multiplier": float,
            "sample_rate": float,
            "count": int,
            "what": str,
            "step": int,
            "attempt": int,
        },
        "bind": {"what": str, "step": int, "attempt": int, "digest": str},
        "checkpoint": {"step": int},
        "repair": REPAIR_FIELDS,
        "seal": {},
    }

    run_id: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    counts: dict[Kind, int] = field(default_factory=dict)
    releases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PURPOSES, 0))
    attempts: int = 0
    nonce: str = ""
    lineage: dict[str, str] = field(default_factory=dict)
    here: dict[tuple[str, int], _Charged] = field(default_factory=dict)  # of the last attempt
    replayable_until: int = 0
    starts: int = 0
    binds: int = 0
    rebound: int = 0
    checkpoints: int = 0
    repairs: int = 0
    sealed: bool = False

    @property
    def budget(self) -> float:
        return float(self.plan["epsilon"])

    @property
    def delta(self) -> float:
        return float(self.plan["delta"])

    @property
    def accounting_delta(self) -> float:
        return self.delta - float(self.plan.get("overflow_delta", 0.0))

    @property
    def claim(self) -> bool:
        return self.plan.get("claim", True)

    @property
    def events(self) -> tuple[GaussianEvent, ...]:
        return _as_events(self.counts)

    def spent(self) -> float:
        return epsilon(self.events, self.accounting_delta) if self.claim else math.inf

    def events_after_another_digest(self, charged: _Charged) -> tuple[GaussianEvent, ...]:
        """All events, once ``charged`` has one digest more (its first changes no price)."""
        if not charged.digests:
            return self.events
        return _as_events(_repriced(self.counts, charged))

    def take(self, body: dict[str, Any]) -> None:
        match body["kind"]:
            case "genesis":
                self.run_id, self.plan = body["run_id"], body["plan"]
            case "attempt":
                self.attempts, self.nonce = body["attempt"], body["nonce"]
                self.lineage, self.here, self.replayable_until = body["lineage"], {}, 0
            case "start":
                self.starts += 1
            case "charge":
                event = _event(body["noise_multiplier"], body["sample_rate"], body["count"])
                self.here[sys.intern(body["what"]), body["step"]] = _Charged(event)
                self.counts[_kind_of(event)] = self.counts.get(_kind_of(event), 0) + event.count
                self.releases[body["what"]] += event.count
            case "bind":
                self._take_digest(body)
            case "checkpoint":
                self.checkpoints += 1
            case "repair":
                self.repairs += 1
            case "seal":
                self.sealed = True

    def fault_of(self, body: dict[str, Any]) -> str:
        kind = body["kind"]
        if kind == "genesis":
            return _fault_of_genesis(body)
        if kind == "attempt":
            return self._fault_of_attempt(body)
        if "attempt" in body and (body["attempt"] != self.attempts or not self.attempts):
            return f"is a {kind} of attempt {body['attempt']}, expected {self.attempts or 'none'}"
        if kind == "start" and (body["workers"] < 1 or not is_hex(body["token"], _TOKEN_DIGITS)):
            return "is a start of no worker, or without its token"
        if kind == "charge":
            return self._fault_of_charge(body)
        return self._fault_of_bind(body) if kind == "bind" else ""

    def _take_digest(self, body: dict[str, Any]) -> None:
        what, step = body["what"], body["step"]
        charged = self.here[what, step]
        self.binds += 1
        if charged.digests:
            self.counts = _repriced(self.counts, charged)
            self.rebound += len(charged.digests) == 1
        charged.digests += (body["digest"],)
        if what == "step":
            self._advance(step)

    def _advance(self, step: int) -> None:
        """Move ``replayable_until`` behind ``step`` and what is bound after it without a gap."""
        if self.replayable_until not in (0, step):
            return
        step += 1
        while ("step", step) in self.here and self.here["step", step].digests:
            step += 1
        self.replayable_until = step

    def _fault_of_attempt(self, body: dict[str, Any]) -> str:
        if body["attempt"] != self.attempts + 1:
            return f"opens attempt {body['attempt']}, expected {self.attempts + 1}"
        if not is_hex(body["nonce"], 2 * NONCE_BYTES):
            return "opens an attempt without its nonce"
        if not all(isinstance(text, str) for text in body["lineage"].values()):
            return "opens an attempt whose lineage is not made of texts"
        return ""

    def _fault_of_charge(self, body: dict[str, Any]) -> str:
        if body["what"] not in PURPOSES or body["step"] < 0:
            return "charges something unknown"
        if (body["what"], body["step"]) in self.here:
            return "charges what its attempt has charged before"
        kind = (body["noise_multiplier"], body["sample_rate"])
        try:
            GaussianEvent(*kind, count=body["count"] + self.counts.get(kind, 0))
        except PrivacyError:
            return "charges numbers out of range"
        return "" if body["count"] >= 1 else "charges nothing"

    def _fault_of_bind(self, body: dict[str, Any]) -> str:
        charged = self.here.get((body["what"], body["step"]))
        if charged is None:
            return "binds what its attempt has not charged"
        if not is_hex(body["digest"], _DIGEST_DIGITS):
            return "binds something that is no digest"
        if body["digest"] in charged.digests:
            return "binds a digest for the second time"
        try:
            self.events_after_another_digest(charged)
        except PrivacyError:
            return "binds more digests than can be priced"
        return ""


@functools.lru_cache(maxsize=64)
def _event(noise_multiplier: float, sample_rate: float, count: int) -> GaussianEvent:
    """One object for all charges that are the same."""
    return GaussianEvent(noise_multiplier, sample_rate, count)


def _repriced(counts: dict[Kind, int], charged: _Charged) -> dict[Kind, int]:
    """``counts``, once ``charged`` has one digest more. Two digests: noise over sqrt(2), ..."""
    digests = len(charged.digests)
    before, after = charged.kind(digests), charged.kind(digests + 1)
    counts = dict(counts)
    counts[before] -= charged.event.count
    counts[after] = counts.get(after, 0) + charged.event.count
    return {kind: count for kind, count in counts.items() if count}


def _as_events(counts: dict[Kind, int]) -> tuple[GaussianEvent, ...]:
    return tuple(GaussianEvent(*kind, count=count) for kind, count in counts.items())


def _fault_of_genesis(body: dict[str, Any]) -> str:
    if body["format"] != FORMAT:
        return f"has format {body['format']}, this version reads {FORMAT}"
    if body["digest"] != hashlib.sha256(canonical(body["plan"])).hexdigest():
        return "has a plan that does not match its digest"
    try:
        _checked_plan(body["plan"])
    except PrivacyError as error:
        return f"has a plan that cannot be: {error}"
    return ""


def _checked_plan(genesis: dict[str, Any]) -> dict[str, Any]:
    """``genesis`` as JSON gives it back. Raises: PrivacyError if its budget or claim is none."""
    plan = as_json(genesis, "A genesis")
    missing = [name for name in ("epsilon", "delta") if name not in plan]
    if missing:
        raise PrivacyError(f"A genesis without {missing[0]}: expected the budget (epsilon, delta).")
    for name in ("epsilon", "delta", "overflow_delta"):
        value = plan.get(name, 0.0)
        if not is_a(value, (int, float)):
            raise PrivacyError(f"genesis {name} = {value!r}: expected a number.")
    if not plan["epsilon"] > 0:
        raise PrivacyError(f"genesis epsilon = {plan['epsilon']}: expected more than 0.")
    if not 0 <= plan.get("overflow_delta", 0.0) < plan["delta"] < 1:
        raise PrivacyError(f"genesis delta = {plan['delta']}: expected in (overflow_delta, 1).")
    if not isinstance(plan.get("claim", True), bool):
        raise PrivacyError(f"genesis claim = {plan['claim']!r}: expected true or false.")
    return plan


def _checked_lineage(lineage: Mapping[str, str]) -> dict[str, str]:
    if not all(isinstance(text, str) for item in lineage.items() for text in item):
        raise PrivacyError("The lineage of an attempt must be made of texts. This is a bug.")
    return dict(lineage)


def _checked_place(what: str, step: int | None) -> int:
    """The number under which ``what`` is charged. Raises: PrivacyError."""
    if what not in PURPOSES:
        raise PrivacyError(f"A charge for {what!r}: expected one of {', '.join(PURPOSES)}.")
    if step is None and what == "statistics":
        return 0
    if not is_a(step, int) or not 0 <= step <= LARGEST_COUNT:
        raise PrivacyError(f"A charge for {what} {step!r}: expected its number from 0.")
    return step


def _refuse_other_plan(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in [*new, *(name for name in old if name not in new)]:
        before, now = old.get(name), new.get(name)
        if before != now:
            raise RunError(
                f"Ledger in {path.parent} was opened for {name}={_short(before)}, this config says "
                f"{_short(now)}: use a new run.dir or restore the config."
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _named(event: GaussianEvent) -> str:
    return f"{event.count} x (sigma {event.noise_multiplier}, q {event.sample_rate})"


def _kind_of(event: GaussianEvent) -> Kind:
    return event.noise_multiplier, event.sample_rate


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _as_head(value: Sequence[Any]) -> Head:
    return int(value[0]), str(value[1])


def _error_class(name: str) -> type[DpldmError]:
    """The class of errors.py of that name; an unforeseen error of worker 0 becomes a DpldmError."""
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, DpldmError) else DpldmError
