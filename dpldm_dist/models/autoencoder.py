"""Images to latents and back: diffusers' KL autoencoder or VQ model.

Shapes: B images, C latent channels, h, w latent size. Images are float in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from dpldm_dist.errors import ConfigError, DataError

Autoencoder = AutoencoderKL | VQModel

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Bounds on the log-variance of a posterior, those of diffusers; the lower one means "none"."""


def build_autoencoder(
    *,
    kind: Literal["kl", "vq"],
    channels: int,
    size: int,
    latent_channels: int,
    block_channels: Sequence[int],
    layers_per_block: int,
    norm_groups: int,
    mid_attention: bool,
    vq_codes: int,
    seed: int,
) -> Autoencoder:
    """A new autoencoder for images (channels, size, size), weights from ``seed``.

    Every block after the first halves the image: the latent is size / 2 ** (blocks - 1) wide.
    Raises: ConfigError if the image cannot be halved that often or channels do not divide.
    """
    levels = len(block_channels)
    if size % 2 ** (levels - 1):
        raise ConfigError(
            f"autoencoder.block_channels halves the image {levels - 1} times: data.size = {size} "
            f"must be a multiple of {2 ** (levels - 1)}."
        )
    if any(count % norm_groups for count in block_channels):
        raise ConfigError(
            f"autoencoder.block_channels = {tuple(block_channels)}: expected multiples of "
            f"autoencoder.norm_groups = {norm_groups}."
        )
    shared: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(block_channels),
        "layers_per_block": layers_per_block,
        "latent_channels": latent_channels,
        "norm_num_groups": norm_groups,
        "sample_size": size,
        "scaling_factor": 1.0,
        "mid_block_add_attention": mid_attention,
        "force_upcast": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "kl":
            return AutoencoderKL(**shared).eval()
        autoencoder = VQModel(**shared, num_vq_embeddings=vq_codes)
        nn.init.normal_(autoencoder.quantize.embedding.weight)  # the scale of a fresh latent
        return autoencoder.eval()


def latent_shape(autoencoder: Autoencoder, size: int) -> tuple[int, int, int]:
    """(C, h, w) of the latent of an image of ``size`` x ``size``."""
    config = autoencoder.config
    channels = config.latent_channels
    if isinstance(autoencoder, VQModel) and config.vq_embed_dim is not None:
        channels = config.vq_embed_dim
    side = size // 2 ** (len(config.block_out_channels) - 1)
    return channels, side, side


def encode_moments(autoencoder: Autoencoder, images_BCHW: Tensor) -> Tensor:
    """Mean, then log-variance, of the posterior of each image: (B, 2C, h, w).

    The log-variance is clamped to ``LOG_VARIANCE_RANGE``. For a VQ model the mean is the latent
    before quantisation (``decode`` quantises) and the log-variance is the lower bound.
    """
    if isinstance(autoencoder, VQModel):
        mean = autoencoder.encode(images_BCHW).latents
        log_variance = torch.full_like(mean, LOG_VARIANCE_RANGE[0])
    else:
        posterior = autoencoder.encode(images_BCHW).latent_dist
        mean, log_variance = posterior.mean, posterior.logvar.clamp(*LOG_VARIANCE_RANGE)
    return torch.cat([mean, log_variance], dim=1)


def decode(autoencoder: Autoencoder, z_BCHW: Tensor) -> Tensor:
    """Images (B, channels, H, W) in [-1, 1] of latents."""
    return autoencoder.decode(z_BCHW).sample.clamp(-1, 1)


class AutoencoderLoss(nn.Module):
    """The pre-training loss as a module, so that a data-parallel wrapper sees one forward pass."""

    def __init__(self, autoencoder: Autoencoder, *, kl_weight: float, l1_weight: float) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.kl_weight = kl_weight
        self.l1_weight = l1_weight

    def forward(self, images_BCHW: Tensor, noise_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """(loss rows (B,), squared error rows (B,)); see ``autoencoder_loss``."""
        return autoencoder_loss(
            self.autoencoder,
            images_BCHW,
            noise_BChw,
            kl_weight=self.kl_weight,
            l1_weight=self.l1_weight,
        )


def autoencoder_loss(
    autoencoder: Autoencoder,
    images_BCHW: Tensor,
    noise_BChw: Tensor,
    *,
    kl_weight: float,
    l1_weight: float,
) -> tuple[Tensor, Tensor]:
    """(loss, squared error) of each image, both (B,): squared + ``l1_weight`` absolute error, plus
    ``kl_weight`` times the mean KL divergence of a latent coordinate from the standard normal.

    ``noise_BChw`` is the standard normal noise of the posterior's draw. A VQ model has its
    commitment loss instead of the divergence, and no noise.
    Source: Kingma and Welling (2014), arXiv 1312.6114, appendix B.
    """
    if isinstance(autoencoder, VQModel):
        answer = autoencoder(images_BCHW)
        images, extra_B = answer.sample, answer.commit_loss.expand(len(images_BCHW))
    else:
        posterior = autoencoder.encode(images_BCHW).latent_dist
        images = autoencoder.decode(posterior.mean + posterior.std * noise_BChw).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
        extra_B = kl_weight * kl.flatten(1).mean(1)
    error = (images - images_BCHW).flatten(1)
    squared_B = error.square().mean(1)
    return squared_B + l1_weight * error.abs().mean(1) + extra_B, squared_B.detach()


@torch.no_grad()
def fold_latent_scale(autoencoder: Autoencoder, mean_C: Tensor, std_C: Tensor) -> None:
    """Make (latent - mean) / std the autoencoder's own latent, by changing weights in place.

    Folded into the 1 x 1 convolutions around the latent, so that nobody has to remember a scale:
    ``scaling_factor`` becomes 1, and decoding gives the same images as before within rounding. The
    numbers must come from public data. A VQ model takes one scale, the root mean square of
    ``std_C``, so that the nearest code of a latent stays the same; its codes move along.

    Raises: DataError if the autoencoder has no such convolutions, or a std is not positive.
    """
    before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
    if before is None or after is None:
        raise DataError(
            "The autoencoder has no quant_conv: expected one to hold the latent scale. Choose an "
            "autoencoder with use_quant_conv and use_post_quant_conv."
        )
    if not bool((std_C > 0).all()) or not bool(torch.isfinite(mean_C).all()):
        raise DataError("A latent channel is constant on the public images: train longer.")
    mean_C, std_C = mean_C.to(before.weight), std_C.to(before.weight)
    if isinstance(autoencoder, VQModel):
        std_C = std_C.square().mean().sqrt().expand_as(mean_C)
        codes = autoencoder.quantize.embedding.weight
        codes.copy_((codes - mean_C) / std_C)
    channels = len(mean_C)
    before.weight[:channels] /= std_C.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean_C) / std_C
    if not isinstance(autoencoder, VQModel):
        before.bias[channels:] -= 2 * std_C.log()  # the log-variance of a scaled latent
    after.bias += torch.einsum("oi,i->o", after.weight[:, :, 0, 0], mean_C)
    after.weight *= std_C.view(1, -1, 1, 1)
    autoencoder.register_to_config(scaling_factor=1.0, shift_factor=None)


def fold_scaling_factor(autoencoder: Autoencoder) -> None:
    """Fold the scaling and shift factors of a downloaded autoencoder into its weights.

    Afterwards its latents are those that a denoiser trained with it expects. Raises: DataError.
    """
    scale = autoencoder.config.scaling_factor
    shift = getattr(autoencoder.config, "shift_factor", None) or 0.0
    if scale == 1.0 and shift == 0.0:
        return
    channels = autoencoder.post_quant_conv.in_channels if autoencoder.post_quant_conv else 0
    fold_latent_scale(
        autoencoder, torch.full((channels,), float(shift)), torch.full((channels,), 1 / scale)
    )
