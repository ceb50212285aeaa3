"""The compiled kernels against float64, of operands in every order that the engine has."""

import ctypes

import pytest
import torch

from dpldm_dist.privacy import native
from dpldm_dist.privacy.gradients.sums import RecordSums

pytestmark = pytest.mark.skipif(
    not native.serves(torch.device("cpu")), reason="no compiled kernels on this machine"
)
ORDERS = ["by token", "by channel", "a part of wider rows", "with gaps"]
SIZES = [(1, 1, 1, 1), (3, 16, 5, 7), (5, 4, 64, 3), (17, 9, 70, 200), (2, 100, 65, 4)]
SIZES += [(2, 40, 128, 8), (2, 40, 8, 128)]  # inputs read where they lie; results written across


@pytest.fixture(params=["AVX512", "AVX2"])
def kernels(request, monkeypatch):
    """Each set of kernels that this processor can run."""
    if request.param == "AVX512" != native._processor():
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setattr(native, "_processor", lambda: request.param)
    native._library.cache_clear()
    assert native._library() is not None
    yield request.param
    native._library.cache_clear()


def in_order(order: str, records: int, tokens: int, width: int) -> torch.Tensor:
    """(records, tokens, width) of random numbers that lie in memory as ``order`` says."""
    if order == "by token":
        return torch.randn(records, tokens, width)
    if order == "by channel":
        return torch.randn(records, width, tokens).mT
    if order == "a part of wider rows":
        return torch.randn(records, tokens, width + 3)[:, :, 2:-1]
    return torch.randn(records, tokens, 2 * width)[:, :, ::2]  # "with gaps"


def sums(grad_BTO, input_BTD, factor_B, *, bias: bool = True):
    outputs, inputs = grad_BTO.shape[2], input_BTD.shape[2]
    weight_P, bias_O = native.Total.zeros(outputs * inputs), native.Total.zeros(outputs)
    native.add_records(
        *(grad_BTO, input_BTD, factor_B, native.straight(grad_BTO.shape[1])),
        weight_ODA=weight_P.view(slice(None), outputs, inputs, 1),
        bias_O=bias_O if bias else None,
    )
    return weight_P.whole().view(outputs, inputs).double(), bias_O.whole().double()


def sums_of_rows(rows_BP, factor_B) -> torch.Tensor:
    out_P = native.Total.zeros(rows_BP.shape[1])
    native.add_rows(rows_BP, factor_B, out_P=out_P)
    return out_P.whole().double()


@pytest.mark.parametrize("left", ORDERS)
@pytest.mark.parametrize("right", ORDERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_sums_are_those_of_float64_but_for_half_a_unit_of_each_record(kernels, left, right, sizes):
    records, tokens, _, out_width = sizes
    grad_BTO, input_BTD = in_order(left, records, tokens, out_width), in_order(right, *sizes[:3])
    factor_B = torch.rand(records, dtype=torch.float64) * 1000
    factor_B[records // 2] = 0.0
    found_OD, found_O = sums(grad_BTO, input_BTD, factor_B)
    wide = grad_BTO.double(), input_BTD.double()
    exact_OD = torch.einsum("b,bto,btd->od", factor_B, *wide)
    terms_OD = torch.einsum("b,bto,btd->od", factor_B, *(x.abs() for x in wide))
    error = 1.1 * native.sum_roundings(tokens) * 2.0**-24
    assert ((found_OD - exact_OD).abs() <= 0.5 * records + error * terms_OD).all()
    exact_O, terms_O = (torch.einsum("b,bto->o", factor_B, x) for x in (wide[0], wide[0].abs()))
    assert ((found_O - exact_O).abs() <= 0.5 * records + error * terms_O).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_record_of_factor_zero_is_not_read(kernels, bad):
    grad_BTO, input_BTD = torch.randn(5, 8, 6), torch.randn(5, 8, 9)
    factor_B = torch.tensor([1.0, 3.0, 0.0, 2.0, 5.0], dtype=torch.float64) * 100
    clean = sums(grad_BTO, input_BTD, factor_B)
    rows_BP = torch.randn(5, 33)
    clean_P = sums_of_rows(rows_BP, factor_B)
    grad_BTO[2], input_BTD[2, 3], rows_BP[2] = bad, bad, bad
    for one, other in zip(clean, sums(grad_BTO, input_BTD, factor_B), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(sums_of_rows(rows_BP, factor_B), clean_P) and clean_P.any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("records", [15, 16, 47, RecordSums.most_records])
def test_the_largest_numbers_that_are_promised_do_not_overflow(kernels, records, sign):
    """More records than an int32 holds, each with the most units that it may add."""
    ones_BT1 = torch.ones(records, 1, 1)
    factor_B = torch.full((records,), sign * native.LARGEST, dtype=torch.float64)
    weight_OD, bias_O = sums(ones_BT1, ones_BT1, factor_B)
    found_P = sums_of_rows(ones_BT1[:, 0], factor_B)
    assert weight_OD.item() == bias_O.item() == found_P.item() == sign * records * native.LARGEST


def test_a_total_of_five_bytes_is_exact_up_to_its_bound(kernels):
    """Added up by PyTorch and by the kernels, up and down through every carry."""
    total_P, exact_P = native.Total.zeros(5000), torch.zeros(5000, dtype=torch.int64)
    for _ in range(200):
        numbers_P = torch.randint(-(2**27), 2**27, (5000,))
        numbers_P += (exact_P.sign() + (exact_P == 0)) * 2**31 * (exact_P.abs() < 2**38)
        total_P.add(numbers_P)
        exact_P += numbers_P
        rows_BP = torch.randint(-(2**20), 2**20, (3, 5000))
        native.add_rows(rows_BP.float(), torch.ones(3, dtype=torch.float64), out_P=total_P)
        exact_P += rows_BP.sum(0)
        assert torch.equal(total_P.whole(), exact_P)
    assert int(exact_P.abs().max()) > 2**37
    assert numbers_P.any()  # it was read, not used up
    for number in (native.Total.MOST - 1, 1 - native.Total.MOST):
        total_P = native.Total.zeros(1)
        total_P.add(torch.tensor([number]))
        assert total_P.whole().item() == number


def test_rows_are_rounded_one_by_one(kernels):
    rows_BP = torch.randn(40, 700) * 10
    factor_B = torch.rand(40, dtype=torch.float64)
    factor_B[7] = 0.0
    rounded_BP = (factor_B[:, None] * rows_BP.double()).float().round().double()
    assert torch.equal(sums_of_rows(rows_BP, factor_B), rounded_BP.sum(0))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_no_bit(kernels, threads):
    grad_BTO, input_BTD = torch.randn(33, 16, 130), torch.randn(33, 16, 64)
    factor_B = torch.rand(33, dtype=torch.float64) * 1000

    def everything():
        norms = native.norms(grad_BTO, input_BTD, bias=True, floor=0.0, gamma=1.0, own=1.0)
        rows_P = sums_of_rows(grad_BTO.flatten(1), factor_B)
        return *sums(grad_BTO, input_BTD, factor_B), norms, rows_P

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(threads)
        for one, other in zip(alone, everything(), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("left", ORDERS)
@pytest.mark.parametrize("right", ORDERS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_norms_are_those_of_float64_within_their_bound(kernels, left, right, sizes, bias):
    records, tokens, width, out_width = sizes
    grad_BTO, input_BTD = in_order(left, records, tokens, out_width), in_order(right, *sizes[:3])
    length = native.product_roundings(out_width) + native.product_roundings(width)
    gamma = 1.1 * length * 2.0**-24
    found_4B = native.norms(grad_BTO, input_BTD, bias=bias, floor=0.0, gamma=gamma, own=0.5)
    wide = grad_BTO.double(), input_BTD.double()
    exact_B = torch.einsum("bto,btd->bod", *wide).square().sum((1, 2))
    exact_B += bias * wide[0].sum(1).square().sum(1)
    lengths = wide[0].norm(dim=2), (wide[1].square().sum(2) + bias).sqrt()
    absolute_B = (lengths[0] * lengths[1]).sum(1).square()
    torch.testing.assert_close(found_4B[2], absolute_B, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found_4B[1], gamma * found_4B[2])
    torch.testing.assert_close(found_4B[3], 0.25 * found_4B[2])
    assert ((found_4B[0] - exact_B).abs() <= found_4B[1]).all()
    given_BTT = (wide[1] @ wide[1].mT).float()
    again_4B = native.norms(
        grad_BTO, None, input_BTT=given_BTT, bias=bias, floor=0.0, gamma=gamma, own=0.5
    )
    torch.testing.assert_close(again_4B, found_4B, rtol=1e-5, atol=float(found_4B[1].max()))


def test_what_is_not_finite_stays_in_its_record(kernels):
    grad_BTO, input_BTD = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    grad_BTO[1, 2, 3] = float("nan")
    found_4B = native.norms(grad_BTO, input_BTD, bias=True, floor=0.0, gamma=1.0, own=1.0)
    assert found_4B[:, [0, 2]].isfinite().all() and found_4B[:, 1].isnan().all()


def test_numbers_below_the_normal_ones_count_though_the_process_flushes_them(kernels):
    """As PyTorch may be told to; afterwards it is as it was told."""
    tiny = torch.full((1, 1, 1), 2.0**-130)
    factor_B = torch.tensor([2.0**130 * 1000], dtype=torch.float64)
    torch.set_flush_denormal(True)
    try:
        weight_OD, _ = sums(tiny, torch.ones(1, 1, 1), factor_B, bias=False)
        assert (tiny * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert weight_OD.item() == 1000.0


@pytest.mark.parametrize("missing", ["processor", "file", "function", "version"])
def test_without_kernels_nothing_is_served(missing, monkeypatch, tmp_path):
    if missing == "processor":
        monkeypatch.setattr(native, "_processor", lambda: "DEFAULT")
    elif missing == "file":
        monkeypatch.setattr(native, "_KERNELS", {native._processor(): "_records_elsewhere"})
    elif missing == "version":  # kernels that an earlier source left behind
        monkeypatch.setattr(native, "_LAYOUT", native._LAYOUT + 1)
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda path: object())
    native._library.cache_clear()
    try:
        assert not native.serves(torch.device("cpu"))
        assert native.name() == "no compiled kernels"
    finally:
        native._library.cache_clear()


@pytest.mark.parametrize("left", ORDERS)
@pytest.mark.parametrize("right", ORDERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_of_records_are_those_of_float64(kernels, left, right, sizes):
    records, tokens, _, out_width = sizes
    grad_BTO, input_BTD = in_order(left, records, tokens, out_width), in_order(right, *sizes[:3])
    found_BODA, square_B = native.products(grad_BTO, input_BTD, native.straight(tokens))
    exact_BOD = grad_BTO.double().mT @ input_BTD.double()
    terms_BOD = grad_BTO.double().abs().mT @ input_BTD.double().abs()
    error = 1.1 * native.sum_roundings(tokens) * 2.0**-24
    assert ((found_BODA[..., 0] - exact_BOD).abs() <= error * terms_BOD).all()
    torch.testing.assert_close(square_B, found_BODA.double().square().sum((1, 2, 3)))
