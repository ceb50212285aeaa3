"""Tables and a plot of what was measured, for the terminal and for ``docs/performance.md``.

python -m benchmarks.report              prints, and draws ``results/step.png``
python -m benchmarks.report --document   also rewrites the tables of ``docs/performance.md``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
MARKERS = {
    name: (f"<!-- {name}: written by make bench -->", f"<!-- end of {name} -->")
    for name in ("step", "parts")
}
COLUMNS = ("model", "trainable", "K", "method", "ms/record", "time", "memory", "GFLOP/s")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", action="store_true")
    options = parser.parse_args(arguments)
    step, parts = _read(options.results / "step.json"), _read(options.results / "parts.json")
    if step is not None:
        show(step)
        draw(step, options.results / "step.png")
    if parts is not None:
        show_parts(parts)
    if options.document:
        rewrite(step=step, parts=parts)


def show(document: Mapping[str, Any]) -> None:
    """The table of a document of ``benchmarks.step`` on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=machine_line(document["machine"]))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:4] else "right")
    for row in document["rows"]:
        table.add_row(*cells_of(row), end_section=row is document["rows"][-1])
    Console(width=120).print(table)


def show_parts(document: Mapping[str, Any]) -> None:
    """The table of a document of ``benchmarks.parts`` on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("part", "what was found", title=machine_line(document["machine"]))
    for row in document["rows"]:
        table.add_row(*part_of(row))
    Console(width=120).print(table)


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Time and memory ratios, one panel for each model and K; a bar for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in document["rows"] if "time_ratio" in row]
    panels = list(dict.fromkeys((row["model"], row["K"]) for row in rows))
    methods = [m for m in dict.fromkeys(r["method"] for r in rows) if m != "nonprivate"]
    figure, axes = pyplot.subplots(
        len(panels), 2, figsize=(11, 2.4 * len(panels)), squeeze=False, layout="constrained"
    )
    for pair, panel in zip(axes, panels, strict=True):
        here = [row for row in rows if (row["model"], row["K"]) == panel]
        for axis, column in zip(pair, ("time_ratio", "memory_ratio"), strict=True):
            _bars(axis, here, methods, column)
            axis.set_title(f"{panel[0]}, K = {panel[1]}: {column.replace('_', ' ')}", fontsize=9)
    if panels:
        axes[0][0].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[Row], methods: Sequence[str], column: str) -> None:
    sets = list(dict.fromkeys(row["trainable"] for row in rows))
    width = 0.8 / max(1, len(methods))
    for number, method in enumerate(methods):
        found = {row["trainable"]: row[column] for row in rows if row["method"] == method}
        places = [place + number * width for place, name in enumerate(sets) if name in found]
        axis.bar(places, [found[name] for name in sets if name in found], width, label=method)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks([place + 0.4 for place in range(len(sets))], sets, fontsize=8)
    if column == "memory_ratio":
        axis.set_yscale("log")


# --- text -----------------------------------------------------------------------------------------


def cells_of(row: Row) -> list[str]:
    """A row of the table: its ratios, or the reason why there are none."""
    place = [row["model"], row["trainable"], str(row["K"]), row["method"]]
    if "time_ratio" not in row:
        return [*place, row["reason"], "-", "-", "-"]
    return [
        *place,
        f"{1e3 * row['seconds_per_record']:.2f}",
        f"{row['time_ratio']:.2f}",
        f"{row['memory_ratio']:.2f}",
        f"{row['gflops_per_second']:.0f}",
    ]


def part_of(row: Row) -> tuple[str, str]:
    """Name and findings of a row of ``benchmarks.parts``."""
    found = [f"{name} {_number(name, value)}" for name, value in row.items() if name != "part"]
    return row["part"], ", ".join(found).replace("_", " ")


def _number(name: str, value: Any) -> str:
    if name.startswith("share") or name.endswith("efficiency"):
        return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def machine_line(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['processor']}, device {machine['device']}, {machine['cores']} cores, "
        f"{machine['threads']} thread(s); Python {machine['python']}, torch {machine['torch']}"
    )


def step_lines(document: Mapping[str, Any]) -> list[str]:
    """One line for each cell, one column for each method: "time / memory" over non-private."""
    rows = document["rows"]
    methods = [m for m in dict.fromkeys(r["method"] for r in rows) if m != "nonprivate"]
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["trainable"], row["K"]), {})[row["method"]] = row
    head = ["model", "trainable", "K", "B", "non-private ms/record", "GFLOP/s", *methods]
    lines = [machine_line(document["machine"]), "", _line(head), _line(["---"] * len(head))]
    reasons: list[str] = []
    for place, of_method in cells.items():
        base = of_method["nonprivate"]
        first = [*map(str, place), str(base["B"])]
        if "time_ratio" not in base:
            lines.append(_line([*first, *["-"] * (2 + len(methods))]))
            continue
        first += [
            f"{1e3 * base['seconds_per_record']:.2f}", f"{base['gflops_per_second']:.0f}"
        ]  # fmt: skip
        ratios = [_ratios(of_method.get(method), reasons) for method in methods]
        lines.append(_line([*first, *ratios]))
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return [*lines, "", *notes] if notes else lines


def _ratios(row: Row | None, reasons: list[str]) -> str:
    if row is None:
        return ""
    if "time_ratio" in row:
        ratios = f"{row['time_ratio']:.2f} / {row['memory_ratio']:.2f}"
        return f"**{ratios}**" if row["method"] == "ours" else ratios
    reason = f"{row['method']}: {row['reason']}"
    if reason not in reasons:
        reasons.append(reason)
    return f"({reasons.index(reason) + 1})"


def parts_lines(document: Mapping[str, Any]) -> list[str]:
    table = [_line(["part", "what was found"]), _line(["---"] * 2)]
    return [
        machine_line(document["machine"]),
        "",
        *table,
        *(_line(part_of(row)) for row in document["rows"]),
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def rewritten(text: str, name: str, lines: Sequence[str]) -> str:
    """``text`` with what stands between the markers of ``name`` replaced by ``lines``.

    Raises: ValueError if the markers are not there, each once and in order.
    """
    first, last = MARKERS[name]
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        raise ValueError(f"Expected the markers {first!r} and {last!r} once each, in this order.")
    before, _, rest = text.partition(first)
    after = rest.partition(last)[2]
    return "\n".join([before + first, *lines, last]) + after


def rewrite(
    *, step: Mapping[str, Any] | None = None, parts: Mapping[str, Any] | None = None
) -> None:
    """Put these tables into ``docs/performance.md``."""
    text = DOCUMENT.read_text()
    if step is not None:
        text = rewritten(text, "step", step_lines(step))
    if parts is not None:
        text = rewritten(text, "parts", parts_lines(parts))
    DOCUMENT.write_text(text)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    main()
