"""Nested state comes back from JSON and safetensors exactly as it went in."""

import json
import math
import random
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from kernelab.experiment.rng import rng_state, seed_everything, set_rng_state
from kernelab.experiment.state import decode, encode


def through_files(state):
    tree, tensors = encode(state)
    return decode(json.loads(json.dumps(tree, allow_nan=False)), load(save(tensors)))


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        flat = [
            tensor.resolve_conj()
            .resolve_neg()
            .clone(memory_format=torch.contiguous_format)
            .reshape(-1)
            .view(torch.uint8)
            for tensor in (one, other)
        ]
        assert torch.equal(*flat)
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert [type(key) for key in one] == [type(key) for key in other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, float):
        assert np.float64(one).tobytes() == np.float64(other).tobytes() or (math.isnan(one) and math.isnan(other))
    else:
        assert one == other


DTYPES = (
    "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float8_e4m3fn float8_e5m2 float16 bfloat16 float32 float64 "
    "complex64"
)


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_every_dtype_keeps_its_bits(dtype):
    dtype = getattr(torch, dtype)
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (96,), dtype=torch.uint8)  # NaN payloads among them
    values = bits.view(dtype)
    state = {"all": values, "one": values[1], "none": values[:0]}
    assert_same(through_files(state), state)


def test_awkward_values():
    state = {
        0: "int key",
        "0": "string key",
        (1, "a"): [(), [], {}, (None, True, False)],
        "floats": [0.1, -0.0, math.inf, -math.inf, math.nan, 5e-324],
        "ints": [2**200, -(2**70), 0],
        "text": 'naïve "\n\ud800',
        "counter": Counter({3: 2}),
        "ordered": OrderedDict(b=1, a=2),
        "looks like an encoding": [{"tensor": "x"}, {"tuple": [1]}, {"float": "nan"}],
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3).T,
        "scalar array": np.array(1.5),
    }
    assert_same(through_files(state), state)


def test_layouts_and_shared_storage():
    base = torch.arange(12.0).reshape(3, 4)
    tied = torch.nn.Parameter(torch.randn(3))
    state = {
        "transposed": base.T,
        "row": base[1],
        "overlapping": base[1:],
        "expanded": torch.ones(1).expand(5),
        "whole": base,
        "reshaped": base.view(12),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "tied": [tied, tied],
        "same name": {1: torch.ones(1), "1": torch.zeros(1)},
    }
    back = through_files(state)
    assert_same(back["tied"].pop(), state["tied"].pop().detach())
    assert_same(back["tied"].pop(), state["tied"].pop().detach())
    assert_same(back, state)
    tree, tensors = encode({"a": tied, "b": tied, "c": tied[:2]})
    assert len(tensors) == 2
    again = decode(tree, tensors)
    assert again["a"] is again["b"]


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.integers() | st.text(max_size=3) | st.tuples(st.integers(), st.text(max_size=2))
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(trees)
def test_any_nesting(tree):
    assert_same(through_files(tree), tree)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor", "RMSprop"])
def test_optimizer_goes_on_bit_for_bit(optimizer):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, weight_decay=0.01)

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    model, optim = make()
    for seed in range(3):
        step(model, optim, seed)
    saved = through_files([model.state_dict(), optim.state_dict()])
    other, other_optim = make()
    other.load_state_dict(saved[0])
    other_optim.load_state_dict(saved[1])
    for pair in ((model, optim), (other, other_optim)):
        step(*pair, seed=9)
    assert torch.equal(model.weight, other.weight)


def test_random_generators_go_on():
    seed_everything(3)
    random.gauss(0, 1)  # leaves the second of a pair behind
    np.random.normal()
    torch.randn(3)
    state = through_files(rng_state())
    draw = lambda: (random.gauss(0, 1), random.random(), np.random.normal(size=3).tolist(), torch.randn(3).tolist())  # noqa: E731
    expected = draw()
    seed_everything(4)
    set_rng_state(state)
    assert draw() == expected


class Thing:
    pass


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (Thing(), "state_dict"),
        (np.float64(1.0), "item"),
        ({1, 2}, "set"),
        (torch.Size([2]), "Size"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.eye(2).to_sparse(), "dense"),
        (torch.empty(2, device="meta"), "meta"),
        (np.array(["text"]), "numeric"),
        (b"bytes", "bytes"),
    ],
)
def test_what_would_not_come_back_is_refused_with_its_path(value, hint):
    with pytest.raises((TypeError, ValueError), match=f"model/layers/1.*{hint}"):
        encode({"model": {"layers": [None, value]}})
