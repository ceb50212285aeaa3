"""The simplest generator: one Gaussian per class over latents, with a common covariance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentGaussian:
    """``means_ND`` of N classes and ``covariance_DD`` over flattened latents of ``shape`` (C, h, w)."""

    means_ND: Tensor
    covariance_DD: Tensor
    shape: tuple[int, int, int]

    def sample(self, labels_B: Tensor, generator: torch.Generator) -> Tensor:
        """Latents of the given classes. (B, C, h, w), fp32. The generator is for public use: this
        is post-processing."""
        values_D, vectors_DD = torch.linalg.eigh(self.covariance_DD.double())
        factor_DD = vectors_DD * values_D.clamp(min=0.0).sqrt()
        normal_BD = torch.randn(
            len(labels_B), len(values_D), generator=generator, dtype=torch.float64
        )
        latents_BD = self.means_ND.double()[labels_B] + normal_BD @ factor_DD.T
        return latents_BD.float().view(len(labels_B), *self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """For a weights file."""
        return {"means": self.means_ND.contiguous(), "covariance": self.covariance_DD.contiguous()}
