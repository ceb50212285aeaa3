"""Convolutions read where pixels lie equal convolutions of patches that are formed."""

import itertools

import pytest
import torch
from torch import nn

from dpldm_dist.privacy.gradients import patches

CASES = {
    "3 x 3": dict(kernel_size=3, padding=1),
    "without padding": dict(kernel_size=3),
    "stride 2": dict(kernel_size=3, padding=1, stride=2),
    "1 x 1, stride 2": dict(kernel_size=1, stride=2),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "oblong": dict(kernel_size=(3, 2), padding=(1, 0), stride=(1, 2), dilation=(2, 1)),
}


def made(case: str, draws: int, *, records: int = 3):
    module = nn.Conv2d(4, 5, **CASES[case])
    images_RCHW = torch.randn(records * draws, 4, 6, 7)
    window = patches.window_of(module, draws)
    tokens_BTD = patches.tokens(images_RCHW, window)
    grad_BTO = torch.randn(records, tokens_BTD.shape[1], 5)
    return images_RCHW, window, tokens_BTD, grad_BTO


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_inner_products_equal_those_of_patches(case, draws):
    images_RCHW, window, tokens_BTD, _ = made(case, draws)
    out_BTT = torch.full((len(tokens_BTD), *[tokens_BTD.shape[1]] * 2), float("nan"))
    patches.gram(images_RCHW, window, out_BTT=out_BTT)
    torch.testing.assert_close(out_BTT, tokens_BTD @ tokens_BTD.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_pairs_of_pixels_and_outputs_make_the_patches(case, draws):
    images_RCHW, window, tokens_BTD, _ = made(case, draws)
    pairs = patches.pairs(window, *images_RCHW.shape[2:])
    pixels_BSC = patches.pixels(images_RCHW, window)
    found_BTCA = torch.zeros(*tokens_BTD.shape[:2], 4, window.area)
    for place, (start, stop) in enumerate(itertools.pairwise(pairs.starts.tolist())):
        seen, shown = pairs.input_token[start:stop], pairs.grad_token[start:stop]
        assert len(set(shown.tolist())) == stop - start  # a pixel at most for each output
        found_BTCA[:, shown.long(), :, place] = pixels_BSC[:, seen.long()]
    assert torch.equal(found_BTCA.flatten(2), tokens_BTD)


def test_one_pixel_at_a_time_needs_no_window():
    assert patches.window_of(nn.Conv2d(4, 5, 1), 1) is None
