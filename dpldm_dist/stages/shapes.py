"""The network that a config describes, by its shapes alone: parameters and operations. Not a stage.

Shapes: R rows, C, h, w of a latent.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from dpldm_dist.config import Config
from dpldm_dist.models.conditioning import ClassEmbedder
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.trainable import select_trainable
from dpldm_dist.models.unet import build_unet


def shapes_of(config: Config) -> tuple[Denoiser, dict[str, torch.nn.Parameter]]:
    """The denoiser that ``config`` describes, and what would train of it, without any numbers."""
    with torch.device("meta"):
        unet = build_unet(
            latent_channels=config.autoencoder.latent_channels,
            latent_size=_latent_size(config),
            block_channels=config.model.block_channels,
            layers_per_block=config.model.layers_per_block,
            heads=config.model.heads,
            context_dim=config.model.context_dim,
            norm_groups=config.model.norm_groups,
            attention_levels=config.model.attention_levels,
            seed=0,
        )
        rows_NTD = torch.zeros(1, config.model.context_tokens, config.model.context_dim)
        denoiser = Denoiser(unet, ClassEmbedder(rows_NTD, kind=config.model.conditioning))
        parameters = select_trainable(
            denoiser,
            trainable=config.finetune.trainable,
            first_block=config.finetune.first_block,
            lora_rank=config.finetune.lora_rank,
        )
    return denoiser, parameters


def flops_per_row(config: Config) -> float:
    """Operations of one draw of one record, forward and backward, as autograd does them.

    Counted by torch on tensors without numbers; a multiplication and an addition are two.
    """
    denoiser, _ = shapes_of(config)
    size, channels = _latent_size(config), config.autoencoder.latent_channels
    rows = 2
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        z_RChw = torch.empty(rows, channels, size, size)
        context_RTD = torch.empty(rows, config.model.context_tokens, config.model.context_dim)
        times_R = torch.zeros(rows, dtype=torch.int64)
        denoiser(z_RChw, times_R, context_RTD).sum().backward()
    return counter.get_total_flops() / rows


def _latent_size(config: Config) -> int:
    return config.data.size // 2 ** (len(config.autoencoder.block_channels) - 1)
