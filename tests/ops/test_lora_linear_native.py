"""The C++ of ``lora_linear`` against the torch code that stands in for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernelab._core import native, onednn
from kernelab._core.philox import dropout_mask
from kernelab.ops import lora_linear
from kernelab.ops.lora_linear import cpu_kernels
from tests.contract.error import BACKWARD, FORWARD, check

from .guarded_memory import guarded_memory

pytestmark = pytest.mark.skipif(native.reason_missing() is not None, reason="the C++ extension is not built")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SETS = ("baseline", "avx2", "avx512")
EVERYTHING = frozenset({"s", "dx", "da", "db"})


@pytest.fixture(scope="module", autouse=True)
def guards():
    with guarded_memory():
        yield


def problem(rows, in_features, out_features, rank, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return {
        "x": random(rows, in_features + 3)[:, :in_features],  # a row stride of its own
        "base": random(rows, out_features),
        "dy": random(rows, out_features + 1)[:, :out_features],
        "dx": random(rows, in_features),
        "a": random(rank, in_features, scale=in_features**-0.5),
        "b": random(out_features, rank),
    }


def run(add, add_gradients, inputs, dropout_p, need, dtype=None):
    """``{name: output}`` of both functions."""
    x, base, dy, dx, a, b = (t.clone() if dtype is None else t.to(dtype) for t in inputs.values())
    x = inputs["x"] if dtype is None else x
    (rows, rank), wide = (x.shape[0], a.shape[0]), torch.float64 if x.dtype == torch.float64 else torch.float32
    tail = (a, b, 1.5, 2**31 + 5, dropout_p, -(2**63) + 12345)
    s = x.new_empty(rows, rank)
    y = torch.empty_like(base)
    add(y, base, x, s if "s" in need else None, *tail)
    if "s" not in need:
        s = F.linear(x, a)
    da, db = torch.ones(a.shape, dtype=wide), torch.ones(b.shape, dtype=wide)
    add_gradients(
        dx if "dx" in need else None,
        da if "da" in need else None,
        db if "db" in need else None,
        dy,
        x if "da" in need else None,
        s if "db" in need else None,
        *tail,
    )
    outputs = {"y": y, "s": s, "dx": dx, "da": da, "db": db}
    return {name: t for name, t in outputs.items() if name == "y" or name in need}


def compare(inputs, dropout_p=0.0, need=EVERYTHING):
    native_path = cpu_kernels._add_native, cpu_kernels._add_gradients_native
    torch_path = cpu_kernels._add_torch, cpu_kernels._add_gradients_torch
    got = run(*native_path, inputs, dropout_p, need)
    plain = run(*torch_path, inputs, dropout_p, need)
    exact = run(*torch_path, inputs, dropout_p, need, torch.float64)
    terms = run(*torch_path, {name: t.abs() for name, t in inputs.items()}, dropout_p, need, torch.float64)
    for name, tensor in got.items():
        if inputs["x"].dtype == torch.float64:
            # Plain torch is no more exact here; roundings of at most 600 terms add up as a random walk of 25 steps.
            assert ((tensor - exact[name]).abs() <= 25 * torch.finfo(torch.float64).eps * terms[name]).all()
            continue
        # The sums of dA and dB are wider than what the op returns; they are judged as it returns them.
        returned, plainly = (t.to(inputs["x"].dtype) for t in (tensor, plain[name]))
        check(name, returned, plainly, exact[name], FORWARD if name in "ys" else BACKWARD, terms[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16, 17, 64, 200, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_rank(dtype, rank, dropout_p):
    compare(problem(70, 300, 173, rank, dtype), dropout_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_blocks(dtype):
    """No padding stands between rows to take what is written beyond one."""
    compare(problem(64, 512, 256, 16, dtype))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 100),
    st.integers(1, 600),
    st.integers(1, 600),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.5]),
    st.frozensets(st.sampled_from(sorted(EVERYTHING))),
)
def test_every_size_and_every_need(rows, in_features, out_features, rank, dtype, dropout_p, need):
    compare(problem(rows, in_features, out_features, rank, dtype, seed=rows), dropout_p, need)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 5, 64, 67, 256])
def test_dropout_is_its_definition(dtype, columns):
    rows, first_row, seed = 40, 2**31 + 5, -(2**63) + 12345
    x, eye = torch.randn(rows, columns).to(dtype), torch.eye(columns, dtype=dtype)
    for p in (0.05, 0.5, 0.999):
        mask = dropout_mask(seed, p, first_row, rows, columns, x.device)
        y, s = torch.zeros_like(x), torch.empty_like(x)
        dx = torch.zeros_like(x)
        cpu_kernels._add_native(y, y, x, s, eye, eye, 1.0, first_row, p, seed)
        cpu_kernels._add_gradients_native(dx, None, None, x, None, None, eye, eye, 1.0, first_row, p, seed)
        for got in (s, dx):
            assert torch.equal(got != 0, mask & (x != 0))
            expected = torch.where(mask, x.double() / (1 - p), 0)
            info = torch.finfo(dtype)
            assert ((got.double() - expected).abs() <= info.eps * expected.abs().clamp(info.tiny)).all()


def test_threads_change_nothing_but_the_rounding_of_the_sums():
    inputs, threads = problem(500, 200, 130, 8, torch.float32), torch.get_num_threads()
    path = cpu_kernels._add_native, cpu_kernels._add_gradients_native
    runs = {}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            first, second = (run(*path, inputs, 0.1, EVERYTHING) for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first)
            runs[count] = first
    finally:
        torch.set_num_threads(threads)
    for count in (2, 3):
        for name in ("y", "s", "dx"):
            assert torch.equal(runs[count][name], runs[1][name])
        for name in ("da", "db"):
            torch.testing.assert_close(runs[count][name], runs[1][name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("cpu_set", SETS)
def test_lesser_instruction_sets(cpu_set):
    tests = "test_every_rank and 17 or definition"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, __file__]
    result = subprocess.run(command, env={**os.environ, "KERNELAB_CPU_SET": cpu_set}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_large_float32_and_a_rank_beyond_the_kernels(dropout_p):
    """Sizes at which oneDNN takes the base of rows that are on, and a rank that is left to torch."""
    rows, size = 260, 160
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    x, weight, bias = random(rows, size), random(size, size), random(size)
    adapters = {
        "lora_a": [random(300, size) / size, random(4, size)],
        "lora_b": [random(size, 300), random(size, 4)],
        "scaling": 0.5,
    }
    segments, cotangent = [(100, 0), (60, None), (100, 1)], random(rows, size)

    def call(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in (x, *adapters["lora_a"], *adapters["lora_b"])]
        pairs = {"lora_a": leaves[1:3], "lora_b": leaves[3:], "scaling": 0.5}
        y = lora_linear(
            leaves[0],
            weight.to(dtype),
            bias.to(dtype),
            **pairs,
            segments=segments,
            dropout_p=dropout_p,
            backend=backend,
        )
        return y, *torch.autograd.grad(y, leaves, cotangent.to(dtype))

    got, plain, exact = call(torch.float32, "cpu"), call(torch.float32, "reference"), call(torch.float64, "reference")
    assert torch.equal(got[0][100:160], F.linear(x[100:160], weight, bias))
    for index, tensors in enumerate(zip(got, plain, exact, strict=True)):
        check(f"output {index}", *tensors, BACKWARD if index else FORWARD)
    assert onednn.wins(x[:100], weight) == torch.backends.mkldnn.is_available()


def test_single_columns_of_transposed_matrices():
    """Their last stride is not 1, though torch calls them contiguous."""
    call = {
        "weight": torch.randn(7, 1),
        "lora_a": [torch.randn(1, 1)],
        "lora_b": [torch.randn(9, 7).mT[:, :1]],
        "scaling": 1.0,
    }
    assert call["lora_b"][0].stride(1) != 1
    x = torch.randn(8, 5).mT[:, :1]
    torch.testing.assert_close(lora_linear(x, **call, backend="cpu"), lora_linear(x, **call, backend="reference"))
