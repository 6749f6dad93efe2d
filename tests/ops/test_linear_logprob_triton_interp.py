"""What is special to the Triton kernels of ``linear_logprob``; tests/contract/ has what every backend promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kernelab._core.launch import run
from kernelab._core.memory import LiveBytes
from kernelab.ops.linear_logprob import linear_logprob, reference, triton_spec, triton_tuning
from kernelab.ops.linear_logprob.spec import CASES
from tests.bench.sanitizer import sanitizer
from tests.contract import arguments as args
from tests.contract.error import BACKWARD, FORWARD, check
from tests.ops.test_linear_logprob import likely

pytestmark = pytest.mark.interp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESULTS = ("logprob", "entropy", "lse", "dlogprob", "dentropy")


@pytest.fixture
def triton():
    """The backend's module."""
    from kernelab.ops.linear_logprob import triton_launch

    return triton_launch


@pytest.fixture
def small_pieces(monkeypatch):
    """Room for a few blocks of logits at a time."""
    monkeypatch.setattr(triton_tuning, "TILE_BYTES", 20_000)
    monkeypatch.setattr(triton_tuning, "LOGIT_BYTES", 100_000)
    monkeypatch.setattr(triton_tuning, "LEAST_COLUMNS", 128)


def make(rows=67, features=37, classes=211, dtype=torch.float32, bias=True, size=2.0, seed=0):
    """Arguments that the raw forward and backward share."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "hidden": random(rows, features).to(dtype),
        "weight": (random(classes, features) * size * features**-0.5).to(dtype),
        "bias": random(classes).to(dtype) if bias else None,
        "target": torch.randint(classes, (rows,), generator=generator),
        "temperature": 0.7,
    }


def exactly(arguments: dict) -> dict:
    return {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for name, t in arguments.items()
    }


def check_forward(got, call: dict) -> None:
    plain, exact = reference.forward(**call), reference.forward(**exactly(call))
    for name, *triple in zip(RESULTS, got, plain, exact, strict=True):
        check(name, *triple, BACKWARD if name.startswith("d") else FORWARD)


def backward_arguments(call: dict, need=(True, True, True), with_entropy=True) -> dict:
    """Arguments of the raw backward, after a forward."""
    _, entropy, lse, _, _ = reference.forward(**call, entropy=True, keep=False)
    rows, generator = len(call["hidden"]), torch.Generator().manual_seed(7)
    grad_logprob, grad_entropy = (torch.randn(rows, generator=generator) for _ in range(2))
    grad_entropy = grad_entropy if with_entropy else grad_entropy[:0]
    grads = {"grad_logprob": grad_logprob, "grad_entropy": grad_entropy}
    return {**call, "lse": lse, "entropy": entropy, **grads, "need": list(need)}


def check_backward(got, arguments: dict) -> None:
    plain, exact = reference.backward(**arguments), reference.backward(**exactly(arguments))
    for name, *triple in zip(("dhidden", "dweight", "dbias"), got, plain, exact, strict=True):
        check(name, *triple, BACKWARD)


@pytest.mark.parametrize(
    ("dtype", "entropy"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)], ids=str
)
@pytest.mark.parametrize("case", [case for case in CASES if "interp" in case.tags], ids=lambda case: case.name)
def test_launches_are_clean_and_move_the_bytes_of_the_closed_form(case, entropy, dtype):
    arguments = args.build(case, "cpu", dtype)
    leaves = list(args.trainable(arguments).values())
    with sanitizer() as forward:
        results = linear_logprob(**arguments, entropy=entropy, backend="triton")
    results = results if entropy else (results,)
    cotangents = [torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for t in results]
    with sanitizer() as backward:
        grads = torch.autograd.grad(results, leaves, cotangents) if leaves else ()
    assert all(torch.isfinite(t).all() for t in (*results, *grads))
    counted = [report.total("bytes_loaded") + report.total("bytes_stored") for report in (forward, backward)]
    assert counted == list(triton_spec.triton_bytes(arguments, entropy))
    for launch in (*forward.launches, *backward.launches):
        assert launch.out_of_bounds == launch.races == launch.bytes_atomic == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities_do_not_depend_on_the_batch_or_on_what_is_kept(triton, dtype):
    call = make(131, 40, 600, dtype)
    whole = triton.forward(**call, entropy=True, keep=True)[:3]
    alone = {name: call[name][40:41] for name in ("hidden", "target")}
    scored = triton.forward(**call, entropy=True, keep=False)[:3]
    assert all(torch.equal(a, b) for a, b in zip(whole, scored, strict=True))
    single = triton.forward(**call | alone, entropy=True, keep=False)[:3]
    assert all(torch.equal(a[40:41], b) for a, b in zip(whole, single, strict=True))
    assert torch.equal(triton.forward(**call, entropy=False, keep=False)[0], whole[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features", "classes"), [(300, 37, 211), (150, 48, 400)])
def test_pieces_change_nothing_but_the_memory(triton, small_pieces, dtype, rows, features, classes):
    call = make(rows, features, classes, dtype)
    with sanitizer() as forward:
        got = triton.forward(**call, entropy=True, keep=True)
    assert len(forward.launches) > 4
    check_forward(got, call | {"entropy": True, "keep": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tuning, "LOGIT_BYTES", 2**40)
        patch.setattr(triton_tuning, "TILE_BYTES", 2**40)
        in_one = triton.forward(**call, entropy=True, keep=True)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], in_one[:3], strict=True))
    for need in ((True, True, True), (False, True, True), (True, False, True)):
        arguments = backward_arguments(call, need)
        with sanitizer() as backward:
            gradients = triton.backward(**arguments)
        assert len(backward.launches) > 2
        sums = [launch for launch in backward.launches if "accumulate" in launch.kernel]
        assert bool(sums) == (need[0] and need[1])
        check_backward(gradients, arguments)


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=3)))
def test_every_need_gets_its_gradients_and_nothing_else(triton, need, with_entropy):
    arguments = backward_arguments(make(), need, with_entropy)
    check_backward(triton.backward(**arguments), arguments)


@pytest.mark.parametrize("bad", [-1, -100, 211, 2**32 + 5, 2**63 - 1])
def test_a_target_that_is_no_class_makes_its_row_nan(triton, bad):
    """As on a GPU, where looking for it would cost a synchronisation; on the CPU the launcher looks first."""
    call = make()
    good = triton.forward(**call, entropy=True, keep=True)
    target = call["target"].clone()
    target[5] = bad
    with pytest.raises(ValueError, match=f"'target'.*got {bad}"):
        triton.forward(**call | {"target": target}, entropy=True, keep=True)
    launches, results = triton.plan_forward(**call | {"target": target}, entropy=True, keep=True, capability=90)
    run(launches, target)
    for ours, expected in zip(results, good, strict=True):
        assert torch.isnan(ours[5]).all()
        ours[5] = expected[5]
        assert torch.equal(ours, expected)
    launches, (dhidden, *_) = triton.plan_backward(
        **backward_arguments(call) | {"target": target, "lse": results[2].index_fill(0, torch.tensor(5), math.nan)},
        capability=90,
    )
    run(launches, target)
    assert torch.isnan(dhidden[5]).all()
    assert torch.isfinite(dhidden[[4, 6]]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_that_the_bias_switches_off(triton, dtype):
    """A whole tile of them, and single ones in every other."""
    call = make(classes=700, dtype=dtype)
    call["bias"][::3] = call["bias"][256:512] = -math.inf
    call["target"] = torch.arange(67) * 3 + 1
    call["target"][:2] = 0
    got = triton.forward(**call, entropy=True, keep=True)
    assert (got[0][:2] == -math.inf).all()
    plain, exact = ([*reference.forward(**c, entropy=True, keep=True)] for c in (call, exactly(call)))
    got, plain, exact = ([results[0][2:], *results[1:]] for results in (got, plain, exact))
    for name, *triple in zip(RESULTS, got, plain, exact, strict=True):
        check(name, *triple, BACKWARD if name.startswith("d") else FORWARD)
    arguments = backward_arguments(call)
    check_backward(triton.backward(**arguments), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_likely_target_keeps_its_relative_precision(triton, dtype):
    """log p is -1e-12 there, and 1 - p is what the gradient is made of: neither is lost in the 1 that p is close to."""
    call = likely((2.0, 8.0, 16.0, 28.0), dtype)
    hidden, weight, target = call["hidden"].detach(), call["weight"].detach(), call["target"]
    z = hidden.double() @ weight.double().T
    others = z.scatter(1, target[:, None], -math.inf) - z.gather(1, target[:, None])
    exact = -others.exp().sum(1).log1p()
    p = torch.softmax(z, 1).scatter(1, target[:, None], 0.0)
    exact_grad = p.sum(1, keepdim=True) * weight[target].double() - p @ weight.double()
    terms = p.sum(1, keepdim=True) * weight[target].double().abs() + p @ weight.double().abs()
    logprob, _, _, dlogprob, _ = triton.forward(hidden, weight, None, target, 1.0, False, True)
    of_logits = 30 * torch.finfo(torch.float32).eps  # their error is the relative one of p
    torch.testing.assert_close(logprob.double(), exact, rtol=of_logits, atol=0.0)
    allowed = (3 * torch.finfo(dtype).eps + of_logits) * terms.amax(1)
    assert ((dlogprob - exact_grad).abs().amax(1) <= allowed).all()


def test_large_logits_cost_the_kept_derivatives_nothing(triton):
    """Logits near 4096 that float32 holds exactly; their lse it holds to 2e-4, which would be the error of p."""
    call = make(20, 16, 300) | {"temperature": 1.0, "hidden": torch.zeros(20, 16)}
    call["bias"] = 4096 + (call["bias"] * 8).round() / 8
    got = triton.forward(**call, entropy=True, keep=True)
    exact = reference.forward(**exactly(call), entropy=True, keep=True)
    for name, ours, expected in zip(RESULTS, got, exact, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            ours.double(), expected, rtol=0, atol=3e-6 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def spaced(t):
    """Unit stride, but rows further apart than they are long."""
    return torch.cat([t, t], dim=1)[:, : t.shape[1]]


def transposed(t):
    return t.mT.contiguous().mT


def repeated(t):
    return t[:1].expand_as(t)


@pytest.mark.parametrize("layout", [spaced, transposed, repeated])
@pytest.mark.parametrize("weight_layout", [spaced, transposed])
def test_any_strides_give_the_result_of_contiguous_tensors(triton, layout, weight_layout):
    call = make(40, 32, 300, torch.bfloat16)
    strange = {"hidden": layout(call["hidden"]), "weight": weight_layout(call["weight"])}
    plain = call | {"hidden": strange["hidden"].contiguous()}
    for ours, expected in zip(
        triton.forward(**call | strange, entropy=True, keep=True),
        triton.forward(**plain, entropy=True, keep=True), strict=True
    ):  # fmt: skip
        assert torch.equal(ours, expected)
    arguments = backward_arguments(plain)
    scalar = {"grad_logprob": torch.tensor(0.5).expand(40), "grad_entropy": torch.tensor(2.0).expand(40)}
    dense = {name: t.contiguous() for name, t in scalar.items()}
    for ours, expected in zip(
        triton.backward(**arguments | strange | scalar), triton.backward(**arguments | dense), strict=True
    ):
        assert torch.equal(ours, expected)
        assert ours.is_contiguous()


def test_offsets_beyond_31_bits(triton):
    """The rows of hidden and of the weight lie 2^25 elements apart; memory is touched where they are."""
    call = make(90, 32, 80, torch.bfloat16)
    far = {
        name: torch.empty_strided(call[name].shape, (2**25, 1), dtype=torch.bfloat16).copy_(call[name])
        for name in ("hidden", "weight")
    }
    near = triton.forward(**call, entropy=True, keep=True)
    assert all(
        torch.equal(*pair) for pair in zip(triton.forward(**call | far, entropy=True, keep=True), near, strict=True)
    )
    arguments = backward_arguments(call)
    pairs = zip(triton.backward(**arguments | far), triton.backward(**arguments), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [64, 4096, 16384])
def test_a_call_allocates_at_most_256_megabytes_beside_its_results(triton, features, dtype):
    rows, classes = 16384, 128256

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    model = empty(rows, features), empty(classes, features), empty(classes), empty(rows, dtype=torch.int64), 1.0
    of_rows = [empty(rows, dtype=torch.float32) for _ in range(4)]

    def peak(plan, *arguments):
        with LiveBytes() as live:
            launches, results = plan(*arguments, capability=90)
            for _ in launches:
                pass
        return live.peak - sum(t.nbytes for t in results)

    assert peak(triton.plan_forward, *model, True, False) <= 17e6
    assert peak(triton.plan_forward, *model, True, True) <= 256e6
    for need in itertools.product([False, True], repeat=3):
        arguments = *model[:4], *of_rows, model[4], need
        assert peak(triton.plan_backward, *arguments) <= 256e6
