"""What a run makes sure of before its first private step, on its own machines and backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from dpldm_dist.config import Config
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisyStep, NoisySum
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.privacy.randomness import new_key
from dpldm_dist.privacy.selfcheck import (
    measure_noise,
    measure_noise_by_descent,
    prove_ownership,
)
from dpldm_dist.privacy.validation import validate_model
from dpldm_dist.runtime.strategy import private_update
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.finetune.private_data import PrivateData
from dpldm_dist.stages.finetune.state import inner_optimizer


def check_start(
    config: Config,
    plan: PrivacyPlan,
    data: PrivateData,
    latents: LatentShards,
    denoiser: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    worker: Worker,
) -> None:
    """Records do not know of each other, each has one owner, and the noise arrives as promised.

    Raises: PrivacyError that says which of them fails.
    """
    throw_away = worker.collective.broadcast_bytes(new_key() if worker.rank == 0 else None)
    validate_model(
        denoiser,
        parameters.values(),
        data.made_up_losses(denoiser),
        records=plan.microbatch,
        draws=plan.draws,
    )
    prove_ownership(
        throw_away,
        data.owned(),
        latents.shard_records,
        collective=worker.collective,
        device=worker.device,
    )
    _measure_noise(config, plan, throw_away, parameters, worker)


def _measure_noise(
    config: Config,
    plan: PrivacyPlan,
    throw_away: bytes,
    parameters: Mapping[str, nn.Parameter],
    worker: Worker,
) -> None:
    """One step without records, through the run's own path, on copies of the parameters."""
    copies = {n: nn.Parameter(torch.zeros_like(p)) for n, p in parameters.items()}
    watched = config.run.strategy != "deepspeed"  # its engine shows nobody what it steps with
    make = partial(inner_optimizer, config.finetune) if watched else plain_descent
    update = private_update(copies, make, run=config.run, worker=worker)
    noisy_sum = NoisySum(
        throw_away,
        std=plan.noise_multiplier * plan.clip_norm / plan.grid,
        mechanism="a step without records",
        collective=worker.collective,
        bind=lambda purpose, step, digest: None,  # about no data: nothing to account for
        unsafe_no_noise=config.run.unsafe_no_noise,
    )
    optimizer = DistributedDPOptimizer(
        update,
        update.parameters,
        noisy_sum,
        grid=plan.grid,
        clip_norm=plan.clip_norm,
        divisor=plan.divisor,
        sharded=update.bounds is not None,
    )
    count = sum(p.numel() for p in copies.values())

    def take_step() -> NoisyStep:
        return optimizer.step(torch.zeros(count, dtype=torch.int64, device=worker.device), 0)

    expected = 0.0 if config.run.unsafe_no_noise else plan.noise_multiplier / plan.divisor
    if watched:
        measure_noise(
            take_step,
            update.optimizer,
            update.parameters,
            expected_std=expected,
            collective=worker.collective,
            bounds=update.bounds,
        )
        return
    measure_noise_by_descent(
        lambda: take_step().mean_P,
        update.parameters,
        expected_std=expected,
        collective=worker.collective,
    )


def plain_descent(learning: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Moves parameters by minus their gradient."""
    return torch.optim.SGD(learning, lr=1.0)
