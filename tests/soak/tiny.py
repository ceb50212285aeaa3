"""The tiniest run that has everything: 80 records, a UNet of one level, coins, noise, statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpldm_dist.config import Config
from dpldm_dist.models.autoencoder import build_autoencoder
from dpldm_dist.models.conditioning import random_rows
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.directory import save_model
from dpldm_dist.models.unet import build_unet
from tests.stages.tiny_run import TEST_KEY, latent_shards, settings

STEPS = 12
# Just enough for so many steps and one release of statistics, by calibrate_noise_multiplier: with
# one charge more, a step would be missing.
NOISE = {STEPS: 0.3744, 30: 0.4613}
OWN_KEY = {"run": {"unsafe_test_key": None}}


@dataclass(frozen=True)
class Tiny:
    """The data and the public model below ``root``; every run is a folder beside them."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> Tiny:
        _public_model(root / "model")
        latent_shards(root / "latents")
        return cls(root)

    def config(
        self, name: str, *, workers: int = 1, steps: int = STEPS, **changes: dict[str, Any]
    ) -> Config:
        """A run of ``steps`` noisy steps, by default of a fixed key."""
        sections: dict[str, dict[str, Any]] = {
            "privacy": {"noise_multiplier": NOISE.get(steps)},
            "finetune": {
                "steps": steps,
                "batch": 12,
                "draws": 1,
                "embedder_grad_scale": 2.0,  # "auto" would be computed at every start
                "warmup_steps": 1,
            },
            "run": {
                "dir": str(self.root / name),
                "workers": workers,
                "threads": 1,
                "checkpoint_every": 4,
                "unsafe_test_key": TEST_KEY,
            },
        }
        for section, fields in changes.items():
            sections[section] = {**sections.get(section, {}), **fields}
        return settings(self.root, name, **sections)


def arguments(config: Config) -> list[str]:
    """What follows ``dpldm`` on a command line for this config."""
    tree = config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    settings = (f"{name}={json.dumps(value)}" for name, value in _leaves(tree))  # such JSON is TOML
    return ["finetune", *(word for setting in settings for word in ("--set", setting))]


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _public_model(folder: Path) -> None:
    autoencoder = build_autoencoder(
        kind="kl", channels=1, size=16, latent_channels=4, block_channels=(8, 8, 8),
        layers_per_block=1, norm_groups=4, mid_attention=False, vq_codes=8, seed=0,
    )  # fmt: skip
    unet = build_unet(
        latent_channels=4, latent_size=4, block_channels=(8,), layers_per_block=1, heads=1,
        context_dim=4, norm_groups=4, seed=0,
    )  # fmt: skip
    save_model(
        folder,
        unet=unet,
        autoencoder=autoencoder,
        diffusion=Diffusion(),
        rows_NTD=random_rows(6, 1, 4, seed=0),
        classes=["a", "b", "c", "d", "e"],
    )
