"""Time of the parts of a step other than the model, and of the whole loop: ``results/parts.json``.

    python -m benchmarks.parts

All on the small model at an expected batch of 512 records: Gaussian noise from the keystream, the
all-reduce of the flat sum, records from latent shards and what they draw, the tally of records, and
``finetune`` itself; then the memory of whole steps (``benchmarks.memory``). The ``loop`` row is one
worker on one thread, CPU time of a step and the share of it that is not spent in
``PerRecordGradients.add``; ``workers`` rows are wall time of 1 and 2 worker processes with one
thread each, as the difference of a longer and a shorter run, so that start and end cancel.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks import report
from benchmarks.cells import make_cell, shape_of
from benchmarks.memory import CELLS, memory_rows
from benchmarks.step import RESULTS, machine, write_results
from dpldm_dist.config import Config, parse_config
from dpldm_dist.data.latents import (
    LatentRecord,
    LatentShards,
    write_latent_shard,
    write_latents_manifest,
)
from dpldm_dist.models.autoencoder import build_autoencoder
from dpldm_dist.models.conditioning import random_rows
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.directory import save_model
from dpldm_dist.privacy.draws import record_draws
from dpldm_dist.privacy.gradients import PerRecordGradients
from dpldm_dist.privacy.ledger import SharedLedger
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer
from dpldm_dist.privacy.randomness import KEY_BYTES, integer_noise
from dpldm_dist.privacy.selfcheck import RecordTally
from dpldm_dist.runtime.collective import GroupCollective, SoloCollective
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import solo_worker
from dpldm_dist.stages.finetune import finetune

BATCH, MICROBATCH, SHARDS, LANES, CLASSES = 512, 128, 8, 4, 5
KEY = bytes(KEY_BYTES)
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_run(root, records=options.records)
        loop = loop_row(root, options)
        step_seconds = loop["seconds_per_step"]
        rows = [
            loop,
            noise_row(options, step_seconds),
            *(
                all_reduce_row(options, trainable, step_seconds)
                for trainable in ("attention", "all")
            ),
            *data_rows(root, options, step_seconds),
            tally_row(options, step_seconds),
            *worker_rows(root, options),
            *memory_rows(CELLS[:1] if options.quick else CELLS),
        ]
    write_results(options.output, {"machine": machine(device="cpu", threads=1), "rows": rows})
    document = json.loads(options.output.read_text())
    report.show_parts(document)
    if options.document:
        report.rewrite(parts=document)


# --- parts ----------------------------------------------------------------------------------------


def noise_row(options: argparse.Namespace, step_seconds: float) -> Row:
    """Rounded Gaussians for every number that learns."""
    count = make_cell("small", options.trainable, draws=1, rows=1).count
    seconds = _seconds(lambda: integer_noise(KEY, 0, count, std=2.0**30), options.turns)
    return {
        "part": "noise",
        "P": count,
        "normals_per_second": count / seconds,
        "share_of_step": seconds / step_seconds,
    }


def all_reduce_row(options: argparse.Namespace, trainable: str, step_seconds: float) -> Row:
    """One flat int64 buffer over gloo, two processes of this machine; wall time."""
    count = make_cell("small", trainable, draws=1, rows=1).count
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _all_reduce, args=(folder, count, options.turns), nprocs=2, join=True
        )
        seconds = json.loads((Path(folder) / "seconds").read_text())
    return {
        "part": "all-reduce",
        "trainable": trainable,
        "P": count,
        "workers": 2,
        "seconds": seconds,
        "share_of_step": seconds / step_seconds,
    }


def _all_reduce(rank: int, folder: str, count: int, turns: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    collective = GroupCollective(torch.device("cpu"))
    sum_P = torch.ones(count, dtype=torch.int64)
    found = []
    for _ in range(turns + 1):
        collective.barrier()
        start = time.perf_counter()
        collective.sum_(sum_P)
        found.append(time.perf_counter() - start)
    if rank == 0:
        (Path(folder) / "seconds").write_text(json.dumps(median(found[1:])))
    dist.destroy_process_group()


def data_rows(root: Path, options: argparse.Namespace, step_seconds: float) -> Iterator[Row]:
    """Records per second from shards in the page cache, at random places; then with their draws."""
    latents = LatentShards(root / "latents")
    generator = np.random.default_rng(0)
    shards = generator.integers(0, SHARDS, BATCH)
    places = generator.integers(0, min(latents.count(s) for s in range(SHARDS)), BATCH)
    ids = shards << 40 | places
    dims = int(np.prod(latents.latent_shape))

    def gather() -> None:
        latents.gather(shards, places)

    def draw() -> None:
        record_draws(KEY, ids, attempt=0, step=0, draws=1, dims=dims)

    for part, run in (("gather", gather), ("draws", draw)):
        seconds = _seconds(run, options.turns)
        yield {
            "part": part,
            "records_per_second": BATCH / seconds,
            "share_of_step": seconds / step_seconds,
        }


def tally_row(options: argparse.Namespace, step_seconds: float) -> Row:
    """Everything that the tally of records does in a step."""
    tally = RecordTally(KEY, lanes=LANES, collective=SoloCollective(), device=torch.device("cpu"))
    ids_L = np.split(np.arange(BATCH, dtype=np.int64), LANES)

    def run() -> None:
        for lane, ids in enumerate(ids_L):
            tally.drawn(lane, ids)
            tally.processed(lane, ids)
        tally.settle()

    seconds = _seconds(run, options.turns)
    return {"part": "tally", "seconds": seconds, "share_of_step": seconds / step_seconds}


def _seconds(run: Callable[[], object], turns: int) -> float:
    """Median CPU time of a call, after one that does not count."""
    run()
    found = []
    for _ in range(turns):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return median(found)


# --- the loop -------------------------------------------------------------------------------------


def loop_row(root: Path, options: argparse.Namespace) -> Row:
    """Where a step's time goes, in one process; medians over steps, the first left out."""
    config = settings(root, "loop", options, steps=options.loop_steps + 2)
    RunDir(config.run.dir).create()
    clock = _LoopClock()
    with clock.watching():
        finetune(config, solo_worker())
    steps = clock.steps()[1:]
    seconds = median(step["total"] for step in steps)
    overhead = median(
        (step["total"] - step.get("gradients", 0.0)) / step["total"] for step in steps
    )
    return {
        "part": "loop",
        "batch": BATCH,
        "trainable": options.trainable,
        "seconds_per_step": seconds,
        "records_per_second": BATCH / seconds,
        "share_outside_gradients": overhead,
        "share_of_update": median(step.get("update", 0.0) / step["total"] for step in steps),
        "share_of_ledger": median(step.get("ledger", 0.0) / step["total"] for step in steps),
    }


class _LoopClock:
    """CPU time of the loop's calls, by step. A step begins where the ledger is charged for it."""

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._spent: list[dict[str, float]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        with (
            mock.patch.object(SharedLedger, "charge", self._charge(SharedLedger.charge)),
            mock.patch.object(
                PerRecordGradients, "add", self._timed("gradients", PerRecordGradients.add)
            ),
            mock.patch.object(
                DistributedDPOptimizer, "step", self._timed("update", DistributedDPOptimizer.step)
            ),
        ):
            yield

    def steps(self) -> list[dict[str, float]]:
        """Seconds of every whole step: "total", and of each call."""
        ends = zip(self._starts, self._starts[1:], self._spent, strict=False)
        return [{**spent, "total": end - start} for start, end, spent in ends]

    def _charge(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def charge(*arguments: Any, what: str, **named: Any) -> Any:
            if what == "step":
                self._starts.append(time.process_time())
                self._spent.append({})
            return timed(*arguments, what=what, **named)

        timed = self._timed("ledger", call)
        return charge

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return call(*arguments, **named)
            finally:
                if self._spent:
                    spent = time.process_time() - start
                    self._spent[-1][name] = self._spent[-1].get(name, 0.0) + spent

        return timed


def worker_rows(root: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Records per second of the whole stage with 1 and 2 workers."""
    alone = None
    for workers in (1, 2):
        if workers > len(os.sched_getaffinity(0)):
            yield {"part": "workers", "workers": workers, "reason": "fewer cores may be used"}
            continue
        short, long = (
            _wall(settings(root, f"{workers}-{steps}", options, steps=steps, workers=workers))
            for steps in (2, 2 + options.steps)
        )
        rate = BATCH * options.steps / (long - short)
        alone = rate if alone is None else alone
        yield {
            "part": "workers",
            "workers": workers,
            "batch": BATCH,
            "records_per_second": rate,
            "parallel_efficiency": rate / alone / workers,
        }


def _wall(config: Config) -> float:
    RunDir(config.run.dir).create()
    start = time.perf_counter()
    launch([Job(finetune, config)], run=config.run)
    return time.perf_counter() - start


# --- a run made up for this -----------------------------------------------------------------------


def make_run(root: Path, *, records: int) -> None:
    """A public model of the small shape in ``root/model``, private latents in ``root/latents``."""
    shape, generator = shape_of("small"), np.random.default_rng(0)
    cell = make_cell("small", "attention", draws=1, rows=1)
    channels, height, width = shape.latent
    autoencoder = build_autoencoder(
        kind="kl",
        channels=1,
        size=16,
        latent_channels=channels,
        block_channels=(8, 8, 8),
        layers_per_block=1,
        norm_groups=4,
        mid_attention=False,
        vq_codes=8,
        seed=0,
    )
    save_model(
        root / "model",
        unet=cell.denoiser.unet,
        autoencoder=autoencoder,
        diffusion=Diffusion(),
        rows_NTD=random_rows(CLASSES + 1, *shape.context, seed=0),
        classes=[str(label) for label in range(CLASSES)],
    )
    entries = []
    for shard in range(SHARDS):
        moments = generator.standard_normal(
            (records // SHARDS, 1, 1, 2 * channels, height, width), dtype=np.float32
        )
        made = [LatentRecord(f"s{shard}r{i}", m, [i % CLASSES]) for i, m in enumerate(moments)]
        entries.append(
            write_latent_shard(
                root / "latents",
                f"latents-{shard:05d}.tar",
                made,
                images_per_record=1,
                source="made up",
                private=True,
            )
        )
    write_latents_manifest(
        root / "latents",
        entries,
        classes=[str(label) for label in range(CLASSES)],
        config={},
        parents={},
        private=True,
    )


def settings(
    root: Path, name: str, options: argparse.Namespace, *, steps: int, workers: int = 1
) -> Config:
    """A run of ``steps`` on what ``make_run`` made; it saves nothing between its first and last."""
    return parse_config(
        {
            "data": {"private": {"latents": str(root / "latents")}},
            "model": {"init": str(root / "model")},
            "privacy": {
                "epsilon": 20.0,
                "delta": 1e-5,
                "clip_norm": 0.5,
                "lanes": LANES,
                "records": options.records,
            },
            "finetune": {
                "trainable": options.trainable,
                "steps": steps,
                "batch": BATCH,
                "learning_rate": 1e-3,
                "warmup_steps": 0,
            },
            "run": {
                "dir": str(root / name),
                "launcher": "local",
                "workers": workers,
                "threads": 1,
                "microbatch": MICROBATCH,
                "checkpoint_every": 10**6,
                "device": "cpu",
            },
        }
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trainable", default="attention", help="of the loop; default: attention")
    parser.add_argument("--steps", type=int, default=12, help="steps of the workers' rows")
    parser.add_argument(
        "--loop-steps",
        type=int,
        default=50,
        help="of the loop: a run shows its epsilon about 20 times, so in few steps at each",
    )
    parser.add_argument("--turns", type=int, default=7, help="repetitions of each part")
    parser.add_argument("--records", type=int, default=4096)
    parser.add_argument("--quick", action="store_true", help="few steps and turns")
    parser.add_argument(
        "--document", action="store_true", help="rewrite the tables of docs/performance.md"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "parts.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.turns = min(options.steps, 3), min(options.turns, 2)
        options.loop_steps = options.steps
    return options


if __name__ == "__main__":
    main()
