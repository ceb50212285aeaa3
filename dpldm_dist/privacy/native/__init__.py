"""Compiled arithmetic of the gradient engine for x86-64 processors: ``records.c``.

Made when the package is installed, where a C compiler is there; without it, or on another device,
the engine uses PyTorch, which takes more time.

Formal guarantees: what a record adds to a sum is a vector of whole units that depends on that
record's operands and factor alone, each coordinate within half a unit of the float32 value; sums
over records are exact; whatever the number of threads, the bits are the same. What a record of
factor 0 holds counts for nothing. ``sum_roundings`` and ``product_roundings`` bound the float32
roundings.

Shapes: B records, T tokens of a record, D and O widths of a layer's input and output, A places of
a convolution's window (1 for other layers). Operands may lie in memory in any order.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

_KERNELS = {"AVX512": "_records_avx512", "AVX2": "_records_avx2"}
_LAYOUT = 1  # of what is given to the kernels; as in records.c
_HIGH, _WIDE = 3, 64  # outputs and inputs of a tile
_TRANSPOSED = 2  # times less work must pay for results that are written across their rows
LARGEST = 2.0**27
"""Units that a record may add to a coordinate."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which input token meets which output token, place after place: ``starts`` int64 (A + 1,),
    the others int32."""

    starts: Tensor
    input_token: Tensor
    grad_token: Tensor


@dataclass(frozen=True, eq=False)
class Total:
    """A sum of whole numbers in five bytes each, high * 2^32 + low: int32 and int8 of one shape.

    Exact as long as every number stays below ``MOST`` in size.
    """

    low: Tensor
    high: Tensor
    MOST: ClassVar[int] = 2**39 - 2**31

    @classmethod
    def zeros(cls, length: int) -> Total:
        kinds = (torch.int32, torch.int8)
        return cls(*(torch.zeros(length, dtype=kind, device="cpu") for kind in kinds))

    def view(self, place: slice, *shape: int) -> Total:
        """A part of a flat total, in another shape."""
        return Total(self.low[place].view(*shape), self.high[place].view(*shape))

    def transposed(self) -> Total:
        """First and second axis exchanged."""
        return Total(self.low.transpose(0, 1), self.high.transpose(0, 1))

    def add(self, numbers: Tensor) -> None:
        """Add whole numbers of any type."""
        sum_P = numbers.to(torch.int64) + self.low
        self.low.copy_(sum_P)  # the low 32 bits
        self.high.add_(sum_P.sub_(self.low).bitwise_right_shift_(32))

    def whole(self, place: slice = slice(None)) -> Tensor:
        """int64."""
        return self.high[place].to(torch.int64).bitwise_left_shift_(32).add_(self.low[place])


class _Total(ctypes.Structure):
    _fields_ = [("low", ctypes.c_void_p), ("high", ctypes.c_void_p)]

    @classmethod
    def of(cls, total: Total | None) -> _Total:
        return cls() if total is None else cls(total.low.data_ptr(), total.high.data_ptr())


class _Numbers(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p),
        ("record", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("column", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, tensor_BTD: Tensor) -> _Numbers:
        return cls(tensor_BTD.data_ptr(), *tensor_BTD.stride())


_TABLES = ("starts", "input_token", "grad_token")


class _Task(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("records", "input_tokens", "inputs")),
        *((name, ctypes.c_int64) for name in ("grad_tokens", "places")),
        *((name, _Numbers) for name in ("input", "grad")),
        *((name, ctypes.c_void_p) for name in (*_TABLES, "factor")),
        ("out", _Total),
        *((name, ctypes.c_int64) for name in ("out_place", "out_row", "out_column")),
        ("bias", _Total),
    ]


def name() -> str:
    """Which kernels there are: they decide the last bits."""
    return "no compiled kernels" if _library() is None else f"kernels for {_processor()}"


def serves(device: torch.device) -> bool:
    """Whether tensors of ``device`` can be given to this module."""
    return device.type == "cpu" and _library() is not None


def sum_roundings(tokens: int) -> int:
    """Float32 roundings behind what ``tokens`` tokens of a record come to, at most."""
    return _library().dpldm_sum_roundings(tokens)


def product_roundings(width: int) -> int:
    """Float32 roundings behind an inner product of ``norms``, at most."""
    return _library().dpldm_product_roundings(width)


@functools.lru_cache(maxsize=256)
def straight(tokens: int) -> Pairs:
    """Every token meets itself."""
    each = torch.arange(tokens, dtype=torch.int32, device="cpu")
    return Pairs(torch.tensor([0, tokens], device="cpu"), each, each)


def add_records(
    grad_BTO: Tensor,
    input_BTD: Tensor,
    factor_B: Tensor,
    pairs: Pairs,
    *,
    weight_ODA: Total,
    bias_O: Total | None = None,
) -> None:
    """weight[:, :, a] += sum_b round(factor_b sum_p grad[b, p'] input[b, p'']^T) over pairs p of
    place a, and bias += sum_b round(factor_b sum_t grad[b, t]).

    Operands float32; ``factor_B`` float64, contiguous. The caller makes sure that what is rounded
    is at most ``LARGEST``, and sums below ``Total.MOST``.
    """
    outputs, inputs, _ = weight_ODA.low.shape
    if _TRANSPOSED * _work(high=inputs, wide=outputs) < _work(high=outputs, wide=inputs):
        if bias_O is not None:
            add_rows(token_sums(grad_BTO), factor_B, out_P=bias_O)
        add_records(
            *(input_BTD, grad_BTO, factor_B),
            Pairs(pairs.starts, pairs.grad_token, pairs.input_token),
            weight_ODA=weight_ODA.transposed(),
        )
        return
    task = _task(grad_BTO, input_BTD, pairs, weight_ODA.low)
    task.factor = factor_B.data_ptr()
    task.out, task.bias = _Total.of(weight_ODA), _Total.of(bias_O)
    run = _library().dpldm_sum
    _in_parts(outputs, lambda first, last: run(ctypes.byref(task), first, last), least=_HIGH)


def products(grad_BTO: Tensor, input_BTD: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """sum_p grad[b, p'] input[b, p'']^T of every record and place, float32 (B, O, D, A), and the
    sum of its squares, float64 (B,)."""
    records, outputs, inputs = len(grad_BTO), grad_BTO.shape[2], input_BTD.shape[2]
    out_BODA = _empty(records, outputs, inputs, len(pairs.starts) - 1)
    part_ODA = out_BODA[0]
    if _TRANSPOSED * _work(high=inputs, wide=outputs) < _work(high=outputs, wide=inputs):
        grad_BTO, input_BTD, part_ODA = input_BTD, grad_BTO, part_ODA.transpose(0, 1)
        pairs = Pairs(pairs.starts, pairs.grad_token, pairs.input_token)
    task = _task(grad_BTO, input_BTD, pairs, part_ODA)
    square_B = _empty(records, dtype=torch.float64)
    head = ctypes.byref(task), grad_BTO.shape[2]
    tail = out_BODA.data_ptr(), out_BODA.stride(0), square_B.data_ptr()
    run = _library().dpldm_products
    _in_parts(records, lambda first, last: run(*head, first, last, *tail), least=1)
    return out_BODA, square_B


def token_sums(grad_BTO: Tensor) -> Tensor:
    """sum_t grad[b, t], float32 (B, O), in an order that depends on T alone."""
    records, tokens, outputs = grad_BTO.shape
    out_BO, grad = _empty(records, outputs), _Numbers.of(grad_BTO)
    tail = (tokens, ctypes.byref(grad), outputs, out_BO.data_ptr())
    run = _library().dpldm_token_sums
    _in_parts(records, lambda first, last: run(first, last, *tail), least=1)
    return out_BO


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel, whatever the defaults of the process are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _task(grad_BTO: Tensor, input_BTD: Tensor, pairs: Pairs, out_ODA: Tensor) -> _Task:
    """Operands, and the order of the results."""
    tables = (pairs.starts, pairs.input_token, pairs.grad_token)
    return _Task(
        records=len(grad_BTO),
        input_tokens=input_BTD.shape[1],
        inputs=input_BTD.shape[2],
        grad_tokens=grad_BTO.shape[1],
        places=out_ODA.shape[2],
        input=_Numbers.of(input_BTD),
        grad=_Numbers.of(grad_BTO),
        **dict(zip(_TABLES, (table.data_ptr() for table in tables), strict=True)),
        out_row=out_ODA.stride(0),
        out_column=out_ODA.stride(1),
        out_place=out_ODA.stride(2),
    )


def _work(*, high: int, wide: int) -> int:
    """Of a sum, in numbers of its tiles, which are filled with zeros."""
    return -(-high // _HIGH) * _HIGH * -(-wide // _WIDE) * _WIDE


def add_rows(rows_BP: Tensor, factor_B: Tensor, *, out_P: Total) -> None:
    """out += sum_b round(factor_b rows_b); types and conditions as in ``add_records``."""
    rows_BP, width, out = rows_BP.contiguous(), rows_BP.shape[1], _Total.of(out_P)
    head = (len(factor_B), rows_BP.data_ptr(), width, factor_B.data_ptr(), ctypes.byref(out))
    run = _library().dpldm_rows
    _in_parts(width, lambda first, last: run(*head, first, last), least=1024)


def norms(
    grad_BTO: Tensor,
    input_BSD: Tensor | None,
    *,
    pairs: Pairs | None = None,
    input_BTT: Tensor | None = None,
    bias: bool,
    floor: float,
    gamma: float,
    own: float,
) -> Tensor:
    """Of every record, float64 (4, B): the squared norm of sum_t g_t a_t^T, with a_t the input, or
    1 beside it (``bias``); and gamma, 1 and own^2 times the square of sum_t |g_t| |a_t|.

    With ``pairs``, a_t is what a window shows of the input. ``input_BTT`` gives the inner products
    of the a_t instead. ``floor`` is added to squared lengths in that last sum.
    """
    records, tokens, outputs = grad_BTO.shape
    found_4B = _empty(4, records, dtype=torch.float64)
    grad, input, shape = _Numbers.of(grad_BTO), _Numbers(), (0, 0)
    if input_BSD is not None:
        input, shape = _Numbers.of(input_BSD), input_BSD.shape[1:]
    tail = (tokens, ctypes.byref(grad), outputs, shape[0], ctypes.byref(input), shape[1])
    given_BTT = None if input_BTT is None else input_BTT.contiguous()
    tail += (None if given_BTT is None else given_BTT.data_ptr(),)
    if pairs is None:
        tail += (0, None, None, None)
    else:
        tables = (pairs.starts, pairs.input_token, pairs.grad_token)
        tail += (len(pairs.starts) - 1, *(table.data_ptr() for table in tables))
    tail += (int(bias), floor, gamma, own, records, found_4B.data_ptr())
    run = _library().dpldm_norms
    _in_parts(records, lambda first, last: run(first, last, *tail), least=1)
    return found_4B


def norm_products(
    input_NCS: Tensor, grad_NCS: Tensor, *, records: int, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Per-record gradients of scale and shift of a layer or group norm, float32 (B, C).

    N / B rows of a record follow each other; each is normalised in ``groups`` of channels.
    """
    rows, channels, each = grad_NCS.shape
    found_2BC = _empty(2, records, channels)
    operands = [_Numbers.of(tensor) for tensor in (input_NCS, grad_NCS)]
    tail = (rows // records, groups, channels, each, *map(ctypes.byref, operands), eps)
    tail += tuple(part.data_ptr() for part in found_2BC)
    run = _library().dpldm_norm_products
    _in_parts(records, lambda first, last: run(first, last, *tail), least=1)
    return found_2BC[0], found_2BC[1]


def _in_parts(width: int, run: Callable[[int, int], int | None], *, least: int) -> None:
    """``run`` for all of 0 ... ``width``, in multiples of ``least``, by as many threads as PyTorch
    uses. Raises: MemoryError."""
    threads = min(torch.get_num_threads(), -(-width // least))
    if threads <= 1:
        failures = [run(0, width)]
    else:
        step = -(-width // (threads * least)) * least
        starts = range(0, width, step)
        running = [_pool(threads).submit(run, s, min(s + step, width)) for s in starts]
        wait(running)  # also when interrupted: they use the caller's memory
        failures = [part.result() for part in running]
    if any(failures):
        raise MemoryError("No memory for a sum of per-record gradients: lower run.microbatch.")


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _processor() -> str:
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def _library() -> Any:
    """The kernels for this processor, or None."""
    kernels = _KERNELS.get(_processor())
    if kernels is None:
        return None
    ends = importlib.machinery.EXTENSION_SUFFIXES
    files = [Path(__file__).with_name(kernels + end) for end in ends]
    try:
        library = ctypes.CDLL(str(next(file for file in files if file.exists())))
        _declare(library)
        layout = ctypes.c_int.in_dll(library, "dpldm_layout").value
    except (StopIteration, OSError, AttributeError, ValueError):  # not made, or of another system
        return None
    return library if layout == _LAYOUT else None  # else made from another version's source


def _declare(library: Any) -> None:
    integer, pointer, double = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    library.dpldm_sum.argtypes = [pointer, integer, integer]
    library.dpldm_products.argtypes = [pointer, *[integer] * 3, pointer, integer, pointer]
    library.dpldm_token_sums.argtypes = [*[integer] * 3, pointer, integer, pointer]
    library.dpldm_rows.argtypes = [integer, pointer, integer, *[pointer] * 2, *[integer] * 2]
    library.dpldm_rows.restype = None
    library.dpldm_norms.argtypes = [*[integer] * 3, pointer, integer, integer, pointer, integer]
    library.dpldm_norms.argtypes += [pointer, integer, *[pointer] * 3]
    library.dpldm_norms.argtypes += [ctypes.c_int, *[double] * 3, integer, pointer]
    library.dpldm_norm_products.argtypes = [*[integer] * 6, *[pointer] * 2]
    library.dpldm_norm_products.argtypes += [ctypes.c_float, *[pointer] * 2]
    for run in (library.dpldm_sum_roundings, library.dpldm_product_roundings):
        run.argtypes, run.restype = [integer], integer
