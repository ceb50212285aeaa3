"""Files that are whole or absent: written under another name, flushed to disk, then renamed.

Private files are readable by their owner only (0600), private folders 0700.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dpldm_dist.errors import DataError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_folder(folder: Path, *, private: bool) -> None:
    """Make ``folder`` and its parents; the new ones are 0700 when ``private``.

    Raises: RunError if the folder cannot be made.
    """
    try:
        missing = [part for part in (folder, *folder.parents) if not part.exists()]
        for part in reversed(missing):
            part.mkdir(mode=0o700 if private else 0o755, exist_ok=True)
        if private:
            folder.chmod(0o700)
    except OSError as error:
        raise RunError(_write_trouble(folder, error)) from None


@contextmanager
def new_file(path: Path, *, private: bool) -> Iterator[BinaryIO]:
    """A binary file to write; ``path`` holds all of it afterwards, or what it held before.

    Formal guarantees: the content is on disk before the name is; after any exception, and after a
    full disk, ``path`` is untouched and nothing is left beside it.
    Raises: RunError if the disk is full or the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", opener=_owner_only if private else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(_write_trouble(path, error)) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def clear_partials(folder: Path) -> None:
    """Remove what was being written below ``folder`` by processes that were killed.

    For a folder with one writer at a time, before it writes.
    """
    for path in folder.rglob(".*.partial"):
        with suppress(OSError):
            path.unlink()


def write_file(path: Path, payload: bytes, *, private: bool) -> None:
    """Write ``payload`` to ``path``, whole or not at all. Raises: RunError."""
    with new_file(path, private=private) as file:
        file.write(payload)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A binary file to read.

    Formal guarantees: it is a regular file, so that neither opening nor reading waits for ever (as
    with a pipe) or finds no end (as with a device). Raises: DataError, also for an OSError within.
    """
    if "\0" in str(path):
        raise DataError(f"{str(path)!r} is no name of a file: give another one.")
    try:
        # without O_NONBLOCK, a pipe that nobody writes to would hold us here
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{path} is not a regular file: remove it, or restore the file.")
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} is missing: restore it, or make it again.") from None
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror or error}. Restore it, or make it again."
        ) from None


def read_file(path: Path, *, most_bytes: int | None = None) -> bytes:
    """All bytes of ``path``. Raises: DataError if missing, unreadable or above ``most_bytes``."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most_bytes is not None and size > most_bytes:
            raise DataError(
                f"{path} has {size} bytes, expected at most {most_bytes}: restore it, or make it "
                "again."
            )
        return file.read()


def describe_file(path: Path) -> dict[str, int | str]:
    """``{"bytes": ..., "sha256": ...}`` of one file. Raises: DataError if it cannot be read."""
    with opened(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256}


def require_memory(path: Path, wanted_bytes: int) -> None:
    """Raises: DataError if what ``path`` says it unpacks to is more than this machine's memory."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted_bytes > total:
        raise DataError(
            f"{path} would unpack to {wanted_bytes / 2**30:.1f} GB, this machine has "
            f"{total / 2**30:.1f} GB of memory: split it, or mend its header."
        )


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full_disk(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, has no room left."""
    return error.errno in _FULL


def no_space(path: Path) -> str:
    """What to say then."""
    return f"No space left to write {path}: free some, then give the same command again."


def _write_trouble(path: Path, error: OSError) -> str:
    if is_full_disk(error):
        return no_space(path)
    return f"Cannot write {path}: {error.strerror or error}."
