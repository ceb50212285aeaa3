"""The tables of docs/scaling.md, made anew from the results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.scale.fit import HELD_OUT, SETTINGS, predict, shares_of_link
from benchmarks.scale.measure import Measured, Setting, from_json
from dpldm_dist.config import Config, load_config, with_changes
from dpldm_dist.runtime.cost import (
    Cluster,
    Rates,
    Work,
    bytes_sent,
    efficiency,
    least_bytes,
    step_time,
)
from dpldm_dist.stages.shapes import flops_per_row, shapes_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"
_GPUS, _BATCHES = (8, 64, 512, 1024), (4096, 32_768, 262_144)
Row = Sequence[str]


def rewrite(results: dict[str, Any]) -> None:
    """Put every table between its marks in the page."""
    text = PAGE.read_text()
    for name, lines in tables(results):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{PAGE} has no place for the table {name}")
        text = pattern.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text)  # noqa: B023
    PAGE.write_text(text)


def tables(results: dict[str, Any], *, clusters: bool = True) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of every table that the results give; ``clusters``: predictions, too."""
    if "steps" in results:
        found = {run.setting: run for run in map(from_json, results["steps"])}
        rates = Rates(**results["rates"])
        yield "machine", [_machine(results["machine"])]
        yield "scaling", list(_scaling(found))
        yield "wire", list(_wire(found))
        yield "held out", list(_held_out(found, rates))
    if "data" in results:
        yield "records", list(_records(results["data"]))
    if "encode" in results:
        yield "encode", list(_encode(results["encode"]))
    if "frozen" in results:
        yield "frozen", list(_frozen(results["frozen"]))
    if clusters:
        yield "gpus", list(_gpus())


def _table(head: Row, rows: Sequence[Row]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _machine(facts: dict[str, Any]) -> str:
    clock = (
        "Times are of the wall."
        if facts["clock"] == "wall"
        else "The machine had other work: times of runs with free links are seconds of processors "
        "over cores, those of slowed links are of the wall and too long by that work."
    )
    return (
        f"Measured on {facts['processor']} with {facts['cores']} core(s) for the benchmark (load "
        f"{facts['load']:.1f} at its start), torch {facts['torch']}, {facts['when']}. {clock}"
    )


def _scaling(found: dict[Setting, Measured]) -> list[str]:
    rows = []
    for kind, settings in (
        ("strong", (Setting(1, 96), Setting(2, 96), Setting(4, 96))),
        ("weak", (Setting(1, 48), Setting(2, 96), Setting(4, 192))),
    ):
        base = found[settings[0]]
        for setting in settings:
            run = found[setting]
            rate = setting.batch / run.step_s
            speed = rate / (base.setting.batch / base.step_s)
            rows.append(
                [
                    kind,
                    f"{setting.workers}",
                    f"{setting.batch}",
                    f"{run.step_s:.3f}",
                    f"{rate:.1f}",
                    f"{speed:.2f}",
                ]
            )
    head = ["scaling", "processes", "records per step", "s per step", "records/s", "speed-up"]
    return _table(head, rows)


def _wire(found: dict[Setting, Measured]) -> list[str]:
    rows = []
    for setting in (Setting(2, 96), Setting(4, 96)):
        run = found[setting]
        model = bytes_sent(run.parameters, setting.workers)
        least = least_bytes(run.parameters, setting.workers)
        numbers = run.sent, model, least
        sizes = [f"{number / 1e6:.2f}" for number in numbers]
        ratio = f"{run.sent / least:.2f}"
        rows.append([f"{setting.workers}", f"{run.parameters:,}", *sizes, ratio])
    head = ["processes", "parameters", "MB sent, counted", "MB by the model", "least MB", "ratio"]
    return _table(head, rows)


def _held_out(found: dict[Setting, Measured], rates: Rates) -> list[str]:
    rows, shares = [], shares_of_link(found)
    for setting in (setting for setting in SETTINGS if setting in found):
        run = found[setting]
        told = predict(rates, run, shares).total_s
        link = "free" if setting.mbit is None else f"{setting.mbit:g} Mbit/s"
        rows.append(
            [
                "held out" if setting in HELD_OUT else "fitted",
                f"{setting.workers}",
                f"{setting.batch}",
                link,
                f"{run.step_s:.3f}",
                f"{told:.3f}",
                f"{told / run.step_s - 1:+.1%}",
            ]
        )
    head = ["run", "processes", "records per step", "link", "s, measured", "s, model", "error"]
    return _table(head, rows)


def _records(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{row['shard_records']:,}",
            f"{row['shards']:,}",
            f"{row['workers']}",
            f"{row['manifest_mb']:.0f}",
            f"{row['open_s']:.1f}",
            "not read" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}",
            f"{1000 * row['draw_s']:.1f}",
        ]
        for row in found
    ]
    head = ["records per shard", "shards", "workers", "manifest, MB", "start, s", "memory, MB"]
    return _table([*head, "draw of a step, ms"], rows)


def _encode(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        [f"{row['workers']}", f"{row['images']:,}", f"{row['wall_s']:.1f}", f"{row['rate']:.0f}"]
        for row in found
    ]
    return _table(["workers", "images", "s", "images/s"], rows)


def _frozen(found: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{row['workers']}",
            name,
            f"{row[f'{name}_held'] / 1e6:.0f}",
            f"{row[f'{name}_most'] / 1e6:.0f}",
            f"{row[f'{name}_s']:.2f}",
        ]
        for row in found
        for name in ("whole", "divided")
    ]
    return _table(["workers", "weights", "MB held", "most MB in a pass", "s per pass"], rows)


# --- clusters -------------------------------------------------------------------------------------


def _models() -> Iterator[tuple[str, Config]]:
    """The paper's models by their networks, as our configs describe them."""
    yield "MNIST", load_config(ROOT / "configs" / "mnist.toml")
    cifar = load_config(ROOT / "configs" / "cifar10.toml")
    yield "CIFAR-10, 90 M", cifar
    large = {
        "block_channels": (192, 384, 576, 960),
        "layers_per_block": 2,
        "heads": 8,
        "context_dim": 512,
        "norm_groups": 32,
        "attention_levels": None,
    }
    yield (
        "CelebA-HQ 256, 406 M",
        with_changes(
            cifar,
            data={"size": 256},
            autoencoder={"block_channels": (128, 256, 512)},
            model=large,
            finetune={"draws": 1},
            run={"microbatch": 32},
        ),
    )


def _gpus() -> list[str]:
    rows = []
    for name, config in _models():
        _, parameters = shapes_of(config)
        facts = config.cluster.model_dump(exclude={"gpus", "batches", "gpu_hours"})
        slow, fast = Cluster(**facts).rates(flops_per_row(config))
        count = sum(parameter.numel() for parameter in parameters.values())
        for batch in _BATCHES:
            cells = [_cell(slow, fast, config, count, batch, gpus) for gpus in _GPUS]
            rows.append(
                [name, f"{count / 1e6:.1f}", f"{config.finetune.draws}", f"{batch:,}", *cells]
            )
    head = ["model", "trainable, M", "K", "records per step", *(f"{n:,} GPUs" for n in _GPUS)]
    return _table(head, rows)


def _cell(slow: Rates, fast: Rates, config: Config, count: int, batch: int, gpus: int) -> str:
    work = Work(
        parameters=count,
        batch=batch,
        draws=config.finetune.draws,
        microbatch=config.run.microbatch,
        lanes=gpus,
    )
    sizes = [2**n for n in range(1, 10) if 2**n <= config.run.microbatch]
    work = min(
        (replace(work, microbatch=size) for size in sizes),
        key=lambda choice: step_time(slow, choice, gpus).total_s,
    )
    times = [step_time(rates, work, gpus).total_s for rates in (fast, slow)]
    shares = sorted(efficiency(rates, work, gpus) for rates in (fast, slow))
    fastest, slowest = (f"{t:.2g}" if t < 99 else f"{t:.0f}" for t in times)
    return f"{fastest} to {slowest} s ({shares[0]:.0%} to {shares[1]:.0%})"
