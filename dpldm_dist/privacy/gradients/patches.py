"""What a convolution sees through its window, without forming the patches, for the gradient engine.

A patch repeats a pixel once for each place of the window. Inner products of patches are sums of
inner products of pixels, and a weight's gradient is one product of pixels and output gradients for
each place of the window: both read every pixel where it lies.

Shapes: R rows (B records times K draws), C and O channels of input and output, H, W of the input
(Hp, Wp with its padding), Ho, Wo of the output, A places of a window, T = K Ho Wo tokens of a
record.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpldm_dist.privacy import native


@dataclass(frozen=True)
class Window:
    """A convolution's geometry, each (vertical, horizontal), and the draws of a record."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    draws: int

    @property
    def area(self) -> int:
        return self.size[0] * self.size[1]

    def padded(self, side: int, axis: int) -> int:
        return side + 2 * self.padding[axis]

    def output(self, side: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.size[axis] - 1)
        return (self.padded(side, axis) - reach - 1) // self.stride[axis] + 1

    def slices(self, side: int, axis: int) -> list[slice]:
        """Of a padded side: what each place of the window sees, one pixel per output."""
        starts = range(0, self.dilation[axis] * self.size[axis], self.dilation[axis])
        span = self.stride[axis] * (self.output(side, axis) - 1) + 1
        return [slice(start, start + span, self.stride[axis]) for start in starts]


def fold(tensor: Tensor, draws: int) -> Tensor:
    """(R, ..., D) -> (B, T, D): a record's draws become tokens."""
    if draws == 1 and tensor.dim() == 3:
        return tensor
    return tensor.reshape(tensor.shape[0] // draws, -1, tensor.shape[-1])


def window_of(module: nn.Conv2d, draws: int) -> Window | None:
    """None for a convolution that sees one pixel at a time: a linear layer of pixels."""
    if module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0):
        return None
    return Window(module.kernel_size, module.stride, module.padding, module.dilation, draws)


def tokens(images_RCHW: Tensor, window: Window) -> Tensor:
    """The patches themselves, (B, T, C * A)."""
    patches_RDT = F.unfold(
        images_RCHW,
        window.size,
        dilation=window.dilation,
        padding=window.padding,
        stride=window.stride,
    )
    return fold(patches_RDT.mT, window.draws)


def pixels(images_RCHW: Tensor, window: Window) -> Tensor:
    """The pixels of each record, (B, K H W, C)."""
    return fold(images_RCHW.flatten(2).mT, window.draws)


@functools.lru_cache(maxsize=256)
def pairs(window: Window, height: int, width: int) -> native.Pairs:
    """Which pixel each place of the window shows to which output token; padding to none."""
    image = torch.arange(window.draws * height * width, dtype=torch.int32, device="cpu")
    (top, left), sides = window.padding, (window.padded(height, 0), window.padded(width, 1))
    padded = torch.full((window.draws, *sides), -1, dtype=torch.int32, device="cpu")
    padded[:, top : top + height, left : left + width] = image.view(window.draws, height, width)
    inputs, outputs = [], []
    for vertical, horizontal in _places(height, width, window):
        seen = padded[:, vertical, horizontal].flatten()
        inputs.append(seen[seen >= 0])
        outputs.append((seen >= 0).nonzero().flatten().int())
    counts = torch.tensor([0, *(len(tokens) for tokens in inputs)], device="cpu")
    return native.Pairs(counts.cumsum(0), torch.cat(inputs), torch.cat(outputs))


def gram(images_RCHW: Tensor, window: Window, *, out_BTT: Tensor) -> None:
    """Inner products of the patches of each record: sums of C * A products."""
    rows, _, height, width = images_RCHW.shape
    records, draws = rows // window.draws, window.draws
    pixels_BSC = pixels(images_RCHW, window)
    pairs_BSS = torch.bmm(pixels_BSC, pixels_BSC.mT)
    high, wide = window.padded(height, 0), window.padded(width, 1)
    (top, left), image = window.padding, (draws, height, width)
    padded = pairs_BSS.new_zeros(draws, high, wide, draws, high, wide, records)
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    padded[inside * 2] = pairs_BSS.view(records, *image, *image).movedim(0, -1)
    sums = 0
    for vertical, horizontal in _places(height, width, window):
        sums += padded[(slice(None), vertical, horizontal) * 2]
    out_BTT.view(records, *sums.shape[:-1]).copy_(sums.movedim(-1, 0))


def _places(height: int, width: int, window: Window) -> Iterator[tuple[slice, slice]]:
    for vertical in window.slices(height, 0):
        for horizontal in window.slices(width, 1):
            yield vertical, horizontal
