"""A file of entries that only grows, shows every edit, and survives a crash in the middle of one.

One line of canonical JSON per entry, ``{"body": {...}, "hash": sha256(previous hash + body)}``.
The body has ``seq`` (the number of the line from 0) and ``kind``; the first entry is the genesis.
What the kinds mean is said by a :class:`Book`; what a line is, the lock, the order of write and
fsync, and what a crash leaves behind are here, once for all ledgers.

One process writes: it holds a lock, and appends only if the file is as it left it. The chain shows
every edit; that whole lines are missing at the end only a head noted elsewhere can show. Whoever
may write the file can forge a consistent chain: it guards against accidents, not against its owner.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dpldm_dist.errors import PrivacyError, RunError

Head = tuple[int, str]  # number of an entry, and its hash: names the chain up to it
REPAIR_FIELDS = {"cut_bytes": int, "completed": bool}  # what a crash in a write had left behind

_MOST_BYTES = 1 << 30
_START = b'{"body":{'
_LONGEST_ENTRY = 1 << 11  # bytes; a longer torn end is more than one entry
_LONGEST_GENESIS = 1 << 16
_POLL_S = 0.02


class Book(Protocol):
    """What the entries of a chain mean: it checks and counts them one after the other."""

    noun: str
    """What messages call the file: "Ledger"."""
    remedy: str
    """What to do about a damaged file, as the end of a message."""
    fields: Mapping[str, Mapping[str, Any]]
    """kind -> field -> type of every entry, "genesis" and "repair" among them; a bool is no int."""
    sealed: bool
    """Whether nothing follows the last entry."""

    def fault_of(self, body: Mapping[str, Any]) -> str:
        """Why ``body``, its fields of the right types, cannot come next; empty if it can."""

    def take(self, body: Mapping[str, Any]) -> None:
        """Count a checked entry."""


@dataclass
class Chain:
    """The entries of a file, replayed one by one into ``book``."""

    path: Path
    book: Book
    hashes: list[str] = field(default_factory=list)
    size: int = 0  # bytes of all entries
    torn_bytes: int = 0
    unended: bool = False  # the last entry is whole, but for its end of line

    @classmethod
    def read(cls, content: bytes, path: Path, book: Book) -> Chain:
        """Replay ``content``. A torn end is noted. Raises: PrivacyError naming a damaged line."""
        chain = cls(path, book)
        *lines, rest = content.split(b"\n")
        for line in lines:
            chain._replay(line)
        if rest:
            chain._end_without_newline(rest)
        return chain

    @property
    def head(self) -> Head:
        return (len(self.hashes) - 1, self.hashes[-1]) if self.hashes else (-1, "")

    def contains(self, head: Sequence[Any]) -> bool:
        """Whether this chain goes through ``head``: False for another one, or one cut before."""
        return contains(self.hashes, head)

    def take(self, body: dict[str, Any], digest: str, size: int) -> None:
        """Count a checked entry of ``size`` bytes."""
        self.hashes.append(digest)
        self.size += size
        self.book.take(body)

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
        fault = self.fault_of(body)
        if fault:
            raise self._damage(fault)
        self.take(body, digest, len(line) + 1)

    def fault_of(self, body: Mapping[str, Any]) -> str:
        """Why ``body`` cannot be the next entry; empty if it can."""
        kind, fields = body.get("kind"), self.book.fields.get(str(body.get("kind")))
        if fields is None:
            return "is of a kind that this version does not know"
        if body.keys() != {"seq", "kind", *fields} or not all(
            is_a(body[name], wanted) for name, wanted in fields.items()
        ):
            return f"is no {kind} entry as this version writes it"
        if not is_a(body["seq"], int) or body["seq"] != len(self.hashes):
            return f"says entry {body['seq']}, expected {len(self.hashes)}: lines are missing"
        if (kind == "genesis") != (not self.hashes):
            return f"is a {kind} entry, expected the genesis there, and only there"
        return "comes after the seal" if self.book.sealed else self.book.fault_of(body)

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
        line = len(self.hashes) + 1
        return PrivacyError(f"{self.book.noun} {self.path}, line {line} {what}. {self.book.remedy}")


class ChainFile:
    """The one writer of a chain. Make it with :meth:`open`; it holds a lock until closed.

    Formal guarantees: when :meth:`append` returns, the entry survives a crash of the process or the
    machine (as far as the disk honours fsync). When it raises, the entry does not count, and
    nothing more is written.
    """

    def __init__(self, descriptor: int, chain: Chain, content: bytes):
        self._descriptor = descriptor
        self.chain = chain
        self._content: bytes | None = content  # until the end is mended
        self._broken = False

    @classmethod
    def open(cls, path: Path, book: Book, *, wait_s: float = 0.0) -> ChainFile:
        """Lock the file, made if need be, and replay it into ``book``. Call :meth:`mend` next.

        wait_s: how long to wait for another process that holds it.
        Raises: RunError if another process holds it or it cannot be used; PrivacyError if it is
        damaged or readable by others.
        """
        descriptor = _open_locked(path, book.noun, wait_s)
        try:
            content = _read_all(descriptor, path, book.noun)
            return cls(descriptor, Chain.read(content, path, book), content)
        except BaseException:
            os.close(descriptor)
            raise

    def mend(self, genesis: Mapping[str, Any]) -> None:
        """Write ``genesis`` if the file has none; cut what a crash left behind, and record it.

        A torn last line was never acknowledged: it is cut off. A whole one that only lacks its end
        of line is kept and ended.
        """
        chain, content, self._content = self.chain, self._content, None
        assert content is not None, "mended twice"
        cut, completed = chain.torn_bytes, chain.unended
        if cut:
            self._cut(len(content) - cut)
        if completed:
            self._write(b"\n", size_before=chain.size - 1)
        if not chain.hashes:
            self.append({**genesis, "kind": "genesis"})
            _sync_folder(chain.path, chain.book.noun)
        if (cut or completed) and not chain.book.sealed:  # nothing comes after a seal
            self.append({"kind": "repair", "cut_bytes": cut, "completed": completed})
        chain.torn_bytes, chain.unended = 0, False

    def append(self, body: Mapping[str, Any]) -> None:
        """One entry, durable. Raises: RunError, and the entry does not count.

        Nothing is written that a reader would refuse.
        """
        chain = self.chain
        self.refuse_to_write(body["kind"])
        assert self._content is None, "mend the file before anything is appended"
        body = {"seq": len(chain.hashes), **body}
        fault = chain.fault_of(body)
        if fault:
            raise RunError(
                f"{chain.book.noun} in {chain.path.parent}: an entry that {fault} was not written. "
                "This is a bug."
            )
        line, digest = _line(body, chain.head[1])
        longest = _LONGEST_ENTRY if chain.hashes else _LONGEST_GENESIS
        if len(line) > longest:
            raise RunError(f"An entry of {len(line)} bytes: expected at most {longest}.")
        self._write(line, size_before=chain.size)
        chain.take(body, digest, len(line))

    def refuse_to_write(self, kind: str) -> None:
        """Raises: RunError if no entry can be appended (closed, failed before, sealed)."""
        book, folder = self.chain.book, self.chain.path.parent
        if self._descriptor < 0:
            raise RunError(f"{book.noun} in {folder} is closed: a {kind} cannot be recorded.")
        if self._broken:
            raise RunError(
                f"{book.noun} in {folder} failed to write before: start the command again."
            )
        if book.sealed:
            raise RunError(
                f"{book.noun} in {folder} is sealed, the run is finished: use a new run.dir."
            )

    def close(self) -> None:
        """Give the lock back. Closing twice is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ChainFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
        except OSError as error:
            raise RunError(
                f"{self.chain.book.noun} in {self.chain.path.parent} could not be repaired: "
                f"{error.strerror}."
            ) from None

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
                f"{self.chain.book.noun} in {self.chain.path.parent} could not be written: "
                f"{error.strerror}. Nothing was charged or released. Free some space and give the "
                "same command again."
            ) from None

    def _refuse_if_changed(self, size: int) -> None:
        """Fencing: a writer that the lock did not stop (on another machine, say) is noticed."""
        mine = os.fstat(self._descriptor)
        try:
            there = os.stat(self.chain.path)
        except OSError:
            there = None
        same = there is not None and (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)
        if mine.st_size != size or not same:
            self._broken = True
            raise RunError(
                f"{self.chain.book.noun} in {self.chain.path.parent} was changed or replaced by "
                f"another process: expected {size} bytes. Let only one run use this directory, and "
                "start it again."
            )


def read_chain(path: Path, book: Book) -> Chain:
    """Verify a file line by line, replaying it into ``book``. Changes nothing and takes no lock.

    Raises: RunError if it cannot be read, PrivacyError naming the line if it is damaged.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise RunError(
            f"Cannot read the {book.noun.lower()} {path}: {error.strerror}. Give another file, or "
            "restore it."
        ) from None
    try:
        content = _read_all(descriptor, path, book.noun)
    finally:
        os.close(descriptor)
    chain = Chain.read(content, path, book)
    if not chain.hashes:
        raise PrivacyError(
            f"{book.noun} {path} has no genesis: expected one in line 1. Restore the file."
        )
    return chain


def contains(hashes: Sequence[str], head: Sequence[Any]) -> bool:
    """Whether a chain with these hashes goes through ``head``, whatever ``head`` may be."""
    if not isinstance(head, (tuple, list)) or len(head) != 2 or type(head[0]) is not int:
        return False
    return 0 <= head[0] < len(hashes) and hashes[head[0]] == head[1]


def canonical(value: Any) -> bytes:
    """The one text of ``value`` in JSON. Raises: ValueError, TypeError for what is no JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def as_json(value: Any, what: str) -> Any:
    """``value`` as JSON gives it back. Raises: PrivacyError, calling it ``what``."""
    try:
        return json.loads(canonical(value))
    except (TypeError, ValueError, RecursionError):
        raise PrivacyError(
            f"{what} must hold finite numbers, texts, lists and dicts only."
        ) from None


def is_a(value: Any, wanted: Any) -> bool:
    """``isinstance``, where a bool is no number."""
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def is_hex(value: Any, digits: int) -> bool:
    """Whether ``value`` is a text of so many lower-case hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


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


def _line(body: Mapping[str, Any], previous_hash: str) -> tuple[bytes, str]:
    text = canonical(body)
    digest = hashlib.sha256(previous_hash.encode() + text).hexdigest()
    return b'{"body":' + text + b',"hash":"' + digest.encode() + b'"}\n', digest


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and infinities are no JSON


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)  # 1e999 is JSON, but no number we wrote
    return value


def _open_locked(path: Path, noun: str, wait_s: float) -> int:
    """Its descriptor; the file is made if need be. Raises: RunError, PrivacyError."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise RunError(
            f"Cannot open the {noun.lower()} {path}: {error.strerror}. Move it away, or use a new "
            "run.dir."
        ) from None
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            raise PrivacyError(f"{noun} {path} can be used by other users: run chmod 600 on it.")
        _lock(descriptor, path, noun, wait_s)
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _lock(descriptor: int, path: Path, noun: str, wait_s: float) -> None:
    patience = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= patience:
                raise RunError(
                    f"{noun} in {path.parent} is busy: another process holds it. Wait for it, or "
                    "stop it."
                ) from None
        except OSError as error:
            raise RunError(f"{noun} in {path.parent} cannot be locked: {error.strerror}.") from None
        time.sleep(_POLL_S)


def _read_all(descriptor: int, path: Path, noun: str) -> bytes:
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise RunError(
                f"{noun} {path} is not a regular file: move it away or use a new run.dir."
            )
        if facts.st_size > _MOST_BYTES:
            raise RunError(
                f"{noun} {path} has {facts.st_size} bytes: expected at most {_MOST_BYTES}."
            )
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise RunError(f"Cannot read the {noun.lower()} {path}: {error.strerror}.") from None


def _sync_folder(path: Path, noun: str) -> None:
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RunError(f"Cannot open {path.parent}: {error.strerror}.") from None
    try:
        os.fsync(folder)
    except OSError as error:
        raise RunError(f"{noun} in {path.parent} could not be written: {error.strerror}.") from None
    finally:
        os.close(folder)
