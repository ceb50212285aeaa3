"""The benchmark of scaling: what it fits, what it would notice, and that its page is up to date."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.scale import page
from benchmarks.scale.__main__ import RESULTS, WITHIN
from benchmarks.scale.fit import HELD_OUT, SETTINGS, errors, fit, predict, shares_of_link
from benchmarks.scale.measure import Measured, Setting
from benchmarks.scale.tiny import MICROBATCH
from dpldm_dist.runtime.cost import Rates, bytes_sent

PARAMETERS = 10**6


SHARES = {1: 1.0, 2: 0.6, 4: 0.9}


def machine(rates: Rates, *, faulty: float = 0.0) -> dict[Setting, Measured]:
    """What a machine of such rates would show; ``faulty``: a cost per worker that no model has."""
    found = {}
    for setting in SETTINGS:
        total = setting.batch / MICROBATCH + 2
        run = Measured(
            setting=setting,
            parameters=PARAMETERS,
            step_s=0.0,
            wall_s=0.0,
            cpu_s=0.0,
            total=total,
            most=total / setting.workers + (setting.workers > 1),
            sent=bytes_sent(PARAMETERS, setting.workers),
            noise_s=rates.noise_s * PARAMETERS,
            message_s=2 * rates.hop_s * max(1.0, 2 / rates.cores),
            by_worker=tuple(
                (_busy_s(rates, setting) + rates.once_s * (rank == 0), 3.0)
                for rank in range(setting.workers)
            ),
            exchange_s=_exchange_s(rates, setting),
        )
        extra_s = faulty * (setting.workers - 1) ** 2
        found[setting] = replace(run, step_s=predict(rates, run, SHARES).total_s + extra_s)
    return found


def _busy_s(rates: Rates, setting: Setting) -> float:
    """Seconds of a processor of a worker with three microbatches."""
    noise_s = rates.noise_s * PARAMETERS / setting.workers
    sent = bytes_sent(PARAMETERS, setting.workers)
    return 3 * rates.microbatch_s + noise_s + rates.step_s + rates.byte_s * sent


def _exchange_s(rates: Rates, setting: Setting) -> float:
    sent = bytes_sent(PARAMETERS, setting.workers)
    if setting.mbit is None:
        return sent * rates.byte_s * max(1.0, setting.workers / rates.cores)
    return sent * 8 / (setting.mbit * 1e6 * SHARES[setting.workers])


def off(found: dict[Setting, Measured], *, cores: int) -> float:
    """The largest error of a fit to ``found`` in what was held out."""
    rates, shares = fit(found, cores=cores), shares_of_link(found)
    return max(map(abs, errors([found[one] for one in HELD_OUT], rates, shares).values()))


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_the_fit_predicts_the_runs_it_has_not_seen(cores):
    true = Rates(
        row_s=0.0, microbatch_s=0.1, noise_s=5e-8, step_s=0.1, once_s=0.05,
        byte_s=5e-9, hop_s=1e-4, cores=cores
    )  # fmt: skip
    found = machine(true)
    assert fit(found, cores=cores).microbatch_s == pytest.approx(0.1, rel=1e-6)
    assert shares_of_link(found) == pytest.approx({2: 0.6, 4: 0.9})
    assert off(found, cores=cores) < 0.01


def test_a_machine_that_behaves_otherwise_is_noticed():
    """Planted: workers that hinder each other more than in proportion, and a wrong number of cores."""
    true = Rates(row_s=0.0, microbatch_s=0.1, noise_s=5e-8, step_s=0.1, byte_s=5e-9, cores=2.0)
    hindered = machine(true, faulty=0.3)
    wrong = machine(true)
    assert off(hindered, cores=2) > WITHIN and off(wrong, cores=64) > WITHIN


def test_the_tables_of_the_page_are_those_of_the_committed_results():
    results, text = json.loads(RESULTS.read_text()), page.PAGE.read_text()
    for name, lines in page.tables(results, clusters=False):
        assert "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"]) in text, name
    assert "predicted, not measured" in text
