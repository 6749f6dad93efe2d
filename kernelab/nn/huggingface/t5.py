"""Biases of T5 as [H, 2K+1], a row a distance, in place of a value for every pair."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention


def keep_biases_by_distance(implementation: str) -> None:
    """Teaches transformers' classes to hand ``position_bias`` on by distance where their config names this
    ``implementation``; elsewhere they do what they did."""
    for attention in (T5Attention, MT5Attention):
        if not hasattr(attention.compute_bias, "__wrapped__"):  # the first time
            attention.compute_bias = _compute_bias(attention.compute_bias, implementation)
            attention.forward = _forward(attention.forward, implementation)


def _compute_bias(of_pairs: Callable[..., Tensor], implementation: str) -> Callable[..., Tensor]:
    @functools.wraps(of_pairs)
    def compute_bias(self, query_length, key_length, device=None, past_seen_tokens=0):
        ends = isinstance(past_seen_tokens, int) and past_seen_tokens == key_length - query_length
        if self.config._attn_implementation != implementation or not ends:
            return of_pairs(self, query_length, key_length, device, past_seen_tokens)
        reach = self.relative_attention_max_distance  # beyond, all distances share a bucket
        return of_pairs(self, 1, 2 * reach + 1, device, past_seen_tokens=reach)[0, :, 0]

    return compute_bias


def _forward(of_pairs: Callable[..., tuple], implementation: str) -> Callable[..., tuple]:
    """Cross-attention has no bias; transformers makes zeros for every pair."""

    @functools.wraps(of_pairs)
    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs):
        if (
            position_bias is None
            and not self.has_relative_attention_bias
            and self.config._attn_implementation == implementation
        ):
            position_bias = hidden_states.new_zeros(self.n_heads, 1)
        return of_pairs(self, hidden_states, mask, key_value_states, position_bias, **kwargs)

    return forward
