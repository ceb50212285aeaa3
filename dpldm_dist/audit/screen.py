"""The verdict of an audit on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rich.box
import rich.console
import rich.markup
import rich.table

from dpldm_dist.audit.verdict import Verdict
from dpldm_dist.privacy.audit.reading import ALPHA, Reading


def show(
    notes: Sequence[str], verdict: Verdict, *, crew: str, seconds: float, files: Sequence[Path]
) -> None:
    """Notes on what was audited, a table of all readings, claim, lower bounds and verdict."""
    console = rich.console.Console()
    lines = [
        *notes,
        f"claim   epsilon {verdict.claim:.3f} at delta {verdict.delta:g} on {crew} worker(s)",
        f"proved  epsilon >= {verdict.lower_bound:.3f} by (epsilon, delta), >= "
        f"{verdict.lower_bound_curve:.3f} by the trade-off curve (95 %)",
        f"verdict {'PASS' if verdict.passed else 'FAIL'} in {clock(seconds)}; correct code fails a "
        f"reading with probability {ALPHA:g}",
        *(f"wrote   {path}" for path in files),
    ]
    console.print(_table(verdict.readings))
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def clock(seconds: float) -> str:
    """``95 s`` or ``4 min``."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _table(readings: Sequence[Reading]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("reading", overflow="fold")
    for column in ("found", "expected", "p", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for instrument in dict.fromkeys(reading.instrument for reading in readings):
        table.add_section()
        table.add_row(f"[bold]{instrument}[/]")
        for reading in (r for r in readings if r.instrument == instrument):
            table.add_row(
                rich.markup.escape(reading.name),
                f"{reading.found:.4g}",
                reading.expected,
                _p_text(reading),
                "pass" if reading.passed else "[bold red]FAIL[/]",
            )
    return table


def _p_text(reading: Reading) -> str:
    """Readings in which chance plays no part have no p-value to show."""
    return "-" if reading.p_value in (0.0, 1.0) else f"{reading.p_value:.2g}"
