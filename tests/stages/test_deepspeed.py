"""DeepSpeed beside the plain strategies, on real processes: parity, refusals, planted faults."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dpldm_dist.config import Config, parse_config
from dpldm_dist.errors import ConfigError, PrivacyError
from dpldm_dist.privacy.collective import Collective
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer
from dpldm_dist.privacy.selfcheck import measure_noise_by_descent
from dpldm_dist.runtime import strategy_deepspeed
from dpldm_dist.runtime.collective import SoloCollective
from dpldm_dist.runtime.launch import Job, launch
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.strategy import private_update
from dpldm_dist.runtime.worker import Worker, solo_worker
from dpldm_dist.stages.finetune import describe, finetune
from dpldm_dist.stages.finetune.selfchecks import plain_descent
from dpldm_dist.stages.finetune.state import TrainingState
from tests.privacy.mechanism_checks import CLIP_NORM, GRID, SIGMA, mechanism
from tests.processes import on_workers as on_processes
from tests.stages.tiny_run import (
    TEST_KEY,
    released_weights,
    run_alone,
    settings,
)

STEPS = 12
ROOT = Path(__file__).parents[2]


def private(
    root: Path, name: str, *, workers: int = 1, batch: int = 20, **deepspeed: Any
) -> Config:
    """Twelve noisy steps of a fixed key, with DeepSpeed if it gets settings of it."""
    run = {"dir": str(root / name), "workers": workers, "unsafe_test_key": TEST_KEY}
    if deepspeed:
        run |= {"strategy": "deepspeed", "deepspeed": deepspeed}
    return settings(
        root,
        name,
        finetune={"steps": STEPS, "batch": batch, "statistics_noise": None, "optimizer": "sgd"},
        privacy={"noise_multiplier": 2.0},
        run=run,
    )


def on_workers(*configs: Config) -> None:
    for config in configs:
        RunDir(config.run.dir).create()
    launch([Job(finetune, config) for config in configs], run=configs[0].run)


def farthest(root: Path, one: str, other: str) -> float:
    first, second = released_weights(root, one), released_weights(root, other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def alone(root):
    """What one process without DeepSpeed releases, by expected batch."""
    for batch in (20, 1):
        run_alone(private(root, f"alone-{batch}", batch=batch))


def agree(root: Path, alone: Any, workers: int, cases: list[tuple[int, int]]) -> None:
    """Runs of (ZeRO stage, expected batch) release what one plain process releases."""
    runs = [
        private(root, f"zero-{stage}-{batch}-{workers}", workers=workers, batch=batch,
                zero_stage=stage)
        for stage, batch in cases
    ]  # fmt: skip
    on_workers(*runs)
    for stage, batch in cases:
        assert farthest(root, f"alone-{batch}", f"zero-{stage}-{batch}-{workers}") < 1e-6


def test_private_training_on_two_workers_agrees_with_one_plain_process_within_1e_6(root, alone):
    """Twelve noisy steps. With an expected batch of 1, most workers draw nobody."""
    agree(root, alone, 2, [(2, 1)])


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_zero_stage_agrees_with_one_plain_process(root, alone, workers):
    agree(root, alone, workers, [(stage, batch) for stage in (0, 1, 2) for batch in (20, 1)])


def test_a_run_begun_with_deepspeed_goes_on_without_it_and_back(root):
    """Adam: its state goes through the checkpoint. The third start finds all steps done."""
    given = {"finetune": {"steps": 9, "statistics_noise": None}}
    unbroken = settings(root, "unbroken", run={"dir": str(root / "unbroken"),
                        "unsafe_test_key": TEST_KEY}, **given)  # fmt: skip
    run_alone(unbroken)
    for strategy, steps in (("deepspeed", 3), ("ddp", 3), ("deepspeed", 9)):
        run = {"dir": str(root / "changing"), "unsafe_test_key": TEST_KEY, "strategy": strategy}
        config = settings(root, "changing", run=run, **given)
        if steps == 9:
            run_alone(config)
        else:
            with _stopped_after(steps), pytest.raises(KeyboardInterrupt):
                run_alone(config)
    assert farthest(root, "unbroken", "changing") < 1e-6


def _stopped_after(steps: int) -> Any:
    """Ends a run once it made ``steps`` steps and saved."""
    save = TrainingState.save

    def stopping(self: TrainingState, checkpoints: Any) -> None:
        save(self, checkpoints)
        if self.step and self.step % steps == 0:
            raise KeyboardInterrupt

    return mock.patch.object(TrainingState, "save", stopping)


REFUSED = {
    "ZeRO-3": ({"zero_stage": 3}, "zero_stage = 3: private training clips"),
    "bfloat16": ({"bf16": True}, "proved for float32"),
    "loss scaling": ({"options": {"fp16": {"enabled": True}}}, "skips a step"),
    "clipping": ({"options": {"gradient_clipping": 1.0}}, "would lose its scale"),
    "accumulation": ({"options": {"gradient_accumulation_steps": 2}}, "divide it once more"),
    "another optimizer": ({"options": {"optimizer": {"type": "OneBitAdam"}}}, "the stage makes it"),
    "a mean": ({"options": {"gradient_allreduce_op": "mean"}}, "the stage sets it"),
    "compression": (
        {"options": {"zero_optimization": {"zero_quantized_gradients": True}}},
        "not the released one",
    ),
    "what nobody knows": ({"options": {"data_efficiency": {"enabled": True}}}, "not known"),
    "parameters off the device": ({"offload_parameters": True}, "only ZeRO-3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_change_a_finished_gradient_is_refused_before_anything_is_read(tmp_path, what):
    deepspeed, reason = REFUSED[what]
    config = private(tmp_path, "refused", **deepspeed)
    for stage in (describe, lambda config: finetune(config, solo_worker())):
        with pytest.raises(ConfigError, match=reason):
            stage(config)
    assert not list(tmp_path.iterdir())


def test_an_optimizer_that_compresses_is_refused():
    class OneBitAdam(torch.optim.SGD):
        pass

    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match="compresses"):
        strategy_deepspeed.refuse_compressing(OneBitAdam([parameter], lr=1.0))


# --- planted bugs ---------------------------------------------------------------------------------


def _told(**changes: Any) -> Any:
    """DeepSpeed is told something else than we mean."""
    original = strategy_deepspeed.engine_config
    return mock.patch.object(
        strategy_deepspeed, "engine_config", lambda *a, **k: original(*a, **k) | changes
    )


def _every_worker_gives() -> Any:
    original = strategy_deepspeed.ZeroUpdate.step

    def step(self: Any) -> None:
        self._gives = True
        original(self)

    return mock.patch.object(strategy_deepspeed.ZeroUpdate, "step", step)


def _a_slice_that_nobody_updates() -> Any:
    original = torch.optim.SGD.step

    def step(self: Any, closure: Any = None) -> Any:
        return original(self, closure) if torch.distributed.get_rank() == 0 else None

    return mock.patch.object(torch.optim.SGD, "step", step)


PLANTED = {
    "none": contextlib.nullcontext,
    "averaged once more": lambda: _told(gradient_allreduce_op="mean"),
    "DeepSpeed's own clipping": lambda: _told(gradient_clipping=1.0),
    "accumulated": lambda: _told(gradient_accumulation_steps=2, train_batch_size=4),
    "every worker gives": _every_worker_gives,
    "a slice that nobody updates": _a_slice_that_nobody_updates,
}


def trial(collective: Collective, bug: str) -> None:
    """The check of a start, on a vector of 20,000 numbers."""
    copies = {f"p{i}": torch.nn.Parameter(torch.zeros(100, 100)) for i in range(2)}
    run = parse_config({"run": {"strategy": "deepspeed"}}).run
    worker = Worker(collective.rank, collective.world_size, 0, torch.device("cpu"), collective)
    unchecked = mock.patch.object(strategy_deepspeed, "require_clip", lambda engine, clip: None)
    with PLANTED[bug](), unchecked:
        update = private_update(copies, plain_descent, run=run, worker=worker)
        optimizer = DistributedDPOptimizer(
            update,
            update.parameters,
            mechanism(collective),
            grid=GRID,
            clip_norm=CLIP_NORM,
            divisor=1.0,
        )
        measure_noise_by_descent(
            lambda: optimizer.step(torch.zeros(20_000, dtype=torch.int64), 0).mean_P,
            update.parameters,
            expected_std=SIGMA,
            collective=collective,
        )


def trials(collective: Collective) -> list[str]:
    said = []
    for bug in PLANTED:
        try:
            trial(collective, bug)
            said.append("")
        except PrivacyError as error:
            said.append(str(error))
    return said


def noisy_steps(collective: Collective, strategy: dict[str, Any]) -> torch.Tensor:
    """Parameters after twelve steps whose sums follow them: one wrong bit changes all noise.

    Records are held by worker 0 alone, so all others give empty sums.
    """
    parameters = {f"p{i}": torch.nn.Parameter(torch.full((41, 50 + i), 0.1)) for i in range(3)}
    run = parse_config({"run": strategy}).run
    worker = Worker(collective.rank, collective.world_size, 0, torch.device("cpu"), collective)
    update = private_update(parameters, partial(torch.optim.Adam, lr=0.01), run=run, worker=worker)
    optimizer = DistributedDPOptimizer(
        update,
        update.parameters,
        mechanism(collective),
        grid=GRID,
        clip_norm=CLIP_NORM,
        divisor=20.0,
    )
    for step in range(STEPS):
        flat_P = torch.cat([p.detach().flatten() for p in parameters.values()])
        sum_P = (torch.sin(7 * flat_P).double() / GRID / 100).to(torch.int64)
        optimizer.step(sum_P * (collective.rank == 0), step)
    return torch.cat([p.detach().flatten() for p in parameters.values()])


def all_noisy_steps(collective: Collective, stages: tuple[int, ...]) -> list[torch.Tensor]:
    strategies = [{"strategy": "deepspeed", "deepspeed": {"zero_stage": n}} for n in stages]
    return [noisy_steps(collective, strategy) for strategy in strategies]


def trials_and_noisy_steps(collective: Collective) -> tuple[list[str], list[torch.Tensor]]:
    return trials(collective), all_noisy_steps(collective, (0, 1, 2))


@pytest.fixture(scope="module")
def two_workers():
    """(what the checks of a start said of each planted bug, parameters of each ZeRO stage)."""
    return on_processes(2, trials_and_noisy_steps)


def test_every_planted_fault_of_the_engine_is_caught_before_a_step(two_workers):
    for said, _ in two_workers:
        for bug, text in zip(PLANTED, said, strict=True):
            assert ("noise that reaches the weights" in text) == (bug != "none"), (bug, text)


def test_twelve_noisy_steps_are_those_of_one_plain_process_within_1e_6(two_workers):
    plain_P = noisy_steps(SoloCollective(), {})
    one = all_noisy_steps(SoloCollective(), (1,))
    three = on_processes(3, all_noisy_steps, (2,))
    for found in [one, *(found for _, found in two_workers), *three]:
        assert all(float((other_P - plain_P).abs().max()) < 1e-6 for other_P in found)


def test_an_engine_that_clips_against_orders_is_an_error_of_ours():
    parameter = torch.nn.Parameter(torch.zeros(4))
    run = parse_config({"run": {"strategy": "deepspeed"}}).run
    with _told(gradient_clipping=1.0), pytest.raises(AssertionError, match="clips to 1"):
        private_update({"p": parameter}, plain_descent, run=run, worker=solo_worker())


def test_nothing_is_compiled_and_no_compiler_is_needed(tmp_path):
    """In a process whose PATH has no compiler, and whose folder of compiled code stays empty."""
    environment = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"),
                   "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}  # fmt: skip
    code = "import torch\nfrom tests.stages.test_deepspeed import update_once\nupdate_once()"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert not (tmp_path / "built").exists()


def update_once() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    run = parse_config({"run": {"strategy": "deepspeed"}}).run
    update = private_update({"p": parameter}, plain_descent, run=run, worker=solo_worker())
    update.parameters[0].grad = torch.ones(4)
    update.step()
    assert parameter.tolist() == [-1.0] * 4
