"""Triton's interpreter with the arithmetic of a GPU.

The stock interpreter keeps bfloat16 and float8 as raw integers and computes with the integers. Here numpy holds them as
the dtypes of ``ml_dtypes``, so every operator rounds to nearest even as torch does. ``tl.dot`` accumulates in float32,
and cuts float32 operands to tf32 unless the kernel asks for ``input_precision="ieee"`` (or ``"tf32x3"``).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle

NUMPY_DTYPES = {
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
    tl.float8e4b8: np.dtype(ml_dtypes.float8_e4m3fnuz),
    tl.float8e5b16: np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_stock_numpy_dtype = stock._get_np_dtype


def numpy_dtype(dtype) -> np.dtype:
    """The numpy dtype that holds a Triton dtype."""
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    return NUMPY_DTYPES.get(scalar) or _stock_numpy_dtype(scalar)


def poison(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What a GPU may leave in lanes that a mask switched off: NaN with every bit set, or a large integer."""
    if dtype == np.bool_:
        return np.ones(shape, dtype)
    byte = 0x7F if dtype.kind in "iu" else 0xFF
    return np.full((*shape, dtype.itemsize), byte, np.uint8).view(dtype)[..., 0]


def is_poison(data: np.ndarray) -> np.ndarray:
    """Lanes of floats that come from ``poison``, also after a cast to a wider float. The NaN of arithmetic differ."""
    bits = np.ascontiguousarray(data).view(f"u{data.itemsize}")
    shift = max(0, 8 * data.itemsize - 16)
    return bits >> shift == np.iinfo(bits.dtype).max >> shift


def is_float(data: np.ndarray) -> bool:
    return data.dtype.kind not in "biu"


def truncate_tf32(data: np.ndarray) -> np.ndarray:
    """Tensor cores read the upper 19 bits of a float32; Triton emits no rounding before them."""
    return (np.ascontiguousarray(data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def convert(data: np.ndarray, dtype: np.dtype, toward_zero: bool = False) -> np.ndarray:
    """Cast with round to nearest even, or toward zero; float8 e4m3 saturates, as on the GPU and in torch."""
    if dtype == ml_dtypes.float8_e4m3fn:
        data = np.clip(data.astype(np.float32), -448, 448)
    result = data.astype(dtype)
    if toward_zero:
        grew = np.abs(result.astype(np.float64)) > np.abs(data.astype(np.float64))
        bits = result.view(f"u{dtype.itemsize}")
        result = (bits - grew.astype(bits.dtype)).view(dtype)
    return result


def ignore_nan(select: np.ufunc):
    """``select`` that ignores NaN as the GPU's min and max do, but not the NaN of undefined lanes."""

    def apply(lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
        result = select(lhs, rhs)
        undefined = is_poison(lhs) | is_poison(rhs)
        return np.where(undefined, poison(result.shape, result.dtype), result) if undefined.any() else result

    return apply


class ArithmeticBuilder(stock.InterpreterBuilder):
    """Replaces the operators that the stock builder gets wrong."""

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(np.array([value], ml_dtypes.bfloat16), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type) -> TensorHandle:
        return TensorHandle(convert(src.data, numpy_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src: TensorHandle, dst_type, rounding_mode) -> TensorHandle:
        toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
        return TensorHandle(convert(src.data, numpy_dtype(dst_type), toward_zero), dst_type.scalar)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, ignore_nan(np.fmax))

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, ignore_nan(np.fmin))

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision, *rest) -> TensorHandle:
        lhs, rhs = a.data, b.data  # [*, M, K], [*, K, N]
        if lhs.dtype == np.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            lhs, rhs = truncate_tf32(lhs), truncate_tf32(rhs)
        return TensorHandle(np.matmul(lhs, rhs, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    def create_atomic_rmw(self, op, ptr: TensorHandle, val: TensorHandle, *rest) -> TensorHandle:
        if val.data.dtype in NUMPY_DTYPES.values():
            raise NotImplementedError(f"atomics on {val.dtype.scalar}: accumulate in float32 and cast afterwards")
        return super().create_atomic_rmw(op, ptr, val, *rest)


class ArithmeticReduce(stock.ReduceOps):
    """16-bit sums are added pairwise in their own precision, and max and min ignore NaN but keep undefined lanes."""

    def sum(self, input):
        data = input.handle.data
        if not is_float(data) or data.itemsize >= 4:
            return super().sum(input)
        axis = self.axis
        if axis is None:
            data, axis = data.reshape(-1), 0
        data = np.moveaxis(data, axis, 0)
        while data.shape[0] > 1:
            half = data.shape[0] // 2
            data = data[:half] + data[half:]
        total = data[0]
        if self.keep_dims:
            shape = [1] * input.handle.data.ndim if self.axis is None else list(input.handle.data.shape)
            shape[axis] = 1
            total = total.reshape(shape)
        return self.to_tensor(total, input.dtype)

    def min_max(self, input, val_reduce_op, idx_reduce_op=None):
        result = super().min_max(input, val_reduce_op, idx_reduce_op)
        data = (input[0] if isinstance(input, tuple) else input).handle.data
        if idx_reduce_op is None and is_float(data):
            undefined = np.any(is_poison(data), axis=self.axis, keepdims=self.keep_dims)
            handle = result.handle
            handle.data = np.where(undefined, poison(handle.data.shape, data.dtype), handle.data)
        return result
