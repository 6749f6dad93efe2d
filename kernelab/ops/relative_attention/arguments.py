"""Checks and prepares the arguments of ``relative_attention``."""

from __future__ import annotations

import math
import numbers
import warnings

import torch
from torch import Tensor

from kernelab._core import sequences
from kernelab._core.arguments import FLOATS, check_input
from kernelab._core.errors import bad_type, bad_value

WHERE = "relative_attention"


def check_heads(query: object, key: object, value: object) -> None:
    """Shapes and devices of queries, keys and values."""
    check_input(WHERE, "query", query)
    if query.dim() != 4:
        raise bad_value(WHERE, "query", "shape [batch, heads, queries, features]", query)
    if query.shape[3] == 0 or query.shape[1] == 0:
        raise bad_value(WHERE, "query", "at least one head and one feature", query)
    batch, heads, _, features = query.shape
    for name, tensor in (("key", key), ("value", value)):
        check_input(WHERE, name, tensor)
        if tensor.dim() != 4 or tensor.shape[0] != batch:
            raise bad_value(WHERE, name, f"shape [{batch}, heads, keys, features]", tensor)
        _check_device(name, tensor, query)
    if key.shape[3] != features:
        raise bad_value(WHERE, "key", f"{features} features, as query", key)
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise bad_value(WHERE, "key", f"a number of heads that divides query's {heads}", key)
    if value.shape[:3] != key.shape[:3] or value.shape[3] == 0:
        raise bad_value(WHERE, "value", f"shape [{', '.join(map(str, key.shape[:3]))}, *], as key", value)


def check_table(name: str, table: object, query: Tensor, features: int | None) -> None:
    """A table [heads or 1, 2K+1, features]; [heads or 1, 2K+1] for ``features`` None."""
    if table is None:
        return
    heads = query.shape[1]
    expected = f"[{heads} or 1, 2K+1{'' if features is None else f', {features}'}]"
    if not isinstance(table, Tensor):
        raise bad_type(WHERE, name, f"a tensor {expected} or None", table)
    if table.dtype not in FLOATS:
        raise bad_type(WHERE, name, "float32, bfloat16, float16 or float64", table)
    fits = table.dim() == (2 if features is None else 3) and (table.shape[0] == 1 or table.shape[0] == heads)
    if not fits or (features is not None and table.shape[2] != features):
        raise bad_value(WHERE, name, f"shape {expected}", table)
    if table.shape[1] % 2 == 0:
        hint = "Its rows are the distances -K..K, so that their number is odd."
        raise bad_value(WHERE, name, f"shape {expected}, an odd number of rows", table, hint)
    _check_device(name, table, query)


def check_mask(mask: object, query: Tensor, key: Tensor) -> None:
    """``key_padding_mask``."""
    sequences.check_padding_mask(WHERE, mask, query, query.shape[0], key.shape[2])


def check_rest(causal: object, content: object, query_offset: object, scale: object) -> None:
    """Flags and numbers."""
    for name, flag in (("causal", causal), ("content", content)):
        if not isinstance(flag, bool):
            raise bad_type(WHERE, name, "True or False", flag)
    whole = isinstance(query_offset, (numbers.Integral, torch.SymInt)) and not isinstance(query_offset, bool)
    if query_offset is not None and not whole:
        raise bad_type(WHERE, "query_offset", "an integer or None", query_offset)
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
            raise bad_type(WHERE, "scale", "a number or None", scale)
        if not math.isfinite(scale):
            raise bad_value(WHERE, "scale", "a finite number", scale)


def documents_of(cu_seqlens: object, query: Tensor, key: Tensor, query_offset: int | None) -> Tensor | None:
    """First key of each query's document and the one after its last, int32 [2, N]."""
    documents = sequences.documents_of(WHERE, cu_seqlens, query, query.shape[0], query.shape[2])
    if documents is not None and query.shape[2] != key.shape[2]:
        raise bad_value(WHERE, "cu_seqlens", "None unless there are as many keys as queries", cu_seqlens)
    if documents is not None and query_offset is not None and query_offset != 0:
        raise bad_value(WHERE, "query_offset", "0 or None with cu_seqlens", query_offset)
    return documents


def warn_of_queries_without_keys(causal: bool, query_offset: int) -> None:
    """Under ``causal`` a query before the first key sees none."""
    if causal and query_offset < 0 and not torch.compiler.is_compiling():
        text = (
            f"{WHERE}: query_offset {query_offset} puts the first {-query_offset} queries before every key; under "
            "causal=True they see none and give 0. Pass query_offset if the queries do not end where the keys do."
        )
        warnings.warn(text, stacklevel=3)


def same_reach(*tables: Tensor | None) -> list[Tensor | None]:
    """The tables with as many rows as the longest: the rows at its ends stand for all that lies beyond."""
    rows = max([0, *(table.shape[1] for table in tables if table is not None)])

    def widen(table: Tensor) -> Tensor:
        more = (rows - table.shape[1]) // 2
        first, last = (t.expand(-1, more, *table.shape[2:]) for t in (table[:, :1], table[:, -1:]))
        return torch.cat([first, table, last], dim=1)

    return [table if table is None or table.shape[1] == rows else widen(table) for table in tables]


def no_gradient(like: Tensor) -> Tensor:
    """What a raw backward returns for an input whose gradient nobody needs."""
    return like.new_empty(0)


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise bad_value(WHERE, name, f"a tensor on {query.device}, as query", tensor, "Move it with .to(device).")
