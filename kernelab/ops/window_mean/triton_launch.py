"""The Triton backend of ``window_mean``: plans the launches of a call and runs them."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from kernelab._core.launch import capability, power_of_two, run, unit_stride
from kernelab._core.spec import Launch

from . import triton_kernels as kernels
from .arguments import inverse_counts, kept, reach

ROWS, BLOCKS = 32, 32  # of a tile; of block sums that are added at a time


def forward(value, widths, causal, key_padding_mask, documents):
    back, ahead = reach(widths, causal, value.shape[2])
    inverse = inverse_counts(value, widths, causal, key_padding_mask, documents)
    return _window_sum(value, kept(key_padding_mask, inverse), inverse, back, ahead, documents)


def backward(grad_out, widths, causal, key_padding_mask, documents):
    back, ahead = reach(widths, causal, grad_out.shape[2])
    inverse = inverse_counts(grad_out, widths, causal, key_padding_mask, documents)
    return _window_sum(grad_out, inverse, kept(key_padding_mask, inverse), ahead, back, documents)


def _window_sum(x, before, after, back: list[int], ahead: list[int], documents) -> Tensor:
    launches, y = plan(x, before, after, back, ahead, documents, capability(x.device))
    run(launches, x)
    return y


def plan(
    x: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    back: list[int],
    ahead: list[int],
    documents: Tensor | None,
    capability: int,
) -> tuple[list[Launch], Tensor]:
    """``(launches, y)``: ``after_i`` times the sum of ``before_j x_j`` over i - back <= j <= i + ahead."""
    batch, heads, rows, features = x.shape
    x, y = unit_stride(x), x.new_empty(x.shape)
    block_d = min(128, power_of_two(features))
    has_sums = max(b + a + 1 for b, a in zip(back, ahead, strict=True)) >= 2 * ROWS - 1  # else no block is all seen
    blocks = cdiv(rows, ROWS)
    sums = x.new_empty(batch * heads, blocks, features, dtype=torch.float32) if has_sums else None
    before, after = (None if t is None else t.expand(batch, heads, rows) for t in (before, after))
    of_before, of_after = ((0, 0) if t is None else t.stride()[:2] for t in (before, after))
    shared = {"x_ptr": x, "before_ptr": before, "sums_ptr": sums, "rows": rows, "D": features, "heads": heads}
    shared |= {"stride_xb": x.stride(0), "stride_xh": x.stride(1), "stride_xn": x.stride(2)}
    shared |= {"stride_bb": of_before[0], "stride_bh": of_before[1], "HAS_BEFORE": before is not None}
    shared |= {"BLOCK_N": ROWS, "BLOCK_D": block_d}
    grid = batch * heads * blocks, cdiv(features, block_d)
    options = {"num_warps": 4, "num_stages": 2} if capability else {"num_warps": 8, "num_stages": 1}
    window = {"after_ptr": after, "reach_ptr": torch.tensor([back, ahead], device=x.device), "y_ptr": y}
    window |= {"documents_ptr": documents, "stride_doc": 0 if documents is None else documents.stride(0)}
    window |= {"stride_ab": of_after[0], "stride_ah": of_after[1], "HAS_AFTER": after is not None}
    window |= {"HAS_SUMS": has_sums, "HAS_DOCUMENTS": documents is not None, "BLOCK_S": BLOCKS}
    # 0 and 1 are exact in tf32, and three of it hold a float32
    window |= {"PRECISION": "tf32x3" if x.dtype == torch.float32 and capability else "ieee"}
    launches = [Launch("sums", kernels._window_mean_sums_kernel, grid, shared, options)] if has_sums else []
    return [*launches, Launch("window", kernels._window_mean_kernel, grid, shared | window, options)], y
