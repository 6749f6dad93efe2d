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
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    q, k, v = query.to(wide), *(t.to(wide).repeat_interleave(group, dim=1) for t in (key, value))
    position = torch.arange(q.shape[2], device=q.device)[:, None] + query_offset  # [Nq, 1]
    distance = torch.arange(k.shape[2], device=q.device) - position  # [Nq, Nk]

    scores = q @ k.mT if content else q.new_zeros(*q.shape[:3], k.shape[2])
    if query_table is not None:
        scores = scores + _pick(q @ query_table.to(wide).mT, distance)
    if key_table is not None:
        scores = scores + _pick(k @ key_table.to(wide).mT, distance.mT).mT
    scores = scores * scale
    if bias is not None:
        scores = scores + _pick(bias.to(wide)[:, None].expand(-1, q.shape[2], -1), distance)

    hidden = _hidden(distance, key_padding_mask, documents, causal)
    scores = torch.where(hidden, -math.inf, scores)
    peak = scores.detach().amax(-1, keepdim=True) if k.shape[2] else scores.sum(-1, keepdim=True)
    peak = peak.clamp(min=torch.finfo(wide).min)  # of a row without keys
    share = (scores - peak).exp()
    mass = share.sum(-1, keepdim=True)
    p = share / torch.where(mass > 0, mass, 1)
    out = p @ v
    if value_table is not None:
        rows = value_table.shape[1]
        by_distance = p.new_zeros(*p.shape[:3], rows).scatter_add(-1, _rows(distance, rows).expand_as(p), p)
        out = out + by_distance @ value_table.to(wide)
    lse = torch.where(mass > 0, peak + mass.log(), math.inf)
    return out.to(dtype), lse[..., 0].detach()


def _rows(distance: Tensor, rows: int) -> Tensor:
    """The row ``c`` of a table with ``rows = 2K + 1`` rows."""
    reach = rows // 2
    return distance.clamp(-reach, reach) + reach


def _pick(profile: Tensor, distance: Tensor) -> Tensor:
    """Element ``c`` of every row: [*, n, 2K+1] and distances [n, m] give [*, n, m]."""
    index = _rows(distance, profile.shape[-1])
    return profile.gather(-1, index.expand(*profile.shape[:-2], *index.shape))


def _hidden(distance: Tensor, key_padding_mask: Tensor | None, documents: Tensor | None, causal: bool) -> Tensor:
    """Which keys a query may not see, broadcast to [B, Hq, Nq, Nk]."""
    hidden = distance > 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if documents is not None:
        first, end = documents[:, :, None]  # [Nq, 1]
        key = torch.arange(distance.shape[1], device=distance.device)
        hidden = hidden | (key < first) | (key >= end)
    return hidden if key_padding_mask is None else hidden | ~key_padding_mask[:, None, None]


def forward(*arguments):
    """The raw op: ``(out, lse)``."""
    return attention(*arguments)


def backward(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    out, lse, grad_out, causal, content, query_offset, scale, need,
):  # fmt: skip
    """Gradients of the seven floating inputs, empty where not needed. Neither ``out`` nor ``lse`` is read."""
    inputs = query, key, value, query_table, key_table, value_table, bias
    needed = [index for index, wanted in enumerate(need) if wanted]

    def function(*values):
        changed = dict(zip(needed, values, strict=True))
        full = (changed.get(index, tensor) for index, tensor in enumerate(inputs))
        return attention(*full, key_padding_mask, documents, causal, content, query_offset, scale)[0]

    _, vjp = torch.func.vjp(function, *(inputs[index] for index in needed))
    grads = dict(zip(needed, vjp(grad_out), strict=True))
    return tuple(grads[index] if index in grads else no_gradient(query) for index in range(len(inputs)))
