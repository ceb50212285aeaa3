"""Class means and covariance of the private latents, from one release of the Gaussian mechanism.

Every record adds one vector of norm at most 1 to a sum over *all* records:
    phi(x, y) = [w_m e_y (x) x / R,  w_s svec(x x^T) / R^2,  w_n e_y],   w_m^2 + w_s^2 + w_n^2 = 1,
with x the latent clipped to norm R (a public number), y its class, and svec the upper triangle with
off-diagonal entries times sqrt(2), so that its norm is that of the matrix. Everything after the
noisy sum is post-processing.

Source: Gaussian mechanism, Dwork and Roth (2014), Theorem A.1; shrinkage, Efron and Morris (1973).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpldm_dist.errors import PrivacyError

CLIP_NORM = 1.0
GRID = 2.0**-30
_WEIGHT_MEAN = math.sqrt(0.45)
_WEIGHT_SECOND = math.sqrt(0.45)
_WEIGHT_COUNT = math.sqrt(0.10)
_LARGEST_FULL = 1024  # latent dimensions up to which the whole covariance is estimated


@dataclass(frozen=True)
class LatentStatistics:
    """Which statistics: ``classes`` N, ``dims`` D and the public norm bound ``radius`` R."""

    classes: int
    dims: int
    radius: float

    @property
    def length(self) -> int:
        """Coordinates of the sum."""
        return self.classes * self.dims + self._second_length + self.classes

    @property
    def _full(self) -> bool:
        return self.dims <= _LARGEST_FULL

    @property
    def _second_length(self) -> int:
        return self.dims * (self.dims + 1) // 2 if self._full else self.dims

    def record_sum(self, latents_BmD: Tensor, labels_Bm: Tensor, images_B: Tensor) -> Tensor:
        """Sum over records of phi, each rounded to the grid. int64 (length,).

        A record's phi is the mean over its images (``images_B`` of m are real).
        Formal guarantees: adding or removing one record moves the sum by at most CLIP_NORM / GRID
        in L2 norm. A record with a non-finite latent contributes exactly zero.
        """
        real_Bm = torch.arange(labels_Bm.shape[1]) < images_B[:, None]
        finite_Bm = torch.isfinite(latents_BmD).all(-1)
        usable_B = (finite_Bm | ~real_Bm).all(1) & (images_B > 0)
        real_Bm = real_Bm & usable_B[:, None]
        latents_BmD = torch.where(real_Bm[..., None], latents_BmD.double(), 0.0)
        phi_BmL = self._phi(latents_BmD, torch.where(real_Bm, labels_Bm, 0))
        share_Bm = real_Bm.double() / images_B.clamp(min=1)[:, None]
        phi_BL = (phi_BmL * share_Bm[..., None]).sum(1)
        # rounding moves a record by sqrt(length) / 2 grid units at most: shrink by that first
        shrink = 1.0 - 1e-9 - math.sqrt(self.length) * GRID
        return torch.round(phi_BL * (shrink / GRID)).to(torch.int64).sum(0)

    def _phi(self, latents_BmD: Tensor, labels_Bm: Tensor) -> Tensor:
        norm_Bm = torch.linalg.vector_norm(latents_BmD, dim=-1).clamp(min=1e-300)
        unit_BmD = latents_BmD * (1.0 / norm_Bm.clamp(min=self.radius))[..., None]
        which_BmN = torch.nn.functional.one_hot(labels_Bm, self.classes).double()
        means = (which_BmN[..., :, None] * unit_BmD[..., None, :]).flatten(-2)
        return torch.cat(
            [
                _WEIGHT_MEAN * means,
                _WEIGHT_SECOND * self._second(unit_BmD),
                _WEIGHT_COUNT * which_BmN,
            ],
            -1,
        )

    def _second(self, unit_BmD: Tensor) -> Tensor:
        if not self._full:
            return unit_BmD.square()
        rows, columns = torch.triu_indices(self.dims, self.dims)
        scale = torch.where(rows == columns, 1.0, math.sqrt(2.0)).double()
        return unit_BmD[..., rows] * unit_BmD[..., columns] * scale

    def estimate(
        self, noisy_L: Tensor, *, noise_multiplier: float, records: int
    ) -> tuple[Tensor, Tensor]:
        """Class means (N, D) and pooled covariance (D, D), fp64, from the noisy sum (int64).

        Means are shrunk towards their common mean by the share of their spread that the known noise
        explains; the covariance is made positive definite. ``records``: N declared.
        """
        noisy = noisy_L.double() * GRID
        if not bool(torch.isfinite(noisy).all()):
            raise PrivacyError(
                "The noisy statistics are not finite; expected numbers. This is a bug."
            )
        cut = self.classes * self.dims
        sums_ND = noisy[:cut].view(self.classes, self.dims) * (self.radius / _WEIGHT_MEAN)
        count_noise = noise_multiplier / _WEIGHT_COUNT
        even = records / self.classes
        counts_N = (noisy[cut + self._second_length :] / _WEIGHT_COUNT).clamp(min=0.2 * even)
        counts_N = _shrink(counts_N, counts_N.new_tensor(even), count_noise**2)
        means_ND = sums_ND / counts_N[:, None]
        mean_noise = (noise_multiplier * self.radius / _WEIGHT_MEAN / counts_N.mean()) ** 2
        shares_N = counts_N / counts_N.sum()
        means_ND = _shrink(means_ND, shares_N @ means_ND, float(mean_noise))
        second_DD = self._matrix(noisy[cut : cut + self._second_length])
        second_DD = second_DD * (self.radius**2 / _WEIGHT_SECOND / counts_N.sum())
        covariance_DD = second_DD - (means_ND * shares_N[:, None]).T @ means_ND
        return means_ND, _positive(covariance_DD)

    def _matrix(self, second: Tensor) -> Tensor:
        if not self._full:
            return torch.diag(second)
        rows, columns = torch.triu_indices(self.dims, self.dims)
        matrix = second.new_zeros(self.dims, self.dims)
        matrix[rows, columns] = second / torch.where(rows == columns, 1.0, math.sqrt(2.0)).double()
        return torch.triu(matrix) + torch.triu(matrix, 1).T


def _shrink(values: Tensor, centre: Tensor, noise_variance: float) -> Tensor:
    """``values`` pulled towards ``centre`` by the share of their variance that is noise."""
    spread = float((values - centre).square().mean())
    keep = max(0.0, 1.0 - noise_variance / spread) if spread > 0 else 0.0
    return centre + keep * (values - centre)


def _positive(matrix_DD: Tensor) -> Tensor:
    """Nearest symmetric matrix whose eigenvalues are at least 1 % of their mean."""
    values_D, vectors_DD = torch.linalg.eigh((matrix_DD + matrix_DD.T) / 2)
    floor = max(float(values_D.mean()), 1e-6) * 0.01
    return vectors_DD * values_D.clamp(min=floor) @ vectors_DD.T
