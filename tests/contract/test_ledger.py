"""What the bytes at a peak are for, against closed forms; and the inside of an op on fake tensors."""

from __future__ import annotations

import doctest
import gc
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelab._core import ledger, memory, native
from kernelab._core.ledger import Ledger
from kernelab._core.memory import LiveBytes
from kernelab.ops import lora_linear

FLOAT = 4


def test_the_peak_of_a_step_by_label():
    weight = torch.ones(100, 10, requires_grad=True)
    x = torch.ones(5, 100)
    with Ledger() as live:
        live.label("weights", [weight])
        with live.phase("idle"):
            pass
        with live.phase("forward"):
            loss = (x @ weight).exp().sum()
        with live.phase("backward"):
            loss.backward()
        live.label("gradients", [weight.grad])  # which came into being before it had this name
    assert live.at_peak("idle") == {"weights": 1000 * FLOAT}
    assert live.at_peak("forward") == {"weights": 1000 * FLOAT, "": (50 + 50) * FLOAT}  # the product and its exp
    found = live.at_peak("backward")
    assert found["weights"] == found["gradients"] == 1000 * FLOAT
    for phase, size in live.phases.items():
        assert sum(live.at_peak(phase).values()) == size


def test_a_guess_gives_way_to_a_label_and_a_storage_has_one_label():
    with Ledger(lambda tensor: "wide" if tensor.shape[-1] == 7 else None) as live, live.phase("all"):
        kept = [torch.empty(3, 7), torch.empty(7, 7), torch.empty(2)]
        live.label("square", [kept[1]])
        kept.append(kept[2].expand(7, 2).t())  # a view that looks wide: its storage is
        kept.append(kept[1][:, :2])
    assert live.at_peak("all") == {"wide": (21 + 2) * FLOAT, "square": 49 * FLOAT}


def test_the_highest_of_several_spans_counts_and_what_is_gone_does_not():
    with Ledger() as live:
        for size in (10, 1000, 100):
            with live.phase("loop"):
                x = torch.empty(size)
                live.label(f"of {size}", [x])
            del x
    assert live.at_peak("loop") == {"of 1000": 1000 * FLOAT}
    with pytest.raises(KeyError, match="other"):
        live.at_peak("other")


def test_a_reused_address_does_not_inherit_a_label():
    with Ledger() as live:
        for _ in range(50):
            live.label("early", [torch.empty(10)])
        gc.collect()
        with live.phase("late"):
            late = [torch.empty(10) for _ in range(50)]
    assert live.at_peak("late") == {"": 50 * 10 * FLOAT}
    del late


def adapted_step(rows: int, train: bool) -> None:
    """An off segment and two adapters, forward and backward."""
    x = torch.ones(3 * rows, 96, requires_grad=train)
    weight = torch.ones(160, 96)
    a, b = [torch.ones(8, 96, requires_grad=train)] * 2, [torch.ones(160, 8, requires_grad=train)] * 2
    segments = [(rows, None), (rows, 0), (rows, 1)]
    y = lora_linear(x, weight, lora_a=a, lora_b=b, scaling=2.0, segments=segments, dropout_p=0.25, seed=3)
    if train:
        y.square().sum().backward()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("rows", [3, 300])  # on both sides of where the CPU changes its matrix product
def test_fake_tensors_show_the_inside_of_an_op(rows, train, monkeypatch):
    def peak(mode) -> int:
        with mode, LiveBytes() as live:
            adapted_step(rows, train)
        return live.peak

    real, fake = peak(nullcontext()), peak(FakeTensorMode())
    monkeypatch.setattr(memory, "BODIES", {})
    assert real == fake
    assert train or fake > peak(nullcontext())


@pytest.mark.skipif(native.reason_missing() is not None, reason="the C++ extension is not built")
def test_the_extension_leaves_fake_tensors_alone_but_refuses_what_it_cannot_read():
    with FakeTensorMode():
        x = torch.empty(4, 4)
        native.call("dropout_float32", x)
        with pytest.raises(ValueError, match="last dimension is contiguous"):
            native.call("dropout_float32", x.T[:, :2])


def test_the_example_runs():
    assert doctest.testmod(ledger).failed == 0
