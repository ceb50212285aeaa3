"""``dpldm ledger show|verify [FILE]``: what a ledger proves, from the file alone.

Without FILE: the ledger of the run, and the one of its data set if the run shares a budget. Both
are replayed line by line, and epsilon is computed anew. Loads no trainer, needs no lock, changes
nothing. Prints neither nonces nor digests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from dpldm_dist.config import Config
from dpldm_dist.errors import PrivacyError, RunError
from dpldm_dist.privacy.accounting import GaussianEvent, epsilon_prv, epsilon_rdp
from dpldm_dist.privacy.dataset_ledger import DatasetSummary, Share, read_dataset_ledger
from dpldm_dist.privacy.ledger import LedgerSummary, read_ledger
from dpldm_dist.runtime.rundir import RunDir, dataset_budget_file

Rows = Sequence[tuple[str, str]]
Ledger = LedgerSummary | DatasetSummary


def ledger(config: Config, action: str, file: str | None = None) -> dict[Path, Ledger]:
    """Show the ledgers, or verify them; what they say, by file.

    action: "show" or "verify". file: a ledger of a run or of a data set.
    Raises: RunError if there is none or it cannot be read; PrivacyError naming the line if one is
    damaged, and for "verify" also if they spent above a budget or do not belong together.
    """
    found = {path: _read(path) for path in _files(config, file)}
    for path, summary in found.items():
        rows = _run_rows(summary) if isinstance(summary, LedgerSummary) else _set_rows(summary)
        if action == "show":
            _print(str(path), rows)
    if action == "verify":
        _verify(found)
        for path, summary in found.items():
            print(f"{path}: {summary.head[0] + 1} entries verified, {_verdict(summary)}")
    return found


def describe(config: Config, action: str, file: str | None = None) -> list[str]:
    """What ``ledger`` would do, for --dry-run."""
    paths = [Path(file)] if file is not None else _places(config)
    return [f"reads   {path}" for path in paths]


def _places(config: Config) -> list[Path]:
    return [RunDir(config.run.dir).ledger, dataset_budget_file(config)]


def _files(config: Config, file: str | None) -> list[Path]:
    if file is not None:
        return [Path(file)]
    found = [path for path in _places(config) if path.exists()]
    if not found:
        raise RunError(
            f"No ledger in {RunDir(config.run.dir).root}: expected one of a run that has started. "
            "Set run.dir, or name the file."
        )
    return found


def _read(path: Path) -> Ledger:
    return read_dataset_ledger(path) if _is_of_data_set(path) else read_ledger(path)


def _is_of_data_set(path: Path) -> bool:
    """By its genesis; whatever is damaged is left to the verifier of runs, which names the line."""
    if not path.is_file():  # a pipe would never end
        return False
    try:
        with path.open("rb") as file:
            return "ledger_id" in json.loads(file.readline(1 << 16))["body"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _verify(found: dict[Path, Ledger]) -> None:
    """Raises: PrivacyError if a run spent above its budget, or is not the one that was noted."""
    runs = {path: s for path, s in found.items() if isinstance(s, LedgerSummary)}
    sets = {path: s for path, s in found.items() if isinstance(s, DatasetSummary)}
    for path, run in runs.items():
        if not run.claim:  # it has no part in any budget
            continue
        if run.epsilon > run.budget:
            raise PrivacyError(
                f"Ledger {path} accounts for epsilon {run.epsilon:.6f}: expected at most its "
                f"budget, {run.budget}. Do not release anything of this run."
            )
        named = run.plan.get("dataset_ledger")
        for place, whole in sets.items():
            if named is None:
                raise PrivacyError(
                    f"Ledger {path} names no budget of a data set, but {place} is one: the run "
                    "began before it, and its cost is not in it. Account for it by hand."
                )
            if named != whole.ledger_id:
                raise PrivacyError(
                    f"Ledger {path} names another budget than {place}: expected the one that it "
                    "began with. Restore that file, or set privacy.dataset_ledger to it."
                )
            _verify_share(path, run, place, whole)


def _verify_share(path: Path, run: LedgerSummary, place: Path, whole: DatasetSummary) -> None:
    share = whole.share_of(run.run_id)
    if share is None:
        if run.events:
            raise PrivacyError(
                f"{place} does not know the run of {path}, which has spent: it was rolled back or "
                "replaced. Restore its newest copy."
            )
        return
    if share.head is not None and not run.contains(share.head):
        raise PrivacyError(
            f"Ledger {path} lacks the entry that {place} notes for its last start: it was rolled "
            "back, or another copy of the run went on. Restore the newest copy."
        )
    if whole.terms.cost(run.events) > whole.terms.cost(share.events) * (1 + 1e-9):
        raise PrivacyError(
            f"Ledger {path} spent more than {place} sets aside for it: one of them was rolled back "
            "or replaced. Restore its newest copy."
        )


def _verdict(summary: Ledger) -> str:
    if isinstance(summary, DatasetSummary):
        return f"{summary.left:.2%} of the budget left"
    if not summary.claim:
        return "no privacy claim"
    return f"epsilon {_number(summary.epsilon)} of {summary.budget:g} at delta {summary.delta:g}"


def _run_rows(run: LedgerSummary) -> Rows:
    delta = run.delta - run.overflow_delta
    rows = [
        ("run", run.run_id),
        ("budget", f"epsilon {run.budget:g} at delta {run.delta:g}"),
    ]
    if not run.claim:
        rows.append(("epsilon spent", "none can be stated: the run has no privacy claim"))
    else:
        rows += [
            ("epsilon spent, PLD (number of record)", _number(run.epsilon)),
            ("the same by PRV (cross-check)", _number(epsilon_prv(run.events, delta))),
            ("the same by RDP (cross-check, looser)", _number(epsilon_rdp(run.events, delta))),
        ]
    return [
        *rows,
        ("attempts, starts", f"{run.attempts}, {run.starts}"),
        ("noisy steps charged", f"{run.steps}"),
        ("statistics releases charged", f"{run.statistics}"),
        ("finished sums; steps with several", f"{run.binds}; {run.rebound}"),
        *(("accounted as", _event(event)) for event in run.events),
        ("checkpoints", f"{run.checkpoints}"),
        ("repairs after a torn write", f"{run.repairs}"),
        *_end(run.torn_bytes),
        ("budget of the data set", str(run.plan.get("dataset_ledger", "none"))),
        ("sealed", "yes" if run.sealed else "not yet"),
        (f"head, entry {run.head[0]}", run.head[1]),
    ]


def _set_rows(whole: DatasetSummary) -> Rows:
    terms = whole.terms
    rows = [
        ("budget of a data set", whole.ledger_id),
        ("for all its runs together", f"epsilon {terms.epsilon:g} at delta {terms.delta:g}"),
        ("unit, relation", f"{terms.unit}, {terms.relation}"),
        ("Renyi filter", f"order {terms.order}, {terms.renyi_budget:.6g} in all"),
        ("left", f"{whole.left:.2%}"),
    ]
    for share in whole.shares:
        rows.append((f"run {share.run_id}", _share(whole, share)))
        rows += [("", _event(event)) for event in share.events]
    return [
        *rows,
        ("repairs after a torn write", f"{whole.repairs}"),
        *_end(whole.torn_bytes),
        (f"head, entry {whole.head[0]}", whole.head[1]),
    ]


def _share(whole: DatasetSummary, share: Share) -> str:
    state = "spent" if share.settled else "reserved"
    amount = "all of it, alone" if share.alone else f"{whole.terms.cost(share.events):.2%}"
    return f"{state} {amount}, {share.starts} start(s)"


def _end(torn_bytes: int) -> Rows:
    if not torn_bytes:
        return []
    return [("torn end", f"{torn_bytes} bytes, never acknowledged; cut at the next start")]


def _event(event: GaussianEvent) -> str:
    sigma, rate = event.noise_multiplier, event.sample_rate
    return f"{event.count} x noise multiplier {sigma:.6g}, sample rate {rate:.6g}"


def _number(value: float) -> str:
    return f"{value:.6f}" if math.isfinite(value) else "outside its range"


def _print(title: str, rows: Rows) -> None:
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
