"""What is special to ``window_mean``: its C++ and the torch code that stands in for it, and what its sums promise."""

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
from kernelab._core.memory import LiveBytes
from kernelab.ops.window_mean import reference, window_mean
from tests.contract.error import BACKWARD, FORWARD, check
from tests.contract.test_op_contract import as_in_float64

from .guarded_memory import guarded_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SETS = ("baseline", "avx2")
WAYS = {"torch": lambda patch: patch.setattr(native, "reason_missing", lambda: "not built")}
if native.reason_missing() is None:
    WAYS["extension"] = lambda patch: None


@pytest.fixture(scope="module", autouse=True)
def guards():
    with guarded_memory():
        yield


@contextlib.contextmanager
def going(way):
    with pytest.MonkeyPatch.context() as patch:
        WAYS[way](patch)
        yield


every_way = pytest.mark.parametrize("way", WAYS)


def run(value, cotangent, widths, backend, dtype, **seen):
    leaf = value.detach().to(dtype).requires_grad_()
    out = window_mean(leaf, widths, backend=backend, **seen)
    return out.detach(), torch.autograd.grad(out, leaf, cotangent.to(dtype))[0]


def compare(value, widths, **seen):
    dtype, generator = value.dtype, torch.Generator().manual_seed(5)
    cotangent = torch.randn(value.shape, generator=generator).to(dtype)
    exact = run(value, cotangent, widths, "reference", torch.float64, **seen)
    plain = run(value, cotangent, widths, "reference", torch.float32 if dtype == torch.float64 else dtype, **seen)
    if dtype == torch.float64:
        plain = [as_in_float64(*pair) for pair in zip(plain, exact, strict=True)]
    for way in WAYS:
        with going(way):
            got = run(value, cotangent, widths, "cpu", dtype, **seen)
        for name, factor, *triple in zip(("out", "dvalue"), (FORWARD, BACKWARD), got, plain, exact, strict=True):
            check(f"{way}: {name}", *triple, factor)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_size(data):
    draw = data.draw
    heads, tokens, features = draw(st.integers(1, 4)), draw(st.integers(1, 90)), draw(st.integers(1, 140))
    widths = draw(st.lists(st.integers(1, 120), min_size=heads, max_size=heads))
    dtype, causal = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    seen = {"causal": causal}
    batch = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        seen["key_padding_mask"] = torch.rand(batch, tokens, generator=generator) < draw(st.sampled_from([0.1, 0.7]))
    if batch == 1 and draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, tokens), max_size=5)))
        seen["cu_seqlens"] = torch.tensor([0, *cuts, tokens])
    compare(torch.randn(batch, heads, tokens, features, generator=generator).to(dtype), widths, **seen)


@pytest.mark.skipif("extension" not in WAYS, reason="the C++ extension is not built")
@pytest.mark.parametrize("cpu_set", SETS)
def test_lesser_instruction_sets(cpu_set):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "every_size or trace", __file__]
    result = subprocess.run(command, env={**os.environ, "KERNELAB_CPU_SET": cpu_set}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]


@every_way
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e30])
def test_what_has_left_the_window_leaves_no_trace(way, causal, bad):
    value = torch.randn(1, 2, 200, 70, generator=torch.Generator().manual_seed(0))
    widths = [3, 20]
    with going(way):
        clean = window_mean(value, widths, causal=causal, backend="cpu")
        value[:, :, 50] = bad
        got = window_mean(value, widths, causal=causal, backend="cpu")
    for head, width in enumerate(widths):
        touched = torch.zeros(200, dtype=torch.bool)
        touched[50 if causal else 51 - width : 50 + width] = True
        assert torch.equal(got[0, head, ~touched], clean[0, head, ~touched])
        assert not (got[0, head, touched].abs() < 1e20).any()


@every_way
def test_padding_is_not_read_and_tokens_without_keys_give_zero(way):
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 5:9] = mask[1] = False
    value = torch.where(mask[:, None, :, None], torch.ones(2, 1, 30, 5), torch.nan).requires_grad_()
    with going(way):
        out = window_mean(value, 3, key_padding_mask=mask, backend="cpu")
        sees = torch.ones(2, 30)
        sees[0, 7:9] = sees[1] = 0
        torch.testing.assert_close(out, sees[:, None, :, None].expand_as(out))
        (grad,) = torch.autograd.grad(out, value, torch.where(sees[:, None, :, None] == 0, torch.nan, out.detach()))
    assert torch.isfinite(grad).all()
    assert (grad.permute(0, 2, 1, 3)[~mask] == 0).all()


@every_way
def test_the_error_does_not_grow_along_the_sequence(way):
    """A running sum of 100000 numbers near 1 would be wrong in the third digit of the last means of 4."""
    value = 1 + torch.rand(1, 1, 100_000, 1, generator=torch.Generator().manual_seed(0))
    with going(way):
        got = window_mean(value, 4, backend="cpu")
    exact = value[0, 0, :, 0].double().unfold(0, 4, 1).mean(1)
    torch.testing.assert_close(got[0, 0, 3:, 0].double(), exact, rtol=3 * torch.finfo(torch.float32).eps, atol=0)


def test_a_width_of_one_is_the_value_itself():
    value = torch.randn(2, 3, 40, 8)
    for causal in (True, False):
        assert torch.equal(window_mean(value, 1, causal=causal), value)


def test_packed_documents_are_the_documents_one_by_one():
    value = torch.randn(1, 2, 60, 24)
    packed = window_mean(value, [4, 30], cu_seqlens=torch.tensor([0, 13, 13, 14, 60]))
    parts = [window_mean(part, [4, 30]) for part in value.split([13, 1, 46], dim=2)]
    assert torch.equal(packed, torch.cat(parts, dim=2))


def test_results_do_not_depend_on_the_threads():
    value, threads = torch.randn(2, 3, 100, 40), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = window_mean(value, [3, 30, 300])
        torch.set_num_threads(4)
        assert torch.equal(window_mean(value, [3, 30, 300]), one)
    finally:
        torch.set_num_threads(threads)


@every_way
def test_memory_does_not_grow_with_the_square_of_the_length(way):
    value = torch.zeros(1, 2, 4096, 16)
    with going(way), LiveBytes() as live:
        window_mean(value, [5, 5000], backend="cpu")
    assert live.peak < 24 * value.nbytes  # guards included; [N, N] is 128 times as much


def test_the_definition_counts_the_keys_it_averages():
    seen = reference.visible(6, [2, 3], False, None, None, torch.device("cpu"))
    assert seen.sum(-1).tolist() == [[[2, 3, 3, 3, 3, 2], [3, 4, 5, 5, 4, 3]]]
