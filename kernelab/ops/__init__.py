"""The kernels as functions. Each op's folder has its definition, its backends and its mathematics."""

from importlib import import_module

from kernelab._core.registry import explain

from .linear_logprob import linear_logprob
from .lora_linear import lora_add, lora_linear
from .relative_attention import relative_attention

__all__ = ["explain", "linear_logprob", "lora_add", "lora_linear", "relative_attention"]

_FOLDERS = ("linear_logprob", "lora_linear", "relative_attention", "toeplitz_attention", "window_mean")


def specs():
    """The specifications of all ops, which feed the tests, the AOT checks, the benchmarks and ``kernelab.env``."""
    return [spec for folder in _FOLDERS for spec in import_module(f"{__name__}.{folder}.spec").SPECS]
