"""The released class means and covariance: sensitivity of the sum, and what is made of it."""

from __future__ import annotations

import math

import pytest
import torch

from dpldm_dist.privacy.statistics import CLIP_NORM, GRID, LatentStatistics


def one_record(wanted: LatentStatistics, latent: torch.Tensor, label: int = 0) -> torch.Tensor:
    return wanted.record_sum(latent.view(1, 1, -1), torch.tensor([[label]]), torch.tensor([1]))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 7.9, 8.0, 50.0, 1e30])
@pytest.mark.parametrize("dims", [5, 64, 1500])
def test_one_record_moves_the_sum_by_at_most_the_clip_norm(scale, dims):
    wanted = LatentStatistics(classes=3, dims=dims, radius=8.0)
    generator = torch.Generator().manual_seed(dims)
    for kind in ("gaussian", "one coordinate"):
        latent = (
            torch.randn(dims, generator=generator) if kind == "gaussian" else torch.eye(dims)[0]
        )
        moved = one_record(wanted, latent * scale, label=2).double() * GRID
        assert float(moved.norm()) <= CLIP_NORM


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_record_with_a_non_finite_latent_contributes_exactly_zero(bad):
    wanted = LatentStatistics(classes=3, dims=6, radius=2.0)
    good, spoilt = torch.ones(6), torch.ones(6)
    spoilt[3] = bad
    assert int(one_record(wanted, spoilt).abs().sum()) == 0
    both = wanted.record_sum(
        torch.stack([good, spoilt])[:, None], torch.tensor([[1], [1]]), torch.tensor([1, 1])
    )
    assert torch.equal(both, one_record(wanted, good, label=1))


def test_a_unit_of_several_images_counts_as_one_record():
    wanted = LatentStatistics(classes=2, dims=4, radius=2.0)
    images = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0)) * 10
    labels = torch.tensor([[0, 1, 0, 1, 1]])
    for real in (1, 3, 5):
        moved = wanted.record_sum(images, labels, torch.tensor([real])).double() * GRID
        assert float(moved.norm()) <= CLIP_NORM
    ignored = images.clone()
    ignored[0, 3:] = math.nan  # padding
    three = torch.tensor([3])
    assert torch.equal(
        wanted.record_sum(ignored, labels, three), wanted.record_sum(images, labels, three)
    )


def test_without_noise_the_estimate_is_the_truth():
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(4, 8, generator=generator)
    labels = torch.arange(4000) % 4
    latents = centres[labels] + 0.5 * torch.randn(4000, 8, generator=generator)
    wanted = LatentStatistics(classes=4, dims=8, radius=100.0)
    total = wanted.record_sum(
        latents[:, None], labels[:, None], torch.ones(4000, dtype=torch.int64)
    )
    means, covariance = wanted.estimate(total, noise_multiplier=1e-9, records=4000)
    assert torch.allclose(means.float(), centres, atol=0.05)
    assert torch.allclose(covariance.float(), 0.25 * torch.eye(8), atol=0.03)


def test_with_noise_means_shrink_together_and_the_covariance_stays_positive():
    wanted = LatentStatistics(classes=4, dims=8, radius=3.0)
    noise = torch.randn(wanted.length, generator=torch.Generator().manual_seed(2)) * 1e4 / GRID
    means, covariance = wanted.estimate(noise.to(torch.int64), noise_multiplier=1e4, records=100)
    assert float((means - means.mean(0)).abs().max()) < 0.1 * float(noise.std() * GRID)
    assert float(torch.linalg.eigvalsh(covariance).min()) > 0
