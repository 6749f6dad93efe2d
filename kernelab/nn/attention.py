"""Self-attention with parameters: what every scheme of positions shares, and the scheme without positions.

Every self-attention of this package is called in one way::

    attention(x, *, key_padding_mask=None, cu_seqlens=None, cache=None) -> y        # x, y: [B, N, d_model]

``key_padding_mask`` is boolean [B, cached + N], True where a token may be attended to. ``cu_seqlens`` is int32 or int64
[documents + 1], the boundaries of documents packed in a batch of 1, which neither see each other nor go with a cache.
``cache`` (:class:`~kernelab.nn.cache.KeyValueCache`, causal attention only) holds the tokens before ``x`` and takes
those of ``x``. ``arguments.check_call`` raises named errors for all of it, before anything is written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelab.ops import relative_attention

from .arguments import check_call, check_flag, head_dim_of, kv_heads_of
from .cache import KeyValueCache

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None

_FLASH_HEAD_DIM = 256  # the largest flash-attn has


class Attention(nn.Module):
    """Multi-head self-attention that knows no positions: ``o_proj(softmax(q k^T / sqrt(D)) v)``.

    flash-attn runs it where that is installed and fits (CUDA, 16 bits, no key padding), torch's
    scaled_dot_product_attention where that needs no mask in memory, ``kernelab.ops.relative_attention`` otherwise.

    Args:
        d_model: features of x.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values, a divisor of num_heads; None: num_heads.
        head_dim: features of a head; None: ``d_model // num_heads``.
        causal: a token sees no later one.
        bias: the four projections have biases.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    >>> attention = Attention(64, 4, causal=True)
    >>> attention(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.d_model, self.num_heads, self.causal = d_model, num_heads, causal
        where = type(self).__name__
        check_flag(where, "causal", causal)
        self.head_dim = head_dim_of(where, d_model, num_heads, head_dim)
        self.num_kv_heads = kv_heads_of(where, num_heads, num_kv_heads)
        self.q_proj = nn.Linear(d_model, num_heads * self.head_dim, bias)
        self.k_proj = nn.Linear(d_model, self.num_kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(d_model, self.num_kv_heads * self.head_dim, bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, d_model, bias)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[B, N, d_model] to the same; the arguments as at the top of this file."""
        documents = check_call(self, x, key_padding_mask, cu_seqlens, cache)
        query, key = self._query_and_key(x, 0 if cache is None else cache.length, documents)
        value = split_heads(self.v_proj(x), self.num_kv_heads)
        if cache is not None:
            key, value = cache.append(key, value)
        tables = self.tables(key.shape[2], {} if cache is None else cache.memory)
        return self.o_proj(merge_heads(attend(query, key, value, tables, self.causal, key_padding_mask, cu_seqlens)))

    def scores_of(
        self, x: Tensor, *, key_padding_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> dict[str, object]:
        """All that the attention weights of x follow from: arguments for :mod:`kernelab.nn.statistics`."""
        query, key = self._query_and_key(x, 0, check_call(self, x, key_padding_mask, cu_seqlens, None))
        tables = {name: table for name, table in self.tables(x.shape[1], {}).items() if name != "value_table"}
        visible = {"causal": self.causal, "key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
        return {"query": query, "key": key, **tables, **visible}

    def place(self, query: Tensor, key: Tensor, offset: int, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, N, D] of the new tokens, told their positions.

        The first stands at ``offset``; or ``documents[0]`` [N] is where each token's document begins.
        """
        return query, key

    def tables(self, keys: int, memory: dict) -> dict[str, object]:
        """What of ``relative_attention`` depends on the distance; ``memory`` lives as long as the cache does."""
        return {}

    def _query_and_key(self, x: Tensor, offset: int, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key = split_heads(self.q_proj(x), self.num_heads), split_heads(self.k_proj(x), self.num_kv_heads)
        return self.place(query, key, offset, documents)

    def extra_repr(self) -> str:
        """What ``print`` says of the module beside its parts."""
        heads = f"{self.num_heads}" if self.num_heads == self.num_kv_heads else f"{self.num_heads}:{self.num_kv_heads}"
        return f"heads={heads}, head_dim={self.head_dim}, causal={self.causal}"


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] to [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, H D]."""
    return x.transpose(1, 2).flatten(2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: dict[str, object],
    causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """[B, Hq, Nq, D] by what is fastest; queries end where the keys do."""
    plain = not tables and key_padding_mask is None
    if plain and _flash_fits(query):
        return _flash(query, key, value, causal, cu_seqlens)
    queries, keys = query.shape[2], key.shape[2]
    if plain and cu_seqlens is None and keys > 0:
        groups = query.shape[1] != key.shape[1]
        if not causal or queries == 1:
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=groups)
        if queries == keys:  # else torch's causal mask begins at the first key, where ours ends at the last
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups)
    visible = {"causal": causal, "key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
    return relative_attention(query, key, value, **tables, **visible)


def _flash_fits(query: Tensor) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    fits = query.is_cuda and half and query.numel() > 0 and query.shape[3] <= _FLASH_HEAD_DIM
    return flash_attn_func is not None and fits


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, cu_seqlens: Tensor | None) -> Tensor:
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, N, H, D]
    if cu_seqlens is None:
        return flash_attn_func(query, key, value, causal=causal).transpose(1, 2)
    bounds, longest = cu_seqlens.int(), query.shape[1]  # an upper bound of the lengths: the largest would cost a wait
    query, key, value = (t[0] for t in (query, key, value))
    out = flash_attn_varlen_func(query, key, value, bounds, bounds, longest, longest, causal=causal)
    return out[None].transpose(1, 2)
