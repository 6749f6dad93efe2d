"""Triton kernels of ``linear_logprob``. README.md has the mathematics and the reasons of the design.

``z = (hidden W^T + bias) / temperature`` of some rows and some classes is cut into tiles. A tile gives every row its
largest logit (peak), the sum of ``exp(z - peak)`` (mass) and that of ``exp(z - peak) (z - peak)`` (moment), all three
[tiles, rows] and without the target, which comes last. The shares ``exp(z - peak)`` themselves, times ``SCALE``, are
kept where a gradient follows, in rows of whole tiles, zero beyond the classes. Every offset that grows with the rows or
the classes is an int64. The number of rows is not specialised on, so that it compiles nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tuning import SCALE

_SCALE = tl.constexpr(SCALE)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The block of rows and the block of columns of this program. Programs walk down GROUP_M blocks of rows before they
    move one block of columns on, so that both operands stay in L2."""
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group, place = tl.program_id(0) // (GROUP_M * blocks_n), tl.program_id(0) % (GROUP_M * blocks_n)
    group_size = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + place % group_size, place // group_size


@triton.jit
def _add_product(
    total, a_ptrs, b_ptrs, a_mask, b_mask, size, step_a, step_b, EVEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``total`` [M, N] plus ``A B``, whose common dimension of ``size`` is walked in steps of BLOCK."""
    inner = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        if EVEN:
            a = tl.load(a_ptrs, mask=a_mask, other=0.0)  # [M, BLOCK]
            b = tl.load(b_ptrs, mask=b_mask, other=0.0)  # [BLOCK, N]
        else:
            a = tl.load(a_ptrs, mask=a_mask & (inner[None, :] < size - start), other=0.0)
            b = tl.load(b_ptrs, mask=b_mask & (inner[:, None] < size - start), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += step_a
        b_ptrs += step_b
    return total


@triton.jit
def _log1p(x):
    """``log(1 + x)`` to the precision of a small x from 0 to 1."""
    sum = 1.0 + x
    return tl.where(sum == 1.0, x, tl.log(sum) * (x / (sum - 1.0)))


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` to the precision of a small x, which is not above rounding errors of 0."""
    power = tl.exp(x)
    small = tl.where(power == 1.0, x, (power - 1.0) * (x / tl.log(power)))
    return tl.where(x < -0.5, power - 1.0, small)


@triton.jit(do_not_specialize=["rows", "stride_tile"])
def _linear_logprob_scores_kernel(
    hidden_ptr, weight_ptr, bias_ptr, target_ptr, peak_ptr, mass_ptr, moment_ptr, target_logit_ptr, share_ptr,
    rows, V, K, stride_hidden, stride_wv, stride_wk, stride_tile, stride_share, inverse_temperature,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Logits of one tile, reduced to its peak, mass and moment; the logit of the target; the shares."""
    block_m, tile = _place(rows, V, BLOCK_M, BLOCK_V, GROUP_M)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    first, column = tile * BLOCK_V, tl.arange(0, BLOCK_V)  # columns count from the first of the tile: a register less
    inner = tl.arange(0, BLOCK_K)
    row_mask, column_mask = row < rows, column < V - first
    hidden_ptrs = hidden_ptr + row[:, None] * stride_hidden + inner[None, :]
    weight_ptrs = weight_ptr + inner[:, None] * stride_wk + (first + column.to(tl.int64))[None, :] * stride_wv
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if bias_ptr is not None:  # first, since registers are short after the loop
        z += tl.load(bias_ptr + first + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    z = _add_product(
        z, hidden_ptrs, weight_ptrs, row_mask[:, None], column_mask[None, :],
        K, BLOCK_K, BLOCK_K * stride_wk, EVEN_K, BLOCK_K,
    )  # fmt: skip
    z *= inverse_temperature

    target = tl.load(target_ptr + row, mask=row_mask, other=-1) - first
    inside = row_mask & (target >= 0) & (target < tl.minimum(V - first, BLOCK_V))
    target_logit = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), axis=1)
    tl.store(target_logit_ptr + row, target_logit, mask=inside)

    z = tl.where(column_mask[None, :] & (column[None, :] != target[:, None]), z, float("-inf"))
    peak = tl.max(z, axis=1)
    part = tile.to(tl.int64) * stride_tile + row
    tl.store(peak_ptr + part, peak, mask=row_mask)
    # In units of log 2, of which one can be held beside the shares without a spill. A tile without another class than
    # the target has no mass.
    z = (z - tl.where(peak == float("-inf"), 0.0, peak)[:, None]) * _LOG2_E
    share = tl.exp2(z)
    if mass_ptr is not None:
        tl.store(mass_ptr + part, tl.sum(share, axis=1), mask=row_mask)
    if moment_ptr is not None:
        moment = tl.sum(tl.where(share == 0.0, 0.0, share * z), axis=1)
        tl.store(moment_ptr + part, moment / _LOG2_E, mask=row_mask)
    if share_ptr is not None:
        share_ptrs = share_ptr + first + row[:, None] * stride_share + column[None, :]
        tl.store(share_ptrs, (share * _SCALE).to(share_ptr.dtype.element_ty), mask=row_mask[:, None])


@triton.jit(do_not_specialize=["rows", "stride_tile"])
def _linear_logprob_combine_kernel(
    peak_ptr, mass_ptr, moment_ptr, target_ptr, target_logit_ptr, logprob_ptr, lse_ptr, rest_ptr, entropy_ptr,
    rows, V, tiles, stride_tile, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Tiles of all columns, in their order, to logprob, lse and entropy; NaN where the target is no column.

    ``rest`` is what float32 cannot hold of lse."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    row_mask = row < rows
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask = (tile[:, None] < tiles) & row_mask[None, :]
        peaks = tl.load(peak_ptr + tile[:, None] * stride_tile + row[None, :], mask=mask, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(peaks, axis=0))  # [BLOCK_T, BLOCK_M]
    mass = tl.zeros([BLOCK_M], tl.float32)
    spread = tl.zeros([BLOCK_M], tl.float32)  # mass times the mean of peak - z, a sum without cancellation
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask = (tile[:, None] < tiles) & row_mask[None, :]
        part = tile[:, None] * stride_tile + row[None, :]
        peaks = tl.load(peak_ptr + part, mask=mask, other=float("-inf"))
        below = peaks - peak[None, :]
        weight = tl.where(peaks == float("-inf"), 0.0, tl.exp(below))
        masses = tl.load(mass_ptr + part, mask=mask, other=0.0)
        mass += tl.sum(weight * masses, axis=0)
        if moment_ptr is not None:
            moments = tl.load(moment_ptr + part, mask=mask, other=0.0)
            spread -= tl.sum(tl.where(weight == 0.0, 0.0, weight * (moments + masses * below)), axis=0)
    target = tl.load(target_ptr + row, mask=row_mask, other=0)
    target_logit = tl.load(target_logit_ptr + row, mask=row_mask, other=0.0)
    log_mass = tl.log(mass)
    odds = (peak - target_logit) + log_mass  # log of (1 - p) / p
    odds = tl.where((target >= 0) & (target < V), odds, float("nan"))
    both = _log1p(tl.exp(-tl.abs(odds)))
    logprob = -(tl.maximum(odds, 0.0) + both)
    top = tl.where(odds > 0.0, peak, target_logit)
    above_top = tl.where(odds > 0.0, log_mass + both, both)
    lse = top + above_top
    tl.store(logprob_ptr + row, logprob, mask=row_mask)
    tl.store(lse_ptr + row, lse, mask=row_mask)
    if rest_ptr is not None:
        tl.store(rest_ptr + row, above_top - (lse - top), mask=row_mask)
    if moment_ptr is not None:
        above_peak = (top - peak) + above_top
        others = tl.where(mass == 0.0, 0.0, tl.exp(-above_peak) * (mass * above_peak + spread))
        of_target = tl.where(logprob == float("-inf"), 0.0, tl.exp(logprob) * logprob)
        tl.store(entropy_ptr + row, others - of_target, mask=row_mask)


@triton.jit(do_not_specialize=["rows", "stride_tile"])
def _linear_logprob_dz_kernel(
    dz_ptr, peak_ptr, lse_ptr, rest_ptr, target_ptr, logprob_ptr, entropy_ptr, grad_logprob_ptr, grad_entropy_ptr, rows,
    stride_dz, stride_tile, scale, factor, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """``dz = factor (grad_logprob ([v = target] - p) - grad_entropy p (log p + entropy))``.

    dz holds the shares, or p itself if there is no peak, divided by ``scale``.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    row_mask = row < rows
    shift = tl.zeros([BLOCK_M], tl.float32)
    if peak_ptr is not None:
        peak = tl.load(peak_ptr + tile.to(tl.int64) * stride_tile + row, mask=row_mask, other=0.0)
        shift = peak - tl.load(lse_ptr + row, mask=row_mask, other=0.0)
        if rest_ptr is not None:
            shift -= tl.load(rest_ptr + row, mask=row_mask, other=0.0)
    target = tl.load(target_ptr + row, mask=row_mask, other=-1)
    logprob = tl.load(logprob_ptr + row, mask=row_mask, other=0.0)
    hit = column[None, :] == target[:, None]
    dz_ptrs = dz_ptr + row[:, None] * stride_dz + column[None, :]
    share = tl.load(dz_ptrs, mask=row_mask[:, None], other=0.0).to(tl.float32) * scale  # [BLOCK_M, BLOCK_V]
    p = share * tl.exp(shift)[:, None]
    dz = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if grad_logprob_ptr is not None:
        grad = tl.load(grad_logprob_ptr + row, mask=row_mask, other=0.0)
        dz += grad[:, None] * tl.where(hit, -_expm1(logprob)[:, None], -p)
    if grad_entropy_ptr is not None:
        grad = tl.load(grad_entropy_ptr + row, mask=row_mask, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=row_mask, other=0.0)
        p = tl.where(hit, tl.exp(logprob)[:, None], p)
        log_p = tl.where(hit, logprob[:, None], tl.log(share) + shift[:, None])
        dz -= grad[:, None] * tl.where(p == 0.0, 0.0, p * (log_p + entropy[:, None]))
    tl.store(dz_ptrs, (dz * factor).to(dz_ptr.dtype.element_ty), mask=row_mask[:, None])


@triton.jit(do_not_specialize=["rows"])
def _linear_logprob_accumulate_kernel(
    dz_ptr, weight_ptr, total_ptr, rows, V, K, stride_dz, stride_wv, stride_wk,
    EVEN_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``total += dz W`` in float32, of the columns that dz has."""
    block_m, block_k = _place(rows, K, BLOCK_M, BLOCK_K, GROUP_M)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    k = block_k * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    inner = tl.arange(0, BLOCK_V)
    row_mask, k_mask = row[:, None] < rows, k[None, :] < K
    dz_ptrs = dz_ptr + row[:, None] * stride_dz + inner[None, :]
    weight_ptrs = weight_ptr + inner[:, None] * stride_wv + k[None, :] * stride_wk
    total_ptrs = total_ptr + row[:, None] * K + k[None, :]
    total = tl.load(total_ptrs, mask=row_mask & k_mask, other=0.0)
    total = _add_product(
        total, dz_ptrs, weight_ptrs, row_mask, k_mask, V, BLOCK_V, BLOCK_V * stride_wv, EVEN_V, BLOCK_V
    )  # fmt: skip
    tl.store(total_ptrs, total, mask=row_mask & k_mask)
