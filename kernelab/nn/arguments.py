"""Checks of the arguments that the modules share."""

from __future__ import annotations

from torch import Tensor, nn

from kernelab._core.arguments import check_input
from kernelab._core.errors import bad_type, bad_value
from kernelab._core.sequences import check_padding_mask, documents_of

from .cache import KeyValueCache


def check_count(where: str, name: str, number: object, least: int | None = 1) -> None:
    """An integer, of at least ``least``."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise bad_type(where, name, "an integer", number)
    if least is not None and number < least:
        raise bad_value(where, name, f"at least {least}", number)


def check_flag(where: str, name: str, flag: object) -> None:
    """True or False."""
    if not isinstance(flag, bool):
        raise bad_type(where, name, "True or False", flag)


def head_dim_of(where: str, d_model: int, num_heads: int, head_dim: int | None) -> int:
    """The features of a head; None: ``d_model // num_heads``."""
    check_count(where, "d_model", d_model)
    check_count(where, "num_heads", num_heads)
    if head_dim is not None:
        check_count(where, "head_dim", head_dim)
        return head_dim
    if d_model % num_heads:
        raise bad_value(where, "num_heads", f"a divisor of d_model {d_model}", num_heads, "Or give head_dim.")
    return d_model // num_heads


def kv_heads_of(where: str, num_heads: int, num_kv_heads: int | None) -> int:
    """The heads of keys and values; None: as many as queries have."""
    if num_kv_heads is None:
        return num_heads
    check_count(where, "num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise bad_value(where, "num_kv_heads", f"a divisor of num_heads {num_heads}", num_kv_heads)
    return num_kv_heads


def check_call(
    module: nn.Module, x: object, key_padding_mask: object, cu_seqlens: object, cache: object
) -> Tensor | None:
    """The arguments of a self-attention ``module`` that has ``d_model`` and ``causal``.

    Returns the documents of ``cu_seqlens``: first token of each token's document and the one after its last, int32
    [2, N].
    """
    where = type(module).__name__
    check_input(where, "x", x)
    if x.dim() != 3 or x.shape[2] != module.d_model:
        raise bad_value(where, "x", f"shape [batch, tokens, {module.d_model}]", x)
    if cache is not None and not isinstance(cache, KeyValueCache):
        raise bad_type(where, "cache", "a KeyValueCache or None", cache)
    check_cache(where, module.causal, cache, cu_seqlens)
    seen = 0 if cache is None else cache.length
    check_padding_mask(where, key_padding_mask, x, x.shape[0], seen + x.shape[1])
    return documents_of(where, cu_seqlens, x, x.shape[0], x.shape[1])


def check_cache(where: str, causal: bool, cache: object, cu_seqlens: object) -> None:
    """Where a cache may be."""
    if cache is None:
        return
    if not causal:
        hint = "A token that sees later ones changes with each that is appended."
        raise bad_value(where, "cache", "None unless causal=True", cache, hint)
    if cu_seqlens is not None:
        raise bad_value(where, "cu_seqlens", "None with a cache", cu_seqlens)
