"""Runs Triton kernels on the CPU with a GPU's arithmetic and refuses what is undefined on a GPU.

After ``install()`` (tests/conftest.py does it when ``TRITON_INTERPRET=1``) every launch is checked. It raises
``SanitizerError`` if a lane read or wrote outside the launch's tensors (such a lane is masked off), or if two programs
touched the same address and one of them wrote it without an atomic. Masked lanes of a load without ``other`` hold NaN.

    with sanitizer() as report:
        kernel[grid](x, y, n, BLOCK=1024)
    assert report.launches[0].bytes_loaded == 4 * n
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.bench import numerics
from tests.bench.sanitizer import Launch, LaunchReport, Report, SanitizerError

__all__ = ["LaunchReport", "Report", "SanitizerError", "install", "sanitizer"]


class CheckedBuilder(numerics.ArithmeticBuilder):
    """Tells the running launch of every program, access and dot."""

    launch: Launch

    def set_grid_dim(self, *grid: int) -> None:
        super().set_grid_dim(*grid)
        self.launch.report.grid = grid

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        self.launch.program += 1

    def create_masked_load(self, ptrs: TensorHandle, mask, other: TensorHandle | None, *_, **__) -> TensorHandle:
        dtype = numerics.numpy_dtype(ptrs.get_element_ty())
        inside = self.launch.touch("load", ptrs.data, mask.data, dtype.itemsize)
        fill = numerics.poison(ptrs.data.shape, dtype) if other is None else other.data
        bits = np.dtype(f"u{dtype.itemsize}")
        data = stock._interpreter.load(ptrs.data, inside, fill.view(bits), bits)
        return TensorHandle(data.view(dtype), ptrs.get_element_ty())

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask, *_) -> None:
        bits = value.data.view(f"u{value.data.itemsize}")
        inside = self.launch.touch("store", ptrs.data, mask.data, bits.itemsize, bits)
        stock._interpreter.store(ptrs.data, bits, inside)

    def create_atomic_rmw(self, op, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, *rest) -> TensorHandle:
        inside = self.launch.touch("atomic", ptr.data, mask.data, val.data.itemsize)
        return super().create_atomic_rmw(op, ptr, val, TensorHandle(inside, tl.int1), *rest)

    def create_atomic_cas(self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, *rest) -> TensorHandle:
        inside = self.launch.touch("atomic", ptr.data, np.ones(ptr.data.shape, bool), val.data.itemsize)
        if not inside.all():
            raise IndexError("atomic_cas out of bounds")  # it has no mask to leave lanes out
        return super().create_atomic_cas(ptr, cmp, val, *rest)

    def create_dot(self, a: TensorHandle, b: TensorHandle, *rest) -> TensorHandle:
        self.launch.report.dot_flops += 2 * a.data.size * b.data.shape[-1]
        return super().create_dot(a, b, *rest)


_builder = CheckedBuilder()
_reports: list[Report] = []
_reachable: dict[str, torch.Tensor] = {}
_strict = True


class CheckedExecutor(stock.GridExecutor):
    """Opens a launch when its arguments are known and judges it after its last program."""

    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        _builder.launch = Launch(self.fn.__name__, dict(_tensors(named)) | _reachable)
        for report in _reports:
            report.launches.append(_builder.launch.report)
        return args, kwargs

    def __call__(self, *args, **kwargs):
        # numpy warns of overflow and NaN where a GPU computes on
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                super().__call__(*args, **kwargs)
            except InterpreterError:
                self._judge()  # a fault may be why
                raise
        self._judge()

    def _judge(self) -> None:
        if _strict:
            _builder.launch.report.assert_clean()


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
    stock.interpreter_builder = stock.interpreter_semantic.builder = _builder


@contextmanager
def sanitizer(*, strict: bool = True, reachable: Iterable[torch.Tensor] = ()) -> Iterator[Report]:
    """Collects a report of every launch in the block, where ``torch.empty`` gives NaN.

    ``strict=False`` records faults without raising, for tests of faulty kernels. ``reachable`` are tensors that kernels
    find through a table of pointers.
    """
    global _strict, _reachable
    report, before = Report(), (_strict, _reachable)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    _strict, _reachable = strict, {f"reachable[{index}]": tensor for index, tensor in enumerate(reachable)}
    _reports.append(report)
    torch.use_deterministic_algorithms(True)
    try:
        yield report
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _reports.pop()
        _strict, _reachable = before
