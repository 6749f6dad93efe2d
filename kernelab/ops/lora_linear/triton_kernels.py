"""Triton kernels of ``lora_linear``: see README.md for the mathematics and the reasons of the design.

Rows come in tiles: entry ``t`` of the tile table is ``(row, end, adapter, slot)``, int64. The tile holds rows ``row`` to
``end`` of the whole input, all of one adapter (-1: off); ``slot`` is the place of its first row in tensors that hold only
rows with an adapter. ``factors`` is A or B of every adapter in use, a tuple of pointers, and ``ranks`` their ranks;
``width`` is the largest rank. A is [rank, features] (``RANK_FIRST``), B is [features, rank].
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernelab._core.philox import STREAM_DROPOUT

_STREAM = tl.constexpr(STREAM_DROPOUT)


@triton.jit
def _read_tile(tiles_ptr, tile):
    entry = tiles_ptr + 4 * tile
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _select(values, index):
    """``values[index]``, for a tuple and an index known at run time."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def _factor_offsets(features, r, rank, size, RANK_FIRST: tl.constexpr):
    """Offsets of ``[features, r]`` in A [rank, size] or B [size, rank]."""
    if RANK_FIRST:
        return r * size + features
    else:
        return features * rank + r


@triton.jit
def _dropout(u, rows, first_column, seed, threshold, BLOCK: tl.constexpr):
    """``u`` [rows, BLOCK], zero where the mask of kernelab._core.philox is: one Philox call for four columns."""
    groups = (first_column // 4 + tl.arange(0, BLOCK // 4)).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, groups[None, :], rows.to(tl.int32)[:, None], 0, _STREAM)  # [rows, BLOCK / 4]
    threshold = threshold.to(tl.uint32)
    even = tl.interleave((w0 >= threshold).to(tl.int8), (w2 >= threshold).to(tl.int8))
    odd = tl.interleave((w1 >= threshold).to(tl.int8), (w3 >= threshold).to(tl.int8))
    return tl.where(tl.interleave(even, odd) != 0, u, 0.0)


@triton.jit
def _adapter_term(
    t_ptr,
    factors,
    ranks,
    scalings,
    rows,
    end,
    adapter,
    slots,
    columns,
    N,
    width,
    first_column,
    seed,
    threshold,
    RANK_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``scaling * D(T F)`` of one tile, [BLOCK_M, BLOCK_N] in float32; T holds S or dS."""
    factor, rank = _select(factors, adapter), _select(ranks, adapter)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, rank, BLOCK_R, num_stages=1):
        r = start + tl.arange(0, BLOCK_R)
        t_mask = (rows[:, None] < end) & (r[None, :] < rank)
        t = tl.load(t_ptr + slots[:, None] * width + r[None, :], mask=t_mask, other=0.0)  # [BLOCK_M, BLOCK_R]
        offsets = _factor_offsets(columns[None, :], r[:, None], rank, N, RANK_FIRST)
        f_mask = (columns[None, :] < N) & (r[:, None] < rank)
        f = tl.load(factor + offsets, mask=f_mask, other=0.0)  # [BLOCK_R, BLOCK_N]
        total = tl.dot(t, f, total, input_precision="ieee")
    if DROPOUT:
        total = _dropout(total, rows, first_column, seed, threshold, BLOCK_N)
    return total * _select(scalings, adapter)


@triton.jit
def _lora_linear_main_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    t_ptr,
    factors,
    y_ptr,
    tiles_ptr,
    ranks,
    scalings,
    tiles,
    N,
    K,
    width,
    stride_x,
    stride_wn,
    stride_wk,
    seed: tl.int64,
    threshold: tl.int64,
    ADAPTERS: tl.constexpr,
    RANK_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x W^T + bias + scaling D(T F): forward with T = S, F = B^T; dx with x = dy, W = W^T, T = dS, F = A."""
    program = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * blocks_n)
    group_size = tl.minimum(tiles - group * GROUP_M, GROUP_M)
    tile = group * GROUP_M + program % (GROUP_M * blocks_n) % group_size
    first_column = program % (GROUP_M * blocks_n) // group_size * BLOCK_N

    row, end, adapter, slot = _read_tile(tiles_ptr, tile)
    rows = row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)

    # The adapter first: off tiles then run exactly the loop that a linear layer without adapters runs.
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if ADAPTERS:
        if adapter >= 0:
            slots = slot + tl.arange(0, BLOCK_M)
            total = _adapter_term(
                t_ptr, factors, ranks, scalings, rows, end, adapter, slots, columns, N, width, first_column, seed,
                threshold, RANK_FIRST, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip

    x_ptrs = x_ptr + rows[:, None] * stride_x + inner[None, :]
    w_ptrs = w_ptr + inner[:, None] * stride_wk + columns[None, :] * stride_wn
    x_mask, w_mask = rows[:, None] < end, columns[None, :] < N
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            x = tl.load(x_ptrs, mask=x_mask & (inner[None, :] < K - start), other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (inner[:, None] < K - start), other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk

    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * N + columns[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=x_mask & w_mask)
