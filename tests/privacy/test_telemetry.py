"""Loss, count and clip flag inside the noisy sum: joint sensitivity, error bars, planted bugs.

Shapes: B records, P parameters; 3 = loss, count, clip flag.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpldm_dist.config import PrivacyConfig
from dpldm_dist.errors import PrivacyError
from dpldm_dist.privacy import optimizer, telemetry
from dpldm_dist.privacy.gradients import PerRecordGradients, accumulation_error
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisySum
from dpldm_dist.privacy.plan import ContributionBound, PrivacyPlan, contribution_bound, make_plan
from dpldm_dist.privacy.telemetry import LOSS_BOUND, WEIGHTS, TelemetryHistory, TelemetryQuery
from tests.processes import on_workers

P = 40


def plan_with(share: float = 0.01, **changes) -> PrivacyPlan:
    numbers = {
        "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.75, "records": 4000, "batch": 1000,
        "steps": 40, "noise_multiplier": 3.0, "lanes": 1, "microbatch": 16,
    }  # fmt: skip
    return make_plan(telemetry_share=share, **{**numbers, **changes})


def bound_of(plan: PrivacyPlan) -> ContributionBound:
    error = accumulation_error(records=plan.microbatch, clip_norm=plan.clip_norm)
    return contribution_bound(plan, parameters=P, accumulation_error=error)


def query_of(plan: PrivacyPlan, **more) -> TelemetryQuery:
    query = TelemetryQuery.of(plan, bound_of(plan), **more)
    assert query is not None
    return query


# --- sensitivity ----------------------------------------------------------------------------------


class Raw(nn.Module):
    """Losses and gradients that a test sets itself: one draw's loss is its input times the weight
    (a number that is given) plus an offset that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(P, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def losses(self, gradient_RP: Tensor, loss_R: Tensor) -> Callable[[], Tensor]:
        return lambda: self.layer(gradient_RP)[:, 0] + loss_R


def ordinary(count: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Gradients and losses of records of which some are clipped."""
    generator = torch.Generator().manual_seed(seed)
    gradient_BP = torch.randn(count, P, generator=generator) / math.sqrt(P)
    scale_B1 = torch.rand(count, 1, generator=generator) * 2
    return gradient_BP * scale_B1, torch.rand(count, generator=generator) * 1.5


NAN, INF = float("nan"), float("inf")
RECORDS = {  # name: factor on a gradient of norm 1, loss
    "huge gradient, huge loss": (1e6, 1e20),
    "huge gradient, no loss": (1e6, 0.0),
    "ordinary": (0.7, 0.4),
    "tiny gradient, huge loss": (1e-9, 3e38),
    "negative loss": (1.0, -1e20),
    "NaN loss": (1.0, NAN),
    "infinite loss": (1.0, INF),
    "NaN gradient": (NAN, 1.0),
    "infinite gradient": (INF, 1.0),
}


def joint_sum(plan: PrivacyPlan, gradient_BP: Tensor, loss_B: Tensor, *, draws: int = 1) -> Tensor:
    """The engine's integer sum over microbatches of fixed size, int64 (P + 3,)."""
    model, bound = Raw(), bound_of(plan)
    engine = PerRecordGradients(
        model,
        dict(model.named_parameters()),
        clip_norm=bound.gradient,
        draws=draws,
        grid=plan.grid,
        telemetry=TelemetryQuery.of(plan, bound),
    )
    size = plan.microbatch
    for start in range(0, len(loss_B) // draws, size):
        rows = slice(start * draws, (start + size) * draws)
        short = size * draws - len(loss_B[rows])
        engine.add(
            model.losses(
                F.pad(gradient_BP[rows], (0, 0, 0, short)), F.pad(loss_B[rows], (0, short))
            ),
            torch.arange(size) + start < len(loss_B) // draws,
        )
    return engine.take_sum()


def check_sensitivity(share: float = 0.01) -> None:
    """Each hostile record in front of ordinary ones: all microbatches are packed anew."""
    plan, (gradient_BP, loss_B) = plan_with(share), ordinary(41)
    direction_1P = F.normalize(torch.ones(1, P))
    without = joint_sum(plan, gradient_BP, loss_B)
    moved = {}
    for name, (length, loss) in RECORDS.items():
        with_it = joint_sum(
            plan,
            torch.cat([length * direction_1P, gradient_BP]),
            torch.cat([torch.tensor([loss]), loss_B]),
        )
        moved[name] = float((with_it - without).double().norm()) * plan.grid
    assert max(moved.values()) <= plan.clip_norm, moved
    assert moved["huge gradient, huge loss"] > (1 - 1e-4) * plan.clip_norm  # and hardly less


@pytest.mark.parametrize("share", [0.0, 0.01, 0.02])
def test_adding_one_record_moves_gradient_and_telemetry_together_by_at_most_the_clip_norm(share):
    check_sensitivity(share)


def check_absence() -> None:
    """In its place, so that nothing is packed anew: a bad record adds zero to every coordinate."""
    plan, (gradient_BP, loss_B) = plan_with(), ordinary(16)
    absent_BP, absent_B = gradient_BP.clone(), loss_B.clone()
    # The last place of the only microbatch: without it the rest lies where it lay.
    without = joint_sum(plan, absent_BP[:15], absent_B[:15])
    for name in ("NaN loss", "infinite loss", "NaN gradient", "infinite gradient"):
        length, loss = RECORDS[name]
        gradient_BP[15], loss_B[15] = length / math.sqrt(P), loss
        assert torch.equal(joint_sum(plan, gradient_BP, loss_B), without), name


def test_a_record_that_is_not_finite_adds_exactly_zero_to_all_coordinates():
    check_absence()


def check_encoding() -> None:
    """Integers of any loss and flag stay within the norm, to the last unit."""
    generator = torch.Generator().manual_seed(0)
    loss_B = torch.cat(
        [
            torch.rand(2000, generator=generator, dtype=torch.float64) * 2 * LOSS_BOUND,
            torch.tensor([0.0, LOSS_BOUND, 1e300, -1e300, LOSS_BOUND * (1 + 2**-52)]).double(),
        ]
    )
    factor_B = torch.where(torch.arange(len(loss_B)) % 2 == 0, 1.0, 0.5).double()
    for norm in (0.05 + 0.1 * torch.rand(20, generator=generator, dtype=torch.float64)).tolist():
        query = replace(query_of(plan_with()), norm=norm)
        code_B3 = query.encode(loss_B, factor_B)
        assert code_B3.dtype == torch.int64
        square_B = code_B3.double().square().sum(1)  # rounding: 2^-52 of it
        limit = (query.norm / query.grid) ** 2
        assert float(square_B.max()) <= limit * (1 - 2.0**-42)
        assert float(square_B.max()) >= limit * (1 - 2.0**-20)


def test_the_integers_of_a_record_never_exceed_their_norm():
    check_encoding()


def test_weights_fill_the_norm():
    assert sum(weight**2 for weight in WEIGHTS) == pytest.approx(1.0, abs=1e-15)


def test_the_bounds_of_gradient_and_telemetry_add_up_to_what_rounding_leaves_of_the_clip_norm():
    plan = plan_with(0.02)
    bound, alone = bound_of(plan), bound_of(plan_with(0.0))
    assert math.hypot(bound.gradient, bound.telemetry) == pytest.approx(alone.gradient, rel=1e-6)
    assert alone.gradient < plan.clip_norm and alone.telemetry == 0.0
    assert bound.telemetry**2 / (bound.gradient**2 + bound.telemetry**2) == pytest.approx(0.02)


def test_telemetry_costs_at_most_one_percent_more_noise_by_default():
    """Gradients shrink by sqrt(1 - s) under the same noise; the accounting is the same."""
    share = PrivacyConfig.model_fields["telemetry_share"].default
    plan, without = plan_with(share), plan_with(0.0)
    assert 0 < bound_of(without).gradient / bound_of(plan).gradient - 1 <= 0.01
    assert plan.step_event == without.step_event


def test_telemetry_changes_no_bit_of_the_gradients_beyond_the_clip_norm():
    gradient_BP, loss_B = ordinary(16)
    small_BP = 0.1 * gradient_BP  # nothing is clipped
    with_it = joint_sum(plan_with(), small_BP, loss_B)
    without = joint_sum(plan_with(0.0), small_BP, loss_B)
    assert len(with_it) == P + 3 and torch.equal(with_it[:P], without)


def test_a_share_beyond_what_is_allowed_is_refused():
    for share in (-0.01, 0.021, NAN):
        with pytest.raises(PrivacyError, match="telemetry_share"):
            plan_with(share)


# --- what a record says ---------------------------------------------------------------------------


def check_values() -> None:
    """Without noise: the mean loss of records, clipped one by one; padding counts nothing."""
    plan = plan_with(batch=50)
    query = query_of(plan, unsafe_no_noise=True)
    gradient_BP, loss_B = ordinary(41)
    loss_B[3], loss_B[4] = 50.0, 0.0
    norm_B = gradient_BP.double().norm(dim=1)
    history = TelemetryHistory(query)
    history.add(joint_sum(plan, gradient_BP, loss_B)[P:])
    said = history.over(1)
    # 2^-20: the margin and the rounding towards zero.
    assert said.records.value == pytest.approx(41, rel=2**-20)
    wanted = float(loss_B.double().clamp(0, LOSS_BOUND).mean())
    assert said.loss.value == pytest.approx(wanted, abs=2**-18)
    clipped = float((norm_B > bound_of(plan).gradient).double().mean())
    assert 0 < clipped < 1
    assert said.clip_fraction.value == pytest.approx(clipped, abs=2**-18)


def test_the_numbers_are_the_records_clipped_mean_loss_their_count_and_their_clipped_share():
    check_values()


def test_draws_of_a_record_are_averaged_before_the_loss_is_clipped():
    plan = plan_with()
    query = query_of(plan, unsafe_no_noise=True)
    gradient_RP, _ = ordinary(4)
    found = joint_sum(plan, gradient_RP, torch.tensor([0.0, 3.0, 1.0, 1.0]), draws=2)[P:]
    loss, count, _ = query.read(found)
    assert count == pytest.approx(2, rel=2**-20)
    assert LOSS_BOUND / 2 * (1 + loss / count) == pytest.approx((1.5 + 1.0) / 2, abs=2**-18)


# --- error bars, on real workers ------------------------------------------------------------------

STEPS, RECORDS_IN_ALL, KEY = 100, 4000, bytes(range(32))


def release_steps(
    collective: Any, bug: str | None = None
) -> tuple[list[Any], list[Any], list[Any]]:
    """Telemetry of 100 noisy steps over 4,000 known records, drawn with public coins: what each
    step said and the noisy sums; the truth of each step, (STEPS, 3)."""
    plan = plan_with()
    query = query_of(plan)
    generator = torch.Generator().manual_seed(7)
    loss_N = 0.3 * torch.rand(RECORDS_IN_ALL, generator=generator, dtype=torch.float64)
    factor_N = (torch.rand(RECORDS_IN_ALL, generator=generator) + 0.3).clamp(max=1.0).double()
    mine_N = torch.arange(RECORDS_IN_ALL) % collective.world_size == collective.rank
    parameter = nn.Parameter(torch.zeros(P))
    private = DistributedDPOptimizer(
        torch.optim.SGD([parameter], lr=0.0),
        [parameter],
        NoisySum(
            KEY,
            std=plan.noise_multiplier * plan.clip_norm / plan.grid,
            mechanism=plan.digest(),
            collective=collective,
            bind=lambda purpose, step, digest: None,
        ),
        grid=plan.grid,
        clip_norm=plan.clip_norm,
        divisor=plan.divisor,
        extra=3,
    )
    history, said, truth = TelemetryHistory(query), [], []
    with PLANTED[bug]() if bug else nullcontext():
        for step in range(STEPS):
            drawn_N = torch.rand(RECORDS_IN_ALL, generator=generator) < plan.sample_rate
            factor_B = torch.where(drawn_N & mine_N, factor_N, 0.0)
            tail_3 = query.encode(loss_N, factor_B).sum(0)
            noisy = private.step(torch.cat([torch.zeros(P, dtype=torch.int64), tail_3]), step)
            history.add(noisy.extra)
            said.append(history.over(1))
            clipped = (factor_N[drawn_N] < 1).double().mean()
            truth.append([float(loss_N[drawn_N].mean()), float(drawn_N.sum()), float(clipped)])
    return said, history.state().tolist(), truth  # plain numbers: they outlive the process


@pytest.fixture(scope="module")
def released() -> dict[int, list[Any]]:
    """What each rank of 1, 2 and 3 workers got."""
    return {world_size: on_workers(world_size, release_steps) for world_size in (1, 2, 3)}


def check_error_bars(said: list[Any], truth_S3: list[list[float]]) -> None:
    """No bias, and errors as large as was stated before the run: no more, and not much less."""
    errors, truth = query_of(plan_with()).errors, torch.tensor(truth_S3)
    for place, name in enumerate(("loss", "records", "clip_fraction")):
        stated = getattr(errors, name)
        values = torch.tensor([getattr(telemetry, name).value for telemetry in said])
        off = values - truth[:, place]
        assert abs(float(off.mean())) <= 4 * stated / math.sqrt(STEPS), name
        measured = float(off.square().mean().sqrt())
        slack = 4 / math.sqrt(2 * STEPS)  # 4 standard errors of a standard deviation
        # The stated error of ratios is a bound that is reached when all losses are 0 or L.
        least = 0.75 if name != "records" else 1.0
        assert least * (1 - slack) * stated <= measured <= (1 + slack) * stated, name
        edges = [getattr(telemetry, name) for telemetry in said]
        inside = sum(
            e.low <= t <= e.high for e, t in zip(edges, truth[:, place].tolist(), strict=True)
        )
        # 95.4 % by two standard errors of a normal law, less 4 standard errors of the share
        assert inside / STEPS >= 0.9545 - 4 * math.sqrt(0.9545 * 0.0455 / STEPS), name


def test_the_released_loss_count_and_clip_fraction_have_no_bias_and_the_stated_errors(released):
    said, _, truth = released[2][0]
    check_error_bars(said, truth)


def test_1_2_and_3_workers_release_the_same_telemetry_bit_for_bit(released):
    said_alone, sums_alone, _ = released[1][0]
    for said, sums, _ in released[2] + released[3]:
        assert sums == sums_alone and said == said_alone


def test_a_mean_over_steps_is_more_certain_by_the_root_of_their_number(released):
    said, sums, truth_S3 = released[1][0]
    truth = torch.tensor(truth_S3)
    history = loaded(query_of(plan_with()), sums)
    mean = history.over(STEPS)
    for name in ("loss", "records", "clip_fraction"):
        width = getattr(mean, name).high - getattr(mean, name).low
        of_one_step = 4 * getattr(history.query.errors, name)
        assert width == pytest.approx(of_one_step / math.sqrt(STEPS), rel=1e-9)
    # 4 standard errors: half of the band, twice. The records of a step differ by their coins, too.
    assert abs(mean.loss.value - float(truth[:, 0].mean())) <= mean.loss.high - mean.loss.low
    records = float(truth[:, 1].mean())
    assert abs(mean.records.value - records) <= mean.records.high - mean.records.low
    assert history.over(STEPS, steps=3) == history.over(3, steps=3) and history.over(1) == said[-1]


def test_a_generously_declared_n_biases_the_loss_only_at_first(released):
    """10 % more declared than there are: after the window the count is known better than that."""
    plan = plan_with()
    query = query_of(plan)
    declared = replace(query, expected_records=1.1 * query.expected_records)
    _, sums, truth_S3 = released[1][0]
    truth = torch.tensor(truth_S3)
    history = loaded(declared, sums)
    mean = history.over(STEPS)
    assert abs(mean.loss.value - float(truth[:, 0].mean())) <= mean.loss.high - mean.loss.low
    first = history.over(1, steps=1)
    assert (
        first.records.value == TelemetryHistory.over(loaded(query, sums), 1, steps=1).records.value
    )


def loaded(query: TelemetryQuery, sums: list[Any]) -> TelemetryHistory:
    history = TelemetryHistory(query)
    history.load(torch.tensor(sums, dtype=torch.float64).reshape(-1, 3))
    return history


def test_ratios_stay_within_their_public_ranges_also_when_noise_is_hopeless():
    query = replace(query_of(plan_with()), noise_std=1e6)
    generator = torch.Generator().manual_seed(1)
    history = TelemetryHistory(query)
    for _ in range(100):
        history.add((torch.randn(3, generator=generator) * 1e6 / query.grid).to(torch.int64))
        said = history.over(1)
        assert 0 <= said.loss.low <= said.loss.value <= said.loss.high <= LOSS_BOUND
        assert 0 <= said.clip_fraction.low <= said.clip_fraction.high <= 1
        assert 0 <= said.records.low <= said.records.high


def test_a_history_goes_on_after_a_restart_as_if_unbroken():
    query, numbers = query_of(plan_with()), torch.arange(30, dtype=torch.int64).view(10, 3) * 10**9
    whole, first = TelemetryHistory(query), TelemetryHistory(query)
    for step, noisy_3 in enumerate(numbers):
        whole.add(noisy_3)
        if step < 6:
            first.add(noisy_3)
    resumed = TelemetryHistory(query)
    resumed.load(first.state())
    for noisy_3 in numbers[6:]:
        resumed.add(noisy_3)
    assert torch.equal(resumed.state(), whole.state()) and resumed.over(5) == whole.over(5)
    assert TelemetryHistory(query).state().shape == (0, 3)


def test_a_sum_of_another_length_is_refused():
    with pytest.raises(PrivacyError, match="last 3"):
        query_of(plan_with()).read(torch.zeros(4, dtype=torch.int64))
    parameter = nn.Parameter(torch.zeros(P))
    private = DistributedDPOptimizer(
        torch.optim.SGD([parameter], lr=0.0), [parameter], mock.Mock(), grid=1.0, clip_norm=1.0,
        divisor=1.0, extra=3,
    )  # fmt: skip
    with pytest.raises(PrivacyError, match=f"expected {P + 3}"):
        private.step(torch.zeros(P, dtype=torch.int64), 0)


# --- planted bugs ---------------------------------------------------------------------------------


def _bound_with(**wrong: float) -> Any:
    original = contribution_bound

    def bug(plan: PrivacyPlan, **rest: Any) -> ContributionBound:
        return replace(original(plan, **rest), **wrong)

    return mock.patch(f"{__name__}.contribution_bound", bug)


def _encoding(bug: Callable[..., Tensor]) -> Any:
    original = TelemetryQuery.encode
    return mock.patch.object(
        TelemetryQuery,
        "encode",
        lambda self, loss_B, factor_B: bug(original, self, loss_B, factor_B),
    )


def _every_record_counts(original, self, loss_B, factor_B):
    return original(self, loss_B.nan_to_num(), torch.ones_like(factor_B))


def _rounded_to_nearest(original, self, loss_B, factor_B):
    fine = replace(self, grid=self.grid / 2**16)
    return (original(fine, loss_B, factor_B).double() / 2**16).round().to(torch.int64)


def _infinite_losses_count() -> Any:
    return mock.patch.object(Tensor, "isfinite", lambda self: torch.ones_like(self, dtype=bool))


def _no_noise_behind_the_gradients() -> Any:
    original = optimizer.integer_noise

    def bug(key: bytes, start: int, stop: int, *, std: float) -> Tensor:
        noise = original(key, start, stop, std=std)
        return torch.where(torch.arange(start, stop) < P, noise, 0)

    return mock.patch.object(optimizer, "integer_noise", bug)


def _noise_of_the_share_only() -> Any:
    original = optimizer.integer_noise

    def bug(key: bytes, start: int, stop: int, *, std: float) -> Tensor:
        noise = original(key, start, stop, std=std)
        return torch.where(torch.arange(start, stop) < P, noise, noise // 10)

    return mock.patch.object(optimizer, "integer_noise", bug)


PLANTED: dict[str, Callable[[], Any]] = {
    "gradient clipped to the whole clip norm": lambda: _bound_with(gradient=0.75),
    "telemetry beside the clip norm": lambda: _bound_with(telemetry=0.75),
    "loss not clipped": lambda: mock.patch.object(
        telemetry, "centred", lambda loss_B: loss_B * (2.0 / LOSS_BOUND) - 1.0
    ),
    "a NaN record counts": lambda: _encoding(_every_record_counts),
    "a record of infinite loss counts": _infinite_losses_count,
    "rounded to nearest": lambda: _encoding(_rounded_to_nearest),
    "loss not averaged over records": lambda: _encoding(
        lambda original, self, loss_B, factor_B: original(self, 2 * loss_B, factor_B)
    ),
    "clip flag turned round": lambda: _encoding(
        lambda original, self, loss_B, factor_B: original(
            self, loss_B, torch.where(factor_B == 0, 0.0, 1.5 - factor_B)
        )
    ),
    "no noise behind the gradients": _no_noise_behind_the_gradients,
    "noise of the share only": _noise_of_the_share_only,
}
CAUGHT_BY: dict[str, Callable[[], None]] = {
    "gradient clipped to the whole clip norm": check_sensitivity,
    "telemetry beside the clip norm": check_sensitivity,
    "loss not clipped": check_sensitivity,
    "a NaN record counts": check_absence,
    "a record of infinite loss counts": check_absence,
    "rounded to nearest": check_encoding,
    "loss not averaged over records": check_values,
    "clip flag turned round": check_values,
}


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_a_planted_bug_is_caught(name):
    CAUGHT_BY[name]()  # passes on the code as it is
    with PLANTED[name](), pytest.raises(AssertionError):
        CAUGHT_BY[name]()


@pytest.mark.parametrize("name", sorted(PLANTED.keys() - CAUGHT_BY.keys()))
def test_a_planted_bug_in_the_noise_is_caught(name):
    said, _, truth = on_workers(1, release_steps, name)[0]
    with pytest.raises(AssertionError):
        check_error_bars(said, truth)
