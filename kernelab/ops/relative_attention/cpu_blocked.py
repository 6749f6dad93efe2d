"""``relative_attention`` on a CPU without the C++ extension: blocks of queries in torch.

A block's scores are [m, n] for m queries and the n keys that one of them may see. The keys before ``near`` are further
than -K from every query of the block, those behind it further than K: there a table adds its first or last row. In
``near`` a profile ``x_i . a_c`` over the ``m + n - 1`` distances of the block, [m, m + n - 1], holds the term of the
pair (i, j) at column ``j - i + m - 1``: a view whose rows begin one number earlier each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import no_gradient
from .reference import by_group, of_group, of_table, wide

ELEMENTS = 2**21  # of the scores of a block, where that leaves it MIN_ROWS rows
MIN_ROWS, MAX_ROWS = 16, 128


class _Block(NamedTuple):
    rows: slice  # of the queries
    keys: slice
    near: slice  # of the keys of the block
    lowest: int  # distance of the first near key from the last query

    def index(self, reach: int, device: torch.device) -> Tensor:
        """Rows of a table for the distances of ``near``, from the lowest: [m + n - 1]."""
        count = self.rows.stop - self.rows.start + self.near.stop - self.near.start - 1
        return torch.arange(self.lowest, self.lowest + count, device=device).clamp_(-reach, reach).add_(reach)


def forward(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    causal, content, query_offset, scale,
):  # fmt: skip
    attention = _Attention(
        query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
        causal, content, query_offset, scale,
    )  # fmt: skip
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    peak, mass = (attention.q.new_zeros(query.shape[:3]) for _ in range(2))
    for block in attention.blocks():
        scores = attention.scores(block)
        peaks = scores.amax(-1)
        peaks.masked_fill_(peaks == -math.inf, 0)  # of a query without keys
        share = scores.sub_(peaks[..., None]).exp_()
        peak[:, :, block.rows], mass[:, :, block.rows] = peaks, share.sum(-1)
        p = _of_mass(share, mass[:, :, block.rows])
        result = attention.of_keys(p, attention.v[:, :, block.keys])
        if attention.w is not None:
            result += _sum_of_rows(p, attention.w, block)
        out[:, :, block.rows] = result
    return out, peak, mass


def backward(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    out, peak, mass, grad_out, causal, content, query_offset, scale, need,
):  # fmt: skip
    inputs = query, key, value, query_table, key_table, value_table, bias
    attention = _Attention(*inputs, key_padding_mask, documents, causal, content, query_offset, scale)
    dq, dk, dv, da, dr, dw, db = (
        torch.zeros(t.shape, dtype=mass.dtype, device=t.device) if wanted else None
        for t, wanted in zip(inputs, need, strict=True)
    )
    q, k, v, a, r, w = (getattr(attention, name) for name in "qkvarw")
    for block in attention.blocks():
        rows, keys = block.rows, block.keys
        g = grad_out[:, :, rows].to(mass.dtype)
        p = _of_mass(attention.scores(block).sub_(peak[:, :, rows, None]).exp_(), mass[:, :, rows])
        dp = attention.of_pairs(g, v[:, :, keys])
        if w is not None:
            _add_rows(dp, g, w, block)
        ds = dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p)  # not g . out, which may be rounded
        if dv is not None:
            dv[:, :, keys] += attention.of_queries(p, g)
        if dw is not None:
            _add_row_gradients(dw, p, g, block)
        if db is not None:
            _add_bias_gradients(db, ds, block)
        ds *= scale
        if dq is not None:
            if content:
                dq[:, :, rows] = attention.of_keys(ds, k[:, :, keys])
            if a is not None:
                dq[:, :, rows] += _sum_of_rows(ds, a, block)
        if dk is not None:
            if content:
                dk[:, :, keys] += attention.of_queries(ds, q[:, :, rows])
            if r is not None:
                dk[:, :, keys] += of_group(_sum_of_rows_of_keys(ds, r, block), key)
        if da is not None:
            _add_row_gradients(da, ds, q[:, :, rows], block)
        if dr is not None:
            _add_row_gradients_of_keys(dr, ds, by_group(k[:, :, keys], query), block)
    return tuple(
        no_gradient(query) if grad is None else grad.to(tensor.dtype)
        for grad, tensor in zip((dq, dk, dv, da, dr, dw, db), inputs, strict=True)
    )


def _of_mass(share: Tensor, mass: Tensor) -> Tensor:
    """p, in place."""
    return share.div_(torch.where(mass > 0, mass, 1)[..., None])


class _Attention:
    """The inputs in the dtype of scores, and the scores of a block."""

    def __init__(
        self, query, key, value, query_table, key_table, value_table, bias, mask, documents,
        causal, content, query_offset, scale,
    ):  # fmt: skip
        tensors = query, key, value, query_table, key_table, value_table, bias
        self.q, self.k, self.v, self.a, self.r, self.w, self.b = wide(*tensors)
        self.mask, self.documents = mask, documents
        self.causal, self.content, self.offset, self.scale = causal, content, query_offset, scale
        tables = [t for t in (self.a, self.r, self.w, self.b) if t is not None]
        self.reach = tables[0].shape[1] // 2 if tables else 0

    def blocks(self) -> Iterator[_Block]:
        """Queries in order; those that see no key are left out where whole blocks of them do."""
        batch, heads, queries, _ = self.q.shape
        keys = self.k.shape[2]
        size = max(MIN_ROWS, min(MAX_ROWS, ELEMENTS // max(batch * heads * keys, 1)))
        for start in range(0, queries if batch else 0, size):
            stop = min(start + size, queries)
            first, end = 0, keys
            if self.documents is not None:
                first, end = self.documents[0, start].item(), self.documents[1, stop - 1].item()
            if self.causal:
                end = min(end, stop + self.offset)
            if first < end:
                yield self._block(slice(start, stop), slice(first, end))

    def _block(self, rows: slice, keys: slice) -> _Block:
        # the first key that is nearer than -K to the first query, the first that is at least K from the last one
        near = (rows.start + self.offset - self.reach + 1, rows.stop - 1 + self.offset + self.reach)
        first, stop = (min(max(edge, keys.start), keys.stop) for edge in near)
        lowest = first - (rows.stop - 1 + self.offset)
        return _Block(rows, keys, slice(first - keys.start, max(stop, first) - keys.start), lowest)

    def scores(self, block: _Block) -> Tensor:
        """[B, Hq, m, n], -inf where a query may not see a key."""
        q, k = self.q[:, :, block.rows], self.k[:, :, block.keys]
        scores = self.of_pairs(q, k) if self.content else q.new_zeros(*q.shape[:3], k.shape[2])
        if self.a is not None:
            _add_rows(scores, q, self.a, block)
        if self.r is not None:
            _add_rows_of_keys(scores, by_group(k, q), self.r, block)
        scores *= self.scale
        if self.b is not None:
            _add_bias(scores, self.b, block)
        hidden = self._hidden(block)
        return scores if hidden is None else scores.masked_fill_(hidden, -math.inf)

    def _hidden(self, block: _Block) -> Tensor | None:
        position = torch.arange(block.rows.start, block.rows.stop, device=self.q.device)[:, None]
        key = torch.arange(block.keys.start, block.keys.stop, device=self.q.device)
        hidden = None
        if self.causal:
            hidden = key > position + self.offset
        if self.documents is not None:
            first, end = self.documents[:, block.rows, None]
            other = (key < first) | (key >= end)
            hidden = other if hidden is None else hidden | other
        if self.mask is not None:
            padding = ~self.mask[:, None, None, block.keys]
            hidden = padding if hidden is None else hidden | padding
        return hidden

    def of_pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """``x_i . y_j``: [B, Hq, m, *] and [B, Hkv, n, *] give [B, Hq, m, n]."""
        folded = x.reshape(*y.shape[:2], -1, x.shape[3]) @ y.mT
        return folded.view(*x.shape[:3], y.shape[2])

    def of_keys(self, pairs: Tensor, y: Tensor) -> Tensor:
        """``sum_j pairs_ij y_j``: [B, Hq, m, n] and [B, Hkv, n, *] give [B, Hq, m, *]."""
        folded = pairs.reshape(*y.shape[:2], -1, pairs.shape[3]) @ y
        return folded.view(*pairs.shape[:3], y.shape[3])

    def of_queries(self, pairs: Tensor, x: Tensor) -> Tensor:
        """``sum_i pairs_ij x_i`` over the queries of a key's group: gives [B, Hkv, n, *]."""
        heads = self.k.shape[:2]
        return pairs.reshape(*heads, -1, pairs.shape[3]).mT @ x.reshape(*heads, -1, x.shape[3])


def _skewed(profile: Tensor, columns: int) -> Tensor:
    """[*, m, m + columns - 1] as [*, m, columns]: element (i, j) is the profile's (i, j - i + m - 1)."""
    *leading, rows, width = profile.shape
    *strides, _, _ = profile.stride()
    shape, stride = (*leading, rows, columns), (*strides, width - 1, 1)
    return profile.as_strided(shape, stride, profile.storage_offset() + rows - 1)


def _spread(pairs: Tensor) -> Tensor:
    """The transpose of :func:`_skewed`: [*, m, n] gives [*, m, m + n - 1], zero where there is no pair."""
    *leading, rows, columns = pairs.shape
    profile = pairs.new_zeros(*leading, rows, rows + columns - 1)
    _skewed(profile, columns).copy_(pairs)
    return profile


def _far(pairs: Tensor, block: _Block) -> tuple[tuple[int, Tensor], tuple[int, Tensor]]:
    """The row of a table for the pairs before ``near`` and these; the same behind it."""
    return (0, pairs[..., : block.near.start]), (-1, pairs[..., block.near.stop :])


def _near_rows(table: Tensor, block: _Block) -> Tensor:
    return table[:, block.index(table.shape[1] // 2, table.device)]  # [Hq or 1, m + n - 1, *]


def _has_near(block: _Block) -> bool:
    return block.near.start < block.near.stop


def _add_rows(pairs: Tensor, x: Tensor, table: Tensor, block: _Block) -> None:
    """``pairs_ij += x_i . table_c``."""
    for row, far in _far(pairs, block):
        if far.shape[-1]:
            far += x @ table[:, row, :, None]
    if _has_near(block):
        near = pairs[..., block.near]
        near += _skewed(x @ _near_rows(table, block).mT, near.shape[-1])


def _sum_of_rows(pairs: Tensor, table: Tensor, block: _Block) -> Tensor:
    """``sum_j pairs_ij table_c``: [B, Hq, m, *]."""
    total = sum(far.sum(-1, keepdim=True) * table[:, None, row] for row, far in _far(pairs, block))
    return total + _spread(pairs[..., block.near]) @ _near_rows(table, block) if _has_near(block) else total


def _add_row_gradients(gradient: Tensor, pairs: Tensor, x: Tensor, block: _Block) -> None:
    """``gradient_c += sum of pairs_ij x_i``."""
    for row, far in _far(pairs, block):
        gradient[:, row] += of_table(far.sum(-1, keepdim=True).mT @ x, gradient)[:, 0]
    if _has_near(block):
        of_distances = of_table(_spread(pairs[..., block.near]).mT @ x, gradient)
        gradient.index_add_(1, block.index(gradient.shape[1] // 2, x.device), of_distances)


def _add_rows_of_keys(pairs: Tensor, y: Tensor, table: Tensor, block: _Block) -> None:
    """``pairs_ij += y_j . table_c``."""
    for row, far in _far(pairs, block):
        side = y[:, :, : far.shape[-1]] if row == 0 else y[:, :, y.shape[2] - far.shape[-1] :]
        far += (side @ table[:, row, :, None]).mT
    if _has_near(block):
        near = pairs[..., block.near]
        near += _skewed(y[:, :, block.near] @ _near_rows(table, block).flip(1).mT, near.shape[-2]).mT


def _sum_of_rows_of_keys(pairs: Tensor, table: Tensor, block: _Block) -> Tensor:
    """``sum_i pairs_ij table_c``: [B, Hq, n, *]."""
    before, behind = (far.sum(-2)[..., None] * table[:, None, row] for row, far in _far(pairs, block))
    near = pairs[..., block.near]
    if _has_near(block):
        near = _spread(near.mT) @ _near_rows(table, block).flip(1)
        return torch.cat([before, near, behind], dim=2)
    return torch.cat([before, behind], dim=2)


def _add_row_gradients_of_keys(gradient: Tensor, pairs: Tensor, y: Tensor, block: _Block) -> None:
    """``gradient_c += sum of pairs_ij y_j``."""
    for row, far in _far(pairs, block):
        side = y[:, :, : far.shape[-1]] if row == 0 else y[:, :, y.shape[2] - far.shape[-1] :]
        gradient[:, row] += of_table(far.sum(-2, keepdim=True) @ side, gradient)[:, 0]
    if _has_near(block):
        of_distances = of_table(_spread(pairs[..., block.near].mT).mT @ y[:, :, block.near], gradient)
        gradient.index_add_(1, block.index(gradient.shape[1] // 2, y.device).flip(0), of_distances)


def _add_bias(pairs: Tensor, bias: Tensor, block: _Block) -> None:
    for row, far in _far(pairs, block):
        far += bias[:, row, None, None]
    if _has_near(block):
        near = pairs[..., block.near]
        # window s is bias[s:s + n], that of query m - 1 - s
        near += _near_rows(bias, block).unfold(1, near.shape[-1], 1).flip(1)


def _add_bias_gradients(gradient: Tensor, pairs: Tensor, block: _Block) -> None:
    for row, far in _far(pairs, block):
        gradient[:, row] += of_table(far.sum((-1, -2)), gradient)
    if _has_near(block):
        of_distances = of_table(_spread(pairs[..., block.near]).sum(-2), gradient)
        gradient.index_add_(1, block.index(gradient.shape[1] // 2, pairs.device), of_distances)
