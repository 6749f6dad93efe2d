"""The C++ of ``relative_attention``, and the torch code that stands in for it, against the definition."""

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
from kernelab.ops import relative_attention
from kernelab.ops.relative_attention import cpu_blocked, cpu_kernels, spec
from tests.contract import arguments as args
from tests.contract.test_op_contract import random_like, run

from .guarded_memory import guarded_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SETS = ("baseline", "avx2", "avx512")

pytestmark = pytest.mark.filterwarnings("ignore:.*puts the first")  # queries before every key are meant


@pytest.fixture(scope="module", autouse=True)
def guards():
    with guarded_memory():
        yield


@contextlib.contextmanager
def without_extension():
    """In blocks so small that these problems have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "reason_missing", lambda: "not built")
        patch.setattr(cpu_blocked, "MAX_ROWS", 24)
        yield


WAYS = {"torch": without_extension}
if native.reason_missing() is None:
    WAYS["extension"] = contextlib.nullcontext
needs_extension = pytest.mark.skipif("extension" not in WAYS, reason="the C++ extension is not built")


def case(tables="query key value bias", **options):
    return spec._case("native", tables, **options)


def compare(case, dtype):
    """Against the definition in float64, within 32 ULP of the largest number of each result. What a table's row sums,
    over all queries of all heads, may cancel; its roundings grow like a random walk."""
    arguments = args.build(case, "cpu", dtype)
    cotangent = random_like(relative_attention(**arguments, backend="reference").detach())
    exact, exact_grads = run(spec.reference, args.copy(arguments, torch.float64), cotangent.double())
    for way, context in WAYS.items():
        with context():
            got, grads = run(relative_attention, args.copy(arguments), cotangent, backend="cpu")
        for name, result, expected in [("output", got, exact), *((n, grads[n], exact_grads[n]) for n in exact_grads)]:
            if expected is None:  # an input that nothing depends on
                assert result is None
                continue
            assert result.dtype == dtype, name
            terms = got[..., 0].numel() if "table" in name or name == "bias" else 1
            allowed = 32 * torch.finfo(dtype).eps * (terms**0.5 + expected.abs().max())
            error = (result.double() - expected).abs()
            assert (error <= allowed).all(), f"{way}: {name}: error {error.max():.3g}, allowed {allowed:.3g}"


# Blocks of 64 queries and 256 keys, strips of up to 16 keys.
BLOCKS = {
    "whole": case(batch=1, tokens=(128, 256), features=(64, 64), reach=20, offset=70),
    "cut": case(batch=1, tokens=(131, 300), features=(24, 40), reach=33, shared=True, padding=True),
    "far-on-both-sides": case(batch=1, heads=(2, 1), tokens=(330, 330), features=(16, 32), reach=5, causal=False),
    "causal-far": case(batch=1, heads=(2, 1), tokens=(330, 330), features=(16, 32), reach=5, causal=True),
    "one-row-of-tables": case(batch=1, tokens=(70, 90), reach=0),
    "unclipped": case(batch=1, tokens=(150, 150), reach=149),
    "rows-that-do-not-occur": case(batch=1, tokens=(70, 90), reach=400, causal=True),
    "long-documents": case(batch=1, tokens=(700, 700), reach=30, lengths=(1, 290, 3, 406), causal=True),
    "documents-both-ways": case(batch=1, tokens=(600, 600), reach=30, lengths=(290, 310), shared=True),
    "queries-without-keys": case(batch=2, tokens=(100, 40), reach=9, causal=True, offset=-70),
    "no-query-sees-a-key": case(batch=2, tokens=(100, 40), reach=200, causal=True, offset=-130),
    "queries-beyond-the-keys": case(batch=2, tokens=(100, 40), reach=9, causal=True, offset=70),
    "parts-of-a-batch": case(batch=50, heads=(3, 1), tokens=(6, 6), reach=3, padding=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype):
    compare(BLOCKS[name], dtype)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_size(data):
    draw = data.draw
    group, key_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries, keys = draw(st.integers(1, 90)), draw(st.integers(1, 280))
    tables = [t for t in ("query", "key", "value", "bias") if draw(st.booleans())]
    options = {
        "batch": draw(st.integers(1, 3)),
        "heads": (group * key_heads, key_heads),
        "tokens": (queries, keys),
        "features": (draw(st.integers(1, 70)), draw(st.integers(1, 70))),
        "reach": draw(st.integers(0, 100)),
        "shared": draw(st.booleans()),
        "causal": draw(st.booleans()),
        "content": draw(st.booleans()),
        "offset": draw(st.none() | st.integers(-100, 300)),
        "padding": draw(st.booleans()),
        "train": " ".join(
            t
            for t in ("query", "key", "value", "query_table", "key_table", "value_table", "bias")
            if draw(st.booleans())
        ),
    }
    if not options["content"]:
        tables.append("bias")  # without any term there are no scores to speak of
    compare(case(" ".join(tables), **options), draw(st.sampled_from(DTYPES)))


def test_single_columns_of_any_stride():
    """As a step of decoding leaves them: torch calls them contiguous whatever the stride of a dimension of size 1."""
    query, key, value = torch.randn(3, 1, 4, 1, 8).unbind()
    bias, mask = torch.randn(9, 4).mT, torch.ones(3, 1, dtype=torch.bool).mT[:, :1]
    out = relative_attention(query, key, value, bias=bias, key_padding_mask=mask, causal=True, backend="cpu")
    torch.testing.assert_close(out, value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_all_have_the_lowest_number_share_the_weight(way, causal):
    query, key, value = torch.randn(3, 1, 2, 300, 8).unbind()
    bias = torch.full((2, 599), torch.finfo(torch.float32).min)
    bias[1, :250] = 0  # of some queries alone
    arguments = {"query": query, "key": key, "value": value, "bias": bias, "causal": causal}
    with WAYS[way]():
        out = relative_attention(**arguments, backend="cpu")
    torch.testing.assert_close(out, relative_attention(**arguments, backend="reference"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC000FF, -1])
def test_any_nan_makes_the_row_nan_and_no_other(way, bits):
    query, key, value = torch.randn(3, 1, 2, 20, 8).unbind()
    query.view(torch.int32)[0, 1, 7, 3] = bits
    with WAYS[way]():
        out = relative_attention(query, key, value, backend="cpu")
    assert out[0, 1, 7].isnan().all()
    assert out.isnan().sum() == 8


@needs_extension
@pytest.mark.parametrize("name", ["cut", "long-documents", "parts-of-a-batch"])
def test_threads_change_no_bit(name, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "SMALL", 0)
    arguments = args.build(BLOCKS[name], "cpu", torch.float32)
    cotangent = random_like(relative_attention(**arguments, backend="cpu").detach())
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(relative_attention, arguments, cotangent, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    (first, first_grads), *others = results
    for out, grads in others:
        assert torch.equal(out, first)
        assert all(torch.equal(grads[name], grad) for name, grad in first_grads.items())


@needs_extension
@pytest.mark.parametrize("cpu_set", SETS)
def test_lesser_instruction_sets(cpu_set):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "blocks or threads", __file__]
    result = subprocess.run(command, env={**os.environ, "KERNELAB_CPU_SET": cpu_set}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
