"""Public latents -> public model. No private data comes near.

Shapes: R rows of this worker, C, h, w of a latent, N rows of the class table, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpldm_dist.config import Config, ModelConfig
from dpldm_dist.data.latents import LatentShards
from dpldm_dist.data.manifest import (
    MANIFEST,
    Manifest,
    describe_files,
    finished_manifest,
    software,
)
from dpldm_dist.data.shards import ImageShards
from dpldm_dist.errors import ConfigError, DataError
from dpldm_dist.models.autoencoder import Autoencoder, latent_shape
from dpldm_dist.models.captions import CaptionEncoder
from dpldm_dist.models.conditioning import ClassEmbedder, Kind, random_rows
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.directory import LoadedModel, load_autoencoder, load_model, save_model
from dpldm_dist.models.trainable import freeze_idle
from dpldm_dist.models.unet import build_unet
from dpldm_dist.runtime.public_training import (
    PublicTraining,
    remove_checkpoints,
    shuffled,
    step_generator,
)
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.runtime.worker import Worker
from dpldm_dist.stages.places import is_finished, place_of, shown_place

WHAT = "public model"


def pretrain(config: Config, worker: Worker) -> Manifest:
    """The run's public model: trained on public latents, or taken from ``model.init``.

    The run's autoencoder must be there (the encode stage makes it). Interrupted, the same command
    goes on from the last checkpoint; finished, it does nothing.
    Raises: ConfigError, DataError, RunError.
    """
    run = RunDir(config.run.dir)
    made = Manifest.read(run.autoencoder, "autoencoder")
    settings = _settings(config)
    parents = {"autoencoder": made.digest}
    latents = None if config.model.init is not None else _public_latents(config, made)
    if latents is not None:
        parents["latents"] = latents.manifest.digest
    elif (config.model.init / MANIFEST).is_file():  # another run of ours made it
        parents["init"] = Manifest.read(config.model.init).digest
    finished = finished_manifest(run.public_model, "model", settings=settings, parents=parents)
    worker.collective.barrier()  # all have looked before anybody writes
    if finished is not None:
        return finished
    made.verify(run.autoencoder)
    autoencoder = load_autoencoder(run.autoencoder)
    if latents is None:
        model = _given_model(config, autoencoder)
    else:
        model = _train_model(config, run, latents, autoencoder, worker)
    if worker.rank == 0:
        _save_model(run, model, settings, parents)
    worker.collective.barrier()
    return Manifest.read(run.public_model, "model")


def describe(config: Config) -> list[str]:
    """What ``pretrain`` would do, for --dry-run. Reads no data."""
    run = RunDir(config.run.dir)
    if config.model.init is not None:
        return [f"reads   {config.model.init} (public model)", f"writes  {run.public_model}"]
    return [
        f"reads   {shown_place(config, 'public', 'latents')} (public latents)",
        f"writes  {run.public_model}",
        f"trains  {config.pretrain.steps} steps of {config.pretrain.batch} latents on "
        f"{config.run.crew} worker(s)",
    ]


# --- the denoiser -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """What a public model is made of."""

    unet: nn.Module
    autoencoder: Autoencoder
    diffusion: Diffusion
    rows_NTD: Tensor
    classes: tuple[str, ...]
    kind: Kind
    latent_shape: tuple[int, int, int]
    text_encoder_from: Path | None = None


class _DenoiserLoss(nn.Module):
    """The pre-training loss as a module, so that a replica sees one forward pass."""

    def __init__(self, denoiser: Denoiser, diffusion: Diffusion):
        super().__init__()
        self.denoiser = denoiser
        self.diffusion = diffusion

    def forward(self, z0_RChw: Tensor, noise_RChw: Tensor, t_R: Tensor, labels_R: Tensor) -> Tensor:
        return self.diffusion.loss_rows(self.denoiser, z0_RChw, noise_RChw, t_R, labels_R)


def _train_model(
    config: Config, run: RunDir, latents: LatentShards, autoencoder: Autoencoder, worker: Worker
) -> _Model:
    settings = config.pretrain
    diffusion = _diffusion(config.model)
    denoiser = _new_denoiser(config.model, latents)
    training = PublicTraining(
        _DenoiserLoss(denoiser, diffusion),
        what=WHAT,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        ema_decay=settings.ema_decay,
        settings=_settings(config),
        run=config.run,
        worker=worker,
    )
    for _, steps in training.legs():
        for _ in range(steps):
            drawn = _draw(config, latents, diffusion, denoiser.embedder, training)
            loss_B = training.module(*(tensor.to(worker.device) for tensor in drawn))
            training.update(loss_B, loss_B.detach())
    training.finish()
    denoiser.cpu().eval()
    classes = latents.classes if denoiser.embedder.kind == "class" else ()
    return _Model(
        unet=denoiser.unet,
        autoencoder=autoencoder,
        diffusion=diffusion,
        rows_NTD=denoiser.embedder.rows(),
        classes=classes,
        kind=denoiser.embedder.kind,
        latent_shape=latents.latent_shape,
    )


def _new_denoiser(settings: ModelConfig, latents: LatentShards) -> Denoiser:
    channels, side, width = latents.latent_shape
    if side != width:
        raise DataError(f"Latents of {side} x {width}: expected squares. Prepare square images.")
    unet = build_unet(
        latent_channels=channels,
        latent_size=side,
        block_channels=settings.block_channels,
        layers_per_block=settings.layers_per_block,
        heads=settings.heads,
        context_dim=settings.context_dim,
        norm_groups=settings.norm_groups,
        attention_levels=settings.attention_levels,
        seed=0,
    )
    classes = len(latents.classes) if settings.conditioning == "class" else 0
    rows_NTD = random_rows(classes + 1, settings.context_tokens, settings.context_dim, seed=0)
    denoiser = Denoiser(unet, ClassEmbedder(rows_NTD, kind=settings.conditioning))
    freeze_idle(denoiser)
    return denoiser


def _draw(
    config: Config,
    latents: LatentShards,
    diffusion: Diffusion,
    embedder: ClassEmbedder,
    training: PublicTraining,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(latents, noise, times, labels) of this worker's rows of a step: a function of the step."""
    settings, step, rows = config.pretrain, training.step, training.my_rows
    shards, places = _chosen(latents.shard_records, step * settings.batch, settings.batch)
    found = latents.gather(shards[rows], places[rows])
    generator = step_generator(2, step)
    u_4R = torch.rand(4, settings.batch, generator=generator)[:, rows]
    z_2RChw = torch.randn(2, settings.batch, *latents.latent_shape, generator=generator)[:, rows]
    row_R = torch.arange(u_4R.shape[1])
    image_R = (u_4R[0] * torch.from_numpy(found.images)).long()
    view_R = (u_4R[1] * latents.views).long()
    mean, log_variance = torch.from_numpy(found.moments)[row_R, image_R, view_R].chunk(2, dim=1)
    times_R = diffusion.times_from_uniform(
        u_4R[2], bias=settings.time_bias, spread=settings.time_spread
    )
    labels_R = torch.from_numpy(found.labels)[row_R, image_R]
    dropped_R = u_4R[3] < settings.label_dropout
    labels_R = torch.where(dropped_R, embedder.null_label, labels_R)
    return mean + torch.exp(0.5 * log_variance) * z_2RChw[0], z_2RChw[1], times_R, labels_R


def _chosen(
    shard_records: tuple[int, ...], start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(shards, places) of ``count`` records from position ``start`` of endless shuffled passes."""
    numbers = shuffled(sum(shard_records), start, count)
    ends = np.cumsum(shard_records)
    shards = np.searchsorted(ends, numbers, side="right")
    return shards, numbers - (ends - np.asarray(shard_records))[shards]


def _diffusion(settings: ModelConfig) -> Diffusion:
    return Diffusion(
        prediction=settings.prediction,
        schedule=settings.schedule,
        diffusion_steps=settings.diffusion_steps,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
    )


def _save_model(
    run: RunDir, model: _Model, settings: dict[str, Any], parents: dict[str, str]
) -> None:
    names = save_model(
        run.public_model,
        unet=model.unet,
        autoencoder=model.autoencoder,
        diffusion=model.diffusion,
        rows_NTD=model.rows_NTD,
        classes=model.classes,
        kind=model.kind,
        text_encoder_from=model.text_encoder_from,
    )
    facts = {
        "latent_shape": list(model.latent_shape),
        "classes": list(model.classes),
        "conditioning": model.kind,
        "parameters": sum(p.numel() for p in model.unet.parameters()),
        "software": software(),
    }
    files = describe_files(run.public_model, names)
    Manifest("model", facts, files, settings, parents).write(run.public_model)
    remove_checkpoints(run, WHAT)


# --- a model that is given --------------------------------------------------------------------


def _given_model(config: Config, autoencoder: Autoencoder) -> _Model:
    """``model.init``, checked against the config and dressed for its kind of conditioning."""
    found = load_model(config.model.init)
    _refuse_contradictions(config.model, found)
    shape = latent_shape(autoencoder, config.data.size)
    halved = 2 ** (len(found.unet.config.block_out_channels) - 1)
    if shape[0] != found.unet.config.in_channels or shape[1] % halved or shape[1] < halved:
        raise ConfigError(
            f"data.size = {config.data.size} gives latents of {shape[0]} channels and {shape[1]} x "
            f"{shape[2]}; the UNet of {found.folder} takes {found.unet.config.in_channels} "
            f"channels and a side that is a multiple of {halved}. Change data.size or model.init."
        )
    rows_NTD, classes = _rows_of_kind(config, found)
    caption = config.model.conditioning == "caption"
    return _Model(
        unet=found.unet,
        autoencoder=autoencoder,
        diffusion=found.diffusion,
        rows_NTD=rows_NTD,
        classes=classes,
        kind=config.model.conditioning,
        latent_shape=shape,
        text_encoder_from=found.folder if caption else None,
    )


def _rows_of_kind(config: Config, found: LoadedModel) -> tuple[Tensor, tuple[str, ...]]:
    """The table for ``model.conditioning``: the model's own, or embedded names of classes."""
    wanted = config.model.conditioning
    if wanted != "caption" and found.rows_NTD is not None and found.kind != "caption":
        if wanted == found.kind:
            return found.rows_NTD, found.classes
        if wanted == "none":
            return found.rows_NTD[-1:], ()
    if not found.has_text_encoder:
        raise ConfigError(
            f"model.conditioning = {wanted}: the model at {found.folder} has conditioning "
            f"{found.kind} and no text encoder. Set model.conditioning = {found.kind}, or choose "
            "another model.init."
        )
    encoder = CaptionEncoder(found.folder)
    if encoder.width != found.unet.config.cross_attention_dim:
        raise DataError(
            f"The text encoder of {found.folder} makes tokens of width {encoder.width}, its UNet "
            f"takes {found.unet.config.cross_attention_dim}: they do not belong together."
        )
    named = wanted == "class" and is_finished(config, "public", "images")
    classes = ImageShards(place_of(config, "public", "images")).classes if named else ()
    return encoder([*(name.replace("_", " ") for name in classes), ""]).cpu(), tuple(classes)


def _refuse_contradictions(settings: ModelConfig, found: LoadedModel) -> None:
    """Options that were set and that the given model contradicts. Raises: ConfigError.

    The shapes of weights do not show the number of heads or the schedule, so a wrong one would
    load without a word and compute another function.
    """
    unet, diffusion = found.unet.config, found.diffusion
    actual = {
        "block_channels": tuple(unet.block_out_channels),
        "layers_per_block": unet.layers_per_block,
        "heads": unet.num_attention_heads or unet.attention_head_dim,
        "context_dim": unet.cross_attention_dim,
        "norm_groups": unet.norm_num_groups,
        "prediction": diffusion.prediction,
        "schedule": diffusion.schedule,
        "diffusion_steps": diffusion.diffusion_steps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
    }
    for name, value in actual.items():
        wanted = getattr(settings, name)
        if wanted not in (value, ModelConfig.model_fields[name].default):
            raise ConfigError(
                f"model.{name} = {wanted}: the model at {found.folder} has {value}. Remove the "
                "option, or choose another model.init."
            )


# --- what there is, and whether it is the same --------------------------------------------------


def _public_latents(config: Config, autoencoder: Manifest) -> LatentShards:
    if config.model.conditioning == "caption":
        raise ConfigError(
            "model.conditioning = caption needs model.init, a local diffusers directory with a "
            "text encoder: set it, or choose class or none."
        )
    folder = shown_place(config, "public", "latents")
    if not is_finished(config, "public", "latents"):
        raise DataError(f"No public latents in {folder}: run the encode stage first.")
    latents = LatentShards(place_of(config, "public", "latents"))
    if latents.manifest.parents.get("autoencoder") != autoencoder.digest:
        raise DataError(
            f"The latents in {folder} were made by another autoencoder than that of this run: "
            "remove them and encode again."
        )
    return latents


def _settings(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    return {"model": tree["model"], "pretrain": tree["pretrain"]}
