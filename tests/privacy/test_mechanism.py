"""The distributed Gaussian mechanism on real processes, and the planted bugs it must catch."""

from __future__ import annotations

import pytest
import torch

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.blocks import BLOCK, block_slices, pieces_of
from dpldm_dist.runtime.collective import SoloCollective
from tests.privacy.mechanism_checks import CHECKS, PLANTED_BUGS, mechanism, outcomes
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
    return mechanism(collective).release(mine, purpose="step", step=0)


@pytest.mark.parametrize("std", [0.0, 1.0, -5.0, float("nan"), float("inf")])
def test_noise_too_small_for_the_grid_is_refused(std):
    with pytest.raises(PrivacyError, match="grid units"):
        mechanism(SoloCollective(), std=std)


def test_a_sum_that_is_not_integer_is_refused():
    with pytest.raises(PrivacyError, match="int64"):
        mechanism(SoloCollective()).release(torch.zeros(3), purpose="step", step=0)


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
