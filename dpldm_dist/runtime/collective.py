"""How workers talk: over a torch.distributed group, or alone. Implements privacy.Collective."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_COPIED_NUMBERS = 2**22  # that lie in one buffer of an exchange


class SoloCollective:
    """One worker: every sum is its own."""

    rank = 0
    world_size = 1

    def sum_(self, tensor: Tensor) -> None:
        pass

    def max_(self, tensor: Tensor) -> None:
        pass

    def sum_slices_(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        pass

    def gather_slices_(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        pass

    def broadcast_json(self, value: Any) -> Any:
        return json.loads(json.dumps(value))

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        assert payload is not None
        return payload

    def all_equal(self, payload: bytes) -> bool:
        return True

    def barrier(self) -> None:
        pass


class GroupCollective:
    """The default process group of torch.distributed (gloo on CPU, NCCL on GPU)."""

    def __init__(self, device: torch.device):
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._device = device

    def sum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def sum_slices_(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        """Every worker sends each other its part and adds what it gets: as few bytes as a ring's
        reduce-scatter. (gloo's own reduce_scatter sends as many as an all-reduce, twice that.)"""
        for pieces in self._pieces(bounds):
            sizes = [piece.stop - piece.start for piece in pieces]
            mine = sizes[self.rank]
            sent = torch.cat([tensor[piece] for piece in pieces])
            parts = tensor.new_empty(mine * self.world_size)
            dist.all_to_all_single(parts, sent, [mine] * self.world_size, sizes)
            for rank, piece in enumerate(pieces):
                if rank != self.rank:
                    tensor[piece] = 0
            if mine:
                torch.sum(parts.view(self.world_size, mine), 0, out=tensor[pieces[self.rank]])

    def gather_slices_(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        for pieces in self._pieces(bounds):
            sizes = [piece.stop - piece.start for piece in pieces]
            mine = tensor.new_zeros(max(sizes))  # equal lengths: every backend can gather them
            mine[: sizes[self.rank]] = tensor[pieces[self.rank]]
            everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
            dist.all_gather(everyone, mine)
            for piece, size, part in zip(pieces, sizes, everyone, strict=True):
                tensor[piece] = part[:size]

    def _pieces(self, bounds: Sequence[int]) -> Iterator[list[slice]]:
        """The slices, a piece of each at a time, so that copies stay small; the last ones may be
        empty."""
        step = max(1, _COPIED_NUMBERS // self.world_size)
        for offset in range(0, max(stop - start for start, stop in pairwise(bounds)), step):
            yield [
                slice(min(start + offset, stop), min(start + offset + step, stop))
                for start, stop in pairwise(bounds)
            ]

    def broadcast_json(self, value: Any) -> Any:
        return json.loads(self.broadcast_bytes(json.dumps(value).encode()))

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """Two broadcasts: the length, then the bytes. The buffer is cleared after use."""
        length = torch.tensor([len(payload or b"")], dtype=torch.int64, device=self._device)
        dist.broadcast(length, src=0)
        buffer = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        if self.rank == 0 and payload:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        if int(length):
            dist.broadcast(buffer, src=0)
        received = buffer.cpu().numpy().tobytes()
        buffer.zero_()
        return received

    def all_equal(self, payload: bytes) -> bool:
        """One reduction: the largest and the smallest of every byte of the digests agree."""
        digest = bytearray(hashlib.sha256(payload).digest())
        bytes_32 = torch.frombuffer(digest, dtype=torch.uint8).to(torch.int64)
        extremes = torch.cat([bytes_32, -bytes_32]).to(self._device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        largest, smallest = extremes.cpu().chunk(2)
        return bool(torch.equal(largest, -smallest))

    def barrier(self) -> None:
        token = torch.zeros(1, device=self._device)
        dist.all_reduce(token)
        if token.item() != 0:  # reading it waits for the reduction on every backend
            raise AssertionError("a sum of zeros is not zero")
