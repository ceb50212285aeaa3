"""How many images N workers encode in a second, the whole stage on the launcher of this machine."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from dpldm_dist.config import Config, parse_config
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir, dataset_dir
from dpldm_dist.stages.encode import encode, pretrain_autoencoder
from dpldm_dist.stages.prepare import prepare

_IMAGES, _SHARD_RECORDS = 24_000, 1000
_WORKERS = (1, 2)


def throughput() -> list[dict[str, Any]]:
    """One row per number of workers. The start of the processes is taken off: it is that of a stage
    with nothing left to do."""
    rows = []
    for workers in _WORKERS:
        with tempfile.TemporaryDirectory(prefix="dpldm-scale-") as folder:
            config = _config(Path(folder), workers)
            RunDir(config.run.dir).create()
            one = config.model_copy(update={"run": config.run.model_copy(update={"workers": 1})})
            launch([Job(prepare, one), Job(pretrain_autoencoder, one)], run=one.run)
            whole_s, start_s = _seconds(config), _seconds(config)
            assert (dataset_dir(config, "public", "latents") / "manifest.json").is_file()
        wall_s = whole_s - start_s
        rows.append(
            {"workers": workers, "images": _IMAGES, "wall_s": wall_s, "rate": _IMAGES / wall_s}
        )
    return rows


def _seconds(config: Config) -> float:
    started = time.perf_counter()
    launch([Job(encode, config)], run=config.run)
    return time.perf_counter() - started


def _config(folder: Path, workers: int) -> Config:
    return parse_config(
        {
            "data": {
                "size": 32,
                "shard_records": _SHARD_RECORDS,
                "public": {"source": "builtin:letters", "limit": _IMAGES},
            },
            "autoencoder": {"steps": 2, "batch": 16},
            "run": {"dir": str(folder / "run"), "workers": workers, "threads": 1, "device": "cpu"},
        }
    )
