"""Triton's interpreter as the tests run it: a GPU's arithmetic (numerics.py), every launch watched (sanitizer.py).

tests/conftest.py installs it when ``TRITON_INTERPRET=1``. Masked lanes of a load without ``other`` hold NaN, or a large
integer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.bench import numerics
from tests.bench.sanitizer import RunningLaunch


class CheckedBuilder(numerics.ArithmeticBuilder):
    """Tells the running launch of every program, access, dot and assertion."""

    launch: RunningLaunch

    def __init__(self) -> None:
        super().__init__()
        self.options = stock.InterpreterOptions(debug=True)  # assertions, and with them the checks of overflow

    def set_grid_dim(self, *grid: int) -> None:
        super().set_grid_dim(*grid)
        self.launch.report.grid = grid

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        self.launch.program += 1

    def create_masked_load(self, ptrs: TensorHandle, mask, other: TensorHandle | None, *_, **__) -> TensorHandle:
        dtype = numerics.numpy_dtype(ptrs.get_element_ty())
        address, inside = self.launch.touch("load", ptrs.data, mask.data, dtype.itemsize)
        fill = numerics.poison(ptrs.data.shape, dtype) if other is None else other.data
        bits = np.dtype(f"u{dtype.itemsize}")
        data = stock._interpreter.load(address, inside, fill.view(bits), bits)
        return TensorHandle(data.view(dtype), ptrs.get_element_ty())

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask, *_) -> None:
        bits = value.data.view(f"u{value.data.itemsize}")
        address, inside = self.launch.touch("store", ptrs.data, mask.data, bits.itemsize, bits)
        stock._interpreter.store(address, bits, inside)

    def create_atomic_rmw(self, op, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, *rest) -> TensorHandle:
        address, inside = self.launch.touch("atomic", ptr.data, mask.data, val.data.itemsize)
        ptr = TensorHandle(address, ptr.dtype)
        return super().create_atomic_rmw(op, ptr, val, TensorHandle(inside, tl.int1), *rest)

    def create_atomic_cas(self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, *rest) -> TensorHandle:
        address, inside = self.launch.touch("atomic", ptr.data, np.ones(ptr.data.shape, bool), val.data.itemsize)
        if not inside.all():
            raise IndexError("atomic_cas out of bounds")  # it has no mask to leave lanes out
        return super().create_atomic_cas(TensorHandle(address, ptr.dtype), cmp, val, *rest)

    def create_assert(self, condition: TensorHandle, message: str) -> None:
        if failed := np.size(condition.data) - np.count_nonzero(condition.data):
            self.launch.fault(f"assertion failed: {message}", failed)

    def create_dot(self, a: TensorHandle, b: TensorHandle, *rest) -> TensorHandle:
        self.launch.report.dot_flops += 2 * a.data.size * b.data.shape[-1]
        return super().create_dot(a, b, *rest)


_builder = CheckedBuilder()
_stock_implicit_cvt = stock._implicit_cvt


def _tagged_argument(arg):
    """An argument as the kernel sees it, pointers with their tag."""
    value = _stock_implicit_cvt(arg)
    if tag := _builder.launch.tags.get(id(stock._unwrap_tensor(arg))):
        value.handle.data = value.handle.data + np.uint64(tag)
    return value


class CheckedExecutor(stock.GridExecutor):
    """Opens a launch when its arguments are known and judges it after its last program."""

    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        _builder.launch = RunningLaunch(self.fn.__name__, dict(_tensors(named)))
        return args, kwargs

    def __call__(self, *args, **kwargs):
        # numpy warns of overflow and NaN where a GPU computes on
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                super().__call__(*args, **kwargs)
            except InterpreterError:
                _builder.launch.judge()  # a fault may be why
                raise
        _builder.launch.judge()


def _tensors(named: dict[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in named.items():
        value = stock._unwrap_tensor(value)
        if isinstance(value, TensorDescriptor):
            yield name, value.base
        elif isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from _tensors({f"{name}[{index}]": item for index, item in enumerate(value)})


def install() -> None:
    """Replaces the interpreter of this process."""
    stock._get_np_dtype = numerics.numpy_dtype
    stock.ReduceOps = numerics.ArithmeticReduce
    stock.GridExecutor = CheckedExecutor
    stock._implicit_cvt = _tagged_argument
    stock.interpreter_builder = stock.interpreter_semantic.builder = _builder
