"""Most memory of a whole step, private beside plain: rows "memory" of ``results/parts.json``.

    python -m benchmarks.memory

A step is two microbatches, so that the sum of the first is held through the second, then the noise
and AdamW with its two averages. The plain step accumulates gradients over the same microbatches.
Each runs twice in a fresh process; counted as in ``benchmarks.step``, above the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.cells import Cell, make_cell
from benchmarks.clock import peak_bytes
from benchmarks.methods import GRID
from benchmarks.step import RESULTS, machine, write_results
from dpldm_dist.privacy.gradients import PerRecordGradients
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisySum
from dpldm_dist.privacy.randomness import KEY_BYTES
from dpldm_dist.runtime.collective import SoloCollective

CELLS = (
    ("small", "attention"),
    ("small", "all"),
    ("cifar", "attention"),
    ("cifar", "transformer"),
    ("cifar", "all"),
    ("text", "all"),
)
MICROBATCHES = 2
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "parts.json")
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.probe is not None:
        model, trainable, kind = options.probe
        print(peak(make_cell(model, trainable, draws=1), private=kind == "private"))
        return
    rows = []
    if options.output.exists():
        rows = json.loads(options.output.read_text())["rows"]
    rows = [row for row in rows if row["part"] != "memory"] + list(memory_rows(CELLS))
    document = {"machine": machine(device="cpu", threads=1), "rows": rows}
    write_results(options.output, document)
    report.show_parts(document)


def memory_rows(cells: Sequence[tuple[str, str]]) -> Iterator[Row]:
    for model, trainable in cells:
        plain, private = (_alone(model, trainable, kind) for kind in ("plain", "private"))
        yield {
            "part": "memory",
            "model": model,
            "trainable": trainable,
            "plain_MB": plain / 1e6,
            "private_MB": private / 1e6,
            "ratio": private / plain,
        }


def peak(cell: Cell, *, private: bool) -> int:
    """Bytes of tensors alive at once, at most, in two steps."""
    make = private_step if private else plain_step
    return peak_bytes(lambda: make(cell), cell.device)


def plain_step(cell: Cell) -> Callable[[], None]:
    """Gradients of the mean loss of every microbatch, added up; then AdamW."""
    inner = _adam(cell)

    def run() -> None:
        for _ in range(MICROBATCHES):
            cell.losses(cell.denoiser).mean().backward()
        inner.step()
        inner.zero_grad(set_to_none=True)

    return run


def private_step(cell: Cell) -> Callable[[], None]:
    """Clipped sums of every microbatch, noise, AdamW: the loop of ``finetune``."""
    noisy_sum = NoisySum(
        bytes(KEY_BYTES),
        std=1.0 / GRID,
        mechanism="a benchmark",
        collective=SoloCollective(),
        bind=lambda purpose, step, digest: None,
    )
    optimizer = DistributedDPOptimizer(
        _adam(cell),
        list(cell.parameters.values()),
        noisy_sum,
        grid=GRID,
        clip_norm=1.0,
        divisor=float(MICROBATCHES * cell.records),
    )
    gradients = PerRecordGradients(
        cell.denoiser, cell.parameters, clip_norm=1.0, draws=cell.draws, grid=GRID
    )
    mask_B = torch.ones(cell.records, dtype=torch.bool, device=cell.device)

    def run() -> None:
        for _ in range(MICROBATCHES):
            gradients.add(lambda: cell.losses(cell.denoiser), mask_B)
        optimizer.step(gradients.take_sum(), 0)

    return run


def _adam(cell: Cell) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(cell.parameters.values()), lr=1e-4)


def _alone(model: str, trainable: str, kind: str) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", "--probe", model, trainable, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
