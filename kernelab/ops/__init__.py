"""The kernels as functions. Each op's folder has its definition, its backends and its mathematics."""

from .lora_linear import lora_add, lora_linear

__all__ = ["lora_add", "lora_linear"]
