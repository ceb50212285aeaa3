"""Rates of this machine out of a few runs and timed parts; what they say of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.scale.measure import Measured, Setting
from benchmarks.scale.tiny import LANES, MICROBATCH
from dpldm_dist.runtime.cost import Load, Rates, StepTime, Work, bytes_sent, step_time

SMALL, FITTED, TWO = Setting(1, 48), Setting(1, 192), Setting(2, 96)
PROBES = (Setting(2, 96, 80.0), Setting(4, 96, 80.0))
FIT = (SMALL, FITTED, TWO, *PROBES)
HELD_OUT = (
    *(Setting(1, 96), Setting(4, 96), Setting(4, 192)),
    *(Setting(2, 96, 40.0), Setting(4, 96, 40.0)),
)
SETTINGS = (*FIT, *HELD_OUT)


def fit(found: dict[Setting, Measured], *, cores: int) -> Rates:
    """Rates from ``FIT`` alone.

    Two batches on one process give the cost of a microbatch and the rest of a step. Noise and, on
    two processes, messages are timed by themselves. What the first of two processes uses of
    processors beyond the second is done once (ledger, progress); what the second uses beyond
    microbatches, noise and the rest is what it takes to exchange its bytes.
    """
    small, one, two = (found[setting] for setting in (SMALL, FITTED, TWO))
    each_s = (one.step_s - small.step_s) / (one.total - small.total)
    rest_s = max(0.0, one.step_s - one.total * each_s - one.noise_s)
    first_s, second_s = (cpu_s - load * each_s for cpu_s, load in two.by_worker)
    once_s = min(rest_s, max(0.0, first_s - second_s))
    exchange_s = max(0.0, second_s - two.noise_s / 2 - (rest_s - once_s))
    crowd = max(1.0, two.setting.workers / cores)
    return Rates(
        row_s=0.0,
        microbatch_s=each_s,
        noise_s=one.noise_s / one.parameters,
        step_s=rest_s - once_s,
        once_s=once_s,
        hop_s=two.message_s / 2 / crowd,  # an all-reduce of two is two messages
        byte_s=exchange_s / bytes_sent(two.parameters, two.setting.workers),
        cores=float(cores),
    )


def shares_of_link(found: Mapping[Setting, Measured]) -> dict[int, float]:
    """By the number of workers, what part of a slow link's speed an exchange gets that is timed by
    itself at another speed: for headers, and because gloo hardly sends while it receives."""
    return {
        probe.workers: _seconds_on_wire(found[probe]) / found[probe].exchange_s for probe in PROBES
    }


def _seconds_on_wire(run: Measured) -> float:
    assert run.setting.mbit is not None
    return bytes_sent(run.parameters, run.setting.workers) * 8 / (run.setting.mbit * 1e6)


def predict(rates: Rates, run: Measured, shares: Mapping[int, float]) -> StepTime:
    """What the model says of a run, given how many microbatches it had."""
    setting = run.setting
    if setting.mbit is not None:
        rates = replace(rates, link_byte_s=8 / (setting.mbit * 1e6 * shares[setting.workers]))
    work = Work(
        parameters=run.parameters,
        batch=setting.batch,
        draws=1,
        microbatch=MICROBATCH,
        lanes=LANES,
    )
    return step_time(rates, work, setting.workers, Load(run.total, run.most))


def errors(
    found: Sequence[Measured], rates: Rates, shares: Mapping[int, float]
) -> dict[str, float]:
    """Predicted over measured, minus one, by setting."""
    return {run.setting.name: predict(rates, run, shares).total_s / run.step_s - 1 for run in found}
