"""The arithmetic of the mended interpreter, against torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from kernelab._core.philox import philox
from tests.contract.bench_kernels import matmul_kernel

pytestmark = pytest.mark.interp


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, with any NaN equal to any other."""
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    y = x.to(y_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(y_ptr + offsets, y, mask=offsets < n)


def cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, y, x.numel(), ROUNDING=rounding, BLOCK=triton.next_power_of_2(x.numel()))
    return y


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)


def floats_between_bfloat16() -> torch.Tensor:
    """Ties, their neighbours on both sides, infinities, NaN and subnormals."""
    upper = torch.arange(-(2**15), 2**15, 13, dtype=torch.int32) << 16
    return torch.cat([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_casts_from_bfloat16(dtype: torch.dtype):
    x = every_bfloat16()
    assert same_bits(cast(x, dtype), x.to(dtype))


def test_casts_to_bfloat16_round_to_nearest_even():
    x = floats_between_bfloat16()
    assert same_bits(cast(x, torch.bfloat16), x.bfloat16())
    assert same_bits(cast(x.double(), torch.bfloat16), x.double().bfloat16())
    integers = torch.arange(-5000, 5000, dtype=torch.int32)
    assert same_bits(cast(integers, torch.bfloat16), integers.bfloat16())
    assert torch.equal(cast(integers.bfloat16(), torch.int32), integers.bfloat16().int())


def test_cast_toward_zero_cuts():
    x = floats_between_bfloat16()
    x = x[x.isfinite()]
    expected = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert same_bits(cast(x, torch.bfloat16, "rtz"), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_float8_casts(dtype: torch.dtype, source: torch.dtype):
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    assert same_bits(cast(every, source), every.to(source))
    x = torch.cat([every.float(), torch.randn(10_000) * 300, torch.tensor([1e9, -1e9])]).to(source)
    assert same_bits(cast(x, dtype).float(), x.to(dtype).float())


@triton.jit
def _binary_kernel(x_ptr, y_ptr, z_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "scale":
        z = 0.3 * x
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "minimum_nan":
        z = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "where":
        z = tl.where(x < y, x, y)
    elif OP == "equal":
        z = (x == y).to(tl.int8)
    elif OP == "negative_abs":
        z = -tl.abs(x)
    elif OP == "clamp":
        z = tl.clamp(x, -1.0, 1.0)
    tl.store(z_ptr + offsets, z.to(z_ptr.dtype.element_ty))


BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "scale": lambda x, y: x * torch.tensor(0.3, dtype=x.dtype),
    "maximum": torch.fmax,
    "minimum": torch.fmin,
    "minimum_nan": torch.minimum,
    "where": lambda x, y: torch.where(x < y, x, y),
    "equal": lambda x, y: (x == y).to(torch.int8),
    "negative_abs": lambda x, y: -x.abs(),
    "clamp": lambda x, y: x.clamp(-1, 1),
}


@pytest.mark.parametrize("name", BINARY)
def test_bfloat16_operators_equal_torch(name: str):
    x = every_bfloat16()
    x[x.isnan()] = float("nan")  # one of them is the NaN of undefined lanes
    if name == "clamp":
        x = x.nan_to_num()  # torch keeps NaN, a GPU clamps it
    y = x[torch.randperm(len(x))]
    expected = BINARY[name](x, y)
    z = torch.empty_like(expected)
    _binary_kernel[(1,)](x, y, z, OP=name, BLOCK=len(x))
    assert same_bits(z, expected)


@triton.jit
def _exp_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets).to(tl.float32)
    tl.store(y_ptr + offsets, tl.exp(x).to(y_ptr.dtype.element_ty))


def test_exp_rounds_as_torch():
    x = every_bfloat16()
    y = torch.empty_like(x)
    _exp_kernel[(1,)](x, y, BLOCK=len(x))
    assert torch.equal(y.isnan(), x.isnan())
    ulps = (y.view(torch.int16).int() - x.exp().view(torch.int16).int())[~x.isnan()].abs()
    assert ulps.max() <= 1
    assert ulps.sum() <= 4  # the two float32 functions differ in the last bit, now and then across a tie


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, OP: tl.constexpr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    if OP == "sum":
        y = tl.sum(x, axis=AXIS, keep_dims=True)
    elif OP == "max":
        y = tl.max(x, axis=AXIS, keep_dims=True)
    elif OP == "min":
        y = tl.min(x, axis=AXIS, keep_dims=True)
    elif OP == "argmax":
        y = tl.argmax(x, axis=AXIS, keep_dims=True)
    rows: tl.constexpr = M if AXIS == 1 else 1
    columns: tl.constexpr = N if AXIS == 0 else 1
    tl.store(y_ptr + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :], y)


REDUCTIONS = {"sum": torch.sum, "max": torch.amax, "min": torch.amin, "argmax": lambda x, dim: x.argmax(dim).int()}


@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name in REDUCTIONS for axis in (0, 1, None) if (name, axis) != ("argmax", None)]
)
def test_bfloat16_reductions(name: str, axis: int | None):
    x = torch.randperm(512).reshape(16, 32) % 2 if name == "sum" else torch.randn(16, 32)
    x = x.bfloat16()  # sums up to 256 are exact in any order
    expected = REDUCTIONS[name](x, (0, 1) if axis is None else axis).reshape(-1)
    y = torch.empty_like(expected)
    _reduce_kernel[(1,)](x, y, OP=name, AXIS=axis, M=16, N=32)
    assert torch.equal(y, expected)


def test_bfloat16_sum_is_rounded_at_every_step():
    x = torch.ones(1, 1024).bfloat16()
    x[0, 512:] = 1 + 2**-7  # 1.0078125: lost when added to 256 or more
    y = torch.empty(1, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](x, y, OP="sum", AXIS=1, M=1, N=1024)
    assert 1024 <= float(y) <= 1032


def test_max_ignores_nan_as_a_gpu():
    x = torch.tensor([[1.0, float("nan"), 3.0, 2.0]])
    y = torch.empty(1)
    _reduce_kernel[(1,)](x, y, OP="max", AXIS=1, M=1, N=4)
    assert y == 3


def test_float32_dot_is_tf32_unless_asked_otherwise():
    x, w = torch.randn(64, 512), torch.randn(32, 512)
    exact = x.double() @ w.double().T
    error = {}
    for precision in ("ieee", "tf32x3", "tf32"):
        y = torch.empty(64, 32)
        matmul_kernel[(1, 1)](x, w, y, 64, 32, 512, 64, 32, 64, precision)
        error[precision] = float((y - exact).abs().max())
    assert max(error["ieee"], error["tf32x3"]) < 1e-4
    assert 5e-3 < error["tf32"] < 0.5


@triton.jit
def _dot_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.dot(x, x, out_dtype=y_ptr.dtype.element_ty))


@pytest.mark.parametrize(
    ("dtype", "out"),
    [(torch.float64, torch.float64), (torch.int8, torch.int32), (torch.float16, torch.float16)],
)
def test_dot_accumulates_as_wide_as_a_gpu(dtype: torch.dtype, out: torch.dtype):
    x = (torch.randn(32, 32, dtype=torch.float64) * 30).to(dtype)
    y = torch.empty(32, 32, dtype=out)
    _dot_kernel[(1,)](x, y, N=32)
    exact = x.double() @ x.double()
    if out == torch.float16:
        torch.testing.assert_close(y, exact.half(), rtol=2**-10, atol=2**-10 * 30)  # one rounding, not one a product
    else:
        torch.testing.assert_close(y.double(), exact, rtol=1e-13, atol=1e-10)


@triton.jit
def _philox_kernel(y_ptr, seed, sample, step, stream, n, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    zero = element * 0
    words = tl.philox(seed, element, zero + sample, zero + step, zero + stream)
    for i in tl.static_range(4):
        tl.store(y_ptr + i * n + element, words[i], mask=element < n)


def test_philox_gives_the_words_of_the_reference():
    y = torch.empty(4, 50, dtype=torch.int32)
    seed = 0x0123_4567_89AB_CDEF
    _philox_kernel[(1,)](y, seed, 3, 4, 5, 50, BLOCK=64)
    expected = torch.stack(philox(seed, torch.arange(50), torch.tensor(3), step=4, stream=5))
    assert torch.equal(y.long() & 0xFFFFFFFF, expected)
