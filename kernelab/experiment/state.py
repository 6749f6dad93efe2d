"""Nested state as named tensors plus JSON, exactly: what a checkpoint writes instead of a pickle."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch

from kernelab._core.errors import bad_type, bad_value

_PLAIN = (type(None), bool, int, str)
_MAPPINGS = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64}
_DTYPES |= {torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}
_DTYPES |= {torch.float8_e4m3fn, torch.float8_e5m2}  # what safetensors holds
_EXPECTED = "tensors, numpy arrays, numbers, strings, None, and dicts, lists and tuples of them"


def encode(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """``(JSON tree, tensors by name)`` of nested state; :func:`decode` gives it back exactly.

    Tensors come back contiguous, on the CPU, as plain tensors; one that stands in several places (a tied weight) is
    kept once and comes back as one. Anything that would come back different raises ``TypeError`` with its path.
    """
    encoder = _Encoder()
    return encoder.encode(state, ()), encoder.tensors


def decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The state that :func:`encode` took apart."""
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in content)
    return _MAPPINGS[kind]({decode(key, tensors): decode(value, tensors) for key, value in content})


class _Encoder:
    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple, str] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, path: tuple) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is list:
            return [self.encode(item, (*path, index)) for index, item in enumerate(value)]
        if kind is tuple:
            return {"tuple": [self.encode(item, (*path, index)) for index, item in enumerate(value)]}
        if kind.__name__ in _MAPPINGS and kind is _MAPPINGS[kind.__name__]:
            items = [[self.encode(key, path), self.encode(item, (*path, key))] for key, item in value.items()]
            return {kind.__name__: items}
        if kind in (torch.Tensor, torch.nn.Parameter):
            return {"tensor": self._tensor(value.detach(), path)}
        if kind is np.ndarray:
            return {"array": self._array(value, path)}
        hint = "Call .item() on it." if isinstance(value, np.generic) else "Give the object a state_dict()."
        if isinstance(value, torch.Tensor):
            hint = "Gather a sharded tensor (full_tensor()) before it is saved."
        raise bad_type("checkpoint", _show(path), _EXPECTED, kind.__name__, hint)

    def _tensor(self, tensor: torch.Tensor, path: tuple) -> str:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise bad_type(
                "checkpoint", _show(path), "a dense tensor with storage", f"{tensor.layout} on {tensor.device}"
            )
        if tensor.dtype not in _DTYPES:
            raise bad_value("checkpoint", _show(path), "a dtype that safetensors holds", tensor, "View it as another.")
        view = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        view += (tensor.is_conj(), tensor.is_neg())
        if tensor.numel() and view in self._names:
            return self._names[view]
        dense = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        if dense.untyped_storage().data_ptr() in self._storages:
            dense = dense.clone()  # safetensors refuses tensors that share memory
        self._storages.add(dense.untyped_storage().data_ptr())
        self._names[view] = self._add(dense, path)
        return self._names[view]

    def _array(self, array: np.ndarray, path: tuple) -> str:
        try:
            tensor = torch.from_numpy(array.copy(order="C"))
        except TypeError as error:
            raise bad_type("checkpoint", _show(path), "a numeric numpy array", f"dtype {array.dtype}") from error
        return self._add(tensor, path)

    def _add(self, tensor: torch.Tensor, path: tuple) -> str:
        name = base = _show(path)
        while name in self.tensors:  # keys 1 and "1" of one dict
            name = f"{base}#{len(self.tensors)}"
        self.tensors[name] = tensor
        return name


def _show(path: tuple) -> str:
    return "/".join(str(key) for key in path) or "state"
