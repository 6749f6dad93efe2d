"""Philox4x32-10 in plain torch: the definition that the C++, CUDA and Triton versions repeat bit for bit.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Words are int64 tensors that hold
unsigned 32-bit values; a product of two wraps modulo 2^64, which leaves both halves right.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# The stream word keeps uses of one seed apart.
STREAM_DROPOUT = 1


def philox(seed: int, element: Tensor, sample: Tensor, step: int = 0, stream: int = 0) -> tuple[Tensor, ...]:
    """Four 32-bit words for key ``seed`` (64 bits) and counter ``(element, sample, step, stream)``, broadcast."""
    element, sample = torch.broadcast_tensors(element, sample)
    c0, c1 = element & _MASK, sample & _MASK
    c2, c3 = torch.full_like(c0, step & _MASK), torch.full_like(c0, stream & _MASK)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """An element is kept where its 32-bit word is at least this: probability ``1 - p``."""
    return min(round(p * 2**32), _MASK)


def dropout_mask(seed: int, p: float, first_row: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Boolean keep mask ``[rows, columns]`` of the rows from ``first_row``: element ``(i, j)`` takes word ``j % 4`` of
    counter ``(j // 4, i, 0, STREAM_DROPOUT)``, so it is the same however the rows are split."""
    groups = torch.arange((columns + 3) // 4, device=device)
    row = torch.arange(first_row, first_row + rows, device=device)
    words = torch.stack(philox(seed, groups[None, :], row[:, None], stream=STREAM_DROPOUT), dim=-1)
    return (words >= dropout_threshold(p)).flatten(1)[:, :columns]
