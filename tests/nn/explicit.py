"""Attention as N x N matrices from a module's own weights: what the modules are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(keys: int, queries: int, causal: bool, mask: Tensor | None = None, cu_seqlens: Tensor | None = None):
    """[B or 1, 1, Nq, Nk], True where a query may see a key; queries end where the keys do."""
    position = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)
    seen = key <= position if causal else torch.ones(queries, keys, dtype=torch.bool)
    if cu_seqlens is not None:
        document = (key[:, None] >= cu_seqlens[1:-1]).sum(1)
        seen = seen & (document[:, None] == document)
    return seen[None, None] if mask is None else seen & mask[:, None, None]


def distances(tokens: int) -> Tensor:
    """[N, N], the key's position less the query's."""
    return torch.arange(tokens) - torch.arange(tokens)[:, None]


def project(layer: torch.nn.Linear, x: Tensor, heads: int) -> Tensor:
    """[B, H, N, D]."""
    y = x @ layer.weight.T
    return (y if layer.bias is None else y + layer.bias).unflatten(-1, (heads, -1)).transpose(1, 2)


def weights(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the visible keys, 0 where there is none."""
    return torch.where(seen, scores, -torch.inf).softmax(-1).nan_to_num(0)


def attention(module, x: Tensor, seen: Tensor, *, scores=None, rotate=lambda t: t, value_rows=None) -> Tensor:
    """``module(x)``; ``scores(q, k)`` [B, H, N, N] stands for ``q k^T / sqrt(D)``, ``value_rows`` [H or 1, N, N, D]."""
    group = module.num_heads // module.num_kv_heads
    q = rotate(project(module.q_proj, x, module.num_heads))
    k = rotate(project(module.k_proj, x, module.num_kv_heads)).repeat_interleave(group, 1)
    v = project(module.v_proj, x, module.num_kv_heads).repeat_interleave(group, 1)
    p = weights(q @ k.mT * module.head_dim**-0.5 if scores is None else scores(q, k), seen)
    out = p @ v
    if value_rows is not None:
        out = out + torch.einsum("bhij,hijd->bhid", p, value_rows.expand(p.shape[1], -1, -1, -1))
    y = out.transpose(1, 2).flatten(2) @ module.o_proj.weight.T
    return y if module.o_proj.bias is None else y + module.o_proj.bias
