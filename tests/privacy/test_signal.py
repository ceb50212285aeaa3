"""The walk of noisy gradients beside noise alone: on real releases, with exact error bars."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import signal
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisySum
from dpldm_dist.privacy.signal import RandomWalk
from dpldm_dist.runtime.collective import SoloCollective
from tests.processes import on_workers

P, SIGMA, CLIP_NORM, GRID, DIVISOR = 20_000, 0.8, 0.25, 2.0**-32, 50.0
STEP_STD = SIGMA / DIVISOR
ERROR = 1 / math.sqrt(2 * P)


def walk_of(collective: Any, *, steps: int, signal_norm: float) -> RandomWalk:
    """The walk of a real optimizer whose workers add up to a constant gradient of that norm, in
    units of what noise alone gives in a step."""
    parameter = nn.Parameter(torch.zeros(P))
    private = DistributedDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        [parameter],
        NoisySum(
            bytes(range(32)),
            std=SIGMA * CLIP_NORM / GRID,
            mechanism="a test",
            collective=collective,
            bind=lambda purpose, step, digest: None,
        ),
        grid=GRID,
        clip_norm=CLIP_NORM,
        divisor=DIVISOR,
    )
    share = signal_norm * SIGMA * CLIP_NORM / GRID / collective.world_size
    walk = RandomWalk(P, step_std=STEP_STD)
    for step in range(steps):
        walk.add(private.step(torch.full((P,), round(share), dtype=torch.int64), step).mean_P)
    return walk


def numbers_of(collective: Any, signal_norm: float) -> list[float]:
    found = walk_of(collective, steps=8, signal_norm=signal_norm).signal()
    return [found.walk, found.noise_alone, found.step_ratio]


def check_pure_noise() -> None:
    walk = walk_of(SoloCollective(), steps=9, signal_norm=0.0)
    for steps in range(1, 10):
        found = walk.signal(steps)
        assert found.error == pytest.approx(ERROR)
        assert abs(found.ratio - 1) <= 4 * ERROR and abs(found.step_ratio - 1) <= 4 * ERROR
        assert found.is_pure_noise and found.noise_share > 1 - 8 * ERROR


def test_noise_alone_gives_a_ratio_of_one_within_its_error_bar_after_any_number_of_steps():
    check_pure_noise()


def test_error_bars_are_those_of_the_chi_law():
    """300 walks of one step in 50 dimensions: mean and spread of the ratio."""
    dims, walks = 50, 300
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(walks):
        walk = RandomWalk(dims, step_std=2.0)
        walk.add(2.0 * torch.randn(dims, generator=generator, dtype=torch.float64))
        found.append(walk.signal())
    ratios = torch.tensor([one.ratio for one in found])
    # E chi_P = sqrt(P) (1 - 1 / (4 P) + ...)
    assert abs(float(ratios.mean()) - (1 - 1 / (4 * dims))) <= 4 * found[0].error / walks**0.5
    assert float(ratios.std()) == pytest.approx(found[0].error, rel=4 / (2 * walks) ** 0.5)


def check_constant_signal() -> None:
    """A constant gradient s times the noise of a step: the ratio is sqrt(1 + t s^2)."""
    s = 0.3
    walk = walk_of(SoloCollective(), steps=9, signal_norm=s)
    for steps in (1, 4, 9):
        found = walk.signal(steps)
        # |S + Z|^2 has variance 2 P + 4 |S|^2 (in units of the noise): of the square of the ratio
        # that is (2 + 4 t s^2) / P.
        slack = 4 * math.sqrt((2 + 4 * steps * s**2) / P)
        assert abs(found.ratio**2 - (1 + steps * s**2)) <= slack
        assert abs(found.step_ratio**2 - (1 + s**2)) <= 4 * math.sqrt((2 + 4 * s**2) / P)
        assert found.noise_share == pytest.approx(found.ratio**-2)
        assert not found.is_pure_noise


def test_a_gradient_that_keeps_its_direction_grows_beyond_noise_as_predicted():
    check_constant_signal()


def test_the_walk_is_the_same_on_1_and_2_workers():
    alone, *others = (on_workers(world_size, numbers_of, 0.3) for world_size in (1, 2))
    assert all(numbers == alone[0] for ranks in others for numbers in ranks)


def test_the_verdict_is_said_in_words():
    noise = walk_of(SoloCollective(), steps=4, signal_norm=0.0).signal().in_words()
    assert re.match(
        r"After 4 steps the summed gradients are (1|1\.0\d|0\.9\d\d) times as long as noise alone would "
        r"make them \(1 ± 0\.005\)", noise
    )  # fmt: skip
    assert noise.endswith("cannot be told from pure noise.")
    clear = walk_of(SoloCollective(), steps=4, signal_norm=1.0).signal().in_words()
    assert "2.24 times as long as noise alone" in clear  # sqrt(1 + 4)
    assert "noise explains 20% of their squared length" in clear


def test_a_walk_goes_on_after_a_restart_as_if_unbroken():
    generator = torch.Generator().manual_seed(2)
    steps = [torch.randn(100, generator=generator, dtype=torch.float64) for _ in range(9)]
    whole, first = RandomWalk(100, step_std=1.0), RandomWalk(100, step_std=1.0)
    for index, mean_P in enumerate(steps):
        whole.add(mean_P)
        if index < 5:
            first.add(mean_P)
    resumed = RandomWalk(100, step_std=1.0)
    resumed.load(first.state())
    for mean_P in steps[5:]:
        resumed.add(mean_P)
    assert [resumed.signal(n) for n in range(1, 10)] == [whole.signal(n) for n in range(1, 10)]
    assert torch.equal(resumed.state()["sum"], whole.state()["sum"])


def test_a_walk_of_another_model_or_without_noise_is_refused():
    with pytest.raises(PrivacyError, match="saved walk of 100"):
        RandomWalk(99, step_std=1.0).load(RandomWalk(100, step_std=1.0).state())
    with pytest.raises(PrivacyError, match="positive"):
        RandomWalk(99, step_std=0.0)


# --- planted bugs ---------------------------------------------------------------------------------


def _noise_alone(change: Any) -> Any:
    original = RandomWalk.signal

    def bug(self: RandomWalk, steps: int | None = None) -> signal.Signal:
        found = original(self, steps)
        return replace(found, noise_alone=change(found))

    return mock.patch.object(RandomWalk, "signal", bug)


def _only_the_last_step() -> Any:
    original = RandomWalk.add

    def bug(self: RandomWalk, mean_P: torch.Tensor) -> None:
        self._sum_P = torch.zeros_like(self._sum_P)
        original(self, mean_P)

    return mock.patch.object(RandomWalk, "add", bug)


PLANTED = {
    "noise grows like the steps": lambda: _noise_alone(lambda s: s.noise_alone * s.steps**0.5),
    "sigma squared": lambda: _noise_alone(lambda s: s.noise_alone * SIGMA),
    "a tenth of the parameters forgotten": lambda: _noise_alone(lambda s: s.noise_alone * 0.9**0.5),
    "only the last step": _only_the_last_step,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name):
    with PLANTED[name](), pytest.raises(AssertionError):
        check_pure_noise()
        check_constant_signal()
