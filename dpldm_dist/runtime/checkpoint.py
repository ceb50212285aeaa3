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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dpldm_dist.errors import RunError
from dpldm_dist.runtime.rundir import fsync_folder, private_files

_NAME = re.compile(r"(\d{8})-step-(\d{8})")
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
    """The checkpoints in ``folder``, of which the newest ``keep`` stay. One writer at a time."""

    def __init__(self, folder: Path, keep: int):
        if keep < 1:
            raise ValueError(f"keep = {keep}: expected at least 1")
        self._folder = Path(folder)
        self._keep = keep

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove those beyond ``keep``; its folder.

        Formal guarantees: whenever the process or the machine stops, ``latest`` finds this
        checkpoint whole, or the one before. Files are 0600 and folders 0700. The newest save
        counts, also if an older one has a higher step.
        Raises: RunError if the disk is full or cannot be written; the older ones stay usable.
        """
        contents = {
            _TENSORS: safetensors.torch.save({name: _copy(t) for name, t in tensors.items()}),
            _FACTS: _json({"step": step, "facts": dict(facts)}),
        }
        contents[_MANIFEST] = _json(_manifest(contents))
        try:
            with private_files():
                self._folder.mkdir(parents=True, exist_ok=True)
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
        for old in [*saved, path][: -self._keep]:
            self._remove(old)
        return path

    def _remove(self, path: Path) -> None:
        gone = path.with_name(f".gone-{path.name}")
        path.rename(gone)  # first: a half removed folder must not look like a checkpoint
        shutil.rmtree(gone)

    def _clear_leftovers(self) -> None:
        for pattern in (".part-*", ".gone-*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


class _Damaged(Exception):
    """In a few words, without content: why a checkpoint cannot be used."""


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


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
    contents = {name: _read_file(path / name) for name in (_TENSORS, _FACTS)}
    if _read_file(path / _MANIFEST) != _json(_manifest(contents)):
        raise _Damaged("its files are not those of its manifest")
    facts = json.loads(contents[_FACTS])
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[2]) != facts["step"]:
        raise _Damaged("its name does not belong to its content")
    return Checkpoint(facts["step"], safetensors.torch.load(contents[_TENSORS]), facts["facts"])


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _Damaged(f"{path.name}: {error.strerror}") from None
