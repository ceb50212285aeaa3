"""Images that lie in WebDataset tars of the user: ``KEY.png`` with ``KEY.cls`` or ``KEY.json``.

The tars are only listed and read; nothing is unpacked, unpickled or opened through a shell.
"""

from __future__ import annotations

import glob
import itertools
import json
import math
import posixpath
import re
import tarfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from dpldm_dist.data.files import opened
from dpldm_dist.data.picture import SUFFIXES, SourceImage, decode_image
from dpldm_dist.errors import DataError

_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}(/[A-Za-z0-9_-]{1,128})*")
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}", re.ASCII)
_MOST_TARS = 1_000_000
_MOST_TEXT_BYTES = 1 << 20


@dataclass
class _Found:
    """The members of one key, while a tar is listed."""

    image: tarfile.TarInfo | None = None
    texts: dict[str, str] = field(default_factory=dict)


def tar_paths(pattern: str) -> list[Path]:
    """The tars that a pattern names: ``{000..003}`` counts, ``*`` and ``?`` match names on disk.

    Raises: DataError if a counted tar is missing or nothing matches.
    """
    ranges = _RANGE.findall(pattern)
    choices = [_counted(first, last) for first, last in ranges]
    if math.prod(len(numbers) for numbers in choices) > _MOST_TARS:
        raise DataError(f"{pattern} counts more than {_MOST_TARS} files: expected fewer.")
    pieces = _RANGE.split(pattern)[::3]
    paths = []
    for numbers in itertools.product(*choices):
        text = "".join(itertools.chain(*itertools.zip_longest(pieces, numbers, fillvalue="")))
        paths.extend(sorted(glob.glob(text)) if glob.has_magic(text) else [text])
    if not paths:
        raise DataError(f"No file matches {pattern}: expected WebDataset tars.")
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"{path} is missing: expected every tar of {pattern}.")
    return [Path(path) for path in paths]


def tar_images(paths: list[Path]) -> list[SourceImage]:
    """The images of WebDataset tars, in their order.

    Raises: DataError, naming the tar, for a damaged one, a key that is repeated anywhere or leaves
    its folder, and an image without a label.
    """
    images, seen = [], set()
    for path in paths:
        for key, found in _listed(path).items():
            if found.image is None:
                continue
            if key in seen:
                raise DataError(
                    f"{path} repeats a key of the data set ({key}): expected every key once."
                )
            seen.add(key)
            images.append(_source_image(path, key, found.image, found.texts))
    return images


def _counted(first: str, last: str) -> list[str]:
    count = int(last) - int(first) + 1
    if not 0 < count <= _MOST_TARS:
        raise DataError(f"{{{first}..{last}}}: expected a range that counts up.")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]


def _listed(path: Path) -> dict[str, _Found]:
    records: dict[str, _Found] = {}
    try:
        with opened(path) as file:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    _note(path, tar, member, records)
                end = tar.offset
            _require_end(path, file, end)
    except DataError:
        raise
    except Exception as error:  # decoders of damaged archives raise anything
        raise DataError(
            f"{path} is not a whole, uncompressed tar ({type(error).__name__}): make it again."
        ) from None
    if not any(found.image for found in records.values()):
        raise DataError(f"{path} holds no image: expected members such as KEY.png and KEY.cls.")
    return records


def _note(
    path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, records: dict[str, _Found]
) -> None:
    if member.isdir():
        return
    key, _, extension = _split(member.name)
    if not member.isreg() or member.issparse() or not _KEY.fullmatch(key):
        raise DataError(
            f"{path} has a member {member.name[:80]!r} that is no plain file with a key of "
            "letters, digits, - and _: make the tar again."
        )
    found = records.setdefault(key, _Found())
    if f".{extension.lower()}" in SUFFIXES:
        if found.image is not None:
            raise DataError(f"{path} holds two images under the key {key}: expected one.")
        found.image = member
    elif extension.lower() in ("cls", "json", "txt"):
        if extension.lower() in found.texts or member.size > _MOST_TEXT_BYTES:
            raise DataError(
                f"{path} repeats {member.name[:80]!r}, or it is too long: make the tar again."
            )
        file = tar.extractfile(member)
        found.texts[extension.lower()] = (file.read() if file else b"").decode().strip()


def _split(name: str) -> tuple[str, str, str]:
    """``a/b.seg.png`` -> key ``a/b``, extension ``seg.png``: the key ends at the first dot."""
    folder, base = posixpath.split(name)
    stem, dot, extension = base.partition(".")
    parts = PurePosixPath(folder).parts
    return str(PurePosixPath(*parts, stem)) if stem else "", dot, extension


def _require_end(path: Path, file: BinaryIO, offset: int) -> None:
    """Only zeros from ``offset`` on, two blocks at least: a tar that is cut between members, or
    damaged at one, still lists what is before."""
    file.seek(offset)
    size = 0
    while chunk := file.read(1 << 20):
        size += len(chunk)
        if any(chunk):
            raise DataError(
                f"{path} goes on after its end or is damaged there: make the tar again."
            )
    if size < 1024:
        raise DataError(f"{path} is cut off: expected an end mark. Make the tar again.")


def _source_image(
    path: Path, key: str, image: tarfile.TarInfo, texts: dict[str, str]
) -> SourceImage:
    facts = _facts(path, key, texts["json"]) if "json" in texts else {}
    label = texts.get("cls", facts.get("label"))
    if label is None or isinstance(label, (dict, list)) or str(label) == "":
        raise DataError(
            f'{path}: {key} has no label: expected {key}.cls, or "label" in {key}.json.'
        )
    caption = facts.get("caption", texts.get("txt"))
    unit = facts.get("unit")
    if isinstance(caption, (dict, list)) or isinstance(unit, (dict, list, bool, float)):
        raise DataError(f"{path}: {key}.json has a caption or unit that is none: expected texts.")
    name = f"{path}:{image.name}"
    return SourceImage(
        name=name,
        label=str(label),
        read=partial(_read_member, path, image.offset_data, image.size, name),
        caption=None if caption is None else str(caption),
        unit=None if unit is None else str(unit),
    )


def _facts(path: Path, key: str, text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise DataError(f"{path}: {key}.json is not a JSON object: make the tar again.")
    return facts


def _read_member(path: Path, offset: int, size: int, name: str) -> np.ndarray:
    with opened(path) as file:
        file.seek(offset)
        return decode_image(file.read(size), name)
