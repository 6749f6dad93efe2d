"""Copies and walks the keyword arguments of an op's case."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def build(case, device: str, dtype: torch.dtype, seed: int = 0) -> dict:
    """The case's arguments from a seed."""
    return case.build(torch.device(device), dtype, torch.Generator(device).manual_seed(seed))


def copy(arguments: dict, dtype: torch.dtype | None = None) -> dict:
    """The arguments with tensors as fresh leaves of the same layout; floating ones in ``dtype`` if that is given."""

    def fresh(value):
        if isinstance(value, Tensor):
            leaf = value.detach().to(dtype) if dtype and value.is_floating_point() else value.detach()
            return leaf.requires_grad_(value.requires_grad)
        return [fresh(item) for item in value] if isinstance(value, list) else value

    return {name: fresh(value) for name, value in arguments.items()}


def tensors(arguments: dict) -> Iterator[tuple[str, Tensor]]:
    """``(name, tensor)`` of every tensor, lists unrolled."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}[{index}]", item) for index, item in enumerate(value) if isinstance(item, Tensor))


def trainable(arguments: dict) -> dict[str, Tensor]:
    """The tensors that get gradients."""
    return {name: tensor for name, tensor in tensors(arguments) if tensor.requires_grad}


def replaced(arguments: dict, changes: dict[str, Tensor]) -> dict:
    """The arguments with some tensors, named as by :func:`tensors`, replaced."""

    def pick(name, value):
        if isinstance(value, list):
            return [changes.get(f"{name}[{index}]", item) for index, item in enumerate(value)]
        return changes.get(name, value)

    return {name: pick(name, value) for name, value in arguments.items()}
