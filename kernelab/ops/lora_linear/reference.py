"""The definition of ``lora_linear`` in plain torch: differentiable, any floating dtype.

Rows ``g`` of a segment with adapter ``a`` (Hu et al. 2021, eq. 3, with dropout ``D``):

    y_g = x_g W^T + bias + c_a S_g B_a^T,   S_g = D(x_g) A_a^T                          forward
    dS_g = c_a dy_g B_a,   dx_g = dy_g W + D(dS_g A_a)                                  backward
    dA_a = sum_g dS_g^T D(x_g),   dB_a = sum_g c_a dy_g^T S_g

with ``D(u) = u * mask / (1 - p)``. Rows of a segment without adapter have the base terms alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelab._core.philox import dropout_mask


class Segment(NamedTuple):
    """``count`` consecutive rows from ``row`` that use one adapter (-1: none)."""

    row: int
    count: int
    adapter: int
    kept: int  # first row among the rows that are kept for backward (-1: not kept)

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)

    @property
    def kept_rows(self) -> slice:
        return slice(self.kept, self.kept + self.count)


def segments(counts, adapters, keep) -> Iterator[Segment]:
    """The segments in order. ``keep[a]``: adapter ``a`` trains, so its rows are kept for backward."""
    row = kept = 0
    for count, adapter in zip(counts, adapters, strict=True):
        keeps = adapter >= 0 and keep[adapter]
        yield Segment(row, count, adapter, kept if keeps else -1)
        row += count
        kept += count if keeps else 0


def dropped(u: Tensor, first_row: int, dropout_p: float, seed: int) -> Tensor:
    """``D(u)``, where ``u`` holds the rows from ``first_row`` of the whole input."""
    if dropout_p == 0.0:
        return u
    return u * dropout_mask(seed, dropout_p, first_row, u.shape[0], u.shape[1], u.device) / (1 - dropout_p)


def forward(x, weight, bias, base, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed):
    """``(y [M, N], S [kept rows, largest rank])``. Without ``weight`` the adapters are added to ``base`` [M, N]."""
    rank = max((a.shape[0] for a in lora_a), default=0)
    y, kept = [x.new_empty(0, base.shape[1] if weight is None else weight.shape[0])], [x.new_empty(0, rank)]
    for segment in segments(counts, adapters, keep):
        x_g = x[segment.rows]
        y_g = base[segment.rows] if weight is None else F.linear(x_g, weight, bias)
        if segment.adapter >= 0:
            s_g = F.linear(dropped(x_g, segment.row, dropout_p, seed), lora_a[segment.adapter])
            y_g = y_g + scaling[segment.adapter] * F.linear(s_g, lora_b[segment.adapter])
            if segment.kept >= 0:
                kept.append(F.pad(s_g, (0, rank - s_g.shape[1])))
        y.append(y_g)
    return torch.cat(y), torch.cat(kept)


def backward(dy, x, s, weight, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed, need):
    """``(dx [M, K], [dA], [dB])``; ``need`` says for x, every A, every B whether it is wanted, else it is empty.

    ``x`` holds all rows or the kept ones, ``s`` is what ``forward`` returned.
    """
    whole = x.shape[0] == dy.shape[0]
    need_x, need_a, need_b = need[0], need[1 : 1 + len(lora_a)], need[1 + len(lora_a) :]
    dx = [dy.new_empty(0, x.shape[1])]
    da = [torch.zeros_like(a) if needed else a.new_empty(0) for a, needed in zip(lora_a, need_a, strict=True)]
    db = [torch.zeros_like(b) if needed else b.new_empty(0) for b, needed in zip(lora_b, need_b, strict=True)]
    for segment in segments(counts, adapters, keep):
        dy_g, a = dy[segment.rows], segment.adapter
        ds_g = scaling[a] * dy_g @ lora_b[a] if a >= 0 else None
        if need_x:
            dx_g = dy_g @ weight if weight is not None else dy.new_zeros(segment.count, x.shape[1])
            dx.append(dx_g + dropped(ds_g @ lora_a[a], segment.row, dropout_p, seed) if a >= 0 else dx_g)
        if a >= 0 and need_a[a]:
            x_g = x[segment.rows if whole else segment.kept_rows]
            da[a] = da[a] + ds_g.mT @ dropped(x_g, segment.row, dropout_p, seed)
        if a >= 0 and need_b[a]:
            db[a] = db[a] + scaling[a] * dy_g.mT @ s[segment.kept_rows, : lora_a[a].shape[0]]
    return torch.cat(dx), da, db


def backward_of_kept(ds, dx_kept, x, lora_a, routing, rows, need_x):
    """``(dx, [dA], [dB])`` of cotangents of the kept ``S`` and ``x``, which exist in second derivatives only."""
    whole = x is not None and x.shape[0] == rows
    dx, da = [], [None] * len(lora_a)
    for segment in segments(routing.counts, routing.adapters, routing.keep):
        dx_g = lora_a[0].new_zeros(segment.count, lora_a[0].shape[1])
        if segment.kept >= 0:
            a = lora_a[segment.adapter]
            if dx_kept is not None:
                dx_g = dx_g + dx_kept[segment.kept_rows]
            if ds is not None:
                ds_g = ds[segment.kept_rows, : a.shape[0]]
                dx_g = dx_g + dropped(ds_g @ a, segment.row, routing.dropout_p, routing.seed)
                if x is not None:
                    x_g = dropped(
                        x[segment.rows if whole else segment.kept_rows], segment.row, routing.dropout_p, routing.seed
                    )
                    previous = da[segment.adapter]
                    da[segment.adapter] = ds_g.mT @ x_g if previous is None else previous + ds_g.mT @ x_g
        dx.append(dx_g)
    return torch.cat(dx) if need_x else None, da, [None] * len(lora_a)
