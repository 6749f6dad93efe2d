"""Attention that looks at no content: learned weights of the distance, and fixed windows."""

from __future__ import annotations

import pytest
import torch

from kernelab.nn import KeyValueCache, PositionOnlyAttention, WindowAttention
from tests.nn import explicit

torch.manual_seed(0)
MODULES = {
    "position-only": lambda causal: PositionOnlyAttention(24, 4, max_distance=6, head_dim=5, causal=causal),
    "uniform": lambda causal: WindowAttention(24, 4, widths=[1, 4, 9, 70], causal=causal),
    "gaussian": lambda causal: WindowAttention(24, 4, widths=[1, 4, 9, 70], profile="gaussian", causal=causal),
}
every_module = pytest.mark.parametrize("kind", MODULES)


def make(kind, causal):
    module = MODULES[kind](causal).double()
    if kind == "position-only":
        torch.nn.init.normal_(module.distance_bias)
    return module


def scores(module, tokens):
    """[H, N, N]: what the softmax is taken of."""
    distance = explicit.distances(tokens)
    if isinstance(module, PositionOnlyAttention):
        return module.distance_bias[:, distance.clamp(-6, 6) + 6]
    width = torch.tensor(module.widths)[:, None, None]
    log = torch.zeros(()) if module.profile == "uniform" else -0.5 * (3 * distance.double() / width) ** 2
    return torch.where(distance.abs() < width, log, -torch.inf).double()


def expected(module, x, seen):
    value = explicit.project(module.v_proj, x, module.num_heads)
    out = explicit.weights(scores(module, x.shape[1]), seen) @ value
    return out.transpose(1, 2).flatten(2) @ module.o_proj.weight.T + module.o_proj.bias


@every_module
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", ["plain", "masked", "packed"])
def test_it_is_the_formula(kind, case, causal):
    module = make(kind, causal)
    x = torch.randn(1 if case == "packed" else 3, 23, 24, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 23) < 0.6 if case == "masked" else None
    bounds = torch.tensor([0, 4, 4, 9, 23]) if case == "packed" else None
    out = module(x, key_padding_mask=mask, cu_seqlens=bounds)
    wanted = expected(module, x, explicit.visible(23, 23, causal, mask, bounds))
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    leaves, cotangent = [x, *module.parameters()], torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, cotangent)
    for ours, theirs in zip(got, torch.autograd.grad(wanted, leaves, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every_module
def test_a_cache_filled_in_pieces_gives_the_whole(kind):
    module, cache = make(kind, causal=True), KeyValueCache()
    x, mask = torch.randn(2, 140, 24, dtype=torch.float64), torch.rand(2, 140) < 0.7
    sizes, end, parts = [3, 1, 1, 17, 18, 99, 1], 0, []
    with torch.no_grad():
        for part in x.split(sizes, dim=1):
            end += part.shape[1]
            parts.append(module(part, key_padding_mask=mask[:, :end], cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), module(x, key_padding_mask=mask), rtol=1e-10, atol=1e-10)
    assert cache.length == 140


@every_module
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_and_one_token(kind, tokens):
    assert MODULES[kind](True)(torch.randn(2, tokens, 24)).shape == (2, tokens, 24)


@every_module
def test_lower_precision_and_autocast(kind):
    module, x = MODULES[kind](True), torch.randn(2, 30, 24)
    wanted = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x).float(), wanted, rtol=0.05, atol=0.05)
    torch.testing.assert_close(module.bfloat16()(x.bfloat16()).float(), wanted, rtol=0.05, atol=0.05)


@every_module
def test_it_exports_and_compiles(kind):
    module, x = MODULES[kind](True), torch.randn(2, 30, 24)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_at_first_all_tokens_weigh_the_same():
    module = PositionOnlyAttention(24, 4, max_distance=3)
    x = torch.randn(1, 9, 24)
    torch.testing.assert_close(module(x), module.o_proj(module.v_proj(x).mean(1, keepdim=True)).expand(-1, 9, -1))


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: WindowAttention(24, 4, widths=[1, 2, 3]), ValueError, "'widths'.*4 integers"),
        (lambda: WindowAttention(24, 4, widths=[1, 2, 3, 0]), ValueError, "'widths'.*at least 1"),
        (lambda: WindowAttention(24, 4, widths=[1, 2, 3, 1.5]), TypeError, "'widths'"),
        (lambda: WindowAttention(24, 4, widths=3), TypeError, "'widths'"),
        (lambda: WindowAttention(24, 4, profile="box"), ValueError, "'profile'.*uniform, gaussian"),
        (lambda: WindowAttention(25, 4), ValueError, "'num_heads'"),
        (lambda: PositionOnlyAttention(24, 4, max_distance=-1), ValueError, "'max_distance'"),
        (lambda: PositionOnlyAttention(24, 4, max_distance=2.0), TypeError, "'max_distance'"),
        (lambda: PositionOnlyAttention(24, 4, max_distance=2, causal=1), TypeError, "'causal'"),
        (lambda: WindowAttention(24, 4)(torch.randn(2, 5, 23)), ValueError, "'x'"),
        (lambda: WindowAttention(24, 4)(torch.randn(2, 5, 24), cache=KeyValueCache()), ValueError, "'cache'"),
    ],
)
def test_bad_arguments_are_named(make, error, named):
    with pytest.raises(error, match=named):
        make()
