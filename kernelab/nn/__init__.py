"""Modules that hold parameters and call the ops: attention with every scheme of positions, and a transformer."""

from .attention import Attention
from .cache import KeyValueCache
from .relative import RelativeAttention
from .rotary import RotaryAttention
from .schemes import ALiBi, Disentangled, RelativeKey, RelativeKeyQuery, T5Bias
from .transformer import Transformer

__all__ = [
    "ALiBi",
    "Attention",
    "Disentangled",
    "KeyValueCache",
    "RelativeAttention",
    "RelativeKey",
    "RelativeKeyQuery",
    "RotaryAttention",
    "T5Bias",
    "Transformer",
]
