"""What a run makes sure of before its first private step, on its own machines and backend."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dpldm_dist.config import Config
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.privacy.optimizer import DistributedDPOptimizer, NoisySum
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.privacy.randomness import new_key
from dpldm_dist.privacy.selfcheck import measure_noise, prove_ownership
from dpldm_dist.privacy.validation import validate_model
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
    copies = [nn.Parameter(torch.zeros_like(p)) for p in parameters.values()]
    inner = inner_optimizer(config.finetune, copies)
    noisy_sum = NoisySum(
        throw_away,
        std=plan.noise_multiplier * plan.clip_norm / plan.grid,
        mechanism="a step without records",
        collective=worker.collective,
        bind=lambda purpose, step, digest: None,  # about no data: nothing to account for
        unsafe_no_noise=config.run.unsafe_no_noise,
    )
    optimizer = DistributedDPOptimizer(
        inner,
        copies,
        noisy_sum,
        grid=plan.grid,
        clip_norm=plan.clip_norm,
        divisor=plan.divisor,
    )
    nothing_P = torch.zeros(sum(p.numel() for p in copies), dtype=torch.int64, device=worker.device)
    measure_noise(
        lambda: optimizer.step(nothing_P, 0),
        inner,
        copies,
        expected_std=0.0 if config.run.unsafe_no_noise else plan.noise_multiplier / plan.divisor,
        collective=worker.collective,
    )
