"""CPU: oneDNN GEMMs, one a segment, with the adapter accumulated in place; rows that are off cost nothing extra."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelab._core import native
from kernelab._core.philox import dropout_threshold

from . import reference
from .reference import segments


def forward(x, weight, bias, base, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed):
    rank = max((a.shape[0] for a in lora_a), default=0)
    parts = list(segments(counts, adapters, keep))
    s = x.new_zeros(sum(part.count for part in parts if part.kept >= 0), rank)
    y = _base(x, weight, bias, parts) if weight is not None else base.clone(memory_format=torch.contiguous_format)
    for part in parts:
        if part.adapter < 0 or part.count == 0:
            continue
        a, b = lora_a[part.adapter], lora_b[part.adapter]
        s_g = _dropped(x[part.rows], part.row, dropout_p, seed) @ a.mT  # [m, r]
        y[part.rows].addmm_(s_g, b.mT, alpha=scaling[part.adapter])
        if part.kept >= 0:
            s[part.kept_rows, : a.shape[0]] = s_g
    return y, s


def _base(x: Tensor, weight: Tensor, bias: Tensor | None, parts) -> Tensor:
    if len(parts) == 1:
        return F.linear(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for part in parts:
        if part.count == 0:
            continue
        if bias is None:
            torch.mm(x[part.rows], weight.mT, out=y[part.rows])
        else:
            torch.addmm(bias, x[part.rows], weight.mT, out=y[part.rows])
    return y


def backward(dy, x, s, weight, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed, need):
    whole = x.shape[0] == dy.shape[0]
    need_x, need_a, need_b = need[0], need[1 : 1 + len(lora_a)], need[1 + len(lora_a) :]
    dx = dy.new_empty(dy.shape[0] if need_x else 0, x.shape[1])
    if need_x:
        dx.zero_() if weight is None else torch.mm(dy, weight, out=dx)
    parts = [part for part in segments(counts, adapters, keep) if part.adapter >= 0 and part.count > 0]
    da, db = _Sums(lora_a, need_a), _Sums(lora_b, need_b)
    for part in parts:
        adapter = part.adapter
        dy_g = dy[part.rows]
        if need_b[adapter]:
            s_g = s[part.kept_rows, : lora_a[adapter].shape[0]]
            db.add(adapter, (s_g.mT @ dy_g).mT, scaling[adapter])
        if not (need_x or need_a[adapter]):
            continue
        ds_g = dy_g @ lora_b[adapter]  # [m, r], without the factor
        if need_a[adapter]:
            x_g = x[part.rows if whole else part.kept_rows]
            da.add(adapter, ds_g.mT @ _dropped(x_g, part.row, dropout_p, seed), scaling[adapter])
        if need_x and dropout_p == 0.0:
            dx[part.rows].addmm_(ds_g, lora_a[adapter], alpha=scaling[adapter])
        elif need_x:
            _add_dropped(dx[part.rows], scaling[adapter] * (ds_g @ lora_a[adapter]), part.row, dropout_p, seed)
    return dx, da.results(), db.results()


class _Sums:
    """One gradient an adapter, summed over its segments in their order; in float32 where a half type would round."""

    def __init__(self, like, need):
        self.like, self.need, self.sums = like, need, [None] * len(like)

    def add(self, adapter: int, term: Tensor, factor: float) -> None:
        wide = term if term.dtype == torch.float64 else term.float()
        previous = self.sums[adapter]
        self.sums[adapter] = wide * factor if previous is None else previous.add_(wide, alpha=factor)

    def results(self) -> list[Tensor]:
        return [
            t.new_empty(0) if not needed else torch.zeros_like(t) if total is None else total.to(t.dtype).contiguous()
            for t, needed, total in zip(self.like, self.need, self.sums, strict=True)
        ]


def _dropped(u: Tensor, first_row: int, dropout_p: float, seed: int) -> Tensor:
    """``D(u)``: the mask costs torch's integer arithmetic about ten times what the C++ loop takes."""
    if dropout_p == 0.0 or native.reason_missing():
        return reference.dropped(u, first_row, dropout_p, seed)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    _native_dropout(u.contiguous(), out, first_row, dropout_p, seed, accumulate=False)
    return out


def _add_dropped(total: Tensor, u: Tensor, first_row: int, dropout_p: float, seed: int) -> None:
    """``total += D(u)`` in place."""
    if native.reason_missing():
        total += reference.dropped(u, first_row, dropout_p, seed)
    else:
        _native_dropout(u, total, first_row, dropout_p, seed, accumulate=True)


def _native_dropout(u: Tensor, out: Tensor, first_row: int, dropout_p: float, seed: int, accumulate: bool) -> None:
    name = f"dropout_{str(u.dtype).removeprefix('torch.')}"
    key = seed & (2**64 - 1)
    sizes = (*u.shape, first_row, key, dropout_threshold(dropout_p), 1 - dropout_p, accumulate)
    native.call(name, u, u.stride(0), out, out.stride(0), *sizes)
