"""Image shards: WebDataset tars, written reproducibly, read with every byte verified.

A record ``KEY`` is two members: ``KEY.images.npy``, uint8 (m, H, W, C), and ``KEY.json`` with
``labels`` (class numbers, one per image) and, where there are any, ``captions``. This is the only
importer of webdataset. Its openers (``pipe:``, environment rewrites) and decoders (pickle) are
never reached: it is handed open files and gives back bytes.
Shapes: N images, m images of a record, H, W, C of an image, B images of a batch.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import webdataset

from dpldm_dist.data.files import new_file, opened
from dpldm_dist.data.manifest import (
    Manifest,
    canonical_json,
    read_verified,
    texts,
    verify_file,
    whole_number,
)
from dpldm_dist.data.npy import npy_array, npy_bytes
from dpldm_dist.data.remote import Mirror, brought, folder_and_mirror
from dpldm_dist.errors import DataError

KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # with its extension it fits a plain tar header
_BLOCK = 512
_MAGIC = b"ustar\x0000"
Item = TypeVar("Item")


@dataclass(frozen=True)
class ImageRecord:
    """One unit of privacy: its images, uint8 (m, H, W, C), m class numbers, captions if any."""

    key: str
    images: np.ndarray
    labels: tuple[int, ...]
    captions: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Member:
    """One file of a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


# --- writing ------------------------------------------------------------------------------------


def write_tar(path: Path, records: Iterable[tuple[str, dict[str, bytes]]], *, private: bool) -> int:
    """Write (key, {extension: bytes}) records as a WebDataset tar; the number of records.

    Formal guarantees: equal input gives equal bytes (no times, users or hosts); the file is whole
    or absent. Raises: DataError for an unusable or repeated key, RunError if the disk is full.
    """
    seen: set[str] = set()
    with new_file(path, private=private) as file, _tar_writer(file) as tar:
        for key, members in records:
            if not KEY.fullmatch(key) or key in seen:
                raise DataError(f"{path.name}: a key is repeated or not of the form {KEY.pattern}.")
            seen.add(key)
            tar.write({"__key__": key, **members})
    return len(seen)


def write_image_shard(path: Path, records: Iterable[ImageRecord], *, private: bool) -> int:
    """Write records as one image shard; the number of records. Raises: DataError, RunError."""
    return write_tar(path, ((record.key, _members(record)) for record in records), private=private)


def _members(record: ImageRecord) -> dict[str, bytes]:
    facts: dict[str, Any] = {"labels": list(record.labels)}
    if record.captions is not None:
        facts["captions"] = list(record.captions)
    return {"images.npy": npy_bytes(record.images), "json": canonical_json(facts)}


def _tar_writer(file: BinaryIO) -> webdataset.TarWriter:
    return webdataset.TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False)


# --- reading ------------------------------------------------------------------------------------


def scan_tar(buffer: bytes | memoryview | np.ndarray, name: str) -> list[Member]:
    """All members of a tar of ours, in order. ``name`` is for messages.

    Raises: DataError for anything but plain files with plain headers, each whole and with a right
    checksum, and an end mark with nothing behind it but zeros.
    """
    view = memoryview(buffer)
    members, at = [], 0
    while True:
        header = bytes(view[at : at + _BLOCK])
        if len(header) < _BLOCK:
            raise DataError(f"{name} is cut off: expected an end mark. Make the shard again.")
        if not any(header):
            break
        member = _member(header, at + _BLOCK, name)
        at = member.offset + -(-member.size // _BLOCK) * _BLOCK
        if at > len(view):
            raise DataError(f"{name} is cut off within a member. Make the shard again.")
        members.append(member)
    if len(view) - at < 2 * _BLOCK or any(bytes(view[at:])):
        raise DataError(f"{name} does not end with the mark of a tar. Make the shard again.")
    return members


def _member(header: bytes, offset: int, name: str) -> Member:
    try:
        checksum = int(header[148:156].rstrip(b"\x00 "), 8)
        size = int(header[124:136].rstrip(b"\x00 "), 8)
        title = header[:100].rstrip(b"\x00").decode("ascii")
    except ValueError:
        raise DataError(f"{name} has a damaged tar header. Make the shard again.") from None
    right = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    plain = header[156:157] == b"0" and header[257:265] == _MAGIC and not any(header[345:500])
    if checksum != right or size < 0 or not plain:
        raise DataError(f"{name} has a damaged tar header. Make the shard again.")
    return Member(title, offset, size)


class ImageShards:
    """A finished folder of image shards, or the mirror of one that lies elsewhere.

    Formal guarantees: a shard is read only if its size and sha256 are those of the manifest.
    Raises: DataError, naming the file, for anything missing, damaged or of another form.
    """

    def __init__(self, place: Path | Mirror):
        self.place = place
        self.folder, self._mirror = folder_and_mirror(place)
        self.manifest = Manifest.read(self.folder, "images")
        try:
            facts = self.manifest.facts
            self.files = texts([shard["file"] for shard in facts["shards"]])
            self.shard_records = tuple(whole_number(s["records"]) for s in facts["shards"])
            self.classes = texts(facts["classes"])
            self.size = whole_number(facts["size"], least=1, most=2**16)
            self.channels = whole_number(facts["channels"], least=1, most=2**16)
            self.images_per_record = whole_number(facts["images_per_record"], least=1)
            self.captions = facts["captions"]
            if type(self.captions) is not bool or len(set(self.files)) != len(self.files):
                raise ValueError
            if whole_number(facts["records"], least=1) != sum(self.shard_records):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{self.folder} is not a folder of image shards: prepare it again."
            ) from None

    def records(self, shard: int) -> list[ImageRecord]:
        """All records of a shard, in their order on disk."""
        name = self.files[shard]
        path = brought(self.folder, self._mirror, name, self.manifest)
        payload = read_verified(path, self.manifest.file(name))
        records = [
            self._record(*parts, name) for parts in _pairs(payload, scan_tar(payload, name), name)
        ]
        if len(records) != self.shard_records[shard] or len({r.key for r in records}) != len(
            records
        ):
            raise DataError(f"{name} holds other records than its manifest says: prepare it again.")
        return records

    def _record(self, key: str, images: bytes, facts: bytes, name: str) -> ImageRecord:
        try:
            tree = json.loads(facts)
            labels = tuple(tree["labels"])
            captions = tuple(tree["captions"]) if self.captions else None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(f"{name} has a damaged record: prepare it again.") from None
        count = len(labels)
        if not 1 <= count <= self.images_per_record or not all(
            type(label) is int and 0 <= label < len(self.classes) for label in labels
        ):
            raise DataError(
                f"{name} has labels outside of the classes of its manifest: prepare it again."
            )
        if captions is not None and (
            len(captions) != count or not all(type(c) is str for c in captions)
        ):
            raise DataError(f"{name} has a damaged record: prepare it again.")
        shape = (count, self.size, self.size, self.channels)
        array = npy_array(images, dtype=np.uint8, shape=shape, name=name)
        return ImageRecord(key, array, labels, captions)


def read_images(place: Path | Mirror, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """All images (or the first ``limit``), uint8 (N, C, H, W), and their labels, int64 (N,).

    Raises: DataError, naming the file, if a shard is not what its manifest says.
    """
    shards = ImageShards(place)
    images, labels, count = [], [], 0
    for shard in range(len(shards.files)):
        if limit is not None and count >= limit:
            break
        for record in shards.records(shard):
            images.append(record.images)
            labels.extend(record.labels)
            count += len(record.labels)
    if not images:
        return np.zeros((0, shards.channels, shards.size, shards.size), np.uint8), np.zeros(
            0, np.int64
        )
    stacked = np.concatenate(images).transpose(0, 3, 1, 2)[:limit]
    return np.ascontiguousarray(stacked), np.array(labels, dtype=np.int64)[:limit]


def _pairs(payload: bytes, members: list[Member], name: str) -> Iterator[tuple[str, bytes, bytes]]:
    for first, second in itertools.zip_longest(members[::2], members[1::2]):
        key = first.name.removesuffix(".images.npy")
        expected = (f"{key}.images.npy", f"{key}.json")
        if second is None or (first.name, second.name) != expected or not KEY.fullmatch(key):
            raise DataError(f"{name} has members of other names than a record's: prepare it again.")
        yield key, _bytes_of(payload, first), _bytes_of(payload, second)


def _bytes_of(payload: bytes, member: Member) -> bytes:
    return payload[member.offset : member.offset + member.size]


# --- streaming public data ------------------------------------------------------------------------


def stream_images(
    place: Path | Mirror,
    *,
    batch: int,
    steps: int,
    seed: int,
    rank: int,
    world_size: int,
    buffer: int = 2000,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled batches of *public* images for this worker: uint8 (B, C, H, W), int64 (B,).

    Every worker gets exactly ``steps`` batches of ``batch`` images, whatever the shards hold: the
    data repeats with another order. Not a Poisson sample: never for private training.
    Raises: DataError, naming the file.
    """
    shards = ImageShards(place)

    def decode(members: dict[str, bytes], name: str) -> Iterator[tuple[np.ndarray, int]]:
        if not {"images.npy", "json"} <= members.keys():
            raise DataError(f"{name} has a damaged record: prepare it again.")
        record = shards._record(members["__key__"], members["images.npy"], members["json"], name)
        yield from zip(record.images.transpose(0, 3, 1, 2), record.labels, strict=True)

    items = stream_items(
        place,
        shards.manifest,
        shards.files,
        decode=decode,
        seed=seed,
        rank=rank,
        world_size=world_size,
        buffer=buffer,
    )
    for _ in range(steps):
        images, labels = zip(*itertools.islice(items, batch), strict=True)
        yield np.stack(images), np.array(labels, dtype=np.int64)


def stream_items(
    place: Path | Mirror,
    manifest: Manifest,
    names: Sequence[str],
    *,
    decode: Callable[[dict[str, Any], str], Iterator[Item]],
    seed: int,
    rank: int,
    world_size: int,
    buffer: int,
) -> Iterator[Item]:
    """Endless shuffled items of the shards ``names`` that fall to this worker.

    Workers share out whole shards; where there are fewer shards than workers, single records. A
    shard is verified when it is first opened. Raises: DataError, naming the file.
    """
    verified: set[str] = set()
    folder, mirror = folder_and_mirror(place)

    def streams(epoch: int) -> Iterator[dict[str, Any]]:
        order = list(names)
        random.Random(f"{seed}-{epoch}").shuffle(order)
        for name in order[rank::world_size] if len(names) >= world_size else order:
            path = brought(folder, mirror, name, manifest)
            if name not in verified or mirror is not None:
                verify_file(path, manifest.file(name))
                verified.add(name)
            with opened(path) as stream:
                yield {"url": name, "stream": stream}

    def mine(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        shared = len(names) < world_size
        return itertools.islice(records, rank, None, world_size) if shared else records

    def unpacked(records: Iterator[dict[str, Any]]) -> Iterator[Item]:
        for record in records:
            yield from decode(record, record["__url__"])

    for epoch in itertools.count():
        pipeline = webdataset.DataPipeline(
            lambda epoch=epoch: streams(epoch),
            webdataset.tariterators.tar_file_expander,
            webdataset.tariterators.group_by_keys,
            mine,
            unpacked,
            webdataset.shuffle(buffer, initial=buffer, rng=random.Random(f"{seed}-{epoch}-{rank}")),
        )
        empty = True
        try:
            for item in pipeline:
                empty = False
                yield item
        except (tarfile.TarError, ValueError, OSError):
            raise DataError(f"A shard of {folder} cannot be read: prepare it again.") from None
        if empty:
            raise DataError(f"{folder} holds too few records for {world_size} workers: use fewer.")
