"""The walk of noisy gradients beside noise alone: on real releases, with exact error bars."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import signal
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisySum
from dpldm_dist.privacy.signal import RandomWalk
from dpldm_dist.runtime.collective import SoloCollective

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


def check_pure_noise() -> None:
    walk = walk_of(SoloCollective(), steps=9, signal_norm=0.0)
    assert walk.signal(1).alignment == 0.0
    for steps in range(1, 10):
        found = walk.signal(steps)
        assert found.error == pytest.approx(ERROR)
        assert abs(found.ratio - 1) <= 4 * ERROR and abs(found.step_ratio - 1) <= 4 * ERROR
        assert found.is_pure_noise and found.noise_share > 1 - 8 * ERROR
        assert abs(found.alignment) <= found.most_alignment <= 5


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
        assert found.is_pure_noise == (steps == 1)  # one step has none to agree with


def test_a_gradient_that_keeps_its_direction_grows_beyond_noise_as_predicted():
    check_constant_signal()


def random_walks(dims: int, *, walks: int, steps: int) -> list[RandomWalk]:
    """Walks of pure noise."""
    generator, found = torch.Generator().manual_seed(8), []
    for _ in range(walks):
        found.append(RandomWalk(dims, step_std=2.0))
        for _ in range(steps):
            found[-1].add(2.0 * torch.randn(dims, generator=generator, dtype=torch.float64))
    return found


@pytest.mark.parametrize("dims", [1, 3, 40])
def test_without_a_signal_the_alignment_is_exactly_standard_normal_for_any_dimension(dims):
    check_alignment_of_noise(dims)


def check_alignment_of_noise(dims: int) -> None:
    walks = random_walks(dims, walks=400, steps=12)
    for steps in (2, 12):
        law = kstest([walk.signal(steps).alignment for walk in walks], "norm")
        assert law.pvalue > 1e-4  # of the six tests here, one in 1,700 seeds would fail


def test_pure_noise_is_hardly_ever_called_a_signal_at_any_step():
    """100 walks of 200 steps: the chance that one of them passes 5 is 1 %; 4 is passed by some."""
    most = [walk.signal().most_alignment for walk in random_walks(3, walks=100, steps=200)]
    assert max(most) < 5 and max(most) > 2.5


def test_a_gradient_that_turns_round_is_seen_although_it_cancels_in_the_sum():
    check_turning_gradient()


def check_turning_gradient() -> None:
    generator = torch.Generator().manual_seed(4)
    direction_P = 0.12 * torch.ones(P, dtype=torch.float64)  # times the noise of a step
    walk = RandomWalk(P, step_std=1.0)
    for step in range(40):
        noise_P = torch.randn(P, generator=generator, dtype=torch.float64)
        walk.add(noise_P + (direction_P if step < 20 else -direction_P))
    found = walk.signal()
    assert abs(found.ratio - 1) < 4 * ERROR  # the sum does not show it
    # Each step adds about |g|^2 / (1 - d) / (u^2 sqrt(P / (1 - d^2))) = 3 * 0.12^2 sqrt(P) = 6.
    assert found.most_alignment > 5 and not found.is_pure_noise


def test_the_verdict_is_said_in_words():
    noise = walk_of(SoloCollective(), steps=4, signal_norm=0.0).signal().in_words()
    size = r"After 4 steps the summed gradients are [01]\.\d{4} times as long as noise alone would "
    assert re.match(size + r"make them \(1 ± 0\.0050\): noise explains", noise)
    assert noise.endswith("the training cannot be told from pure noise.")
    clear = walk_of(SoloCollective(), steps=4, signal_norm=1.0).signal().in_words()
    assert re.search(r"are 2\.2\d{3} times as long as noise alone", clear)  # sqrt(1 + 4)
    assert re.search(r"noise explains (19|20)\.\d% of their squared length", clear)
    assert clear.endswith("standard errors; noise alone stays below 5.")


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
        self._sum_Q = torch.zeros_like(self._sum_Q)
        original(self, mean_P)

    return mock.patch.object(RandomWalk, "add", bug)


def _direction_with_the_step_itself() -> Any:
    original = RandomWalk._next_alignment

    def bug(self: RandomWalk, mean_P: torch.Tensor) -> tuple[float, float]:
        self._before_Q = 0.8 * self._before_Q + mean_P.float()
        return original(self, mean_P)

    return mock.patch.object(RandomWalk, "_next_alignment", bug)


PLANTED = {
    "noise grows like the steps": lambda: _noise_alone(lambda s: s.noise_alone * s.steps**0.5),
    "sigma squared": lambda: _noise_alone(lambda s: s.noise_alone * SIGMA),
    "a tenth of the parameters forgotten": lambda: _noise_alone(lambda s: s.noise_alone * 0.9**0.5),
    "only the last step": _only_the_last_step,
    "a step is compared with itself": _direction_with_the_step_itself,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name):
    with PLANTED[name](), pytest.raises(AssertionError):
        check_pure_noise()
        check_constant_signal()
        check_alignment_of_noise(3)
        check_turning_gradient()
