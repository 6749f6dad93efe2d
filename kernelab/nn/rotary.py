"""Self-attention with rotary positions."""

from __future__ import annotations

import math
import numbers

from torch import Tensor

from kernelab._core.errors import bad_type, bad_value

from .arguments import check_count
from .attention import Attention
from .positions import rotate, token_positions


class RotaryAttention(Attention):
    """Self-attention whose queries and keys are turned by their positions (:func:`kernelab.nn.positions.rotate`).

    Runs as :class:`Attention` does: flash-attn, scaled_dot_product_attention, or ``relative_attention``. Positions go
    on after those in the cache and start again with each packed document.

    Args:
        d_model, num_heads: as of :class:`Attention`, like the other keywords.
        rotary_dim: features of a head that are turned, an even number; None: all.
        theta: base of the wavelengths.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Source: Su et al. (arXiv 2104.09864); ``rotary_dim`` as in GPT-NeoX and Phi.

    >>> attention = RotaryAttention(64, 4, rotary_dim=8, causal=True)
    >>> attention(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self, d_model: int, num_heads: int, *, rotary_dim: int | None = None, theta: float = 10000.0, **keywords
    ) -> None:
        super().__init__(d_model, num_heads, **keywords)
        self.rotary_dim, self.theta = self.head_dim if rotary_dim is None else rotary_dim, theta
        where = "RotaryAttention"
        check_count(where, "rotary_dim", self.rotary_dim, least=2)
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise bad_value(where, "rotary_dim", f"an even number up to head_dim {self.head_dim}", self.rotary_dim)
        if isinstance(theta, bool) or not isinstance(theta, numbers.Real):
            raise bad_type(where, "theta", "a number", theta)
        if not (math.isfinite(theta) and theta > 0):
            raise bad_value(where, "theta", "a finite number above 0", theta)

    def place(self, query: Tensor, key: Tensor, offset: int, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys, turned."""
        position = token_positions(query.shape[2], offset, documents=documents, device=query.device)
        return tuple(rotate(t, position, self.rotary_dim, self.theta) for t in (query, key))
