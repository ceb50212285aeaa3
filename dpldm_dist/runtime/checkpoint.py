"""Checkpoints that a crash cannot tear and bit rot cannot pass off as good.

A checkpoint is a folder ``<number>-step-<step>`` of ``tensors.safetensors``, ``facts.json`` and,
written last, ``manifest.json`` with the sha256 of both. It gets its name by one rename after
everything is on disk. Nothing is ever overwritten, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dpldm_dist.errors import RunError
from dpldm_dist.runtime.rundir import fsync_folder, private_files

_NAME = re.compile(r"(\d{8})-step-(\d{8})")
_MOST_MANIFEST_BYTES = 4096
_TENSORS, _FACTS, _MANIFEST = "tensors.safetensors", "facts.json", "manifest.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at ``step``; ``skipped`` says in words which newer ones are damaged."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    skipped: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints in ``folder``, of which the newest ``keep`` stay, not counting any that
    ``latest`` found damaged. One writer at a time."""

    def __init__(self, folder: Path, keep: int):
        if keep < 1:
            raise ValueError(f"keep = {keep}: expected at least 1")
        self._folder = Path(folder)
        self._keep = keep
        self._damaged: set[Path] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove those beyond ``keep``; its folder.

        Formal guarantees: whenever the process or the machine stops, ``latest`` finds this
        checkpoint whole, or the one before. Files are 0600 and folders 0700. The newest save
        counts, also if an older one has a higher step. Older ones go only when this one is durable.
        Raises: RunError if the disk is full or cannot be written; the older ones stay usable.
        """
        contents = {
            _TENSORS: _serialized({name: _copy(t) for name, t in tensors.items()}),
            _FACTS: _json({"step": step, "facts": dict(facts)}),
        }
        contents[_MANIFEST] = _json(_manifest(contents))
        try:
            with private_files():
                if not self._folder.is_dir():
                    self._folder.mkdir(parents=True)
                    fsync_folder(self._folder.parent)
                self._clear_leftovers()
                return self._write(step, contents)
        except OSError as error:
            self._clear_leftovers()
            raise RunError(
                f"Cannot write a checkpoint to {self._folder}: {error.strerror}. The one before "
                "is intact: free some space and give the same command again."
            ) from None

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None if there never was one.

        A damaged newer one is passed over, and a warning says so.
        Raises: RunError if there are checkpoints and all are damaged.
        """
        skipped: list[str] = []
        for path in reversed(self._saved()):
            try:
                checkpoint = _read(path)
            except _Damaged as damage:
                self._damaged.add(path)
                skipped.append(f"Checkpoint {path} is damaged ({damage}): passed over.")
                _log.warning(skipped[-1])
                continue
            return Checkpoint(checkpoint.step, checkpoint.tensors, checkpoint.facts, tuple(skipped))
        if skipped:
            raise RunError(
                f"All {len(skipped)} checkpoints in {self._folder} are damaged. Restore one from "
                "a copy, or remove the folder to start again from the first step."
            )
        return None

    def history(self) -> Iterator[Checkpoint]:
        """All checkpoints that are kept, oldest first. Raises: RunError if one is damaged."""
        for path in self._saved():
            try:
                yield _read(path)
            except _Damaged as damage:
                raise RunError(f"Checkpoint {path} is damaged ({damage}): restore it.") from None

    def _saved(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))

    def _write(self, step: int, contents: Mapping[str, bytes]) -> Path:
        saved = self._saved()
        number = int(saved[-1].name[:8]) + 1 if saved else 1
        part = self._folder / f".part-{number:08d}"
        part.mkdir()
        for name, content in contents.items():
            _write_durably(part / name, content)
        fsync_folder(part)
        path = self._folder / f"{number:08d}-step-{step:08d}"
        part.rename(path)
        fsync_folder(self._folder)
        usable = [old for old in [*saved, path] if old not in self._damaged]
        for old in [*usable[: -self._keep], *(set(saved) & self._damaged)]:
            self._remove(old)
        return path

    def _remove(self, path: Path) -> None:
        """What cannot be removed now (a network disk keeps files that are open) goes later."""
        gone = path.with_name(f".gone-{path.name}")
        with suppress(OSError):
            path.rename(gone)  # first: a half removed folder must not look like a checkpoint
        shutil.rmtree(gone, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        for pattern in (".part-*", ".gone-*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


class _Damaged(Exception):
    """In a few words, without content: why a checkpoint cannot be used."""


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _serialized(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file. The writer for torch leaves a ctypes type behind for every length that it
    meets, so it is taken only for what numpy does not know."""
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors.values()):
        return safetensors.torch.save(dict(tensors))
    return safetensors.numpy.save({name: tensor.numpy() for name, tensor in tensors.items()})


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _manifest(contents: Mapping[str, bytes]) -> dict[str, Any]:
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    return {"files": files, "format": 1}


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Checkpoint:
    manifest = _read_file(path / _MANIFEST, most_bytes=_MOST_MANIFEST_BYTES)
    contents = {
        name: _read_file(path / name, most_bytes=size) for name, size in _sizes(manifest).items()
    }
    if manifest != _json(_manifest(contents)):
        raise _Damaged("its files are not those of its manifest")
    match = _NAME.fullmatch(path.name)
    try:
        tree = json.loads(contents[_FACTS])
        step, facts = tree["step"], tree["facts"]
        tensors = safetensors.torch.load(contents[_TENSORS])
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        raise _Damaged("its content is none of a checkpoint") from None
    if match is None or type(step) is not int or int(match[2]) != step or type(facts) is not dict:
        raise _Damaged("its name does not belong to its content")
    return Checkpoint(step, tensors, facts)


def _sizes(manifest: bytes) -> dict[str, int]:
    """Bytes of each file as the manifest names them, so that no more is read."""
    try:
        files = json.loads(manifest)["files"]
        sizes = {name: files[name]["bytes"] for name in (_TENSORS, _FACTS)}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _Damaged("its manifest cannot be read") from None
    if not all(type(size) is int and 0 <= size < 2**50 for size in sizes.values()):
        raise _Damaged("its manifest cannot be read")
    return sizes


def _read_file(path: Path, *, most_bytes: int) -> bytes:
    """A plain file of at most ``most_bytes``: a link, a pipe or a device is none of ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > most_bytes:
                raise _Damaged(f"{path.name} is not a file of the size in its manifest")
            return file.read(most_bytes)
    except OSError as error:
        raise _Damaged(f"{path.name}: {error.strerror}") from None
