"""Images -> image shards, for whichever of the public, private and held-out data has a source."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

from dpldm_dist import errors
from dpldm_dist.config import Config, DatasetConfig
from dpldm_dist.data.files import make_folder, write_file
from dpldm_dist.data.images import class_order, open_source
from dpldm_dist.data.manifest import MANIFEST, Manifest, describe_files
from dpldm_dist.data.picture import SourceImage
from dpldm_dist.data.records import (
    CONTENT,
    IMAGE,
    ImageSet,
    content_digests,
    new_folder,
    require_units,
    write_image_set,
)
from dpldm_dist.errors import ConfigError, DataError, DpldmError, PrivacyError, RunError
from dpldm_dist.runtime.rundir import RunDir, closed_dataset_dir, dataset_dir
from dpldm_dist.runtime.tracking import Progress
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.places import is_finished, place_of

Which = Literal["public", "private", "heldout"]
_WORDS = {"public": "public", "private": "private", "heldout": "held-out"}


def prepare(config: Config, worker: Worker) -> Manifest:
    """Turn every configured source into image shards; the last one's manifest.

    Worker 0 does it, with as many threads as ``run.threads`` says. A data set that is there is left
    alone; one that was made with other settings is refused. A data set appears whole or not at all.

    Formal guarantees: no image of the public data has the content of a private one, and no held-out
    image that of one trained on; all images of a unit lie in one record, and records are of the
    unit that the config names.
    Raises: ConfigError, DataError, PrivacyError, RunError, the same on every worker.
    """
    sets = _with_source(config)
    if not sets:
        raise ConfigError(
            "Nothing to prepare: set data.public.source, data.private.source or both."
        )
    failure = None
    if worker.rank == 0:
        progress = Progress(RunDir(config.run.dir).progress, worker=worker)
        try:
            for which in sets:
                _prepare_one(which, config, progress)
        except DpldmError as error:
            failure = [type(error).__name__, str(error)]
    failure = worker.collective.broadcast_json(failure)
    if failure is not None:
        raise getattr(errors, failure[0])(failure[1])
    return Manifest.read(dataset_dir(config, sets[-1], "images"), "images")


def describe(config: Config) -> list[str]:
    """What ``prepare`` would do, for --dry-run. Opens no image."""
    data, lines = config.data, []
    for which in _with_source(config):
        dataset, folder = _dataset(config, which), dataset_dir(config, which, "images")
        limit = "" if dataset.limit is None else f", at most {dataset.limit} images"
        lines.append(f"reads   {dataset.source} ({_WORDS[which]} images{limit})")
        there = " (finished before)" if (folder / MANIFEST).is_file() else ""
        lines.append(f"writes  {folder}{there}")
    if not lines:
        return ["nothing to prepare: no data set has a source"]
    kind = "grey" if data.channels == 1 else "colour"
    lines.append(f"makes   {kind} images of {data.size} x {data.size} pixels (crop: {data.crop})")
    holds = f" of at most {data.max_images_per_unit} image(s)" if data.unit != IMAGE else ""
    lines.append(f"one private record per {data.unit}{holds}, {data.shard_records} per shard")
    return lines


def _with_source(config: Config) -> list[Which]:
    names: tuple[Which, ...] = get_args(Which)
    return [which for which in names if _dataset(config, which).source is not None]


def _dataset(config: Config, which: Which) -> DatasetConfig:
    return getattr(config.data, which)


def _prepare_one(which: Which, config: Config, progress: Progress) -> None:
    folder = closed_dataset_dir(config, which, "images")
    settings = _settings(config, which)
    if _finished(folder, settings):
        print(f"{_WORDS[which]} images: finished before, in {folder}", flush=True)
        return
    private = which != "public"
    progress.start(f"preparing {_WORDS[which]} images", 100)  # per cent: the count may be private
    images = open_source(_dataset(config, which))
    require_units(images, unit=config.data.unit, source=f"data.{which}", private=private)
    classes = _classes(which, config, images)
    with new_folder(folder, private=private) as place:
        written = write_image_set(
            place,
            images,
            classes=classes,
            data=config.data,
            lanes=1 if config.privacy is None else config.privacy.lanes,
            private=private,
            threads=config.run.threads or os.cpu_count() or 1,
            advance=lambda share: progress.advance(int(100 * share)),
        )
        duplicates = _duplicates(which, config, written)
        _refuse_overlap(which, config, written)
        _manifest(config, settings, images, classes, written, duplicates, place).write(
            place, private=private
        )
    progress.done()
    print(f"{_WORDS[which]} images: {folder}", flush=True)


def _settings(config: Config, which: Which) -> dict[str, Any]:
    """The settings that decide what is written."""
    data, dataset = config.data.model_dump(mode="json"), _dataset(config, which)
    names = (
        "size",
        "channels",
        "crop",
        "on_bad_image",
        "on_duplicates",
        "unit",
        "max_images_per_unit",
        "shard_records",
    )
    classes = None if dataset.classes is None else list(dataset.classes)
    source = {"source": dataset.source, "limit": dataset.limit, "classes": classes}
    return {"data": {name: data[name] for name in names} | {which: source}}


def _finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether ``folder`` holds this very data set. Raises: RunError if it holds another one."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = Manifest.read(folder, "images")
    found, wanted = _flat(manifest.config), _flat(settings)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise RunError(
                f"{folder} was prepared with {name} = {found.get(name)}, this config says "
                f"{wanted.get(name)}: use a new run.dir or restore the config."
            )
    manifest.verify(folder, contents=False)
    return True


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
        )
    return flat


def _classes(which: Which, config: Config, images: list[SourceImage]) -> tuple[str, ...]:
    """Class names in order: declared, or those of the private data for held-out data, or found.

    Raises: DataError naming the first image with another label (not the label).
    """
    declared = _dataset(config, which).classes
    if declared is None and which == "heldout":
        declared = _private_classes(config)
    if declared is None:
        return class_order(image.label for image in images)
    known = set(declared)
    for image in images:
        if image.label not in known:
            expected = (
                f"data.{which}.classes" if _dataset(config, which).classes else "the private data"
            )
            raise DataError(f"Image {image.name} has a label that is not a class of {expected}.")
    return tuple(declared)


def _private_classes(config: Config) -> tuple[str, ...] | None:
    folder = dataset_dir(config, "private", "images")
    if (folder / MANIFEST).is_file():
        return tuple(Manifest.read(folder, "images").fact("classes", list))
    return config.data.private.classes


def _duplicates(which: Which, config: Config, written: ImageSet) -> int:
    """How often an image repeats the content of another record; said, and listed in ``private/``.

    Raises: DataError if data.on_duplicates is "stop" and there is one.
    """
    groups = written.duplicates()
    if not groups:
        return 0
    listed = _list_privately(config, f"duplicates-{which}.json", groups)
    what = f"{_WORDS[which]} images: some are equal in different records (listed in {listed})."
    if config.data.on_duplicates == "stop":
        raise DataError(
            f"{what} They break record-level privacy: remove them, group them with a unit, or set "
            "data.on_duplicates=report."
        )
    print(f"{what} A guarantee per record does not hold per image.", flush=True)
    return sum(len(group) - 1 for group in groups)


def _refuse_overlap(which: Which, config: Config, written: ImageSet) -> None:
    """Compare with every other data set that is there. Raises: PrivacyError, DataError."""
    mine = set(written.digests)
    others: list[Which] = [other for other in get_args(Which) if other != which]
    for other in others:
        if not is_finished(config, other, "images"):
            continue
        place = place_of(config, other, "images")
        _require_same_form(config, dataset_dir(config, other, "images"))
        common = mine & content_digests(place)
        if common:
            listed = _list_privately(
                config, f"overlap-{which}-{other}.json", written.names_of(common)
            )
            raise _overlap(which, other, listed)


def _overlap(which: Which, other: Which, listed: Path) -> DpldmError:
    here, there = _WORDS[which], _WORDS[other]
    what = f"The {here} data holds an image of the {there} data (listed in {listed})"
    if "heldout" in (which, other):
        return DataError(
            f"{what}: scores on data that was trained on mean nothing. Remove it there or here."
        )
    return PrivacyError(
        f"{what}: what is public cannot be private, the claim would be void. Remove it."
    )


def _require_same_form(config: Config, folder: Path) -> None:
    facts = Manifest.read(folder, "images").facts
    for name, wanted in (("size", config.data.size), ("channels", config.data.channels)):
        if facts.get(name) != wanted:
            raise RunError(
                f"{folder} was prepared with data.{name} = {facts.get(name)}, this config says "
                f"{wanted}: a run has one form of images. Use a new run.dir or restore the config."
            )


def _list_privately(config: Config, name: str, value: Any) -> Path:
    folder = RunDir(config.run.dir).private
    make_folder(folder, private=True)
    write_file(folder / name, json.dumps(value, indent=1).encode(), private=True)
    return folder / name


def _manifest(
    config: Config,
    settings: dict[str, Any],
    images: list[SourceImage],
    classes: tuple[str, ...],
    written: ImageSet,
    duplicates: int,
    folder: Path,
) -> Manifest:
    facts = {
        "records": sum(int(shard["records"]) for shard in written.shards),
        "images": len(written.digests),
        "images_per_record": 1 if images[0].unit is None else config.data.max_images_per_unit,
        "classes": list(classes),
        "size": config.data.size,
        "channels": config.data.channels,
        "captions": any(image.caption is not None for image in images),
        "unit": IMAGE if images[0].unit is None else config.data.unit,
        "duplicates": duplicates,
        "skipped": written.skipped,
        "shards": written.shards,
    }
    names = [str(shard["file"]) for shard in written.shards] + [CONTENT]
    return Manifest("images", facts, describe_files(folder, names), settings)
