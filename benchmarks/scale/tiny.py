"""A small run whose steps are measured: public model, private latents, and its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpldm_dist.data.latents import LatentRecord, write_latent_shard, write_latents_manifest
from dpldm_dist.models.autoencoder import build_autoencoder
from dpldm_dist.models.conditioning import random_rows
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.directory import save_model
from dpldm_dist.models.unet import build_unet

SHARDS, SHARD_RECORDS, CLASSES = 16, 256, 10
RECORDS = SHARDS * SHARD_RECORDS
MICROBATCH, LANES, STEPS = 8, 4, 14
CHANNELS, SIDE = (64, 96), 4


def make_inputs(root: Path) -> None:
    """The model and the latents that all runs share."""
    autoencoder = build_autoencoder(
        kind="kl", channels=1, size=16, latent_channels=4, block_channels=(8, 8, 8),
        layers_per_block=1, norm_groups=4, mid_attention=False, vq_codes=8, seed=0,
    )  # fmt: skip
    unet = build_unet(
        latent_channels=4, latent_size=SIDE, block_channels=CHANNELS, layers_per_block=1, heads=4,
        context_dim=32, norm_groups=16, seed=0,
    )  # fmt: skip
    save_model(
        root / "model",
        unet=unet,
        autoencoder=autoencoder,
        diffusion=Diffusion(),
        rows_NTD=random_rows(CLASSES + 1, 1, 32, seed=0),
        classes=[str(n) for n in range(CLASSES)],
    )
    generator = np.random.default_rng(0)
    entries = [
        write_latent_shard(
            root / "latents",
            f"latents-{shard:05d}.tar",
            (
                LatentRecord(
                    f"{shard}-{place}",
                    generator.standard_normal((1, 1, 8, SIDE, SIDE)),
                    [place % CLASSES],
                )
                for place in range(SHARD_RECORDS)
            ),
            images_per_record=1,
            source="made up",
            private=True,
        )
        for shard in range(SHARDS)
    ]
    write_latents_manifest(
        root / "latents",
        entries,
        classes=[str(n) for n in range(CLASSES)],
        config={},
        parents={},
        private=True,
    )


def settings(root: Path, name: str, *, batch: int) -> dict[str, Any]:
    """The config of one run, as a plain dict. Its key is fixed, so all runs draw alike."""
    return {
        "data": {"private": {"latents": str(root / "latents")}},
        "model": {"init": str(root / "model")},
        "privacy": {
            "epsilon": 50.0, "delta": 1e-5, "clip_norm": 1.0, "lanes": LANES, "records": RECORDS,
            "noise_multiplier": 1.0,
        },
        "finetune": {"steps": STEPS, "batch": batch},
        "run": {
            "dir": str(root / name), "microbatch": MICROBATCH, "checkpoint_every": 10_000,
            "device": "cpu", "threads": 1, "unsafe_test_key": "5a" * 32,
        },
    }  # fmt: skip
