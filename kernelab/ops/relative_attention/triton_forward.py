"""Triton kernels of the forward of ``relative_attention``. README.md has the mathematics and the design.

Offsets in memory are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    LOWEST,
    add_spread,
    at,
    far_constants,
    load_row,
    load_rows,
    logits,
    near_block,
    power,
    segments,
    span,
    store_rows,
)


@triton.jit(do_not_specialize=["rows"])
def _relative_attention_columns_kernel(
    x_ptr, table_ptr, out_ptr, stride_xb, stride_xh, stride_xn, stride_th, stride_tc, rows, heads, group, features,
    reach, scale, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``scale x . table[0]`` and ``scale x . table[2K]``: out [2, batch, heads, rows]."""
    blocks = tl.cdiv(rows, BLOCK)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    head = batch_head % heads
    row = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += batch_head // heads * stride_xb + head // group * stride_xh
    x = load_rows(x_ptr, stride_xn, row, rows, features, BLOCK_D).to(tl.float32)
    for side in tl.static_range(2):
        end = load_row(table_ptr + head * stride_th + side * 2 * reach * stride_tc, features, BLOCK_D)
        out_ptrs = out_ptr + (side * (tl.num_programs(0) // blocks) + batch_head) * rows + row
        tl.store(out_ptrs, tl.sum(x * end[None, :], axis=1) * scale, mask=row < rows)


@triton.jit
def _attend(
    total, mass, peak, q, origin, constant, first, end, step_first, step_end, low_end, high_first, high_end,
    key_ptr, value_ptr, column_ptr, mask_ptr, query_table_ptr, key_table_ptr, value_table_ptr, bias_ptr,
    stride_kn, stride_vn, stride_mn, stride_ac, stride_rc, stride_wc, keys, features, value_features, reach, scale,
    NEAR: tl.constexpr, CAUSAL: tl.constexpr, CONTENT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BAND: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds blocks of keys to the softmax of the rows of ``q``: ``total`` [BLOCK_M, BLOCK_V] and ``mass`` [BLOCK_M],
    times ``exp(-peak)``. Logits of far keys are those of the content, plus a constant of the row and one of the key."""
    for step in range(step_first, step_end):
        block = near_block(step, low_end, high_first, high_end) if NEAR else step
        start = block * BLOCK_N
        key = start + tl.arange(0, BLOCK_N)
        kt = tl.trans(load_rows(key_ptr, stride_kn, key, keys, features, q.shape[1]))  # [D, BLOCK_N]
        z, _ = logits(
            q, kt, origin, start, keys, first, end, query_table_ptr, key_table_ptr, bias_ptr, column_ptr, mask_ptr,
            stride_ac, stride_rc, stride_mn, reach, features, scale, 1, NEAR, CAUSAL, CONTENT, UNIT, BAND,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(z, axis=1) + constant)
        p = power(z - (new_peak - constant)[:, None], UNIT)
        fade = power(peak - new_peak, UNIT)
        peak = new_peak
        mass = mass * fade + tl.sum(p, axis=1)
        v = load_rows(value_ptr, stride_vn, key, keys, value_features, BLOCK_V)
        p = p.to(v.dtype)
        total = tl.dot(p, v, total * fade[:, None], input_precision="ieee")
        if NEAR and value_table_ptr is not None:
            lead = start - origin - (q.shape[0] - 1)
            total = add_spread(total, p, value_table_ptr, stride_wc, lead, reach, value_features, 1, BAND)
    return total, mass, peak


@triton.jit(do_not_specialize=["queries", "keys", "offset"])
def _relative_attention_forward_kernel(
    query_ptr, key_ptr, value_ptr, query_table_ptr, key_table_ptr, value_table_ptr, bias_ptr, mask_ptr, documents_ptr,
    columns_ptr, out_ptr, peak_ptr, mass_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ah, stride_ac, stride_rh, stride_rc, stride_wh, stride_wc, stride_bh, stride_mb, stride_mn,
    queries, keys, offset, heads, group, features, value_features, reach, scale,
    CAUSAL: tl.constexpr, CONTENT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Results of one block of queries of one head."""
    blocks = tl.cdiv(queries, BLOCK_M)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    batch, head = batch_head // heads, batch_head % heads
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    origin = block * BLOCK_M + offset
    query_ptr += batch * stride_qb + head * stride_qh
    key_ptr += batch * stride_kb + head // group * stride_kh
    value_ptr += batch * stride_vb + head // group * stride_vh
    query_table_ptr = at(query_table_ptr, head * stride_ah)
    key_table_ptr = at(key_table_ptr, head * stride_rh)
    value_table_ptr = at(value_table_ptr, head * stride_wh)
    bias_ptr = at(bias_ptr, head * stride_bh)
    mask_ptr = at(mask_ptr, batch * stride_mb)
    low_column_ptr = at(columns_ptr, batch_head * keys)
    high_column_ptr = at(columns_ptr, (tl.num_programs(0) // blocks + batch_head) * keys)

    q = load_rows(query_ptr, stride_qn, row, queries, features, BLOCK_D)
    low, high = far_constants(q, query_table_ptr, bias_ptr, stride_ac, features, reach, scale, UNIT)
    first_key, last_key, first, end = span(documents_ptr, row, queries, keys)
    if CAUSAL:
        last_key = tl.minimum(last_key, tl.maximum(origin + BLOCK_M, 0))
    low_first, low_end, high_first, high_end, near = segments(
        origin, reach, tl.maximum(reach, 1), first_key, last_key, BLOCK_M, BLOCK_N
    )

    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total, mass, peak = _attend(
        total, mass, peak, q, origin, low, first, end, low_first, low_end, 0, 0, 0,
        key_ptr, value_ptr, low_column_ptr, mask_ptr, None, None, None, None,
        stride_kn, stride_vn, stride_mn, 0, 0, 0, keys, features, value_features, reach, scale,
        False, CAUSAL, CONTENT, UNIT, BLOCK_N, BAND, BLOCK_V,
    )  # fmt: skip
    if value_table_ptr is not None:
        total += mass[:, None] * load_row(value_table_ptr, value_features, BLOCK_V)[None, :]
    if not CAUSAL:
        low_peak = peak
        total, high_mass, peak = _attend(
            total, tl.zeros([BLOCK_M], tl.float32), peak, q, origin, high, first, end, high_first, high_end, 0, 0, 0,
            key_ptr, value_ptr, high_column_ptr, mask_ptr, None, None, None, None,
            stride_kn, stride_vn, stride_mn, 0, 0, 0, keys, features, value_features, reach, scale,
            False, CAUSAL, CONTENT, UNIT, BLOCK_N, BAND, BLOCK_V,
        )  # fmt: skip
        mass = mass * power(low_peak - peak, UNIT) + high_mass
        if value_table_ptr is not None:
            last_row = load_row(value_table_ptr + 2 * reach * stride_wc, value_features, BLOCK_V)
            total += high_mass[:, None] * last_row[None, :]
    total, mass, peak = _attend(
        total, mass, peak, q, origin, tl.zeros([BLOCK_M], tl.float32), first, end, 0, near, low_end, high_first,
        high_end, key_ptr, value_ptr, None, mask_ptr, query_table_ptr, key_table_ptr, value_table_ptr, bias_ptr,
        stride_kn, stride_vn, stride_mn, stride_ac, stride_rc, stride_wc, keys, features, value_features, reach, scale,
        True, CAUSAL, CONTENT, UNIT, BLOCK_N, BAND, BLOCK_V,
    )  # fmt: skip

    empty = mass == 0.0
    store_rows(
        out_ptr + batch_head * queries * value_features, value_features, row, queries, value_features,
        total / tl.where(empty, 1.0, mass)[:, None],
    )  # fmt: skip
    place = batch_head * queries + row
    tl.store(peak_ptr + place, tl.where(empty, 0.0, peak / UNIT), mask=row < queries)
    tl.store(mass_ptr + place, mass, mask=row < queries)
