"""The definition of ``relative_attention`` in plain torch: differentiable, any floating dtype.

Query ``i`` of a head stands at position ``i + o``, key ``j`` at ``j``; their distance is ``d = j - i - o`` and
``c = K + clip(d, -K, K)`` the row of the tables for it. Queries, keys and values are ``q_i``, ``k_j``, ``v_j``; the
rows of the tables are ``a_c`` (query), ``r_c`` (key), ``w_c`` (value) and ``b_c`` (bias):

    s_ij = scale (q_i . k_j + q_i . a_c + k_j . r_c) + b_c          the first term where content is wanted
    p_ij = exp(s_ij) / sum_l exp(s_il)                              over the keys l that query i may see
    out_i = sum_j p_ij (v_j + w_c)

A query that may see no key has ``out_i = 0`` and gives no gradient. Scores are float32, or float64 for float64 inputs.
Shaw, Uszkoreit and Vaswani (arXiv 1803.02155): query and value tables; Huang, Liang, Xu and Xiang (arXiv 2009.13658),
method 4: the key table beside them; Raffel et al. (arXiv 1910.10683): a bias of the distance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import no_gradient


def attention(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    causal, content, query_offset, scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out [B, Hq, Nq, Dv], lse [B, Hq, Nq])``; lse is +inf for a query without keys: exp(s - lse) is 0."""
    q, k, v, a, r, w, b = _wide(query, key, value, query_table, key_table, value_table, bias)
    distance = _distance(q, k, query_offset)
    hidden = _hidden(distance, key_padding_mask, documents, causal)
    p, lse = _softmax(_scores(q, k, a, r, b, distance, content, scale), hidden)
    out = p @ v
    if w is not None:
        out = out + _by_distance(p, distance, w.shape[1]) @ w
    return out.to(query.dtype), lse


def forward(*arguments):
    """The raw op: ``(out, lse)``."""
    return attention(*arguments)


def backward(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    out, lse, grad_out, causal, content, query_offset, scale, need,
):  # fmt: skip
    """Gradients of the seven floating inputs, empty where not needed. Neither ``out`` nor ``lse`` is read.

    With ``g_i`` the cotangent of ``out_i``: ``dp_ij = g_i . (v_j + w_c)``, ``ds_ij = p_ij (dp_ij - sum_l p_il dp_il)``,
    and a row of a table gets the sum over its pairs.
    """
    inputs = query, key, value, query_table, key_table, value_table, bias
    q, k, v, a, r, w, b = _wide(*inputs)
    g = grad_out.to(q.dtype)
    distance = _distance(q, k, query_offset)
    hidden = _hidden(distance, key_padding_mask, documents, causal)
    p, _ = _softmax(_scores(q, k, a, r, b, distance, content, scale), hidden)
    dp = g @ v.mT
    if w is not None:
        dp = dp + _pick(g @ w.mT, distance)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    scaled = ds * scale

    def of_queries(pairs: Tensor, table: Tensor) -> Tensor:
        return _by_distance(pairs, distance, table.shape[1])  # [B, Hq, Nq, 2K+1]

    def of_keys(pairs: Tensor, table: Tensor) -> Tensor:
        return _by_distance(pairs.mT, distance.mT, table.shape[1])  # [B, Hq, Nk, 2K+1]

    def query_gradient() -> Tensor:
        dq = scaled @ k if content else torch.zeros_like(q)
        return dq if a is None else dq + of_queries(scaled, a) @ a

    def key_gradient() -> Tensor:
        dk = scaled.mT @ q if content else torch.zeros_like(k)
        return _of_group(dk if r is None else dk + of_keys(scaled, r) @ r, key)

    gradients = (
        query_gradient,
        key_gradient,
        lambda: _of_group(p.mT @ g, value),
        lambda: _of_table(of_queries(scaled, a).mT @ q, a),
        lambda: _of_table(of_keys(scaled, r).mT @ k, r),
        lambda: _of_table(of_queries(p, w).mT @ g, w),
        lambda: _of_table(of_queries(ds, b).sum(2), b),
    )
    return tuple(
        gradient().to(tensor.dtype).contiguous() if wanted else no_gradient(query)
        for gradient, tensor, wanted in zip(gradients, inputs, need, strict=True)
    )


def _wide(query, key, value, *tables) -> list[Tensor | None]:
    """In the dtype of scores, every query head with a key and a value head of its own."""
    wide, group = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
    keys_and_values = (t.to(wide).repeat_interleave(group, dim=1) for t in (key, value))
    return [query.to(wide), *keys_and_values, *(None if t is None else t.to(wide) for t in tables)]


def _distance(q: Tensor, k: Tensor, query_offset: int) -> Tensor:
    """[Nq, Nk]."""
    position = torch.arange(q.shape[2], device=q.device)[:, None] + query_offset
    return torch.arange(k.shape[2], device=q.device) - position


def _scores(q, k, a, r, b, distance, content, scale) -> Tensor:
    """[B, Hq, Nq, Nk]."""
    scores = q @ k.mT if content else q.new_zeros(*q.shape[:3], k.shape[2])
    if a is not None:
        scores = scores + _pick(q @ a.mT, distance)
    if r is not None:
        scores = scores + _pick(k @ r.mT, distance.mT).mT
    scores = scores * scale
    return scores if b is None else scores + _pick(b[:, None].expand(-1, q.shape[2], -1), distance)


def _hidden(distance: Tensor, key_padding_mask: Tensor | None, documents: Tensor | None, causal: bool) -> Tensor:
    """Which keys a query may not see, broadcast to [B, Hq, Nq, Nk]."""
    hidden = distance > 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if documents is not None:
        first, end = documents[:, :, None]  # [Nq, 1]
        key = torch.arange(distance.shape[1], device=distance.device)
        hidden = hidden | (key < first) | (key >= end)
    return hidden if key_padding_mask is None else hidden | ~key_padding_mask[:, None, None]


def _softmax(scores: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """``(p [B, Hq, Nq, Nk], lse [B, Hq, Nq])``."""
    scores = torch.where(hidden, -math.inf, scores)
    peak = scores.detach().amax(-1, keepdim=True) if scores.shape[3] else scores.sum(-1, keepdim=True)
    peak = peak.clamp(min=torch.finfo(scores.dtype).min)  # of a query without keys
    share = (scores - peak).exp()
    mass = share.sum(-1, keepdim=True)
    lse = torch.where(mass > 0, peak + mass.log(), math.inf)
    return share / torch.where(mass > 0, mass, 1), lse[..., 0].detach()


def _rows(distance: Tensor, rows: int) -> Tensor:
    """The row ``c`` of a table with ``rows = 2K + 1`` rows."""
    return distance.clamp(-(rows // 2), rows // 2) + rows // 2


def _pick(profile: Tensor, distance: Tensor) -> Tensor:
    """Element ``c`` of every row: [*, n, 2K+1] and distances [n, m] give [*, n, m]."""
    index = _rows(distance, profile.shape[-1])
    return profile.gather(-1, index.expand(*profile.shape[:-2], *index.shape))


def _by_distance(pairs: Tensor, distance: Tensor, rows: int) -> Tensor:
    """Sums over the pairs of each ``c``, the transpose of :func:`_pick`: [*, n, m] gives [*, n, rows]."""
    return pairs.new_zeros(*pairs.shape[:-1], rows).scatter_add(-1, _rows(distance, rows).expand_as(pairs), pairs)


def _of_group(gradient: Tensor, tensor: Tensor) -> Tensor:
    """Of a key or value head, from its query heads'."""
    return gradient.unflatten(1, (tensor.shape[1], -1)).sum(2)


def _of_table(gradient: Tensor, table: Tensor) -> Tensor:
    """Of a table, from every batch element's and head's: [B, Hq, *] gives [Hq or 1, *]."""
    return gradient.sum(0) if table.shape[0] > 1 else gradient.sum((0, 1))[None]
