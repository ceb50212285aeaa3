"""What a folder of artifacts holds: facts, sha256 of every file, the config, the parents.

``manifest.json`` is canonical JSON (sorted keys, no spaces) and carries its own sha256, so that a
damaged one is noticed. It is written last: a folder without it is unfinished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dpldm_dist import __version__
from dpldm_dist.config import refuse_other_settings
from dpldm_dist.data.files import describe_file, read_file, write_file
from dpldm_dist.errors import DataError, RunError

MANIFEST = "manifest.json"
KINDS = ("images", "latents", "autoencoder", "model", "samples", "evaluation", "report")
MOST_MANIFEST_BYTES = 1 << 30  # nobody's is larger; bounds what a hostile file makes us read
_FIELDS = {"kind", "facts", "files", "config", "parents"}
_MOST_SHOWN = 80  # characters of a name that a hostile file gives
Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Manifest:
    """Facts of one finished folder.

    kind: what it holds, one of ``KINDS``. facts: counts and shapes, JSON values.
    files: name relative to the folder -> {"bytes", "sha256"}. config: the settings that made it.
    parents: name -> digest of the manifests that it was made from.
    """

    kind: str
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    place: str = field(default="their manifest", compare=False)
    """Where it was read, for messages; no part of it."""

    @cached_property
    def digest(self) -> str:
        """sha256, in hex, of the canonical JSON of all fields."""
        return hashlib.sha256(canonical_json(self._body())).hexdigest()

    def _body(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FIELDS}

    def write(self, folder: Path, *, private: bool = False) -> None:
        """Write ``folder/manifest.json``, whole or not at all. Raises: RunError, DataError."""
        if self.kind not in KINDS:
            raise DataError(
                f"A manifest of kind {self.kind!r}: expected one of {', '.join(KINDS)}."
            )
        payload = canonical_json({**self._body(), "sha256": self.digest}) + b"\n"
        write_file(Path(folder) / MANIFEST, payload, private=private)

    @staticmethod
    def read(folder: Path, kind: str | None = None) -> Manifest:
        """The manifest of ``folder``; ``kind`` None takes any kind.

        Raises: DataError if it is missing, damaged or of another kind.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            what = kind or "files"
            raise DataError(f"{path} is missing: expected finished {what} there. Make them first.")
        manifest = _parse(path, read_file(path, most_bytes=MOST_MANIFEST_BYTES))
        if kind is not None and manifest.kind != kind:
            raise DataError(
                f"{path} describes {manifest.kind}, expected {kind}: give another folder."
            )
        return manifest

    def verify(
        self, folder: Path, names: Iterable[str] | None = None, *, contents: bool = True
    ) -> None:
        """Compare files (all, or ``names``) with the manifest; without ``contents``, sizes only.

        Raises: DataError with the name of the first file that is missing or differs.
        """
        for name in self.files if names is None else names:
            verify_file(Path(folder) / name, self.file(name), contents=contents)

    def file(self, name: str) -> dict[str, Any]:
        """``{"bytes", "sha256"}`` of a file. Raises: DataError if the manifest does not list it."""
        if name not in self.files:
            raise DataError(
                f"{name[:_MOST_SHOWN]} is not listed in {self.place}: make the {self.kind} again."
            )
        return self.files[name]

    def fact(self, name: str, kind: type[Fact]) -> Fact:
        """The fact ``name``, a value of exactly type ``kind``. Raises: DataError if it is none."""
        value = self.facts.get(name)
        if type(value) is not kind:
            raise DataError(
                f"No {name} of type {kind.__name__} stands in {self.place}: make the {self.kind} "
                "again."
            )
        return value


def finished_manifest(
    folder: Path, kind: str, *, settings: dict[str, Any], parents: dict[str, str]
) -> Manifest | None:
    """What a finished stage left in ``folder``; None if it is not finished.

    Raises: RunError if it was made with other ``settings`` or from other ``parents``.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = Manifest.read(folder, kind)
    refuse_other_settings(manifest.config, settings, folder)
    for name, digest in parents.items():
        if manifest.parents.get(name) != digest:
            raise RunError(
                f"{folder} was made from other {name}: use a new run.dir, or remove that folder to "
                "make it again."
            )
    return manifest


def software() -> dict[str, str]:
    """Versions on which weights depend, for the facts of a manifest."""
    return {"dpldm_dist": __version__, "torch": version("torch")}


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """name -> {"bytes", "sha256"} for files of ``folder``. Raises: DataError."""
    return {name: describe_file(Path(folder) / name) for name in sorted(names)}


def verify_file(path: Path, expected: dict[str, Any], *, contents: bool = True) -> None:
    """Stop if ``path`` is not the file that was described. Raises: DataError with its name, without
    its size or hash, which would tell of private records.
    """
    try:
        size = path.stat().st_size
    except OSError:
        raise DataError(f"{path} is missing: restore it, or make it again.") from None
    if size != expected["bytes"]:
        raise DataError(
            f"{path} is damaged: found a file of another size than its manifest names. Restore "
            "it, or make it again."
        )
    if contents:
        _require_digest(path, str(describe_file(path)["sha256"]), expected)


def read_verified(path: Path, expected: dict[str, Any]) -> bytes:
    """All bytes of ``path``, which are those that were described. Raises: DataError as
    :func:`verify_file` does."""
    verify_file(path, expected, contents=False)
    payload = read_file(path)
    _require_digest(path, hashlib.sha256(payload).hexdigest(), expected)
    return payload


def whole_number(value: Any, *, least: int = 0, most: int = 2**40) -> int:
    """``value`` if it is an integer in that range and no truth value. Raises: ValueError."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(value)
    return value


def texts(values: Any) -> tuple[str, ...]:
    """``values`` if it is a list of texts. Raises: ValueError."""
    if type(values) is not list or not all(type(value) is str for value in values):
        raise ValueError(values)
    return tuple(values)


def _require_digest(path: Path, found: str, expected: dict[str, Any]) -> None:
    if found != expected["sha256"]:
        raise DataError(
            f"{path} is damaged: its content is not what its manifest names. Restore it, or make "
            "it again."
        )


def _parse(path: Path, payload: bytes) -> Manifest:
    try:
        tree = json.loads(payload)
        claimed = tree.pop("sha256")
        if tree.keys() != _FIELDS:
            raise KeyError
        manifest = Manifest(**tree, place=str(path))
        sound = manifest.digest == claimed
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"{path} is not a manifest: restore it, or make it again.") from None
    if not sound:
        raise DataError(
            f"{path} is damaged: its content is not what its own sha256 says. Restore it, or make "
            "it again."
        )
    if not _well_formed(manifest):
        raise DataError(f"{path} is not a manifest of this package: make it again.")
    return manifest


def _well_formed(manifest: Manifest) -> bool:
    sections = (manifest.facts, manifest.files, manifest.config, manifest.parents)
    if manifest.kind not in KINDS or not all(isinstance(part, dict) for part in sections):
        return False
    return all(isinstance(digest, str) for digest in manifest.parents.values()) and all(
        _stays_inside(name)
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        for name, entry in manifest.files.items()
    )


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and name.isprintable()  # a message with it stays one line
