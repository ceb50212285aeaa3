"""Pixels on disk (uint8, 0..255) and pixels in networks (float32, -1..1). Any shape."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 0..255 as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] as the nearest uint8; what lies outside is clamped."""
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
