"""Triton kernels of the gradients of queries, keys and values of ``relative_attention``.

README.md has the mathematics and the design. ``ds`` is the gradient of a logit, in
natural units. Offsets in memory are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    add_spread,
    at,
    far_constants,
    load_row,
    load_rows,
    logits,
    near_block,
    power,
    product,
    segments,
    span,
    store_rows,
    terms,
)


@triton.jit(do_not_specialize=["queries"])
def _relative_attention_rows_kernel(
    query_ptr, query_table_ptr, value_table_ptr, bias_ptr, out_ptr, grad_out_ptr, peak_ptr, mass_ptr, rows_ptr,
    stride_qb, stride_qh, stride_qn, stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn,
    stride_ah, stride_ac, stride_wh, stride_wc, stride_bh,
    queries, heads, features, value_features, reach, scale,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What backward needs of each query: ``p = weight exp(z - exponent)`` and ``ds = p (dp - delta)``, where z and dp
    lack what depends on the query alone. rows [7, batch, heads, queries]: exponent of the near, the low and the high
    keys, delta of them, and the weight. It is 1 but in float32, where the logarithm of the mass would round too much.
    """
    blocks = tl.cdiv(queries, BLOCK)
    planes = tl.num_programs(0) // blocks
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    row = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    out_ptr += batch * stride_ob + head * stride_oh
    grad_out_ptr += batch * stride_gb + head * stride_gh
    out = load_rows(out_ptr, stride_on, row, queries, value_features, BLOCK_V).to(tl.float32)
    grad_out = load_rows(grad_out_ptr, stride_gn, row, queries, value_features, BLOCK_V)
    q = load_rows(query_ptr + batch * stride_qb + head * stride_qh, stride_qn, row, queries, features, BLOCK_D)
    low, high = far_constants(
        q,
        at(query_table_ptr, head * stride_ah),
        at(bias_ptr, head * stride_bh),
        stride_ac,
        features,
        reach,
        scale,
        UNIT,
    )
    low_dp, high_dp = far_constants(
        grad_out, at(value_table_ptr, head * stride_wh), None, stride_wc, value_features, reach, 1.0, UNIT
    )
    inside = row < queries
    exponent = tl.load(peak_ptr + batch_head * queries + row, mask=inside, other=0.0) * UNIT
    mass = tl.load(mass_ptr + batch_head * queries + row, mask=inside, other=0.0)
    if UNIT != 1.0:
        exponent += tl.log2(mass)
    exponent = tl.where(mass == 0.0, float("inf"), exponent)
    delta = tl.sum(out * grad_out.to(tl.float32), axis=1)
    rows_ptr += batch_head * queries + row
    step = planes.to(tl.int64) * queries
    tl.store(rows_ptr, exponent, mask=inside)
    tl.store(rows_ptr + step, exponent - low, mask=inside)
    tl.store(rows_ptr + 2 * step, exponent - high, mask=inside)
    tl.store(rows_ptr + 3 * step, delta, mask=inside)
    tl.store(rows_ptr + 4 * step, delta - low_dp, mask=inside)
    tl.store(rows_ptr + 5 * step, delta - high_dp, mask=inside)
    if UNIT == 1.0:
        tl.store(rows_ptr + 6 * step, 1.0 / tl.where(mass == 0.0, 1.0, mass), mask=inside)


@triton.jit
def _side_sums(low, high, values, distance, reach, SIDE: tl.constexpr):
    """Adds the sums of the values at distances <= -reach to ``low``, and those at distances >= reach > -reach to
    ``high``."""
    if SIDE == -1:
        low += tl.sum(values, axis=1)
    elif SIDE == 1:
        high += tl.sum(values, axis=1)
    else:
        low += tl.sum(tl.where(distance <= -reach, values, 0.0), axis=1)
        high += tl.sum(tl.where(distance >= tl.maximum(reach, 1), values, 0.0), axis=1)
    return low, high


@triton.jit
def _dq_of_keys(
    dq, ds_low, ds_high, p_low, p_high, q, grad_out, origin, exponent, delta, weight, first, end,
    step_first, step_end, low_end, high_first, high_end, key_ptr, value_ptr, column_ptr, mask_ptr,
    query_table_ptr, key_table_ptr, value_table_ptr, bias_ptr,
    stride_kn, stride_vn, stride_mn, stride_ac, stride_rc, stride_wc, keys, features, value_features, reach, scale,
    SIDE: tl.constexpr, NEED_QUERY: tl.constexpr, SUM_DS: tl.constexpr, SUM_P: tl.constexpr, CAUSAL: tl.constexpr,
    CONTENT: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Adds the part of some blocks of keys, all of one SIDE: -1 low, 1 high, 0 near."""
    NEAR: tl.constexpr = SIDE == 0
    for step in range(step_first, step_end):
        block = near_block(step, low_end, high_first, high_end) if NEAR else step
        start = block * BLOCK_N
        key = start + tl.arange(0, BLOCK_N)
        k = load_rows(key_ptr, stride_kn, key, keys, features, q.shape[1])
        vt = tl.trans(load_rows(value_ptr, stride_vn, key, keys, value_features, grad_out.shape[1]))
        z, lead = logits(
            q, tl.trans(k), origin, start, keys, first, end, query_table_ptr, key_table_ptr, bias_ptr, column_ptr,
            mask_ptr, stride_ac, stride_rc, stride_mn, reach, features, scale, 1, NEAR, CAUSAL, CONTENT, UNIT, BAND,
        )  # fmt: skip
        p = power(z - exponent[:, None], UNIT)
        if weight is not None:
            p *= weight[:, None]
        band_lead = start - origin - (q.shape[0] - 1)
        dp = product(grad_out, vt)
        if NEAR and value_table_ptr is not None:
            dp += terms(
                grad_out, vt, value_table_ptr, None, stride_wc, 0, band_lead, reach, value_features, 1, BAND
            )  # fmt: skip
        ds = p * (dp - delta[:, None])
        if SUM_DS:
            ds_low, ds_high = _side_sums(ds_low, ds_high, ds, lead, reach, SIDE)
        if SUM_P:
            p_low, p_high = _side_sums(p_low, p_high, p, lead, reach, SIDE)
        if NEED_QUERY:
            ds = ds.to(k.dtype)
            if CONTENT:
                dq = tl.dot(ds, k, dq, input_precision="ieee")
            if NEAR and query_table_ptr is not None:
                dq = add_spread(dq, ds, query_table_ptr, stride_ac, band_lead, reach, features, 1, BAND)
    return dq, ds_low, ds_high, p_low, p_high


@triton.jit(do_not_specialize=["queries", "keys", "offset"])
def _relative_attention_dq_kernel(
    query_ptr, key_ptr, value_ptr, query_table_ptr, key_table_ptr, value_table_ptr, bias_ptr, mask_ptr, documents_ptr,
    columns_ptr, rows_ptr, grad_out_ptr, dq_ptr, ds_sums_ptr, p_sums_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn,
    stride_ah, stride_ac, stride_rh, stride_rc, stride_wh, stride_wc, stride_bh, stride_mb, stride_mn,
    queries, keys, offset, heads, group, features, value_features, reach, scale,
    CAUSAL: tl.constexpr, CONTENT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries of one head, and its sums of ds and of p at the distances beyond reach."""
    blocks = tl.cdiv(queries, BLOCK_M)
    planes = (tl.num_programs(0) // blocks).to(tl.int64)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    batch, head = batch_head // heads, batch_head % heads
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    origin = block * BLOCK_M + offset
    inside = row < queries
    query_ptr += batch * stride_qb + head * stride_qh
    grad_out_ptr += batch * stride_gb + head * stride_gh
    key_ptr += batch * stride_kb + head // group * stride_kh
    value_ptr += batch * stride_vb + head // group * stride_vh
    query_table_ptr = at(query_table_ptr, head * stride_ah)
    key_table_ptr = at(key_table_ptr, head * stride_rh)
    value_table_ptr = at(value_table_ptr, head * stride_wh)
    bias_ptr = at(bias_ptr, head * stride_bh)
    mask_ptr = at(mask_ptr, batch * stride_mb)
    low_column_ptr = at(columns_ptr, batch_head * keys)
    high_column_ptr = at(columns_ptr, (planes + batch_head) * keys)
    rows_ptr += batch_head * queries + row
    NEED_QUERY: tl.constexpr = dq_ptr is not None
    SUM_DS: tl.constexpr = ds_sums_ptr is not None or (NEED_QUERY and query_table_ptr is not None)
    SUM_P: tl.constexpr = p_sums_ptr is not None

    q = load_rows(query_ptr, stride_qn, row, queries, features, BLOCK_D)
    grad_out = load_rows(grad_out_ptr, stride_gn, row, queries, value_features, BLOCK_V)
    first_key, last_key, first, end = span(documents_ptr, row, queries, keys)
    if CAUSAL:
        last_key = tl.minimum(last_key, tl.maximum(origin + BLOCK_M, 0))
    low_first, low_end, high_first, high_end, near = segments(
        origin, reach, tl.maximum(reach, 1), first_key, last_key, BLOCK_M, BLOCK_N
    )
    plane = planes * queries
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    ds_low = tl.zeros([BLOCK_M], tl.float32)
    ds_high, p_low, p_high = ds_low, ds_low, ds_low
    weight = tl.load(rows_ptr + 6 * plane, mask=inside, other=0.0) if UNIT == 1.0 else None
    exponent = tl.load(rows_ptr + plane, mask=inside, other=float("inf"))
    delta = tl.load(rows_ptr + 4 * plane, mask=inside, other=0.0)
    dq, ds_low, ds_high, p_low, p_high = _dq_of_keys(
        dq, ds_low, ds_high, p_low, p_high, q, grad_out, origin, exponent, delta, weight, first, end,
        low_first, low_end, 0, 0, 0, key_ptr, value_ptr, low_column_ptr, mask_ptr, None, None, None, None,
        stride_kn, stride_vn, stride_mn, 0, 0, 0, keys, features, value_features, reach, scale,
        -1, NEED_QUERY, SUM_DS, SUM_P, CAUSAL, CONTENT, UNIT, BLOCK_N, BAND,
    )  # fmt: skip
    if NEED_QUERY and query_table_ptr is not None:
        dq += ds_low[:, None] * load_row(query_table_ptr, features, BLOCK_D)[None, :]
    if not CAUSAL:
        exponent = tl.load(rows_ptr + 2 * plane, mask=inside, other=float("inf"))
        delta = tl.load(rows_ptr + 5 * plane, mask=inside, other=0.0)
        dq, ds_low, ds_high, p_low, p_high = _dq_of_keys(
            dq, ds_low, ds_high, p_low, p_high, q, grad_out, origin, exponent, delta, weight, first, end,
            high_first, high_end, 0, 0, 0, key_ptr, value_ptr, high_column_ptr, mask_ptr, None, None, None, None,
            stride_kn, stride_vn, stride_mn, 0, 0, 0, keys, features, value_features, reach, scale,
            1, NEED_QUERY, SUM_DS, SUM_P, CAUSAL, CONTENT, UNIT, BLOCK_N, BAND,
        )  # fmt: skip
        if NEED_QUERY and query_table_ptr is not None:
            last_row = load_row(query_table_ptr + 2 * reach * stride_ac, features, BLOCK_D)
            dq += ds_high[:, None] * last_row[None, :]
    exponent = tl.load(rows_ptr, mask=inside, other=float("inf"))
    delta = tl.load(rows_ptr + 3 * plane, mask=inside, other=0.0)
    dq, ds_low, ds_high, p_low, p_high = _dq_of_keys(
        dq, ds_low, ds_high, p_low, p_high, q, grad_out, origin, exponent, delta, weight, first, end,
        0, near, low_end, high_first, high_end, key_ptr, value_ptr, None, mask_ptr,
        query_table_ptr, key_table_ptr, value_table_ptr, bias_ptr,
        stride_kn, stride_vn, stride_mn, stride_ac, stride_rc, stride_wc, keys, features, value_features, reach, scale,
        0, NEED_QUERY, SUM_DS, SUM_P, CAUSAL, CONTENT, UNIT, BLOCK_N, BAND,
    )  # fmt: skip

    if NEED_QUERY:
        store_rows(dq_ptr + batch_head * queries * features, features, row, queries, features, dq * (scale / UNIT))
    if ds_sums_ptr is not None:
        tl.store(ds_sums_ptr + batch_head * queries + row, ds_low, mask=inside)
        tl.store(ds_sums_ptr + plane + batch_head * queries + row, ds_high, mask=inside)
    if p_sums_ptr is not None:
        tl.store(p_sums_ptr + batch_head * queries + row, p_low, mask=inside)
        tl.store(p_sums_ptr + plane + batch_head * queries + row, p_high, mask=inside)


@triton.jit
def _dkv_of_queries(
    dk, dv, ds_low, ds_high, k, v, origin, constant, first, end, exponent_ptr, delta_ptr, weight_ptr,
    step_first, step_end, low_end, high_first, high_end, query_ptr, grad_out_ptr,
    query_table_ptr, key_table_ptr, value_table_ptr, bias_ptr,
    stride_qn, stride_gn, stride_ac, stride_rc, stride_wc, queries, features, value_features, reach, scale,
    SIDE: tl.constexpr, NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr, SUM_DS: tl.constexpr, CAUSAL: tl.constexpr,
    CONTENT: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """Adds the part of some blocks of queries, all of one SIDE: -1 at low distances, 1 at high ones, 0 near."""
    NEAR: tl.constexpr = SIDE == 0
    for step in range(step_first, step_end):
        block = near_block(step, low_end, high_first, high_end) if NEAR else step
        start = block * BLOCK_M
        row = start + tl.arange(0, BLOCK_M)
        q = load_rows(query_ptr, stride_qn, row, queries, features, k.shape[1])
        grad_out = load_rows(grad_out_ptr, stride_gn, row, queries, value_features, v.shape[1])
        exponent = tl.load(exponent_ptr + row, mask=row < queries, other=float("inf"))
        z, lead = logits(
            k, tl.trans(q), origin, start, queries, first, end, key_table_ptr, query_table_ptr, bias_ptr, None, None,
            stride_rc, stride_ac, 0, reach, features, scale, -1, NEAR, CAUSAL, CONTENT, UNIT, BAND,
        )  # fmt: skip
        if constant is not None:
            z += constant[:, None]
        p = power(z - exponent[None, :], UNIT)  # [BLOCK_N, BLOCK_M]
        if weight_ptr is not None:
            p *= tl.load(weight_ptr + row, mask=row < queries, other=0.0)[None, :]
        if NEED_VALUE:
            dv = tl.dot(p.to(grad_out.dtype), grad_out, dv, input_precision="ieee")
        if NEED_KEY or SUM_DS:
            band_lead = start - origin - (k.shape[0] - 1)
            delta = tl.load(delta_ptr + row, mask=row < queries, other=0.0)
            dp = product(v, tl.trans(grad_out))
            if NEAR and value_table_ptr is not None:
                dp += terms(
                    v, tl.trans(grad_out), None, value_table_ptr, 0, stride_wc, band_lead, reach, value_features,
                    -1, BAND,
                )  # fmt: skip
            ds = p * (dp - delta[None, :])
            if SUM_DS:
                ds_low, ds_high = _side_sums(ds_low, ds_high, ds, -lead, reach, SIDE)
            if NEED_KEY:
                ds = ds.to(q.dtype)
                if CONTENT:
                    dk = tl.dot(ds, q, dk, input_precision="ieee")
                if NEAR and key_table_ptr is not None:
                    dk = add_spread(dk, ds, key_table_ptr, stride_rc, band_lead, reach, features, -1, BAND)
    return dk, dv, ds_low, ds_high


@triton.jit(do_not_specialize=["queries", "keys", "offset"])
def _relative_attention_dkv_kernel(
    query_ptr, key_ptr, value_ptr, query_table_ptr, key_table_ptr, value_table_ptr, bias_ptr, mask_ptr, documents_ptr,
    columns_ptr, rows_ptr, grad_out_ptr, dk_ptr, dv_ptr, ds_sums_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gn,
    stride_ah, stride_ac, stride_rh, stride_rc, stride_wh, stride_wc, stride_bh, stride_mb, stride_mn,
    queries, keys, offset, heads, group, features, value_features, reach, scale,
    CAUSAL: tl.constexpr, CONTENT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values of one of their heads, BLOCK_M of them, past BLOCK_N queries a step;
    and the sums of ds at the distances beyond reach, of each head of queries."""
    blocks = tl.cdiv(keys, BLOCK_M)
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    batch, key_head = batch_head // (heads // group), batch_head % (heads // group)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    origin = block * BLOCK_M - offset
    inside = row < keys
    planes = (tl.num_programs(0) // blocks).to(tl.int64) * group
    key_ptr += batch * stride_kb + key_head * stride_kh
    value_ptr += batch * stride_vb + key_head * stride_vh
    NEED_KEY: tl.constexpr = dk_ptr is not None
    NEED_VALUE: tl.constexpr = dv_ptr is not None
    SUM_DS: tl.constexpr = ds_sums_ptr is not None or (NEED_KEY and key_table_ptr is not None)

    k = load_rows(key_ptr, stride_kn, row, keys, features, BLOCK_D)
    v = load_rows(value_ptr, stride_vn, row, keys, value_features, BLOCK_V)
    first_query, last_query, first, end = span(documents_ptr, row, keys, queries)
    if CAUSAL:
        first_query = tl.maximum(first_query, origin)
    low_first, low_end, high_first, high_end, near = segments(
        origin, tl.maximum(reach, 1), reach, first_query, last_query, BLOCK_M, BLOCK_N
    )
    seen = inside
    if mask_ptr is not None:
        seen &= tl.load(mask_ptr + batch * stride_mb + row.to(tl.int64) * stride_mn, mask=inside, other=0) != 0

    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for member in range(group):
        head = key_head * group + member
        plane = batch * heads + head
        q_ptr = query_ptr + batch * stride_qb + head * stride_qh
        g_ptr = grad_out_ptr + batch * stride_gb + head * stride_gh
        a_ptr = at(query_table_ptr, head * stride_ah)
        r_ptr = at(key_table_ptr, head * stride_rh)
        w_ptr = at(value_table_ptr, head * stride_wh)
        b_ptr = at(bias_ptr, head * stride_bh)
        near_ptr = rows_ptr + plane * queries
        step = planes * queries
        weight_ptr = near_ptr + 6 * step if UNIT == 1.0 else None
        ds_low = tl.zeros([BLOCK_M], tl.float32)
        ds_high = ds_low
        constant = None if columns_ptr is None else tl.load(columns_ptr + plane * keys + row, mask=inside, other=0.0)
        dk, dv, ds_low, ds_high = _dkv_of_queries(
            dk, dv, ds_low, ds_high, k, v, origin, constant, first, end, near_ptr + step, near_ptr + 4 * step,
            weight_ptr, high_first, high_end, 0, 0, 0, q_ptr, g_ptr, None, None, None, None,
            stride_qn, stride_gn, 0, 0, 0, queries, features, value_features, reach, scale,
            -1, NEED_KEY, NEED_VALUE, SUM_DS, CAUSAL, CONTENT, UNIT, BLOCK_N, BAND,
        )  # fmt: skip
        if NEED_KEY and key_table_ptr is not None:
            dk += ds_low[:, None] * load_row(r_ptr, features, BLOCK_D)[None, :]
        if not CAUSAL:
            if columns_ptr is not None:
                constant = tl.load(columns_ptr + (planes + plane) * keys + row, mask=inside, other=0.0)
            dk, dv, ds_low, ds_high = _dkv_of_queries(
                dk, dv, ds_low, ds_high, k, v, origin, constant, first, end, near_ptr + 2 * step, near_ptr + 5 * step,
                weight_ptr, low_first, low_end, 0, 0, 0, q_ptr, g_ptr, None, None, None, None,
                stride_qn, stride_gn, 0, 0, 0, queries, features, value_features, reach, scale,
                1, NEED_KEY, NEED_VALUE, SUM_DS, CAUSAL, CONTENT, UNIT, BLOCK_N, BAND,
            )  # fmt: skip
            if NEED_KEY and key_table_ptr is not None:
                last_row = load_row(r_ptr + 2 * reach * stride_rc, features, BLOCK_D)
                dk += ds_high[:, None] * last_row[None, :]
        dk, dv, ds_low, ds_high = _dkv_of_queries(
            dk, dv, ds_low, ds_high, k, v, origin, None, first, end, near_ptr, near_ptr + 3 * step, weight_ptr,
            0, near, low_end, high_first, high_end, q_ptr, g_ptr, a_ptr, r_ptr, w_ptr, b_ptr,
            stride_qn, stride_gn, stride_ac, stride_rc, stride_wc, queries, features, value_features, reach, scale,
            0, NEED_KEY, NEED_VALUE, SUM_DS, CAUSAL, CONTENT, UNIT, BLOCK_N, BAND,
        )  # fmt: skip
        if ds_sums_ptr is not None:
            sums_ptr = ds_sums_ptr + plane * keys + row
            tl.store(sums_ptr, tl.where(seen, ds_low, 0.0), mask=inside)
            tl.store(sums_ptr + planes * keys, tl.where(seen, ds_high, 0.0), mask=inside)

    # what a hidden key would get stays in its row, and is cut here
    if NEED_KEY:
        dk = tl.where(seen[:, None], dk * (scale / UNIT), 0.0)
        store_rows(dk_ptr + batch_head * keys * features, features, row, keys, features, dk)
    if NEED_VALUE:
        dv = tl.where(seen[:, None], dv, 0.0)
        store_rows(dv_ptr + batch_head * keys * value_features, value_features, row, keys, value_features, dv)
