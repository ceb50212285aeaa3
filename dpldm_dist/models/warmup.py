"""What happens to the model before the first noisy step, on public or released numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from dpldm_dist.models.denoiser import Denoiser
from dpldm_dist.models.diffusion import Diffusion
from dpldm_dist.models.latent_gaussian import LatentGaussian

_GRID = 2.0**-36  # gradients are added as integers, so that the order of workers does not matter


def fit_to_gaussian(
    denoiser: Denoiser,
    diffusion: Diffusion,
    gaussian: LatentGaussian,
    parameters: Mapping[str, nn.Parameter],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    label_dropout: float,
    bias: float,
    spread: float | None,
    parts: int,
    my_parts: Iterable[int],
    passes: int = 0,
    sum_: Callable[[Tensor], None],
    tick: Callable[[int], None],
) -> None:
    """Ordinary training of ``parameters`` on draws from a released Gaussian: post-processing.

    The batch is cut into ``parts`` fixed parts; a worker computes ``my_parts`` and ``sum_`` adds
    int64 vectors over workers, so the result has the same bits for any number of workers. A worker
    with fewer parts than ``passes`` makes up for it by passes whose gradients are thrown away.
    """
    learning = list(parameters.values())
    device = learning[0].device
    optimizer = torch.optim.Adam(learning, lr=learning_rate, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps))
    )
    mine = tuple(my_parts)
    unused = (0,) * max(0, passes - len(mine))
    for step in range(steps):
        total = torch.zeros(sum(p.numel() for p in learning), dtype=torch.int64, device=device)
        for turn, part in enumerate(mine + unused):
            rows = batch * (part + 1) // parts - batch * part // parts
            loss = _gaussian_loss(
                denoiser, diffusion, gaussian, rows=rows, seed=step * parts + part,
                label_dropout=label_dropout, bias=bias, spread=spread, device=device,
            )  # fmt: skip
            found = torch.autograd.grad(loss / batch, learning)
            if turn >= len(mine):
                continue
            flat = torch.cat([gradient.flatten() for gradient in found]).double()
            total += torch.round(flat / _GRID).to(torch.int64)
        sum_(total)
        _set_gradients(learning, total.double() * _GRID)
        optimizer.step()
        decay.step()
        tick(step)
    optimizer.zero_grad(set_to_none=True)


def _gaussian_loss(
    denoiser: Denoiser,
    diffusion: Diffusion,
    gaussian: LatentGaussian,
    *,
    rows: int,
    seed: int,
    label_dropout: float,
    bias: float,
    spread: float | None,
    device: torch.device,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels_R = torch.randint(len(gaussian.means_ND), (rows,), generator=generator)
    z0_RCHW = gaussian.sample(labels_R, generator).to(device)
    noise_RCHW = torch.randn(z0_RCHW.shape, generator=generator).to(device)
    t_R = diffusion.times_from_uniform(
        torch.rand(rows, generator=generator), bias=bias, spread=spread
    )
    dropped_R = torch.rand(rows, generator=generator) < label_dropout
    condition = denoiser.embedder.drop(labels_R, dropped_R).to(device)
    return diffusion.loss_rows(denoiser, z0_RCHW, noise_RCHW, t_R.to(device), condition).sum()


def _set_gradients(parameters: list[nn.Parameter], flat_P: Tensor) -> None:
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.grad = flat_P[start:stop].view_as(parameter).to(parameter.dtype)
        start = stop


def balanced_grad_scale(
    denoiser: Denoiser,
    diffusion: Diffusion,
    parameters: Mapping[str, nn.Parameter],
    *,
    latents_BCHW: Tensor,
    labels_B: Tensor,
    times_B: Tensor,
) -> float:
    """Factor on the embedder's gradient that makes its share of the squared norm one half.

    Judged on made-up or released latents, one at a time, at the current parameters with a factor
    of 1.
    Clipping acts on the whole gradient: without the factor the embedder drowns in it.
    """
    generator = torch.Generator().manual_seed(0)
    embedder = {id(p) for p in denoiser.embedder.parameters()}
    inside = outside = 0.0
    for row in range(len(latents_BCHW)):
        z0 = latents_BCHW[row : row + 1]
        noise = torch.randn(z0.shape, generator=generator).to(z0)
        loss = diffusion.loss_rows(
            denoiser, z0, noise, times_B[row : row + 1], labels_B[row : row + 1]
        ).sum()
        found = torch.autograd.grad(loss, list(parameters.values()))
        for parameter, gradient in zip(parameters.values(), found, strict=True):
            size = float(gradient.double().square().sum())
            if id(parameter) in embedder:
                inside += size
            else:
                outside += size
    return math.sqrt(outside / inside) if inside > 0 and outside > 0 else 1.0
