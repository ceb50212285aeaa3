"""The table of class rows: what is learned, folded, dropped, and where private classes start."""

from __future__ import annotations

import pytest
import torch

from dpldm_dist.errors import DataError
from dpldm_dist.models.conditioning import ClassEmbedder, private_rows, random_rows


def learned(grad_scale: float) -> ClassEmbedder:
    embedder = ClassEmbedder(random_rows(4, 2, 8, seed=0), grad_scale=grad_scale)
    torch.nn.init.normal_(embedder.delta.weight, generator=torch.Generator().manual_seed(1))
    return embedder


def test_rows_start_as_given_and_the_null_row_is_last():
    rows = random_rows(4, 2, 8, seed=0)
    embedder = ClassEmbedder(rows, grad_scale=10.0)
    assert embedder.null_label == 3
    assert torch.equal(embedder(torch.tensor([3, 0])), rows[[3, 0]])


def test_the_scale_multiplies_the_gradient_and_only_the_delta_learns():
    gradient = {}
    for scale in (1.0, 10.0):
        embedder = ClassEmbedder(random_rows(4, 2, 8, seed=0), grad_scale=scale)
        assert [name for name, _ in embedder.named_parameters()] == ["delta.weight"]
        embedder(torch.tensor([1, 1, 2])).square().sum().backward()
        gradient[scale] = embedder.delta.weight.grad
    assert torch.allclose(gradient[10.0], 10 * gradient[1.0], rtol=1e-6)
    assert gradient[1.0][0].abs().sum() == 0


@pytest.mark.parametrize("grad_scale", [1.0, 10.0])
def test_folding_keeps_the_table_and_empties_the_delta(grad_scale):
    embedder, labels = learned(grad_scale), torch.arange(4)
    before = embedder(labels).detach()
    assert torch.equal(embedder.rows(), before)
    embedder.fold_()
    assert torch.equal(embedder(labels), before)
    assert embedder.delta.weight.abs().sum() == 0


def test_dropped_rows_become_null_for_labels_and_for_context():
    embedder, dropped = learned(2.0), torch.tensor([True, False, True])
    labels = embedder.drop(torch.tensor([0, 1, 2]), dropped)
    assert labels.tolist() == [3, 1, 3]
    context = embedder.drop(embedder(torch.tensor([0, 1, 2])), dropped)
    assert torch.equal(context, embedder(labels))


@pytest.mark.parametrize("kind", ["none", "caption"])
def test_without_classes_every_label_means_the_null_row(kind):
    rows = random_rows(1, 2, 8, seed=0)
    embedder = ClassEmbedder(rows, kind=kind)
    assert torch.equal(embedder(torch.tensor([0, 7, 3])), rows.expand(3, -1, -1))


def test_a_label_beyond_the_table_is_an_error():
    with pytest.raises(IndexError):
        ClassEmbedder(random_rows(4, 1, 8, seed=0))(torch.tensor([4]))


def test_a_table_of_the_wrong_form_is_refused():
    with pytest.raises(DataError, match="one row"):
        ClassEmbedder(random_rows(4, 1, 8, seed=0), kind="none")


def test_private_classes_start_from_distinct_public_rows():
    public = random_rows(27, 1, 8, seed=0)
    rows = private_rows(public, classes=10)
    assert torch.equal(rows[:10], public[:10])
    assert torch.equal(rows[10], public[26])


def test_more_private_than_public_classes_still_start_distinct():
    public = random_rows(3, 1, 8, seed=0)
    rows = private_rows(public, classes=7)
    assert rows.shape == (8, 1, 8)
    assert torch.equal(rows[7], public[2])
    assert torch.pdist(rows.flatten(1)).min() > 1e-2


def test_private_rows_of_an_unconditional_model_are_its_null_row():
    public = random_rows(1, 1, 8, seed=0)
    assert torch.equal(private_rows(public, classes=10, kind="none"), public)


def test_private_rows_need_a_public_table():
    with pytest.raises(DataError, match="pretrain"):
        private_rows(None, classes=10)
