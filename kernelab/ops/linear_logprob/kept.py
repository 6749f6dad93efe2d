"""The backward of a frozen head, on every backend: what the forward has kept, times the cotangents."""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = 2**20  # of a block of rows, in which products are wider than what is kept


def kept_backward(dlogprob: Tensor, dentropy: Tensor, grad_logprob: Tensor, grad_entropy: Tensor) -> Tensor:
    """``dhidden`` [M, d], the dtype of ``dlogprob``; ``dentropy`` is not read where ``grad_entropy`` is empty."""
    dhidden = torch.empty_like(dlogprob)
    rows, features = dlogprob.shape
    size = max(1, ELEMENTS // features)
    for first in range(0, rows, size):
        block = slice(first, first + size)
        result, factor = dhidden[block], grad_logprob[block, None]
        total = result if result.dtype == factor.dtype else torch.empty_like(result, dtype=factor.dtype)
        torch.mul(factor, dlogprob[block], out=total)
        if grad_entropy.numel() > 0:
            total.addcmul_(grad_entropy[block, None], dentropy[block])
        if total is not result:
            result.copy_(total)
    return dhidden
