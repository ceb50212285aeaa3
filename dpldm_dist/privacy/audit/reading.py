"""What an instrument of an audit reads: one number, what it should be, and how unlikely that is."""

from __future__ import annotations

from dataclasses import dataclass

ALPHA = 1e-6  # of each statistical reading: correct code fails one in a million times


@dataclass(frozen=True)
class Reading:
    """One result. ``p_value``: probability that correct code gives this result or a worse one, at
    most; 0 or 1 where chance plays no part. It fails below ``alpha``.

    ``found`` and ``expected`` are in the unit that ``name`` says.
    """

    instrument: str
    name: str
    found: float
    expected: str
    p_value: float
    alpha: float = ALPHA

    @property
    def passed(self) -> bool:
        return self.p_value >= self.alpha


def exact(instrument: str, name: str, found: float, expected: str, *, holds: bool) -> Reading:
    """A reading in which chance plays no part."""
    return Reading(instrument, name, found, expected, 1.0 if holds else 0.0)


def two_sided(below: float, above: float) -> float:
    """The p-value of a statistic from P(at most this) and P(at least this)."""
    return float(min(1.0, 2.0 * min(below, above)))
