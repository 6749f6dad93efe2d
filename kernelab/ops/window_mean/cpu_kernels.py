"""CPU: every window is the end of one block and the beginning of the next, blocks as long as a window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelab._core import native
from kernelab._core.sequences import document_slices

from .arguments import inverse_counts, kept, reach


def forward(value, widths, causal, key_padding_mask, documents):
    back, ahead = reach(widths, causal, value.shape[2])
    inverse = inverse_counts(value, widths, causal, key_padding_mask, documents)
    return _window_sum(value, kept(key_padding_mask, inverse), inverse, back, ahead, documents)


def backward(grad_out, widths, causal, key_padding_mask, documents):
    back, ahead = reach(widths, causal, grad_out.shape[2])
    inverse = inverse_counts(grad_out, widths, causal, key_padding_mask, documents)
    return _window_sum(grad_out, inverse, kept(key_padding_mask, inverse), ahead, back, documents)


def _window_sum(
    x: Tensor, before: Tensor | None, after: Tensor | None, back: list[int], ahead: list[int], documents: Tensor | None
) -> Tensor:
    """``after_i`` times the sum of ``before_j x_j`` over i - back <= j <= i + ahead in i's document."""
    y = torch.empty(x.shape, dtype=x.dtype)
    if y.numel() > 0:
        fill = _fill_native if native.reason_missing() is None else _fill_torch
        fill(y, x, before, after, back, ahead, documents)
    return y


def _fill_native(y, x, before, after, back, ahead, documents):
    batch, heads, rows, features = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    x = native.row_major(x)
    threads = max(1, min(torch.get_num_threads(), batch * heads))
    # a window that reaches the first row from the last is one block, and no other needs its end
    work_rows = max([0, *(b + a + 1 for b, a in zip(back, ahead, strict=True) if b + 1 < rows)])

    def factors(t: Tensor | None) -> tuple:
        if t is None:
            return 0, 0, 0
        t = native.row_major(t).expand(batch, heads, rows)
        return t, t.stride(0), t.stride(1)

    native.call(
        f"window_sum_{str(x.dtype).removeprefix('torch.')}",
        *(x, *x.stride()[:3], *factors(before), *factors(after), torch.tensor([back, ahead])),
        *(0 if documents is None else native.row_major(documents[1]), batch, heads, rows, features),
        *(torch.empty(threads * work_rows * 64, dtype=wide), work_rows, threads, y),
    )


def _fill_torch(y, x, before, after, back, ahead, documents):
    for head, (b, a) in enumerate(zip(back, ahead, strict=True)):
        source = _scaled(x[:, head].to(torch.promote_types(x.dtype, torch.float32)), before, head)  # [B, N, D]
        sums = [_sums(source[:, document], b, a) for document in document_slices(documents, x.shape[2])]
        y[:, head] = _scaled(torch.cat(sums, 1), after, head)


def _scaled(rows: Tensor, factors: Tensor | None, head: int) -> Tensor:
    """[B, N, D] times the factors [B or 1, H or 1, N] of a head; 0 takes all with it."""
    if factors is None:
        return rows
    factor = factors[:, head if factors.shape[1] > 1 else 0, :, None]
    return torch.where(factor == 0, 0, rows) * factor


def _sums(x: Tensor, back: int, ahead: int) -> Tensor:
    """Sums over the windows of one document, [B, N, D]."""
    tokens = x.shape[1]
    back, ahead = min(back, tokens), min(ahead, tokens)
    block = back + ahead + 1
    size = -(-(tokens + ahead) // block) * block
    blocks = F.pad(x, (0, 0, 0, size - tokens)).unflatten(1, (-1, block))  # [B, blocks, block, D]
    until = blocks.cumsum(2)
    since = blocks.flip(2).cumsum(2).flip(2)[:, :-1, 1:]  # of the block before
    until[:, 1:, :-1] += since
    return until.flatten(1, 2)[:, ahead : ahead + tokens]
