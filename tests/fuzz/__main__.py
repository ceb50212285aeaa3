"""``python -m tests.fuzz``: try many damaged inputs of every kind, and print what came of them."""

from __future__ import annotations

import argparse
import logging
import secrets
import time

import rich.box
import rich.console
import rich.table

from tests.fuzz.kinds import KINDS
from tests.fuzz.trial import RIGHT, WRONG, Tally, run

_MOST_FAULTS = 50  # of a kind


def main() -> int:
    """Exit code 0 if nothing was accepted that means something else, and nothing broke."""
    options = _options()
    logging.disable()  # checkpoints warn of each one that they pass over
    print(f"seed {options.seed}, {options.cases} cases of each kind", flush=True)
    table = rich.table.Table(box=rich.box.SIMPLE)
    for title in ("kind", "cases", *RIGHT, *WRONG, "controls", "s"):
        table.add_column(title, justify="left" if title == "kind" else "right")
    faults: list[str] = []
    for name in options.kind or KINDS:
        started = time.perf_counter()
        numbers = (
            range(options.cases) if options.only is None else range(options.only, options.only + 1)
        )
        tally = run(KINDS[name], options.seed, numbers)
        table.add_row(*_cells(tally), f"{time.perf_counter() - started:.0f}")
        faults += tally.faults[:_MOST_FAULTS]
        print(f"{name}: done", flush=True)
    rich.console.Console(width=160).print(table)
    print("\n".join(faults))
    return 1 if faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of each kind")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="not all kinds")
    parser.add_argument("--seed", default=secrets.token_hex(4), help="to see a run again")
    parser.add_argument("--only", type=int, help="number of one case")
    return parser.parse_args()


def _cells(tally: Tally) -> list[str]:
    counts = [f"{tally.outcomes[outcome]:,}" for outcome in (*RIGHT, *WRONG)]
    return [tally.kind, f"{tally.cases:,}", *counts, f"{tally.controls:,}"]


if __name__ == "__main__":
    raise SystemExit(main())
