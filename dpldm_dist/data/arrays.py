"""Images that lie in one array: IDX files (as MNIST's, also .gz) and NPZ files, never unpickled."""

from __future__ import annotations

import gzip
import math
import zipfile
from functools import partial
from pathlib import Path

import numpy as np

from dpldm_dist.data.files import opened, require_memory
from dpldm_dist.data.picture import SourceImage
from dpldm_dist.errors import DataError

_UBYTE = 8


def idx_pairs(folder: Path) -> list[Path]:
    """The IDX files of images in ``folder`` that have a file of labels beside them."""
    return [
        path for path in sorted(folder.glob("*idx[34]-ubyte*")) if _labels_beside(path) is not None
    ]


def idx_images(path: Path) -> list[SourceImage]:
    """The images of an IDX file; labels from the file named alike, with ``labels`` and ``idx1``.

    Raises: DataError, naming the file.
    """
    labels_path = _labels_beside(path)
    if labels_path is None:
        raise DataError(
            f"{path} has no labels: expected a file named like it with labels-idx1-ubyte."
        )
    images, labels = _read_idx(path, (3, 4)), _read_idx(labels_path, (1,))
    return _from_arrays(path, images, [str(int(label)) for label in labels])


def npz_images(path: Path) -> list[SourceImage]:
    """The images of an NPZ file: ``images``, uint8 (N, H, W) or (N, H, W, C) with C 1 or 3;
    ``labels`` (N,), integers or strings; maybe ``captions`` and ``units`` (N,), the same.

    Raises: DataError, naming the file.
    """
    arrays = _read_npz(path, ("images", "labels", "captions", "units"))
    if not {"images", "labels"} <= arrays.keys():
        raise DataError(f"{path} holds {sorted(arrays)}: expected the arrays images and labels.")
    images = arrays.pop("images")
    texts = {name: _texts(path, name, array, len(images)) for name, array in arrays.items()}
    return _from_arrays(path, images, **texts)


def _from_arrays(
    path: Path,
    images: np.ndarray,
    labels: list[str],
    captions: list[str] | None = None,
    units: list[str] | None = None,
) -> list[SourceImage]:
    if images.dtype != np.uint8 or not images.dtype.isnative:
        raise DataError(f"{path} holds images of type {images.dtype}: expected uint8, 0 to 255.")
    if (
        images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[3] not in (1, 3))
        or 0 in images.shape
    ):
        raise DataError(
            f"{path} holds images of shape {images.shape[1:]}: expected (H, W[, C]), C 1 or 3."
        )
    if len(labels) != len(images):
        raise DataError(
            f"{path}: the numbers of images and labels differ, expected one label per image."
        )
    return [
        SourceImage(
            name=f"{path}[{i}]",
            label=labels[i],
            read=partial(images.__getitem__, i),
            caption=None if captions is None else captions[i],
            unit=None if units is None else units[i],
        )
        for i in range(len(images))
    ]


def _read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the arrays ``names`` that there are; nothing of more bytes than there is memory."""
    try:
        with opened(path) as file:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            require_memory(path, sum(member.file_size for member in members))
            if len({member.filename for member in members}) < len(members):
                raise ValueError  # which of two arrays of one name would it be?
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in names if name in arrays.files}
            if not all(isinstance(array, np.ndarray) for array in found.values()):
                raise ValueError  # what is no array comes back as its bytes
            return found
    except DataError:
        raise
    except Exception:  # decoders of damaged archives raise anything
        raise DataError(
            f"{path} is not an NPZ file of plain arrays: expected images, uint8 (N, H, W[, C]), "
            "and labels (N,). Arrays of Python objects are never loaded."
        ) from None


def _texts(path: Path, name: str, array: np.ndarray, count: int) -> list[str]:
    if array.shape != (count,) or array.dtype.kind not in "iuU":
        raise DataError(
            f"{path}: {name} is {array.dtype} {array.shape}, expected one integer or string each."
        )
    return [str(value) for value in array.tolist()]


def _labels_beside(path: Path) -> Path | None:
    """``train-images-idx3-ubyte.gz`` -> ``train-labels-idx1-ubyte`` or the same with ``.gz``."""
    stem = path.name.removesuffix(".gz").replace("images", "labels")
    stem = stem.replace("idx3", "idx1").replace("idx4", "idx1")
    found = [path.with_name(name) for name in (stem, f"{stem}.gz")]
    return next((beside for beside in found if beside.is_file() and beside != path), None)


def _read_idx(path: Path, axes: tuple[int, ...]) -> np.ndarray:
    """Source: http://yann.lecun.com/exdb/mnist (two zero bytes, type, number of axes, sizes)."""
    try:
        with opened(path) as packed:
            file = gzip.GzipFile(fileobj=packed) if path.suffix == ".gz" else packed
            magic = file.read(4)
            if (
                len(magic) != 4
                or magic[:2] != b"\0\0"
                or magic[2] != _UBYTE
                or magic[3] not in axes
            ):
                raise DataError(
                    f"{path} is not an IDX file: expected unsigned bytes with {axes[0]} axes."
                )
            sizes = file.read(4 * magic[3])
            shape = tuple(int(n) for n in np.frombuffer(sizes, dtype=">u4"))
            numbers = math.prod(shape)
            require_memory(path, numbers)
            payload = file.read(numbers + 1)  # one more, to see that nothing follows
    except DataError:
        raise
    except Exception as error:  # decoders of damaged archives raise anything
        raise DataError(
            f"{path} cannot be read as an IDX file ({type(error).__name__}): make it again."
        ) from None
    if len(shape) != magic[3] or len(payload) != numbers:
        raise DataError(
            f"{path} is damaged: expected {numbers} bytes after its header, found other."
        )
    return np.frombuffer(payload, dtype=np.uint8).reshape(shape)
