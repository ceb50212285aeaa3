"""The flat vector of trainable parameters, and its blocks: what digests and slices are made of.

Who owns which block depends on the number of workers; what is computed in a block does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import nn

COPIED = 1 << 17
"""Coordinates that are copied at a time: so few that the copies do not count beside the vector."""
BLOCK = 1 << 12
"""Coordinates of a block. Below the size at which torch would share a tensor among threads, so that
the bits of an update do not depend on their number."""


def blocks_of(length: int) -> int:
    """How many blocks a vector has; the last may be shorter."""
    return -(-length // BLOCK)


def block_slices(length: int, workers: int) -> list[int]:
    """Bounds of one slice of whole blocks per worker, in order; the first is never empty."""
    blocks = blocks_of(length)
    bounds = [min(-(-blocks * rank // workers) * BLOCK, length) for rank in range(workers)]
    return [*bounds, length]


def pieces_of(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters in flat order, cut at every block: views of the same memory.

    An optimizer of pieces updates the parameters in place, with the same bits whichever pieces it
    has besides. Raises: ValueError for a parameter whose memory is not contiguous.
    """
    pieces: list[nn.Parameter] = []
    start = 0
    for parameter in parameters:
        if not parameter.is_contiguous():
            raise ValueError("A trainable parameter is not contiguous in memory.")
        flat = parameter.detach().view(-1)
        stop = start + len(flat)
        inner = range((start // BLOCK + 1) * BLOCK, stop, BLOCK)
        cuts = [0, *(cut - start for cut in inner), len(flat)]
        pieces += [nn.Parameter(flat[a:b]) for a, b in pairwise(cuts)]
        start = stop
    return pieces


def converted_(numbers_P: torch.Tensor, dtype: torch.dtype, *, scale: float = 1.0) -> torch.Tensor:
    """``scale`` times the numbers, of another type of the same size, in their own memory."""
    found_P = numbers_P.view(dtype)
    for start in range(0, len(numbers_P), COPIED):
        chunk = slice(start, start + COPIED)
        part = numbers_P[chunk].to(dtype)
        found_P[chunk] = part if scale == 1.0 else part.mul_(scale)
    return found_P


def flat_length(parameters: Iterable[torch.Tensor]) -> int:
    """Coordinates of all of them."""
    return sum(parameter.numel() for parameter in parameters)
