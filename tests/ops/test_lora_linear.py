"""Identities of ``lora_linear`` and ``lora_add`` that the contract does not state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernelab._core.memory import saved_bytes
from kernelab._core.philox import dropout_mask, philox
from kernelab.ops import lora_add, lora_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu")


def make(rows=24, in_features=32, out_features=20, ranks=(4, 8), dtype=torch.float32, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "x": random(rows, in_features).requires_grad_(grad),
        "weight": random(out_features, in_features),
        "bias": random(out_features),
        "lora_a": [random(rank, in_features).requires_grad_(grad) for rank in ranks],
        "lora_b": [random(out_features, rank).requires_grad_(grad) for rank in ranks],
        "scaling": [1.5, 0.5][: len(ranks)],
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_off_rows_are_bitwise_the_linear_layer_alone_and_mixed(backend, dtype, bias):
    call = make(rows=77, dtype=dtype) | ({} if bias else {"bias": None})
    segments = [(13, 0), (31, None), (8, 1), (25, None)]
    y = lora_linear(**call, segments=segments, backend=backend)
    for rows in (slice(13, 44), slice(52, 77)):
        x = call["x"][rows]
        alone = lora_linear(**(call | {"x": x}), segments=[(len(x), None)], backend=backend)
        assert torch.equal(y[rows], alone)
        assert torch.equal(alone, F.linear(x, call["weight"], call["bias"]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_segments_equal_separate_calls(data):
    counts = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    adapters = [data.draw(st.sampled_from([None, 0, 1])) for _ in counts]
    rows = sum(counts)
    call = make(rows=rows, dtype=torch.float64)
    cotangent = torch.randn(rows, 20, dtype=torch.float64)
    together = lora_linear(**call, segments=list(zip(counts, adapters, strict=True)))
    leaves = [call["x"], *call["lora_a"], *call["lora_b"]]
    grads = torch.autograd.grad(together, leaves, cotangent, allow_unused=True)
    pieces, start = [], 0
    for count, adapter in zip(counts, adapters, strict=True):
        x = call["x"][start : start + count]
        y = x @ call["weight"].T + call["bias"]
        if adapter is not None:
            y = y + call["scaling"][adapter] * (x @ call["lora_a"][adapter].T @ call["lora_b"][adapter].T)
        pieces.append(y)
        start += count
    expected = torch.cat(pieces)
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)
    used = set(adapters) - {None}
    for grad, want in zip(grads, torch.autograd.grad(expected, leaves, cotangent, allow_unused=True), strict=True):
        assert (grad is None) == (want is None)
        if grad is not None:
            torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-11)
    assert [grad is not None for grad in grads[1:3]] == [index in used for index in (0, 1)]


def test_an_unused_adapter_of_a_sequence_gets_no_gradient_and_one_of_a_stack_gets_zeros():
    call = make(ranks=(4, 4))
    lora_linear(**call, segments=[(24, 1)]).sum().backward()
    assert call["lora_a"][0].grad is None
    assert call["lora_b"][0].grad is None
    stacked = {name: torch.stack(call[name]).detach().requires_grad_() for name in ("lora_a", "lora_b")}
    lora_linear(**(call | stacked), segments=[(24, 1)]).sum().backward()
    assert stacked["lora_a"].grad[0].abs().max() == 0
    torch.testing.assert_close(stacked["lora_b"].grad[1], call["lora_b"][1].grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("train_a", "train_b"), [(True, False), (False, True), (False, False)])
def test_frozen_factors_still_contribute_and_get_no_gradient(backend, train_a, train_b):
    call = make(dtype=torch.float64)
    for name, train in (("lora_a", train_a), ("lora_b", train_b)):
        call[name] = [t.detach().requires_grad_(train and index == 0) for index, t in enumerate(call[name])]
    segments = [(10, 0), (4, None), (10, 1)]
    y = lora_linear(**call, segments=segments, dropout_p=0.25, seed=5, backend=backend)
    everything = make(dtype=torch.float64)
    full = lora_linear(**everything, segments=segments, dropout_p=0.25, seed=5, backend=backend)
    assert torch.equal(y, full)
    cotangent = torch.randn_like(y)
    full.backward(cotangent)
    y.backward(cotangent)
    torch.testing.assert_close(call["x"].grad, everything["x"].grad)
    for name, train in (("lora_a", train_a), ("lora_b", train_b)):
        assert call[name][1].grad is None
        if train:
            torch.testing.assert_close(call[name][0].grad, everything[name][0].grad)
        else:
            assert call[name][0].grad is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_kept_for_backward_is_x_and_the_projection_of_training_rows_only(dropout_p):
    rows, size = 24, 4

    def kept(call, segments):
        weights = [call["weight"], *call["lora_a"], *call["lora_b"]]
        return saved_bytes(lambda: lora_linear(**call, segments=segments, dropout_p=dropout_p), exclude=weights)

    call = make()
    assert kept(call, [(24, 0)]) == size * rows * (32 + 4)
    assert kept(call, [(24, None)]) == 0
    # The projection is as wide as the largest rank in use.
    assert kept(call, [(6, 0), (12, None), (6, 1)]) == size * 12 * (32 + 8)
    call["lora_a"], call["lora_b"] = ([t.detach() for t in call[name]] for name in ("lora_a", "lora_b"))
    assert kept(call, [(12, 0), (12, 1)]) == 0
    call["lora_b"][1].requires_grad_()
    assert kept(call, [(12, 0), (12, 1)]) == size * 12 * 8
    call["lora_a"][0].requires_grad_()
    assert kept(call, [(12, 0), (12, None)]) == size * 12 * 32
    with torch.no_grad():
        assert kept(make(), [(24, 0)]) == 0


def test_adapters_of_another_dtype_are_cast_and_keep_their_gradients_dtype():
    call = make(dtype=torch.bfloat16)
    call["lora_a"], call["lora_b"] = (
        [t.detach().float().requires_grad_() for t in call[n]] for n in ("lora_a", "lora_b")
    )
    y = lora_linear(**call, segments=[(24, 0)])
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert call["lora_a"][0].grad.dtype == torch.float32


def test_autocast_computes_as_a_linear_layer_would():
    call = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**call, segments=[(12, None), (12, 0)])
        base = F.linear(call["x"][:12], call["weight"], call["bias"])
        added = lora_add(F.linear(call["x"], call["weight"], call["bias"]), **_adapters(call), segments=[(24, 1)])
    assert y.dtype == added.dtype == torch.bfloat16
    assert torch.equal(y[:12], base)
    y.sum().backward()
    assert call["x"].grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_backward_alone_changes_nothing(backend):
    """A cast inside the op would hand a kernel fewer bytes than it writes."""
    grads = []
    for enabled in (False, True):
        call = make()
        y = lora_linear(**call, segments=[(12, None), (12, 0)], backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y.sin().sum().backward()
        grads.append([t.grad for t in (call["x"], call["lora_a"][0], call["lora_b"][0])])
    for got, want in zip(*reversed(grads), strict=True):
        assert torch.equal(got, want)


def _adapters(call):
    return {name: call[name] for name in ("x", "lora_a", "lora_b", "scaling")}


def test_lora_add_leaves_its_base_alone():
    call = make()
    base = F.linear(call["x"], call["weight"], call["bias"])
    before = base.detach().clone()
    y = lora_add(base, **_adapters(call), segments=[(10, 0), (14, None)])
    assert torch.equal(base, before)
    assert torch.equal(y[10:], base[10:])
    torch.testing.assert_close(y, lora_linear(**call, segments=[(10, 0), (14, None)]))


# Philox4x32-10: the known-answer vectors of the authors' Random123 distribution (kat_vectors).
@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, seed, words):
    element, sample, step, stream = counter
    got = philox(seed, torch.tensor(element), torch.tensor(sample), step, stream)
    assert tuple(int(word) for word in got) == words


def test_dropout_mask_is_a_function_of_seed_row_and_column():
    whole = dropout_mask(7, 0.3, 0, 40, 37, torch.device("cpu"))
    assert torch.equal(whole[11:25, :20], dropout_mask(7, 0.3, 11, 14, 20, torch.device("cpu")))
    assert not torch.equal(whole, dropout_mask(8, 0.3, 0, 40, 37, torch.device("cpu")))
    many = dropout_mask(1, 0.3, 0, 1000, 1000, torch.device("cpu"))
    # 5 standard deviations of a binomial proportion with a million draws
    assert abs(many.double().mean().item() - 0.7) < 5 * (0.3 * 0.7 / 1e6) ** 0.5


def test_dropout_of_streams_differs_by_row_and_repeats_in_backward():
    call = make(rows=8, in_features=64)
    call["x"] = torch.ones(8, 64, requires_grad=True)
    call["weight"] = torch.zeros(20, 64)
    y = lora_linear(**call, segments=[(8, 0)], dropout_p=0.5, seed=3)
    assert len({tuple(row.tolist()) for row in y}) == 8
    # y is linear in x through the mask alone, so dy/dx vanishes exactly where the mask does.
    mask = dropout_mask(3, 0.5, 0, 8, 64, torch.device("cpu"))
    (grad,) = torch.autograd.grad(y, call["x"], torch.randn_like(y))
    assert torch.equal(grad != 0, mask)
