"""Damage an input, read it, and judge what came of it. Knows nothing of what the input is."""

from __future__ import annotations

import random
import re
import resource
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from dpldm_dist.errors import DpldmError
from tests.fuzz.damage import clear

LIMIT_S = 30.0  # for one case; a sound one takes milliseconds, on a busy machine a second
_MEMORY_BYTES = 2 << 30  # that reading one input may take beyond what the process has
_ROUND = 50  # cases between two looks at the unmutated input
_REMEDY = re.compile(
    r"\b(restore|again|remove|mend|use a new|expected|should|must|give|set|move it|chmod|did you)\b",
    re.IGNORECASE,
)

# What may come of a case. The first four are right.
IDENTICAL = "identical"  # accepted, and it means what the unmutated input means
REFUSED = "refused"  # one line that names the file and says what to do
PASSED_OVER = "passed over"  # it says so, and goes on from the sound one before
VOUCHED = "vouched for"  # another sound input, forged with all its checksums
SILENT = "silent"  # accepted although it means something else
TRACEBACK = "traceback"
HANG = "hang"
RAN_CODE = "ran code"
UNCLEAR = "unclear"  # refused with a message that does not help, or by the wrong class
RIGHT = (IDENTICAL, REFUSED, PASSED_OVER, VOUCHED)
WRONG = (SILENT, TRACEBACK, HANG, RAN_CODE, UNCLEAR)


@dataclass(frozen=True)
class Damage:
    """What was done to an input.

    touched: names of the files, one of which the message must hold. vouched: checksums were made to
    fit, so that only checks of form can notice. malformed: no sound input looks like that, so that
    it must be refused even then.
    """

    what: str
    touched: tuple[str, ...]
    vouched: bool = False
    malformed: bool = False


@dataclass(frozen=True)
class Reading:
    """What was read. ``warned``: a damaged part was passed over, with a message that names it."""

    meaning: Any
    warned: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of input: how to make a sound one in a folder, damage it, and read it.

    same: whether what was read is what the folder says; by default, that it means what the
    unmutated input means. errors: the classes that may refuse it.
    """

    name: str
    errors: tuple[type[DpldmError], ...]
    build: Callable[[Path], None]
    damage: Callable[[Path, Random, Path], Damage]
    read: Callable[[Path], Reading]
    same: Callable[[Path, Any, Any], bool] = lambda folder, found, sound: found == sound


@dataclass
class Tally:
    """Outcomes of the cases of a kind; ``faults`` tell how each wrong one can be seen again."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    controls: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.outcomes.total()


def run(
    kind: Kind,
    seed: object,
    cases: range,
    *,
    limit_s: float = LIMIT_S,
    advance: Callable[[], None] = lambda: None,
) -> Tally:
    """Try ``cases``; the same seed and number give the same case. The unmutated input is read
    before, after and between them, and must be accepted every time."""
    tally = Tally(kind.name)
    with tempfile.TemporaryDirectory() as name, _bounded_memory():
        root = Path(name)
        folder, marker = root / "input", root / "marker"
        folder.mkdir(mode=0o700)
        kind.build(folder)
        whole = _contents(folder)
        sound = _control(kind, folder, tally)
        for number in cases:
            dice = random.Random(f"{seed}/{kind.name}/{number}")
            damage = kind.damage(folder, dice, marker)
            outcome, detail = _outcome(kind, folder, damage, sound, marker, limit_s)
            tally.outcomes[outcome] += 1
            if outcome in WRONG:
                tally.faults.append(
                    f"{kind.name} seed {seed} case {number}: {outcome}: {damage.what} "
                    f"({', '.join(damage.touched)}): {detail}"
                )
            marker.unlink(missing_ok=True)
            _restore(folder, whole)
            if number % _ROUND == _ROUND - 1 or number == cases[-1]:
                again = _control(kind, folder, tally)
                assert again == sound, f"{kind.name}: the unmutated input changed its meaning"
            advance()
    return tally


def _control(kind: Kind, folder: Path, tally: Tally) -> Any:
    """The unmutated input, which must be accepted."""
    found = kind.read(folder)
    assert not found.warned and kind.same(folder, found.meaning, found.meaning), kind.name
    tally.controls += 1
    return found.meaning


def _outcome(
    kind: Kind, folder: Path, damage: Damage, sound: Any, marker: Path, limit_s: float
) -> tuple[str, str]:
    try:
        with _time_limit(limit_s):
            found = kind.read(folder)
            same = kind.same(folder, found.meaning, sound)
    except DpldmError as error:
        outcome, detail = _judged_message(kind, damage, error)
    except _TooLongError:
        outcome, detail = HANG, f"more than {limit_s} s"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome, detail = TRACEBACK, f"{type(error).__name__}: {str(error)[:200]}"
    else:
        if found.warned:
            outcome, detail = PASSED_OVER if same else SILENT, found.warned
            if not _names_it(damage, found.warned):
                outcome = UNCLEAR
        elif same:
            outcome, detail = IDENTICAL, ""
        elif damage.vouched and not damage.malformed:
            outcome, detail = VOUCHED, ""
        else:
            outcome, detail = SILENT, "accepted"
    return (RAN_CODE, detail) if marker.exists() else (outcome, detail)


def _judged_message(kind: Kind, damage: Damage, error: DpldmError) -> tuple[str, str]:
    if not isinstance(error, kind.errors):
        return UNCLEAR, f"refused as {type(error).__name__}: {error}"
    text = str(error)
    if not _names_it(damage, text) or not _REMEDY.search(text):
        return UNCLEAR, f"message {text!r}"
    return REFUSED, text


def _names_it(damage: Damage, text: str) -> bool:
    """Whether ``text`` is one line that names what was damaged."""
    return text.isprintable() and any(name in text for name in damage.touched)


class _TooLongError(BaseException):
    """No ``except Exception`` of the code under test may take it for an error of its own."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Within, taking much more memory fails at once; it does not bring down the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _contents(folder: Path) -> dict[str, bytes | None]:
    """Relative name -> content; None for a folder. In an order in which they can be made."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def _restore(folder: Path, whole: dict[str, bytes | None]) -> None:
    clear(folder)
    for name, content in whole.items():
        path = folder / name
        if content is None:
            path.mkdir(mode=0o700)
        else:
            path.write_bytes(content)
            path.chmod(0o600)
