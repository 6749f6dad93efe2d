"""A block of queries at a time, its weights in memory: on CUDA devices, and for the queries of which ``cpu_kernels`` is
not sure.

Values are [G, H, N, C]: where every batch element has the same weights they are one group (G = 1) and its features are
columns beside each other (C = B D), so that a head's weights are multiplied once; with padding G = B and C = D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import no_gradient

ELEMENTS = 2**24  # of the weights of a block


def forward(value, bias, key_padding_mask, documents, causal, queries, query_offset):
    v = grouped(value, key_padding_mask)
    out = v.new_zeros(*v.shape[:2], queries, v.shape[3])
    peak, mass = (v.new_zeros(*v.shape[:2], queries) for _ in range(2))
    for rows in _blocks(v, queries):
        found = attend(v, bias, rows, causal, query_offset, key_padding_mask, documents)
        out[:, :, rows], peak[:, :, rows], mass[:, :, rows] = found
    return ungrouped(out, value), peak, mass


def backward(value, bias, key_padding_mask, documents, peak, mass, grad_out, causal, query_offset, need):
    v, g = grouped(value, key_padding_mask), grouped(grad_out, key_padding_mask, keys=False)
    dv, lowest = torch.zeros_like(v), -(grad_out.shape[2] - 1) - query_offset
    by_distance = v.new_zeros(v.shape[1], grad_out.shape[2] + v.shape[2])
    for rows in _blocks(v, grad_out.shape[2]):
        more, sums = derivatives(v, bias, rows, g[:, :, rows], causal, query_offset, key_padding_mask, documents)
        dv += more
        start = -(rows.stop - 1) - query_offset - lowest
        by_distance[:, start : start + sums.shape[1]] += sums
    dvalue = ungrouped(dv, value)
    dbias = clipped(by_distance, lowest, bias.shape[1]).to(bias.dtype)
    return dvalue if need[0] else no_gradient(value), dbias if need[1] else no_gradient(value)


def attend(v, bias, rows: slice, causal, offset, mask, documents=None) -> tuple[Tensor, Tensor, Tensor]:
    """Output [G, H, m, C], peak and mass [G, H, m] of a block of queries."""
    scores = _scores(v, bias, rows, causal, offset, mask, documents)
    peak = scores.amax(-1) if v.shape[2] else scores.sum(-1)
    peak = torch.where(peak == -math.inf, 0, peak)
    share = (scores - peak[..., None]).exp()
    mass = share.sum(-1)
    return (share / torch.where(mass > 0, mass, 1)[..., None]) @ v, peak, mass


def derivatives(v, bias, rows: slice, g, causal, offset, mask, documents=None) -> tuple[Tensor, Tensor]:
    """Of a block of queries with the cotangent ``g`` [G, H, m, C]: of v [G, H, N, C], and of the scores, added up along
    their diagonals, [H, m + N - 1] from distance ``-(rows.stop - 1) - offset`` on."""
    scores = _scores(v, bias, rows, causal, offset, mask, documents)
    peak = scores.amax(-1, keepdim=True) if v.shape[2] else scores.sum(-1, keepdim=True)
    p = (scores - torch.where(peak == -math.inf, 0, peak)).exp()
    p = p / torch.where(p.sum(-1, keepdim=True) > 0, p.sum(-1, keepdim=True), 1)
    g = torch.where(p.sum(-1, keepdim=True) > 0, g, 0)
    dp = g @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return p.mT @ g, diagonal_sums(ds.sum(0))


def _scores(v, bias, rows: slice, causal, offset, mask, documents) -> Tensor:
    """[G, H, m, N], -inf where a key is not seen."""
    key, reach = torch.arange(v.shape[2], device=v.device), bias.shape[1] // 2
    distance = key - torch.arange(rows.start, rows.stop, device=v.device)[:, None] - offset
    scores = bias.to(v.dtype)[None, :, distance.clamp(-reach, reach) + reach]  # [1, H, m, N]
    if causal:
        scores = scores.masked_fill(distance > 0, -math.inf)
    if documents is not None:
        first, end = documents[:, rows, None]  # [m, 1]
        scores = scores.masked_fill((key < first) | (key >= end), -math.inf)
    return scores if mask is None else scores.masked_fill(~mask[:, None, None], -math.inf)


def grouped(x: Tensor, mask: Tensor | None, keys: bool = True) -> Tensor:
    """[B, H, N, D] to [G, H, N, C], float32 or float64; padding among ``keys`` is 0."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x.permute(1, 2, 0, 3).flatten(2)[None]
    return torch.where(mask[:, None, :, None], x, 0) if keys else x


def ungrouped(x: Tensor, like: Tensor) -> Tensor:
    """[G, H, N, C] to [B, H, N, D], contiguous, with B, D and the dtype of ``like``."""
    batch, features = like.shape[0], like.shape[3]
    if x.shape[3] == batch * features:
        x = x[0].unflatten(2, (batch, features)).permute(2, 0, 1, 3)
    return x.to(like.dtype).contiguous()


def diagonal_sums(x: Tensor) -> Tensor:
    """[H, m, n] to [H, m + n - 1], the diagonal that ends in the lower left corner first."""
    heads, m, n = x.shape
    width = m + n - 1
    # row i starts m - 1 - i numbers further right
    skewed = x.new_zeros(heads, m, width)
    skewed.as_strided(x.shape, (m * width, width - 1, 1), m - 1).copy_(x)
    return skewed.sum(1)


def clipped(by_distance: Tensor, lowest: int, columns: int) -> Tensor:
    """[H, n] for the distances from ``lowest`` on, added up to the ``columns`` distances of a bias."""
    reach, count = columns // 2, by_distance.shape[1]
    below, above = max(0, min(-reach - lowest, count)), max(0, min(reach + 1 - lowest, count))  # of the table's middle
    result = by_distance.new_zeros(by_distance.shape[0], columns)
    start = max(lowest, -reach) + reach
    result[:, start : start + above - below] = by_distance[:, below:above]
    result[:, 0] += by_distance[:, :below].sum(1)
    result[:, -1] += by_distance[:, above:].sum(1)
    return result


def _blocks(v: Tensor, queries: int) -> list[slice]:
    groups, heads, keys, _ = v.shape
    height = max(16, ELEMENTS // max(groups * heads * keys, 1))
    return [slice(first, min(first + height, queries)) for first in range(0, queries, height)]
