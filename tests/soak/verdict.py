"""What must hold of a run however often it was killed, judged without the code that ran.

The ledger is read by ``read_ledger`` *and* line by line here, releases are those that the processes
noted when they made them, and what is released is compared byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpldm_dist.config import Config
from dpldm_dist.errors import DpldmError, WorkerError
from dpldm_dist.privacy.ledger import read_ledger
from dpldm_dist.runtime.rundir import RunDir
from tests.soak.lives import Life


def faults(config: Config, lives: Sequence[Life], released: dict[str, str]) -> list[str]:
    """Everything by which a finished run differs from one that nothing happened to; [] is right.

    ``lives``: all its starts, the last one uninterrupted. ``released``: what ``released_files``
    says of an uninterrupted run of the same key.
    """
    run, steps = RunDir(config.run.dir), config.finetune.steps
    found = _unexpected_ends(lives)
    found += _other_releases(lives, steps)
    found += _ledger_faults(run.ledger, steps, lives)
    here = released_files(run)
    names = {name for name in here.keys() | released.keys() if here.get(name) != released.get(name)}
    found += [f"{name} is not as in the uninterrupted run" for name in sorted(names)]
    if run.key.exists():
        found.append("the key is still there")
    found += [
        f"{path} was left behind" for path in sorted(run.root.rglob("*")) if _unfinished(path)
    ]
    return found


def released_files(run: RunDir) -> dict[str, str]:
    """SHA-256 of every released file, but for those that tell of the run: events and manifest."""
    files = (path for path in run.release.rglob("*") if path.is_file())
    return {
        str(path.relative_to(run.release)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.relative_to(run.release).parts[0] not in ("tensorboard", "manifest.json")
    }


def _unfinished(path: Path) -> bool:
    return any(mark in path.name for mark in (".part", ".partial", ".gone-", ".old"))


def _unexpected_ends(lives: Sequence[Life]) -> list[str]:
    """A killed driver leaves its signal, a driver of a killed worker exit code 5."""
    *cut_short, last = lives
    found = [
        f"a killed life ended with {life.exit_code}: {life.log}"
        for life in cut_short
        if life.exit_code not in (-signal.SIGKILL, WorkerError.exit_code)
    ]
    if last.exit_code != 0:
        found.append(f"the last life ended with {last.exit_code}: {last.log}")
    return found


def _other_releases(lives: Sequence[Life], steps: int) -> list[str]:
    """A release that was made twice, by whichever worker and life, must be the same bits."""
    digests: dict[tuple[str, int], set[str]] = {}
    for life in lives:
        for _, purpose, step, digest in life.releases:
            digests.setdefault((purpose, step), set()).add(digest)
    found = [
        f"{p} {s} was released in {len(d)} versions" for (p, s), d in digests.items() if len(d) > 1
    ]
    missing = {("statistics", 0), *(("step", step) for step in range(steps))} - digests.keys()
    return found + [f"{purpose} {step} was not released" for purpose, step in sorted(missing)]


def _ledger_faults(path: Path, steps: int, lives: Sequence[Life]) -> list[str]:
    try:
        summary = read_ledger(path)
    except DpldmError as error:
        return [f"the ledger is refused: {error}", *_line_faults(path, steps, lives)]
    expected: dict[str, Any] = {
        "steps": steps, "statistics": 1, "binds": steps + 1, "attempts": 1, "rebound": 0,
        "sealed": summary.claim, "torn_bytes": 0,
    }  # fmt: skip
    found = [
        f"the ledger says {name} = {getattr(summary, name)}, expected {value}"
        for name, value in expected.items()
        if getattr(summary, name) != value
    ]
    if not summary.starts <= len(lives):
        found.append(f"the ledger says {summary.starts} starts of {len(lives)}")
    if summary.claim and not summary.epsilon <= summary.budget:
        found.append(f"epsilon {summary.epsilon} of {summary.budget}")
    return [*found, *_line_faults(path, steps, lives)]


def _line_faults(path: Path, steps: int, lives: Sequence[Life]) -> list[str]:
    """The file as plain lines: the chain, one charge and then one bind of everything, no more."""
    found, previous, charged, bound = [], "", Counter(), Counter()
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        body = entry["body"]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256((previous + text).encode()).hexdigest() != entry["hash"]:
            found.append(f"the chain breaks at line {body['seq'] + 1}")
        previous = entry["hash"]
        if body["kind"] == "charge":
            charged[body["what"], body["step"]] += body["count"]
        elif body["kind"] == "bind":
            bound[body["what"], body["step"]] += 1
            if not charged[body["what"], body["step"]]:
                found.append(f"{body['what']} {body['step']} was bound before it was charged")
    once = Counter({("statistics", 0): 1} | {("step", step): 1 for step in range(steps)})
    for what, counts in (("charged", charged), ("bound", bound)):
        for purpose, step in sorted(counts.keys() | once.keys()):
            if counts[purpose, step] != once[purpose, step]:
                found.append(f"{purpose} {step} was {what} {counts[purpose, step]} times")
    made = {(purpose, step) for life in lives for _, purpose, step, _ in life.releases}
    return found + [f"{p} {s} was released without a bind" for p, s in sorted(made - bound.keys())]
