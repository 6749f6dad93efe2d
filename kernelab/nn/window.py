"""Self-attention with fixed windows, of another width in every head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernelab._core.errors import bad_type, bad_value
from kernelab.ops.toeplitz_attention import toeplitz_attention
from kernelab.ops.window_mean import window_mean

from .arguments import check_count
from .position_only import ValueAttention

PROFILES = ("uniform", "gaussian")


class WindowAttention(ValueAttention):
    """Self-attention that weighs the tokens of a fixed window, and looks at no content.

    Token i of a head of width w sees the tokens j with ``0 <= i - j < w`` if causal, ``|i - j| < w`` if not.

    Args:
        d_model: features of x.
        num_heads: heads.
        widths: an integer of at least 1 for each head; None: 1, 3, 7, ..., ``2^(h+1) - 1`` for head h.
        profile: "uniform", the mean of these tokens, in a time that does not depend on the width; or "gaussian", the
            weights of a normal distribution around i of standard deviation w / 3, normalised over these tokens.
        head_dim: features of a head; None: ``d_model // num_heads``.
        causal: a token sees no later one.
        bias: the projections have biases.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Source: the fixed attentions of Allen-Zhu and Li (arXiv 2305.13673), whose exact profiles were not at hand.

    >>> attention = WindowAttention(64, 4, causal=True)
    >>> attention.widths
    [1, 3, 7, 15]
    >>> attention(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        widths: Sequence[int] | None = None,
        profile: str = "uniform",
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim=head_dim, causal=causal, bias=bias)
        where = type(self).__name__
        if not isinstance(profile, str) or profile not in PROFILES:
            raise bad_value(where, "profile", f"one of {', '.join(PROFILES)}", profile)
        if widths is None:
            widths = [2 ** (head + 1) - 1 for head in range(num_heads)]
        if not isinstance(widths, Sequence) or isinstance(widths, str):
            raise bad_type(where, "widths", f"{num_heads} integers or None", widths)
        if len(widths) != num_heads:
            raise bad_value(where, "widths", f"{num_heads} integers, one for each head", widths)
        for width in widths:
            check_count(where, "widths", width)
        self.widths, self.profile = list(widths), profile

    def mix(self, value: Tensor, queries: int, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """As of :class:`ValueAttention`."""
        first = max(0, value.shape[2] - queries - max(self.widths) + 1)  # of the tokens that a query sees
        value = value[:, :, first:]
        mask = None if key_padding_mask is None else key_padding_mask[:, first:]
        visible = {"causal": self.causal, "key_padding_mask": mask, "cu_seqlens": cu_seqlens}
        if self.profile == "uniform":
            return window_mean(value, self.widths, **visible)[:, :, value.shape[2] - queries :]
        return toeplitz_attention(value, self._log_profile(value), queries=queries, **visible)

    def _log_profile(self, value: Tensor) -> Tensor:
        """Logarithms of the weights, [H, 2K+1], for the distances that occur."""
        wide = torch.promote_types(value.dtype, torch.float32)
        reach = min(max(self.widths), value.shape[2])
        distance = torch.arange(-reach, reach + 1, device=value.device)
        width = torch.tensor(self.widths, device=value.device)[:, None]
        weights = (3 * distance.to(wide) / width).square() / -2
        return torch.where(distance.abs() < width, weights, -torch.inf)

    def extra_repr(self) -> str:
        """What ``print`` says of the module beside its parts."""
        return f"{super().extra_repr()}, widths={self.widths}, profile={self.profile}"
