"""Poisson sampling over shards: one independent coin per record and step, exact in law.

The coin of a record depends on (run key, attempt, step, lane, seat in the lane) alone, so the batch
is the same for every number of workers and microbatch size. Nothing is rounded at run time: the
sample rate is a multiple of 2^-40 and a coin compares 40 random bits with it, byte by byte, reading
a further byte only while the outcome is open. A lane is drawn in one go: one byte of keystream per
record, and no work of Python's that grows with the number of records or shards.
Shapes: S shards, n records.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.randomness import derive_key, keystream, keystream_parts

RATE_BITS = 40
_RATE_BYTES = RATE_BITS // 8
_SEATS = 64  # a shard has a multiple of so many: few records more or less move nobody else


def dyadic_rate(rate: float) -> float:
    """The smallest multiple of 2^-40 that is at least ``rate``; exact in float64.

    Raises: PrivacyError if ``rate`` is not in (0, 1].
    """
    if not (math.isfinite(rate) and 0.0 < rate <= 1.0):
        raise PrivacyError(
            f"Sample rate {rate}: expected a number in (0, 1]; lower finetune.batch."
        )
    return math.ceil(rate * 2**RATE_BITS) / 2**RATE_BITS


class PoissonSampling:
    """Which seats of a row take part in a step: a lane is a row, a record has a seat in it.

    Formal guarantees: every seat takes part with probability ``sample_rate`` exactly (given a
    uniform keystream), independently of every other seat, step, row and attempt, whatever the
    number of workers.
    Source: Abadi et al. (2016), arXiv 1607.00133, section 3.1 (sampling with probability q).
    """

    def __init__(self, key: bytes, *, attempt: int, sample_rate: float):
        units = sample_rate * 2**RATE_BITS
        if units != int(units) or not 0 < units <= 2**RATE_BITS:
            raise PrivacyError(
                f"Sample rate {sample_rate}: expected a multiple of 2^-{RATE_BITS} in (0, 1]."
            )
        self._key = key
        self._attempt = attempt
        self._threshold = int(units)

    def select(self, step: int, row: int, seats: int) -> np.ndarray:
        """The seats 0 ... ``seats`` - 1 of ``row`` that take part, ascending. int64."""
        if self._threshold == 1 << RATE_BITS:
            return np.arange(seats)
        key = derive_key(self._key, "select", self._attempt, step, row)
        return _below(key, seats, self._threshold)


def _below(key: bytes, seats: int, threshold: int) -> np.ndarray:
    """Seats whose 40-bit number is below ``threshold``: compare the leading byte, and go on to the
    next one only where it is equal."""
    first, *digits = threshold.to_bytes(_RATE_BYTES, "big")
    chosen, still_open, start = [], [], 0
    for byte in keystream_parts(key, seats):
        if first:
            chosen.append(start + np.flatnonzero(byte < first))
        still_open.append(start + np.flatnonzero(byte == first))
        start += len(byte)
    open_seats = np.concatenate(still_open) if still_open else np.zeros(0, np.int64)
    for depth, digit in enumerate(digits, start=1):
        if not len(open_seats):
            break
        byte = keystream(key, len(open_seats), stream=depth)
        chosen.append(open_seats[byte < digit])
        open_seats = open_seats[byte == digit]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Selection:
    """Records of a lane or of a microbatch: ``shards`` and ``places``, int64 (n,)."""

    shards: np.ndarray
    places: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        """One number per record, unique over the data set. int64 (n,)."""
        return (self.shards << 40) | self.places


class Lanes:
    """Fixed groups of shards within which microbatches are packed.

    Shards are spread over the lanes, and lanes over the workers, by size: the largest first, each
    to who has the least so far. So the make-up of every microbatch is the same for every number of
    workers, and nobody has much more to do than another.

    Formal guarantees: every shard belongs to exactly one lane and every lane to exactly one worker.
    The lanes do not depend on the workers. At most ``cap`` records of a lane enter a step; further
    ones are left out. Every record has a seat of its own in its lane, and nobody else sits there.
    Source: Graham (1969), "Bounds on multiprocessing timing anomalies" (largest first).
    """

    def __init__(self, shard_records: Sequence[int], *, lanes: int, cap: int, microbatch: int):
        self._records_S = np.array(shard_records, dtype=np.int64)
        self._lanes = lanes
        self._cap = cap
        self._microbatch = microbatch
        seats_S = -(-self._records_S // _SEATS) * _SEATS
        self._shards = [np.array(s, dtype=np.int64) for s in balanced(seats_S.tolist(), lanes)]
        self._ends = [np.cumsum(seats_S[shards]) for shards in self._shards]

    def of_worker(self, rank: int, world_size: int) -> Sequence[int]:
        """The lanes of one worker, ascending; none if there are more workers than lanes."""
        seats_L = [int(ends[-1]) if len(ends) else 0 for ends in self._ends]
        return balanced(seats_L, world_size)[rank]

    def shards_of_worker(self, rank: int, world_size: int) -> list[int]:
        """The shards that this worker reads, ascending."""
        mine = [self._shards[lane] for lane in self.of_worker(rank, world_size)]
        return sorted(np.concatenate(mine).tolist()) if mine else []

    def microbatches(self, sampling: PoissonSampling, step: int, lane: int) -> Iterator[Selection]:
        """The records of ``lane`` that take part in ``step``, in shard order, in microbatches."""
        return self.split(self.select(sampling, step, lane))

    def select(self, sampling: PoissonSampling, step: int, lane: int) -> Selection:
        """All records of ``lane`` that take part in ``step``, in shard order, at most ``cap``.

        The shards of a lane sit in one row, in ascending order; what falls on a seat without a
        record is nobody.
        """
        shards, ends = self._shards[lane], self._ends[lane]
        seats = sampling.select(step, lane, int(ends[-1]) if len(ends) else 0)
        where = np.searchsorted(ends, seats, side="right")
        begins = np.concatenate([np.zeros(1, np.int64), ends])
        chosen, places = shards[where], seats - begins[where]
        taken = np.flatnonzero(places < self._records_S[chosen])[: self._cap]
        return Selection(chosen[taken], places[taken])

    def split(self, chosen: Selection) -> Iterator[Selection]:
        """A selection of one lane cut into microbatches, in its order."""
        for start in range(0, len(chosen.shards), self._microbatch):
            stop = start + self._microbatch
            yield Selection(chosen.shards[start:stop], chosen.places[start:stop])


def balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """The numbers of the things of ``sizes``, in ``parts`` groups of nearly equal total size.

    Ties go to the lower number, so things of one size are dealt out in turn; each group ascends.
    """
    heap, groups = [(0, 0, part) for part in range(parts)], [[] for _ in range(parts)]
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        load, count, part = heap[0]
        groups[part].append(number)
        heapq.heapreplace(heap, (load + sizes[number], count + 1, part))
    return [sorted(group) for group in groups]
