"""The only door from the privacy code to other workers: implemented in runtime/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # so that a ledger is read without torch
    from torch import Tensor


class Collective(Protocol):
    """A fixed group of workers. Every worker calls every operation, in the same order."""

    rank: int
    world_size: int

    def sum_(self, tensor: Tensor) -> None:
        """In place: the sum over workers, the same bits on all of them for integer tensors."""

    def max_(self, tensor: Tensor) -> None:
        """In place: the maximum over workers."""

    def sum_slices_(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        """In place: ``tensor[bounds[r]:bounds[r + 1]]`` of worker r is the sum over workers, exact
        for integers; the rest is zero."""

    def gather_slices_(self, tensor: Tensor, bounds: Sequence[int]) -> None:
        """In place: worker r gives ``tensor[bounds[r]:bounds[r + 1]]``; then all have all."""

    def broadcast_json(self, value: Any) -> Any:
        """Worker 0's value, on every worker. Small and JSON-able; other workers' is ignored."""

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """Worker 0's bytes, on every worker; never through a task argument or a store on disk."""

    def all_equal(self, payload: bytes) -> bool:
        """Whether every worker gave the same bytes; all learn the same answer."""

    def barrier(self) -> None:
        """Wait until every worker has come here."""
