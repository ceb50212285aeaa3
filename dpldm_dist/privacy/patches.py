"""What a convolution sees through its window, without forming the patches, for the gradient engine.

A patch repeats a pixel once for each place of the window. Inner products of patches are sums of
inner products of pixels, and a weight's gradient is one product of pixels and output gradients for
each place of the window: both read every pixel where it lies.

Shapes: R rows (B records times K draws), C and O channels of input and output, H, W of the input
(Hp, Wp with its padding), Ho, Wo of the output, A places of a window, T = K Ho Wo tokens of a
record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpldm_dist.privacy import blas

Take = Callable[[str, Sequence[int], torch.dtype], Tensor]


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
    return tensor.reshape(len(tensor) // draws, -1, tensor.shape[-1])


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


def gram(images_RCHW: Tensor, window: Window, *, out_BTT: Tensor) -> None:
    """Inner products of the patches of each record, float32: sums of C * A products."""
    rows, _, height, width = images_RCHW.shape
    records, draws = rows // window.draws, window.draws
    pixels_BSC = fold(images_RCHW.flatten(2).mT, draws)
    pairs_BSS = pixels_BSC.new_empty(records, *[pixels_BSC.shape[1]] * 2)
    blas.gram(pixels_BSC, out_BTT=pairs_BSS)
    high, wide = window.padded(height, 0), window.padded(width, 1)
    (top, left), image = window.padding, (draws, height, width)
    padded = pairs_BSS.new_zeros(draws, high, wide, draws, high, wide, records)
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    padded[inside * 2] = pairs_BSS.view(records, *image, *image).movedim(0, -1)
    sums = 0
    for vertical, horizontal in _places(images_RCHW, window):
        sums += padded[(slice(None), vertical, horizontal) * 2]
    out_BTT.view(records, *sums.shape[:-1]).copy_(sums.movedim(-1, 0))


def weighted_sum(
    images_RCHW: Tensor, grad_BTO: Tensor, factor_B: Tensor, window: Window, take: Take
) -> tuple[Tensor, Tensor]:
    """Sum over records of factor_b times the gradients of weight, (O, C, A), and bias, (O,); both
    float64 and work space. Whatever records of factor 0 hold counts as zero."""
    rows, channels, height, width = images_RCHW.shape
    (top, left), outputs = window.padding, grad_BTO.shape[2]
    factor_R = factor_B.repeat_interleave(window.draws)
    out_R = (factor_R == 0).nonzero().flatten()

    size = (window.padded(height, 0), window.padded(width, 1), rows, channels)
    seen = take("images", size, torch.float64).zero_()
    inside = seen[top : top + height, left : left + width]
    inside.copy_(images_RCHW.permute(2, 3, 0, 1)).index_fill_(2, out_R, 0.0)

    high, wide = window.output(height, 0), window.output(width, 1)
    grad = take("grad", (high, wide, rows, outputs), torch.float64)
    grad.copy_(grad_BTO.reshape(rows, high, wide, outputs).permute(1, 2, 0, 3))
    grad.mul_(factor_R[:, None]).index_fill_(2, out_R, 0.0)

    sums_ACO = take("places", (window.area, channels, outputs), torch.float64)
    for sum_CO, (vertical, horizontal) in zip(sums_ACO, _places(images_RCHW, window), strict=True):
        shifted = seen[vertical, horizontal]
        for row in range(high):
            pixels_NC, grad_NO = shifted[row].reshape(-1, channels), grad[row].flatten(0, 1)
            blas.product(pixels_NC, grad_NO, out_OD=sum_CO, add=row > 0)
    sum_OCA = take("out", (outputs, channels, window.area), torch.float64)
    sum_OCA.copy_(sums_ACO.permute(2, 1, 0))
    return sum_OCA, grad.flatten(0, 2).sum(0)


def _places(images_RCHW: Tensor, window: Window) -> Iterator[tuple[slice, slice]]:
    height, width = images_RCHW.shape[2:]
    for vertical in window.slices(height, 0):
        for horizontal in window.slices(width, 1):
            yield vertical, horizontal
