"""A hundred million records by manifest: what a start and a draw cost, in time and memory.

The shards are sparse files of the right sizes, or an address from which nothing is fetched yet: a
start reads the manifest and, of its own shards, the tables, but no latents.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dpldm_dist.data.latents import LatentShards
from dpldm_dist.data.manifest import Manifest
from dpldm_dist.privacy.sampling import Lanes, PoissonSampling, dyadic_rate

RECORDS = 100_000_000
SHARD_RECORDS = (500, 10_000)
WORKERS = (1, 64)
_BATCH, _STEPS, _RECORD_BYTES = 4096, 5, 10_240


def simulate() -> list[dict[str, Any]]:
    """One row per size of shard and number of workers, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = []
    for shard_records in SHARD_RECORDS:
        folder = Path(tempfile.mkdtemp(prefix="dpldm-scale-"))
        try:
            _write(folder, shard_records)
            for workers in WORKERS:
                with context.Pool(1) as pool:
                    found.append(pool.apply(_one, (str(folder), shard_records, workers)))
        finally:
            shutil.rmtree(folder)
    return found


def _write(folder: Path, shard_records: int) -> None:
    """A manifest over shards of which only the sizes are there."""
    shards, files = [], {}
    for number in range(RECORDS // shard_records):
        tar, index = f"latents-{number:06d}.tar", f"latents-{number:06d}.index.npy"
        sizes = shard_records * _RECORD_BYTES, 128 + shard_records * 32
        for name, size in zip((tar, index), sizes, strict=True):
            with open(folder / name, "wb") as file:
                file.truncate(size)
            files[name] = {"bytes": size, "sha256": f"{number:063x}{name.endswith('npy'):x}"}
        shards.append({"file": tar, "index": index, "records": shard_records})
    facts = {
        "records": RECORDS, "images_per_record": 1, "views": 1, "latent_shape": [4, 16, 32],
        "context_shape": None, "classes": ["0"], "shards": shards,
    }  # fmt: skip
    Manifest("latents", facts, files).write(folder, private=True)


def _one(folder: str, shard_records: int, workers: int) -> dict[str, Any]:
    before = _memory_mb("VmRSS")
    started = time.perf_counter()
    latents = LatentShards(Path(folder))
    opened_s = time.perf_counter() - started
    started = time.perf_counter()
    lanes = Lanes(latents.shard_records, lanes=max(4, workers), cap=1 << 40, microbatch=64)
    lanes_s = time.perf_counter() - started
    sampling = PoissonSampling(bytes(32), attempt=1, sample_rate=dyadic_rate(_BATCH / RECORDS))
    draws = []
    for step in range(_STEPS):
        started = time.perf_counter()
        drawn = sum(
            len(lanes.select(sampling, step, lane).ids) for lane in lanes.of_worker(0, workers)
        )
        draws.append(time.perf_counter() - started)
    return {
        "shard_records": shard_records,
        "shards": len(latents.files),
        "workers": workers,
        "manifest_mb": (Path(folder) / "manifest.json").stat().st_size / 1e6,
        "open_s": opened_s,
        "lanes_s": lanes_s,
        "memory_mb": _memory_mb("VmHWM") - before,
        "draw_s": float(np.median(draws)),
        "drawn": drawn,
    }


def _memory_mb(field: str) -> float:
    """``VmRSS``: what this process holds now; ``VmHWM``: the most it ever held. Megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(field)


if __name__ == "__main__":
    print(json.dumps(simulate(), indent=1))
