"""Preparing records ahead of time changes no bit of a run, and hides no error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch

from dpldm_dist.data.latents import LatentShards
from dpldm_dist.errors import DataError, PrivacyError
from dpldm_dist.models.directory import load_model
from dpldm_dist.privacy.sampling import Lanes
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import finetune
from dpldm_dist.stages.finetune.private_data import Part, PrivateData
from dpldm_dist.stages.mechanism import plan_of
from tests.stages.tiny_run import (
    TEST_KEY,
    latent_shards,
    public_model,
    released_weights,
    settings,
)

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    public_model(folder / "model")
    latent_shards(folder / "latents", images=2, views=2)
    return folder


def data_of(root, *, prefetch: int, latents: str = "latents") -> PrivateData:
    config = settings(root, privacy={"noise_multiplier": 50.0}, run={"prefetch": prefetch})
    shards = LatentShards(root / latents)
    diffusion = load_model(root / "model").diffusion
    plan = plan_of(config, records=80)
    return PrivateData(config, plan, shards, bytes(32), 1, diffusion, solo_worker())


def parts_of(data: PrivateData) -> list[Part]:
    with data.ahead(last=STEPS):
        return [part for step in range(STEPS) for part in data.microbatches(step)]


@pytest.mark.parametrize("threads", [1, 2])
def test_microbatches_that_were_made_ahead_are_the_same_in_every_bit(root, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        now, *others = (parts_of(data_of(root, prefetch=most)) for most in (0, 1, 5, 1000))
    finally:
        torch.set_num_threads(before)
    assert len(now) > STEPS
    for parts in others:
        for one, other in zip(now, parts, strict=True):
            for name in Part.__dataclass_fields__:
                assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.fixture
def address(root):
    """The private latents in fsspec's memory."""
    files = fsspec.filesystem("memory")
    for path in (root / "latents").iterdir():
        files.pipe_file(f"/private/latents/{path.name}", path.read_bytes())
    yield "memory://private/latents"
    files.rm("/private", recursive=True)


def test_a_run_releases_the_same_bits_with_and_without_prefetch_and_from_an_address(root, address):
    places = {"without": str(root / "latents"), "with": str(root / "latents"), "elsewhere": address}
    for name, place in places.items():
        most = 0 if name == "without" else 3
        changes = {"dir": str(root / name), "prefetch": most, "unsafe_test_key": TEST_KEY}
        data = {"private": {"latents": place}, "cache_dir": str(root / "cache")}
        config = settings(root, name, run=changes, data=data)
        RunDir(config.run.dir).create()
        finetune(config, solo_worker())
    without = released_weights(root, "without")
    for other in ("with", "elsewhere"):
        found = released_weights(root, other)
        assert without.keys() == found.keys()
        for name, value in without.items():
            assert torch.equal(value, found[name]), (other, name)


def test_a_shard_that_is_damaged_stops_the_run_with_its_name_from_the_background(root):
    folder = latent_shards(root / "damaged")
    data = data_of(root, prefetch=4, latents="damaged")
    content = bytearray((folder / "latents-00003.tar").read_bytes())
    content[5000] ^= 1
    (folder / "latents-00003.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"latents-00003\.tar is damaged"):
        parts_of(data)


# --- planted --------------------------------------------------------------------------------------


def _of_the_next_step(prepared: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, step: prepared(self, step + 1)


def _draws_of_the_next_step(prepared: Callable[..., Any]) -> Callable[..., Any]:
    """The right records, dressed with what they draw a step later."""

    def wrong(self: PrivateData, step: int) -> Any:
        for lane in self._lanes.of_worker(0, 1):
            for chosen in self._lanes.microbatches(self._sampling, step, lane):
                yield self._prepare(chosen, step + 1)

    return wrong


def _first_one_twice(prepared: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: PrivateData, step: int) -> Any:
        found = list(prepared(self, step))
        yield from [found[0], *found]

    return wrong


def _last_one_lost(prepared: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, step: iter(list(prepared(self, step))[:-1])


@pytest.mark.parametrize(
    "bug", [_of_the_next_step, _draws_of_the_next_step, _first_one_twice, _last_one_lost]
)
def test_a_prefetch_that_hands_out_other_records_than_were_drawn_stops_the_step(root, bug):
    with (
        mock.patch.object(PrivateData, "_prepared", bug(PrivateData._prepared)),
        pytest.raises(PrivacyError, match="not those that were drawn for this step"),
    ):
        parts_of(data_of(root, prefetch=4))


def test_a_lane_that_is_worked_on_twice_stops_the_step(root):
    with (
        mock.patch.object(Lanes, "of_worker", lambda self, rank, world_size: [0, 0, 1, 2]),
        pytest.raises(PrivacyError, match=re.escape("each exactly once")),
    ):
        parts_of(data_of(root, prefetch=4))


def test_every_record_is_drawn_at_its_rate_ahead_as_well(root):
    """The masks of the parts tell how many were drawn: 20 of 80 are expected in a step."""
    counts = [int(part.mask_B.sum()) for part in parts_of(data_of(root, prefetch=4))]
    assert abs(np.sum(counts) - 20 * STEPS) < 5 * (80 * STEPS * 0.25 * 0.75) ** 0.5
