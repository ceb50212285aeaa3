"""Images of a source -> records -> a finished folder of image shards.

A record is one unit of privacy: one image, or all kept images of one unit. Its key is its number
in the source; it lies at a place that a fixed shuffle of these numbers gives, so that classes
spread evenly over the shards and no place depends on what an image shows.
"""

from __future__ import annotations

import hashlib
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dpldm_dist.config import DataConfig
from dpldm_dist.data.files import make_folder, read_file, write_file
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.data.npy import npy_array, npy_bytes
from dpldm_dist.data.picture import DIGEST_BYTES, SourceImage, content_digest, square_image
from dpldm_dist.data.remote import Mirror, brought, folder_and_mirror
from dpldm_dist.data.shards import ImageRecord, ImageShards, write_image_shard
from dpldm_dist.errors import ConfigError, DataError, PrivacyError, RunError

IMAGE = "image"
"""The unit of records that hold one image each."""
CONTENT = "content.npy"
"""File of the sorted content digests of all images, uint8 (N, 16)."""
_SHUFFLE_SEED = 20240229
_SUBSET_KEY = b"which images of a unit are kept"


@dataclass(frozen=True)
class PlannedRecord:
    """A record before its images are read."""

    key: str
    images: tuple[SourceImage, ...]


def require_units(images: Sequence[SourceImage], *, unit: str, source: str, private: bool) -> None:
    """Refuse a source whose units are not what the word ``unit`` (``data.unit``) promises.

    ``source`` names the data set for messages. Formal guarantees: if this returns for private data,
    either ``unit`` is "image" and no image has a unit, or every image has one, and no two units are
    the same but for case, blanks or Unicode form.
    Raises: PrivacyError, ConfigError, or DataError naming images, not units.
    """
    without = next((image for image in images if not (image.unit or "").strip()), None)
    with_unit = next((image for image in images if image.unit is not None), None)
    if unit == IMAGE and with_unit is not None:
        raise ConfigError(
            f"{source} names a unit for its images ({with_unit.name}), data.unit is image: say "
            "what the unit is (data.unit = patient, user, ...), or remove the column if every "
            "image is to be a record of its own."
        )
    if unit != IMAGE and private and with_unit is None:
        raise PrivacyError(
            f"data.unit = {unit!r}, but {source} names no units: expected a column unit that says "
            f"which {unit} an image belongs to. Add it, or set data.unit = image, which protects "
            "single images only."
        )
    if with_unit is not None and without is not None:
        raise DataError(
            f"Image {without.name} has no unit and others have one: expected one for all or for "
            "none. Name the unit of each."
        )
    _refuse_spellings(images)


def _refuse_spellings(images: Sequence[SourceImage]) -> None:
    """A unit that is spelled in two ways would be two records. Raises: DataError."""
    first: dict[str, SourceImage] = {}
    for image in images:
        if image.unit is None:
            continue
        plain = " ".join(unicodedata.normalize("NFKC", image.unit).casefold().split())
        other = first.setdefault(plain, image)
        if other.unit != image.unit:
            raise DataError(
                f"The units of {other.name} and {image.name} differ in case, blanks or Unicode "
                "form only: one unit that is spelled in two ways would be two records. Spell it "
                "in one way, or give different units different names."
            )


def plan_records(images: Sequence[SourceImage], *, max_images_per_unit: int) -> list[PlannedRecord]:
    """Images grouped into records, in the order of the source.

    Formal guarantees: all images of a unit are in one record, at most ``max_images_per_unit`` of
    them; which ones depends on that unit alone. An image without a unit is one of its own.
    """
    units: dict[str, list[SourceImage]] = {}
    for number, image in enumerate(images):
        units.setdefault(
            f"number {number}" if image.unit is None else f"unit {image.unit}", []
        ).append(image)
    return [
        PlannedRecord(f"{number:08d}", tuple(_subset(name, members, max_images_per_unit)))
        for number, (name, members) in enumerate(units.items())
    ]


def _refuse_spread_units(records: Sequence[PlannedRecord]) -> None:
    """Each unit in one record, each record of one unit, whatever planned them.

    Raises: PrivacyError.
    """
    owner: dict[str, str] = {}
    for record in records:
        units = {image.unit for image in record.images}
        alone = len(units) == 1 and (None not in units or len(record.images) == 1)
        if not alone or any(owner.setdefault(u, record.key) != record.key for u in units if u):
            raise PrivacyError(
                "A unit of the private data is spread over two records, or a record holds two "
                "units: what it adds to a sum would not be bounded. This is a bug: please report "
                "it."
            )


def _subset(unit: str, members: list[SourceImage], most: int) -> list[SourceImage]:
    """A random subset of fixed coins: the ``most`` members of the least keyed hash."""
    if len(members) <= most:
        return members

    def coin(place: int) -> bytes:
        return hashlib.blake2b(f"{place} {unit}".encode(), key=_SUBSET_KEY, digest_size=16).digest()

    return [members[place] for place in sorted(sorted(range(len(members)), key=coin)[:most])]


def shard_plan(records: int, *, shard_records: int, lanes: int) -> list[np.ndarray]:
    """Which record numbers lie in which shard: a fixed shuffle cut into nearly equal parts.

    The number of shards is a multiple of ``lanes`` (where there are so many records), so that no
    worker gets more than another.
    """
    shards = -(-records // shard_records)
    shards = min(records, -(-shards // lanes) * lanes)
    return np.array_split(np.random.default_rng(_SHUFFLE_SEED).permutation(records), max(1, shards))


@dataclass(frozen=True)
class _Read:
    """A record as read, with the content digests and names of its images, and how many failed."""

    record: ImageRecord | None
    digests: list[bytes]
    names: list[str]
    skipped: int


@dataclass(frozen=True)
class ImageSet:
    """What was written, before it gets its manifest: shards, and for every image its content
    digest, the key of its record and its name in the source."""

    shards: list[dict[str, str | int]]
    digests: list[bytes]
    owners: list[str]
    names: list[str]
    skipped: int

    def duplicates(self) -> list[list[str]]:
        """Names of the images of equal content that lie in different records, group by group."""
        groups: dict[bytes, list[int]] = {}
        for place, digest in enumerate(self.digests):
            groups.setdefault(digest, []).append(place)
        return [
            [self.names[place] for place in places]
            for places in groups.values()
            if len({self.owners[place] for place in places}) > 1
        ]

    def names_of(self, digests: set[bytes]) -> list[str]:
        """Names of the images whose content is among ``digests``."""
        return [
            name for name, digest in zip(self.names, self.digests, strict=True) if digest in digests
        ]


def write_image_set(
    folder: Path,
    images: Sequence[SourceImage],
    *,
    classes: Sequence[str],
    data: DataConfig,
    lanes: int,
    private: bool,
    threads: int,
    advance: Callable[[float], None],
) -> ImageSet:
    """Read all images and write them to ``folder`` as shards, and their content digests.

    ``advance`` is told the share of the work that is done. ``threads`` never change the result.
    Raises: DataError for an unreadable image (unless skipped), RunError if the disk is full.
    """
    records = plan_records(images, max_images_per_unit=data.max_images_per_unit)
    _refuse_spread_units(records)
    numbers = {name: number for number, name in enumerate(classes)}
    captions = any(image.caption is not None for image in images)
    read = partial(_read_record, numbers=numbers, data=data, captions=captions)
    plan = shard_plan(len(records), shard_records=data.shard_records, lanes=lanes)
    shards: list[dict[str, str | int]] = []
    digests: list[bytes] = []
    owners: list[str] = []
    names: list[str] = []
    skipped = 0
    with ThreadPoolExecutor(threads) as pool:
        for at, places in enumerate(plan):
            done = list(pool.map(read, [records[place] for place in places]))
            kept = [item.record for item in done if item.record is not None]
            for item in done:
                digests.extend(item.digests)
                names.extend(item.names)
                owners.extend([item.record.key] * len(item.names) if item.record else [])
                skipped += item.skipped
            if kept:
                name = f"images-{len(shards):05d}.tar"
                shards.append(
                    {
                        "file": name,
                        "records": write_image_shard(folder / name, kept, private=private),
                    }
                )
            advance((at + 1) / len(plan))
    if not shards:
        raise DataError("No image of the source can be read: expected some.")
    table = np.frombuffer(b"".join(sorted(digests)), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    write_file(folder / CONTENT, npy_bytes(table), private=private)
    return ImageSet(shards, digests, owners, names, skipped)


def content_digests(place: Path | Mirror) -> set[bytes]:
    """Content digests of all images of a finished folder. Raises: DataError."""
    folder, mirror = folder_and_mirror(place)
    manifest = Manifest.read(folder, "images")
    if CONTENT not in manifest.files:
        shards = ImageShards(place)
        records = (record for shard in range(len(shards.files)) for record in shards.records(shard))
        return {content_digest(image) for record in records for image in record.images}
    brought(folder, mirror, CONTENT, manifest)
    manifest.verify(folder, [CONTENT])
    shape = (manifest.fact("images", int), DIGEST_BYTES)
    table = npy_array(read_file(folder / CONTENT), dtype=np.uint8, shape=shape, name=CONTENT)
    return {row.tobytes() for row in table}


@contextmanager
def new_folder(folder: Path, *, private: bool) -> Iterator[Path]:
    """A folder to fill; it takes the name ``folder`` when all is in it, or is removed.

    Raises: RunError if ``folder`` exists and is not empty, or cannot be made.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError(
            f"{folder} holds other files: expected an empty or new folder. Give another one."
        )
    partial_folder = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial_folder, ignore_errors=True)  # of a start that was killed
        make_folder(partial_folder, private=private)
        yield partial_folder
        try:
            partial_folder.rename(folder)
        except OSError as error:
            raise RunError(f"Cannot make {folder}: {error.strerror}.") from None
    finally:
        with suppress(OSError):
            shutil.rmtree(partial_folder)


def _read_record(
    planned: PlannedRecord, *, numbers: dict[str, int], data: DataConfig, captions: bool
) -> _Read:
    pixels, labels, texts, digests, names, skipped = [], [], [], [], [], 0
    for image in planned.images:
        try:
            found = image.read()
        except DataError:
            if data.on_bad_image == "stop":
                raise
            skipped += 1
            continue
        square = square_image(found, size=data.size, channels=data.channels, crop=data.crop)
        pixels.append(square)
        labels.append(numbers[image.label])
        texts.append(image.caption or "")
        digests.append(content_digest(square))
        names.append(image.name)
    if not pixels:
        return _Read(None, [], [], skipped)
    told = tuple(texts) if captions else None
    record = ImageRecord(planned.key, np.stack(pixels), tuple(labels), told)
    return _Read(record, digests, names, skipped)
