"""Self-attention with learned tables of the distance."""

from __future__ import annotations

import inspect

from torch import nn

from kernelab._core.errors import bad_type, bad_value

from .attention import Attention
from .schemes import SCHEMES


class RelativeAttention(Attention):
    """Self-attention whose scores, and perhaps values, depend on the distance of key and query.

    Args:
        d_model, num_heads: as of :class:`Attention`, like num_kv_heads, head_dim, causal and bias.
        position: "relative_key", "relative_key_query", "disentangled", "t5", "alibi", or a module of
            :mod:`kernelab.nn.schemes`, which several layers may share.
        options: keyword arguments of the scheme that ``position`` names, such as ``max_distance``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    >>> attention = RelativeAttention(64, 4, position="relative_key", max_distance=8, causal=True)
    >>> attention(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        position: str | nn.Module = "relative_key",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = True,
        **options,
    ) -> None:
        super().__init__(d_model, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, causal=causal, bias=bias)
        self.position = self._scheme(position, options)

    def _scheme(self, position: str | nn.Module, options: dict) -> nn.Module:
        where = "RelativeAttention"
        if isinstance(position, nn.Module):
            if options:
                name = next(iter(options))
                raise bad_value(where, name, "no option beside a scheme that is made already", options[name])
            return position
        if not isinstance(position, str):
            raise bad_type(where, "position", f"a module or one of {', '.join(SCHEMES)}", position)
        if position not in SCHEMES:
            raise bad_value(where, "position", f"a module or one of {', '.join(SCHEMES)}", position)
        scheme = SCHEMES[position]
        known = inspect.signature(scheme).parameters
        for name in options:
            if name not in known:
                raise bad_type(where, name, f"an option of {position}: {', '.join(known)}", options[name])
        given = {"d_model": self.d_model, "num_heads": self.num_heads, "head_dim": self.head_dim}
        given["bidirectional"] = not self.causal
        return scheme(**({name: value for name, value in given.items() if name in known} | options))

    def tables(self, keys: int, memory: dict) -> dict[str, object]:
        """The tables of the scheme, for distances up to ``keys - 1``."""
        return self.position(self, max(keys - 1, 0), memory)
