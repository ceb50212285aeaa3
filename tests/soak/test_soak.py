"""The soak of ``make soak`` as a test, and what it reads off a process that lives for long."""

from __future__ import annotations

import secrets

import pytest

from tests.soak.soak import growth, soak


@pytest.mark.soak
def test_20000_steps_and_200_kills_change_no_bit_and_leave_nothing_behind(tmp_path):
    figures = soak(tmp_path, steps=20_000, kills=200, seed=secrets.randbits(32))
    assert figures.faults == [], figures
    assert figures.steps >= 20_000


def test_growth_is_read_off_the_second_half_between_two_readings_of_epsilon():
    """2.5 MB in 1,000 steps, 4 MB at a reading of epsilon, and one file more for a moment, after a
    first half that says nothing."""
    warming_up = [(step, 10**9 * step, step) for step in range(0, 500, 50)]
    health = [
        (step, 10**8 + 2500 * step + 4_000_000 * (step >= 800), 20 + (step == 900))
        for step in range(500, 1000, 50)
    ]
    resident_MB, grown_MB, slope, files = growth(warming_up + health, window=400)
    assert resident_MB == pytest.approx(106.375) and grown_MB == pytest.approx(5.125)
    assert slope == pytest.approx(2.5) and files == 1
