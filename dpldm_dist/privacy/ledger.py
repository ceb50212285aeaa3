"""The durable record of everything a run may have released, and so of its epsilon.

One line of canonical JSON per entry, ``{"body": {...}, "hash": sha256(previous hash + body)}``.
The body has ``seq`` (the number of the line from 0) and ``kind``:

    genesis     format, run_id, plan (public numbers fixed for the run), digest of the plan
    attempt     attempt (from 1): a lineage of random keys
    charge      noise_multiplier, sample_rate, count, what ("step" or "statistics"), step, attempt
    checkpoint  step: weights after this many steps are about to be saved
    repair      cut_bytes, completed: what a crash in the middle of a write had left behind
    seal        nothing is ever charged again

A line is durable (write, fsync) before the release that it pays for is made. One process writes: it
holds a lock, and appends only if the file is as it left it. The chain shows every edit; that whole
lines are missing at the end only a head noted elsewhere can show, so checkpoints and reports carry
one. Whoever may write the file can forge a consistent chain: the ledger guards against
accidents, not against its owner.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dpldm_dist import errors
from dpldm_dist.errors import DpldmError, PrivacyError, RunError
from dpldm_dist.privacy.accounting import GaussianEvent, affordable_steps, epsilon
from dpldm_dist.privacy.collective import Collective

FORMAT = 1
PURPOSES = ("step", "statistics")
Head = tuple[int, str]  # number of an entry, and its hash: names the chain up to it

_MOST_BYTES = 1 << 30
_START = b'{"body":{'
_LONGEST_ENTRY, _LONGEST_GENESIS = (
    1 << 10,
    1 << 16,
)  # bytes; a longer torn end is more than one entry
_FIELDS = {  # kind -> field -> type; bool is no int here
    "genesis": {"format": int, "run_id": str, "plan": dict, "digest": str},
    "attempt": {"attempt": int},
    "charge": {
        "noise_multiplier": float,
        "sample_rate": float,
        "count": int,
        "what": str,
        "step": (int, type(None)),
        "attempt": int,
    },
    "checkpoint": {"step": int},
    "repair": {"cut_bytes": int, "completed": bool},
    "seal": {},
}


@dataclass(frozen=True)
class LedgerSummary:
    """What a ledger file says, verified line by line.

    ``epsilon``: spent so far at ``delta``, infinity for a run without a privacy claim. ``delta``:
    of the whole claim; ``overflow_delta`` of it is not available to the composition. ``budget``:
    the epsilon that is never passed. ``steps``, ``statistics``: releases charged, of all attempts.
    ``torn_bytes``: left by a crash in the middle of a write, never acknowledged.
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
    checkpoints: int
    repairs: int
    sealed: bool
    head: Head
    torn_bytes: int


class PrivacyLedger:
    """The one writer of a ledger file. Make it with :meth:`open`; it holds a lock until closed.

    Formal guarantees: when :meth:`charge` returns, the charge survives a crash of the process or
    the machine (as far as the disk honours fsync). The charges of the file never cost more than the
    budget of its genesis. When a write fails, nothing of it counts and nothing is acknowledged.
    """

    def __init__(self, path: Path, descriptor: int, chain: _Chain):
        self._path = path
        self._descriptor = descriptor
        self._chain = chain
        self._attempt: int | None = None
        self._broken = False
        self._affordable: dict[tuple[float, float], int] = {}
        self._spent: float | None = None

    @classmethod
    def open(cls, path: Path | str, genesis: dict[str, Any]) -> PrivacyLedger:
        """Create the ledger for ``genesis``, or open the one that was created for the same.

        genesis: plain JSON values, among them ``epsilon`` and ``delta``, the budget;
        ``overflow_delta``, if there, is the part of delta that pays for something else; ``claim``
        False marks a run without a privacy claim, whose ``spent()`` is infinite.
        A line torn by a crash, never acknowledged, is cut off, and the repair recorded.
        Raises: RunError if another process holds it, it was opened for another genesis, or it
        cannot be written; PrivacyError if it is damaged or readable by others.
        """
        path = Path(path)
        plan = _checked_plan(genesis)
        descriptor = _open_locked(path)
        try:
            content = _read_all(descriptor, path)
            chain = _Chain.read(content, path) if content else _Chain(path)
            ledger = cls(path, descriptor, chain)
            if not chain.hashes:
                ledger._begin(plan, torn_bytes=chain.torn_bytes)
                _sync_folder(path)
            else:
                _refuse_other_plan(path, chain.plan, plan)
                ledger._repair(content)
            return ledger
        except BaseException:
            os.close(descriptor)
            raise

    def open_attempt(self) -> int:
        """What a start or restart does: it opens a new attempt. Returns its number, from 1.

        All randomness is keyed by the attempt, so steps that are run again after a crash have fresh
        coins *and* fresh noise: they are new releases of the same mechanism, and are charged again.
        Whatever an interrupted attempt may have released stays charged. (The same coins with fresh
        noise would cost more than one more step; a restored generator could cancel the noise.)
        Raises: RunError if the ledger is sealed or cannot be written.
        """
        attempt = self._chain.attempts + 1
        self._append({"kind": "attempt", "attempt": attempt})
        self._attempt = attempt
        return attempt

    def charge(self, event: GaussianEvent, what: str, step: int | None = None) -> None:
        """Record, durably, that ``event`` is about to be released. Call it before the release.

        Raises: PrivacyError, and nothing is written, if all charges with this one would cost more
        than the budget; RunError if it could not be written, or no attempt is open.
        """
        self._refuse_to_write("charge")
        if self._attempt is None:
            raise RunError("A charge without an attempt: call open_attempt first. This is a bug.")
        if what not in PURPOSES:
            raise PrivacyError(f"A charge for {what!r}: expected one of {', '.join(PURPOSES)}.")
        if event.count < 1:
            raise PrivacyError(f"A charge for {event.count} releases: expected at least 1.")
        if not self.affords(event):
            raise PrivacyError(
                f"The budget is reached: one more {what} would bring epsilon above "
                f"{self._chain.budget} at delta {self._chain.delta}. Nothing was released for it."
            )
        body = {**asdict(event), "kind": "charge", "what": what, "step": step}
        self._append({**body, "attempt": self._attempt})
        kind = _kind_of(event)
        remaining = self._affordable[kind] - event.count
        # one more of the same kind leaves the number that was affordable in all unchanged
        self._affordable = {kind: remaining}
        self._spent = None

    def affords(self, event: GaussianEvent) -> bool:
        """Whether the budget pays for ``event`` (its count of releases) on top of all charges."""
        return self.affordable_steps(event) >= event.count

    def affordable_steps(self, event: GaussianEvent) -> int:
        """How many more releases of ``event``, its count aside, the budget pays for."""
        kind = _kind_of(event)
        if kind not in self._affordable:
            self._affordable[kind] = affordable_steps(
                replace(event, count=1),
                spent=self._chain.events,
                epsilon=self._chain.budget,
                delta=self._chain.accounting_delta,
            )
        return self._affordable[kind]

    def spent(self) -> float:
        """Epsilon of all charges of all attempts; infinity for a run without a privacy claim."""
        if self._spent is None:
            self._spent = self._chain.spent()
        return self._spent

    def note_checkpoint(self, step: int) -> Head:
        """Record that weights after ``step`` steps are saved; the head for them to carry."""
        self._append({"kind": "checkpoint", "step": step})
        return self.head

    def contains(self, head: Sequence[Any]) -> bool:
        """Whether this chain goes through ``head``: False for another ledger, or one cut before."""
        return self._chain.contains(head)

    @property
    def head(self) -> Head:
        return self._chain.head

    def events(self) -> tuple[GaussianEvent, ...]:
        """All charges, one event per distinct noise multiplier and sample rate."""
        return self._chain.events

    def seal(self) -> Head:
        """Record that the run is finished: nothing is charged any more. Twice is fine."""
        if not self._chain.sealed:
            self._append({"kind": "seal"})
        return self.head

    def close(self) -> None:
        """Give the lock back. Closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> PrivacyLedger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, plan: dict[str, Any], *, torn_bytes: int) -> None:
        """Write the genesis; first cut what a crash left of an earlier try."""
        if torn_bytes:
            self._cut(0)
        self._append(
            {
                "kind": "genesis",
                "format": FORMAT,
                "run_id": secrets.token_hex(16),
                "plan": plan,
                "digest": hashlib.sha256(_canonical(plan)).hexdigest(),
            }
        )
        if torn_bytes:
            self._append({"kind": "repair", "cut_bytes": torn_bytes, "completed": False})

    def _repair(self, content: bytes) -> None:
        """Cut a torn last line; a whole one that only lacks its end of line is kept and ended."""
        chain = self._chain
        if not chain.torn_bytes and not chain.unended:
            return
        if chain.torn_bytes:
            self._cut(len(content) - chain.torn_bytes)
        if chain.unended:
            self._write(b"\n", size_before=chain.size - 1)
        if not chain.sealed:  # nothing comes after a seal
            cut, completed = chain.torn_bytes, chain.unended
            self._append({"kind": "repair", "cut_bytes": cut, "completed": completed})

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
        except OSError as error:
            raise RunError(
                f"Ledger in {self._path.parent} could not be repaired: {error.strerror}."
            ) from None

    def _append(self, body: dict[str, Any]) -> None:
        """One entry, durable. Raises: RunError, and the entry does not count."""
        self._refuse_to_write(body["kind"])
        body = {"seq": len(self._chain.hashes), **body}
        line, digest = _line(body, self._chain.head[1])
        self._write(line, size_before=self._chain.size)
        self._chain.take(body, digest, len(line))

    def _refuse_to_write(self, kind: str) -> None:
        if self._descriptor < 0:
            raise RunError(f"Ledger in {self._path.parent} is closed: a {kind} cannot be recorded.")
        if self._broken:
            raise RunError(
                f"Ledger in {self._path.parent} failed to write before: start the command again."
            )
        if self._chain.sealed:
            raise RunError(
                f"Ledger in {self._path.parent} is sealed, the run is finished: use a new run.dir."
            )

    def _write(self, line: bytes, *, size_before: int) -> None:
        self._refuse_if_changed(size_before)
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            self._broken = True
            with suppress(OSError):
                os.ftruncate(self._descriptor, size_before)
                os.fsync(self._descriptor)
            raise RunError(
                f"Ledger in {self._path.parent} could not be written: {error.strerror}. Nothing "
                "was charged or released. Free some space and give the same command again."
            ) from None

    def _refuse_if_changed(self, size: int) -> None:
        """Fencing: a writer that the lock did not stop (on another machine, say) is noticed."""
        mine = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
        except OSError:
            there = None
        same = there is not None and (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)
        if mine.st_size != size or not same:
            self._broken = True
            raise RunError(
                f"Ledger in {self._path.parent} was changed or replaced by another process: "
                f"expected {size} bytes. Let only one run use this directory, and start it again."
            )


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
        cls, path: Path | str, genesis: dict[str, Any], *, collective: Collective
    ) -> SharedLedger:
        """:meth:`PrivacyLedger.open` on worker 0. ``genesis`` of other workers is not looked at."""
        shared = cls(None, collective)
        opened: list[PrivacyLedger] = []
        shared._on_worker_0(lambda: opened.append(PrivacyLedger.open(path, genesis)))
        return cls(opened[0] if opened else None, collective)

    def open_attempt(self) -> int:
        """:meth:`PrivacyLedger.open_attempt`: the same number on every worker."""
        return self._on_worker_0(lambda: self._here.open_attempt())

    def charge(self, event: GaussianEvent, what: str, step: int | None = None) -> None:
        """:meth:`PrivacyLedger.charge`: durable before it returns on any worker."""
        self._on_worker_0(lambda: self._here.charge(event, what, step))

    def affords(self, event: GaussianEvent) -> bool:
        return self._on_worker_0(lambda: self._here.affords(event))

    def affordable_steps(self, event: GaussianEvent) -> int:
        return self._on_worker_0(lambda: self._here.affordable_steps(event))

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
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise RunError(f"Cannot read the ledger {path}: {error.strerror}.") from None
    try:
        content = _read_all(descriptor, path)
    finally:
        os.close(descriptor)
    chain = _Chain.read(content, path)
    if not chain.hashes:
        raise PrivacyError(
            f"Ledger {path} has no genesis: expected one in line 1. Restore the file."
        )
    return chain.summary()


@dataclass
class _Chain:
    """The entries of a ledger, replayed one by one."""

    path: Path
    hashes: list[str] = field(default_factory=list)
    size: int = 0  # bytes of all entries
    run_id: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    counts: dict[tuple[float, float], int] = field(default_factory=dict)
    releases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PURPOSES, 0))
    attempts: int = 0
    checkpoints: int = 0
    repairs: int = 0
    sealed: bool = False
    torn_bytes: int = 0
    unended: bool = False  # the last entry is whole, but for its end of line

    @classmethod
    def read(cls, content: bytes, path: Path) -> _Chain:
        """Replay ``content``. A torn end is noted. Raises: PrivacyError naming a damaged line."""
        chain = cls(path)
        *lines, rest = content.split(b"\n")
        for line in lines:
            chain._replay(line)
        if rest:
            chain._end_without_newline(rest)
        return chain

    @property
    def head(self) -> Head:
        return (len(self.hashes) - 1, self.hashes[-1]) if self.hashes else (-1, "")

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
        return tuple(GaussianEvent(*kind, count=n) for kind, n in self.counts.items())

    def spent(self) -> float:
        return epsilon(self.events, self.accounting_delta) if self.claim else math.inf

    def contains(self, head: Sequence[Any]) -> bool:
        if not isinstance(head, (tuple, list)) or len(head) != 2 or type(head[0]) is not int:
            return False
        return 0 <= head[0] < len(self.hashes) and self.hashes[head[0]] == head[1]

    def summary(self) -> LedgerSummary:
        return LedgerSummary(
            run_id=self.run_id,
            plan=self.plan,
            claim=self.claim,
            budget=self.budget,
            delta=self.delta,
            overflow_delta=self.delta - self.accounting_delta,
            events=self.events,
            epsilon=self.spent(),
            steps=self.releases["step"],
            statistics=self.releases["statistics"],
            attempts=self.attempts,
            checkpoints=self.checkpoints,
            repairs=self.repairs,
            sealed=self.sealed,
            head=self.head,
            torn_bytes=self.torn_bytes,
        )

    def take(self, body: dict[str, Any], digest: str, size: int) -> None:
        """Count a checked entry."""
        self.hashes.append(digest)
        self.size += size
        match body["kind"]:
            case "genesis":
                self.run_id, self.plan = body["run_id"], body["plan"]
            case "attempt":
                self.attempts = body["attempt"]
            case "charge":
                kind = (body["noise_multiplier"], body["sample_rate"])
                self.counts[kind] = self.counts.get(kind, 0) + body["count"]
                self.releases[body["what"]] += body["count"]
            case "checkpoint":
                self.checkpoints += 1
            case "repair":
                self.repairs += 1
            case "seal":
                self.sealed = True

    def _replay(self, line: bytes) -> None:
        entry = _parsed(line)
        if entry is None:
            raise self._damage("is not an entry in canonical JSON")
        body, stated = entry
        expected, digest = _line(body, self.head[1])
        if stated != digest:
            raise self._damage("does not continue the chain: it or a line before it was changed")
        if expected != line + b"\n":
            raise self._damage("is not an entry in canonical JSON")
        fault = self._fault_of(body)
        if fault:
            raise self._damage(fault)
        self.take(body, digest, len(line) + 1)

    def _fault_of(self, body: dict[str, Any]) -> str:
        """Why ``body`` cannot be the next entry; empty if it can."""
        kind, fields = body.get("kind"), _FIELDS.get(str(body.get("kind")))
        if fields is None:
            return "is of a kind that this version does not know"
        if body.keys() != {"seq", "kind", *fields} or not all(
            _is_a(body[name], wanted) for name, wanted in fields.items()
        ):
            return f"is not a {kind} entry as this version writes it"
        if not _is_a(body["seq"], int) or body["seq"] != len(self.hashes):
            return f"says entry {body['seq']}, expected {len(self.hashes)}: lines are missing"
        if (kind == "genesis") != (not self.hashes):
            return f"is a {kind} entry, expected the genesis there, and only there"
        if self.sealed:
            return "comes after the seal"
        return _fault_of_genesis(body) if kind == "genesis" else self._fault_of_numbers(body)

    def _fault_of_numbers(self, body: dict[str, Any]) -> str:
        if body["kind"] == "attempt" and body["attempt"] != self.attempts + 1:
            return f"opens attempt {body['attempt']}, expected {self.attempts + 1}"
        if body["kind"] == "charge":
            if (
                body["what"] not in PURPOSES
                or body["attempt"] != self.attempts
                or not self.attempts
            ):
                return "charges something unknown, or outside the open attempt"
            try:
                kind = (body["noise_multiplier"], body["sample_rate"])
                GaussianEvent(*kind, count=body["count"] + self.counts.get(kind, 0))
                if body["count"] < 1:
                    return "charges nothing"
            except PrivacyError:
                return "charges numbers out of range"
        return ""

    def _end_without_newline(self, rest: bytes) -> None:
        """The last line was being written when the process died; anything else is damage."""
        text = rest.rstrip(b"\0")  # a file system may have extended the file before the data came
        longest = _LONGEST_ENTRY if self.hashes else _LONGEST_GENESIS
        if _is_torn(text) and len(rest) <= longest and (text or self.hashes):
            self.torn_bytes = len(rest)
            return
        self._replay(text)  # whole, but for its end of line: it counts
        self.unended, self.torn_bytes = True, len(rest) - len(text)

    def _damage(self, what: str) -> PrivacyError:
        return PrivacyError(
            f"Ledger {self.path}, line {len(self.hashes) + 1} {what}. Epsilon cannot be known from "
            "it: restore the file from a copy, or use a new run.dir."
        )


def _is_torn(text: bytes) -> bool:
    """Whether ``text`` can be the beginning of an entry, cut before its end."""
    if not text.startswith(_START[: len(text)]) or not text.isascii() or b"\0" in text:
        return False
    try:
        json.JSONDecoder().raw_decode(text.decode())
    except (json.JSONDecodeError, RecursionError):
        return True
    return False


def _parsed(line: bytes) -> tuple[dict[str, Any], str] | None:
    """(body, hash) of a line, None if it is not of that form."""
    try:
        entry = json.loads(
            line.decode("ascii"), parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.keys() != {"body", "hash"}:
        return None
    body, stated = entry["body"], entry["hash"]
    return (body, stated) if isinstance(body, dict) and isinstance(stated, str) else None


def _line(body: dict[str, Any], previous_hash: str) -> tuple[bytes, str]:
    canonical = _canonical(body)
    digest = hashlib.sha256(previous_hash.encode() + canonical).hexdigest()
    return b'{"body":' + canonical + b',"hash":"' + digest.encode() + b'"}\n', digest


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and infinities are no JSON


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)  # 1e999 is JSON, but no number we wrote
    return value


def _is_a(value: Any, wanted: Any) -> bool:
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _fault_of_genesis(body: dict[str, Any]) -> str:
    if body["format"] != FORMAT:
        return f"has format {body['format']}, this version reads {FORMAT}"
    if body["digest"] != hashlib.sha256(_canonical(body["plan"])).hexdigest():
        return "has a plan that does not match its digest"
    try:
        _checked_plan(body["plan"])
    except PrivacyError as error:
        return f"has a plan that cannot be: {error}"
    return ""


def _checked_plan(genesis: dict[str, Any]) -> dict[str, Any]:
    """``genesis`` as JSON gives it back. Raises: PrivacyError if its budget or claim is none."""
    try:
        plan = json.loads(_canonical(genesis))
    except (TypeError, ValueError, RecursionError):
        raise PrivacyError(
            "A genesis must hold finite numbers, texts, lists and dicts only."
        ) from None
    missing = [name for name in ("epsilon", "delta") if name not in plan]
    if missing:
        raise PrivacyError(f"A genesis without {missing[0]}: expected the budget (epsilon, delta).")
    for name in ("epsilon", "delta", "overflow_delta"):
        value = plan.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise PrivacyError(f"genesis {name} = {value!r}: expected a number.")
    if not plan["epsilon"] > 0:
        raise PrivacyError(f"genesis epsilon = {plan['epsilon']}: expected more than 0.")
    if not 0 <= plan.get("overflow_delta", 0.0) < plan["delta"] < 1:
        raise PrivacyError(f"genesis delta = {plan['delta']}: expected in (overflow_delta, 1).")
    if not isinstance(plan.get("claim", True), bool):
        raise PrivacyError(f"genesis claim = {plan['claim']!r}: expected true or false.")
    return plan


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


def _open_locked(path: Path) -> int:
    """Its descriptor; the file is made if need be. Raises: RunError, PrivacyError."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise RunError(f"Cannot open the ledger {path}: {error.strerror}.") from None
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            raise PrivacyError(f"Ledger {path} can be used by other users: run chmod 600 on it.")
        _lock(descriptor, path)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(
            f"Ledger in {path.parent} is busy: another process holds it. Wait for it, or stop it."
        ) from None
    except OSError as error:
        raise RunError(f"Ledger in {path.parent} cannot be locked: {error.strerror}.") from None


def _read_all(descriptor: int, path: Path) -> bytes:
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise RunError(
                f"Ledger {path} is not a regular file: move it away or use a new run.dir."
            )
        if facts.st_size > _MOST_BYTES:
            raise RunError(
                f"Ledger {path} has {facts.st_size} bytes: expected at most {_MOST_BYTES}."
            )
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise RunError(f"Cannot read the ledger {path}: {error.strerror}.") from None


def _sync_folder(path: Path) -> None:
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RunError(f"Cannot open {path.parent}: {error.strerror}.") from None
    try:
        os.fsync(folder)
    except OSError as error:
        raise RunError(f"Ledger in {path.parent} could not be written: {error.strerror}.") from None
    finally:
        os.close(folder)


def _kind_of(event: GaussianEvent) -> tuple[float, float]:
    return event.noise_multiplier, event.sample_rate


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _as_head(value: Sequence[Any]) -> Head:
    return int(value[0]), str(value[1])


def _error_class(name: str) -> type[DpldmError]:
    """The class of errors.py of that name; an unforeseen error of worker 0 becomes a DpldmError."""
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, DpldmError) else DpldmError
