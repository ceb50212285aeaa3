"""A tiny but complete run: a public model directory and private latent shards, made in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dpldm_dist.config import Config, parse_config
from dpldm_dist.data.latents import LatentRecord, write_latent_shard, write_latents_manifest
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.models.autoencoder import build_autoencoder
from dpldm_dist.models.conditioning import random_rows
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.directory import save_model
from dpldm_dist.models.unet import build_unet
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import finetune

TEST_KEY = "5a" * 32
SHARDS, SHARD_RECORDS = 5, 16


def public_model(folder: Path) -> Path:
    autoencoder = build_autoencoder(
        kind="kl", channels=1, size=16, latent_channels=4, block_channels=(8, 8, 8),
        layers_per_block=1, norm_groups=4, mid_attention=False, vq_codes=8, seed=0,
    )  # fmt: skip
    unet = build_unet(
        latent_channels=4, latent_size=4, block_channels=(16, 32), layers_per_block=1, heads=2,
        context_dim=8, norm_groups=8, seed=0,
    )  # fmt: skip
    rows = random_rows(6, 1, 8, seed=0)
    names = ["a", "b", "c", "d", "e"]
    save_model(
        folder,
        unet=unet,
        autoencoder=autoencoder,
        diffusion=Diffusion(),
        rows_NTD=rows,
        classes=names,
    )
    return folder


def latent_shards(
    folder: Path,
    *,
    skip: tuple[int, int] | None = None,
    spoil: tuple[int, int] | None = None,
    images: int = 1,
    views: int = 1,
) -> Path:
    """Five shards of 16 records of 3 classes. ``skip``: leave out this (shard, place), which must be
    the last of its shard; ``spoil``: give it latents so large that its gradient is not finite.
    A record has 1 to ``images`` images of ``views`` views."""
    entries = []
    for shard in range(SHARDS):
        generator = np.random.default_rng(shard)
        records = []
        for place in range(SHARD_RECORDS):
            count = int(generator.integers(1, images + 1))
            moments = generator.standard_normal((count, views, 8, 4, 4)).astype(np.float32)
            moments[:, :, 4:] = -4.0
            labels = generator.integers(0, 3, count).tolist()
            if (shard, place) == spoil:
                moments[:, :, 4:] = 6e4  # exp(3e4) is infinite in float32
            if (shard, place) != skip:
                records.append(LatentRecord(f"s{shard}r{place}", moments, labels))
        name = f"latents-{shard:05d}.tar"
        entry = write_latent_shard(
            folder, name, records, images_per_record=images, source="made up", private=True
        )
        entries.append(entry)
    write_latents_manifest(
        folder, entries, classes=["0", "1", "2"], config={}, parents={}, private=True
    )
    return folder


def settings(root: Path, name: str = "run", **changes: dict) -> Config:
    """A config of ``root/name`` on ``root/model`` and ``root/latents``; sections may be changed."""
    tree = {
        "data": {"private": {"latents": str(root / "latents")}},
        "model": {"init": str(root / "model")},
        "privacy": {
            "epsilon": 20.0, "delta": 1e-3, "clip_norm": 0.5, "lanes": 3, "records": 80,
            "noise_multiplier": 0.4203,  # the least that ten steps of 20 records can have
        },
        "finetune": {
            "steps": 10, "batch": 20, "learning_rate": 1e-3, "draws": 2,
            "statistics_noise": 10.0, "warmup_steps": 2, "warmup_batch": 12,
        },
        "run": {"dir": str(root / name), "microbatch": 4, "checkpoint_every": 3, "device": "cpu"},
    }  # fmt: skip
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    return parse_config(tree)


def run_alone(config: Config) -> Manifest:
    """Private fine-tuning by one worker in this process."""
    RunDir(config.run.dir).create()
    return finetune(config, solo_worker())


def released_weights(root: Path, name: str = "run") -> dict[str, torch.Tensor]:
    """All tensors of the released model."""
    from safetensors.torch import load_file

    folder = root / name / "release" / "model"
    rows = load_file(folder / "conditioning" / "rows.safetensors")
    return {**load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"), **rows}
