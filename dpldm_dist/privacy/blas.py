"""Products of matrices on a CPU, for the gradient engine: by OpenBLAS where its package is there.

PyTorch's own library for CPUs leaves the AVX-512 units of other makers' processors idle. OpenBLAS
uses them: on an AMD EPYC 9005 its float64 products took half of the time and its batches of small
float32 ones a third to a half (docs/performance.md). Without the package, on another device, or for
operands that lie in memory in no order that it knows, PyTorch does the same.

What the engine relies on, of both: a sum of n products is off by at most n u / (1 - n u) times the
sum of absolute terms, in any order; a product of a batch does not depend on its place in the batch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROWS, _AS_IS, _TRANSPOSED = 101, 111, 112  # CBLAS: row-major; op(A) = A or A^T
_KERNELS = "OPENBLAS_CORETYPE"  # which processor OpenBLAS takes this one for


def name() -> str:
    """Which library, version and kernels multiply on a CPU: they decide the last bits."""
    library = _openblas()
    if library is None:
        return "PyTorch's BLAS"
    parts = library.scipy_openblas_get_config64_().decode().split()
    return f"{parts[0]} {parts[1]} ({library.scipy_openblas_get_corename64_().decode()})"


def product(left_NO: Tensor, right_ND: Tensor, *, out_OD: Tensor, add: bool = False) -> None:
    """out = left^T right, or out += left^T right; all float64, rows contiguous."""
    library = _openblas()
    tensors = (left_NO, right_ND, out_OD)
    if library is None or not all(_has_rows(t) for t in tensors):
        out_OD.addmm_(left_NO.T, right_ND, beta=float(add))
        return
    tokens, height, width = len(left_NO), *out_OD.shape
    if left_NO.shape != (tokens, height) or right_ND.shape != (tokens, width):
        raise ValueError(f"Products of {[tuple(t.shape) for t in tensors]}: sizes do not match.")
    _use_threads(library)
    left, right, out = ((t.data_ptr(), t.stride(0)) for t in tensors)
    library.scipy_cblas_dgemm64_(
        *(_ROWS, _TRANSPOSED, _AS_IS, height, width, tokens),
        *(1.0, *left, *right, float(add), *out),
    )


def gram(rows_BTD: Tensor, *, out_BTT: Tensor, add: bool = False) -> None:
    """out = rows rows^T of every record, or out += it; float32."""
    products(rows_BTD.mT, rows_BTD.mT, out_BOD=out_BTT, add=add)


def products(
    left_BTO: Tensor, right_BTD: Tensor, *, out_BOD: Tensor | None = None, add: bool = False
) -> Tensor:
    """left^T right of every record, float32 (B, O, D): in ``out``, or added to it, or new."""
    records, tokens, height = left_BTO.shape
    width = right_BTD.shape[2]
    if out_BOD is None:
        out_BOD = left_BTO.new_empty(records, height, width)
    library = _openblas()
    orders = None if library is None else (_order(left_BTO), _order(right_BTD))
    if orders is None or None in orders or not _is_whole(out_BOD):
        return out_BOD.baddbmm_(left_BTO.mT, right_BTD, beta=float(add))
    if right_BTD.shape[:2] != (records, tokens) or out_BOD.shape != (records, height, width):
        shapes = [tuple(tensor.shape) for tensor in (left_BTO, right_BTD, out_BOD)]
        raise ValueError(f"Products of {shapes}: sizes do not match.")
    _use_threads(library)
    (_, left_order, left_stride), (right_order, _, right_stride) = orders
    library.scipy_cblas_sgemm_batch_strided64_(
        *(_ROWS, left_order, right_order, height, width, tokens),
        *(1.0, left_BTO.data_ptr(), left_stride, left_BTO.stride(0)),
        *(right_BTD.data_ptr(), right_stride, right_BTD.stride(0)),
        *(float(add), out_BOD.data_ptr(), width, height * width, records),
    )
    return out_BOD


def _order(rows_BTD: Tensor) -> tuple[int, int, int] | None:
    """How CBLAS reads rows and their transpose, and the stride; None if it cannot."""
    if rows_BTD.dtype != torch.float32 or rows_BTD.device.type != "cpu":
        return None
    _, tokens, width = rows_BTD.shape
    _, by_token, by_channel = rows_BTD.stride()
    if by_channel == 1 and by_token >= width:
        return _AS_IS, _TRANSPOSED, by_token
    if by_token == 1 and by_channel >= tokens:
        return _TRANSPOSED, _AS_IS, by_channel
    return None


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.dtype == torch.float32


def _has_rows(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float64
        and tensor.stride(1) == 1
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.numel() > 0
    )


def _use_threads(library: Any) -> None:
    library.scipy_openblas_set_num_threads64_(torch.get_num_threads())


@functools.cache
def _openblas() -> Any:
    """The library of the package ``scipy-openblas64``, by itself: importing the package would put
    its symbols before those of NumPy, which has a copy of its own."""
    spec = importlib.util.find_spec("scipy_openblas64")
    folders = spec.submodule_search_locations if spec is not None else None
    try:
        path = next(Path((folders or [""])[0]).glob("lib/libscipy_openblas64_*"))
        with _taken_for(_processor()):
            library = ctypes.CDLL(str(path))
        _declare(library)
    except (StopIteration, OSError, AttributeError):  # not there, for another system, or too old
        return None
    return library


def _processor() -> str | None:
    """OpenBLAS takes a processor that it does not know for an old one: AVX-512 says enough."""
    return "SkylakeX" if torch.backends.cpu.get_cpu_capability() == "AVX512" else None


@contextmanager
def _taken_for(processor: str | None) -> Iterator[None]:
    """While the library is loaded; unless the user has chosen, as for machines of several kinds."""
    if processor is None or _KERNELS in os.environ:
        yield
        return
    os.environ[_KERNELS] = processor
    try:
        yield
    finally:
        del os.environ[_KERNELS]


def _declare(library: Any) -> None:
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    sizes = [ctypes.c_int] * 3 + [integer] * 3
    double, single = ctypes.c_double, ctypes.c_float
    matrix, batch = [pointer, integer], [pointer, integer, integer]
    dgemm = library.scipy_cblas_dgemm64_
    dgemm.argtypes, dgemm.restype = [*sizes, double, *matrix, *matrix, double, *matrix], None
    sgemm = library.scipy_cblas_sgemm_batch_strided64_
    sgemm.argtypes = [*sizes, single, *batch, *batch, single, *batch, integer]
    sgemm.restype = None
    library.scipy_openblas_set_num_threads64_.argtypes = [ctypes.c_int]
    library.scipy_openblas_get_config64_.restype = ctypes.c_char_p
    library.scipy_openblas_get_corename64_.restype = ctypes.c_char_p
