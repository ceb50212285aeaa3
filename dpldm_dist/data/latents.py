"""Latent shards: WebDataset tars of posterior moments, gathered by offset out of a memory map.

A record ``KEY`` is one unit of privacy: ``KEY.moments.npy``, float16 (m, V, 2C, h, w); ``KEY.json``
with ``labels`` (m class numbers) and ``images`` (how many of the m are real); with captions also
``KEY.context.npy``, float16 (m, tokens, dim). Beside ``latents-00000.tar`` lies its offset table
``latents-00000.index.npy``, int64 (records, 3 + m): where the moments and the context begin (-1:
none), the number of real images, and the labels.
Shapes: n records, m images of a record, V views (plain, mirrored), C, h, w of a latent.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpldm_dist.data.files import make_folder, opened, read_file, write_file
from dpldm_dist.data.manifest import (
    Manifest,
    canonical_json,
    describe_files,
    texts,
    verify_file,
    whole_number,
)
from dpldm_dist.data.npy import npy_array, npy_bytes, npy_header
from dpldm_dist.data.remote import Mirror, folder_and_mirror
from dpldm_dist.data.shards import Member, scan_tar, stream_items, write_tar
from dpldm_dist.errors import DataError

_OPEN_MAPS = 256  # shards mapped at a time: a map holds a file descriptor
MAPPED_BYTES = 512 << 20
"""Shards mapped at a time, in bytes, or one of them: more is never resident, whatever was read."""
_TRIES = 3  # to open a shard that another worker of the node may drop from the cache meanwhile
_COLUMNS = 3  # of the offset table, before the labels
_MOST_NUMBERS = 2**32  # of a record: its bytes fit into a tar member, and no product overflows
_HALF = np.dtype(np.float16)


@dataclass(frozen=True)
class LatentRecord:
    """One record to be written.

    moments: float (i, V, 2C, h, w), mean then log-variance, of its i real images, 1 <= i <= m.
    labels: i class numbers. context: float (i, tokens, dim) or None.
    """

    key: str
    moments: np.ndarray
    labels: Sequence[int]
    context: np.ndarray | None = None


@dataclass(frozen=True)
class _OpenShard:
    """A shard in use: its offset table, int64 (records, 3 + m), and the map of its file."""

    table: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class LatentRecords:
    """Records that were read. moments: float32 (n, m, V, 2C, h, w), mean then log-variance; labels:
    int64 (n, m); images: int64 (n,), how many of the m are real (the others are zeros); context:
    float32 (n, m, tokens, dim) or None."""

    moments: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    context: np.ndarray | None


# --- writing ------------------------------------------------------------------------------------


def write_latent_shard(
    folder: Path,
    name: str,
    records: Iterable[LatentRecord],
    *,
    images_per_record: int,
    source: str,
    private: bool,
) -> dict[str, Any]:
    """Write ``name`` (``latents-00000.tar``) and its offset table; its entry for the manifest.

    The entry is also left beside them, last of the three files, so that ``finished_latent_shard``
    finds it after a restart. ``source`` names in one text all that the shard was made from.
    Raises: DataError if a moment does not fit into float16 or the records differ in shape,
    RunError if the disk is full; nothing half-written is left.
    """
    make_folder(folder, private=private)
    shapes: set[tuple[Any, ...]] = set()
    packed = (_packed(record, name, images_per_record, shapes) for record in records)
    count = write_tar(folder / name, packed, private=private)
    if count == 0:
        raise DataError(f"{name}: expected at least one record.")
    moments, context = shapes.pop()
    payload = read_file(folder / name)
    table = _table(payload, name, moments, context)
    index = _index_name(name)
    write_file(folder / index, npy_bytes(table), private=private)
    entry = {
        "file": name,
        "index": index,
        "records": count,
        "moments": list(moments),
        "context": None if context is None else list(context),
        "source": source,
        "files": describe_files(folder, [name, index]),
    }
    write_file(folder / _entry_name(name), canonical_json(entry), private=private)
    return entry


def finished_latent_shard(folder: Path, name: str, *, source: str) -> dict[str, Any] | None:
    """The entry of a shard that is complete and was made from ``source``; None: write it."""
    try:
        entry = json.loads(read_file(folder / _entry_name(name)))
        if entry["source"] != source:
            return None
        for file, facts in entry["files"].items():
            verify_file(folder / file, facts)
        return entry
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_latents_manifest(
    folder: Path,
    entries: Sequence[dict[str, Any]],
    *,
    classes: Sequence[str],
    config: dict[str, Any],
    parents: dict[str, str],
    private: bool,
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Make a folder of latent shards final: its manifest, from the entries in shard order.

    ``facts`` are further facts to keep (such as "duplicates"). Raises: DataError if the shards
    differ in shape, RunError.
    """
    shapes = {
        (tuple(e["moments"]), None if e["context"] is None else tuple(e["context"]))
        for e in entries
    }
    if len(shapes) != 1:
        raise DataError(
            f"{folder}: expected latents of one shape, found {len(shapes)}. Encode them again."
        )
    moments, context = shapes.pop()
    images, views, channels, height, width = moments
    manifest = Manifest(
        kind="latents",
        facts={
            **(facts or {}),
            "records": sum(entry["records"] for entry in entries),
            "images_per_record": images,
            "views": views,
            "latent_shape": [channels // 2, height, width],
            "context_shape": None if context is None else list(context[1:]),
            "classes": list(classes),
            "shards": [
                {name: entry[name] for name in ("file", "index", "records")} for entry in entries
            ],
        },
        files={name: facts for entry in entries for name, facts in entry["files"].items()},
        config=config,
        parents=parents,
    )
    manifest.write(folder, private=private)
    for entry in entries:
        with suppress(OSError):
            (folder / _entry_name(entry["file"])).unlink()
    return manifest


def _packed(
    record: LatentRecord, name: str, most: int, shapes: set[tuple[Any, ...]]
) -> tuple[str, dict[str, bytes]]:
    """A record as members of the tar, padded with zeros to ``most`` images."""
    images = len(record.labels)
    if not 1 <= images <= most or len(record.moments) != images or record.moments.ndim != 5:
        raise DataError(
            f"{name}: a record holds {images} images, expected 1 to {most}, one latent for each."
        )
    moments = _half(record.moments, most, name)
    labels = [int(label) for label in record.labels] + [0] * (most - images)
    members = {
        "moments.npy": npy_bytes(moments),
        "json": canonical_json({"images": images, "labels": labels}),
    }
    context = None
    if record.context is not None:
        context = _half(record.context, most, name)
        members["context.npy"] = npy_bytes(context)
    shapes.add((moments.shape, None if context is None else context.shape))
    if len(shapes) != 1:
        raise DataError(f"{name}: expected latents of one shape, found another.")
    return record.key, members


def _half(array: np.ndarray, images: int, name: str) -> np.ndarray:
    padded = np.zeros((images, *array.shape[1:]), dtype=_HALF)
    with np.errstate(over="ignore"):
        padded[: len(array)] = array
    if not np.isfinite(padded).all():
        raise DataError(
            f"{name}: a latent is not finite in float16 (its range is +-65504): check the "
            "autoencoder and the scale of its latents."
        )
    return padded


def _table(
    payload: Any, name: str, moments: tuple[int, ...], context: tuple[int, ...] | None
) -> np.ndarray:
    """The offset table of a shard, from the tar itself. Raises: DataError for any other content."""
    per_record = 2 if context is None else 3  # members come sorted: context, json, moments
    members = scan_tar(payload, name)
    if len(members) % per_record:
        raise _odd_members(name)
    rows, keys = [], set()
    for at in range(0, len(members), per_record):
        *head, facts, latents = members[at : at + per_record]
        key = latents.name.removesuffix(".moments.npy")
        wanted = [f"{key}.context.npy"] * len(head) + [f"{key}.json", f"{key}.moments.npy"]
        if [member.name for member in (*head, facts, latents)] != wanted or key in keys:
            raise _odd_members(name)
        keys.add(key)
        start = _array_offset(payload, latents, moments, name)
        begin = _array_offset(payload, head[0], context, name) if head else -1
        rows.append([start, begin, *_labels(payload, facts, moments[0], name)])
    return np.array(rows, dtype=np.int64).reshape(len(rows), _COLUMNS + moments[0])


def _array_offset(payload: Any, member: Member, shape: tuple[int, ...], name: str) -> int:
    """Where the numbers of an array member begin, its header checked."""
    header = npy_header(_HALF, shape)
    size = len(header) + int(np.prod(shape)) * _HALF.itemsize
    if member.size != size or bytes(payload[member.offset : member.offset + len(header)]) != header:
        raise DataError(f"{name} holds an array that is not float16 {shape}: encode again.")
    return member.offset + len(header)


def _labels(payload: Any, member: Member, most: int, name: str) -> list[int]:
    """[images, *labels] of a record."""
    try:
        facts = json.loads(bytes(payload[member.offset : member.offset + member.size]))
        row = [facts["images"], *facts["labels"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _odd_members(name) from None
    if len(row) != 1 + most or not all(type(n) is int and 0 <= n < 2**31 for n in row):
        raise _odd_members(name)
    return row


def _odd_members(name: str) -> DataError:
    return DataError(f"{name} holds members that are not those of latent records: encode again.")


def _index_name(name: str) -> str:
    return f"{Path(name).stem}.index.npy"


def _entry_name(name: str) -> str:
    return f"{Path(name).stem}.entry.json"


# --- reading ------------------------------------------------------------------------------------


class LatentShards:
    """A finished folder of latent shards, mapped into memory shard by shard when first needed.

    ``place``: a folder, or the mirror of one that lies elsewhere, whose shards are then fetched
    when first needed. latent_shape: (C, h, w). views: V. images_per_record: m. context_shape:
    (tokens, dim) or None. shard_records: records of each shard, which are private facts for private
    data. Threads may share it.

    Formal guarantees: with ``verify``, a shard is used only after its size and sha256 and those of
    its offset table were found to be the manifest's, and every offset was found in the tar; a shard
    that is written or replaced later is verified again before it is used again. In any case no
    offset leads out of the file or to bytes that are not an array of the stated shape, and no two
    shards have the same content. At most ``mapped_bytes`` of shards, or one shard, are mapped at a
    time, and their tables held; so no more of the data is ever resident.
    Raises: DataError, naming the file.
    """

    def __init__(
        self, place: Path | Mirror, *, verify: bool = True, mapped_bytes: int = MAPPED_BYTES
    ):
        self.folder, self._mirror = folder_and_mirror(place)
        self.manifest = Manifest.read(self.folder, "latents")
        self._verify = verify
        self._mapped_bytes = mapped_bytes
        try:
            self._read_facts(self.manifest.facts)
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{self.folder} is not a folder of latent shards: encode again."
            ) from None
        self._verified: dict[int, tuple[int, ...]] = {}  # which files they were
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.RLock()
        if self._mirror is None:
            self.manifest.verify(self.folder, contents=False)  # every shard is there and whole
        self._refuse_repeated_shards()

    def records(self, shard: int, indices: np.ndarray) -> LatentRecords:
        """The records at places ``indices`` (n,) of one shard, in that order."""
        found = self._opened(shard)
        if len(indices) and not 0 <= np.min(indices) <= np.max(indices) < len(found.table):
            raise IndexError("a place beyond the records of its shard")
        rows = found.table[indices]
        context = None
        if self.context_shape is not None:
            shape = (self.images_per_record, *self.context_shape)
            context = _gather(found.numbers, rows[:, 1], shape)
        moments = _gather(found.numbers, rows[:, 0], self._moments_shape)
        return LatentRecords(moments, rows[:, _COLUMNS:], rows[:, 2], context)

    def count(self, shard: int) -> int:
        """Records of one shard, counted in its offset table, which is verified; the shard itself is
        when one of its records is first asked for."""
        index = self._indexes[shard]
        self._bring([index])
        if self._verify:
            self._require_content(index)
        return len(self._read_table(shard))

    def gather(self, shards: np.ndarray, places: np.ndarray) -> LatentRecords:
        """The records at ``places`` (n,) of ``shards`` (n,), in that order."""
        count = len(shards)
        result = self._empty(count)
        wanted = np.unique(shards)
        self._bring([name for shard in wanted for name in self._names(int(shard))])
        for shard in wanted:
            chosen = np.flatnonzero(shards == shard)
            part = self.records(int(shard), places[chosen])
            result.moments[chosen], result.labels[chosen] = part.moments, part.labels
            result.images[chosen] = part.images
            if result.context is not None and part.context is not None:
                result.context[chosen] = part.context
        return result

    def _empty(self, count: int) -> LatentRecords:
        context = None
        if self.context_shape is not None:
            context = np.empty((count, self.images_per_record, *self.context_shape), np.float32)
        return LatentRecords(
            np.empty((count, *self._moments_shape), np.float32),
            np.empty((count, self.images_per_record), np.int64),
            np.empty(count, np.int64),
            context,
        )

    def _read_facts(self, facts: dict[str, Any]) -> None:
        self.files = texts([shard["file"] for shard in facts["shards"]])
        self._indexes = texts([shard["index"] for shard in facts["shards"]])
        self.shard_records = tuple(whole_number(shard["records"]) for shard in facts["shards"])
        channels, height, width = (whole_number(n, least=1) for n in facts["latent_shape"])
        self.latent_shape = (channels, height, width)
        self.views = whole_number(facts["views"], least=1)
        self.images_per_record = whole_number(facts["images_per_record"], least=1)
        self.classes = texts(facts["classes"])
        context = facts["context_shape"]
        tokens, dim = (1, 1) if context is None else (whole_number(n, least=1) for n in context)
        self.context_shape = None if context is None else (tokens, dim)
        self._moments_shape = (self.images_per_record, self.views, 2 * channels, height, width)
        largest = max(math.prod(self._moments_shape), self.images_per_record * tokens * dim)
        names = (*self.files, *self._indexes)
        if largest > _MOST_NUMBERS or len(set(names)) != len(names):
            raise ValueError
        if whole_number(facts["records"], least=1) != sum(self.shard_records):
            raise ValueError

    def _refuse_repeated_shards(self) -> None:
        """Every record once: its neighbour would differ in two records otherwise."""
        contents = [self.manifest.file(name)["sha256"] for name in self.files]
        if len(set(contents)) < len(contents):
            raise DataError(
                f"{self.folder} lists a shard twice, or a copy of it: its records would count "
                "twice. Encode again."
            )

    def _names(self, shard: int) -> tuple[str, str]:
        return self.files[shard], self._indexes[shard]

    def _bring(self, names: Sequence[str]) -> None:
        """Files of a mirror are there afterwards, unless the cache is too small for all of them."""
        if self._mirror is not None:
            self._mirror.fetch({name: self.manifest.file(name) for name in names})

    def _opened(self, shard: int) -> _OpenShard:
        """A shard ready to be read. It is verified when it is first asked for, and again when its
        files are not the ones that were verified."""
        for left in reversed(range(_TRIES)):
            self._bring(self._names(shard))
            try:
                with self._lock:
                    return self._open_verified(shard)
            except DataError:
                gone = not all((self.folder / name).exists() for name in self._names(shard))
                if self._mirror is None or not gone or not left:
                    raise
        raise AssertionError("the last try returns or raises")

    def _open_verified(self, shard: int) -> _OpenShard:
        now = self._identities(shard)
        known = self._verified.get(shard) == now
        if known and shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        self._open.pop(shard, None)
        if self._verify and not known:
            for name in self._names(shard):
                self._require_content(name)
            now = self._identities(shard)
        found = _OpenShard(self._read_table(shard), self._map(shard))
        if not known:
            self._require_sound(found, shard)
        self._verified[shard] = now
        self._open[shard] = found
        self._close_oldest()
        return found

    def _close_oldest(self) -> None:
        """Unmap the least recently used shards until the others are within the bounds."""
        total = sum(shard.numbers.nbytes + shard.table.nbytes for shard in self._open.values())
        while len(self._open) > 1 and (len(self._open) > _OPEN_MAPS or total > self._mapped_bytes):
            _, closed = self._open.popitem(last=False)
            total -= closed.numbers.nbytes + closed.table.nbytes

    def _map(self, shard: int) -> np.ndarray:
        """The shard as float16 numbers out of a memory map."""
        path = self.folder / self.files[shard]
        try:
            with opened(path) as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # of no bytes
            raise DataError(f"{path} cannot be read: restore it, or encode again.") from None
        if len(mapped) != self.manifest.file(self.files[shard])["bytes"]:
            raise DataError(f"{path} changed its size while in use: restore it, or encode again.")
        return np.frombuffer(mapped, dtype=_HALF, count=len(mapped) // _HALF.itemsize)

    def _identities(self, shard: int) -> tuple[int, ...]:
        return sum((_identity(self.folder / name) for name in self._names(shard)), ())

    def _require_content(self, name: str) -> None:
        """Raises: DataError unless a file is what the manifest says; a mirror fetches it again."""
        try:
            verify_file(self.folder / name, self.manifest.file(name))
        except DataError:
            if self._mirror is None:
                raise
            self._mirror.fetch_again(name, self.manifest.file(name))

    def _read_table(self, shard: int) -> np.ndarray:
        index = self._indexes[shard]
        shape = (self.shard_records[shard], _COLUMNS + self.images_per_record)
        payload = read_file(self.folder / index, most_bytes=shape[0] * shape[1] * 8 + 4096)
        return npy_array(payload, dtype=np.int64, shape=shape, name=index)

    def _require_sound(self, found: _OpenShard, shard: int) -> None:
        """Offsets lie in the file at arrays of the right shape; labels and counts are in range;
        with ``verify``, the table is the one that the tar itself gives."""
        name, index = self._names(shard)
        table, raw = found.table, found.numbers.view(np.uint8)
        images, labels = table[:, 2], table[:, _COLUMNS:]
        context = None
        if self.context_shape is not None:
            context = (self.images_per_record, *self.context_shape)
        sound = _arrays_at(raw, table[:, 0], self._moments_shape)
        if context is not None:
            sound &= _arrays_at(raw, table[:, 1], context)
        sound &= bool(((images >= 1) & (images <= self.images_per_record)).all())
        sound &= bool(((labels >= 0) & (labels < max(1, len(self.classes)))).all())
        if not sound:
            raise DataError(f"{index} holds offsets or labels that are out of range: encode again.")
        if self._verify and not np.array_equal(
            _table(raw, name, self._moments_shape, context), table
        ):
            raise DataError(f"{index} does not fit {name}: encode again.")


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced. Raises: DataError if it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        raise DataError(f"{path} is missing: restore it, or encode again.") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def all_latents(place: Path | Mirror) -> LatentRecords:
    """All records of a folder in memory: for public pre-training. Raises: DataError."""
    latents = LatentShards(place)
    counts = np.array(latents.shard_records, dtype=np.int64)
    shards = np.repeat(np.arange(len(counts)), counts)
    places = (
        np.concatenate([np.arange(count) for count in counts])
        if len(counts)
        else np.zeros(0, np.int64)
    )
    return latents.gather(shards, places)


def stream_latents(
    place: Path | Mirror,
    *,
    seed: int,
    rank: int,
    world_size: int,
    buffer: int = 5000,
) -> Iterator[tuple[np.ndarray, int, np.ndarray | None]]:
    """Endless shuffled *public* latents for this worker, when they do not fit in memory.

    Yields, per image: moments float32 (V, 2C, h, w), label, context float32 (tokens, dim) or None.
    Not a Poisson sample: never for private training. Raises: DataError, naming the file.
    """
    latents = LatentShards(place)

    def decode(
        members: dict[str, Any], name: str
    ) -> Iterator[tuple[np.ndarray, int, np.ndarray | None]]:
        needed = {"moments.npy", "json"} | (
            set() if latents.context_shape is None else {"context.npy"}
        )
        if not needed <= members.keys():
            raise _odd_members(name)
        moments = npy_array(
            members["moments.npy"], dtype=np.float16, shape=latents._moments_shape, name=name
        )
        facts = Member(name, 0, len(members["json"]))
        count, *labels = _labels(members["json"], facts, latents.images_per_record, name)
        context = None
        if latents.context_shape is not None:
            shape = (latents.images_per_record, *latents.context_shape)
            context = npy_array(members["context.npy"], dtype=np.float16, shape=shape, name=name)
        for image in range(min(count, latents.images_per_record)):
            tokens = None if context is None else context[image].astype(np.float32)
            yield moments[image].astype(np.float32), labels[image], tokens

    return stream_items(
        place,
        latents.manifest,
        latents.files,
        decode=decode,
        seed=seed,
        rank=rank,
        world_size=world_size,
        buffer=buffer,
    )


def _gather(numbers: np.ndarray, offsets: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """float32 (n, *shape): at each byte offset (even, checked before) an array of ``shape``."""
    length = int(np.prod(shape))
    if len(offsets) == 0:
        return np.zeros((0, *shape), dtype=np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(numbers, length)
    return windows[offsets // _HALF.itemsize].astype(np.float32).reshape(len(offsets), *shape)


def _arrays_at(raw: np.ndarray, offsets: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether a float16 array of ``shape`` with its header stands at every offset."""
    header = np.frombuffer(npy_header(_HALF, shape), dtype=np.uint8)
    last = len(raw) - int(np.prod(shape)) * _HALF.itemsize
    if len(offsets) == 0:
        return True
    if offsets.min() < len(header) or offsets.max() > last or (offsets % _HALF.itemsize).any():
        return False
    windows = np.lib.stride_tricks.sliding_window_view(raw, len(header))
    return bool((windows[offsets - len(header)] == header).all())
