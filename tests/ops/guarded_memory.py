"""Calls of the C++ in memory where a write beside an array shows, and a read from there makes NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kernelab._core import native

MARGIN = 512  # elements before and after an array
GUARDS = {  # signalling NaNs: arithmetic makes other bits of them, so that adding to one shows too
    torch.bfloat16: (torch.int16, 0x7FA1),
    torch.float16: (torch.int16, 0x7D01),
    torch.float32: (torch.int32, 0x7FA00001),
    torch.float64: (torch.int64, 0x7FF4000000000001),
    torch.int32: (torch.int32, -1),
    torch.int64: (torch.int64, -1),
    torch.int32: (torch.int32, -1),
    torch.bool: (torch.uint8, 0xFF),
}


class Guarded:
    """A copy of a tensor of the same strides, guards on both sides and wherever its strides leave room."""

    def __init__(self, tensor: Tensor) -> None:
        bits, self.guard = GUARDS[tensor.dtype]
        self.original = tensor.detach().view(bits)
        strided = tensor.shape, tensor.stride(), MARGIN
        extent = 1 + sum((size - 1) * stride for size, stride in zip(*strided[:2], strict=True))
        self.memory = torch.full((max(extent, 0) + 2 * MARGIN,), self.guard, dtype=bits)
        self.places = torch.arange(len(self.memory)).as_strided(*strided).flatten()
        self.memory[self.places] = self.original.flatten()
        self.copy = self.memory.as_strided(*strided)
        self.tensor = self.copy.view(tensor.dtype)

    def release(self, name: str) -> None:
        """Checks the guards and gives the tensor what was written."""
        written = self.copy.clone()
        self.memory[self.places] = self.guard
        beside = (self.memory != self.guard).nonzero().flatten() - MARGIN
        assert not len(beside), f"{name} wrote beside an array {list(written.shape)}, at element {beside[0].item()}"
        if not torch.equal(written, self.original):
            self.original.copy_(written)


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Inside the block ``native.call`` gives the C++ guarded copies."""
    call = native.call

    def guarded_call(name: str, *arguments: object) -> None:
        copies: dict[tuple, Guarded] = {}  # an array may come twice

        def copy(argument: object) -> object:
            if not isinstance(argument, Tensor):
                return argument
            key = argument.data_ptr(), argument.shape, argument.stride()
            if key not in copies:
                copies[key] = Guarded(argument)
            return copies[key].tensor

        call(name, *map(copy, arguments))
        for guarded in copies.values():
            guarded.release(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "call", guarded_call)
        yield
