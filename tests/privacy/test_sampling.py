"""Exact Poisson sampling over shards."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy.stats import binom

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy.randomness import keystream, keystream_parts, new_key
from dpldm_dist.privacy.sampling import RATE_BITS, Lanes, PoissonSampling, _below, dyadic_rate

KEY = bytes(range(32))


def selected(sampling: PoissonSampling, steps: int, shard: int, records: int) -> np.ndarray:
    """Membership table, bool (steps, records)."""
    table = np.zeros((steps, records), dtype=bool)
    for step in range(steps):
        table[step, sampling.select(step, shard, records)] = True
    return table


def test_the_rate_is_rounded_up_to_a_multiple_of_two_to_the_minus_40():
    for rate in (0.1, 1 / 3, 1e-9, 1.0):
        exact = dyadic_rate(rate)
        assert rate <= exact <= rate + 2.0**-RATE_BITS
        assert exact * 2**RATE_BITS == int(exact * 2**RATE_BITS)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_an_impossible_rate_is_refused(rate):
    with pytest.raises(PrivacyError):
        dyadic_rate(rate)


def test_the_byte_wise_coin_equals_a_comparison_of_whole_numbers(monkeypatch):
    streams = np.random.default_rng(0).integers(0, 256, (5, 4000), dtype=np.uint8)
    streams[:3, :2000] = [[17], [0], [255]]  # many coins that stay open for several bytes

    served = {}

    def fixed_keystream(key, length, *, stream=0):
        served[stream] = streams[stream][:length]
        return served[stream]

    def fixed_parts(key, length):
        whole = fixed_keystream(key, length)
        yield from np.split(whole, [1000, 1001, 3000])

    monkeypatch.setattr("dpldm_dist.privacy.sampling.keystream", fixed_keystream)
    monkeypatch.setattr("dpldm_dist.privacy.sampling.keystream_parts", fixed_parts)
    threshold = int.from_bytes(bytes([17, 0, 255, 128, 3]), "big")
    chosen = set(_below(KEY, 4000, threshold).tolist())
    open_places, numbers = np.arange(4000), np.zeros(4000, dtype=np.uint64)
    for depth, digit in enumerate(threshold.to_bytes(5, "big")):
        byte = streams[depth][: len(open_places)]
        numbers[open_places] |= byte.astype(np.uint64) << np.uint64(8 * (4 - depth))
        open_places = open_places[byte == digit]
    # a coin that was decided early compares the same whatever its later bytes are
    assert chosen == set(np.flatnonzero(numbers < threshold).tolist())


def test_a_long_keystream_has_the_same_bytes_in_parts(monkeypatch):
    monkeypatch.setattr("dpldm_dist.privacy.randomness._PART_BYTES", 100)
    for length in (0, 1, 99, 100, 101, 1000):
        parts = [part.tobytes() for part in keystream_parts(KEY, length)]
        assert b"".join(parts) == keystream(KEY, length).tobytes()
        assert all(len(part) == 100 for part in parts[:-1])


def test_a_lane_is_drawn_by_the_coins_of_its_seats():
    """The law of a lane is that of its row, whatever the shards: nobody is drawn who is not there,
    and nobody who is there is left out."""
    shard_records = [70, 3, 0, 64, 129, 1]
    sampling = PoissonSampling(KEY, attempt=0, sample_rate=dyadic_rate(0.4))
    lanes = Lanes(shard_records, lanes=1, cap=1000, microbatch=16)
    begins = [0, 128, 192, 192, 256, 448]  # every shard has a multiple of 64 seats
    for step in range(50):
        drawn = set(sampling.select(step, 0, 512).tolist())
        found = lanes.select(sampling, step, 0)
        assert set(zip(found.shards.tolist(), found.places.tolist(), strict=True)) == {
            (shard, place)
            for shard, records in enumerate(shard_records)
            for place in range(records)
            if begins[shard] + place in drawn
        }


def test_lanes_and_workers_get_shares_of_nearly_equal_size():
    sizes = np.random.default_rng(0).integers(1, 5000, 300)
    lanes = Lanes(sizes.tolist(), lanes=16, cap=10**6, microbatch=16)
    for workers in (1, 3, 4, 5):
        shares = [lanes.shards_of_worker(rank, workers) for rank in range(workers)]
        assert sorted(s for share in shares for s in share) == list(range(300))
        most_lanes = -(-16 // workers)  # lanes are dealt out whole
        assert max(sizes[share].sum() for share in shares) <= 1.02 * sizes.sum() * most_lanes / 16


def test_more_workers_than_shards_and_more_lanes_than_shards_leave_some_with_nothing():
    lanes = Lanes([10, 20], lanes=6, cap=100, microbatch=4)
    shares = [lanes.shards_of_worker(rank, 5) for rank in range(5)]
    assert sorted(map(len, shares)) == [0, 0, 0, 1, 1]
    sampling = PoissonSampling(KEY, attempt=0, sample_rate=1.0)
    found = [len(lanes.select(sampling, 0, lane).ids) for lane in range(6)]
    assert sorted(found) == [0, 0, 0, 0, 10, 20]


def test_a_record_more_in_one_shard_moves_no_other_seat_within_a_multiple_of_64():
    sampling = PoissonSampling(KEY, attempt=0, sample_rate=dyadic_rate(0.3))
    for before, after in (([16] * 5, [16, 16, 16, 15, 16]), ([65, 127, 3], [66, 127, 3])):
        drawn = [
            {
                int(n)
                for lane in range(2)
                for n in Lanes(sizes, lanes=2, cap=10**6, microbatch=4)
                .select(sampling, 3, lane)
                .ids
            }
            for sizes in (before, after)
        ]
        assert len(drawn[0] ^ drawn[1]) <= 1


def test_the_draw_of_a_hundred_million_records_takes_no_work_per_record_or_shard():
    """A hundredth of it here: far less than a microsecond per record, whatever the shards."""
    sampling = PoissonSampling(KEY, attempt=0, sample_rate=dyadic_rate(4096 / 1e8))
    lanes = Lanes([100] * 10_000, lanes=4, cap=10**6, microbatch=64)
    started = time.process_time()
    for step in range(5):
        for lane in range(4):
            lanes.select(sampling, step, lane)
    assert time.process_time() - started < 0.5  # 5 million records; one by one it takes seconds


def test_poisson_law_mean_variance_and_independence_within_and_across():
    rate, steps, records = dyadic_rate(0.05), 4000, 300
    sampling = PoissonSampling(new_key(), attempt=0, sample_rate=rate)
    a, b = selected(sampling, steps, 0, records), selected(sampling, steps, 1, records)
    mean, variance = rate, rate * (1 - rate)
    most_together = binom.isf(1e-6 / 180_000, steps, rate**2)  # of 180,000 independent pairs
    for table in (a, b):
        share = table.mean(0)
        z = (share - mean) / math.sqrt(variance / steps)
        assert np.abs(z).max() < 5.2  # 300 records
        assert abs(z.std() - 1) < 5 / math.sqrt(2 * records)
        sizes = table.sum(1)
        assert abs(sizes.mean() - records * mean) < 5 * math.sqrt(records * variance / steps)
        assert abs(sizes.var() / (records * variance) - 1) < 5 * math.sqrt(2 / steps)
        together = table.T.astype(np.int64) @ table
        np.fill_diagonal(together, 0)
        assert together.max() <= most_together  # within a shard, 45,000 pairs
    across = a.T.astype(np.int64) @ b
    assert across.max() <= most_together
    assert abs(across.mean() / (steps * rate**2) - 1) < 0.05
    later = ((a[:-1] - mean) * (a[1:] - mean)).mean() / variance
    assert abs(later) < 5 / math.sqrt(steps * records)
    sizes_a, sizes_b = a.sum(1) - a.sum(1).mean(), b.sum(1) - b.sum(1).mean()
    assert abs((sizes_a * sizes_b).mean() / (records * variance)) < 5 / math.sqrt(steps)


def test_steps_attempts_and_shards_draw_differently():
    rate = dyadic_rate(0.5)
    first = PoissonSampling(KEY, attempt=0, sample_rate=rate)
    again = PoissonSampling(KEY, attempt=1, sample_rate=rate)
    draws = [
        first.select(0, 0, 200),
        first.select(1, 0, 200),
        first.select(0, 1, 200),
        again.select(0, 0, 200),
    ]
    assert len({tuple(d) for d in draws}) == 4


def test_rate_one_takes_every_record_and_an_empty_shard_none():
    everyone = PoissonSampling(KEY, attempt=0, sample_rate=1.0)
    assert everyone.select(3, 0, 10).tolist() == list(range(10))
    few = PoissonSampling(KEY, attempt=0, sample_rate=dyadic_rate(1e-12))
    assert few.select(0, 0, 1000).tolist() == []
    assert few.select(0, 0, 0).tolist() == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
def test_the_batch_and_its_microbatches_do_not_depend_on_the_number_of_workers(world_size):
    shard_records = [40, 7, 0, 93, 60, 60, 1]
    sampling = PoissonSampling(KEY, attempt=0, sample_rate=dyadic_rate(0.3))
    lanes = Lanes(shard_records, lanes=4, cap=1000, microbatch=16)

    def batch(workers: int) -> list[tuple[int, ...]]:
        return sorted(
            tuple(part.ids.tolist())
            for rank in range(workers)
            for lane in lanes.of_worker(rank, workers)
            for part in lanes.microbatches(sampling, 5, lane)
        )

    assert batch(world_size) == batch(1)
    owners = [s for rank in range(world_size) for s in lanes.shards_of_worker(rank, world_size)]
    assert sorted(owners) == list(range(len(shard_records)))


def test_no_more_than_the_cap_of_a_lane_enters_a_step():
    sampling = PoissonSampling(KEY, attempt=0, sample_rate=1.0)
    lanes = Lanes([100, 100], lanes=1, cap=33, microbatch=16)
    assert [len(part.ids) for part in lanes.microbatches(sampling, 0, 0)] == [16, 16, 1]
