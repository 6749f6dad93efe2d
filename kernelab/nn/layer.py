"""One layer of a transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
NORMS = ("pre", "post", "parallel")


class Layer(nn.Module):
    """Attention and two linear layers, each with its residual; a gate may mix the result with what came in.

    >>> from kernelab.nn import Attention
    >>> Layer(Attention(16, 2), 16, 64)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        attention: nn.Module,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "gelu",
        norm: str = "pre",
        dropout: float = 0.0,
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(d_model)
        self.up_proj, self.down_proj = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        self.mlp_norm = None if norm == "parallel" else nn.LayerNorm(d_model)
        self.gate = nn.Linear(d_model, d_model) if gate else None
        self.dropout = nn.Dropout(dropout)
        self.activation, self.norm = activation, norm

    def forward(self, x: Tensor, **call) -> Tensor:
        """[B, N, d_model] to the same; ``call`` is what the attention is called with beside x."""
        y = {"pre": self._pre, "post": self._post, "parallel": self._parallel}[self.norm](x, call)
        return y if self.gate is None else x + self.gate(x).sigmoid() * (y - x)

    def _pre(self, x: Tensor, call: dict) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), **call))
        return x + self.dropout(self._mlp(self.mlp_norm(x)))

    def _post(self, x: Tensor, call: dict) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, **call)))
        return self.mlp_norm(x + self.dropout(self._mlp(x)))

    def _parallel(self, x: Tensor, call: dict) -> Tensor:
        normal = self.attention_norm(x)
        return x + self.dropout(self.attention(normal, **call) + self._mlp(normal))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))
