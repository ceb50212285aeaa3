"""Arrays as ``.npy`` bytes of one fixed form: version 1.0, C order, little endian, never objects.

A reader knows the dtype and shape it expects and compares the whole header with the one that our
writer makes, so that no header is ever parsed and nothing can be unpickled.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np

from dpldm_dist.errors import DataError


def npy_bytes(array: np.ndarray) -> bytes:
    """``array`` as the bytes of a ``.npy`` file. The dtype must be a plain number."""
    return npy_header(array.dtype, array.shape) + np.ascontiguousarray(array).tobytes()


@lru_cache(maxsize=1024)
def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The header that goes before the numbers; its length is a multiple of 64 bytes."""
    if dtype.kind not in "iuf":
        raise TypeError(f"{dtype}: only integers and floats are written")
    out = io.BytesIO()
    facts = {
        "descr": dtype.newbyteorder("<").str,
        "fortran_order": False,
        "shape": tuple(int(n) for n in shape),
    }
    np.lib.format.write_array_header_1_0(out, facts)
    return out.getvalue()


def npy_array(payload: bytes, *, dtype: type, shape: tuple[int, ...], name: str) -> np.ndarray:
    """The array in ``payload``, read-only. Raises: DataError, naming ``name``, unless it is exactly
    an array of ``dtype`` and ``shape`` in our form."""
    header = npy_header(np.dtype(dtype), tuple(shape))
    numbers = math.prod(shape)  # of any size: a hostile manifest may have named it
    if (
        len(payload) != len(header) + numbers * np.dtype(dtype).itemsize
        or payload[: len(header)] != header
    ):
        raise DataError(
            f"{name} holds an array of another type or shape: expected {np.dtype(dtype)} "
            f"{tuple(shape)}. Make the shards again."
        )
    return np.frombuffer(payload, dtype=dtype, offset=len(header)).reshape(shape)
