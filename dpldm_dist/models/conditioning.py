"""What steers the denoiser: a table of context tokens per class, or one null row.

Shapes: N rows of the table, T tokens, D width, R rows of a batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dpldm_dist.errors import DataError

Kind = Literal["class", "caption", "none"]


class ClassEmbedder(nn.Module):
    """Table of context tokens: one row per class and, last, the null row that means "no class".

    The table is ``base + grad_scale * delta``, with ``delta`` an embedding of zeros that alone is
    trained: a fixed linear change of variable by which the table's share of a clipped gradient is
    set. With kind "caption" the context of a row comes from outside and the table is the null row
    alone; with kind "none" it is the null row for every label.
    """

    def __init__(self, rows_NTD: Tensor, *, grad_scale: float = 1.0, kind: Kind = "class") -> None:
        super().__init__()
        if rows_NTD.dim() != 3 or (kind != "class" and len(rows_NTD) != 1):
            raise DataError(
                f"Conditioning rows of shape {tuple(rows_NTD.shape)} for kind {kind!r}: expected "
                "(classes + 1, tokens, width), and one row where there are no classes."
            )
        self.kind: Kind = kind
        self.grad_scale = float(grad_scale)
        self.rows_count, self.tokens, self.width = rows_NTD.shape
        self.register_buffer("base", rows_NTD.detach().clone().float())
        self.delta = nn.Embedding(self.rows_count, self.tokens * self.width)
        nn.init.zeros_(self.delta.weight)

    @property
    def null_label(self) -> int:
        """The label of the null row: the number of classes."""
        return self.rows_count - 1

    def forward(self, labels_R: Tensor) -> Tensor:
        """Context tokens (R, T, D) of labels in [0, classes]; without classes any label is null."""
        if self.kind != "class":
            labels_R = torch.zeros_like(labels_R)
        delta_RTD = self.delta(labels_R).unflatten(1, (self.tokens, self.width))
        return self.base[labels_R] + self.grad_scale * delta_RTD

    def rows(self) -> Tensor:
        """The table with what was learned folded in, (N, T, D), detached."""
        return (self.base + self.grad_scale * self.delta.weight.view_as(self.base)).detach().clone()

    @torch.no_grad()
    def fold_(self) -> None:
        """Make what was learned so far the new base; the function computed does not change."""
        self.base.copy_(self.rows())
        self.delta.weight.zero_()

    def drop(self, condition: Tensor, dropped_R: Tensor) -> Tensor:
        """``condition`` (labels (R,) or tokens (R, T, D)), null in the rows of ``dropped_R``."""
        if condition.dim() == 1:
            return torch.where(dropped_R, self.null_label, condition)
        null_TD = self(torch.full((1,), self.null_label, device=condition.device))[0]
        return torch.where(dropped_R[:, None, None], null_TD.to(condition), condition)


def random_rows(count: int, tokens: int, width: int, *, seed: int) -> Tensor:
    """Standard normal rows (count, tokens, width) from ``seed``: where pre-training starts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, tokens, width, generator=generator)


def private_rows(rows_NTD: Tensor | None, *, classes: int, kind: Kind = "class") -> Tensor:
    """The table with which private training starts: ``classes`` distinct rows, then the null row.

    Private class i starts from public row i: any distinct public rows will do, and equal rows learn
    badly. Where the public model has too few, its rows are used again with noise of a tenth of
    their size added. Kinds without classes keep their one null row.
    Raises: DataError if there is no table.
    """
    if rows_NTD is None:
        raise DataError("The public model has no class rows: run the pretrain stage first.")
    if kind != "class":
        return rows_NTD[-1:].clone()
    known = rows_NTD[:-1] if len(rows_NTD) > 1 else rows_NTD
    again = -(-classes // len(known))
    rows = known.repeat(again, 1, 1)[:classes]
    noise = random_rows(classes, rows.shape[1], rows.shape[2], seed=1) * rows.square().mean().sqrt()
    noise[: len(rows_NTD) - 1] = 0
    return torch.cat([rows + 0.1 * noise, rows_NTD[-1:]])
