"""Modules that hold parameters and call the ops: attention with every scheme of positions, and a transformer."""

from .attention import Attention
from .cache import KeyValueCache

__all__ = ["Attention", "KeyValueCache"]
