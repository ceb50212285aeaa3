"""One budget for all runs on a private data set, fixed before the first of them.

A file beside the private shards (a chain, see ``chain.py``), of these kinds of entries:

    genesis  format, ledger_id, and the terms: epsilon, delta, overflow_delta, order, unit, relation
    reserve  run_id, events ([noise multiplier, sample rate, count], ...), overflow_delta, alone:
             what a run may spend; a later one of the same run takes the place of the earlier
    start    run_id, entry, hash: head of the run's own ledger when it started
    settle   run_id, events: what the run spent in the end; it spends no more
    repair   cut_bytes, completed: what a crash in the middle of a write had left behind

A run reserves all that its plan may spend before it starts, and more before it spends more, under
the lock of the file. So runs may go on side by side, and each may be planned after a look at the
releases of the others.

Why that is private. Let a be the order, rho(e) the Renyi divergence of order a that a release e
costs at most, and B the largest one that is (epsilon, delta - overflow_delta)-DP. What was spent
never exceeds what is reserved, and that is at most B, on every course that the runs can take. By
the Renyi filter all releases together, chosen adaptively as they are, have a divergence of at most
B of order a (Feldman and Zrnic 2021; Lecuyer 2021), also when runs go on side by side
and releases of one step under one set of coins lie apart in time (Haney et al. 2023). A filter
needs a bound that is fixed before anything is released: so the order stands in the genesis, and
with it B. It is the one at which B holds most copies of the first plan.

One exception. A first reservation that B does not hold is priced by the privacy loss distribution
of its events, at the delta that is left beside its own overflow_delta: it is *alone*, and no other
run is ever admitted, also not when it spends less in the end. For then the only course is: these
releases, of a plan that was fixed before any data was touched, and nothing else; and a fixed plan
may be priced so. Were others admitted once it stopped early, an analyst could look at its releases
and choose between two courses, each within the budget, that are not within it together. For the
same reason a first run that B does hold is never extended beyond B. What a run that is alone
repeats after a crash is priced as its own ledger prices it, under the same assumption: that whether
and when a run stops does not depend on the data.

The rare batch that exceeds its cap (``overflow_delta`` of a plan) adds its probability to delta:
the filter's runs share a part of delta that the genesis sets aside for them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dpldm_dist.errors import BudgetReached, PrivacyError
from dpldm_dist.privacy.accounting import (
    GaussianEvent,
    epsilon,
    renyi_budget,
    renyi_divergence,
)
from dpldm_dist.privacy.chain import REPAIR_FIELDS, ChainFile, Head, is_hex, read_chain
from dpldm_dist.privacy.ledger import PrivacyLedger

FORMAT = 1
ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192, 16384)
_OVERFLOW_SHARE = 1e-3  # of delta, for the overflow_delta of all plans
_ROUNDING = 1e-9  # share of the budget that is never admitted, for sums that come out differently
_AHEAD = 64  # releases that an extension asks for at a time, where there is room
_WAIT_S = 120.0  # for the lock: others hold it while they compute one price
_ID_DIGITS = 32


@dataclass(frozen=True)
class Request:
    """What a run asks for: ``events`` that it may release, ``overflow_delta`` of its plan, whom a
    record stands for (``unit``), and its neighbouring ``relation``."""

    events: tuple[GaussianEvent, ...]
    overflow_delta: float
    unit: str
    relation: str


@dataclass(frozen=True)
class Terms:
    """What is fixed for all runs: the budget (epsilon, delta), the part ``overflow_delta`` of delta
    for the plans' own, the order of the Renyi filter, unit and relation."""

    epsilon: float
    delta: float
    overflow_delta: float
    order: int
    unit: str
    relation: str

    @property
    def renyi_budget(self) -> float:
        """B: what all reservations together may cost at ``order``."""
        return renyi_budget(
            self.order, epsilon=self.epsilon, delta=self.delta - self.overflow_delta
        )

    def cost(self, events: Sequence[GaussianEvent]) -> float:
        """What ``events`` cost, as a share of B."""
        return renyi_divergence(events, self.order) / self.renyi_budget


@dataclass(frozen=True)
class Share:
    """What one run holds of the budget: reserved, or spent once it is ``settled``.

    ``alone``: priced by its privacy loss distribution, and never joined by another run. ``head``:
    that of the run's own ledger at its last start.
    """

    run_id: str
    events: tuple[GaussianEvent, ...]
    overflow_delta: float
    alone: bool
    settled: bool = False
    starts: int = 0
    head: Head | None = None


@dataclass(frozen=True)
class Answer:
    """Whether a request is admitted: ``refusal`` is empty then, else it says why not.

    ``alone``: admitted as the only run for ever. ``asked``, ``left``: shares of the budget of the
    Renyi filter; ``left``: before it.
    """

    alone: bool
    asked: float
    left: float
    refusal: str


@dataclass(frozen=True)
class DatasetSummary:
    """What a data-set ledger says, verified line by line. ``torn_bytes``: left by a crash."""

    ledger_id: str
    terms: Terms
    shares: tuple[Share, ...]
    repairs: int
    head: Head
    torn_bytes: int

    @classmethod
    def before_the_first_run(cls, epsilon: float, delta: float, request: Request) -> DatasetSummary:
        """What a ledger would say that the run with ``request`` opens. Raises: PrivacyError."""
        terms = new_terms(epsilon=epsilon, delta=delta, request=request)
        return cls("", terms, shares=(), repairs=0, head=(-1, ""), torn_bytes=0)

    @property
    def left(self) -> float:
        """Share of the budget that further runs may reserve."""
        return _left(self.terms, self.shares)

    def answer(self, request: Request) -> Answer:
        """What a new run with this request would be told."""
        return decide(self.terms, self.shares, request)

    def share_of(self, run_id: str) -> Share | None:
        return next((share for share in self.shares if share.run_id == run_id), None)


def new_terms(*, epsilon: float, delta: float, request: Request) -> Terms:
    """The terms of a ledger whose first run asks ``request``. Raises: PrivacyError."""
    overflow_delta = delta * _OVERFLOW_SHARE
    copies = {}
    for order in ORDERS:
        most = renyi_budget(order, epsilon=epsilon, delta=delta - overflow_delta)
        if most > 0:
            copies[order] = most / renyi_divergence(request.events, order)
    if not copies:
        raise PrivacyError(
            f"privacy.dataset_epsilon = {epsilon} at privacy.dataset_delta = {delta:g} is too "
            "little for any Renyi order: expected more."
        )
    best = max(copies, key=copies.__getitem__)
    return Terms(epsilon, delta, overflow_delta, best, request.unit, request.relation)


def decide(
    terms: Terms, shares: Sequence[Share], request: Request, *, run_id: str | None = None
) -> Answer:
    """Whether ``request`` may take the place of the share of ``run_id``, or be a new share.

    Formal guarantees: what is admitted keeps to the rules in the docstring of this file.
    """
    own = next((share for share in shares if share.run_id == run_id), None)
    others = [share for share in shares if share.run_id != run_id]
    asked, left = terms.cost(request.events), _left(terms, others)
    alone = own.alone if own is not None else not shares and asked > left
    refusal = (
        _other_meaning(terms, request)
        or _occupied(others)
        or (_too_much_alone(terms, request) if alone else _too_much(terms, asked, left, others))
        or ("" if alone else _too_much_overflow(terms, request, others))
    )
    return Answer(alone and not refusal, asked, left, refusal)


def read_dataset_ledger(path: Path | str) -> DatasetSummary:
    """Verify a data-set ledger line by line, also that it never admitted too much.

    Raises: RunError if it cannot be read, PrivacyError naming the line if it is damaged.
    """
    book = _Shares()
    chain = read_chain(Path(path), book)
    summary = DatasetSummary(
        ledger_id=book.ledger_id,
        terms=book.terms,
        shares=tuple(book.shares.values()),
        repairs=book.repairs,
        head=chain.head,
        torn_bytes=chain.torn_bytes,
    )
    for share in summary.shares:
        if share.alone and _alone_epsilon(book.terms, share) > book.terms.epsilon:
            raise PrivacyError(
                f"{book.noun} {path} admitted more than its budget for a run that is alone: "
                "expected at most that. Restore the file from a copy."
            )
    return summary


class Reservation:
    """What one run holds of the budget of its data set. Implements ``ledger.Reserve``.

    Formal guarantees: nothing is spent that the file, durably, does not set aside for this run. A
    run that was rolled back or copied since it started is refused.
    """

    def __init__(self, path: Path | str, request: Request, *, budget: tuple[float, float] | None):
        """budget: (epsilon, delta) if the config names them; None: those of the file, which must
        be there. Touches no file."""
        self._path = Path(path)
        self._request = request
        self._budget = budget
        self._covered: tuple[GaussianEvent, ...] = ()

    def prepare(self) -> str:
        """The id of the ledger, which is made if it is not there.

        Raises: PrivacyError if it has another budget, or the first request is over it; RunError.
        """
        with self._opened() as (_, book):
            return book.ledger_id

    def admit(self, run: PrivacyLedger) -> None:
        """Reserve what the run asks for, or find what it reserved before.

        Raises: PrivacyError if it is refused, was rolled back or copied, or has no claim.
        """
        if not run.claim:
            raise PrivacyError(
                f"{self._path} holds the budget of this data set, and a run without a privacy "
                "claim cannot keep to one: take the run.unsafe_ options out, or use other data."
            )
        with self._opened() as (file, book):
            share = book.shares.get(run.run_id)
            if share is None and run.events():
                raise PrivacyError(
                    f"{book.noun} {self._path} does not know this run, which has spent before: it "
                    "was rolled back or replaced. Restore its newest copy, or use a new run.dir."
                )
            if share is None:
                self._reserve(file, book, run, [self._request.events], PrivacyError)
                return
            _refuse_other_life(self._path, share, run)
            self._covered = share.events
            if not share.settled and not _within(run.events(), share.events):
                self._extend(file, book, run, run.events())

    def note_start(self, run: PrivacyLedger) -> None:
        """Note the head of the run's ledger. Raises: PrivacyError if it is another life's."""
        with self._opened() as (file, book):
            _refuse_other_life(self._path, book.shares.get(run.run_id), run)
            entry, digest = run.head
            file.append({"kind": "start", "run_id": run.run_id, "entry": entry, "hash": digest})

    def cover(self, run: PrivacyLedger, events: Sequence[GaussianEvent]) -> None:
        """Make sure that ``events``, all that the run will then have spent, are reserved.

        Raises: BudgetReached if they are not and there is no room for more; PrivacyError as above.
        """
        if _within(events, self._covered):
            return
        with self._opened() as (file, book):
            _refuse_other_life(self._path, book.shares.get(run.run_id), run)
            self._extend(file, book, run, events)

    def check(self, run: PrivacyLedger) -> None:
        """Raises: PrivacyError if another life of the run started since. Writes nothing."""
        book = _Shares()
        read_chain(self._path, book)
        _refuse_other_life(self._path, book.shares.get(run.run_id), run)

    def settle(self, run: PrivacyLedger) -> None:
        """Give back what a sealed run did not spend. Twice is fine."""
        with self._opened() as (file, book):
            share = book.shares.get(run.run_id)
            _refuse_other_life(self._path, share, run)
            if share is not None and not share.settled:
                events = _as_lists(run.events())
                file.append({"kind": "settle", "run_id": run.run_id, "events": events})

    @contextmanager
    def _opened(self) -> Iterator[tuple[ChainFile, _Shares]]:
        """The ledger under its lock; made, for this budget and request, if it is not there."""
        if not self._path.exists():
            terms = self._first_terms()  # a refused first request leaves no file
            _raise(PrivacyError, self._path, decide(terms, (), self._request))
        book = _Shares()
        with ChainFile.open(self._path, book, wait_s=_WAIT_S) as file:
            if not file.chain.hashes:
                terms = self._first_terms()
                ledger_id = secrets.token_hex(_ID_DIGITS // 2)
                file.mend({"format": FORMAT, "ledger_id": ledger_id, **asdict(terms)})
            else:
                self._refuse_other_budget(book.terms)
                file.mend({})
            yield file, book

    def _first_terms(self) -> Terms:
        if self._budget is None:
            raise PrivacyError(
                f"The data-set ledger {self._path} is gone or empty: restore it, or set "
                "privacy.dataset_epsilon and privacy.dataset_delta for a new budget."
            )
        epsilon, delta = self._budget
        return new_terms(epsilon=epsilon, delta=delta, request=self._request)

    def _refuse_other_budget(self, terms: Terms) -> None:
        if self._budget not in (None, (terms.epsilon, terms.delta)):
            raise PrivacyError(
                f"The data-set ledger {self._path} was opened for epsilon {terms.epsilon} at delta "
                f"{terms.delta}, this config says {self._budget[0]} at {self._budget[1]}: a budget "
                "is fixed in advance. Restore privacy.dataset_epsilon and privacy.dataset_delta, "
                "or leave both out."
            )

    def _extend(
        self,
        file: ChainFile,
        book: _Shares,
        run: PrivacyLedger,
        events: Sequence[GaussianEvent],
    ) -> None:
        reserved = book.shares[run.run_id].events
        wishes = [_grown(reserved, events, ahead=ahead) for ahead in (_AHEAD, 0)]
        self._reserve(file, book, run, wishes, BudgetReached)

    def _reserve(
        self,
        file: ChainFile,
        book: _Shares,
        run: PrivacyLedger,
        wishes: Sequence[tuple[GaussianEvent, ...]],
        error: type[PrivacyError],
    ) -> None:
        """Reserve the first of ``wishes`` that is admitted. Raises: ``error`` if none is."""
        shares = tuple(book.shares.values())
        for events in wishes:
            request = replace(self._request, events=events)
            given = decide(book.terms, shares, request, run_id=run.run_id)
            if not given.refusal:
                file.append(
                    {
                        "kind": "reserve",
                        "run_id": run.run_id,
                        "events": _as_lists(events),
                        "overflow_delta": self._request.overflow_delta,
                        "alone": given.alone,
                    }
                )
                self._covered = events
                return
        _raise(error, self._path, given)


def reservation_for(
    path: Path | str,
    request: Request,
    *,
    dataset_epsilon: float | None,
    dataset_delta: float | None,
) -> Reservation | None:
    """How a run keeps to the budget of its data set; None if nobody gave it one.

    The config gives a budget (both numbers), or the file is there from an earlier run.
    """
    if dataset_epsilon is not None and dataset_delta is not None:
        return Reservation(path, request, budget=(float(dataset_epsilon), float(dataset_delta)))
    return Reservation(path, request, budget=None) if Path(path).exists() else None


@dataclass
class _Shares:
    """What the entries of a data-set ledger mean."""

    noun = "Data-set ledger"
    remedy = "What is left of the budget cannot be known from it: restore the file from a copy."
    fields = {  # noqa: RUF012 - never changed
        "genesis": {
            "format": int,
            "ledger_id": str,
            "epsilon": float,
            "delta": float,
            "overflow_delta": float,
            "order": int,
            "unit": str,
            "relation": str,
        },
        "reserve": {"run_id": str, "events": list, "overflow_delta": float, "alone": bool},
        "start": {"run_id": str, "entry": int, "hash": str},
        "settle": {"run_id": str, "events": list},
        "repair": REPAIR_FIELDS,
    }
    sealed = False  # a budget that is used up refuses by itself

    ledger_id: str = ""
    genesis: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    repairs: int = 0

    @property
    def terms(self) -> Terms:
        names = Terms.__dataclass_fields__
        return Terms(**{name: self.genesis[name] for name in names})

    def take(self, body: dict[str, Any]) -> None:
        run_id = body.get("run_id", "")
        share = self.shares.get(run_id)
        match body["kind"]:
            case "genesis":
                self.ledger_id, self.genesis = body["ledger_id"], body
            case "reserve" if share is None:
                events, overflow = _as_events(body["events"]), body["overflow_delta"]
                self.shares[run_id] = Share(run_id, events, overflow, body["alone"])
            case "reserve":
                self.shares[run_id] = replace(share, events=_as_events(body["events"]))
            case "start":
                head = (body["entry"], body["hash"])
                self.shares[run_id] = replace(share, starts=share.starts + 1, head=head)
            case "settle":
                events = _as_events(body["events"])
                self.shares[run_id] = replace(share, events=events, settled=True)
            case "repair":
                self.repairs += 1

    def fault_of(self, body: dict[str, Any]) -> str:
        kind = body["kind"]
        if kind == "genesis":
            return _fault_of_genesis(body)
        if kind == "repair":
            return ""
        share = self.shares.get(body["run_id"])
        if share is None and kind != "reserve":
            return f"is a {kind} of a run that has reserved nothing"
        if kind == "start":
            return "" if is_hex(body["hash"], 64) else "notes something that is no head"
        if share is not None and share.settled:
            return f"is a {kind} of a run that is settled"
        try:
            events = _as_events(body["events"])
        except (PrivacyError, TypeError, ValueError):
            return f"is a {kind} of releases that cannot be"
        if kind == "settle":
            return self._fault_of_settle(share, events)
        return self._fault_of_reserve(body, share, events)

    def _fault_of_reserve(
        self, body: dict[str, Any], share: Share | None, events: tuple[GaussianEvent, ...]
    ) -> str:
        others = [other for other in self.shares.values() if other is not share]
        if not is_hex(body["run_id"], _ID_DIGITS) or not events or body["overflow_delta"] < 0:
            return "reserves nothing, or for nobody"
        if share is not None and (share.alone, share.overflow_delta) != (
            body["alone"],
            body["overflow_delta"],
        ):
            return "changes what a reservation keeps"
        if any(other.alone for other in others) or (body["alone"] and others):
            return "admits a run beside one that is alone"
        if not body["alone"] and self.terms.cost(events) > _left(self.terms, others, rounding=0.0):
            return "reserves more than the budget holds"
        return ""

    def _fault_of_settle(self, share: Share, events: tuple[GaussianEvent, ...]) -> str:
        if self.terms.cost(events) > self.terms.cost(share.events) * (1 + _ROUNDING):
            return "says that a run spent more than it had reserved"
        return ""


def _fault_of_genesis(body: dict[str, Any]) -> str:
    if body["format"] != FORMAT:
        return f"has format {body['format']}, this version reads {FORMAT}"
    if not is_hex(body["ledger_id"], _ID_DIGITS):
        return "has no id"
    if not 0 < body["overflow_delta"] < body["delta"] < 1:
        return "has a delta that cannot be"
    try:
        budget = renyi_budget(
            body["order"], epsilon=body["epsilon"], delta=body["delta"] - body["overflow_delta"]
        )
    except PrivacyError as error:
        return f"has a budget that cannot be: {error}"
    return "" if budget > 0 else "has a budget that cannot be"


def _left(terms: Terms, shares: Sequence[Share], *, rounding: float = _ROUNDING) -> float:
    """Share of the budget that ``shares`` leave to others."""
    if any(share.alone for share in shares):
        return 0.0
    return max(0.0, 1.0 - rounding - sum(terms.cost(share.events) for share in shares))


def _alone_epsilon(terms: Terms, share: Request | Share) -> float:
    """By privacy loss distributions, at the delta that its own overflow_delta leaves."""
    delta = terms.delta - share.overflow_delta
    return epsilon(share.events, delta) if delta > 0 else float("inf")


def _other_meaning(terms: Terms, request: Request) -> str:
    for name in ("unit", "relation"):
        if getattr(terms, name) != getattr(request, name):
            return (
                f"it counts {name} = {getattr(terms, name)}, this run {getattr(request, name)}: "
                "expected the same. Set privacy.dataset_ledger to a file of its own"
            )
    return ""


def _occupied(others: Sequence[Share]) -> str:
    if not any(share.alone for share in others):
        return ""
    return (
        "the whole budget went to the first run, which is more than the filter for several runs "
        "holds: no other is ever admitted"
    )


def _too_much_alone(terms: Terms, request: Request) -> str:
    cost = _alone_epsilon(terms, request)
    if cost <= terms.epsilon:
        return ""
    return (
        f"the run may cost epsilon {cost:.4g} at delta {terms.delta:g}, the budget is "
        f"{terms.epsilon:g}. Take fewer steps or more noise"
    )


def _too_much(terms: Terms, asked: float, left: float, others: Sequence[Share]) -> str:
    if asked <= left:
        return ""
    open_runs = sum(not share.settled for share in others)
    wait = f", or wait for the {open_runs} that are not finished" if open_runs else ""
    return (
        f"the run asks for {asked:.2%} of the budget (epsilon {terms.epsilon:g} at delta "
        f"{terms.delta:g}), {left:.2%} is left beside {len(others)} other run(s). Take fewer steps "
        f"or more noise{wait}"
    )


def _too_much_overflow(terms: Terms, request: Request, others: Sequence[Share]) -> str:
    wanted = request.overflow_delta + sum(share.overflow_delta for share in others)
    if wanted <= terms.overflow_delta:
        return ""
    return (
        f"the caps of all plans would take {wanted:.3g} of delta, {terms.overflow_delta:.3g} is "
        "set aside for them. Lower privacy.delta of the run"
    )


def _raise(error: type[PrivacyError], path: Path, given: Answer) -> None:
    if given.refusal:
        raise error(f"The budget of the data set ({path}) refuses this run: {given.refusal}.")


def _refuse_other_life(path: Path, share: Share | None, run: PrivacyLedger) -> None:
    if share is None:
        raise PrivacyError(
            f"The data-set ledger {path} no longer knows this run: it was rolled back or replaced. "
            "Restore its newest copy, or use a new run.dir."
        )
    if share.head is not None and not run.contains(share.head):
        raise PrivacyError(
            "The ledger of this run lacks the entry that it started with last, as "
            f"{path} notes: it was rolled back, or another copy of the run directory went on. "
            "Restore the newest copy, or use a new run.dir."
        )


def _within(events: Sequence[GaussianEvent], reserved: Sequence[GaussianEvent]) -> bool:
    """Whether no kind of release occurs more often in ``events`` than in ``reserved``."""
    most = _counts(reserved)
    return all(count <= most.get(kind, 0) for kind, count in _counts(events).items())


def _grown(
    reserved: Sequence[GaussianEvent], events: Sequence[GaussianEvent], *, ahead: int
) -> tuple[GaussianEvent, ...]:
    """``reserved``, made large enough for ``events``, and for ``ahead`` more of what is too few.

    A release that was reserved at one noise and came at less (its step ended in several sums) takes
    the place of the reserved one: the number of releases of a sample rate grows only where
    ``events`` have more.
    """
    before, needed = _counts(reserved), _counts(events)
    grown = {kind: max(count, needed.get(kind, 0)) for kind, count in (needed | before).items()}
    for rate in {rate for _, rate in grown}:
        most = max(_total(before, rate), _total(needed, rate))
        for kind in sorted((kind for kind in grown if kind[1] == rate), reverse=True):
            slack = grown[kind] - needed.get(kind, 0)
            grown[kind] -= min(slack, max(0, _total(grown, rate) - most))
        if _total(needed, rate) > _total(before, rate) and ahead:
            largest = max(kind for kind in needed if kind[1] == rate)
            grown[largest] += ahead
    return tuple(GaussianEvent(*kind, count=count) for kind, count in grown.items() if count)


def _counts(events: Sequence[GaussianEvent]) -> dict[tuple[float, float], int]:
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        kind = (event.noise_multiplier, event.sample_rate)
        counts[kind] = counts.get(kind, 0) + event.count
    return counts


def _total(counts: Mapping[tuple[float, float], int], rate: float) -> int:
    return sum(count for kind, count in counts.items() if kind[1] == rate)


def _as_lists(events: Sequence[GaussianEvent]) -> list[list[float]]:
    return [[event.noise_multiplier, event.sample_rate, event.count] for event in events]


def _as_events(lists: Sequence[Sequence[Any]]) -> tuple[GaussianEvent, ...]:
    """Raises: PrivacyError, TypeError, ValueError for what is none."""
    found = []
    for sigma, rate, count in lists:
        if not (type(sigma) is float and type(rate) is float and type(count) is int and count > 0):
            raise ValueError("not written by this version")
        found.append(GaussianEvent(sigma, rate, count=count))
    if len({(e.noise_multiplier, e.sample_rate) for e in found}) != len(found):
        raise ValueError("a kind of release twice")
    return tuple(found)
