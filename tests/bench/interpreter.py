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
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.bench import numerics
from tests.bench.sanitizer import Launch, LaunchReport, Report, SanitizerError

__all__ = ["LaunchReport", "Report", "SanitizerError", "install", "sanitizer"]


class CheckedBuilder(numerics.ArithmeticBuilder):
    """Tells the running launch of every access."""

    launch: Launch

    def set_grid_dim(self, *grid: int) -> None:
        super().set_grid_dim(*grid)
        self.launch.report.grid = grid

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        self.launch.program += 1

    def create_masked_load(self, ptrs: TensorHandle, mask, other: TensorHandle | None, *rest) -> TensorHandle:
        dtype = numerics.numpy_dtype(ptrs.get_element_ty())
        inside = self.launch.touch("load", ptrs.data, np.asarray(mask.data), dtype.itemsize)
        if other is None:
            other = TensorHandle(numerics.poison(ptrs.data.shape, dtype), ptrs.get_element_ty())
        return super().create_masked_load(ptrs, TensorHandle(inside, mask_type), other, *rest)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask, *rest) -> None:
        inside = self.launch.touch("store", ptrs.data, np.asarray(mask.data), value.data.itemsize, value.data)
        super().create_masked_store(ptrs, value, TensorHandle(inside, mask_type), *rest)

    def create_atomic_rmw(self, op, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, *rest) -> TensorHandle:
        inside = self.launch.touch("atomic", ptr.data, mask.data, val.data.itemsize)
        return super().create_atomic_rmw(op, ptr, val, TensorHandle(inside, mask_type), *rest)

    def create_atomic_cas(self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, *rest) -> TensorHandle:
        inside = self.launch.touch("atomic", ptr.data, np.ones_like(ptr.data, bool), val.data.itemsize)
        if not inside.all():
            raise SanitizerError("atomic_cas out of bounds")
        return super().create_atomic_cas(ptr, cmp, val, *rest)

    def create_dot(self, a: TensorHandle, b: TensorHandle, *rest) -> TensorHandle:
        self.launch.report.dot_flops += 2 * a.data.size * b.data.shape[-1]
        return super().create_dot(a, b, *rest)


mask_type = stock.tl.int1
builder = CheckedBuilder()


class CheckedExecutor(stock.GridExecutor):
    """Opens a launch when its arguments are known and judges it after its last program."""

    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        builder.launch = Launch(self.fn.__name__, dict(_tensors(named)) | _reachable)
        return args, kwargs

    def __call__(self, *args, **kwargs):
        # numpy warns of overflow and NaN where a GPU computes on
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            super().__call__(*args, **kwargs)
        launch = builder.launch.report
        if _reports:
            _reports[-1].launches.append(launch)
        if _strict:
            launch.assert_clean()


def _tensors(named: dict) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in named.items():
        value = stock._unwrap_tensor(value)
        if isinstance(value, TensorDescriptor):
            yield name, value.base
        elif isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple):
            yield from _tensors({f"{name}[{index}]": item for index, item in enumerate(value)})


_reports: list[Report] = []
_reachable: dict[str, torch.Tensor] = {}
_strict = True


def install() -> None:
    """Replaces the interpreter of this process. To be called once, before the first launch."""
    stock._get_np_dtype = numerics.numpy_dtype
    stock.ReduceOps = numerics.ArithmeticReduce
    stock.GridExecutor = CheckedExecutor
    stock.interpreter_builder = stock.interpreter_semantic.builder = builder


@contextmanager
def sanitizer(*, strict: bool = True, reachable: Iterable[torch.Tensor] = ()) -> Iterator[Report]:
    """Collects a report of every launch in the block.

    ``strict=False`` records faults without raising, for tests of faulty kernels. ``reachable`` are tensors that kernels
    find through a table of pointers. Inside the block ``torch.empty`` gives NaN.
    """
    global _strict, _reachable
    report, before = Report(), (_strict, _reachable)
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    _strict, _reachable = strict, {f"reachable[{index}]": tensor for index, tensor in enumerate(reachable)}
    _reports.append(report)
    torch.use_deterministic_algorithms(True)
    try:
        yield report
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        _reports.pop()
        _strict, _reachable = before
