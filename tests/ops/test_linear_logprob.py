"""Identities of ``linear_logprob`` that the contract does not state."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from kernelab._core import native
from kernelab._core.memory import LiveBytes, saved_bytes
from kernelab.ops import linear_logprob
from kernelab.ops.linear_logprob import reference
from tests.contract.test_op_contract import RawCalls

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(rows=24, features=32, classes=300, dtype=torch.float32, seed=0, train="hidden", size=2.0):
    generator = torch.Generator().manual_seed(seed)

    def random(name, *shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_(name in train.split())

    return {
        "hidden": random("hidden", rows, features),
        "weight": random("weight", classes, features, scale=size * features**-0.5),
        "target": torch.randint(classes, (rows,), generator=generator),
        "bias": random("bias", classes),
    }


def likely(gaps, dtype, features=16, classes=50, train="hidden"):
    """Row i's target has logit 0 or so and every other class ``-gaps[i]`` or so."""
    call = make(len(gaps), features, classes, dtype, train=train)
    eye = torch.eye(len(gaps), features)
    weight = -torch.tensor(gaps)[:, None] * eye  # [rows, features]
    with torch.no_grad():
        call["hidden"].copy_(eye)
        call["weight"].copy_(weight.sum(0).repeat(classes, 1) + 0.25 * call["weight"])
        call["weight"][torch.arange(len(gaps)), torch.arange(len(gaps))] = 0.0
    call["target"] = torch.arange(len(gaps))
    return {**call, "bias": None}


@each_backend
def test_entropy_of_equal_logits_is_the_logarithm_of_the_number_of_classes(backend):
    call = make() | {"bias": None}
    call["weight"] = call["weight"][:1].expand(300, -1)
    logprob, entropy = linear_logprob(**call, entropy=True, backend=backend)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(300)))
    torch.testing.assert_close(logprob, -entropy)


@each_dtype
def test_a_likely_target_keeps_its_relative_precision(dtype):
    """log p is -1e-12 there, and 1 - p is what the gradient is made of: neither is lost in the 1 that p is close to."""
    gaps = (2.0, 8.0, 16.0, 28.0)
    call = likely(gaps, dtype)
    weight, hidden = call["weight"].double(), call["hidden"].detach().double()
    z = hidden @ weight.T  # [rows, classes]
    others = z.scatter(1, call["target"][:, None], -torch.inf) - z.gather(1, call["target"][:, None])
    exact = -others.exp().sum(1).log1p()
    p = torch.softmax(z, 1).scatter(1, call["target"][:, None], 0.0)
    exact_grad = p.sum(1, keepdim=True) * weight[call["target"]] - p @ weight
    terms = p.sum(1, keepdim=True) * weight[call["target"]].abs() + p @ weight.abs()
    logprob = linear_logprob(**call, backend="cpu")
    (grad,) = torch.autograd.grad(logprob.sum(), call["hidden"])
    of_logits = 30 * torch.finfo(logprob.dtype).eps  # their error is the relative one of p
    torch.testing.assert_close(logprob.double(), exact, rtol=of_logits, atol=0.0)
    allowed = (3 * torch.finfo(dtype).eps + of_logits) * terms.amax(1) + torch.finfo(dtype).smallest_normal
    assert ((grad - exact_grad).abs().amax(1) <= allowed).all()


@each_backend
@pytest.mark.parametrize("train", ["hidden", "hidden weight bias"])
def test_a_class_of_bias_minus_infinity_does_not_exist(backend, train):
    call = make(train=train, dtype=torch.float64)
    gone = torch.zeros(300, dtype=torch.bool)
    gone[[0, 7, 130, 299]] = True
    call["target"] = (~gone).nonzero()[:, 0][torch.arange(24)]
    with torch.no_grad():
        call["bias"][gone] = -torch.inf
    outputs = torch.stack(linear_logprob(**call, entropy=True, backend=backend))
    left = {**call, "weight": call["weight"][~gone], "bias": call["bias"][~gone]}
    left["target"] = torch.cumsum(~gone, 0)[call["target"]] - 1
    expected = torch.stack(linear_logprob(**left, entropy=True, backend="reference"))
    torch.testing.assert_close(outputs, expected)
    leaves = [t for t in call.values() if t.requires_grad]
    cotangent = torch.randn_like(outputs)
    got, wanted = (torch.autograd.grad(y, leaves, cotangent) for y in (outputs, expected))
    torch.testing.assert_close(got, wanted)


@each_backend
def test_temperature_divides_the_logits(backend):
    call = make(dtype=torch.float64)
    warm = torch.stack(linear_logprob(**call, temperature=2.5, entropy=True, backend=backend))
    divided = {**call, "hidden": call["hidden"] / 2.5, "bias": call["bias"] / 2.5}
    torch.testing.assert_close(warm, torch.stack(linear_logprob(**divided, entropy=True, backend=backend)))


def test_logits_are_not_rounded_to_bfloat16():
    call = make(dtype=torch.bfloat16, size=20.0)
    exact = linear_logprob(**{name: t if name == "target" else t.double() for name, t in call.items()})
    assert (linear_logprob(**call) - exact).abs().max() < 1e-4
    rounded = F.linear(call["hidden"], call["weight"], call["bias"]).double()
    assert (rounded.log_softmax(1).gather(1, call["target"][:, None])[:, 0] - exact).abs().max() > 1e-2


@each_backend
def test_a_frozen_head_is_not_touched_by_backward(backend):
    call = make()
    logprob, entropy = linear_logprob(**call, entropy=True, backend=backend)
    with RawCalls() as raw:
        (logprob + entropy).sum().backward()
    assert [function for function, _ in raw.calls] == [torch.ops.kernelab.linear_logprob_kept_backward.default]
    assert call["weight"].grad is None


@each_backend
def test_backward_computes_what_is_asked(backend):
    call = make(train="hidden weight bias")
    everything = torch.autograd.grad(linear_logprob(**call, backend=backend).sum(), list(call.values())[:2])
    for train in ("hidden bias", "weight", "bias"):
        some = {
            name: t if name == "target" else t.detach().requires_grad_(name in train.split())
            for name, t in call.items()
        }
        linear_logprob(**some, backend=backend).sum().backward()
        for name, whole in zip(("hidden", "weight"), everything, strict=True):
            assert (some[name].grad is not None) == (name in train)
            if name in train:
                torch.testing.assert_close(some[name].grad, whole)


@each_backend
def test_entropy_that_is_only_looked_at_changes_no_gradient(backend):
    call = make(train="hidden weight")
    alone = torch.autograd.grad(linear_logprob(**call, backend=backend).sum(), call["hidden"])
    logprob, _ = linear_logprob(**call, entropy=True, backend=backend)
    assert torch.equal(torch.autograd.grad(logprob.sum(), call["hidden"])[0], alone[0])


def test_kept_for_backward_are_hidden_and_its_derivatives():
    call = make(rows=24, features=32)
    hidden, row = 24 * 32 * 4, 24 * 4

    def kept(**options):
        exclude = [call["weight"], call["bias"], call["target"]]
        return saved_bytes(lambda: linear_logprob(**call, **options), exclude=exclude)

    assert kept() == 2 * hidden + row
    assert kept(entropy=True) == 3 * hidden + 2 * row
    call["weight"].requires_grad_()
    assert kept(entropy=True) == hidden + 2 * row


@pytest.mark.parametrize("train", ["", "hidden", "hidden weight"])
@pytest.mark.parametrize("entropy", [False, True])
def test_no_logit_a_class_is_alive(train, entropy):
    rows, classes = 512, 16384
    call = make(rows, 64, classes, train=train) | {"bias": None}

    def step(function):
        with LiveBytes() as live:
            outputs = function()
            if train:
                sum(y.sum() for y in outputs).backward()
        return live.peak

    def eager():
        log_p = F.log_softmax(F.linear(call["hidden"], call["weight"]), -1)
        logprob = log_p.gather(1, call["target"][:, None])
        return (logprob, -(log_p.exp() * log_p).sum(-1)) if entropy else (logprob,)

    def ours():
        result = linear_logprob(**call, entropy=entropy)
        return result if entropy else (result,)

    head = call["weight"].nbytes if "weight" in train else 0  # its gradient, which both make
    assert step(ours) - head <= (step(eager) - head) / 8


@pytest.mark.parametrize(("extension", "features"), [(True, 4096), (True, 8192), (False, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train", ["", "hidden", "hidden weight"])
@pytest.mark.parametrize("entropy", [False, True])
def test_a_large_head_takes_256_megabytes_beside_its_results(extension, features, dtype, train, entropy, monkeypatch):
    rows, classes = 16384, 128256
    if not extension:
        classes = 4096  # nothing there grows with them but the number of tiles
        monkeypatch.setattr(native, "reason_missing", lambda: "not built")
    elif reason := native.reason_missing():
        pytest.skip(reason)
    with FakeTensorMode(), LiveBytes() as live:
        hidden, weight = torch.empty(rows, features, dtype=dtype), torch.empty(classes, features, dtype=dtype)
        leaves = [t.requires_grad_() for name, t in (("hidden", hidden), ("weight", weight)) if name in train.split()]
        before = live.current
        results = linear_logprob(hidden, weight, torch.zeros(rows, dtype=torch.int64), entropy=entropy)
        assert live.peak - live.current <= 256e6
        kept = live.current - before
        assert kept <= ((1 + entropy) * hidden.nbytes if train == "hidden" else 0) + 64 * rows
        if train:
            total = sum(y.sum() for y in results) if entropy else results.sum()
            with live.phase("backward"):
                grads = torch.autograd.grad(total, leaves)
            assert live.phases["backward"] - before - kept - sum(grad.nbytes for grad in grads) <= 256e6


@each_backend
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integers_of_any_width_are_targets(backend, dtype):
    call = make(classes=100)
    narrow = linear_logprob(**{**call, "target": call["target"].to(dtype)}, backend=backend)
    assert torch.equal(narrow, linear_logprob(**call, backend=backend))


def test_a_target_that_is_no_class_raises_where_a_compiled_graph_runs():
    call = make()
    compiled = torch.compile(linear_logprob, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**call), linear_logprob(**call))
    with pytest.raises(ValueError, match=r"'target'.*0\.\.299, got 300"):
        compiled(**{**call, "target": torch.full((24,), 300)})


def test_on_a_gpu_a_target_that_is_no_class_makes_its_row_nan():
    """The definition as it runs there, without the check."""
    call = make()
    target = call["target"].clone()
    target[3], target[5] = -100, 300
    logprob, entropy = reference.logprob_and_entropy(
        reference.logits(call["hidden"], call["weight"], None, 1.0), target
    )
    bad = torch.zeros(24, dtype=torch.bool)
    bad[[3, 5]] = True
    assert torch.equal(logprob.isnan(), bad)
    assert entropy.isfinite().all()
    (grad,) = torch.autograd.grad(logprob.sum(), call["hidden"])
    assert torch.equal(grad.isnan().all(1), bad)
    assert torch.equal(grad.isnan().any(1), bad)


@each_backend
def test_a_nan_stays_in_its_row(backend):
    call = make()
    clean = linear_logprob(**call, backend=backend)
    with torch.no_grad():
        call["hidden"][4, 7] = math.nan
    logprob, entropy = linear_logprob(**call, entropy=True, backend=backend)
    for result in (logprob, entropy):
        assert torch.equal(result.isnan(), torch.arange(24) == 4)
    rest = torch.arange(24) != 4
    torch.testing.assert_close(logprob[rest], clean[rest])


def test_float16_gradients_survive_a_loss_scale():
    """A likely target's derivative is below float16's numbers until the scale lifts it."""
    call = likely((22.0, 24.0), torch.float16)
    scale = 2.0**16
    (grad,) = torch.autograd.grad(linear_logprob(**call).sum() * scale, call["hidden"])
    wide = {name: t if name == "target" or t is None else t.detach().double() for name, t in call.items()}
    wide["hidden"].requires_grad_()
    (exact,) = torch.autograd.grad(linear_logprob(**wide).sum() * scale, wide["hidden"])
    assert exact.abs().max() / scale < torch.finfo(torch.float16).smallest_normal
    assert (grad.double() - exact).abs().max() <= 4 * torch.finfo(torch.float16).eps * exact.abs().max()


def test_autocast_computes_as_a_linear_layer_would():
    call = make()
    with torch.autocast("cpu", torch.bfloat16):
        logprob = linear_logprob(**call)
    assert logprob.dtype == torch.float32
    halves = {name: t if name == "target" else t.bfloat16() for name, t in call.items()}
    assert torch.equal(logprob, linear_logprob(**halves))
    (grad,) = torch.autograd.grad(logprob.sum(), call["hidden"])
    assert grad.dtype == torch.float32


@each_backend
def test_torch_func_with_a_target_made_inside(backend):
    call = make(dtype=torch.float64)

    def loss(hidden):
        target = F.linear(hidden, call["weight"], call["bias"]).argmax(1)
        return linear_logprob(**{**call, "hidden": hidden, "target": target}, backend=backend).sum()

    hidden = call["hidden"].detach()
    (expected,) = torch.autograd.grad(loss(call["hidden"]), call["hidden"])
    torch.testing.assert_close(torch.func.grad(loss)(hidden), expected)
    direction = torch.randn_like(hidden)
    hvp = torch.func.grad(lambda h: (torch.func.grad(loss)(h) * direction).sum())(hidden)
    step = 1e-5 * direction
    difference = (torch.func.grad(loss)(hidden + step) - torch.func.grad(loss)(hidden - step)) / 2e-5
    torch.testing.assert_close(hvp, difference, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("train", ["hidden", "hidden weight bias"])
def test_one_row_of_odd_strides(backend, train):
    """A dimension of size 1 may have any stride, also one of 0, and torch still calls it contiguous."""
    call = make(rows=1, train=train)
    call["target"] = torch.randint(300, (1, 5))[:, 2]
    call["weight"] = call["weight"].detach().mT.contiguous().mT.requires_grad_("weight" in train)
    linear_logprob(**call, backend=backend).sum().backward()
    plain = F.log_softmax(F.linear(call["hidden"], call["weight"], call["bias"]), -1)[0, call["target"]]
    (expected,) = torch.autograd.grad(plain.sum(), call["hidden"])
    torch.testing.assert_close(call["hidden"].grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(native.reason_missing() is not None, reason="torch's products depend on the number of rows")
@each_dtype
def test_a_row_depends_on_no_other_row_and_on_no_thread(dtype):
    """So the ratio of a policy to itself is exactly 1, however its rows are batched."""
    call = make(rows=450, features=70, classes=500, dtype=dtype)
    threads = torch.get_num_threads()

    def run(rows, number):
        torch.set_num_threads(number)
        part = {**call, "hidden": call["hidden"][rows], "target": call["target"][rows]}
        results = linear_logprob(**part, entropy=True)
        grads = torch.autograd.grad(sum(results).sum(), part["hidden"]) if dtype != torch.float16 else ()
        return *(t.detach() for t in results), *grads  # float16 keeps no derivatives: torch's products follow

    try:
        whole = run(slice(None), 1)
        for rows in (slice(None), slice(3, 4), slice(100, 133), slice(7, 400)):
            for one, other in zip(whole, run(rows, 3), strict=True):
                assert torch.equal(one[rows], other)
    finally:
        torch.set_num_threads(threads)
