"""What ``attn_implementation="kernelab"`` means to a model of transformers.

A model asks the mask function once for a mask and gives it to the attention function of every layer:

    None            as many keys as may be: causal where the layer or its caller says so, queries ending where keys do
    bool [B, 1, N]  causal in the same way, N keys of which False are padding
    bool [B, 1, 1, N]   not causal, N keys of which False are padding
    [B or 1, *, Nq, Nk] anything else: what it says and nothing more, as in torch

Only the last is as large as the scores, and goes through torch's scaled_dot_product_attention.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from kernelab._core.errors import bad_value
from kernelab.ops import relative_attention

from . import t5

NAME = "kernelab"
log = logging.getLogger("kernelab")


def register() -> None:
    """Adds ``attn_implementation="kernelab"`` to transformers, for models that use its attention interface.

    Padding masks stay [B, N], keys and values of grouped heads are not repeated, and the biases of T5 and its kin stay
    one row a distance: no tensor of the size of the scores is made. Dropout of the attention weights and masks of any
    other pattern (sliding windows, packed positions, 4-D masks of the user) have no such form: they go through torch's
    scaled_dot_product_attention with all they need in memory, and the log says so once.

    Calling it again changes nothing.

    Source: transformers' AttentionInterface and AttentionMaskInterface.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    >>> config = LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)
    >>> register()
    >>> config._attn_implementation = "kernelab"  # or from_pretrained(..., attn_implementation="kernelab")
    >>> LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 50])
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    t5.keep_biases_by_distance(NAME)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **rest,
) -> Tensor | None:
    """The mask of a call, as the attention function reads it. ``attention_mask`` is [B, keys], True for a token."""
    known = not isinstance(q_offset, Tensor) and q_offset - kv_offset == kv_length - q_length
    padding = attention_mask
    if padding is not None:
        padding = prepare_padding_mask(padding.flatten(1), kv_length, kv_offset)
        padding = padding[:, kv_offset : kv_offset + kv_length]
    if mask_function is causal_mask_function and known and allow_is_causal_skip:
        return None if padding is None else padding[:, None]
    if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip:
        return None if padding is None else padding[:, None, None]
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        None if attention_mask is None else attention_mask.flatten(1),
        allow_is_causal_skip=allow_is_causal_skip and known,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **rest,
    )


class _Visible(NamedTuple):
    """Which keys a query sees: by ``padding`` [B, Nk], and, if ``causal``, none after it; or as ``explicit`` says."""

    causal: bool
    padding: Tensor | None = None
    explicit: Tensor | None = None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What a layer calls, with query [B, Hq, Nq, D]: the output [B, Nq, Hq, D], and None for the weights."""
    _refuse(kwargs)
    visible = _read(attention_mask, query, key, getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    tables = _tables(module, query, key, attention_mask)
    if position_bias is not None and position_bias.dim() == 2:
        tables["bias"], position_bias = position_bias, None
    reason = (
        "dropout of attention weights" * bool(dropout)
        or "a mask of its own for every query" * (visible.explicit is not None)
        or "a bias of its own for every pair" * (position_bias is not None)
    )
    if reason:
        say(reason)
        return _by_sdpa(module, query, key, value, visible, tables, position_bias, dropout, scaling)
    rest = {"causal": visible.causal, "key_padding_mask": visible.padding, "scale": scaling}
    return relative_attention(query, key, value, **tables, **rest).transpose(1, 2).contiguous(), None


def _refuse(kwargs: dict) -> None:
    reasons = {
        "softcap": 'Scores that are capped need attn_implementation="eager".',
        "s_aux": 'Attention sinks need attn_implementation="eager".',
        "cache": 'Continuous batching needs attn_implementation="sdpa".',
        "output_attentions": 'The weights are never in memory; attn_implementation="eager" has them.',
    }
    for name, hint in reasons.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise bad_value(NAME, name, "None", kwargs[name], hint)


def _read(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> _Visible:
    batch, keys = query.shape[0], key.shape[2]
    if mask is None:
        return _Visible(causal)
    padding = mask.dtype == torch.bool and mask.shape[-1] == keys
    if padding and mask.dim() == 3 and mask.shape[1] == 1:
        return _Visible(True, mask[:, 0].expand(batch, -1))
    if padding and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
        return _Visible(False, mask[:, 0, 0].expand(batch, -1))
    if mask.dim() == 4:
        return _Visible(False, explicit=mask)
    expected = f"a mask of the kernelab mask function, or one of 4 dimensions for {keys} keys"
    raise bad_value(NAME, "attention_mask", expected, mask)


def _tables(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Of a BERT with relative positions (bert.py), whose rows are distances i - j, where the op's are j - i."""
    terms = getattr(module, "relative_terms", ())
    if not terms:
        return {}
    keys, reach = key.shape[2], module.distance_embedding.num_embeddings // 2
    if keys > reach + 1:
        hint = "They are config.max_position_embeddings."
        raise bad_value(NAME, "input", f"at most the {reach + 1} tokens of distance_embedding", f"{keys} tokens", hint)
    if query.shape[2] != keys and mask is not None and mask.dim() == 4:
        hint = "Relative positions with a StaticCache are not supported; a DynamicCache is."
        raise bad_value(NAME, "attention_mask", "None or [batch, keys] with a cache", mask, hint)
    used = max(keys - 1, 0)
    table = module.distance_embedding.weight[reach - used : reach + used + 1].flip(0)[None]  # [1, 2 Nk - 1, D]
    return {f"{term}_table": table for term in terms}


def _by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: _Visible,
    tables: dict[str, Tensor],
    position_bias: Tensor | None,
    dropout: float,
    scaling: float,
) -> tuple[Tensor, None]:
    """The same, with masks and tables written out for every pair where torch cannot do without."""
    queries, keys = query.shape[2], key.shape[2]
    position = torch.arange(keys - queries, keys, device=query.device)[:, None]
    distance = torch.arange(keys, device=query.device) - position  # [Nq, Nk]
    seen = distance <= 0 if visible.causal else torch.ones_like(distance, dtype=torch.bool)
    mask = visible.explicit
    if visible.padding is not None:
        mask = visible.padding[:, None, None] & seen
    elif visible.causal and queries not in (1, keys):  # torch's causal mask begins at the first key
        mask = seen[None, None]
    added = [] if position_bias is None else [position_bias]
    if "query_table" in tables:
        added.append(scaling * _pick(query @ tables["query_table"].mT, distance))
    if "key_table" in tables:
        added.append(scaling * _pick(key @ tables["key_table"].mT, distance.mT).mT)
    if "bias" in tables:
        added.append(_pick(tables["bias"][None, :, None].expand(-1, -1, queries, -1), distance))
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=visible.causal,
        position_bias=sum(added) if added else None,
    )


def _pick(profile: Tensor, distance: Tensor) -> Tensor:
    """Of every row the element of its distances: [*, n, 2K+1] and [n, m] give [*, n, m]."""
    reach = profile.shape[-1] // 2
    return profile.gather(-1, (distance.clamp(-reach, reach) + reach).expand(*profile.shape[:-2], -1, -1))


@functools.cache
def say(reason: str, way: str = "torch's scaled_dot_product_attention") -> None:
    """Once a reason: what goes another way."""
    log.warning("kernelab attention: %s goes through %s", reason, way)
