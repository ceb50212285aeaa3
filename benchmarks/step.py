"""Time and memory of one private step, next to a plain one: writes ``results/step.json``.

    python -m benchmarks.step --models small --trainable attention lora --methods nonprivate ours

A cell is a model, a trainable set and K. In a cell every method first runs alone in a fresh
process, which measures its peak memory and compares its clipped sum with ours; then all methods
that passed are timed in turns in one process, on one thread. ``time_ratio`` is the median over the
turns of a method's time over that of ``nonprivate`` in the same turn. Rows of cells that are not
measured again stay in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import report
from benchmarks.cells import SHAPES, TRAINABLES, Cell, make_cell, own_copy, shape_of
from benchmarks.clock import Times, in_turns, middle, peak_bytes
from benchmarks.methods import METHODS, Step, Unsupported
from benchmarks.work import Work, performed, work_of
from dpldm_dist.privacy import native
from dpldm_dist.privacy.gradients import PerRecordGradients

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4
"""Largest relative L2 distance of a peer's clipped sum to ours. Ours divides by an upper bound on
the norm, which is looser the more tokens a record has; peers divide by the norm they computed."""
KEY = ("model", "trainable", "K", "method")
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of the peers: batching rules and hooks that they lack
    if options.probe is not None:
        model, trainable, draws, method = options.probe
        print(json.dumps(probe(_cell(options, model, trainable, int(draws)), method)))
        return
    document = _read(options.output)
    document["machine"] = machine(device=options.device, threads=options.threads)
    for model in options.models:
        for trainable in _trainables(model, options.trainable):
            for draws in options.draws:
                rows = measure(options, model, trainable, draws)
                document["rows"] = merge(document["rows"], rows)
                write_results(options.output, document)
                for row in rows:
                    print(line_of(row), flush=True)
    report.show(document)
    report.draw(document, options.output.with_suffix(".png"))
    if options.document:
        report.rewrite(step=document)


def measure(options: argparse.Namespace, model: str, trainable: str, draws: int) -> list[Row]:
    """Rows of one cell, one for each method, also for those that cannot do it."""
    cell = _cell(options, model, trainable, draws)
    probes = {m: _probe_alone(options, model, trainable, draws, m) for m in options.methods}
    fit = [name for name, found in probes.items() if "reason" not in found]
    times = _times(options, cell, fit)
    facts = {"B": cell.records, "P": cell.count, **_work(cell).as_dict()}
    rows = []
    for method in options.methods:
        row = {"model": model, "trainable": trainable, "K": draws, "method": method, **facts}
        row |= probes[method]
        if method in times:
            row |= _timings(cell, times, method)
            row["memory_ratio"] = _ratio(row["peak_bytes"], probes["nonprivate"]["peak_bytes"])
        rows.append(row)
    return rows


def probe(cell: Cell, method: str) -> Row:
    """What a fresh process finds out about a method: its memory, its work, whether it is right."""
    try:
        clip_norm = clip_norm_of(cell)
        made: list[Step] = []

        def make() -> Any:
            made.append(METHODS[method](mine, clip_norm))
            return lambda: (made[0].forget(), made[0].run())

        mine = own_copy(cell)
        peak = peak_bytes(make, cell.device)
        (step,) = made
        step.forget()
        operations = performed(step.run)
        row: Row = {"peak_bytes": peak, "flops_performed": operations, "note": step.note}
        if method not in ("nonprivate", "ours"):
            row["deviation"] = deviation(cell, step, clip_norm)
            if not row["deviation"] <= TOLERANCE:
                row["reason"] = f"its sum is off ours by {row['deviation']:.1e}"
        return row
    except Unsupported as error:
        return {"reason": str(error)}
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}


def deviation(cell: Cell, step: Step, clip_norm: float) -> float:
    """Relative L2 distance of the clipped sum that ``step`` left to ours."""
    reference = METHODS["ours"](own_copy(cell), clip_norm)
    reference.run()
    ours_P = reference.result()
    return float((step.result() - ours_P).norm() / ours_P.norm())


def clip_norm_of(cell: Cell) -> float:
    """The median norm of the records, so that half of them are clipped."""
    norms: list[float] = []
    mine = own_copy(cell)
    engine = PerRecordGradients(
        mine.denoiser,
        mine.parameters,
        clip_norm=1.0,
        draws=cell.draws,
        grid=2.0**-20,
        watch=lambda raw: norms.extend(raw.norm_B.tolist()),
    )
    mask_B = torch.ones(cell.records, dtype=torch.bool, device=cell.device)
    engine.add(lambda: mine.losses(mine.denoiser), mask_B)
    return median(norms)


def _times(
    options: argparse.Namespace, cell: Cell, methods: Sequence[str]
) -> dict[str, list[Times]]:
    clip_norm = clip_norm_of(cell)
    steps = {name: METHODS[name](own_copy(cell), clip_norm) for name in methods}

    runs = {name: step.run for name, step in steps.items()}
    return in_turns(
        runs,
        turns=options.turns,
        device=cell.device,
        between=lambda name: steps[name].forget(),
    )


def _timings(cell: Cell, times: dict[str, list[Times]], method: str) -> Row:
    here, base = times[method], times["nonprivate"]
    ratios = [a.taken(cell.device) / b.taken(cell.device) for a, b in zip(here, base, strict=True)]
    typical = middle(here)
    seconds = typical.taken(cell.device)
    return {
        "seconds_per_record": seconds / cell.records,
        "cpu_seconds_per_record": typical.cpu / cell.records,
        "wall_seconds_per_record": typical.wall / cell.records,
        "time_ratio": median(ratios),
        "time_ratio_least": min(ratios),
        "time_ratio_most": max(ratios),
        "turns": len(ratios),
        "gflops_per_second": _work(cell).total / seconds / 1e9,
    }


def _work(cell: Cell) -> Work:
    mine = own_copy(cell)
    return work_of(
        mine.denoiser, list(mine.parameters.values()), lambda: mine.losses(mine.denoiser)
    )


def _probe_alone(
    options: argparse.Namespace, model: str, trainable: str, draws: int, method: str
) -> Row:
    """``probe`` in a process of its own."""
    if options.one_process:
        return probe(_cell(options, model, trainable, draws), method)
    command = [sys.executable, "-m", "benchmarks.step", "--probe", model, trainable, str(draws)]
    command += [method, "--device", options.device, "--threads", str(options.threads)]
    command += ["--rows", str(options.rows)] if options.rows else []
    command += ["--channels-last"] if options.channels_last else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = "killed: out of memory" if done.returncode < 0 else done.stderr.strip()[-160:]
        return {"reason": why}
    return json.loads(done.stdout.splitlines()[-1])


def _ratio(value: float, base: float) -> float:
    return value / base if base else float("nan")


def _cell(options: argparse.Namespace, model: str, trainable: str, draws: int) -> Cell:
    return make_cell(
        model,
        trainable,
        draws=draws,
        rows=options.rows,
        device=options.device,
        channels_last=options.channels_last,
    )


def _trainables(model: str, wanted: Sequence[str]) -> list[str]:
    return [trainable for trainable in shape_of(model).trainables if trainable in wanted]


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``old`` with the rows of ``new`` in place of those of the same key, or at the end."""
    of_key = {tuple(row[name] for name in KEY): row for row in (*old, *new)}
    return list(of_key.values())


def machine(*, device: str, threads: int) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "engine": native.name(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "processor": _processor(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo")
    if not lines.exists():
        return platform.processor()
    names = [
        s.partition(":")[2].strip() for s in lines.read_text().splitlines() if "model name" in s
    ]
    return names[0] if names else platform.processor()


def line_of(row: Row) -> str:
    place = f"{row['model']:6} {row['trainable']:13} K={row['K']} {row['method']:16}"
    if "time_ratio" not in row:
        return f"{place} -- {row['reason']}"
    return (
        f"{place} {1e3 * row['seconds_per_record']:8.2f} ms/record  time {row['time_ratio']:.2f}  "
        f"memory {row['memory_ratio']:.2f}"
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"machine": {}, "rows": []}


def write_results(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(document, indent=1) + "\n")
    scratch.replace(path)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=["small", "cifar", "text"], choices=SHAPES)
    parser.add_argument("--trainable", nargs="+", default=list(TRAINABLES), choices=TRAINABLES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--draws", nargs="+", type=int, default=[1, 8], help="K")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, help="rows of a microbatch, B * K; default: the model's"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true", help="for every method")
    parser.add_argument(
        "--one-process", action="store_true", help="memory is not measured in fresh processes"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small model, K = 1, attention, 32 rows, one turn"
    )
    parser.add_argument(
        "--document", action="store_true", help="rewrite the tables of docs/performance.md"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "step.json")
    parser.add_argument("--probe", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.draws, options.turns = ["small"], [1], 1
        options.trainable, options.rows = ["attention"], options.rows or 32
    if "nonprivate" not in options.methods:
        options.methods = ["nonprivate", *options.methods]
    return options


if __name__ == "__main__":
    main()
