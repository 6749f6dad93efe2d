"""CPU: one base GEMM a segment, then the adapter's part in one pass of C++, or in torch where that is not built.

Rows that are off cost nothing extra.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelab._core import native, onednn
from kernelab._core.philox import dropout_threshold

from .reference import dropped, segments


def forward(x, weight, bias, base, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed):
    ranks = [a.shape[0] for a in lora_a]
    parts = list(segments(counts, adapters, keep))
    s_size = (sum(part.count for part in parts if part.kept >= 0), max(ranks, default=0))
    s = x.new_empty(s_size) if len(set(ranks)) <= 1 else x.new_zeros(s_size)
    y = x.new_empty(x.shape[0], base.shape[1] if weight is None else weight.shape[0])
    add = _add_native if _native_can(s_size[1]) else _add_torch
    for part in parts:
        if part.count == 0:
            continue
        x_g, y_g = x[part.rows], y[part.rows]
        if part.adapter < 0:
            y_g.copy_(base[part.rows]) if weight is None else _linear(x_g, weight, bias, y_g)
            continue
        base_g = base[part.rows] if weight is None else _linear_of_on_rows(x_g, weight, bias, y_g)
        a, b = lora_a[part.adapter], lora_b[part.adapter]
        s_g = s[part.kept_rows, : a.shape[0]] if part.kept >= 0 else None
        add(y_g, base_g, x_g, s_g, a, b, scaling[part.adapter], part.row, dropout_p, seed)
    return y, s


def backward(dy, x, s, weight, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed, need):
    whole = x.shape[0] == dy.shape[0]
    need_x, need_a, need_b = need[0], need[1 : 1 + len(lora_a)], need[1 + len(lora_a) :]
    dx = dy.new_empty(0, x.shape[1])
    if need_x and weight is None:
        dx = dy.new_zeros(dy.shape[0], x.shape[1])
    elif need_x:
        dx = onednn.linear(dy, weight.mT, None) if onednn.wins(dy, weight) else torch.mm(dy, weight)
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    da = [torch.zeros(a.shape, dtype=wide) if needed else None for a, needed in zip(lora_a, need_a, strict=True)]
    db = [torch.zeros(b.shape, dtype=wide) if needed else None for b, needed in zip(lora_b, need_b, strict=True)]
    add = _add_gradients_native if _native_can(max((a.shape[0] for a in lora_a), default=0)) else _add_gradients_torch
    for part in segments(counts, adapters, keep):
        adapter = part.adapter
        if adapter < 0 or part.count == 0:
            continue
        a, b = lora_a[adapter], lora_b[adapter]
        x_g = x[part.rows if whole else part.kept_rows] if need_a[adapter] else None
        s_g = s[part.kept_rows, : a.shape[0]] if need_b[adapter] else None
        dx_g = dx[part.rows] if need_x else None
        add(dx_g, da[adapter], db[adapter], dy[part.rows], x_g, s_g, a, b, scaling[adapter], part.row, dropout_p, seed)
    empty = dy.new_empty(0)
    return dx, *([empty if t is None else t.to(dy.dtype) for t in sums] for sums in (da, db))


def _native_can(rank: int) -> bool:
    return rank <= 256 and native.reason_missing() is None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``F.linear`` bit for bit, into ``out``."""
    return torch.mm(x, weight.mT, out=out) if bias is None else torch.addmm(bias, x, weight.mT, out=out)


def _linear_of_on_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """As ``F.linear`` within rounding, in ``out`` or in a new tensor."""
    return onednn.linear(x, weight, bias) if onednn.wins(x, weight) else _linear(x, weight, bias, out)


def _add_torch(y, base, x, s, a, b, scale, first_row, dropout_p, seed):
    """``y = base + scale S B^T`` with ``S = D(x) A^T``, which ``s`` (None: not wanted) keeps. ``base`` may be ``y``."""
    projection = dropped(x, first_row, dropout_p, seed) @ a.mT  # [m, r]
    torch.addmm(base, projection, b.mT, alpha=scale, out=y)
    if s is not None:
        s.copy_(projection)


def _add_gradients_torch(dx, da, db, dy, x, s, a, b, scale, first_row, dropout_p, seed):
    """``dS = scale dy B; dx += D(dS A); da += dS^T D(x); db += scale dy^T S``, those of them that are not None."""
    if db is not None:
        db.add_((s.mT @ dy).mT, alpha=scale)
    if dx is None and da is None:
        return
    ds = dy @ b  # [m, r], without the factor
    if da is not None:
        da.add_(ds.mT @ dropped(x, first_row, dropout_p, seed), alpha=scale)
    if dx is not None and dropout_p == 0.0:
        dx.addmm_(ds, a, alpha=scale)
    elif dx is not None:
        dx += dropped(scale * (ds @ a), first_row, dropout_p, seed)


def _add_native(y, base, x, s, a, b, scale, first_row, dropout_p, seed):
    _call(
        "forward",
        (native.row_major(x), native.row_major(base), y, s),
        (),
        x.shape[0],
        a,
        b,
        scale,
        first_row,
        dropout_p,
        seed,
    )


def _add_gradients_native(dx, da, db, dy, x, s, a, b, scale, first_row, dropout_p, seed):
    x = None if x is None else native.row_major(x)
    _call("backward", (native.row_major(dy), x, s, dx), (da, db), dy.shape[0], a, b, scale, first_row, dropout_p, seed)


def _call(phase, matrices, sums, rows, a, b, scale, first_row, dropout_p, seed):
    (rank, in_features), out_features = a.shape, b.shape[0]
    threads = max(1, min(torch.get_num_threads(), rows // 32))
    size = _padded(rank) * (_padded(in_features) + _padded(out_features)) * (threads + 1)
    work = torch.empty(size, dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)
    native.call(
        f"lora_{phase}_{str(a.dtype).removeprefix('torch.')}",
        *(value for t in matrices for value in ((0, 0) if t is None else (t, t.stride(0)))),
        *(0 if t is None else t for t in sums),
        native.row_major(a.contiguous()),
        native.row_major(b.contiguous()),
        *(rows, in_features, out_features, rank, scale, first_row),
        *(seed & (2**64 - 1), dropout_threshold(dropout_p), 1 - dropout_p, work, threads),
    )


def _padded(size: int) -> int:
    return (size + 15) // 16 * 16
