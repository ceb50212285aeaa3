"""Both kinds of autoencoder: shapes, moments, the folded latent scale, refusals."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from dpldm_dist.errors import ConfigError, DataError
from dpldm_dist.models.autoencoder import (
    LOG_VARIANCE_RANGE,
    autoencoder_loss,
    build_autoencoder,
    decode,
    encode_moments,
    fold_latent_scale,
    fold_scaling_factor,
    latent_shape,
)

KINDS = pytest.mark.parametrize("kind", ["kl", "vq"])
MEAN = torch.tensor([0.5, -2.0, 3.0])
STD = torch.tensor([0.1, 2.0, 5.0])


def tiny(kind, **changes):
    settings = {
        "kind": kind,
        "channels": 1,
        "size": 16,
        "latent_channels": 3,
        "block_channels": (8, 8, 16),
        "layers_per_block": 1,
        "norm_groups": 4,
        "mid_attention": False,
        "vq_codes": 16,
        "seed": 0,
    }
    return build_autoencoder(**{**settings, **changes}).requires_grad_(False)


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@KINDS
def test_moments_and_images_have_the_stated_shapes(kind):
    autoencoder = tiny(kind)
    moments = encode_moments(autoencoder, images())
    assert latent_shape(autoencoder, 16) == (3, 4, 4)
    assert moments.shape == (4, 6, 4, 4)
    decoded = decode(autoencoder, moments[:, :3])
    assert decoded.shape == (4, 1, 16, 16)
    assert decoded.abs().max() <= 1


def test_moments_are_those_of_stock_diffusers_with_the_log_variance_clamped():
    autoencoder = tiny("kl")
    posterior = autoencoder.encode(images()).latent_dist
    mean, log_variance = encode_moments(autoencoder, images()).chunk(2, dim=1)
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(log_variance, posterior.logvar)
    autoencoder.quant_conv.bias[3:] = 1000.0
    assert encode_moments(autoencoder, images())[:, 3:].max() == LOG_VARIANCE_RANGE[1]


def test_moments_of_a_vq_model_have_next_to_no_variance():
    moments = encode_moments(tiny("vq"), images())
    assert (moments[:, 3:] == LOG_VARIANCE_RANGE[0]).all()


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = tiny("kl"), tiny("kl"), tiny("kl", seed=1)
    assert torch.equal(torch.rand(1), expected)
    name = "encoder.conv_in.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_folding_standardises_the_latent_of_a_kl_autoencoder():
    before, after = tiny("kl"), tiny("kl")
    fold_latent_scale(after, MEAN, STD)
    mean, log_variance = encode_moments(before, images()).chunk(2, dim=1)
    new_mean, new_log_variance = encode_moments(after, images()).chunk(2, dim=1)
    shape = (1, 3, 1, 1)
    assert torch.allclose(new_mean, (mean - MEAN.view(shape)) / STD.view(shape), atol=1e-5)
    assert torch.allclose(new_log_variance, log_variance - 2 * STD.log().view(shape), atol=1e-5)


def test_folding_standardises_the_latent_of_a_vq_model_with_one_scale():
    before, after = tiny("vq"), tiny("vq")
    fold_latent_scale(after, MEAN, STD)
    mean, new_mean = (encode_moments(a, images())[:, :3] for a in (before, after))
    scale = STD.square().mean().sqrt()
    assert torch.allclose(new_mean, (mean - MEAN.view(1, 3, 1, 1)) / scale, atol=1e-5)


@KINDS
def test_folding_does_not_change_reconstructions(kind):
    before, after = tiny(kind), tiny(kind)
    fold_latent_scale(after, MEAN, STD)
    old, new = (decode(a, encode_moments(a, images())[:, :3]) for a in (before, after))
    assert torch.allclose(old, new, atol=1e-5)
    assert after.config.scaling_factor == 1.0


def test_a_scaling_factor_is_folded_into_the_weights():
    before, after = tiny("kl"), tiny("kl")
    after.register_to_config(scaling_factor=0.18215, shift_factor=0.5)
    fold_scaling_factor(after)
    mean, new_mean = (encode_moments(a, images())[:, :3] for a in (before, after))
    assert torch.allclose(new_mean, (mean - 0.5) * 0.18215, atol=1e-5)
    assert after.config.scaling_factor == 1.0


@pytest.mark.parametrize("std", [[1.0, 0.0, 1.0], [1.0, float("nan"), 1.0]])
def test_a_constant_latent_channel_is_refused(std):
    with pytest.raises(DataError, match="constant"):
        fold_latent_scale(tiny("kl"), MEAN, torch.tensor(std))


@KINDS
def test_the_loss_of_a_row_does_not_depend_on_other_rows(kind):
    autoencoder, noise = tiny(kind), torch.zeros(4, 3, 4, 4)
    settings = {"kl_weight": 1e-3, "l1_weight": 0.3}
    together, squared = autoencoder_loss(autoencoder, images(), noise, **settings)
    alone, _ = autoencoder_loss(autoencoder, images()[:1], noise[:1], **settings)
    assert together.shape == squared.shape == (4,)
    if kind == "kl":  # the commitment loss of a VQ model is a mean over the batch
        assert torch.allclose(together[:1], alone, rtol=1e-5)


def test_the_kl_part_of_the_loss_is_the_divergence_from_the_standard_normal():
    autoencoder, noise = tiny("kl"), torch.zeros(4, 3, 4, 4)
    with_kl, _ = autoencoder_loss(autoencoder, images(), noise, kl_weight=1.0, l1_weight=0.0)
    without, _ = autoencoder_loss(autoencoder, images(), noise, kl_weight=0.0, l1_weight=0.0)
    posterior = autoencoder.encode(images()).latent_dist
    normal = torch.distributions.Normal(0.0, 1.0)
    own = torch.distributions.Normal(posterior.mean, posterior.std)
    expected = torch.distributions.kl_divergence(own, normal).flatten(1).mean(1)
    assert torch.allclose(with_kl - without, expected, rtol=1e-4)


@KINDS
def test_every_parameter_of_a_new_autoencoder_learns(kind):
    autoencoder = tiny(kind).requires_grad_(True).train()
    loss, _ = autoencoder_loss(
        autoencoder, images(), torch.ones(4, 3, 4, 4), kl_weight=1e-3, l1_weight=0.3
    )
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in autoencoder.parameters())


@KINDS
def test_the_class_is_that_of_stock_diffusers(kind):
    assert type(tiny(kind)) is {"kl": AutoencoderKL, "vq": VQModel}[kind]


def test_sizes_that_do_not_fit_are_refused_in_words():
    with pytest.raises(ConfigError, match="multiple of 4"):
        tiny("kl", size=18)
    with pytest.raises(ConfigError, match="norm_groups = 4"):
        tiny("kl", block_channels=(8, 6))
