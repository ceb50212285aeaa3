"""``python -m tests.soak``: kill a long run again and again; print what came of it."""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
from dataclasses import asdict
from pathlib import Path

import rich.box
import rich.console
import rich.table

from tests.soak.soak import Figures, soak

TABLE = (
    ("noisy steps, of both runs", "steps", "{:,}"),
    ("of these repeated after a kill", "repeated", "{:,}"),
    ("kill -9", "kills", "{:,}"),
    ("starts", "starts", "{:,}"),
    ("lines of the ledger", "ledger_lines", "{:,}"),
    ("epsilon", "epsilon", "{:.3f}"),
    ("resident memory, MB", "rss_MB", "{:.0f}"),
    ("its growth in the last half, MB", "grown_MB", "{:.1f}"),
    ("of which MB per 1,000 steps", "slope", "{:.2f}"),
    ("spread of open files", "files", "{}"),
    ("CPU time of a step, ms", "step_ms", "{:.0f}"),
    ("minutes", "minutes", "{:.0f}"),
    ("faults", "faults", "{}"),
)


def main() -> int:
    """Exit code 0 if all bits are the same, nothing was charged twice and nothing grew."""
    options = _options()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(Path(folder), steps=options.steps, kills=options.kills, seed=options.seed)
    _print(figures)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(asdict(figures), indent=1) + "\n")
    return 1 if figures.faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="noisy steps in all")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="to draw it again")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    return parser.parse_args()


def _print(figures: Figures) -> None:
    facts = asdict(figures)
    facts |= {"minutes": figures.seconds / 60, "faults": len(figures.faults)}
    table = rich.table.Table(box=rich.box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for title, name, form in TABLE:
        table.add_row(title, form.format(facts[name]))
    rich.console.Console(width=100).print(table)
    print("\n".join(figures.faults))


if __name__ == "__main__":
    raise SystemExit(main())
