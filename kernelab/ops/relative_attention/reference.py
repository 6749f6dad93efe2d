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
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(out [B, Hq, Nq, Dv], peak, mass [B, Hq, Nq])``: p = exp(s - peak) / mass; both are 0 for a query without keys.

    A log-sum-exp would not do: its rounding is an error of p that all keys of a query share.
    """
    q, k, v, a, r, w, b = _of_every_head(query, key, value, query_table, key_table, value_table, bias)
    distance = _distance(q, k, query_offset)
    hidden = _hidden(distance, key_padding_mask, documents, causal)
    p, peak, mass = _softmax(_scores(q, k, a, r, b, distance, content, scale), hidden)
    out = p @ v
    if w is not None:
        out = out + _by_distance(p, distance, w.shape[1]) @ w
    return out.to(query.dtype), peak, mass


def forward(*arguments):
    """The raw op."""
    return attention(*arguments)


def backward(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    out, peak, mass, grad_out, causal, content, query_offset, scale, need,
):  # fmt: skip
    """Gradients of the seven floating inputs, empty where not needed. Reads no result of the forward.

    With ``g_i`` the cotangent of ``out_i``: ``dp_ij = g_i . (v_j + w_c)``, ``ds_ij = p_ij (dp_ij - sum_l p_il dp_il)``,
    and a row of a table gets the sum over its pairs.
    """
    inputs = query, key, value, query_table, key_table, value_table, bias
    q, k, v, a, r, w, b = _of_every_head(*inputs)
    g = grad_out.to(q.dtype)
    distance = _distance(q, k, query_offset)
    hidden = _hidden(distance, key_padding_mask, documents, causal)
    p, _, _ = _softmax(_scores(q, k, a, r, b, distance, content, scale), hidden)
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
        return of_group(dk if r is None else dk + of_keys(scaled, r) @ r, key)

    gradients = (
        query_gradient,
        key_gradient,
        lambda: of_group(p.mT @ g, value),
        lambda: of_table(of_queries(scaled, a).mT @ q, a),
        lambda: of_table(of_keys(scaled, r).mT @ k, r),
        lambda: of_table(of_queries(p, w).mT @ g, w),
        lambda: of_table(of_queries(ds, b).sum(2), b),
    )
    return tuple(
        gradient().to(tensor.dtype).contiguous() if wanted else no_gradient(query)
        for gradient, tensor, wanted in zip(gradients, inputs, need, strict=True)
    )


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """In the dtype of scores; None stays None."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [None if t is None else t.to(dtype) for t in tensors]


def by_group(keys: Tensor, query: Tensor) -> Tensor:
    """A key or value head for every query head: [B, Hkv, *] gives [B, Hq, *]."""
    return keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)


def of_group(gradient: Tensor, keys: Tensor) -> Tensor:
    """The transpose of :func:`by_group`: [B, Hq, *] gives [B, Hkv, *]."""
    return gradient.unflatten(1, (keys.shape[1], -1)).sum(2)


def of_table(gradient: Tensor, table: Tensor) -> Tensor:
    """Of a table, from every batch element's and head's: [B, Hq, *] gives [Hq or 1, *]."""
    return gradient.sum(0) if table.shape[0] > 1 else gradient.sum((0, 1))[None]


def _of_every_head(query, key, value, *tables) -> list[Tensor | None]:
    q, k, v, *rest = wide(query, key, value, *tables)
    return [q, by_group(k, q), by_group(v, q), *rest]


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


def _softmax(scores: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(p [B, Hq, Nq, Nk], peak, mass [B, Hq, Nq])``."""
    scores = torch.where(hidden, -math.inf, scores)
    peak = scores.detach().amax(-1, keepdim=True) if scores.shape[3] else scores.sum(-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0, peak)  # of a query without keys
    share = (scores - peak).exp()
    mass = share.sum(-1, keepdim=True)
    return share / torch.where(mass > 0, mass, 1), peak[..., 0].detach(), mass[..., 0].detach()


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
