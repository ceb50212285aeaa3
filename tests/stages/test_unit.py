"""The unit of privacy: all images of a person are drawn, averaged and clipped as one record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpldm_dist.data.latents import (
    LatentRecord,
    LatentShards,
    write_latent_shard,
    write_latents_manifest,
)
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.data.picture import SourceImage
from dpldm_dist.data.records import PlannedRecord, plan_records
from dpldm_dist.errors import PrivacyError
from dpldm_dist.models.directory import load_model
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.finetune.preparation import trainable_model
from dpldm_dist.stages.finetune.private_data import PrivateData
from dpldm_dist.stages.mechanism import plan_of, refuse_other_unit
from tests.processes import on_workers
from tests.stages.tiny_run import public_model, settings

PEOPLE, MOST, SHARDS, STEPS = 20, 4, 5, 2
WATCHED = "person 19"  # the last of its shard, so that all others keep their coins without it

Plan = Callable[[Sequence[SourceImage]], list[PlannedRecord]]


def images_of_people(*, without: str | None = None) -> list[SourceImage]:
    """1 to 4 images of each person; ``WATCHED`` has 4."""
    return [
        SourceImage(
            name=f"{person}-{number}",
            label="0",
            read=lambda: np.zeros((1, 1), np.uint8),
            unit=f"person {person}",
        )
        for person in range(PEOPLE)
        for number in range(1 + person % MOST)
        if f"person {person}" != without
    ]


def by_person(images: Sequence[SourceImage]) -> list[PlannedRecord]:
    return plan_records(images, max_images_per_unit=MOST)


def every_image_alone(images: Sequence[SourceImage]) -> list[PlannedRecord]:
    """The planted bug: grouping is forgotten."""
    alone = [replace(image, unit=None) for image in images]
    records = plan_records(alone, max_images_per_unit=MOST)
    return [replace(record, images=(image,)) for record, image in zip(records, images, strict=True)]


def write_latents(folder: Path, images: Sequence[SourceImage], plan: Plan) -> Path:
    """Latents of every image, a function of its name; person p lies in shard p mod 5."""
    shards: list[list[LatentRecord]] = [[] for _ in range(SHARDS)]
    for record in plan(images):
        names = [image.name for image in record.images]
        person = int(names[0].partition("-")[0])
        moments = np.stack([_moments(name) for name in names])
        labels = [person % 3] * len(names)
        shards[person % SHARDS].append(LatentRecord(record.key, moments, labels))
    entries = [
        write_latent_shard(
            folder,
            f"latents-{number:05d}.tar",
            records,
            images_per_record=MOST,
            source="made up",
            private=True,
        )
        for number, records in enumerate(shards)
    ]
    write_latents_manifest(
        folder,
        entries,
        classes=["0", "1", "2"],
        config={},
        parents={},
        private=True,
        facts={"unit": "person"},
    )
    return folder


def _moments(name: str) -> np.ndarray:
    """(V, 2C, h, w). The images of one person resemble each other."""
    person, _, number = name.partition("-")
    shared, own = (
        np.random.default_rng(int(person)),
        np.random.default_rng([int(person), int(number)]),
    )
    moments = shared.standard_normal((1, 8, 4, 4)) + 0.1 * own.standard_normal((1, 8, 4, 4))
    moments[:, 4:] = -4.0
    return moments.astype(np.float32)


def sums(collective: Collective, root: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The exact sum of each step over all workers, by data set, (STEPS, P), in units of clip_norm."""
    return {name: _sums(collective, root, root / name).numpy() for name in names}


def _sums(collective: Collective, root: Path, folder: Path) -> torch.Tensor:
    worker = Worker(
        collective.rank, collective.world_size, collective.rank, torch.device("cpu"), collective
    )
    config = settings(
        root,
        data={"unit": "person", "max_images_per_unit": MOST},
        finetune={"batch": 50, "draws": 2},
        privacy={"noise_multiplier": 50.0, "records": 60},
        run={"microbatch": 8},
    )
    latents, public = LatentShards(folder), load_model(root / "model")
    plan = plan_of(config, records=60)
    assert plan.unit == "person"
    denoiser, parameters = trainable_model(config, public, latents, worker)
    denoiser.embedder.grad_scale = 5.0
    data = PrivateData(config, plan, latents, bytes(32), 1, public.diffusion, worker)
    gradients = data.gradients(denoiser, parameters)
    totals = []
    for step in range(STEPS):
        for part in data.microbatches(step):
            gradients.add(data.losses(denoiser, part), part.mask_B)
        totals.append(gradients.take_sum())
        collective.sum_(totals[-1])
    return torch.stack(totals).double() * (plan.grid / plan.clip_norm)


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> dict[str, list[float]]:
    """By grouping: how far the sum of each step moves when one person is removed."""
    root = tmp_path_factory.mktemp("people")
    public_model(root / "model")
    plans: dict[str, Plan] = {"by person": by_person, "every image alone": every_image_alone}
    for name, plan in plans.items():
        write_latents(root / name, images_of_people(), plan)
        write_latents(root / f"{name} without", images_of_people(without=WATCHED), plan)
    names = [*plans, *(f"{name} without" for name in plans)]
    first, second = on_workers(2, sums, root, names)
    assert isinstance(first, dict), first
    assert all(np.array_equal(first[name], second[name]) for name in names)
    return {
        name: np.linalg.norm(first[name] - first[f"{name} without"], axis=1).tolist()
        for name in plans
    }


def test_removing_a_person_of_four_images_moves_the_sum_by_at_most_the_clip_norm(moved):
    assert 0.5 < max(moved["by person"]) <= 1.0


def test_images_that_are_not_grouped_move_it_by_more_which_this_test_notices(moved):
    """The planted bug. Four clipped records that point the same way: up to 4 clip norms."""
    assert max(moved["every image alone"]) > 1.5


@pytest.mark.parametrize("facts", [{"unit": "user"}, {"unit": "image"}, {}])
def test_latents_of_another_unit_are_refused(tmp_path, facts: dict[str, Any]):
    config = settings(tmp_path, data={"unit": "person"})
    found = facts.get("unit", "image")
    with pytest.raises(PrivacyError, match=f"one record per {found}, data.unit = 'person'"):
        refuse_other_unit(config, Manifest("latents", facts, {}))
    refuse_other_unit(config, Manifest("latents", {"unit": "person"}, {}))
    refuse_other_unit(settings(tmp_path), Manifest("latents", {}, {}))
