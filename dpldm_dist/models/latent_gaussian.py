"""The simplest generator: one Gaussian per class over latents, with a common covariance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpldm_dist.errors import DataError


@dataclass(frozen=True)
class LatentGaussian:
    """``means_ND`` of N classes, ``covariance_DD`` over flat latents of ``shape`` (C, h, w)."""

    means_ND: Tensor
    covariance_DD: Tensor
    shape: tuple[int, int, int]

    def sample(self, labels_B: Tensor, generator: torch.Generator) -> Tensor:
        """Latents of the given classes. (B, C, h, w), fp32. The generator is for public use: this
        is post-processing."""
        shape = (len(labels_B), len(self.covariance_DD))
        return self.place(labels_B, torch.randn(shape, generator=generator, dtype=torch.float64))

    def place(self, labels_B: Tensor, normal_BD: Tensor) -> Tensor:
        """Latents (B, C, h, w), fp32, that standard normal numbers stand for in given classes."""
        latents_BD = self.means_ND.double()[labels_B] + normal_BD.double() @ self._factor_DD.T
        return latents_BD.float().view(len(labels_B), *self.shape)

    @cached_property
    def _factor_DD(self) -> Tensor:
        values_D, vectors_DD = torch.linalg.eigh(self.covariance_DD.double())
        return vectors_DD * values_D.clamp(min=0.0).sqrt()

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {"means": self.means_ND, "covariance": self.covariance_DD}
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)

    @staticmethod
    def load(path: Path, shape: tuple[int, int, int]) -> LatentGaussian:
        """Read what ``save`` wrote, for latents of ``shape``. Raises: DataError."""
        try:
            tensors = load_file(path)
            means_ND, covariance_DD = tensors["means"], tensors["covariance"]
        except (OSError, KeyError, SafetensorError):
            raise DataError(
                f"{path} is missing or damaged: expected the released statistics of a run with "
                "finetune.statistics_noise."
            ) from None
        if covariance_DD.shape != (math.prod(shape),) * 2 or means_ND.shape[1:] != (
            math.prod(shape),
        ):
            raise DataError(
                f"{path} is for other latents: expected {math.prod(shape)} numbers of each."
            )
        return LatentGaussian(means_ND, covariance_DD, shape)
