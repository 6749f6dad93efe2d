"""Checks and prepares the arguments of ``toeplitz_attention``."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from kernelab._core.arguments import FLOATS, check_dtype, check_input
from kernelab._core.errors import bad_type, bad_value

WHERE = "toeplitz_attention"


def check(value: object, bias: object, causal: object, queries: object, query_offset: object) -> tuple[int, int]:
    """Every argument but what says which keys may be seen; the number of queries and the position of the first."""
    check_input(WHERE, "value", value)
    if value.dim() != 4 or value.shape[1] == 0 or value.shape[3] == 0:
        raise bad_value(WHERE, "value", "shape [batch, heads, keys, features], heads and features not 0", value)
    heads, keys = value.shape[1], value.shape[2]
    if not isinstance(bias, Tensor) or bias.dtype not in FLOATS:
        raise bad_type(WHERE, "bias", f"a floating tensor [{heads} or 1, 2K+1]", bias)
    if bias.dim() != 2 or not (bias.shape[0] == 1 or bias.shape[0] == heads):
        raise bad_value(WHERE, "bias", f"shape [{heads} or 1, 2K+1]", bias)
    if bias.shape[1] % 2 == 0:
        hint = "Its columns are the distances -K..K, so that their number is odd."
        raise bad_value(WHERE, "bias", f"shape [{heads} or 1, 2K+1], an odd number of columns", bias, hint)
    if bias.device != value.device:
        raise bad_value(WHERE, "bias", f"a tensor on {value.device}, as value", bias, "Move it with .to(device).")
    if bias.dtype != torch.float32 or value.dtype == torch.float64:
        check_dtype(WHERE, "value", value, bias=bias)
    if not isinstance(causal, bool):
        raise bad_type(WHERE, "causal", "True or False", causal)
    for name, number in (("queries", queries), ("query_offset", query_offset)):
        whole = isinstance(number, (numbers.Integral, torch.SymInt)) and not isinstance(number, bool)
        if number is not None and not whole:
            raise bad_type(WHERE, name, "an integer or None", number)
    queries = keys if queries is None else queries
    if queries < 0:
        raise bad_value(WHERE, "queries", "at least 0", queries)
    return queries, keys - queries if query_offset is None else query_offset


def check_packed(documents: Tensor | None, queries: int, keys: int, query_offset: int) -> None:
    """Documents are sequences of their own, as many queries as keys each."""
    if documents is not None and (queries != keys or query_offset != 0):
        raise bad_value(WHERE, "queries", f"{keys} or None, and query_offset 0 or None, with cu_seqlens", queries)


def no_gradient(like: Tensor) -> Tensor:
    """What a raw backward returns for an input whose gradient nobody needs."""
    return like.new_empty(0)
