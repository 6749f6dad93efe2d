"""The settings of one adapter."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from kernelab._core.errors import bad_type, bad_value


@dataclass(frozen=True)
class LoRAConfig:
    """Rank, scale and dropout of one adapter: its layers add ``scaling * dropout(x) A^T B^T``.

    Args:
        r: rank, at least 1.
        alpha: ``scaling`` is ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``.
        dropout: probability ``0 <= p < 1``, on the adapter's input only and only in training mode.
        use_rslora: rank-stabilised scaling (Kalajdzievski, arXiv 2312.03732).

    Raises:
        ValueError, TypeError: a setting is impossible; the message names it.

    >>> LoRAConfig(r=8, alpha=16).scaling
    2.0
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        where = "LoRAConfig"
        if isinstance(self.r, bool) or not isinstance(self.r, int):
            raise bad_type(where, "r", "an integer", self.r)
        if self.r < 1:
            raise bad_value(where, "r", "a rank of at least 1", self.r)
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise bad_type(where, name, "a number", value)
        if not math.isfinite(self.alpha):
            raise bad_value(where, "alpha", "a finite number", self.alpha)
        if not 0 <= self.dropout < 1:
            raise bad_value(where, "dropout", "a probability 0 <= p < 1", self.dropout)
        if not isinstance(self.use_rslora, bool):
            raise bad_type(where, "use_rslora", "True or False", self.use_rslora)

    @property
    def scaling(self) -> float:
        """The factor of ``B A``."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
