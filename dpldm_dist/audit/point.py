"""The audit operating point: sizes and settings at which faults of the mechanism can be seen.

Everything is run on the user's own network, trainable set, gradient engine, launcher and workers.
Changed are only the numbers that decide how much an audit can see. Each canary has a class of its
own, so a row of the conditioning table is touched by it alone; the embedder's gradient scale is so
large that next to all of its clipped gradient lies there. SGD at a constant rate without averaging
makes the weights a sum of noisy gradients. Latents are large and of one diffusion time, so that
every gradient is longer than the clip norm and points the same way in every step.

Units: a weight change of ``point.step`` is one clip norm of the sum.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpldm_dist.config import Config, parse_config
from dpldm_dist.models.autoencoder import build_autoencoder
from dpldm_dist.models.conditioning import ClassEmbedder, private_rows, random_rows
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.directory import load_model, save_model
from dpldm_dist.models.trainable import select_trainable
from dpldm_dist.models.unet import build_unet
from dpldm_dist.privacy.sampling import dyadic_rate
from dpldm_dist.runtime.rundir import RunDir
from dpldm_dist.stages.finetune.preparation import public_model_dir
from dpldm_dist.stages.mechanism import microbatch_of, plan_of

DELTA = 1e-5  # of the claim
RATE = 0.25  # of the audited run
_SELECTION_RATE = 0.125
_SELECTED, _LEAST_PLACES = 32, 4  # records where sampling is watched, and per shard, at least
_LATENT_SIZE = 30.0  # of a canary; the loss is then about its square and steers every gradient
_TIME_SPREAD = 0.05  # of the logarithm of the noise level: one diffusion time
_OUTSIDE = 0.01  # of a canary's gradient norm that should lie outside of its own rows
_CLIPPED = 2.0  # gradients are at least that many clip norms long
_LEAST_STEP, _LARGEST_STEP = 2.0**-20, 2.0**-16  # float32 weights near 1 have units of 2^-23
_ROW_MOVES = 0.05  # how far rows may move in all, over their size
_PROBES = 16  # canaries whose gradients are measured
_ENGINE = 1.5  # of autograd's time; per-record clipping takes that much, about
_STEP_S, _LEG_S = 0.1, 3.0  # of a step and of a run beside the gradients: disk, checks, accountant
WITHOUT_NOISE = ("reference", "selection")
LEGS = ("reference", "noisy", "other-weights", "other-data", "selection")


@dataclass(frozen=True)
class Point:
    """What an audit of one config runs.

    ``sizes``: numbers in each trainable parameter, in the order of the sum. ``step``: how far one
    clip norm of the sum moves the weights. ``own_share``: of a canary's gradient norm, the part
    that lies in its own rows, about. ``clip_norm``: the user's, or less so that canaries are
    clipped.
    """

    canaries: int
    epsilon: float
    steps: int
    places: int
    """Records per shard where sampling is watched: half an expected record or one, so that shards
    are often empty."""
    selection_records: int
    selection_steps: int
    latent_shape: tuple[int, int, int]
    step: float
    clip_norm: float
    grad_scale: float
    own_share: float
    sizes: dict[str, int]
    rows_NTD: torch.Tensor
    """The table of classes before training."""

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def batch(self) -> int:
        """Expected records per noisy step, if all canaries were included."""
        return round(RATE * self.canaries)

    @property
    def restart(self) -> int:
        return restart_step(self.steps)

    @property
    def selection_batch(self) -> int:
        return round(_SELECTION_RATE * self.selection_records)

    @property
    def selection_rate(self) -> float:
        return dyadic_rate(self.selection_batch / self.selection_records)


def restart_step(steps: int) -> int:
    """Where restarted runs branch off a run of ``steps``."""
    return steps - steps // 3


@dataclass(frozen=True)
class Sizes:
    """Numbers of records: canaries in all, those where sampling is watched, and per shard of these.

    Two shards per lane, all of equal size.
    """

    canaries: int
    selected: int
    places: int


def sizes_of(config: Config) -> Sizes:
    """As many canaries as the config asks for, rounded up to what makes sample rates exact."""
    shards = 2 * config.privacy.lanes
    places = max(_LEAST_PLACES, math.ceil(_SELECTED / shards))
    canaries = 4 * math.ceil(max(config.audit.canaries, shards * places) / 4)
    return Sizes(canaries, shards * places, places)


def prepare_point(config: Config, model: Path) -> Point:
    """Write the model that the audit starts from to ``model`` and measure its gradients.

    The network is the public model's, or, before there is one, an untrained one of the same shape.
    Its scheduler predicts v, and class rows steer it whatever the config says.
    """
    sizes = sizes_of(config)
    unet, rows_NTD, diffusion = _network(config)
    save_model(
        model,
        unet=unet,
        autoencoder=build_autoencoder(
            kind="kl", channels=1, size=16, latent_channels=unet.config.in_channels,
            block_channels=(8, 8), layers_per_block=1, norm_groups=4, mid_attention=False,
            vq_codes=8, seed=0,
        ),
        diffusion=diffusion,
        rows_NTD=rows_NTD,
        classes=[str(n) for n in range(len(rows_NTD) - 1)],
    )  # fmt: skip
    side = unet.config.sample_size
    shape = (unet.config.in_channels, side, side)
    table_NTD = private_rows(rows_NTD, classes=sizes.canaries)
    denoiser = Denoiser(unet, ClassEmbedder(table_NTD))
    learning = select_trainable(
        denoiser,
        trainable=config.finetune.trainable,
        first_block=config.finetune.first_block,
        lora_rank=config.finetune.lora_rank,
    )
    inside, outside = _gradient_norms(denoiser, diffusion, shape)
    ratio, steps = outside / inside, config.audit.steps
    far = _ROW_MOVES * float(table_NTD.square().mean().sqrt()) / math.sqrt(steps)
    scale = min(ratio / _OUTSIDE, far / _LEAST_STEP)
    return Point(
        canaries=sizes.canaries,
        epsilon=config.audit.epsilon,
        steps=steps,
        places=sizes.places,
        selection_records=sizes.selected,
        selection_steps=config.audit.selection_steps,
        latent_shape=shape,
        step=min(far / scale, _LARGEST_STEP),
        clip_norm=min(config.privacy.clip_norm, scale * inside / _CLIPPED),
        grad_scale=scale,
        own_share=scale / math.hypot(scale, ratio),
        sizes={name: parameter.numel() for name, parameter in learning.items()},
        rows_NTD=table_NTD,
    )


def canary_latents(count: int, latent_shape: tuple[int, int, int]) -> torch.Tensor:
    """The same large random latents for every audit, (count, C, h, w)."""
    generator = torch.Generator().manual_seed(0)
    return _LATENT_SIZE * torch.randn(count, *latent_shape, generator=generator)


def leg_configs(config: Config, folder: Path, point: Point) -> dict[str, Config]:
    """The config of every leg, by name. All but the numbers named here are the user's.

    "reference": every canary once, without noise. "noisy": the canaries that coins included, the
    claim. "other-weights": the noisy run restored from the middle with weights that are a little
    different. "other-data": the same on another data set, of one record. "selection": many small
    batches without noise.
    """
    noisy = _leg_config(config, folder, point, "noisy", noise_multiplier=None)
    sigma = plan_of(noisy, records=point.canaries).noise_multiplier
    # counts as 0: any number that the budget affords
    growth = _SELECTION_RATE / RATE * math.sqrt(point.selection_steps / point.steps)
    unused = round(2 * sigma * max(1.0, growth), 4)
    return {
        name: _leg_config(
            config,
            folder,
            point,
            name,
            noise_multiplier=unused if name in WITHOUT_NOISE else sigma,
        )
        for name in LEGS
    }


def _leg_config(
    config: Config, folder: Path, point: Point, name: str, *, noise_multiplier: float | None
) -> Config:
    batch = {"reference": point.canaries, "selection": point.selection_batch}.get(name, point.batch)
    steps = {"reference": 1, "selection": point.selection_steps}.get(name, point.steps)
    records = point.selection_records if name == "selection" else point.canaries
    # one clip norm moves a weight by `step`; in the single step of the reference, by 1
    step = 1.0 if name == "reference" else point.step
    tree = config.model_dump(mode="json")
    tree["data"] |= {"public": {}, "private": {"latents": str(folder / "data" / _data(name))}}
    tree["model"] |= {"init": str(folder / "model"), "conditioning": "class"}
    tree["privacy"] = _privacy(config, point, records, noise_multiplier)
    tree["finetune"] |= {
        "steps": steps,
        "batch": batch,
        "learning_rate": step * batch,
        **_PLAIN_TRAINING,
        "embedder_grad_scale": point.grad_scale,
    }
    tree["run"] |= {
        "dir": str(folder / "runs" / name),
        "microbatch": min(microbatch_of(config), max(4, math.ceil(batch / config.privacy.lanes))),
        "checkpoint_every": 1,
        "checkpoint_keep": steps + 2,
        "unsafe_test_key": None,
        "unsafe_no_noise": name in WITHOUT_NOISE,
        "unsafe_diagnostics": False,
    }
    return parse_config(tree)


_PLAIN_TRAINING: dict[str, Any] = {
    "optimizer": "sgd",
    "lr_decay": "constant",
    "betas": (0.0, 0.0),
    "ema_decay": 0.0,
    "label_dropout": 0.0,
    "time_bias": 0.0,
    "time_spread": _TIME_SPREAD,
    "statistics_noise": None,
    "warmup_steps": 0,
}


def _privacy(
    config: Config, point: Point, records: int, noise_multiplier: float | None
) -> dict[str, Any]:
    """The user's lanes and telemetry share; the claim of the audit; nothing else."""
    kept = ("lanes", "telemetry_share")
    return {
        **{name: getattr(config.privacy, name) for name in kept},
        "clip_norm": point.clip_norm,
        "epsilon": point.epsilon,
        "delta": DELTA,
        "noise_multiplier": noise_multiplier,
        "records": records,
    }


def _data(leg: str) -> str:
    """Folder of the records of a leg, below ``data``."""
    return {"reference": "all", "selection": "few", "other-data": "one"}.get(leg, "included")


def _network(config: Config) -> tuple[Any, torch.Tensor, Diffusion]:
    """UNet, class rows and the process of the public model, or of an untrained one."""
    folder = public_model_dir(config, RunDir(config.run.dir))
    if (folder / "model_index.json").is_file():
        public = load_model(folder)
        unet, settings, rows_NTD = public.unet, public.diffusion.scheduler().config, public.rows_NTD
        diffusion = Diffusion.from_scheduler({**settings, "prediction_type": "v_prediction"})
        if rows_NTD is not None and public.kind == "class":
            return unet, rows_NTD, diffusion
        return unet, random_rows(3, 2, unet.config.cross_attention_dim, seed=0), diffusion
    halvings = len(config.autoencoder.block_channels) - 1
    unet = build_unet(
        latent_channels=config.autoencoder.latent_channels,
        latent_size=config.data.size // 2**halvings,
        block_channels=config.model.block_channels,
        layers_per_block=config.model.layers_per_block,
        heads=config.model.heads,
        context_dim=config.model.context_dim,
        norm_groups=config.model.norm_groups,
        attention_levels=config.model.attention_levels,
        seed=0,
    )
    diffusion = Diffusion(
        prediction="v_prediction",
        schedule=config.model.schedule,
        diffusion_steps=config.model.diffusion_steps,
        beta_start=config.model.beta_start,
        beta_end=config.model.beta_end,
    )
    rows_NTD = random_rows(3, config.model.context_tokens, config.model.context_dim, seed=0)
    return unet, rows_NTD, diffusion


def _gradient_norms(
    denoiser: Denoiser, diffusion: Diffusion, latent_shape: tuple[int, int, int]
) -> tuple[float, float]:
    """Least norm of a canary's gradient in its own rows, and largest outside, with scale 1."""
    latents = canary_latents(_PROBES, latent_shape)
    generator = torch.Generator().manual_seed(1)
    times = diffusion.times_from_uniform(torch.full((1,), 0.5), bias=0.0, spread=_TIME_SPREAD)
    learning = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    inside, outside = [], []
    for canary in range(_PROBES):
        z0 = latents[canary : canary + 1]
        noise = torch.randn(z0.shape, generator=generator)
        loss = diffusion.loss_rows(denoiser, z0, noise, times, torch.tensor([canary])).sum()
        found = torch.autograd.grad(loss, list(learning.values()))
        squares = {
            name: float(g.double().square().sum()) for name, g in zip(learning, found, strict=True)
        }
        own = squares.pop("embedder.delta.weight")
        inside.append(math.sqrt(own))
        outside.append(math.sqrt(sum(squares.values())))
    return min(inside), max(outside)


def expected_seconds(config: Config) -> float:
    """About how long the runs take on this machine alone, from a trial of the network."""
    sizes, settings = sizes_of(config), config.audit
    noisy_steps = settings.steps + 2 * (settings.steps - restart_step(settings.steps))
    lanes = config.privacy.lanes
    rows = sizes.canaries + noisy_steps * (RATE * sizes.canaries + 4 * lanes) / 2
    rows += settings.selection_steps * 4 * lanes  # a microbatch of 4 is mostly padding
    trained = _ENGINE * rows * config.finetune.draws * _time_of_a_row(config)
    fixed = _STEP_S * (noisy_steps + settings.selection_steps) + _LEG_S * len(LEGS)
    return trained / config.run.most_workers + fixed


def _time_of_a_row(config: Config, *, rows: int = 8) -> float:
    """Seconds that autograd takes for a row: the best of three passes over ``rows`` of them."""
    unet, rows_NTD, diffusion = _network(config)
    denoiser = Denoiser(unet, ClassEmbedder(rows_NTD))
    side = unet.config.sample_size
    z0 = canary_latents(rows, (unet.config.in_channels, side, side))
    times, labels = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        diffusion.loss_rows(denoiser, z0, z0, times, labels).sum().backward()
        best = min(best, time.perf_counter() - started)
    return best / rows
