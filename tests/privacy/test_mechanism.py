"""The distributed Gaussian mechanism on real processes, and the planted bugs it must catch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import optimizer as optimizer_module
from dpldm_dist.privacy.blocks import BLOCK, block_slices, pieces_of
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer
from dpldm_dist.runtime import collective as collective_module
from dpldm_dist.runtime.collective import SoloCollective
from tests.privacy.mechanism_checks import (
    CHECKS,
    CLIP_NORM,
    GRID,
    PLANTED_BUGS,
    mechanism,
    outcomes,
    released,
)
from tests.processes import on_workers


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_promise_holds_for_any_number_of_workers(world_size):
    wanted = [(None, check) for check in CHECKS]
    for rank, said in enumerate(on_workers(world_size, outcomes, wanted)):
        for check, text in zip(CHECKS, said, strict=True):
            assert text == "", f"rank {rank}, {check}: {text}"


def test_every_planted_bug_is_caught_on_two_workers():
    wanted = [(bug, check) for bug, (_, check) in PLANTED_BUGS.items()]
    by_rank = on_workers(2, outcomes, wanted)
    for index, bug in enumerate(PLANTED_BUGS):
        assert any(said[index] for said in by_rank), f"not caught: {bug}"


def test_the_release_is_bit_identical_for_1_2_and_3_workers():
    first, *others = (on_workers(world, released_total)[0] for world in (1, 2, 3))
    for other in others:
        assert torch.equal(first, other)


def released_total(collective):
    parts = torch.arange(6)[:, None] * torch.ones(70_000, dtype=torch.int64)
    mine = parts[collective.rank :: collective.world_size].sum(0)
    return released(mechanism(collective), mine)


def test_a_release_has_the_same_bits_however_little_is_drawn_or_sent_at_a_time():
    first = on_workers(3, released_total)[0]
    assert torch.equal(first, on_workers(3, released_in_small_parts)[0])
    assert torch.equal(first, on_workers(1, released_in_small_parts)[0])


def released_in_small_parts(collective):
    with (
        mock.patch.object(optimizer_module, "_BLOCKS_OF_THREAD", 1),
        mock.patch.object(collective_module, "_COPIED_NUMBERS", 10_000),
    ):
        return released_total(collective)


def test_a_release_lies_in_the_memory_of_its_sum():
    """So a step holds one vector of integers, which then becomes its mean gradient."""
    parameter = torch.nn.Parameter(torch.zeros(5000))
    optimizer = DistributedDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [parameter],
        mechanism(SoloCollective()),
        grid=GRID,
        clip_norm=CLIP_NORM,
        divisor=3.0,
        extra=2,
    )
    sum_P = torch.arange(5002, dtype=torch.int64) << 30
    wanted = released(mechanism(SoloCollective()), sum_P)
    noisy = optimizer.step(sum_P, step=0)
    assert noisy.mean_P.data_ptr() == sum_P.data_ptr()
    assert torch.equal(noisy.extra, wanted[-2:])
    assert torch.equal(noisy.mean_P, wanted[:-2].double() * (GRID / CLIP_NORM / 3.0))


@pytest.mark.parametrize("std", [0.0, 1.0, -5.0, float("nan"), float("inf")])
def test_noise_too_small_for_the_grid_is_refused(std):
    with pytest.raises(PrivacyError, match="grid units"):
        mechanism(SoloCollective(), std=std)


def test_a_sum_that_is_not_integer_is_refused():
    with pytest.raises(PrivacyError, match="int64"):
        mechanism(SoloCollective()).release_(torch.zeros(3), purpose="step", step=0)


def test_slices_of_whole_blocks_tile_every_length():
    for length in (0, 1, BLOCK, BLOCK + 1, 10 * BLOCK + 5):
        for workers in (1, 2, 3, 7):
            bounds = block_slices(length, workers)
            assert bounds[0] == 0 and bounds[-1] == length and len(bounds) == workers + 1
            assert bounds == sorted(bounds)
            assert all(bound % BLOCK == 0 or bound == length for bound in bounds)
            assert bounds[1] > 0 or length == 0  # the first worker saves for all


def test_pieces_are_views_of_the_parameters_cut_at_every_block():
    shapes = [(3, BLOCK), (7,), (), (BLOCK - 7 - 1,), (2,)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    pieces = pieces_of(parameters)
    ends = torch.tensor([piece.numel() for piece in pieces]).cumsum(0).tolist()
    assert (
        set(range(BLOCK, 4 * BLOCK + 1, BLOCK)) <= set(ends)
        and max(map(len, map(torch.flatten, pieces))) == BLOCK
    )
    assert torch.equal(torch.cat(pieces_of(pieces)), torch.cat([p.flatten() for p in parameters]))
    with torch.no_grad():
        for piece in pieces:
            piece.zero_()
    assert not any(parameter.any() for parameter in parameters)
