"""Both libraries give the same products, of operands in every order that the engine has."""

import subprocess
import sys

import pytest
import torch

from dpldm_dist.privacy import blas


@pytest.fixture(params=["OpenBLAS", "PyTorch"])
def library(request, monkeypatch):
    if request.param == "OpenBLAS" and blas._openblas() is None:
        pytest.skip("scipy-openblas64 has no build for this system")
    if request.param == "PyTorch":
        monkeypatch.setattr(blas, "_openblas", lambda: None)
    return request.param


def in_order(order: str, records: int, tokens: int, width: int) -> torch.Tensor:
    """(records, tokens, width) of random numbers that lie in memory as ``order`` says."""
    if order == "by token":
        return torch.randn(records, tokens, width)
    if order == "by channel":
        return torch.randn(records, width, tokens).mT
    if order == "a part of wider rows":
        return torch.randn(records, tokens, width + 3)[:, :, 2:-1]
    return torch.randn(records, tokens, 2 * width)[:, :, ::2]  # "with gaps"


ORDERS = ["by token", "by channel", "a part of wider rows", "with gaps"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 16, 5), (5, 4, 64)])
def test_gram_matrices_equal_those_of_float64(library, order, sizes):
    rows_BTD = in_order(order, *sizes)
    exact_BTT = rows_BTD.double() @ rows_BTD.double().mT
    out_BTT = torch.full(exact_BTT.shape, float("nan"))
    blas.gram(rows_BTD, out_BTT=out_BTT)
    torch.testing.assert_close(out_BTT.double(), exact_BTT, rtol=1e-5, atol=1e-5)
    blas.gram(rows_BTD, out_BTT=out_BTT, add=True)
    torch.testing.assert_close(out_BTT.double(), 2 * exact_BTT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left", ORDERS)
@pytest.mark.parametrize("right", ORDERS)
def test_products_of_records_equal_those_of_float64(library, left, right):
    left_BTO, right_BTD = in_order(left, 3, 16, 5), in_order(right, 3, 16, 7)
    found_BOD = blas.products(left_BTO, right_BTD).double()
    torch.testing.assert_close(
        found_BOD, left_BTO.double().mT @ right_BTD.double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_sum_over_tokens_is_that_of_float64_and_is_added(library, order):
    left_NO, right_ND = (in_order(order, 1, 40, width)[0].double() for width in (6, 9))
    exact_OD = left_NO.T @ right_ND
    out_OD = torch.full((6, 9), float("nan"), dtype=torch.float64)
    blas.product(left_NO, right_ND, out_OD=out_OD)
    torch.testing.assert_close(out_OD, exact_OD, rtol=1e-14, atol=1e-14)
    blas.product(left_NO, right_ND, out_OD=out_OD, add=True)
    torch.testing.assert_close(out_OD, 2 * exact_OD, rtol=1e-14, atol=1e-14)


def test_a_product_does_not_depend_on_its_place_in_the_batch(library):
    rows_BTD = torch.randn(9, 16, 33)
    rows_BTD[:] = rows_BTD[4]
    out_BTT = torch.empty(9, 16, 16)
    blas.gram(rows_BTD, out_BTT=out_BTT)
    assert (out_BTT == out_BTT[0]).all()
    products_BDD = blas.products(rows_BTD, rows_BTD)
    assert (products_BDD == products_BDD[0]).all()


def test_what_is_not_finite_stays_in_its_record(library):
    rows_BTD = torch.randn(3, 4, 5)
    rows_BTD[1] = float("nan")
    out_BTT = torch.empty(3, 4, 4)
    blas.gram(rows_BTD, out_BTT=out_BTT)
    assert out_BTT[[0, 2]].isfinite().all() and out_BTT[1].isnan().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: blas.gram(torch.ones(2, 3, 4), out_BTT=torch.ones(2, 4, 4)),
        lambda: blas.products(torch.ones(2, 3, 4), torch.ones(2, 4, 4)),
        lambda: blas.product(
            torch.ones(3, 4).double(), torch.ones(2, 5).double(), out_OD=torch.ones(4, 5).double()
        ),
        lambda: blas.product(
            torch.ones(3, 4).double(), torch.ones(3, 5).double(), out_OD=torch.ones(5, 4).double()
        ),
    ],
)
def test_sizes_that_do_not_match_are_refused(library, call):
    with pytest.raises((ValueError, RuntimeError)):
        call()


CHOICE = """
import os, numpy
from dpldm_dist.privacy import blas
before = os.environ.get("OPENBLAS_CORETYPE")
print(blas.name())
assert os.environ.get("OPENBLAS_CORETYPE") == before
"""


@pytest.mark.parametrize("asked", [None, "Haswell"])
def test_the_processor_decides_on_the_kernels_unless_the_user_does(asked, monkeypatch):
    if blas._openblas() is None or blas._processor() is None:
        pytest.skip("OpenBLAS has no kernels to choose from here")
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    if asked is not None:
        monkeypatch.setenv("OPENBLAS_CORETYPE", asked)
    done = subprocess.run([sys.executable, "-c", CHOICE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"({asked or 'SkylakeX'})" in done.stdout
