"""Poisson sampling over shards: one independent coin per record and step, exact in law.

The coin of a record depends on (run key, attempt, step, shard, place in the shard) alone, so the
batch is the same for every number of workers, assignment of shards and microbatch size. Nothing is
rounded at run time: the sample rate is a multiple of 2^-40 and a coin compares 40 random bits with
it, byte by byte, reading a further byte only while the outcome is open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.randomness import derive_key, keystream

RATE_BITS = 40
_RATE_BYTES = RATE_BITS // 8


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
    """Which records of a shard take part in a step.

    Formal guarantees: every record takes part with probability ``sample_rate`` exactly (given a
    uniform keystream), independently of every other record, step, shard and attempt. The outcome
    for a record does not change when other shards or workers come or go.
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

    def select(self, step: int, shard: int, records: int) -> np.ndarray:
        """Places in the shard, ascending, of the records that take part. int64."""
        if self._threshold == 1 << RATE_BITS:
            return np.arange(records)
        key = derive_key(self._key, "select", self._attempt, step, shard)
        return _below(key, records, self._threshold)


def _below(key: bytes, records: int, threshold: int) -> np.ndarray:
    """Places whose 40-bit number is below ``threshold``: compare the leading byte, and go on to the
    next one only where it is equal."""
    chosen = []
    open_places = np.arange(records)
    for depth, digit in enumerate(threshold.to_bytes(_RATE_BYTES, "big")):
        if not len(open_places):
            break
        byte = keystream(key, len(open_places), stream=depth)
        chosen.append(open_places[byte < digit])
        open_places = open_places[byte == digit]
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

    Shard s lies in lane s mod ``lanes``; worker r of W works on the lanes r, r + W, ... So the
    make-up of every microbatch is the same for every number of workers.

    Formal guarantees: every shard belongs to exactly one lane and every lane to exactly one worker.
    At most ``cap`` records of a lane enter a step; further ones are left out.
    """

    def __init__(self, shard_records: Sequence[int], *, lanes: int, cap: int, microbatch: int):
        self._shard_records = tuple(shard_records)
        self._lanes = lanes
        self._cap = cap
        self._microbatch = microbatch

    def of_worker(self, rank: int, world_size: int) -> range:
        """The lanes of one worker; none if there are more workers than lanes."""
        return range(rank, self._lanes, world_size)

    def shards_of_worker(self, rank: int, world_size: int) -> list[int]:
        """The shards that this worker reads."""
        mine = set(self.of_worker(rank, world_size))
        return [s for s in range(len(self._shard_records)) if s % self._lanes in mine]

    def microbatches(self, sampling: PoissonSampling, step: int, lane: int) -> Iterator[Selection]:
        """The records of ``lane`` that take part in ``step``, in shard order, in microbatches."""
        return self.split(self.select(sampling, step, lane))

    def select(self, sampling: PoissonSampling, step: int, lane: int) -> Selection:
        """All records of ``lane`` that take part in ``step``, in shard order, at most ``cap``."""
        shards, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for shard in range(lane, len(self._shard_records), self._lanes):
            chosen = sampling.select(step, shard, self._shard_records[shard])
            places.append(chosen)
            shards.append(np.full(len(chosen), shard, dtype=np.int64))
        return Selection(np.concatenate(shards)[: self._cap], np.concatenate(places)[: self._cap])

    def split(self, chosen: Selection) -> Iterator[Selection]:
        """A selection of one lane cut into microbatches, in its order."""
        for start in range(0, len(chosen.shards), self._microbatch):
            stop = start + self._microbatch
            yield Selection(chosen.shards[start:stop], chosen.places[start:stop])
