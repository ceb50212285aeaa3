"""What happens before the first noisy step: plan, model, released statistics, warm-up."""

from __future__ import annotations

import math
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_dist import __version__
from dpldm_dist.config import Config
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.errors import ConfigError, DataError, PrivacyError, RunError
from dpldm_dist.models.conditioning import ClassEmbedder, private_rows
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.directory import LoadedModel, load_unet
from dpldm_dist.models.latent_gaussian import LatentGaussian
from dpldm_dist.models.trainable import select_trainable, verify_all_learn
from dpldm_dist.models.unet import unet_layers
from dpldm_dist.models.warmup import balanced_grad_scale, fit_to_gaussian
from dpldm_dist.privacy import native, statistics
from dpldm_dist.privacy.blocks import BLOCK
from dpldm_dist.privacy.dataset_ledger import Reservation
from dpldm_dist.privacy.ledger import Attempt, SharedLedger
from dpldm_dist.privacy.optimizer import NoisySum
from dpldm_dist.privacy.plan import PrivacyPlan
from dpldm_dist.privacy.randomness import commitment, derive_key
from dpldm_dist.privacy.sampling import Lanes
from dpldm_dist.privacy.statistics import LatentStatistics
from dpldm_dist.runtime.rundir import RunDir, fsync_file, fsync_folder
from dpldm_dist.runtime.strategy import checkpoint_activations
from dpldm_dist.runtime.strategy_fsdp import shard_frozen, shards_frozen, whole_weights
from dpldm_dist.runtime.tracking import Progress
from dpldm_dist.runtime.worker import Worker, arithmetic
from dpldm_dist.stages.mechanism import reservation_of
from dpldm_dist.stages.places import is_finished, place_of

_ARITHMETIC = 3
"""To be raised with every change that moves bits of a sum."""


def declared_records(config: Config, latents: LatentShards) -> int:
    """N that is declared to the public.

    Raises: ConfigError if fewer are declared than there are; PrivacyError for duplicate images.
    """
    found = sum(latents.shard_records)
    declared = config.privacy.records if config.privacy.records is not None else found
    if declared < found:
        raise ConfigError(
            f"privacy.records = {declared} is less than the private records that were found: "
            "expected at least as many. Raise it."
        )
    if latents.manifest.facts.get("duplicates") and not config.privacy.allow_duplicates:
        raise PrivacyError(
            "The private data holds images of equal content in different records, so a guarantee "
            "per record is not one per image. Remove them, group them by a unit column, or set "
            "privacy.allow_duplicates=true."
        )
    return declared


def has_claim(config: Config) -> bool:
    """Whether the run may state an epsilon."""
    return not unsafe_switches(config)


def unsafe_switches(config: Config) -> list[str]:
    """The settings that void the claim, by name: what a report says in place of an epsilon."""
    names = [name for name in type(config.run).model_fields if name.startswith("unsafe_")]
    return [f"run.{name}" for name in names if getattr(config.run, name) not in (None, False)]


def genesis(
    config: Config, plan: PrivacyPlan, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """What a ledger is opened for; it is refused for another value of any field."""
    facts = plan.facts()
    facts.pop("microbatch")  # belongs to an attempt: another one needs other coins, no other budget
    return {
        **facts,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "claim": has_claim(config),
    }


def reservation(config: Config, plan: PrivacyPlan) -> Reservation | None:
    """The run's part of the budget that all runs on the private images share, if they have one.

    A run without a claim has no part: what it makes may not leave ``private/``.
    """
    return reservation_of(config, plan) if has_claim(config) else None


def lineage(
    plan: PrivacyPlan, run_key: bytes, latents: LatentShards, worker: Worker
) -> dict[str, str]:
    """What fixes every sum of an attempt: a start that differs in any of it opens a new one.

    ``data`` is a keyed commitment to the private latents, so that it tells nothing without the key.
    """
    return {
        "key": commitment(run_key, "key", b""),
        "data": commitment(run_key, "latents", latents.manifest.digest.encode()),
        "layout": f"{plan.lanes} lanes of balanced size, microbatches of {plan.microbatch}, "
        f"blocks of {BLOCK}",
        "arithmetic": f"{arithmetic(worker.device)}, {native.name()}",
        "threads": str(torch.get_num_threads()),
        "code": f"{__version__}, arithmetic {_ARITHMETIC}",
    }


def keep_threads(config: Config, ledger: SharedLedger) -> None:
    """Work with as many threads as the last attempt did, whatever the number of workers is now,
    unless ``run.threads`` says otherwise: their number changes the bits of a sum."""
    threads = ledger.lineage.get("threads")
    if threads is not None and config.run.threads is None:
        torch.set_num_threads(int(threads))


def attempt_key(config: Config, run_key: bytes, attempt: Attempt) -> bytes:
    """The key of coins, draws and noise of an attempt.

    Formal guarantees: two attempts share nothing, also not those that two copies of a run directory
    open with equal numbers, because each draws a nonce of its own.
    """
    tests_compare_runs = config.run.unsafe_test_key is not None  # no claim
    nonce = b"" if tests_compare_runs else attempt.nonce
    return derive_key(run_key, f"attempt {nonce.hex()}", attempt.number)


def refuse_unsafe_place(config: Config, run: RunDir) -> None:
    """A run without noise must lie in a folder that nobody else can read, and that says so.

    Raises: PrivacyError.
    """
    if not config.run.unsafe_no_noise:
        return
    closed = [p for p in run.root.resolve().parents if p.name == "private" and p.is_dir()]
    if not any(stat.S_IMODE(p.stat().st_mode) & 0o077 == 0 for p in closed):
        raise PrivacyError(
            f"run.unsafe_no_noise trains without privacy, so run.dir = {run.root} must lie below a "
            "folder named private with mode 0700: set it to RUN/private/without-noise."
        )


def refuse_lost_ledger(run: RunDir) -> None:
    """Releases without a ledger are not counted. Raises: RunError."""
    if not run.ledger.exists() and (
        run.gaussian.exists() or (run.tensorboard / "finetune").exists()
    ):
        raise RunError(
            f"{run.release} holds releases of a ledger that is gone: expected {run.ledger}. "
            "Restore it, or use a new run.dir."
        )


def refuse_different_workers(plan: PrivacyPlan, latents: LatentShards, worker: Worker) -> None:
    """All workers must see one plan and one data set, or a record could count twice.

    Raises: DataError.
    """
    mine = [plan.digest(), latents.manifest.digest]
    if worker.most(int(worker.collective.broadcast_json(mine) != mine)):
        raise DataError(
            "The workers see different private shards or plans: expected one shared folder. Put "
            "the latents on storage that all machines share."
        )


def steps_left(plan: PrivacyPlan, ledger: SharedLedger, *, since: int) -> int:
    """How many steps may run from ``since`` on: those of this attempt that are paid for already,
    then what the budget pays for, and what ``overflow_delta`` covers."""
    charged = sum(e.count for e in ledger.events() if e.sample_rate == plan.sample_rate)
    paid = ledger.paid_steps(since)
    wanted = max(0, min(plan.steps - since - paid, plan.most_charges - charged))
    return paid + ledger.affordable_steps(plan.step_event, most=wanted)


def public_model_dir(config: Config, run: RunDir) -> Path:
    """Where the public model lies: in this run, or where ``model.init`` says."""
    if (run.public_model / "model_index.json").is_file() or config.model.init is None:
        return run.public_model
    return config.model.init.expanduser().absolute()


def trainable_model(
    config: Config, public: LoadedModel, latents: LatentShards, worker: Worker
) -> tuple[Denoiser, dict[str, nn.Parameter]]:
    """The public UNet with a table of rows for exactly the private classes, and what will train.

    With ``run.strategy = "fsdp"`` the frozen weights of the UNet are divided over the workers.
    Raises: DataError if model and latents do not belong together; PrivacyError if a parameter
    could not learn.
    """
    channels = latents.latent_shape[0]
    if channels != public.unet.config.in_channels:
        raise DataError(
            f"The private latents have {channels} channels, the public model takes "
            f"{public.unet.config.in_channels}: encode with the autoencoder of {public.folder}."
        )
    denoiser, parameters = _public_start(config, public, latents)
    learning = parameters.values()
    divided = shards_frozen(config.run, worker)  # then the frozen ones go there layer by layer
    moved = [*learning, *_tensors(denoiser.embedder)] if divided else _tensors(denoiser)
    for tensor in moved:
        # A copy on a CPU, too: products have other bits where weights lie across lines of the
        # cache, as those of a mapped file do.
        tensor.data = tensor.data.to(worker.device, copy=True)
    layers = unet_layers(denoiser.unet)
    shard_frozen(denoiser.unet, layers, learning, run=config.run, worker=worker)
    checkpoint_activations(denoiser.unet, run=config.run)
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(16, *latents.latent_shape, generator=generator)
    condition: Tensor = torch.arange(16) % max(1, len(latents.classes))
    if latents.context_shape is not None:
        condition = torch.randn(16, *latents.context_shape, generator=generator)
    verify_all_learn(
        denoiser,
        public.diffusion,
        latents_BCHW=example.to(worker.device),
        condition=condition.to(worker.device),
    )
    return denoiser, parameters


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _public_start(
    config: Config, public: LoadedModel, latents: LatentShards
) -> tuple[Denoiser, dict[str, nn.Parameter]]:
    rows_NTD = private_rows(public.rows_NTD, classes=len(latents.classes), kind=public.kind)
    denoiser = Denoiser(public.unet, ClassEmbedder(rows_NTD, kind=public.kind))
    parameters = select_trainable(
        denoiser,
        trainable=config.finetune.trainable,
        first_block=config.finetune.first_block,
        lora_rank=config.finetune.lora_rank,
    )
    return denoiser, parameters


@torch.no_grad()
def whole_unet(
    config: Config, public: LoadedModel, denoiser: Denoiser, latents: LatentShards, worker: Worker
) -> nn.Module:
    """The UNet of ``denoiser`` as it is now, on the CPU, whole on worker 0. All workers take part.

    Divided weights are gathered one by one into a UNet that worker 0 reads from the public model.
    """
    if not shards_frozen(config.run, worker):
        return denoiser.unet.cpu()
    unet = denoiser.unet
    if worker.rank == 0:
        again = replace(public, unet=load_unet(public.folder / "unet"))
        unet = _public_start(config, again, latents)[0].unet
    places = dict(unet.named_parameters())
    for name, value in whole_weights(denoiser.unet):
        if worker.rank == 0:
            places[name].copy_(value)
    return unet


def release_statistics(
    config: Config,
    plan: PrivacyPlan,
    key: bytes,
    latents: LatentShards,
    ledger: SharedLedger,
    run: RunDir,
    worker: Worker,
) -> LatentGaussian | None:
    """Class means and covariance of all private latents: one charge, one noisy sum. Or nothing.

    What an earlier start released is used as it is.
    """
    if plan.statistics_noise is None:
        return None
    if not worker.collective.broadcast_json(run.gaussian.exists()):
        _release_statistics(config, plan, key, latents, ledger, run, worker)
        worker.collective.barrier()
    return LatentGaussian.load(run.gaussian, latents.latent_shape)


def _release_statistics(
    config: Config,
    plan: PrivacyPlan,
    key: bytes,
    latents: LatentShards,
    ledger: SharedLedger,
    run: RunDir,
    worker: Worker,
) -> None:
    wanted = LatentStatistics(
        classes=max(1, len(latents.classes)),
        dims=math.prod(latents.latent_shape),
        radius=_public_radius(config, latents),
    )
    for event in plan.statistics_events:
        ledger.charge(event, what="statistics")
    lanes = Lanes(
        latents.shard_records, lanes=plan.lanes, cap=plan.batch_cap, microbatch=plan.microbatch
    )
    total_L = torch.zeros(wanted.length, dtype=torch.int64)
    for shard in lanes.shards_of_worker(worker.rank, worker.world_size):
        records = latents.records(shard, np.arange(latents.shard_records[shard]))
        mean_BmD = torch.from_numpy(records.moments)[:, :, 0].chunk(2, dim=2)[0].flatten(2)
        total_L += wanted.record_sum(
            mean_BmD, torch.from_numpy(records.labels), torch.from_numpy(records.images)
        )
    noisy_sum = NoisySum(
        key,
        std=plan.statistics_noise * statistics.CLIP_NORM / statistics.GRID,
        mechanism=plan.digest(),
        collective=worker.collective,
        bind=ledger.bind,
        unsafe_no_noise=config.run.unsafe_no_noise,
    )
    noisy_L = noisy_sum.release_(total_L.to(worker.device), purpose="statistics", step=0).cpu()
    means_ND, covariance_DD = wanted.estimate(
        noisy_L, noise_multiplier=plan.statistics_noise, records=plan.records
    )
    if worker.rank == 0:
        part = run.gaussian.with_suffix(".part")
        LatentGaussian(means_ND, covariance_DD, latents.latent_shape).save(part)
        fsync_file(part)
        part.replace(run.gaussian)
        fsync_folder(run.release)


def prepare_model(
    config: Config,
    denoiser: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    public: LoadedModel,
    gaussian: LatentGaussian | None,
    progress: Progress,
    worker: Worker,
) -> None:
    """Warm up on draws from the released Gaussian, then set the embedder's share of the gradient.

    Post-processing of public data and of the released statistics: it costs no privacy.
    """
    settings = config.finetune
    if gaussian is not None and settings.warmup_steps and public.kind != "caption":
        progress.start("warm-up", settings.warmup_steps)
        fit_to_gaussian(
            denoiser,
            public.diffusion,
            gaussian,
            parameters,
            steps=settings.warmup_steps,
            batch=settings.warmup_batch,
            learning_rate=settings.warmup_learning_rate,
            label_dropout=settings.label_dropout,
            bias=settings.time_bias,
            spread=settings.time_spread,
            parts=config.privacy.lanes,
            my_parts=range(worker.rank, config.privacy.lanes, worker.world_size),
            passes=-(-config.privacy.lanes // worker.world_size)
            if shards_frozen(config.run, worker)
            else 0,
            sum_=worker.collective.sum_,
            tick=lambda step: progress.advance(step + 1),
        )
        denoiser.embedder.fold_()
        progress.done()
    denoiser.embedder.grad_scale = _grad_scale(
        config, denoiser, parameters, public, gaussian, worker
    )


def _public_radius(config: Config, latents: LatentShards) -> float:
    """Norm bound of a latent: what 95 % of the public ones keep, or sqrt(1.5 D) without them."""
    if not is_finished(config, "public", "latents"):
        return math.sqrt(1.5 * math.prod(latents.latent_shape))
    public = LatentShards(place_of(config, "public", "latents"))
    moments = public.records(0, np.arange(public.shard_records[0])).moments
    mean_BD = moments[:, 0, 0, : latents.latent_shape[0]].reshape(len(moments), -1)
    return float(np.quantile(np.linalg.norm(mean_BD, axis=1), 0.95))


def _grad_scale(
    config: Config,
    denoiser: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    public: LoadedModel,
    gaussian: LatentGaussian | None,
    worker: Worker,
) -> float:
    """The configured factor, or the one that balances gradients on made-up or released latents."""
    settings = config.finetune
    if settings.embedder_grad_scale != "auto":
        return settings.embedder_grad_scale
    if denoiser.embedder.kind != "class":
        return 1.0
    count, generator = 64, torch.Generator().manual_seed(1)
    labels_B = torch.arange(count) % denoiser.embedder.null_label
    if gaussian is not None:
        latents_BCHW = gaussian.sample(labels_B, generator)
    else:
        size = public.unet.config.sample_size
        shape = (count, public.unet.config.in_channels, size, size)
        latents_BCHW = torch.randn(shape, generator=generator)
    times_B = public.diffusion.times_from_uniform(
        torch.rand(count, generator=generator), bias=settings.time_bias, spread=settings.time_spread
    )
    scale = balanced_grad_scale(
        denoiser,
        public.diffusion,
        parameters,
        latents_BCHW=latents_BCHW.to(worker.device),
        labels_B=labels_B.to(worker.device),
        times_B=times_B.to(worker.device),
    )
    return float(worker.collective.broadcast_json(scale))
