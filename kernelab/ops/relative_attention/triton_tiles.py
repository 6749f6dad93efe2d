"""What the Triton kernels of ``relative_attention`` share: tiles, and how terms of the distance enter and leave them.

A program keeps some rows of one side (still) and walks the blocks of the other (moving): keys past queries, or, for
the gradients of the keys, queries past keys. ``lead = moving - still - shift`` is the distance of key and query, or
minus it where SIGN is -1. Terms of the distance need the rows of a table for the STILL + MOVING - 1 leads of a tile,
its band: element ``moving - still + STILL - 1`` of it belongs to a pair. A product with the band is a skew away from a
tile.

Logits are multiplied by UNIT: by 1 / log 2 for 16-bit inputs, since exp2 costs an operation less than exp; by 1 for
float32, where the roundings of lse from one unit to the other would be the largest of all.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # the peak of nothing; finite, so that nothing minus nothing is no NaN


@triton.jit
def at(ptr, offset):
    """``ptr + offset``, or None."""
    if ptr is None:
        return None
    else:
        return ptr + offset


@triton.jit
def power(x, UNIT: tl.constexpr):
    return tl.exp(x) if UNIT == 1.0 else tl.exp2(x)


@triton.jit
def load_rows(ptr, stride, row, rows, features, BLOCK: tl.constexpr):
    """Rows ``row`` of a matrix [rows, features], zero outside: [len(row), BLOCK]."""
    feature = tl.arange(0, BLOCK)
    mask = ((row >= 0) & (row < rows))[:, None] & (feature < features)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + feature[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, stride, row, rows, features, values):
    """Rows ``row`` of a matrix [rows, features]."""
    feature = tl.arange(0, values.shape[1])
    mask = (row < rows)[:, None] & (feature < features)[None, :]
    pointers = ptr + row.to(tl.int64)[:, None] * stride + feature[None, :]
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_row(ptr, features, BLOCK: tl.constexpr):
    """One row in float32: [BLOCK]."""
    feature = tl.arange(0, BLOCK)
    return tl.load(ptr + feature, mask=feature < features, other=0.0).to(tl.float32)


@triton.jit
def load_band(ptr, stride, lead, reach, features, SIGN: tl.constexpr, BAND: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a table for the leads ``lead, lead + 1, ...``: [BAND, BLOCK]."""
    row = table_row(SIGN * (lead + tl.arange(0, BAND)), reach)
    return load_rows(ptr, stride, row, 2 * reach + 1, features, BLOCK)


@triton.jit
def table_row(distance, reach):
    return reach + tl.minimum(tl.maximum(distance, -reach), reach)


@triton.jit
def fresh(step):
    """0, in a way that is not seen outside a loop: addresses of a skew that are kept from step to step cost more
    registers than there are."""
    return tl.where(step == -2147483648, 1, 0)


@triton.jit
def pick(source, row, column):
    """Elements (row, column) of a matrix, for indices that broadcast to a tile.

    In one dimension, since ``tl.gather`` then goes through shared memory: in two it becomes a storm of shuffles.
    """
    tile = row * source.shape[1] + column
    flat = tl.gather(tl.reshape(source, [source.numel]), tl.reshape(tile, [tile.numel]), 0)
    return tl.reshape(flat, tile.shape)


@triton.jit
def terms(
    still, moving, still_table_ptr, moving_table_ptr, stride_still, stride_moving, lead, reach, features,
    SIGN: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """``still . still_table[c] + moving . moving_table[c]`` of a tile whose band begins at ``lead``: [STILL, MOVING].

    still [STILL, D], moving [D, MOVING]; a table may be None.
    """
    STILL: tl.constexpr = still.shape[0]
    MOVING: tl.constexpr = moving.shape[1]
    D: tl.constexpr = still.shape[1]
    row, column = tl.arange(0, STILL)[:, None], tl.arange(0, MOVING)[None, :]
    place = column - row + (STILL - 1) + fresh(lead)
    total = tl.zeros([STILL, MOVING], tl.float32)
    if still_table_ptr is not None:
        band = load_band(still_table_ptr, stride_still, lead, reach, features, SIGN, BAND, D)
        total += pick(product(still, tl.trans(band)), row, place)
    if moving_table_ptr is not None:
        band = load_band(moving_table_ptr, stride_moving, lead, reach, features, SIGN, BAND, D)
        total += pick(product(band, moving), place, column)
    return total


@triton.jit
def add_spread(total, tile, table_ptr, stride, lead, reach, features, SIGN: tl.constexpr, BAND: tl.constexpr):
    """``total`` [STILL, D] plus the sum over moving of ``tile table[c]`` of a tile whose band begins at ``lead``."""
    STILL: tl.constexpr = tile.shape[0]
    MOVING: tl.constexpr = tile.shape[1]
    row = tl.arange(0, STILL)[:, None]
    column = tl.arange(0, BAND)[None, :] + row - (STILL - 1) + fresh(lead)
    inside = (column >= 0) & (column < MOVING)
    by_lead = tl.where(inside, pick(tile, row, tl.where(inside, column, 0)), 0.0)  # [STILL, BAND]
    band = load_band(table_ptr, stride, lead, reach, features, SIGN, BAND, total.shape[1])
    return tl.dot(by_lead.to(band.dtype), band, total, input_precision="ieee")


@triton.jit
def logits(
    still, moving, origin, start, rows, first, end, still_table_ptr, moving_table_ptr, bias_ptr, constant_ptr, mask_ptr,
    stride_still, stride_moving, stride_mask, reach, features, scale,
    SIGN: tl.constexpr, NEAR: tl.constexpr, CAUSAL: tl.constexpr, CONTENT: tl.constexpr, UNIT: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """``(z, lead)``: logits and leads of a tile [STILL, MOVING]; -inf where a pair does not see each other.

    The moving rows begin at ``start``, of ``rows``, and the still ones at ``origin`` of that side. Far tiles lack what
    depends on the still row alone, and have of the moving row what ``constant_ptr`` says.
    """
    STILL: tl.constexpr = still.shape[0]
    MOVING: tl.constexpr = moving.shape[1]
    row = start + tl.arange(0, MOVING)
    lead = row[None, :] - (origin + tl.arange(0, STILL))[:, None]
    z = product(still, moving) if CONTENT else tl.zeros([STILL, MOVING], tl.float32)
    if NEAR:
        z += terms(
            still, moving, still_table_ptr, moving_table_ptr, stride_still, stride_moving, start - origin - (STILL - 1),
            reach, features, SIGN, BAND,
        )  # fmt: skip
    z *= scale
    if NEAR:
        if bias_ptr is not None:
            z += tl.load(bias_ptr + table_row(SIGN * lead, reach)).to(tl.float32) * UNIT
        hidden = (row >= rows)[None, :]
        if CAUSAL:
            hidden |= SIGN * lead > 0
        z = tl.where(hidden, float("-inf"), z)
    elif constant_ptr is not None:
        z += tl.load(constant_ptr + row)[None, :]
    if first is not None:
        z = tl.where((row[None, :] < first[:, None]) | (row[None, :] >= end[:, None]), float("-inf"), z)
    if mask_ptr is not None:
        seen = tl.load(mask_ptr + row.to(tl.int64) * stride_mask, mask=row < rows, other=0)
        z = tl.where((seen == 0)[None, :], float("-inf"), z)
    return z, lead


@triton.jit
def product(a, b):
    """``a b`` in float32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def segments(origin, low, high, first, end, STILL: tl.constexpr, MOVING: tl.constexpr):
    """Cuts the blocks of the moving side from ``first`` to ``end`` at the leads of a still block that begins at
    ``origin`` on the moving side: ``(low_first, low_end, high_first, high_end, near)``.

    From low_first to low_end every lead is <= -low, from high_first to high_end >= high, and these blocks are whole;
    ``near_block`` counts the ``near`` others.
    """
    whole, blocks = end // MOVING, tl.cdiv(end, MOVING)
    low_first = tl.minimum(first // MOVING, blocks)
    low_end = tl.maximum(origin - low + 1, 0) // MOVING
    low_end = tl.maximum(tl.minimum(low_end, whole), low_first)
    high_first = tl.cdiv(tl.maximum(origin + STILL - 1 + high, 0), MOVING)
    high_first = tl.minimum(tl.maximum(high_first, low_end), blocks)
    high_end = tl.maximum(whole, high_first)
    return low_first, low_end, high_first, high_end, high_first - low_end + blocks - high_end


@triton.jit
def near_block(step, low_end, high_first, high_end):
    block = low_end + step
    return tl.where(block < high_first, block, block + high_end - high_first)


@triton.jit
def far_constants(x, table_ptr, bias_ptr, stride, features, reach, scale, UNIT: tl.constexpr):
    """What the far pairs of the rows of ``x`` [N, D] have in common: at distances <= -reach, and at those >= reach."""
    low = tl.zeros([x.shape[0]], tl.float32)
    high = tl.zeros([x.shape[0]], tl.float32)
    if table_ptr is not None:
        wide = x.to(tl.float32)
        low += tl.sum(wide * load_row(table_ptr, features, x.shape[1])[None, :], axis=1) * scale
        high += tl.sum(wide * load_row(table_ptr + 2 * reach * stride, features, x.shape[1])[None, :], axis=1) * scale
    if bias_ptr is not None:
        low += tl.load(bias_ptr).to(tl.float32) * UNIT
        high += tl.load(bias_ptr + 2 * reach).to(tl.float32) * UNIT
    return low, high


@triton.jit
def span(documents_ptr, row, rows, others):
    """Where the other side of some rows begins and ends: of all of them, and of each or None."""
    if documents_ptr is None:
        return 0, others, None, None
    else:
        first = tl.load(documents_ptr + row, mask=row < rows, other=2147483647)
        end = tl.load(documents_ptr + rows + row, mask=row < rows, other=0)
        return tl.min(first, axis=0), tl.max(end, axis=0), first, end
