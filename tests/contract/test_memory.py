"""The live-bytes tracker against torch's profiler and against closed forms."""

from __future__ import annotations

import contextlib
import doctest
import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor

from kernelab._core import memory
from kernelab._core.memory import LiveBytes, saved_bytes
from kernelab.ops import lora_linear

FLOAT = 4


def train_step(foreach: bool, batch: int = 64, width: int = 128, device: str = "cpu"):
    """An MLP with its inputs and optimizer, and a function that makes one AdamW step."""
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(width, width, device=device), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    x = torch.randn(batch, width, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return [*model.parameters(), x], step


def profiled_peak(step) -> int:
    """Peak of the allocator's own events above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    allocations = []

    def collect(events) -> None:
        for event in events:
            if event.name == "[memory]":
                allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
            collect(event.children)

    collect(profiler.profiler.kineto_results.experimental_event_tree())
    current = peak = 0
    for _, size in sorted(allocations, key=lambda allocation: allocation[0]):
        current += size
        peak = max(peak, current)
    return peak


@pytest.mark.parametrize("foreach", [False, True])
def test_peak_of_adamw_step_equals_profiler_and_fake_tensors(foreach: bool):
    gc.collect()
    _, step = train_step(foreach)
    expected = profiled_peak(step)
    peaks = {}
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode:
            before, step = train_step(foreach)
            with LiveBytes() as live:
                live.track(before)
                base = live.current
                step()
        peaks[type(mode).__name__] = live.peak - base
    assert peaks["nullcontext"] == peaks["FakeTensorMode"]
    # at the peak one operator holds a Python number as a double and as a float, inside its kernel
    assert 0 <= expected - peaks["nullcontext"] <= 8 + 4


def test_closed_form_of_a_chain():
    x = torch.ones(1000)
    with LiveBytes() as live:
        live.track([x, x.view(10, 100), x[3:5]])  # one storage
        assert live.current == 1000 * FLOAT
        y = x + 1
        z = y.view(10, 100).t()[2:]  # views of y
        assert live.current == 2000 * FLOAT
        del y
        assert live.current == 2000 * FLOAT
        del z
        assert live.current == 1000 * FLOAT
        x.mul_(2)
        torch.add(x, x, out=torch.empty(1000))
    assert live.current == 1000 * FLOAT
    assert live.peak == 2000 * FLOAT
    del x
    assert live.current == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_memory_from_outside_counts_only_when_tracked():
    weight, x = torch.ones(100, 100), torch.ones(8, 100)
    with LiveBytes() as live:
        y = torch.nn.functional.linear(x, weight)  # reads weight through a view
        weight.add_(1)
        assert live.current == 800 * FLOAT
        live.track([weight])
        assert live.current == (800 + 10_000) * FLOAT
        del y
    assert live.current == 10_000 * FLOAT
    del weight
    gc.collect()
    assert live.current == 0


def test_made_from_python_numbers():
    with LiveBytes() as live:
        x = torch.tensor([1.0, 2.0, 3.0])
        assert live.current == 3 * FLOAT
        del x
    assert live.current == 0


def test_resize_and_set():
    with LiveBytes() as live:
        x = torch.empty(10)
        x.resize_(1000)
        assert (live.current, live.peak) == (1000 * FLOAT, 1000 * FLOAT)
        x.untyped_storage().resize_(0)
        x.view(1000)  # the next operator shows it
        assert live.current == 0
        x.set_(torch.empty(50))
        assert live.current == 50 * FLOAT
    assert live.peak == 1000 * FLOAT


def test_phases_nest_and_keep_their_highest():
    with LiveBytes() as live:
        with live.phase("outer"):
            a = torch.empty(100)
            with live.phase("inner"):
                b = torch.empty(10)
            del b
            c = torch.empty(50)
            del a, c
        with live.phase("inner"):
            d = torch.empty(20)
        with live.phase("idle"):
            pass
        del d
    assert live.phases == {"outer": 150 * FLOAT, "inner": 110 * FLOAT, "idle": 20 * FLOAT}


def test_a_graph_is_freed_after_backward():
    w = torch.ones(100, requires_grad=True)
    with LiveBytes() as live:
        live.track([w])
        loss = (w.exp() * 2).sum()
        assert live.current == (100 + 100 + 1) * FLOAT  # w, exp's saved result, loss
        loss.backward()
        assert live.current == (100 + 100 + 1) * FLOAT  # w, w.grad, loss
    del loss
    assert live.current == 200 * FLOAT


class Wasteful(TwoTensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        torch.empty(100)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_wrapper_subclass_counts_what_it_wraps_and_what_it_makes_on_the_way():
    a, b = torch.ones(10), torch.ones(10)
    with LiveBytes() as live:
        live.track([TwoTensor(a, b)])
        assert live.current == 20 * FLOAT
        c = Wasteful(a, b) * 2
        assert live.current == 40 * FLOAT
        assert live.peak == (20 + 100) * FLOAT
        del c
    assert live.current == 20 * FLOAT


def test_counts_survive_an_exception():
    with pytest.raises(RuntimeError, match="size of tensor"), LiveBytes() as live, live.phase("failing"):
        torch.ones(3) + torch.ones(4)
    assert live.current == 0
    assert live.phases["failing"] == 7 * FLOAT


def test_an_op_of_the_library_shows_what_it_makes_and_frees_inside():
    x, weight, a, b = torch.ones(8, 16), torch.ones(4, 16), torch.ones(2, 16), torch.ones(4, 2)
    with torch.no_grad(), LiveBytes() as live:
        y = lora_linear(x, weight, lora_a=[a], lora_b=[b], scaling=1.0, backend="reference")
    assert live.current == y.numel() * FLOAT
    # S [8, 2] and three of [8, 4] live at once in the definition: y, S B^T, and its multiple or the sum.
    assert live.peak >= (8 * 2 + 3 * 8 * 4) * FLOAT


def test_saved_bytes_closed_forms():
    x = torch.ones(8, 16, requires_grad=True)
    linear = torch.nn.Linear(16, 4)
    assert saved_bytes(lambda: x + 1) == 0
    assert saved_bytes(lambda: x.exp()) == 8 * 16 * FLOAT
    assert saved_bytes(lambda: linear(x)) == 8 * 16 * FLOAT  # x; the weight is a parameter
    assert saved_bytes(lambda: linear(x) + linear(x)) == 8 * 16 * FLOAT  # x once
    assert saved_bytes(lambda: x * torch.nn.Parameter(torch.ones(16))) == 8 * 16 * FLOAT
    with torch.no_grad():
        assert saved_bytes(lambda: linear(x)) == 0


def test_saved_bytes_of_a_slice_are_the_whole_storage():
    big = torch.ones(1000, 16)
    row = big[:1].requires_grad_()
    assert saved_bytes(lambda: row.square()) == 1000 * 16 * FLOAT
    assert saved_bytes(lambda: row.clone().square()) == 16 * FLOAT


def test_saved_bytes_exclude_other_weights():
    x, weight = torch.ones(8, 16, requires_grad=True), torch.ones(4, 16, requires_grad=True)
    assert saved_bytes(lambda: x @ weight.T) == (8 * 16 + 4 * 16) * FLOAT
    assert saved_bytes(lambda: x @ weight.T, exclude=[weight]) == 8 * 16 * FLOAT


def test_saved_bytes_forget_a_graph_that_is_gone():
    x = torch.ones(100, requires_grad=True)

    def fn() -> torch.Tensor:
        x.exp().sum().backward()
        return x.cos()

    assert saved_bytes(fn) == 100 * FLOAT  # x for cos; exp's result went with its graph


def test_saved_bytes_of_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(1 << 20, 1 << 10, requires_grad=True)
        assert saved_bytes(lambda: x.exp()) == (1 << 30) * FLOAT


def test_examples_in_docstrings():
    assert doctest.testmod(memory).failed == 0
