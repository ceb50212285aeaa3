"""Tiny image shards and a config that goes with them, for tests of the stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from dpldm_dist.config import Config, parse_config
from dpldm_dist.data.files import make_folder
from dpldm_dist.data.manifest import Manifest, describe_files
from dpldm_dist.data.shards import ImageRecord, write_image_shard
from dpldm_dist.runtime.public_training import PublicTraining
from dpldm_dist.runtime.rundir import RunDir, dataset_dir

CLASSES = ("circle", "square", "bar")
SIZE = 16


def tiny_config(root: Path, **sections: dict[str, Any]) -> Config:
    """Images 1 x 16 x 16, latents 4 x 4 x 4, a few steps of everything."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(root), "threads": 1},
        "data": {"size": SIZE, "channels": 1},
        "autoencoder": {"block_channels": [8, 8, 16], "norm_groups": 4, "steps": 6, "batch": 8},
        "model": {"block_channels": [8, 16], "heads": 2, "context_dim": 8, "norm_groups": 4},
        "pretrain": {"steps": 6, "batch": 8},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    config = parse_config(tree)
    RunDir(config.run.dir).create()
    return config


def write_images(
    config: Config,
    which: str,
    *,
    records: int = 24,
    shards: int = 3,
    most_images: int = 1,
    seed: int = 0,
    captions: bool = False,
    duplicates: int = 0,
) -> Path:
    """Finished image shards of data set ``which``: records of 1 to ``most_images`` noisy shapes."""
    folder = dataset_dir(config, which, "images")
    make_folder(folder, private=which != "public")
    generator, facts = np.random.default_rng(seed), []
    for shard in range(shards):
        name = f"images-{shard:05d}.tar"
        count = records // shards
        found = [
            _record(f"r{shard}-{place}", generator, most_images, captions) for place in range(count)
        ]
        write_image_shard(folder / name, found, private=which != "public")
        facts.append({"file": name, "records": count})
    manifest = Manifest(
        "images",
        {
            "records": records,
            "classes": list(CLASSES),
            "size": SIZE,
            "channels": 1,
            "shards": facts,
            "images_per_record": most_images,
            "captions": captions,
            "duplicates": duplicates,
        },
        describe_files(folder, [shard["file"] for shard in facts]),
    )
    manifest.write(folder, private=which != "public")
    return folder


def _record(
    key: str, generator: np.random.Generator, most_images: int, captions: bool
) -> ImageRecord:
    count = int(generator.integers(1, most_images + 1))
    labels = tuple(int(n) for n in generator.integers(0, len(CLASSES), count))
    pixels = generator.integers(0, 60, (count, SIZE, SIZE, 1), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        _shape(image, label, generator)
    texts = tuple(f"a {CLASSES[label]}" for label in labels) if captions else None
    return ImageRecord(key, pixels, labels, texts)


def _shape(image_HWC: np.ndarray, label: int, generator: np.random.Generator) -> None:
    """Draw a shape that is not its own mirror image's equal."""
    x, y = generator.integers(4, 9, 2)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    inside = (
        (rows - y) ** 2 + (columns - x) ** 2 < 12,
        (abs(rows - y) < 4) & (abs(columns - x) < 4),
        abs(columns - x) < 2,
    )[label]
    image_HWC[inside] = 220


@contextmanager
def killed_after(*, updates: int) -> Iterator[None]:
    """A public training within is interrupted after so many steps, as by Ctrl-C."""
    update, done = PublicTraining.update, []

    def counted(self: PublicTraining, *arguments: Any) -> None:
        if len(done) == updates:
            raise KeyboardInterrupt
        done.append(None)
        update(self, *arguments)

    with patch.object(PublicTraining, "update", counted):
        yield
