"""Data sets that lie elsewhere (S3, GCS, HTTP, ...): their files, fetched into a cache folder.

A cache folder belongs to one node and one user and is shared by all workers there. It holds one
folder per data set, named by a digest of its address. This is the only importer of fsspec, which
takes credentials from the environment. What a private data set holds lies in the cache in plain:
its folders are 0700, its files 0600.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from dpldm_dist.data.files import is_full_disk, make_folder, no_space
from dpldm_dist.data.manifest import MANIFEST, MOST_MANIFEST_BYTES, Manifest, verify_file
from dpldm_dist.errors import DataError, RunError

_LOCKS = 64  # files that share a lock wait for each other
_TRIES = 3
_WAIT_S = 1.0  # before the second try; twice as long before the third
_AT_ONCE = 8  # files that one worker fetches at the same time
_FREED = 0.9  # share of the cache that stays when it has become too large
_PARTIAL = ".partial"
_COUNT_BYTES = 20


class Mirror:
    """The files of one data set at ``url``, in ``folder`` of a cache of at most ``most_bytes``.

    Making one fetches the manifest. ``folder`` is a folder inside the cache.

    Formal guarantees: a file takes its name only when it is whole and has the size and sha256 that
    it was asked for with; nothing else is ever found under that name, whoever is killed. Folders
    are 0700 and files 0600. The files of all mirrors of the cache together have at most
    ``most_bytes``, or are one file; the oldest go first. One worker of a node fetches a file, the
    others wait for it. No message shows more of an address than the config does.
    Raises: DataError, naming the file; RunError if the disk is full or cannot be written.
    """

    def __init__(self, url: str, folder: Path, *, most_bytes: int):
        self.url = url.rstrip("/")
        self.folder = Path(folder).absolute()
        self._cache = self.folder.parent
        self._most_bytes = most_bytes
        make_folder(self._cache, private=True)
        make_folder(self.folder, private=True)
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # a backend that is not installed, or refuses its settings
            raise DataError(
                f"Cannot open {self.url}: {type(error).__name__}. Install what fsspec needs for "
                "this kind of address (s3fs, gcsfs, ...), or copy the data set to a folder."
            ) from None
        self._fetch_manifest()

    def fetch(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Files ``{name: {"bytes", "sha256"}}`` are in the folder afterwards (unless the cache is
        too small to hold all of them at once). Those that are there already are not read."""
        missing = [name for name in wanted if not self._is_there(name, wanted[name]["bytes"])]
        if len(missing) == 1:
            self._fetch_one(missing[0], wanted[missing[0]])
        elif missing:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda name: self._fetch_one(name, wanted[name]), missing))

    def fetch_again(self, name: str, expected: Mapping[str, Any]) -> None:
        """Replace a file whose content is not what it should be."""
        with self._locked(name):
            try:
                verify_file(self.folder / name, dict(expected))  # another worker was faster
                return
            except DataError:
                self._download(name, expected)

    def _is_there(self, name: str, size: int) -> bool:
        try:
            return (self.folder / name).stat().st_size == size
        except OSError:
            return False

    def _fetch_one(self, name: str, expected: Mapping[str, Any]) -> None:
        if expected["bytes"] > self._most_bytes:
            raise DataError(f"{name} of {self.url} is larger than the cache: raise data.cache_gb.")
        with self._locked(name):
            if not self._is_there(name, expected["bytes"]):
                self._download(name, expected)

    def _download(self, name: str, expected: Mapping[str, Any]) -> None:
        """Fetch a file that this process has the lock of, and give it its name."""
        path = self.folder / name
        make_folder(path.parent, private=True)
        partial = path.with_name(f".{path.name}{_PARTIAL}")
        try:
            self._transfer(name, partial, most_bytes=expected["bytes"], expected=expected)
            with _lock(self._cache / ".lock") as book:
                self._make_room(expected["bytes"], book)
                partial.replace(path)
        except OSError as error:
            raise _disk_trouble(path, error) from None
        finally:
            with suppress(OSError):
                partial.unlink()

    def _transfer(
        self,
        name: str,
        partial: Path,
        *,
        most_bytes: int,
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        """Copy a file to ``partial``, and again where the network or the content was bad."""
        for number in range(_TRIES):
            if number:
                time.sleep(number * _WAIT_S)
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
            try:
                self._files.get_file(
                    f"{self._root}/{name}", str(partial), callback=_Bounded(most_bytes)
                )
            except FileNotFoundError:
                reason = "it is missing there"
                break
            except Exception as error:  # of whichever library the address needs
                if isinstance(error, OSError) and is_full_disk(error):
                    raise
                reason = type(error).__name__  # its text may hold a signed address
                continue
            if expected is None or _content_is(partial, expected):
                return
            reason = "its content is not what the manifest names"
        raise DataError(
            f"Cannot fetch {name} of {self.url}: {reason}. Restore it there, or mend the network "
            "or the credentials in the environment."
        )

    def _fetch_manifest(self) -> None:
        """The manifest as it is now; it is small, and says what everything else must be."""
        partial = self.folder / f".{MANIFEST}.{os.getpid()}{_PARTIAL}"
        try:
            self._transfer(MANIFEST, partial, most_bytes=MOST_MANIFEST_BYTES)
            partial.replace(self.folder / MANIFEST)
        except OSError as error:
            raise _disk_trouble(partial, error) from None
        finally:
            with suppress(OSError):
                partial.unlink()

    def _make_room(self, wanted: int, book: int) -> None:
        """Count ``wanted`` more bytes; when that is too much, drop the oldest files. ``book`` is
        the locked file that holds the count; one that nobody wrote, or half of one, is made anew.
        """
        text = os.pread(book, _COUNT_BYTES, 0)
        used = int(text) + wanted if len(text) == _COUNT_BYTES and text.isdigit() else None
        if used is None or used > self._most_bytes:
            used = self._evict(int(_FREED * self._most_bytes) - wanted) + wanted
        os.pwrite(book, b"%0*d" % (_COUNT_BYTES, used), 0)

    def _evict(self, most_bytes: int) -> int:
        """Drop the oldest files until at most ``most_bytes`` are left; how many are left."""
        found = sorted(_cached_files(self._cache), key=lambda entry: entry[1].st_mtime_ns)
        left = sum(facts.st_size for _, facts in found)
        for path, facts in found:
            if left <= max(0, most_bytes):
                break
            with suppress(OSError):
                path.unlink()
            left -= facts.st_size
        return left

    def _locked(self, name: str) -> AbstractContextManager[int]:
        number = hashlib.sha256(name.encode()).digest()[0] % _LOCKS
        return _lock(self.folder / f".lock-{number:02d}")


class _Bounded(Callback):
    """Ends a transfer that brings more bytes than there should be."""

    def __init__(self, most_bytes: int):
        super().__init__()
        self._most_bytes = most_bytes

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._most_bytes:
            raise ValueError("more bytes than expected")


def folder_and_mirror(place: Path | Mirror) -> tuple[Path, Mirror | None]:
    """Where the files of a data set are on this node, and what brings them there."""
    if isinstance(place, Mirror):
        return place.folder, place
    return Path(place).absolute(), None


def brought(folder: Path, mirror: Mirror | None, name: str, manifest: Manifest) -> Path:
    """The path of a file of a data set, fetched and found to be right where it has a mirror."""
    if mirror is not None:
        facts = manifest.file(name)
        mirror.fetch({name: facts})
        try:
            verify_file(folder / name, facts)
        except DataError:
            mirror.fetch_again(name, facts)
    return folder / name


def _content_is(path: Path, expected: Mapping[str, Any]) -> bool:
    try:
        verify_file(path, dict(expected))
    except DataError:
        return False
    return True


def _cached_files(cache: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Shards and tables of all mirrors; manifests, locks and unfinished files stay."""
    for path in cache.rglob("*"):
        if path.name.startswith(".") or path.name == MANIFEST:
            continue
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                yield path, path.stat()


@contextmanager
def _lock(path: Path) -> Iterator[int]:
    """Hold a lock against all threads and processes of the node; it goes with its holder. Gives the
    descriptor of its file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise RunError(
            f"Cannot lock {path}: {error.strerror}. Set data.cache_dir to a disk of this machine."
        ) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _disk_trouble(path: Path, error: OSError) -> RunError:
    if is_full_disk(error):
        return RunError(no_space(path))
    return RunError(f"Cannot write {path}: {error.strerror or error}. Set data.cache_dir.")
