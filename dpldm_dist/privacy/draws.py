"""The secret numbers that one record consumes in one step, whoever computes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpldm_dist.privacy.randomness import (
    derive_key,
    record_normals,
    record_words,
    uniform_from_words,
)

_UNIFORMS = 4  # image of the unit, view, diffusion time, label dropout


@dataclass(frozen=True)
class RecordDraws:
    """K draws for each of B records over latents of D numbers.

    ``image``, ``view``, ``time``, ``dropout``: uniform in [0, 1), float64 (B, K).
    ``posterior``, ``noise``: standard normal, float32 (B, K, D).
    """

    image: Tensor
    view: Tensor
    time: Tensor
    dropout: Tensor
    posterior: Tensor
    noise: Tensor


def record_draws(
    key: bytes, ids: np.ndarray, *, attempt: int, step: int, draws: int, dims: int
) -> RecordDraws:
    """Draws of the records ``ids`` (int64 (B,)) in ``step``.

    Formal guarantees: the draws of a record depend on (key, attempt, step, record) alone, so adding
    or removing another record, worker or microbatch leaves them unchanged.
    """
    uniforms = _UNIFORMS * draws
    table = record_words(derive_key(key, "draws", attempt, step), ids, uniforms + 2 * draws * dims)
    uniform = torch.from_numpy(uniform_from_words(table[:, :uniforms])).view(-1, _UNIFORMS, draws)
    normal = torch.from_numpy(record_normals(np.ascontiguousarray(table[:, uniforms:])))
    posterior, noise = normal.float().view(-1, 2, draws, dims).unbind(1)
    image, view, time, dropout = uniform.unbind(1)
    return RecordDraws(image, view, time, dropout, posterior, noise)
