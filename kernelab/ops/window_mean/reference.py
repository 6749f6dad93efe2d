"""The definition of ``window_mean`` in plain torch: differentiable, any floating dtype.

Query ``i`` of head ``h`` sees the keys ``j`` of its window, ``0 <= i - j < w_h`` if causal and ``|i - j| < w_h`` if
not, that exist, belong to its document and are not padding, ``n_i`` of them:

    out_i = sum_j v_j / n_i                     over these keys; 0 where there are none           forward
    dv_j = sum_i dout_i / n_i                   over the queries i that see key j                 backward

Sums are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    tokens: int, widths, causal: bool, key_padding_mask: Tensor | None, documents: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys a query sees, [B or 1, H, Nq, Nk]."""
    place = torch.arange(tokens, device=device)
    distance = place[:, None] - place  # i - j
    width = torch.tensor(widths, device=device)[:, None, None]
    seen = (distance < width) & (distance >= 0 if causal else distance > -width)
    if documents is not None:
        first, end = documents[:, :, None]  # [Nq, 1]
        seen = seen & (place >= first) & (place < end)
    return seen[None] if key_padding_mask is None else seen & key_padding_mask[:, None, None]


def weights(x: Tensor, *arguments) -> Tensor:
    """``1 / n_i`` where query i sees key j, [B or 1, H, Nq, Nk]."""
    seen = visible(x.shape[2], *arguments, x.device)
    return seen / seen.sum(-1, keepdim=True).clamp(min=1).to(torch.promote_types(x.dtype, torch.float32))


def forward(value, widths, causal, key_padding_mask, documents):
    """The raw op."""
    w = weights(value, widths, causal, key_padding_mask, documents)
    v = value if key_padding_mask is None else torch.where(key_padding_mask[:, None, :, None], value, 0)
    return (w @ v.to(w.dtype)).to(value.dtype)


def backward(grad_out, widths, causal, key_padding_mask, documents):
    """The gradient of ``value``."""
    w = weights(grad_out, widths, causal, key_padding_mask, documents)
    return (w.mT @ grad_out.to(w.dtype)).to(grad_out.dtype)
