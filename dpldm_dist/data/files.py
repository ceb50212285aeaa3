"""Files that are whole or absent: written under another name, flushed to disk, then renamed.

Private files are readable by their owner only (0600), private folders 0700.
"""

from __future__ import annotations

import errno
import hashlib
import os
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


def write_file(path: Path, payload: bytes, *, private: bool) -> None:
    """Write ``payload`` to ``path``, whole or not at all. Raises: RunError."""
    with new_file(path, private=private) as file:
        file.write(payload)


def read_file(path: Path, *, most_bytes: int | None = None) -> bytes:
    """All bytes of ``path``. Raises: DataError if missing, unreadable or above ``most_bytes``."""
    try:
        size = path.stat().st_size
        if most_bytes is not None and size > most_bytes:
            raise DataError(f"{path} has {size} bytes, expected at most {most_bytes}.")
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing: restore it, or make it again.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise DataError(
            f"Cannot read {path}: {getattr(error, 'strerror', None) or error}."
        ) from None


def describe_file(path: Path) -> dict[str, int | str]:
    """``{"bytes": ..., "sha256": ...}`` of one file. Raises: DataError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": sha256}
    except FileNotFoundError:
        raise DataError(f"{path} is missing: restore it, or make it again.") from None
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from None


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_trouble(path: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return f"No space left to write {path}: free some, then give the same command again."
    return f"Cannot write {path}: {error.strerror or error}."
