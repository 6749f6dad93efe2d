"""Loads the C++ extension and calls it. What is missing is explained on first use, not on import."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .errors import NativeLoadError, bad_value


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        # torch first: both then share one OpenMP runtime, and torch.set_num_threads holds for both.
        return importlib.import_module("kernelab._C_cpu"), ""
    except ImportError as error:
        return None, str(error)


def reason_missing() -> str | None:
    """Why the extension cannot be used; None where it can."""
    module, error = _load()
    return None if module is not None else f"the C++ extension does not load ({error})"


def call(name: str, *arguments) -> None:
    """Calls a function of the extension; tensors go in as pointers and live until it returns. On fake tensors, nothing.

    Raises:
        NativeLoadError: the extension is not there; says how to build it.
        ValueError: a tensor is not on the CPU or its last dimension is not contiguous.
    """
    module, error = _load()
    if module is None:
        raise NativeLoadError(
            f"{name}: the C++ extension does not load: {error}. Install a C++ compiler and run "
            "`KERNELAB_BUILD=cpu pip install --force-reinstall --no-deps .` in the source tree; without it kernelab "
            "runs on torch alone."
        )
    for argument in arguments:
        if isinstance(argument, Tensor) and (
            argument.device.type != "cpu" or argument.layout != torch.strided or argument.stride(-1) != 1
        ):
            raise bad_value(name, "tensor", "a CPU tensor whose last dimension is contiguous", argument)
    if any(isinstance(argument, FakeTensor) for argument in arguments):
        return  # the extension only writes into what it is given, and that has no memory
    getattr(module, name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def row_major(t: Tensor) -> Tensor:
    """``t`` with a last stride of 1, which ``contiguous`` does not promise of a single column."""
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)
