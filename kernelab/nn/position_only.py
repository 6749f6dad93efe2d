"""Self-attention that looks at positions and not at content: values and output are projected, nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelab.ops.toeplitz_attention import toeplitz_attention

from .arguments import check_call, check_count, check_flag, head_dim_of
from .attention import merge_heads, split_heads
from .cache import KeyValueCache


class ValueAttention(nn.Module):
    """What attention without queries and keys shares; ``mix`` says how the values are weighted.

    A cache holds values alone.
    """

    def __init__(self, d_model: int, num_heads: int, *, head_dim: int | None, causal: bool, bias: bool) -> None:
        super().__init__()
        where = type(self).__name__
        check_flag(where, "causal", causal)
        self.d_model, self.num_heads, self.causal = d_model, num_heads, causal
        self.head_dim = head_dim_of(where, d_model, num_heads, head_dim)
        self.v_proj = nn.Linear(d_model, num_heads * self.head_dim, bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, d_model, bias)

    def forward(
        self,
        x: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[B, N, d_model] to the same; the arguments as at the top of ``attention.py``."""
        check_call(self, x, key_padding_mask, cu_seqlens, cache)
        value = split_heads(self.v_proj(x), self.num_heads)
        if cache is not None:
            (value,) = cache.append(value)
        return self.o_proj(merge_heads(self.mix(value, x.shape[1], key_padding_mask, cu_seqlens)))

    def mix(self, value: Tensor, queries: int, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Values [B, H, Nk, D] to what the last ``queries`` tokens see of them, [B, H, Nq, D]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What ``print`` says of the module beside its parts."""
        return f"heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"


class PositionOnlyAttention(ValueAttention):
    """Self-attention whose weights are learned, depend on the distance, and on nothing else: ``softmax(b_c) v``.

    ``c = clip(j - i, -max_distance, max_distance)`` for query i and key j. Each head has its own bias, at first 0,
    which weighs all visible tokens equally.

    Args:
        d_model: features of x.
        num_heads: heads.
        max_distance: all tokens that are further away have the same bias.
        head_dim: features of a head; None: ``d_model // num_heads``.
        causal: a token sees no later one.
        bias: the projections have biases.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Source: the attention of positions alone of Allen-Zhu and Li (arXiv 2305.13673).

    >>> attention = PositionOnlyAttention(64, 4, max_distance=16, causal=True)
    >>> attention(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        max_distance: int,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim=head_dim, causal=causal, bias=bias)
        check_count(type(self).__name__, "max_distance", max_distance, 0)
        self.distance_bias = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1))

    def mix(self, value: Tensor, queries: int, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """As of :class:`ValueAttention`."""
        visible = {"causal": self.causal, "key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
        return toeplitz_attention(value, self.distance_bias, queries=queries, **visible)
