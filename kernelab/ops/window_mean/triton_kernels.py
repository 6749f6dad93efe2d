"""Triton kernels of ``window_mean``. README.md has the mathematics and the reasons of the design.

The keys are cut into blocks. A block that lies in the windows of all rows of a tile counts as one row, the sum of its
rows; others are multiplied with a matrix of 0 and 1. Every offset that grows with the rows is an int64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_rows(
    x_ptr, before_ptr, row, row_mask, feature, feature_mask, stride_row, HAS_BEFORE: tl.constexpr
):  # fmt: skip
    """Rows times ``before``, [rows, BLOCK_D] in float32; what is in a row whose factor is 0 does not matter."""
    mask = row_mask[:, None] & feature_mask[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_row + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BEFORE:
        factor = tl.load(before_ptr + row, mask=row_mask, other=0.0)
        x = tl.where(factor[:, None] == 0.0, 0.0, x * factor[:, None])
    return x


@triton.jit
def _window_mean_sums_kernel(
    x_ptr, before_ptr, sums_ptr, rows, D, heads,
    stride_xb, stride_xh, stride_xn, stride_bb, stride_bh,
    HAS_BEFORE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of the rows of a block, [batch heads, blocks, D]."""
    blocks = tl.cdiv(rows, BLOCK_N)
    pair, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    batch, head = pair // heads, pair % heads
    row = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x_ptr += batch * stride_xb + head * stride_xh
    if HAS_BEFORE:
        before_ptr += batch * stride_bb + head * stride_bh
    x = _load_rows(x_ptr, before_ptr, row, row < rows, feature, feature < D, stride_xn, HAS_BEFORE)
    tl.store(sums_ptr + (pair * blocks + block) * D + feature, tl.sum(x, axis=0), mask=feature < D)


@triton.jit
def _add_seen(
    total, x_ptr, before_ptr, block, start, end, rows, feature, feature_mask, stride_row,
    HAS_BEFORE: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``total`` [BLOCK_N, BLOCK_D] plus the rows of a block that lie in the windows."""
    first, key = block * BLOCK_N, tl.arange(0, BLOCK_N)
    row, row_mask = (first + key).to(tl.int64), key < rows - first
    x = _load_rows(x_ptr, before_ptr, row, row_mask, feature, feature_mask, stride_row, HAS_BEFORE)
    # in 32 bits, from the first key of the block on
    from_key, to_key = tl.maximum(start - first, 0).to(tl.int32), tl.minimum(end - first, BLOCK_N).to(tl.int32)
    seen = (key[None, :] >= from_key[:, None]) & (key[None, :] < to_key[:, None])
    dtype = x_ptr.dtype.element_ty
    return tl.dot(seen.to(dtype), x.to(dtype), total, input_precision=PRECISION)


@triton.jit
def _window_mean_kernel(
    x_ptr, before_ptr, after_ptr, sums_ptr, reach_ptr, documents_ptr, y_ptr, rows, D, heads,
    stride_xb, stride_xh, stride_xn, stride_bb, stride_bh, stride_ab, stride_ah, stride_doc,
    HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ``after`` times the sums of ``before x`` over the windows."""
    blocks = tl.cdiv(rows, BLOCK_N)
    pair, tile = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    batch, head = pair // heads, pair % heads
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_mask, feature_mask = row < rows, feature < D
    x_ptr += batch * stride_xb + head * stride_xh
    if HAS_BEFORE:
        before_ptr += batch * stride_bb + head * stride_bh

    start = tl.maximum(row - tl.load(reach_ptr + head), 0)
    end = tl.minimum(row + tl.load(reach_ptr + heads + head) + 1, rows)
    if HAS_DOCUMENTS:
        start = tl.maximum(start, tl.load(documents_ptr + row, mask=row_mask, other=0))
        end = tl.minimum(end, tl.load(documents_ptr + stride_doc + row, mask=row_mask, other=0))
    first = tl.min(tl.where(row_mask, start, rows)) // BLOCK_N
    last = tl.cdiv(tl.max(tl.where(row_mask, end, 0)), BLOCK_N)
    whole_first, whole_last = last, last  # of the blocks that all windows hold
    if HAS_SUMS:
        latest = tl.cdiv(tl.max(tl.where(row_mask, start, 0)), BLOCK_N)
        earliest = tl.min(tl.where(row_mask, end, rows)) // BLOCK_N
        whole_first = tl.where(latest < earliest, latest, last)
        whole_last = tl.where(latest < earliest, earliest, last)

    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for block in range(first, whole_first):
        total = _add_seen(
            total, x_ptr, before_ptr, block, start, end, rows, feature, feature_mask, stride_xn,
            HAS_BEFORE, BLOCK_N, PRECISION,
        )  # fmt: skip
    for block in range(whole_last, last):
        total = _add_seen(
            total, x_ptr, before_ptr, block, start, end, rows, feature, feature_mask, stride_xn,
            HAS_BEFORE, BLOCK_N, PRECISION,
        )  # fmt: skip
    if HAS_SUMS:
        for next in range(whole_first, whole_last, BLOCK_S):
            whole = next + tl.arange(0, BLOCK_S)
            mask = (whole < whole_last)[:, None] & feature_mask[None, :]
            sums = tl.load(sums_ptr + (pair * blocks + whole)[:, None] * D + feature[None, :], mask=mask, other=0.0)
            total += tl.sum(sums, axis=0)[None, :]

    if HAS_AFTER:
        factor = tl.load(after_ptr + batch * stride_ab + head * stride_ah + row, mask=row_mask, other=0.0)
        total = tl.where(factor[:, None] == 0.0, 0.0, total * factor[:, None])
    y_ptrs = y_ptr + (pair * rows + row)[:, None] * D + feature[None, :]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & feature_mask[None, :])
