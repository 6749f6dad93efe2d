"""The C++ of ``linear_logprob``, and the torch code that stands in for it, against the definition."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelab._core import native
from kernelab.ops import linear_logprob
from kernelab.ops.linear_logprob import cpu_kernels, reference
from tests.contract.error import BACKWARD, FORWARD, check
from tests.contract.test_op_contract import as_in_float64

from .guarded_memory import guarded_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GRADIENTS = ("hidden", "weight", "bias")
SETS = ("baseline", "avx2", "avx512")


@pytest.fixture(scope="module", autouse=True)
def guards():
    with guarded_memory():
        yield


def problem(rows, features, classes, dtype, *, bias=True, train="hidden weight bias", temperature=1.0, size=2.0):
    generator = torch.Generator().manual_seed(rows + features + classes)

    def random(name, *shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_(name in train.split())

    weight = random("", classes, features + 3, scale=size * features**-0.5)[:, :features]  # a row stride of its own
    return {
        "hidden": random("hidden", rows, features),
        "weight": weight.requires_grad_("weight" in train),
        "target": torch.randint(classes, (rows,), generator=generator),
        "bias": random("bias", classes) if bias else None,
        "temperature": temperature,
    }


def run(call, dtype, entropy, backend):
    """Results and gradients at ``dtype``."""
    floats = {
        n: t.detach().to(dtype).requires_grad_(t.requires_grad)
        for n, t in call.items()
        if n in GRADIENTS and t is not None
    }
    call = {**call, **floats}
    results = linear_logprob(**call, entropy=entropy, backend=backend)
    named = dict(zip(("logprob", "entropy"), results if entropy else (results,), strict=False))
    leaves = {name: tensor for name, tensor in floats.items() if tensor.requires_grad}
    if leaves:
        generator = torch.Generator().manual_seed(7)
        cotangents = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in named.values()]
        grads = torch.autograd.grad(list(named.values()), list(leaves.values()), cotangents)
        return {name: r.detach() for name, r in named.items()} | dict(zip(leaves, grads, strict=True))
    return named


def scales(call, entropy):
    """The largest sum of the sizes of the terms that make each result: a single sum may cancel."""
    h, w = (call[name].detach().double() for name in ("hidden", "weight"))
    bias = None if call["bias"] is None else call["bias"].detach().double()
    z = reference.logits(h, w, bias, call["temperature"])
    of_logits = reference.logits(h.abs(), w.abs(), None if bias is None else bias.abs(), call["temperature"])
    log_p = z.log_softmax(1)
    p, largest = log_p.exp(), of_logits.max() + 1
    one = torch.zeros_like(p).scatter_(1, call["target"][:, None], 1.0)
    dz = 3 * (one + p + entropy * p * (log_p.abs() + z.shape[1])) / call["temperature"]
    sizes = {
        "logprob": largest,
        "entropy": largest,
        "hidden": dz @ w.abs(),
        "weight": dz.mT @ h.abs(),
        "bias": dz.sum(0),
    }
    wide = call["hidden"].dtype in (torch.float32, torch.float64)
    return {name: t * (largest if wide and name in GRADIENTS else 1.0) for name, t in sizes.items()}


@contextlib.contextmanager
def without_extension():
    """In tiles so small that these problems have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "reason_missing", lambda: "not built")
        for name, size in (("SIDE", 48), ("ELEMENTS", 2**13), ("PART_ELEMENTS", 2**13), ("GRADIENT_ELEMENTS", 2**11)):
            patch.setattr(cpu_kernels, name, size)
        yield


WAYS = {"torch": without_extension}
if native.reason_missing() is None:
    WAYS["extension"] = contextlib.nullcontext


def compare(call, entropy=True):
    dtype = call["hidden"].dtype
    exact = run(call, torch.float64, entropy, "reference")
    plain = run(call, torch.float32 if dtype == torch.float64 else dtype, entropy, "reference")
    terms = scales(call, entropy)
    if dtype == torch.float64:
        plain = {name: as_in_float64(tensor, exact[name]) for name, tensor in plain.items()}
    for way, context in WAYS.items():
        with context():
            got = run(call, dtype, entropy, "cpu")
        assert got.keys() == exact.keys()
        for name, tensor in got.items():
            factor = BACKWARD if name in GRADIENTS else FORWARD
            check(f"{way}: {name}", tensor, plain[name], exact[name], factor, terms[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", ["", "hidden", "hidden weight bias"])
@pytest.mark.parametrize("entropy", [False, True])
def test_blocks_and_tiles(dtype, train, entropy):
    """Two blocks of rows, tiles of classes that are whole and one that is not, more features than one pass takes."""
    compare(problem(230, 333, 411, dtype, train=train, temperature=0.8), entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_blocks(dtype):
    """No padding stands between rows to take what is written beyond one."""
    compare(problem(192, 768, 256, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_the_largest_logit_rises_from_tile_to_tile(dtype, size):
    call = problem(40, 24, 700, dtype, size=size, bias=False)
    with torch.no_grad():
        call["weight"].mul_(torch.linspace(0.05, 1, 700)[:, None])
    compare(call)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from(["", "hidden", "hidden weight", "weight", "bias"]),
    st.sampled_from([1.0, 0.3, 2.0]),
    st.booleans(),
)
def test_every_size(rows, features, classes, dtype, bias, train, temperature, entropy):
    compare(problem(rows, features, classes, dtype, bias=bias, train=train, temperature=temperature), entropy)


@pytest.mark.skipif("extension" not in WAYS, reason="the C++ extension is not built")
@pytest.mark.parametrize("cpu_set", SETS)
def test_lesser_instruction_sets(cpu_set):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "blocks or rises", __file__]
    result = subprocess.run(command, env={**os.environ, "KERNELAB_CPU_SET": cpu_set}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
