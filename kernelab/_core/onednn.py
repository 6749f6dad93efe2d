"""float32 products by oneDNN. torch calls MKL for them, which leaves AVX-512 unused on AMD: oneDNN takes half the time
there."""

from __future__ import annotations

import torch
from torch import Tensor


def wins(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear(x, weight)`` is the faster way. Below the size its fixed cost of about 10 us shows."""
    large = x.shape[0] * weight.numel() >= 2**21
    return large and x.dtype == torch.float32 and torch._C._get_mkldnn_enabled() and torch._C._has_mkldnn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` within rounding."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
