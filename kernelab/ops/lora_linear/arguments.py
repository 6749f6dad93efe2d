"""Checks the arguments of ``lora_linear`` and ``lora_add`` once and brings them into the raw op's form."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernelab._core.arguments import check_matrix
from kernelab._core.errors import bad_type, bad_value

from .reference import Segment, segments


class Routing(NamedTuple):
    """Which rows use which adapter, in the order of the raw op's schema. Adapters are numbered among those in use."""

    counts: list[int]
    adapters: list[int]  # -1: off
    scaling: list[float]  # one an adapter in use
    keep: list[bool]  # adapter trains: its rows are kept for backward
    dropout_p: float
    seed: int

    def kept_segments(self) -> list[Segment]:
        return [segment for segment in segments(self.counts, self.adapters, self.keep) if segment.kept >= 0]

    def keeps_some_rows(self) -> bool:
        """Some rows are kept for backward, but not all: those are copied, since a slice holds its whole storage."""
        return 0 < sum(segment.count for segment in self.kept_segments()) < sum(self.counts)


def adapter_pairs(where: str, lora_a, lora_b, x: Tensor, out_features: int) -> tuple[list[Tensor], list[Tensor]]:
    """The adapters as two lists, from stacked tensors or sequences."""
    for name, value, shape in (("lora_a", lora_a, "[n, r, in]"), ("lora_b", lora_b, "[n, out, r]")):
        if isinstance(value, Tensor) and value.dim() != 3:
            raise bad_value(where, name, f"a stacked tensor {shape} or a sequence of matrices", value)
        if not isinstance(value, (Tensor, Sequence)):
            raise bad_type(where, name, f"a stacked tensor {shape} or a sequence of matrices", value)
    a_list, b_list = list(lora_a), list(lora_b)
    if len(a_list) != len(b_list):
        raise bad_value(where, "lora_b", f"{len(a_list)} adapters, as in lora_a", f"{len(b_list)}")
    for index, (a, b) in enumerate(zip(a_list, b_list, strict=True)):
        check_matrix(where, f"lora_a[{index}]", a, (None, x.shape[-1]), x)
        if a.shape[0] == 0:
            raise bad_value(where, f"lora_a[{index}]", "a rank of at least 1", a, "Use adapter None for off.")
        check_matrix(where, f"lora_b[{index}]", b, (out_features, a.shape[0]), x)
    return a_list, b_list


def scaling_list(where: str, scaling: object, adapters: int) -> list[float]:
    """One finite factor an adapter."""
    if isinstance(scaling, Tensor):
        scaling = scaling.tolist()
    factors = [scaling] * adapters if isinstance(scaling, numbers.Real) else scaling
    if not isinstance(factors, Sequence) or not all(isinstance(factor, numbers.Real) for factor in factors):
        raise bad_type(where, "scaling", "a number, or one number an adapter", scaling)
    if len(factors) != adapters:
        raise bad_value(where, "scaling", f"{adapters} numbers, one an adapter", f"{len(factors)}")
    if not all(abs(factor) < math.inf for factor in factors):  # math.isfinite breaks a compiled graph
        raise bad_value(where, "scaling", "finite numbers", scaling)
    return [float(factor) for factor in factors]


def segment_lists(where: str, segments: object, rows: int, adapters: int) -> tuple[list[int], list[int]]:
    """Counts and adapter numbers (-1: off) of consecutive segments that cover the rows."""
    if segments is None:
        if adapters == 0:
            raise bad_value(where, "segments", "segments, since there is no adapter 0 to use on every row", "None")
        return [rows], [0]
    counts, indices = [], []
    try:
        pairs = [(count, adapter) for count, adapter in segments]
    except (TypeError, ValueError):
        raise bad_type(where, "segments", "None or (count, adapter) pairs", segments) from None
    for position, (count, adapter) in enumerate(pairs):
        name = f"segments[{position}]"
        if isinstance(count, bool) or not isinstance(count, (numbers.Integral, torch.SymInt)):
            raise bad_type(where, name, "an integer count", count)
        if count < 0:
            raise bad_value(where, name, "a count of at least 0", count)
        if adapter is not None and (isinstance(adapter, bool) or not isinstance(adapter, numbers.Integral)):
            raise bad_type(where, name, "an adapter number or None", adapter)
        if adapter is not None and not 0 <= adapter < adapters:
            raise bad_value(where, name, f"an adapter in 0..{adapters - 1} or None (off)", adapter)
        counts.append(count)
        indices.append(-1 if adapter is None else int(adapter))
    if sum(counts) != rows:
        raise bad_value(where, "segments", f"counts that sum to the {rows} rows", f"a sum of {sum(counts)}")
    return counts, indices


def check_dropout(where: str, dropout_p: object, seed: object) -> None:
    """A probability below 1 and a seed of 64 bits."""
    if not isinstance(dropout_p, numbers.Real) or not 0 <= dropout_p < 1:
        raise bad_value(where, "dropout_p", "a probability 0 <= p < 1", dropout_p)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise bad_type(where, "seed", "an integer", seed)
    if not -(2**63) <= seed < 2**63:
        raise bad_value(where, "seed", "an integer of 64 bits", seed)


def route(where: str, x: Tensor, lora_a, lora_b, scaling, segments, dropout_p, seed, out_features: int):
    """``(Routing, [*A in use, *B in use])`` for flattened rows ``x`` [M, K]; adapters that no row uses are left out."""
    check_dropout(where, dropout_p, seed)
    a_list, b_list = adapter_pairs(where, lora_a, lora_b, x, out_features)
    factors = scaling_list(where, scaling, len(a_list))
    counts, indices = segment_lists(where, segments, x.shape[0], len(a_list))
    used = sorted({index for index in indices if index >= 0})
    number = {index: position for position, index in enumerate(used)} | {-1: -1}
    a_used, b_used = ([pair[index].to(x.dtype) for index in used] for pair in (a_list, b_list))
    grad = torch.is_grad_enabled()
    keep = [grad and (a.requires_grad or b.requires_grad) for a, b in zip(a_used, b_used, strict=True)]
    scaling = [factors[index] for index in used]
    routing = Routing(counts, [number[index] for index in indices], scaling, keep, float(dropout_p), int(seed))
    return routing, [*a_used, *b_used]
