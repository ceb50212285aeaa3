"""The model of a step's cost: against counting, and in its limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dpldm_dist.privacy.sampling import Lanes, PoissonSampling, dyadic_rate
from dpldm_dist.runtime.cost import (
    Cluster,
    Load,
    Rates,
    Work,
    bytes_sent,
    efficiency,
    expected_load,
    least_bytes,
    step_time,
)

WORK = Work(parameters=10**6, batch=512, draws=2, microbatch=16, lanes=8)
RATES = Rates(row_s=1e-3, noise_s=1e-7, coordinate_s=1e-8, step_s=1e-2, byte_s=1e-9)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_the_expected_load_is_that_of_real_draws(workers):
    """Within 5 % of the mean over 200 steps, for all workers and for the one with most."""
    records, lanes = [500] * 16, WORK.lanes
    sampling = PoissonSampling(bytes(32), attempt=0, sample_rate=dyadic_rate(WORK.batch / 8000))
    drawn = Lanes(records, lanes=lanes, cap=10**6, microbatch=WORK.microbatch)
    counts = np.array(
        [
            [len(list(drawn.microbatches(sampling, step, lane))) for lane in range(lanes)]
            for step in range(200)
        ]
    )
    owners = [list(drawn.of_worker(rank, workers)) for rank in range(workers)]
    most = np.max([counts[:, mine].sum(1) for mine in owners], axis=0).mean()
    expected = expected_load(WORK, workers)
    assert expected.total == pytest.approx(counts.sum(1).mean(), rel=0.05)
    assert expected.most == pytest.approx(most, rel=0.12)


def test_one_worker_sends_nothing_and_many_send_half_more_than_the_minimum():
    assert bytes_sent(1000, 1) == least_bytes(1000, 1) == 0
    for workers in (2, 3, 1024):
        assert bytes_sent(1000, workers) == pytest.approx(1.5 * least_bytes(1000, workers))


def test_workers_that_share_a_core_are_no_faster_together():
    crowded = replace(RATES, cores=1.0)
    alone, four = (step_time(crowded, WORK, n, Load(40, 40 / n)) for n in (1, 4))
    assert four.gradients_s == pytest.approx(alone.gradients_s)
    assert four.rest_s == pytest.approx(4 * alone.rest_s)
    for part in ("noise_s", "coordinates_s"):  # a quarter each, one after another
        assert getattr(four, part) == pytest.approx(getattr(alone, part))
    assert efficiency(crowded, WORK, 4) < 0.26


def test_a_slow_link_takes_the_time_of_its_bytes():
    slow = replace(RATES, link_byte_s=1e-6)
    found = step_time(slow, WORK, 2)
    assert found.wire_s == pytest.approx(bytes_sent(WORK.parameters, 2) * 1e-6)
    assert found.total_s > step_time(RATES, WORK, 2).total_s


def test_large_batches_scale_better_than_small_ones():
    shares = [efficiency(RATES, replace(WORK, batch=batch), 8) for batch in (64, 512, 65_536)]
    assert shares == sorted(shares) and shares[0] < 0.5 < 0.9 < shares[2] <= 1


def test_the_worst_case_of_a_cluster_is_slower_than_the_best_in_every_part():
    cluster = Cluster(
        tflops=(19.5, 67.0), utilisation=(0.2, 0.5), launch_ms=(40.0, 10.0), link_gbit=(100.0, 400.0), hop_us=(20.0, 5.0),
        noise_per_s=(1e7, 5e7), hash_gb=(0.4, 2.0), rest_ms=(30.0, 5.0),
    )  # fmt: skip
    worst, best = (step_time(rates, WORK, 64) for rates in cluster.rates(1e10))
    for part in ("gradients_s", "waiting_s", "noise_s", "coordinates_s", "wire_s", "rest_s"):
        assert getattr(worst, part) > getattr(best, part)
