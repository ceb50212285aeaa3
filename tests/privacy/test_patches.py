"""Convolutions read where pixels lie equal convolutions of patches that are formed."""

import pytest
import torch
from torch import nn

from dpldm_dist.privacy import patches

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


def fresh(name, shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_inner_products_equal_those_of_patches(case, draws):
    images_RCHW, window, tokens_BTD, _ = made(case, draws)
    out_BTT = torch.full((len(tokens_BTD), *[tokens_BTD.shape[1]] * 2), float("nan"))
    patches.gram(images_RCHW, window, out_BTT=out_BTT)
    torch.testing.assert_close(out_BTT, tokens_BTD @ tokens_BTD.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_weighted_sum_equals_that_of_patches(case, draws):
    images_RCHW, window, tokens_BTD, grad_BTO = made(case, draws)
    factor_B = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    weight_OCA, bias_O = patches.weighted_sum(images_RCHW, grad_BTO, factor_B, window, fresh)
    expected_OD = torch.einsum("b,bto,btd->od", factor_B, grad_BTO.double(), tokens_BTD.double())
    torch.testing.assert_close(weight_OCA.flatten(1), expected_OD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias_O, torch.einsum("b,bto->o", factor_B, grad_BTO.double()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_records_of_factor_zero_count_as_zero_whatever_they_hold(bad):
    images_RCHW, window, _, grad_BTO = made("3 x 3", 2)
    factor_B = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    clean = patches.weighted_sum(images_RCHW, grad_BTO, factor_B, window, fresh)
    images_RCHW[2], grad_BTO[1, 0] = bad, bad
    spoiled = patches.weighted_sum(images_RCHW, grad_BTO, factor_B, window, fresh)
    for one, other in zip(clean, spoiled, strict=True):
        assert torch.equal(one, other)


def test_one_pixel_at_a_time_needs_no_window():
    assert patches.window_of(nn.Conv2d(4, 5, 1), 1) is None
