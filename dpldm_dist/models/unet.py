"""The denoising network: a diffusers UNet with cross-attention to conditioning tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from dpldm_dist.errors import ConfigError


def build_unet(
    *,
    latent_channels: int,
    latent_size: int,
    block_channels: Sequence[int],
    layers_per_block: int,
    heads: int,
    context_dim: int,
    norm_groups: int,
    seed: int,
    attention_levels: int | None = None,
) -> UNet2DConditionModel:
    """A new UNet for latents (latent_channels, latent_size, latent_size), weights from ``seed``.

    Every level has residual blocks, and the first ``attention_levels`` (None: all) and the middle
    have transformer blocks (self-attention, cross-attention to tokens of width ``context_dim``,
    feed-forward); every level after the first halves the map.
    Conditioning enters through the tokens alone, so that stock pipelines can give it as
    ``prompt_embeds``. Formal guarantees: no dropout and no batch statistics, so a row of the output
    depends on its own row of the input only.

    Raises: ConfigError if the latent cannot be halved that often, channels do not divide, or there
    are fewer levels than are to have attention.
    """
    levels = len(block_channels)
    _check_sizes(latent_size, block_channels, heads, norm_groups)
    attentive = levels if attention_levels is None else attention_levels
    if not 1 <= attentive <= levels:
        raise ConfigError(
            f"model.attention_levels = {attentive}: expected 1 to {levels}, as many levels as "
            "model.block_channels has."
        )
    plain = levels - attentive
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            down_block_types=("CrossAttnDownBlock2D",) * attentive + ("DownBlock2D",) * plain,
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=("UpBlock2D",) * plain + ("CrossAttnUpBlock2D",) * attentive,
            block_out_channels=tuple(block_channels),
            layers_per_block=layers_per_block,
            # The name is diffusers' own slip: this is the number of heads.
            attention_head_dim=heads,
            cross_attention_dim=context_dim,
            norm_num_groups=norm_groups,
            use_linear_projection=True,
            dropout=0.0,
        )
    return unet.eval()


class _CrossAttention(AttnProcessor2_0):
    """Attention of R rows to T tokens. To one token it is that token, whatever the query: the
    softmax over one is 1. So nothing but value and output is computed, and once for a row."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        context_RTD = encoder_hidden_states
        if context_RTD is None or context_RTD.shape[1] != 1 or attention_mask is not None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, *rest, **more
            )
        output, dropout = attn.to_out
        return dropout(output(attn.to_v(context_RTD)))  # (R, 1, O): added to every place


def spare_idle_attention(unet: nn.Module) -> None:
    """In place: cross-attention to one token costs next to nothing in transformer blocks, which add
    its answer to their rows. The function computed is the same; nothing of this is saved with the
    model."""
    for block in unet.modules():
        attention = block.attn2 if isinstance(block, BasicTransformerBlock) else None
        if attention is not None and type(attention.processor) is AttnProcessor2_0:
            attention.set_processor(_CrossAttention())


def unet_layers(unet: UNet2DConditionModel) -> list[nn.Module]:
    """Residual, attention and resampling layers, in the order of a pass: nearly all weights are
    theirs."""
    middle = [] if unet.mid_block is None else [unet.mid_block]
    return [
        layer
        for block in (*unet.down_blocks, *middle, *unet.up_blocks)
        for layer in _layers_of(block)
    ]


def _layers_of(block: nn.Module) -> list[nn.Module]:
    """A residual layer, its attention, the next ...; what changes the size comes last."""
    attentions = list(getattr(block, "attentions", None) or ())
    found = []
    for residual, attention in zip_longest(block.resnets, attentions):
        found += [residual] if attention is None else [residual, attention]
    for name in ("downsamplers", "upsamplers"):
        found += getattr(block, name, None) or ()
    return found


def _check_sizes(
    latent_size: int, block_channels: Sequence[int], heads: int, norm_groups: int
) -> None:
    halvings = len(block_channels) - 1
    smallest = latent_size / 2**halvings
    if smallest != int(smallest) or smallest < 2:
        raise ConfigError(
            f"model.block_channels has {halvings + 1} levels for latents of {latent_size} x "
            f"{latent_size}: expected a smallest map of at least 2 x 2 after halving "
            f"{halvings} times. Use fewer levels or larger latents."
        )
    for channels in block_channels:
        for name, divisor in (("heads", heads), ("norm_groups", norm_groups)):
            if channels % divisor:
                raise ConfigError(
                    f"model.block_channels holds {channels}: expected multiples of "
                    f"model.{name} = {divisor}."
                )
