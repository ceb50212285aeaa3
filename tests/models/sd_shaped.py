"""A tiny local directory shaped like Stable Diffusion, made from configurations alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from dpldm_dist.models.autoencoder import build_autoencoder
from dpldm_dist.models.conditioning import random_rows
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.directory import save_model
from dpldm_dist.models.unet import build_unet

TOKENS, WIDTH = 8, 16
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def make_text_encoder(folder: Path) -> None:
    """``text_encoder/`` and ``tokenizer/`` below ``folder``: one token per character."""
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    numbers = {token: number for number, token in enumerate(vocabulary)}
    (tokenizer / "vocab.json").write_text(json.dumps(numbers))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder", safe_serialization=True)


def make_sd_shaped(folder: Path, *, size: int = 16, channels: int = 1) -> Path:
    """A text-to-image directory without a table of class rows, scaling factor 0.5."""
    make_text_encoder(folder.with_name("text"))
    autoencoder = build_autoencoder(
        kind="kl",
        channels=channels,
        size=size,
        latent_channels=4,
        block_channels=(8, 8, 16),
        layers_per_block=1,
        norm_groups=4,
        mid_attention=False,
        vq_codes=16,
        seed=0,
    )
    autoencoder.register_to_config(scaling_factor=0.5)
    unet = build_unet(
        latent_channels=4,
        latent_size=size // 4,
        block_channels=(16, 32),
        layers_per_block=1,
        heads=2,
        context_dim=WIDTH,
        norm_groups=4,
        seed=0,
    )
    save_model(
        folder,
        unet=unet,
        autoencoder=autoencoder,
        diffusion=Diffusion("epsilon", timestep_spacing="leading", set_alpha_to_one=False),
        rows_NTD=random_rows(1, TOKENS, WIDTH, seed=0),
        classes=(),
        kind="caption",
        text_encoder_from=folder.with_name("text"),
    )
    shutil.rmtree(folder / "conditioning")  # a downloaded model has no table
    return folder
