"""The definition of ``toeplitz_attention`` in plain torch: differentiable, any floating dtype.

Query ``i`` stands at position ``i + o``, key ``j`` at ``j``; ``c = K + clip(j - i - o, -K, K)`` is their entry of a
head's bias ``b`` [2K+1]:

    p_ij = exp(b_c) / sum_l exp(b_c(l))         over the keys l that query i may see
    out_i = sum_j p_ij v_j

A query that may see no key, or none whose bias is above -inf, has ``out_i = 0`` and gives no gradient. Scores are
float32, or float64 for float64 inputs. Allen-Zhu and Li (arXiv 2305.13673): attention of the position alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import no_gradient


def weights(
    bias: Tensor, key_padding_mask: Tensor | None, documents: Tensor | None, causal: bool, distance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(p [B or 1, H, Nq, Nk], peak, mass [B or 1, H, Nq])`` of distances [Nq, Nk]."""
    hidden = distance > 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if documents is not None:
        first, end = documents[:, :, None]  # [Nq, 1]
        key = torch.arange(distance.shape[1], device=distance.device)
        hidden = hidden | (key < first) | (key >= end)
    if key_padding_mask is not None:
        hidden = hidden | ~key_padding_mask[:, None, None]
    scores = torch.where(hidden, -math.inf, bias[None, :, _columns(distance, bias)])
    peak = scores.detach().amax(-1, keepdim=True) if distance.shape[1] else scores.sum(-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0, peak)  # of a query without keys
    share = (scores - peak).exp()
    mass = share.sum(-1, keepdim=True)
    return share / torch.where(mass > 0, mass, 1), peak[..., 0].detach(), mass[..., 0].detach()


def forward(value, bias, key_padding_mask, documents, causal, queries, query_offset) -> tuple[Tensor, Tensor, Tensor]:
    """The raw op: ``(out [B, H, Nq, D], peak, mass [B or 1, H, Nq])``."""
    v, b = _wide(value, bias, key_padding_mask)
    distance = _distance(queries, value, query_offset)
    p, peak, mass = weights(b, key_padding_mask, documents, causal, distance)
    return (p @ v).to(value.dtype), peak, mass


def backward(
    value, bias, key_padding_mask, documents, peak, mass, grad_out, causal, query_offset, need
) -> tuple[Tensor, Tensor]:
    """Gradients of value and bias, empty where not needed. Neither peak nor mass is read.

    ds_ij = p_ij (dout_i . v_j - sum_l p_il dout_i . v_l),  dv_j = sum_i p_ij dout_i,  db_c = sum of ds over its pairs
    """
    v, b = _wide(value, bias, key_padding_mask)
    g, distance = grad_out.to(v.dtype), _distance(grad_out.shape[2], value, query_offset)
    p, _, _ = weights(b, key_padding_mask, documents, causal, distance)
    dp = g @ v.mT
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).sum(0)  # [H, Nq, Nk]
    pairs = _columns(distance, bias).flatten().expand(bias.shape[0], -1)
    dbias = torch.zeros_like(b).scatter_add(1, pairs, ds.flatten(1))
    grads = (p.mT @ g).to(value.dtype), dbias.to(bias.dtype)
    return tuple(grad if wanted else no_gradient(value) for grad, wanted in zip(grads, need, strict=True))


def _wide(value: Tensor, bias: Tensor, mask: Tensor | None) -> list[Tensor]:
    """In the dtype of scores; padding is 0."""
    v = value if mask is None else torch.where(mask[:, None, :, None], value, 0)
    return [t.to(torch.promote_types(value.dtype, torch.float32)) for t in (v, bias)]


def _distance(queries: int, value: Tensor, query_offset: int) -> Tensor:
    """[Nq, Nk]."""
    position = torch.arange(queries, device=value.device)[:, None] + query_offset
    return torch.arange(value.shape[2], device=value.device) - position


def _columns(distance: Tensor, bias: Tensor) -> Tensor:
    """The columns ``c`` of a bias."""
    reach = bias.shape[1] // 2
    return distance.clamp(-reach, reach) + reach
