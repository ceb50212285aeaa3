"""What a noisy step costs on W workers: a model with few rates, fitted or given.

The same formulas serve this machine, whose rates ``benchmarks/scale`` measures, and a cluster that
nobody has measured, whose rates are inputs. Assumptions stand in docs/scaling.md.
Symbols: W workers, L lanes, B expected records of a step, K draws of each, P trainable parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

WORD_BYTES = 8  # of a coordinate of the integer sum
PARAMETER_BYTES = 4  # of a parameter in fp32, and of a coordinate of an ordinary gradient


@dataclass(frozen=True)
class Work:
    """What a step does. All public: expected records, never those drawn."""

    parameters: int
    batch: int
    draws: int
    microbatch: int
    lanes: int


@dataclass(frozen=True)
class Rates:
    """Seconds that one worker, alone on its machine, needs.

    row_s: one draw of one record, forward and backward. microbatch_s: what comes on top for each
    microbatch. noise_s: noise of one coordinate. coordinate_s: whatever else is done for a
    coordinate by the worker that owns it (digest, optimizer). step_s: whatever else every worker
    does. once_s: what one worker does for all (ledger, progress).
    byte_s: one byte sent, if the network were free. link_byte_s: the same for the network, if the
    processors were. hop_s: one message. cores: workers that can compute at the same time; further
    ones share them (infinite: each has a device of its own).
    """

    row_s: float
    microbatch_s: float = 0.0
    noise_s: float = 0.0
    coordinate_s: float = 0.0
    step_s: float = 0.0
    once_s: float = 0.0
    byte_s: float = 0.0
    link_byte_s: float = 0.0
    hop_s: float = 0.0
    cores: float = math.inf


@dataclass(frozen=True)
class Load:
    """Microbatches of a step: of all workers together, and of the one with most."""

    total: float
    most: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: gradients if all workers had equally many, waiting for the worker with
    most, noise, other work on every coordinate, bytes and messages, the rest."""

    gradients_s: float
    waiting_s: float
    noise_s: float
    coordinates_s: float
    wire_s: float
    rest_s: float

    @property
    def total_s(self) -> float:
        parts = self.gradients_s, self.waiting_s, self.noise_s
        return sum(parts) + self.coordinates_s + self.wire_s + self.rest_s


def bytes_sent(parameters: int, workers: int) -> float:
    """Bytes that each worker sends in a step: its part of the integer sum to the owner of every
    slice, and the parameters that it updated to all (``run.update = sharded``, which "auto" takes
    for all but small models).

    Source: Patarasuk and Yuan (2009), "Bandwidth optimal all-reduce algorithms".
    """
    return (workers - 1) / workers * (WORD_BYTES + PARAMETER_BYTES) * parameters


def least_bytes(parameters: int, workers: int) -> float:
    """The same for one ring all-reduce of the trainable parameters in fp32: what training without
    privacy would send."""
    return 2 * (workers - 1) / workers * PARAMETER_BYTES * parameters


def expected_load(work: Work, workers: int) -> Load:
    """Microbatches of an average step.

    A lane of n records fills ceil(n / microbatch) of them, half a microbatch more than n /
    microbatch on average; the last is padded and costs as much as the others. The number of records
    of a worker is nearly normal with variance B / W; the largest of W such numbers is about
    sqrt(2 ln W) standard deviations above their mean.
    """
    filled = work.batch / work.microbatch + work.lanes * min(0.5, work.batch / work.lanes)
    lanes_of_one = math.ceil(work.lanes / workers)
    share = filled * lanes_of_one / work.lanes
    spread = math.sqrt(work.batch * lanes_of_one / work.lanes) / work.microbatch
    return Load(filled, share + math.sqrt(2 * math.log(workers)) * spread)


def step_time(rates: Rates, work: Work, workers: int, load: Load | None = None) -> StepTime:
    """What a step of ``work`` takes on ``workers``; ``load`` None: that of an average step."""
    load = load or expected_load(work, workers)
    crowd = max(1.0, workers / rates.cores)
    one_s = rates.microbatch_s + rates.row_s * work.microbatch * work.draws
    cores = min(workers, rates.cores)
    others = (load.total - load.most) / max(1, workers - 1)
    sent = bytes_sent(work.parameters, workers)
    wire_s = sent * max(rates.byte_s * crowd, rates.link_byte_s)
    return StepTime(
        gradients_s=load.total * one_s / cores,
        waiting_s=max(0.0, load.most - others) * (1 - 1 / cores) * one_s,
        noise_s=rates.noise_s * work.parameters / workers * crowd,
        coordinates_s=rates.coordinate_s * work.parameters / workers * crowd,
        wire_s=wire_s + 2 * (workers - 1) * rates.hop_s * crowd,
        rest_s=rates.step_s * crowd + rates.once_s,
    )


def efficiency(rates: Rates, work: Work, workers: int) -> float:
    """Time of one worker over W times that of W workers: 1 is perfect strong scaling. The one has
    a single lane, so that padding for the sake of many workers counts against them."""
    alone = step_time(rates, replace(work, lanes=1), 1).total_s
    return alone / (workers * step_time(rates, work, workers).total_s)


@dataclass(frozen=True)
class Cluster:
    """A cluster by its data sheet, as (worst, best) of what is not known before it is measured.

    tflops: of one GPU in the arithmetic of the run, 10^12 per second. utilisation: share of them
    that a network reaches. launch_ms: what a microbatch costs beyond its operations, milliseconds,
    for kernels that wait to be started. link_gbit: network of one GPU, 10^9 bits per second.
    hop_us: one message, microseconds. noise_per_s: coordinates of noise per second and worker, made
    on the CPU. hash_gb: gigabytes per second of SHA-256, of which a step digests 8 P bytes.
    rest_ms: ledger and self-checks of a step, milliseconds.
    """

    tflops: tuple[float, float]
    utilisation: tuple[float, float]
    launch_ms: tuple[float, float]
    link_gbit: tuple[float, float]
    hop_us: tuple[float, float]
    noise_per_s: tuple[float, float]
    hash_gb: tuple[float, float]
    rest_ms: tuple[float, float]

    def rates(self, flops_per_row: float) -> tuple[Rates, Rates]:
        """Rates of the worst and of the best case. ``flops_per_row``: of one draw of one record,
        forward and backward."""
        return self._of(0, flops_per_row), self._of(1, flops_per_row)

    def _of(self, case: int, flops_per_row: float) -> Rates:
        return Rates(
            row_s=flops_per_row / (self.tflops[case] * 1e12 * self.utilisation[case]),
            microbatch_s=self.launch_ms[case] * 1e-3,
            noise_s=1.0 / self.noise_per_s[case],
            coordinate_s=WORD_BYTES / (self.hash_gb[case] * 1e9),
            step_s=self.rest_ms[case] * 1e-3,
            link_byte_s=8.0 / (self.link_gbit[case] * 1e9),
            hop_s=self.hop_us[case] * 1e-6,
        )
