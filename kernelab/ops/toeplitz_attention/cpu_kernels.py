"""CPU: a head's weights are one vector, multiplied as a matrix whose blocks are views of copies of that vector."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernelab._core import onednn
from kernelab._core.sequences import document_slices

from . import blocked
from .arguments import no_gradient

HEIGHT = 64  # rows of a block, where there are as many
FEW = 8  # queries that are not worth an arrangement of the values
# Weights are relative to the largest of their head. A query whose weights sum up to less than this may have lost those
# that count, and is computed by itself.
LEAST_MASS = 2.0**-40


class _Toeplitz:
    """The matrix with ``weights[d - lowest]`` at row i and column j of distance ``d = j - i - offset``, else 0."""

    def __init__(self, weights: Tensor, lowest: int, rows: int) -> None:
        nonzero = weights.nonzero()
        first, last = (int(nonzero[0]), int(nonzero[-1])) if len(nonzero) else (0, -1)
        self.weights = weights[first : last + 1]
        self.lowest, self.highest = lowest + first, lowest + last
        # Row r of a block begins r numbers before row 0: as far as a row of copies is long, and one less, each time.
        self.height = max(min(rows, HEIGHT), 1)
        padded = torch.nn.functional.pad(self.weights, (self.height - 1, self.height - 1))
        self.copies = padded.expand(self.height, -1).contiguous()

    def transposed(self, columns: int) -> _Toeplitz:
        """The transposed matrix, whose offset is that of this one with the other sign."""
        return _Toeplitz(self.weights.flip(0), -self.highest, columns)

    def blocks(self, rows: int, columns: int, offset: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """``(rows, columns, [m, n])`` of the blocks of rows, without columns, and rows, that have no weights."""
        pitch = self.copies.shape[1] - 1
        for first in range(0, rows, self.height):
            last = min(first + self.height, rows) - 1
            start = max(first + offset + self.lowest, 0)
            end = min(last + offset + self.highest + 1, columns)
            if start < end:
                place = start - first - offset - self.lowest + self.height - 1
                view = self.copies.as_strided((last + 1 - first, end - start), (pitch, 1), place)
                yield slice(first, last + 1), slice(start, end), view

    def times(self, x: Tensor, rows: int, offset: int) -> Tensor:
        """The product with ``x`` [n, C]: [rows, C]."""
        y = x.new_zeros(rows, x.shape[1])
        for block, columns, weights in self.blocks(rows, x.shape[0], offset):
            y[block] = _product(weights, x[columns])
        return y

    def mass(self, seen: Tensor | None, rows: int, columns: int, offset: int) -> Tensor:
        """The sums of the weights of the columns that are ``seen`` [G, columns], None: all (G = 1): [G, rows]."""
        sums = self.copies.new_zeros(rows, 1 if seen is None else len(seen))
        for block, of_block, weights in self.blocks(rows, columns, offset):
            # Equal numbers added one by one are wrong by as many roundings in the same direction.
            if seen is None:
                sums[block] = weights.sum(1, keepdim=True)
            else:
                sums[block] = (weights.double() @ seen[:, of_block].mT.double()).to(sums.dtype)
        return sums.mT


def _product(a: Tensor, b: Tensor) -> Tensor:
    return onednn.linear(a, b.mT, None) if onednn.wins(a, b.mT) else a @ b


class _Head(NamedTuple):
    """One head of one document. Batch elements stand in G groups of C columns, as in ``blocked``."""

    index: int
    rows: slice  # of the queries
    keys: slice
    matrix: _Toeplitz
    peak: Tensor  # of the bias, relative to which the weights are
    v: Tensor  # [G, n, C], 0 at padding, contiguous: from other strides oneDNN takes 400 times as long
    seen: Tensor | None  # boolean [G, n]; None: G = 1, and every key

    def sure(self, peak: Tensor, mass: Tensor) -> Tensor:
        """Which queries have weights that are precise, of their peaks and masses."""
        return (mass >= LEAST_MASS) & (peak == self.peak)

    def bias_gradient(self, scaled: Tensor, inverse: Tensor, offset: int, columns: int) -> Tensor:
        """[2K+1], of the cotangents over their masses [G, m, C] and one over the masses [G, m, 1]."""
        weights, lowest = self.matrix.copies[0], self.matrix.lowest - self.matrix.height + 1
        by_distance = torch.zeros_like(weights)
        for rows, keys, block in self.matrix.blocks(scaled.shape[1], self.v.shape[1], offset):
            ds = sum(self._ds(group, rows, keys, block, scaled, inverse) for group in range(len(scaled)))
            sums = blocked.diagonal_sums(ds[None])[0]
            start = keys.start - (rows.stop - 1) - offset - lowest
            by_distance[start : start + len(sums)] += sums
        return blocked.clipped((by_distance * weights)[None], lowest, columns)[0]

    def _ds(self, group: int, rows: slice, keys: slice, block: Tensor, scaled: Tensor, inverse: Tensor) -> Tensor:
        """Gradient of the scores of a block, over their weights: [m, n]."""
        dp = _product(scaled[group, rows], self.v[group, keys].mT)
        # not the cotangent times the output: the same numbers cancel where one weight is nearly all
        if self.seen is None:
            return dp.sub_((block * dp).sum(1, keepdim=True) * inverse[group, rows])
        dp.mul_(self.seen[group, keys].to(dp.dtype))
        mean = (block * dp).sum(1, keepdim=True) * inverse[group, rows]
        return dp.sub_(mean * self.seen[group, keys].to(dp.dtype))

    def alone(self, group: int, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Values [1, 1, n, C] and bias [1, 2K+1] of one group, as ``blocked`` takes them."""
        return self.v[group, None, None], bias[self.index, None]

    def mask(self, group: int) -> Tensor | None:
        """[1, n]."""
        return None if self.seen is None else self.seen[group, None]


def forward(value, bias, key_padding_mask, documents, causal, queries, query_offset):
    batch, heads, _, features = value.shape
    wide, groups = torch.promote_types(value.dtype, torch.float32), 1 if key_padding_mask is None else batch
    if queries <= FEW:
        v = value.to(wide) if key_padding_mask is None else blocked.grouped(value, key_padding_mask)
        rest = slice(0, queries), causal, query_offset, key_padding_mask, documents
        o, peak, mass = blocked.attend(v, bias, *rest)
        return o.to(value.dtype), peak, mass
    out = value.new_zeros(batch, heads, queries, features)
    peak, mass = (value.new_zeros(groups, heads, queries, dtype=wide) for _ in range(2))
    for head in _heads(value, bias, key_padding_mask, documents, causal, queries, query_offset):
        place, rows = (slice(None), head.index, head.rows), head.rows.stop - head.rows.start
        of_head = out[place].transpose(0, 1)  # [m, B, D]
        peak[place] = head.peak
        mass[place] = head.matrix.mass(head.seen, rows, head.v.shape[1], query_offset)
        sums = head.matrix.times(_flat(head.v), rows, query_offset).view(rows, batch, features)
        torch.mul(sums, _inverse(mass[place]).transpose(0, 1), out=of_head)
        for group, block in _unsure(head.sure(peak[place], mass[place])):
            o, *statistics = blocked.attend(*head.alone(group, bias), block, causal, query_offset, head.mask(group))
            _of_group(of_head[block], group, groups).copy_(o[0, 0].unflatten(1, (-1, features)))
            peak[place][group, block], mass[place][group, block] = (t[0, 0] for t in statistics)
    return out, peak, mass


def backward(value, bias, key_padding_mask, documents, peak, mass, grad_out, causal, query_offset, need):
    batch, features, groups = value.shape[0], value.shape[3], peak.shape[0]
    dvalue = value.new_zeros(value.shape) if need[0] else no_gradient(value)
    dbias = bias.new_zeros(bias.shape, dtype=mass.dtype) if need[1] else no_gradient(value)
    for head in _heads(value, bias, key_padding_mask, documents, causal, grad_out.shape[2], query_offset):
        place = slice(None), head.index, head.rows
        g = blocked.grouped(grad_out[:, head.index, None, head.rows], key_padding_mask, keys=False)[:, 0]  # [G, m, C]
        sure, inverse = head.sure(peak[place], mass[place])[..., None], _inverse(mass[place])  # [G, m, 1]
        scaled = torch.where(sure, g * inverse, 0)
        if need[0]:
            sums = head.matrix.transposed(head.v.shape[1]).times(_flat(scaled), head.v.shape[1], -query_offset)
            dv = sums.view(-1, batch, features)  # [n, B, D]
        if need[1]:
            dbias[head.index] += head.bias_gradient(scaled, inverse, query_offset, bias.shape[1])
        for group, block in _unsure(sure[..., 0]):
            cotangent = torch.where(sure[group, block], 0, g[group, block])[None, None]
            rest = block, cotangent, causal, query_offset, head.mask(group)
            more, sums = blocked.derivatives(*head.alone(group, bias), *rest)
            if need[0]:
                _of_group(dv, group, groups).add_(more[0, 0].unflatten(1, (-1, features)))
            if need[1]:
                dbias[head.index] += blocked.clipped(sums, 1 - block.stop - query_offset, bias.shape[1])[0]
        if need[0]:
            if head.seen is not None:
                dv = torch.where(head.seen.mT[..., None], dv, 0)
            dvalue[:, head.index, head.keys] = dv.transpose(0, 1)
    return dvalue, dbias.to(bias.dtype) if need[1] else dbias


def _heads(value, bias, mask, documents, causal, queries, offset) -> Iterator[_Head]:
    keys, reach, whole = value.shape[2], bias.shape[1] // 2, documents is None
    if value.numel() == 0:
        return
    documents = document_slices(documents, keys)
    longest = max(document.stop - document.start for document in documents)
    lowest, highest = (1 - queries - offset, keys - 1 - offset) if whole else (1 - longest, longest - 1)
    distance = torch.arange(lowest, max(lowest, (min(highest, 0) if causal else highest) + 1))
    for index in range(value.shape[1]):
        v = blocked.grouped(value[:, index, None], mask)[:, 0].contiguous()
        scores = bias[index, distance.clamp(-reach, reach) + reach].to(v.dtype)
        peak = scores.amax() if len(scores) else v.new_zeros(())
        peak = torch.where(peak == -math.inf, 0, peak)
        matrix = _Toeplitz((scores - peak).exp(), lowest, queries if whole else longest)
        for keys in documents:
            seen = None if mask is None else mask[:, keys]
            yield _Head(index, slice(0, queries) if whole else keys, keys, matrix, peak, v[:, keys], seen)


def _flat(x: Tensor) -> Tensor:
    """[G, n, C] to [n, G C]."""
    return x.transpose(0, 1).flatten(1)


def _of_group(x: Tensor, group: int, groups: int) -> Tensor:
    """The batch elements of a group, of [n, B, D]."""
    return x if groups == 1 else x[:, group, None]


def _inverse(mass: Tensor) -> Tensor:
    """[G, m, 1] of [G, m]; 0 of a query without keys."""
    return torch.where(mass > 0, 1 / mass, 0)[..., None]


def _unsure(sure: Tensor) -> Iterator[tuple[int, slice]]:
    """Groups, and blocks of rows, with a query that is not sure, of [G, m]."""
    for group, rows in enumerate(sure):
        if bool(rows.all()):
            continue
        for first in range(0, len(rows), HEIGHT):
            block = slice(first, min(first + HEIGHT, len(rows)))
            if not bool(rows[block].all()):
                yield group, block
