"""What is measured: a model, the parameters that learn, and one microbatch of made-up records.

Shapes: B records, K draws of each, R = B * K rows (record-major), C, H, W of a latent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dpldm_dist.config import ModelConfig, load_config
from dpldm_dist.models.conditioning import ClassEmbedder, random_rows
from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.trainable import freeze_idle, select_trainable
from dpldm_dist.models.unet import build_unet

CONFIGS = Path(__file__).parent.parent / "configs"
Trainable = Literal["attention", "transformer", "output-blocks", "lora", "all"]
TRAINABLES = get_args(Trainable)
SHAPES = ("tiny", "small", "cifar", "text")
PAPERS_FIRST_BLOCK = 9
CLASSES = 10


@dataclass(frozen=True)
class Shape:
    """A UNet as the project builds it, and how much of it fits a microbatch."""

    model: ModelConfig
    latent: tuple[int, int, int]
    """C, H, W."""
    context: tuple[int, int]
    """Tokens and their width."""
    kind: Literal["class", "caption"]
    rows: int
    """R: the same for every K, so that B = R / K."""
    trainables: tuple[Trainable, ...]


def shape_of(name: str) -> Shape:
    """The shapes that are measured, by name."""
    without_output_blocks = tuple(t for t in TRAINABLES if t != "output-blocks")
    if name == "tiny":  # for tests
        model = ModelConfig(block_channels=(16, 16), heads=2, context_dim=16, norm_groups=4)
        return Shape(model, (2, 4, 4), (1, 16), "class", 8, without_output_blocks)
    if name == "small":  # the defaults of the configuration
        return Shape(ModelConfig(), (4, 4, 4), (1, 64), "class", 256, without_output_blocks)
    if name == "cifar":  # configs/cifar10.toml: the paper's, 90 M parameters
        model = load_config(CONFIGS / "cifar10.toml").model
        return Shape(model, (3, 16, 16), (1, model.context_dim), "class", 16, TRAINABLES)
    if name == "text":
        model = ModelConfig(block_channels=(64, 128, 128), heads=4, context_dim=768, norm_groups=32)
        return Shape(model, (4, 32, 32), (77, 768), "caption", 16, without_output_blocks)
    raise ValueError(f"Model {name!r}: expected one of {SHAPES}.")


@dataclass(frozen=True, eq=False)
class Cell:
    """A model with what learns in it, and one microbatch. A method may change its own copy."""

    shape: Shape
    denoiser: Denoiser
    parameters: dict[str, nn.Parameter]
    z0_RCHW: Tensor
    noise_RCHW: Tensor
    times_R: Tensor
    condition: Tensor
    draws: int
    autocast: bool

    @property
    def records(self) -> int:
        return len(self.z0_RCHW) // self.draws

    @property
    def device(self) -> torch.device:
        return self.z0_RCHW.device

    @property
    def count(self) -> int:
        """P: how many numbers learn."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a row's loss depends on; each (R, ...)."""
        return self.z0_RCHW, self.noise_RCHW, self.times_R, self.condition

    def losses(self, denoiser: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Loss of every row, (R,), of these tensors or of the cell's own."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return Diffusion().loss_rows(denoiser, *(tensors or self.tensors))


def make_cell(
    name: str,
    trainable: Trainable,
    *,
    draws: int,
    rows: int | None = None,
    device: str = "cpu",
    channels_last: bool = False,
) -> Cell:
    """The same weights and records each time. On CUDA the forward pass runs in bf16."""
    shape = shape_of(name)
    rows = rows or shape.rows
    denoiser = _denoiser(shape)
    parameters = _learning(denoiser, trainable)
    generator = torch.Generator().manual_seed(1)
    _shift(parameters, generator)
    denoiser.to(device)
    condition = torch.randint(0, CLASSES, (rows,), generator=generator)
    if shape.kind == "caption":
        condition = torch.randn(rows, *shape.context, generator=generator)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    denoiser.unet.to(memory_format=layout)
    images = [
        torch.randn(rows, *shape.latent, generator=generator).to(device, memory_format=layout)
        for _ in range(2)
    ]
    times_R = torch.randint(0, Diffusion().diffusion_steps, (rows,), generator=generator)
    return Cell(
        shape,
        denoiser,
        parameters,
        *images,
        times_R.to(device),
        condition.to(device),
        draws,
        autocast=device != "cpu",
    )


def own_copy(cell: Cell) -> Cell:
    """The cell with a model of its own, so that no hook of one method stays for another."""
    denoiser = copy.deepcopy(cell.denoiser)
    of_name = dict(denoiser.named_parameters())
    return replace(
        cell, denoiser=denoiser, parameters={name: of_name[name] for name in cell.parameters}
    )


def _denoiser(shape: Shape) -> Denoiser:
    model = shape.model
    unet = build_unet(
        latent_channels=shape.latent[0],
        latent_size=shape.latent[1],
        block_channels=model.block_channels,
        layers_per_block=model.layers_per_block,
        heads=model.heads,
        context_dim=shape.context[1],
        norm_groups=model.norm_groups,
        attention_levels=model.attention_levels,
        seed=0,
    )
    rows = 1 if shape.kind == "caption" else CLASSES + 1
    return Denoiser(unet, ClassEmbedder(random_rows(rows, *shape.context, seed=0), kind=shape.kind))


def _learning(denoiser: Denoiser, trainable: Trainable) -> dict[str, nn.Parameter]:
    """What learns, by name. "all" is no set of the project: every parameter of the UNet that can
    learn, and the class table."""
    if trainable != "all":
        return select_trainable(denoiser, trainable=trainable, first_block=PAPERS_FIRST_BLOCK)
    select_trainable(denoiser, trainable="transformer")  # settles the class table
    denoiser.unet.requires_grad_(True)
    freeze_idle(denoiser)
    return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}


def _shift(parameters: dict[str, nn.Parameter], generator: torch.Generator) -> None:
    """Away from zeros, behind which gradients vanish (adapters, class table)."""
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise, alpha=0.02)
