"""Modules that hold parameters and call the ops: attention with every scheme of positions, and a transformer."""

from .attention import Attention
from .cache import KeyValueCache
from .position_only import PositionOnlyAttention
from .relative import RelativeAttention
from .rotary import RotaryAttention
from .schemes import ALiBi, Disentangled, RelativeKey, RelativeKeyQuery, T5Bias
from .transformer import Transformer
from .window import WindowAttention

__all__ = [
    "ALiBi",
    "Attention",
    "Disentangled",
    "KeyValueCache",
    "PositionOnlyAttention",
    "RelativeAttention",
    "RelativeKey",
    "RelativeKeyQuery",
    "RotaryAttention",
    "T5Bias",
    "Transformer",
    "WindowAttention",
]
