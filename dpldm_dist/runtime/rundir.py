"""The directory of a run: what is public, private and released lies in three different places.

``public/`` holds what comes from public data, ``release/`` what the epsilon covers, ``private/``
(0700) the key, the ledger, checkpoints and everything else that no other user may read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dpldm_dist.config import Config
from dpldm_dist.errors import ConfigError, PrivacyError, RunError

KEY_BYTES = 32
LEAST_FREE_BYTES = 200 * 2**20
_CACHE = Path("~/.cache/dpldm_dist")
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_TRIES, _LOOK_S = 5, 0.02  # a look by `holder` is over long before


@dataclass(frozen=True)
class RunDir:
    """Names of everything in a run directory. ``root`` is made absolute."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).expanduser().absolute())

    @property
    def public(self) -> Path:
        return self.root / "public"

    @property
    def private(self) -> Path:
        return self.root / "private"

    @property
    def release(self) -> Path:
        return self.root / "release"

    @property
    def tensorboard(self) -> Path:
        return self.release / "tensorboard"

    @property
    def progress(self) -> Path:
        return self.private / "progress.json"

    @property
    def ledger(self) -> Path:
        return self.private / "ledger.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.private / "checkpoints"

    @property
    def key(self) -> Path:
        return self.private / "key"

    @property
    def autoencoder(self) -> Path:
        return self.public / "autoencoder"

    @property
    def public_model(self) -> Path:
        return self.public / "model"

    @property
    def microbatch(self) -> Path:
        """What ``run.microbatch = "auto"`` was settled to, and from which measurement."""
        return self.public / "microbatch.json"

    @property
    def gaussian(self) -> Path:
        """The released class means and covariance of the private latents, where there are any."""
        return self.release / "gaussian.safetensors"

    @property
    def telemetry(self) -> Path:
        """Released curves of private training: loss with error bars, signal beside noise."""
        return self.release / "telemetry.json"

    @property
    def diagnostics(self) -> Path:
        """Raw private values per step, where ``run.unsafe_diagnostics`` asks for them."""
        return self.private / "diagnostics"

    @property
    def released_model(self) -> Path:
        return self.release / "model"

    def create(self, *, least_free_bytes: int = LEAST_FREE_BYTES) -> RunDir:
        """Make the folders; an existing ``private/`` is closed to other users. Safe to repeat.

        Raises: RunError if the place cannot be written, or the disk is nearly full.
        """
        try:
            for folder in (self.root, self.public, self.release):
                folder.mkdir(parents=True, exist_ok=True)
            with private_files():
                self.private.mkdir(exist_ok=True)
            self.private.chmod(0o700)
        except OSError as error:
            raise RunError(
                f"Cannot make the run directory {self.root}: {error.strerror} "
                f"({error.filename}). Set run.dir to a folder that you can write."
            ) from None
        require_free(self.root, least_free_bytes)
        return self

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process; the lock goes with the process, however it ends.

        Raises: RunError, naming the process that holds it.
        """
        path = self.root / ".lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(f"Cannot open {path}: {error.strerror}.") from None
        try:
            _take(descriptor, self.root)
            os.ftruncate(descriptor, 0)
            holder = {"process": os.getpid(), "host": socket.gethostname()}
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> str | None:
        """Which process holds the directory now, in words; None if nobody does."""
        try:
            descriptor = os.open(self.root / ".lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return _holder(descriptor) if error.errno in _HELD else None
        finally:
            os.close(descriptor)
        return None

    def run_key(self, test_key_hex: str | None = None) -> bytes:
        """The run's secret, 32 bytes: read from ``private/key``, or drawn from the system once.

        Formal guarantees: made at most once, whoever asks first; the file is 0600; a key that
        other users could read is refused. A test key (hex) is used as given and never stored.
        Raises: PrivacyError, ConfigError.
        """
        if test_key_hex is not None:
            return _test_key(test_key_hex)
        if not self.key.exists():
            _make_key(self.key)
        return _read_key(self.key)

    def destroy_key(self) -> None:
        """Overwrite and remove ``private/key``: no noise of the run can be made again. Twice is
        fine. (A disk or a snapshot may keep older copies of a file; that is beyond a program.)"""
        if not self.key.exists():
            return
        try:
            with open(self.key, "r+b") as file:
                file.write(bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            for part in self.key.parent.glob("key.*.part"):  # of a start killed while it made one
                part.unlink()
            self.key.unlink()
            fsync_folder(self.key.parent)
        except OSError as error:
            raise RunError(f"Cannot remove the key {self.key}: {error.strerror}.") from None

    def share(self) -> None:
        """Give ``public/`` and ``release/`` the permissions that the user's umask allows.

        Stages run with umask 077; what they release becomes readable only here.
        """
        mask = _current_umask()
        for top in (self.public, self.release):
            for folder, _, files in os.walk(top):
                os.chmod(folder, 0o777 & ~mask)
                for name in files:
                    path = Path(folder, name)
                    if path.is_file() and not path.is_symlink():
                        os.chmod(path, 0o666 & ~mask)


def dataset_dir(
    config: Config,
    which: Literal["public", "private", "heldout"],
    what: Literal["images", "latents"],
) -> Path:
    """Folder of a data set's shards: as configured in ``data.<which>``, or inside the run; of one
    that is an address, where this machine keeps what it has of it."""
    configured: Path | str | None = getattr(getattr(config.data, which), what)
    if isinstance(configured, str):
        name = hashlib.sha256(configured.rstrip("/").encode()).hexdigest()[:32]
        return (config.data.cache_dir or _CACHE).expanduser().absolute() / name
    if configured is not None:
        return configured.expanduser().absolute()
    run = RunDir(config.run.dir)
    if which == "public":
        return run.public / what
    return run.private / (what if which == "private" else f"heldout-{what}")


def closed_dataset_dir(
    config: Config,
    which: Literal["public", "private", "heldout"],
    what: Literal["images", "latents"],
) -> Path:
    """:func:`dataset_dir` to read from: what is private in it is closed to other users.

    Raises: PrivacyError, naming the first file that is not, unless ``data.allow_shared_files``.
    """
    folder = dataset_dir(config, which, what)
    if which != "public" and not config.data.allow_shared_files:
        refuse_shared_files(folder)
    return folder


def refuse_shared_files(folder: Path) -> None:
    """Raises: PrivacyError if another user may use ``folder`` or anything in it."""
    for path in (folder, *sorted(folder.rglob("*"))):
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError:  # missing, or a link to nowhere: whoever reads it says so
            continue
        if mode & 0o077:
            raise PrivacyError(
                f"Other users may use {path} (mode {mode:04o}), which holds private data: give "
                f"`chmod -R go= {folder}`, or set data.allow_shared_files=true if they may."
            )


def dataset_budget_file(config: Config) -> Path:
    """The file of the budget that all runs on the private images share, if they share one."""
    configured = config.privacy.dataset_ledger if config.privacy is not None else None
    if configured is not None:
        return configured.expanduser().absolute()
    if isinstance(config.data.private.latents, str):  # a cache is no place for it
        return RunDir(config.run.dir).private / "budget.jsonl"
    return dataset_dir(config, "private", "latents").parent / "budget.jsonl"


@contextmanager
def private_files() -> Iterator[None]:
    """Within: new files are 0600 and new folders 0700 (umask 077, for the whole process)."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)


def require_free(folder: Path, least_bytes: int) -> None:
    """Raises: RunError if the disk of ``folder`` has less than ``least_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < least_bytes:
        raise RunError(
            f"Disk nearly full: {free / 2**20:.0f} MB free at {folder}, expected at least "
            f"{least_bytes / 2**20:.0f} MB. Free some space or set run.dir to another disk."
        )


def fsync_file(path: Path) -> None:
    """Make what was written to ``path`` survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make names that were created or renamed in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int, root: Path) -> None:
    try:
        for _ in range(_TRIES):
            with suppress(BlockingIOError):
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(_LOOK_S)  # somebody may just have asked who holds it
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            raise RunError(
                f"The file system of {root} does not lock files ({error.strerror}), so two runs "
                "could spend one budget twice: set run.dir to a file system with flock."
            ) from None
        raise RunError(
            f"Run directory {root} is busy: {_holder(descriptor)} holds it. Wait for it to end, "
            "or use another run.dir."
        ) from None


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(holder['process'])} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not yet written its name
        return "another process"


def _test_key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"run.unsafe_test_key: expected {2 * KEY_BYTES} hexadecimal digits.")
    return key


def _make_key(path: Path) -> None:
    """Link a complete file into place: nobody ever reads half a key, the first maker wins."""
    part = path.with_name(f"key.{os.urandom(8).hex()}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, os.urandom(KEY_BYTES))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with suppress(FileExistsError):
            os.link(part, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise RunError(f"Cannot make the key {path}: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)


def _read_key(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise PrivacyError(f"Cannot read the key {path}: {error.strerror}.") from None
    with os.fdopen(descriptor, "rb") as file:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        key = file.read(KEY_BYTES + 1)
    if mode & 0o077:
        raise PrivacyError(
            f"Other users may read the key {path} (mode {mode:04o}): expected 0600. If nobody "
            "has, give `chmod 600`; if somebody may have, start a new run.dir."
        )
    if len(key) != KEY_BYTES:
        raise PrivacyError(
            f"The key {path} is damaged: found {len(key)} bytes, expected {KEY_BYTES}. Restore "
            "it from a copy or start a new run.dir."
        )
    return key


def _current_umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
