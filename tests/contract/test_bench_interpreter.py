"""The sanitizer under Triton's interpreter, on right kernels and on wrong ones."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.bench.sanitizer import SanitizerError, sanitizer
from tests.contract.bench_kernels import copy_kernel, matmul_kernel, softmax_kernel

pytestmark = pytest.mark.interp


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matmul(dtype: torch.dtype):
    m, n, k = 100, 50, 70
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    with sanitizer() as report:
        y = torch.empty(m, n, dtype=dtype)
        matmul_kernel[(2, 2)](x, w, y, m, n, k, 64, 32, 16, "ieee")
    exact = x.double() @ w.double().T
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= (4 * ulp if dtype == torch.float32 else ulp)
    row_tiles, column_tiles, k_tiles = 2, 2, 5
    assert report.total("bytes_loaded") == (column_tiles * m * k + row_tiles * n * k) * x.element_size()
    assert report.total("bytes_stored") == m * n * x.element_size()
    assert report.total("dot_flops") == 2 * (64 * row_tiles) * (32 * column_tiles) * (16 * k_tiles)


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
