"""What is special to ``toeplitz_attention``: that no weight is lost, and what it has in common with other ops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelab._core.memory import LiveBytes
from kernelab.ops.relative_attention import relative_attention
from kernelab.ops.toeplitz_attention import blocked, cpu_kernels, reference, toeplitz_attention
from kernelab.ops.window_mean import window_mean
from tests.contract.error import BACKWARD, FORWARD, check
from tests.contract.test_op_contract import as_in_float64

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESULTS = ("out", "dvalue", "dbias")
PROFILES = {
    "random": lambda d, generator: torch.randn(d.shape, generator=generator),
    "peaked": lambda d, generator: 20 * torch.randn(d.shape, generator=generator),
    "steep": lambda d, generator: -9.0 * d.abs(),
    "rising": lambda d, generator: 9.0 * d.abs(),
    "one-sided": lambda d, generator: 5.0 * d,
    "holes": lambda d, generator: torch.where(torch.rand(d.shape, generator=generator) < 0.7, -torch.inf, 0.0),
}


def run(module, value, bias, cotangent, dtype, mask, documents, causal, offset):
    """``(out, dvalue, dbias)`` of a backend's raw functions at ``dtype``."""
    value, bias, cotangent = value.to(dtype), bias.to(dtype), cotangent.to(dtype)
    queries = cotangent.shape[2]
    out, peak, mass = module.forward(value, bias, mask, documents, causal, queries, offset)
    arguments = value, bias, mask, documents, peak, mass, cotangent, causal, offset, [True, True]
    return out, *module.backward(*arguments)


def terms(value, bias, cotangent, mask, documents, causal, offset):
    """What the results are sums of, by size: a single sum may cancel."""
    v, g = value.abs().double(), cotangent.abs().double()
    out, dvalue, _ = run(reference, v, bias, g, torch.float64, mask, documents, causal, offset)
    wide, b = reference._wide(value.double(), bias.double(), mask)
    distance = reference._distance(g.shape[2], wide, offset)
    p, _, _ = reference.weights(b, mask, documents, causal, distance)
    dp = g @ wide.abs().mT
    size = (p * (dp + (p * dp).sum(-1, keepdim=True))).sum(0).flatten(1)
    columns = reference._columns(distance, bias).flatten().expand(len(bias), -1)
    return out, dvalue, torch.zeros_like(b).scatter_add(1, columns, size)


def compare(value, bias, cotangent, *rest, ways=(cpu_kernels, blocked)):
    dtype = value.dtype
    exact = run(reference, value, bias, cotangent, torch.float64, *rest)
    plain = run(reference, value, bias, cotangent, torch.float32 if dtype == torch.float64 else dtype, *rest)
    if dtype == torch.float64:
        plain = [as_in_float64(*pair) for pair in zip(plain, exact, strict=True)]
    sizes = terms(value, bias, cotangent, *rest)
    for way in ways:
        got = run(way, value, bias, cotangent, dtype, *rest)
        for name, *of_result in zip(RESULTS, got, plain, exact, sizes, strict=True):
            ours, theirs, truth, size = of_result
            check(f"{way.__name__}: {name}", ours, theirs, truth, FORWARD if name == "out" else BACKWARD, size)


def problem(seed, batch, heads, queries, keys, features, reach, profile, dtype):
    generator = torch.Generator().manual_seed(seed)
    value, cotangent = (torch.randn(batch, heads, n, features, generator=generator) for n in (keys, queries))
    distance = torch.arange(-reach, reach + 1.0).expand(heads, -1)
    return [t.to(dtype) for t in (value, PROFILES[profile](distance, generator), cotangent)]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_size(data):
    draw = data.draw
    batch, queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 150)), draw(st.integers(1, 150))
    sizes = draw(st.integers(1, 2)), queries, keys, draw(st.integers(1, 20)), draw(st.integers(0, 160))
    profile, dtype = draw(st.sampled_from(sorted(PROFILES))), draw(st.sampled_from(DTYPES))
    arguments = problem(draw(st.integers(0, 1000)), batch, *sizes, profile, dtype)
    mask = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        mask = torch.rand(batch, keys, generator=generator) < draw(st.sampled_from([0.05, 0.5, 0.9]))
    compare(*arguments, mask, None, draw(st.booleans()), draw(st.integers(-20, 20)))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_count_are_not_lost_behind_padding(profile, causal, dtype):
    """Only the last keys of one batch element and the first of another are seen, by queries far from them too."""
    value, bias, cotangent = problem(1, 3, 2, 150, 150, 8, 149, profile, dtype)
    mask = torch.ones(3, 150, dtype=torch.bool)
    mask[1, :-3] = mask[2, 3:] = False
    compare(value, bias, cotangent, mask, None, causal, 0)


def test_the_rare_way_is_needed(monkeypatch):
    """Without it, steep weights behind padding are lost: what the tests above would see."""
    value, bias, cotangent = problem(1, 1, 1, 150, 150, 8, 149, "steep", torch.float32)
    mask = torch.zeros(1, 150, dtype=torch.bool)
    mask[0, :3] = True
    monkeypatch.setattr(cpu_kernels, "LEAST_MASS", 0.0)
    monkeypatch.setattr(cpu_kernels._Head, "sure", lambda self, peak, mass: torch.ones_like(mass, dtype=torch.bool))
    with pytest.raises(AssertionError, match="out"):
        compare(value, bias, cotangent, mask, None, False, 0, ways=(cpu_kernels,))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_is_relative_attention_without_content(causal, backend):
    value, bias, _ = problem(0, 2, 3, 40, 40, 8, 12, "random", torch.float32)
    mask = torch.rand(2, 40) < 0.7
    mask[:, 0] = True
    expected = relative_attention(
        value, value, value, bias=bias, content=False, causal=causal, key_padding_mask=mask, backend="reference"
    )
    got = toeplitz_attention(value, bias, causal=causal, key_padding_mask=mask, backend=backend)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_a_uniform_profile_is_a_mean_over_windows(causal):
    value, bias, _ = problem(0, 2, 3, 90, 90, 8, 20, "random", torch.float32)
    bias = torch.full_like(bias, -torch.inf)
    for head, width in enumerate((1, 4, 15)):
        bias[head, 21 - width : 20 + width] = 0.3
    torch.testing.assert_close(
        toeplitz_attention(value, bias, causal=causal), window_mean(value, [1, 4, 15], causal=causal)
    )


def test_packed_documents_are_the_documents_one_by_one():
    value, bias, _ = problem(0, 1, 2, 160, 160, 8, 12, "random", torch.float32)
    packed = toeplitz_attention(value, bias, cu_seqlens=torch.tensor([0, 13, 13, 14, 160]))
    parts = [toeplitz_attention(part, bias) for part in value.split([13, 1, 146], dim=2)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_padding_is_not_read(backend):
    value, bias, _ = problem(0, 2, 2, 80, 80, 8, 12, "random", torch.float32)
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[0, 20:30] = mask[1, :40] = False
    clean = toeplitz_attention(value, bias, key_padding_mask=mask, backend=backend)
    value[0, :, 20:30] = value[1, :, :40] = torch.nan
    value.requires_grad_()
    out = toeplitz_attention(value, bias, key_padding_mask=mask, backend=backend)
    assert torch.equal(out, clean)
    (grad,) = torch.autograd.grad(out, value, torch.randn(out.shape))
    assert torch.isfinite(grad).all()
    assert (grad.permute(0, 2, 1, 3)[~mask] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_no_matrix_of_weights_is_ever_alive(causal):
    value, bias = torch.randn(1, 2, 4096, 16, requires_grad=True), torch.zeros(2, 101, requires_grad=True)
    with LiveBytes() as live:
        toeplitz_attention(value, bias, causal=causal).sum().backward()
    assert live.peak < 4096 * 4096 * 4 / 4


def test_float32_bias_beside_bfloat16_values_gets_a_float32_gradient():
    value, bias, cotangent = problem(0, 2, 2, 90, 90, 8, 12, "random", torch.float32)
    value, cotangent = value.bfloat16(), cotangent.bfloat16()
    bias.requires_grad_()
    (got,) = torch.autograd.grad(toeplitz_attention(value, bias), bias, cotangent)
    exact_bias = bias.detach().double().requires_grad_()
    exact_out = toeplitz_attention(value.double(), exact_bias, backend="reference")
    (exact,) = torch.autograd.grad(exact_out, exact_bias, cotangent.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
