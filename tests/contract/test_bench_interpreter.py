"""The interpreter's arithmetic against torch, and the sanitizer on right kernels and on wrong ones."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from kernelab._core.philox import philox
from tests.bench.sanitizer import SanitizerError, sanitizer
from tests.contract.bench_kernels import copy_kernel, matmul_kernel, softmax_kernel

pytestmark = pytest.mark.interp


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, with any NaN equal to any other."""
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


# --- right kernels are clean, and touch as many bytes as the closed form says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_copy(dtype: torch.dtype):
    x = torch.randn(1000).mul(50).to(dtype)
    with sanitizer() as report:
        y = torch.empty_like(x)
        copy_kernel[(4,)](x, y, x.numel(), BLOCK=256)
    (launch,) = report.launches
    assert torch.equal(x, y)
    assert launch.kernel == "copy_kernel"
    assert launch.grid == (4, 1, 1)
    assert launch.bytes_loaded == launch.bytes_stored == 1000 * x.element_size()
    assert (launch.bytes_atomic, launch.dot_flops, launch.out_of_bounds, launch.races) == (0, 0, 0, 0)


def test_softmax():
    x = torch.randn(5, 100)
    with sanitizer() as report:
        y = torch.empty_like(x)
        softmax_kernel[(5,)](x, y, 100, BLOCK=128)
    torch.testing.assert_close(y, x.softmax(1))
    assert report.total("bytes_loaded") == report.total("bytes_stored") == 5 * 100 * 4


def run_matmul(x: torch.Tensor, w: torch.Tensor, precision: str = "ieee"):
    (m, k), n = x.shape, len(w)
    with sanitizer() as report:
        y = torch.empty(m, n, dtype=x.dtype)
        matmul_kernel[(triton.cdiv(m, 64), triton.cdiv(n, 32))](x, w, y, m, n, k, 64, 32, 16, precision)
    return y, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul(dtype: torch.dtype):
    m, n, k = 100, 50, 70
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    y, report = run_matmul(x, w)
    exact = x.double() @ w.double().T
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= (4 * ulp if dtype == torch.float32 else ulp)
    row_tiles, column_tiles, k_tiles = 2, 2, 5
    assert report.total("bytes_loaded") == (column_tiles * m * k + row_tiles * n * k) * x.element_size()
    assert report.total("bytes_stored") == m * n * x.element_size()
    assert report.total("dot_flops") == 2 * (64 * row_tiles) * (32 * column_tiles) * (16 * k_tiles)


def test_float32_dot_is_tf32_unless_asked_otherwise():
    x, w = torch.randn(64, 512), torch.randn(32, 512)
    exact = x.double() @ w.double().T
    error = {p: float((run_matmul(x, w, p)[0] - exact).abs().max()) for p in ("ieee", "tf32x3", "tf32")}
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
def _histogram_kernel(x_ptr, count_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    bins = tl.load(x_ptr + offsets, mask=inside, other=0)
    tl.atomic_add(count_ptr + bins, 1.0, mask=inside)


def test_atomics_of_several_programs_are_no_race():
    x = torch.randint(0, 7, (100,))
    count = torch.zeros(7)
    with sanitizer() as report:
        _histogram_kernel[(4,)](x, count, 100, BLOCK=32)
    assert torch.equal(count, torch.bincount(x, minlength=7).float())
    assert report.total("bytes_atomic") == 100 * 4
    with pytest.raises(InterpreterError, match="atomics on bf16: accumulate in float32"):
        _histogram_kernel[(4,)](x, count.bfloat16(), 100, BLOCK=32)


@triton.jit
def _lock_kernel(lock_ptr, winner_ptr):
    if tl.atomic_cas(lock_ptr, 0, 1) == 0:
        tl.store(winner_ptr, tl.program_id(0))


def test_compare_and_swap():
    lock, winner = torch.zeros(1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32)
    with sanitizer() as report:
        _lock_kernel[(4,)](lock, winner)
    assert (lock.item(), winner.item()) == (1, 0)
    assert report.total("bytes_atomic") == 4 * 4
    with pytest.raises(SanitizerError, match="atomic out of bounds"):
        _lock_kernel[(4,)](lock[:0], winner)


@triton.jit
def _descriptor_kernel(x_desc, y_ptr, rows, columns, BLOCK: tl.constexpr):
    y_desc = tl.make_tensor_descriptor(y_ptr, [rows, columns], [columns, 1], [BLOCK, BLOCK])
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    y_desc.store([row, column], x_desc.load([row, column]))


def test_tensor_descriptors_leave_out_what_is_beyond_their_shape():
    x = torch.randn(20, 24)
    with sanitizer() as report:
        y = torch.empty_like(x)
        _descriptor_kernel[(2, 2)](TensorDescriptor.from_tensor(x, [16, 16]), y, 20, 24, BLOCK=16)
    assert torch.equal(x, y)
    assert report.total("bytes_loaded") == report.total("bytes_stored") == 20 * 24 * 4


@triton.jit
def _pointer_table_kernel(table_ptr, y_ptr, n, BLOCK: tl.constexpr):
    x_ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * n + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)


def test_tables_of_pointers_need_their_tensors_named():
    tensors = [torch.randn(5), torch.randn(5)]
    table = torch.tensor([tensor.data_ptr() for tensor in tensors])
    y = torch.empty(2, 5)
    with sanitizer(reachable=tensors):
        _pointer_table_kernel[(2,)](table, y, 5, BLOCK=8)
    assert torch.equal(y, torch.stack(tensors))
    with pytest.raises(SanitizerError, match="load out of bounds, first lane not in any argument: 10 lanes"):
        _pointer_table_kernel[(2,)](table, y, 5, BLOCK=8)


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


# --- wrong kernels


@triton.jit
def _wrong_kernel(x_ptr, y_ptr, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2 x, with one thing wrong."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    source, target = x_ptr + offsets, y_ptr + offsets
    if WRONG == "no mask on load":
        x = tl.load(source)
    elif WRONG == "far load":
        x = tl.load(source + (tl.program_id(0) + 1).to(tl.int64) * 0x1000_0000_0000, mask=inside)
    elif WRONG == "load before the tensor":
        x = tl.load(source - 1, mask=inside)
    elif WRONG == "load of the neighbour":
        x = tl.load(y_ptr + (offsets + 1) % n, mask=inside)
    elif WRONG == "all read what the last writes":
        x = tl.load(y_ptr + n - 1)
        inside = offsets >= n - 1
        inside &= offsets < n
    else:
        x = tl.load(source, mask=inside)
    if WRONG == "no mask on store":
        tl.store(target, 2 * x)
    elif WRONG == "every program the same rows":
        tl.store(y_ptr + tl.arange(0, BLOCK), 2 * x)
    elif WRONG == "two lanes one address":
        tl.store(y_ptr + offsets // 2, 2 * x, mask=inside)
    elif WRONG == "wrong dtype":
        tl.store(y_ptr.to(tl.pointer_type(tl.float64)) + offsets, (2 * x).to(tl.float64), mask=inside)
    elif WRONG == "atomic and store":
        tl.atomic_add(y_ptr + tl.program_id(0) * 0, 1.0)
        tl.store(target, 2 * x, mask=inside)
    else:
        tl.store(target, 2 * x, mask=inside)


FAULTS = {
    "no mask on load": ("load out of bounds, first lane 0 bytes past x_ptr: 28 lanes", 28, 0),
    "far load": ("load out of bounds", 100, 0),
    "load before the tensor": ("load out of bounds, first lane 4 bytes before x_ptr: 1 lanes", 1, 0),
    "no mask on store": ("store out of bounds, first lane 0 bytes past y_ptr: 28 lanes", 28, 0),
    "every program the same rows": ("store races", 0, 64),
    "load of the neighbour": ("races", 0, 2),
    "all read what the last writes": ("store races", 0, 1),
    "two lanes one address": ("store races", 0, 50),
    "wrong dtype": ("store out of bounds", 50, None),
    "atomic and store": ("atomic races", 0, 1),
}


@pytest.mark.parametrize("wrong", FAULTS)
def test_wrong_kernel_is_caught(wrong: str):
    text, out_of_bounds, races = FAULTS[wrong]
    memory = torch.full((104,), 7.0)
    x, y = torch.randn(100), memory[2:102]
    with pytest.raises(SanitizerError, match=rf"_wrong_kernel on grid \(2, 1, 1\):\n  test_bench_\w+.py:\d+: .*{text}"):
        _wrong_kernel[(2,)](x, y, 100, WRONG=wrong, BLOCK=64)
    with sanitizer(strict=False) as report:
        _wrong_kernel[(2,)](x, y, 100, WRONG=wrong, BLOCK=64)
    (launch,) = report.launches
    assert launch.out_of_bounds == out_of_bounds
    assert races is None or launch.races == races
    with pytest.raises(SanitizerError):
        report.assert_clean()
    assert (memory[[0, 1, 102, 103]] == 7).all()  # lanes out of bounds wrote nothing


def test_leaving_one_tensor_is_caught_where_another_begins():
    memory = torch.full((256,), 7.0)
    x, y = memory[:100], memory[100:200]
    with pytest.raises(SanitizerError, match="load out of bounds, first lane 0 bytes past x_ptr: 28 lanes"):
        _wrong_kernel[(2,)](x, y, 100, WRONG="no mask on load", BLOCK=64)
    with pytest.raises(SanitizerError, match="store out of bounds, first lane 0 bytes past y_ptr: 28 lanes"):
        _wrong_kernel[(2,)](y, x, 100, WRONG="no mask on store", BLOCK=64)
    assert (memory[200:] == 7).all()
    with pytest.raises(SanitizerError, match="load out of bounds, first lane 4 bytes before x_ptr: 1 lanes"):
        _wrong_kernel[(2,)](y, x, 100, WRONG="load before the tensor", BLOCK=64)


@triton.jit
def _offset_kernel(x_ptr, n, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.device_assert(stride > 0, "stride must be positive")
    tl.store(x_ptr + row * stride, 1.0, mask=row * stride < n)


def test_offsets_that_overflow_and_assertions_are_caught():
    x = torch.zeros(8)
    _offset_kernel[(3,)](x, 8, 2**30, WIDE=True)
    with pytest.raises(SanitizerError, match=r"assertion failed: int32 overflow detected for operation mul: 2 lanes"):
        _offset_kernel[(3,)](x, 8, 2**30, WIDE=False)
    with pytest.raises(SanitizerError, match="assertion failed: stride must be positive: 1 lanes"):
        _offset_kernel[(1,)](x, 8, 0, WIDE=True)


@triton.jit
def _overlap_kernel(bytes_ptr, words_ptr, byte, word):
    if tl.program_id(0) < 2:
        tl.store(bytes_ptr + byte + tl.program_id(0), 1)
    else:
        tl.store(words_ptr + word, 1)


@pytest.mark.parametrize(("first_byte", "last_byte", "first_word"), [(0, 16, 0), (0, 16, 1), (4, 8, 0), (0, 8, 0)])
def test_arguments_that_overlap_share_their_races(first_byte: int, last_byte: int, first_word: int):
    memory = torch.zeros(4, dtype=torch.int32)
    arguments = memory.view(torch.int8)[first_byte:last_byte], memory[first_word:]
    byte, word = 6 - first_byte, 1 - first_word  # bytes 6 and 7 lie in word 1
    _overlap_kernel[(3,)](*arguments, byte, word + 1)
    _overlap_kernel[(3,)](*arguments, byte, word + 2)
    with pytest.raises(SanitizerError, match=r"store races .* in (words_ptr, bytes|bytes_ptr, words)_ptr: 1 lanes"):
        _overlap_kernel[(3,)](*arguments, byte, word)


@triton.jit
def _tuple_kernel(tensors, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(tensors[1] + offsets, tl.load(tensors[0] + offsets, mask=offsets < n), mask=offsets < n)


def test_tensors_in_tuples_are_arguments_too():
    x, y = torch.randn(5), torch.empty(5)
    _tuple_kernel[(1,)]((x, y), 5, BLOCK=8)
    assert torch.equal(x, y)
    with pytest.raises(SanitizerError, match=r"store out of bounds, first lane 0 bytes past tensors\[1\]: 1 lanes"):
        _tuple_kernel[(1,)]((x, y[:4]), 5, BLOCK=8)


def test_the_same_kernel_with_nothing_wrong_is_clean():
    x, y = torch.randn(100), torch.empty(100)
    _wrong_kernel[(2,)](x, y, 100, WRONG="", BLOCK=64)
    assert torch.equal(y, 2 * x)


@triton.jit
def _row_reduce_kernel(x_ptr, y_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    if OP == "relu":
        x = tl.maximum(x, 0.0)
    tl.store(y_ptr, tl.max(x, axis=0) if OP == "max" else tl.sum(x, axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", ["sum", "max", "relu"])
def test_masked_lanes_without_other_spoil_the_result(op: str, dtype: torch.dtype):
    x, y = torch.ones(100, dtype=dtype), torch.zeros(1)
    _row_reduce_kernel[(1,)](x, y, 100, OP=op, BLOCK=128)
    assert y.isnan()
    _row_reduce_kernel[(1,)](x[:64], y, 64, OP=op, BLOCK=64)
    assert y == (1 if op == "max" else 64)


@triton.jit
def _masked_index_kernel(x_ptr, index_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + offsets, mask=offsets < n)
    tl.store(y_ptr + offsets, tl.load(x_ptr + index), mask=offsets < n)


def test_masked_index_without_other_points_out_of_bounds():
    with pytest.raises(SanitizerError, match="load out of bounds"):
        _masked_index_kernel[(1,)](torch.randn(9), torch.arange(3), torch.empty(3), 3, BLOCK=4)


def test_a_grid_too_small_leaves_nan():
    x = torch.randn(1000)
    with sanitizer():
        y = torch.empty_like(x)
        copy_kernel[(3,)](x, y, x.numel(), BLOCK=256)
    assert y[768:].isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


# --- arithmetic


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
