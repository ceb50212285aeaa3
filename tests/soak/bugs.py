"""Bugs planted on purpose: what would break exact replay, and must not pass the crash tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dpldm_dist.privacy import optimizer
from dpldm_dist.privacy.ledger import PrivacyLedger
from dpldm_dist.privacy.optimizer import NoisySum
from dpldm_dist.privacy.randomness import derive_key
from dpldm_dist.privacy.sampling import Selection
from dpldm_dist.stages.finetune.private_data import Part, PrivateData
from dpldm_dist.stages.finetune.state import TrainingState


def plant(bug: str, rank: int) -> None:
    """Change this process so that it has ``bug``, a name of ``BUGS`` or ``HARMLESS``."""
    (BUGS | HARMLESS)[bug](rank)


def _fresh_noise(rank: int) -> None:
    add_noise, life = NoisySum._add_noise, os.urandom(8).hex()

    def fresh(self: NoisySum, total_P: Any, bounds: Any, key: bytes) -> Any:
        return add_noise(self, total_P, bounds, derive_key(key, life))

    NoisySum._add_noise = fresh


def _noise_of_torch(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)

    def drawn(key: bytes, start: int, stop: int, *, std: float) -> torch.Tensor:
        normal = torch.randn(stop - start, dtype=torch.float64, generator=generator)
        return (normal * std).round().to(torch.int64)

    optimizer.integer_noise = drawn


def _charged_again(rank: int) -> None:
    charge = PrivacyLedger.charge

    def forgetful(self: PrivacyLedger, event: Any, what: str, step: int | None = None) -> bool:
        self._book.here.pop((what, step or 0), None)
        return charge(self, event, what, step)

    PrivacyLedger.charge = forgetful


def _packed_by_worker(rank: int) -> None:
    def microbatches(self: PrivateData, step: int) -> Iterator[Part]:
        mine = self._lanes.of_worker(self._worker.rank, self._worker.world_size)
        drawn = [self._lanes.select(self._sampling, step, lane) for lane in mine]
        shards = np.concatenate([found.shards for found in drawn])
        places = np.concatenate([found.places for found in drawn])
        for chosen in self._lanes.split(Selection(shards, places)):
            records = self._latents.gather(chosen.shards, chosen.places)
            yield self._dress(records, self._draws(self._key, chosen.ids, step))

    PrivateData.microbatches = microbatches


def _drawn_by_crew(rank: int) -> None:
    draws = PrivateData._draws

    def by_crew(self: PrivateData, key: bytes, ids: np.ndarray, step: int) -> Any:
        return draws(self, derive_key(key, "crew", self._worker.world_size), ids, step)

    PrivateData._draws = by_crew


def _forgotten_moments(rank: int) -> None:
    tensors = TrainingState._tensors

    def without(self: TrainingState) -> dict[str, torch.Tensor]:
        found = tensors(self)
        return {name: value for name, value in found.items() if not name.startswith("optimizer/")}

    TrainingState._tensors = without


HARMLESS = {"microbatches depend on the number of workers": _packed_by_worker}
"""What would be a bug if sums were rounded: with compiled kernels, records are."""

BUGS: dict[str, Callable[[int], None]] = {
    "a repeated step gets fresh noise": _fresh_noise,
    "the noise comes from torch's generator": _noise_of_torch,
    "a repeated step is charged again": _charged_again,
    "what a record draws depends on the number of workers": _drawn_by_crew,
    "a checkpoint lacks the optimizer's memory": _forgotten_moments,
}
