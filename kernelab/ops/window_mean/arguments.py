"""Checks and prepares the arguments of ``window_mean``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelab._core.arguments import check_input
from kernelab._core.errors import bad_type, bad_value

WHERE = "window_mean"


def check(value: object, widths: object, causal: object) -> list[int]:
    """Every argument but what says which keys may be seen; the heads' widths."""
    check_input(WHERE, "value", value)
    if value.dim() != 4 or value.shape[1] == 0 or value.shape[3] == 0:
        raise bad_value(WHERE, "value", "shape [batch, heads, tokens, features], heads and features not 0", value)
    if not isinstance(causal, bool):
        raise bad_type(WHERE, "causal", "True or False", causal)
    heads = value.shape[1]
    numbers = [widths] * heads if _is_integer(widths) else widths
    if not isinstance(numbers, Sequence) or not all(_is_integer(width) for width in numbers):
        raise bad_type(WHERE, "widths", f"an integer or {heads} of them", widths)
    if len(numbers) != heads:
        raise bad_value(WHERE, "widths", f"an integer or {heads} of them, one for each head", widths)
    if any(width < 1 for width in numbers):
        raise bad_value(WHERE, "widths", "at least 1: a token sees itself", widths)
    return list(numbers)


def reach(widths: Sequence[int], causal: bool, tokens: int) -> tuple[list[int], list[int]]:
    """How many keys before and after its own each head's queries see."""
    back = [min(width - 1, tokens) for width in widths]
    return back, [0] * len(back) if causal else back


def inverse_counts(
    value: Tensor, widths: Sequence[int], causal: bool, mask: Tensor | None, documents: Tensor | None
) -> Tensor:
    """1 over the number of keys that a query sees, 0 where it sees none: [B or 1, H, N], float32 or float64."""
    tokens, device = value.shape[2], value.device
    place = torch.arange(tokens, device=device)
    start, stop = (0, tokens) if documents is None else documents.long()
    back, ahead = torch.tensor(reach(widths, causal, tokens), device=device)[:, :, None]  # [H, 1]
    first, end = (place - back).clamp(min=start), (place + ahead + 1).clamp(max=stop)  # [H, N]
    if mask is None:
        counts = (end - first)[None]
    else:
        visible = F.pad(mask.cumsum(1), (1, 0))  # of the keys before this one [B, N + 1]
        counts = visible[:, end] - visible[:, first]
    inverse = counts.to(torch.promote_types(value.dtype, torch.float32)).reciprocal()
    return torch.where(counts > 0, inverse, 0)


def kept(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """1 for a key that may be seen, 0 for padding, [B, 1, N] in the dtype of ``like``."""
    return None if mask is None else mask[:, None].to(like.dtype)


def _is_integer(number: object) -> bool:
    return isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool)
