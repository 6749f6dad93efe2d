"""Triton kernels of the gradients of the tables of ``relative_attention``.

A program keeps rows of the tables, that is distances, and walks the queries: the tile of a block of queries is a band
of the scores, so that the sums over its pairs stay in registers. Each pair within reach belongs to one distance; those
beyond reach come as sums that the other kernels leave. README.md has the mathematics. Offsets in memory are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import fresh, load_rows, pick, power, product, store_rows


@triton.jit(do_not_specialize=["queries", "keys", "offset", "batch", "first_row", "end_row"])
def _relative_attention_tables_kernel(
    query_ptr, key_ptr, value_ptr, query_table_ptr, key_table_ptr, value_table_ptr, bias_ptr, mask_ptr, documents_ptr,
    rows_ptr, grad_out_ptr, query_part_ptr, key_part_ptr, value_part_ptr, bias_part_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn,
    stride_ah, stride_ac, stride_rh, stride_rc, stride_wh, stride_wc, stride_bh, stride_mb, stride_mn,
    queries, keys, offset, batch, heads, group, shared, features, value_features, reach, scale, first_row, end_row,
    CONTENT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A part of the gradients of the rows from ``first_row`` to ``end_row`` of tables that ``shared`` heads have in
    common: parts [parts, tables, rows, features]. BLOCK_M rows of the table past BLOCK_N queries a step."""
    blocks = tl.cdiv(end_row - first_row, BLOCK_M)
    tables = heads // shared
    block, table, part = (
        tl.program_id(0) % blocks,
        tl.program_id(0) // blocks % tables,
        tl.program_id(0) // blocks // tables,
    )
    parts = tl.num_programs(0) // blocks // tables
    local = tl.arange(0, BLOCK_M)
    row = first_row + block * BLOCK_M + local  # of the table
    distance = row - reach
    lowest = first_row + block * BLOCK_M - reach
    first_query = tl.maximum(-offset - lowest - (BLOCK_M - 1), 0) // BLOCK_N
    end_query = tl.cdiv(tl.maximum(tl.minimum(queries, keys - offset - lowest), 0), BLOCK_N)
    steps = tl.maximum(end_query - first_query, 0)
    items = steps * batch * shared
    share = tl.cdiv(items, parts)
    plane = batch.to(tl.int64) * heads * queries

    da = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dr = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dw = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    db = tl.zeros([BLOCK_M], tl.float32)
    for item in range(part * share, tl.minimum((part + 1) * share, items)):
        index = (item // steps).to(tl.int64)
        head, b = table * shared + index // batch, index % batch
        start = (first_query + item % steps) * BLOCK_N
        query = start + tl.arange(0, BLOCK_N)
        key = start + offset + lowest + tl.arange(0, BAND)
        still = tl.arange(0, BLOCK_N)[:, None]
        place = still + local[None, :] + fresh(item)  # of a pair's key in the band: [BLOCK_N, BLOCK_M]
        q = load_rows(query_ptr + b * stride_qb + head * stride_qh, stride_qn, query, queries, features, BLOCK_D)
        k = load_rows(key_ptr + b * stride_kb + head // group * stride_kh, stride_kn, key, keys, features, BLOCK_D)
        grad_out = load_rows(
            grad_out_ptr + b * stride_gb + head * stride_gh, stride_gn, query, queries, value_features, BLOCK_V
        )
        v = load_rows(
            value_ptr + b * stride_vb + head // group * stride_vh, stride_vn, key, keys, value_features, BLOCK_V
        )
        z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if CONTENT:
            z += pick(product(q, tl.trans(k)), still, place)
        if query_table_ptr is not None:
            a = load_rows(query_table_ptr + head * stride_ah, stride_ac, row, end_row, features, BLOCK_D)
            z += product(q, tl.trans(a))
        if key_table_ptr is not None:
            r = load_rows(key_table_ptr + head * stride_rh, stride_rc, row, end_row, features, BLOCK_D)
            z += pick(product(k, tl.trans(r)), place, local[None, :])
        z *= scale
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + head * stride_bh + row, mask=row < end_row, other=0.0)
            z += bias.to(tl.float32)[None, :] * UNIT
        rows = rows_ptr + (b * heads + head) * queries + query
        exponent = tl.load(rows, mask=query < queries, other=float("inf"))
        delta = tl.load(rows + 3 * plane, mask=query < queries, other=0.0)
        other = query[:, None] + (offset + distance)[None, :]
        seen = (other >= 0) & (other < keys) & (row < end_row)[None, :] & (query < queries)[:, None]
        if mask_ptr is not None:
            mask_ptrs = mask_ptr + b * stride_mb + other.to(tl.int64) * stride_mn
            seen &= tl.load(mask_ptrs, mask=seen, other=0) != 0
        if documents_ptr is not None:
            first = tl.load(documents_ptr + query, mask=query < queries, other=0)
            end = tl.load(documents_ptr + queries + query, mask=query < queries, other=0)
            seen &= (other >= first[:, None]) & (other < end[:, None])
        p = tl.where(seen, power(z - exponent[:, None], UNIT), 0.0)
        if UNIT == 1.0:
            p *= tl.load(rows + 6 * plane, mask=query < queries, other=0.0)[:, None]
        dp = pick(product(grad_out, tl.trans(v)), still, place)
        if value_table_ptr is not None:
            w = load_rows(value_table_ptr + head * stride_wh, stride_wc, row, end_row, value_features, BLOCK_V)
            dp += product(grad_out, tl.trans(w))
        if value_part_ptr is not None:
            dw = tl.dot(tl.trans(p.to(grad_out.dtype)), grad_out, dw, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        if bias_part_ptr is not None:
            db += tl.sum(ds, axis=0)
        ds = ds.to(q.dtype)
        if query_part_ptr is not None:
            da = tl.dot(tl.trans(ds), q, da, input_precision="ieee")
        if key_part_ptr is not None:
            by_key = tl.arange(0, BAND)[None, :] - local[:, None] + fresh(item)  # query of a distance and a key
            inside = (by_key >= 0) & (by_key < BLOCK_N)
            by_key = tl.where(inside, pick(ds, tl.where(inside, by_key, 0), local[:, None]), 0.0)
            dr = tl.dot(by_key.to(k.dtype), k, dr, input_precision="ieee")

    place = (part * tables + table).to(tl.int64) * (end_row - first_row)
    count, row = end_row - first_row, row - first_row
    if query_part_ptr is not None:
        store_rows(query_part_ptr + place * features, features, row, count, features, da * (scale / UNIT))
    if key_part_ptr is not None:
        store_rows(key_part_ptr + place * features, features, row, count, features, dr * (scale / UNIT))
    if value_part_ptr is not None:
        store_rows(value_part_ptr + place * value_features, value_features, row, count, value_features, dw)
    if bias_part_ptr is not None:
        tl.store(bias_part_ptr + place + row, db, mask=row < count)


@triton.jit(do_not_specialize=["rows", "batch"])
def _relative_attention_end_rows_kernel(
    x_ptr, sums_ptr, part_ptr, stride_xb, stride_xh, stride_xn, rows, batch, heads, group, features, scale,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``scale`` times the sum over batch and rows of ``sums x``, for the two ends of a table: sums [2, batch, heads,
    rows], parts [parts, heads, 2, features]."""
    head, part = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads
    parts = tl.num_programs(0) // heads
    blocks = tl.cdiv(rows, BLOCK)
    share = tl.cdiv(blocks * batch, parts)
    low = tl.zeros([BLOCK_D], tl.float32)
    high = tl.zeros([BLOCK_D], tl.float32)
    for item in range(part * share, tl.minimum((part + 1) * share, blocks * batch)):
        b = (item // blocks).to(tl.int64)
        row = item % blocks * BLOCK + tl.arange(0, BLOCK)
        x = load_rows(x_ptr + b * stride_xb + head // group * stride_xh, stride_xn, row, rows, features, BLOCK_D)
        sums_ptrs = sums_ptr + (b * heads + head) * rows + row
        low_sums = tl.load(sums_ptrs, mask=row < rows, other=0.0)
        high_sums = tl.load(sums_ptrs + batch.to(tl.int64) * heads * rows, mask=row < rows, other=0.0)
        low += tl.sum(low_sums[:, None] * x.to(tl.float32), axis=0)
        high += tl.sum(high_sums[:, None] * x.to(tl.float32), axis=0)
    feature = tl.arange(0, BLOCK_D)
    part_ptr += (part * heads + head) * 2 * features + feature
    tl.store(part_ptr, low * scale, mask=feature < features)
    tl.store(part_ptr + features, high * scale, mask=feature < features)
