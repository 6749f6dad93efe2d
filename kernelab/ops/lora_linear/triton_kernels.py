"""Triton kernels of ``lora_linear``. README.md has the mathematics and the reasons of the design.

Rows come in tiles. Entry ``t`` of the tile table is ``(row, end, adapter, slot)``: rows ``row`` to ``end`` of the whole
input, all of one adapter (-1: off); ``slot`` is the place of the first of them in tensors that hold only rows with an
adapter. ``factors`` are the matrices A [rank, features] (``RANK_FIRST``) or B [features, rank] of the adapters in use
and ``ranks`` their ranks, as tuples; ``width`` is the largest rank. Every offset that grows with the rows is an int64.
Numbers that change from batch to batch are not specialised on, so that they compile nothing.
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
    """``values[index]`` of a tuple, for an index known at run time only."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def _factor_offsets(features, r, rank, size, RANK_FIRST: tl.constexpr):
    """Offsets of (features, r) in A [rank, size] or B [size, rank]."""
    if RANK_FIRST:
        return r * size + features
    else:
        return features * rank + r


@triton.jit
def _dropped(u, rows, first_column, seed, threshold, BLOCK: tl.constexpr):
    """``u`` [rows, BLOCK], zero where kernelab._core.philox.dropout_mask is False. A Philox call makes four columns."""
    group = (first_column // 4 + tl.arange(0, BLOCK // 4)).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, group[None, :], rows.to(tl.int32)[:, None], 0, _STREAM)  # [rows, BLOCK / 4]
    threshold = threshold.to(tl.uint32)
    even = tl.interleave((w0 >= threshold).to(tl.int8), (w2 >= threshold).to(tl.int8))
    odd = tl.interleave((w1 >= threshold).to(tl.int8), (w3 >= threshold).to(tl.int8))
    return tl.where(tl.interleave(even, odd) != 0, u, 0.0)


@triton.jit
def _adapter_term(
    t_ptr, factors, ranks, scalings, tile, columns, first_column, N, width, seed, threshold,
    RANK_FIRST: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``scaling * D(T F)`` of one tile [BLOCK_M, BLOCK_N] in float32: T is S or dS, F is B^T or A."""
    row, end, adapter, slot = tile
    rows, slots = row + tl.arange(0, BLOCK_M), slot + tl.arange(0, BLOCK_M)
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
        total = _dropped(total, rows, first_column, seed, threshold, BLOCK_N)
    return total * _select(scalings, adapter)


@triton.jit(do_not_specialize=["tiles"])
def _lora_linear_main_kernel(
    x_ptr, w_ptr, bias_ptr, t_ptr, factors, y_ptr, tiles_ptr, ranks, scalings,
    tiles, N, K, width, stride_x, stride_wn, stride_wk, seed: tl.int64, threshold: tl.int64,
    RANK_FIRST: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``y = scaling D(T F) + x W^T + bias``. Forward: T = S, F = B^T. dx: x = dy, W = W^T, T = dS, F = A."""
    # Programs walk down GROUP_M tiles before they move one block of columns on, so that x and W stay in L2.
    blocks_n = tl.cdiv(N, BLOCK_N)
    group, place = tl.program_id(0) // (GROUP_M * blocks_n), tl.program_id(0) % (GROUP_M * blocks_n)
    group_size = tl.minimum(tiles - group * GROUP_M, GROUP_M)
    tile = _read_tile(tiles_ptr, group * GROUP_M + place % group_size)
    row, end, adapter, _ = tile
    first_column = place // group_size * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    row_mask, column_mask = rows[:, None] < end, columns[None, :] < N

    # The adapter comes first: a tile that is off then runs exactly the loop of a linear layer without adapters.
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if len(factors) > 0:
        if adapter >= 0:
            total = _adapter_term(
                t_ptr, factors, ranks, scalings, tile, columns, first_column, N, width, seed, threshold,
                RANK_FIRST, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip

    x_ptrs = x_ptr + rows[:, None] * stride_x + inner[None, :]
    w_ptrs = w_ptr + inner[:, None] * stride_wk + columns[None, :] * stride_wn
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=row_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            w = tl.load(w_ptrs, mask=column_mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            x = tl.load(x_ptrs, mask=row_mask & (inner[None, :] < K - start), other=0.0)
            w = tl.load(w_ptrs, mask=column_mask & (inner[:, None] < K - start), other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk

    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * N + columns[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)


@triton.jit
def _lora_linear_expand_kernel(
    base_ptr, t_ptr, factors, y_ptr, tiles_ptr, ranks, scalings,
    N, width, stride_base, seed: tl.int64, threshold: tl.int64,
    RANK_FIRST: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``y = base + scaling D(T F)``, base 0 where there is none; y may be base itself."""
    tile = _read_tile(tiles_ptr, tl.program_id(0))
    row, end, adapter, _ = tile
    first_column = tl.program_id(1) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (rows[:, None] < end) & (columns[None, :] < N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if len(factors) > 0:
        if adapter >= 0:
            total = _adapter_term(
                t_ptr, factors, ranks, scalings, tile, columns, first_column, N, width, seed, threshold,
                RANK_FIRST, DROPOUT, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
    if base_ptr is not None:
        base_ptrs = base_ptr + rows[:, None] * stride_base + columns[None, :]
        total += tl.load(base_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lora_linear_shrink_kernel(
    x_ptr, factors, t_ptr, tiles_ptr, ranks, K, width, stride_x, factor, seed: tl.int64, threshold: tl.int64,
    RANK_FIRST: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``T = factor * D(x) F``. Forward: S = D(x) A^T. Backward: dS = dy B, without the scaling."""
    row, end, adapter, slot = _read_tile(tiles_ptr, tl.program_id(0))
    matrix, rank = _select(factors, adapter), _select(ranks, adapter)
    rows, slots = row + tl.arange(0, BLOCK_M), slot + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask, r_mask = rows[:, None] < end, r[None, :] < rank
    x_rows = x_ptr + rows[:, None] * stride_x
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        offsets = _factor_offsets(inner[:, None], r[None, :], rank, K, RANK_FIRST)
        if EVEN_K:
            x = tl.load(x_rows + inner[None, :], mask=row_mask, other=0.0)  # [BLOCK_M, BLOCK_K]
            f = tl.load(matrix + offsets, mask=r_mask, other=0.0)  # [BLOCK_K, BLOCK_R]
        else:
            x = tl.load(x_rows + inner[None, :], mask=row_mask & (inner[None, :] < K), other=0.0)
            f = tl.load(matrix + offsets, mask=r_mask & (inner[:, None] < K), other=0.0)
        if DROPOUT:
            x = _dropped(x, rows, start, seed, threshold, BLOCK_K)
        total = tl.dot(x, f, total, input_precision="ieee")
    t_ptrs = t_ptr + slots[:, None] * width + r[None, :]
    tl.store(t_ptrs, (total * factor).to(t_ptr.dtype.element_ty), mask=row_mask & (r[None, :] < width))


@triton.jit(do_not_specialize=["slots"])
def _lora_linear_gram_kernel(
    x_ptr, t_ptr, factors, partial_ptr, shrunk_ptr, tiles_ptr, ranks,
    slots, C, width, stride_x, seed: tl.int64, threshold: tl.int64,
    PACKED: tl.constexpr, RANK_FIRST: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums ``D(x)^T T`` of one tile of rows, for BLOCK_C of the C columns of x: [C, width] or [width, C].

    dB: x = dy, T = S. dA (``RANK_FIRST``): T = dS, and x may be packed to the rows of the slots. With ``factors`` (of
    B) the same read of dy also gives dS: ``shrunk[block of columns, slot] = x F`` is summed over the blocks later.
    """
    split, block = tl.program_id(0), tl.program_id(1)
    row, end, adapter, slot = _read_tile(tiles_ptr, split)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_mask = columns < C
    if shrunk_ptr is not None:
        matrix, rank = _select(factors, adapter), _select(ranks, adapter)
        f_mask = column_mask[:, None] & (r[None, :] < rank)
        f_offsets = _factor_offsets(columns[:, None], r[None, :], rank, C, False)
        f = tl.load(matrix + f_offsets, mask=f_mask, other=0.0)  # [BLOCK_C, BLOCK_R]
        shrunk_ptr += block.to(tl.int64) * slots * width
    if PACKED:
        x_ptr += slot * stride_x
    else:
        x_ptr += row * stride_x
    t_ptr += slot * width
    count = (end - row).to(tl.int32)
    total = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for start in range(0, count, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M).to(tl.int64)
        x_mask = (i[:, None] < count) & column_mask[None, :]
        t_mask = (i[:, None] < count) & (r[None, :] < width)
        x = tl.load(x_ptr + i[:, None] * stride_x + columns[None, :], mask=x_mask, other=0.0)  # [BLOCK_M, BLOCK_C]
        t = tl.load(t_ptr + i[:, None] * width + r[None, :], mask=t_mask, other=0.0)  # [BLOCK_M, BLOCK_R]
        if DROPOUT:
            x = _dropped(x, row + i, block * BLOCK_C, seed, threshold, BLOCK_C)
        total = tl.dot(tl.trans(x), t, total, input_precision="ieee")
        if shrunk_ptr is not None:
            shrunk = tl.dot(x, f, input_precision="ieee")  # [BLOCK_M, BLOCK_R]
            tl.store(shrunk_ptr + (slot + i[:, None]) * width + r[None, :], shrunk, mask=t_mask)
    partial_ptr += split.to(tl.int64) * C * width
    offsets = _factor_offsets(columns[:, None], r[None, :], width, C, RANK_FIRST)
    tl.store(partial_ptr + offsets, total, mask=column_mask[:, None] & (r[None, :] < width))


@triton.jit(do_not_specialize=["first", "count"])
def _lora_linear_reduce_kernel(
    partial_ptr, out_ptr, first, count, size, columns, stride, step, factor,
    BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``factor`` times the sum, in their order, of ``count`` partial sums from the ``first`` on.

    ``out`` has ``size`` elements in rows of ``columns``; a partial sum is ``step`` elements in rows of ``stride``.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    offsets = index // columns * stride + index % columns
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s[:, None] < count) & (index[None, :] < size)
        ptrs = partial_ptr + (first + s[:, None]).to(tl.int64) * step + offsets[None, :]
        total += tl.sum(tl.load(ptrs, mask=mask, other=0.0), axis=0)  # [BLOCK_S, BLOCK]
    tl.store(out_ptr + index, (total * factor).to(out_ptr.dtype.element_ty), mask=index < size)
