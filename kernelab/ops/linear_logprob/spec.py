"""What the tests, the AOT checks and the benchmarks know of ``linear_logprob``, without and with entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernelab._core.spec import Case, Misuse, OpSpec, replacing

from . import linear_logprob, triton_spec
from . import reference as definition


def _case(
    name: str,
    leading: tuple[int, ...],
    features: int,
    classes: int,
    *,
    bias: bool = False,
    train: str = "hidden",
    temperature: float = 1.0,
    size: float = 2.0,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    tags: str = "",
) -> Case:
    """Logits have a standard deviation of about ``size``."""

    def build(device, dtype, generator):
        def random(name, *shape, scale=1.0, layout=lambda t: t):
            values = (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
            return layout(values).requires_grad_(name in train.split())

        hidden = random("hidden", *leading, features, layout=layout)
        return {
            "hidden": hidden,
            "weight": random("weight", classes, features, scale=size * temperature * features**-0.5),
            "target": torch.randint(classes, hidden.shape[:-1], generator=generator, device=device),
            "bias": random("bias", classes) if bias else None,
            "temperature": temperature,
        }

    return Case(name, build, frozenset(tags.split()))


_ALL = "hidden weight bias"
CASES = (
    _case("smallest", (6,), 5, 11, bias=True, train=_ALL, temperature=0.7, tags="smallest interp"),
    _case("frozen", (5,), 4, 9, bias=True, temperature=1.3, tags="smallest interp"),
    _case("one-row", (), 24, 50, tags="interp"),
    _case("no-rows", (0,), 16, 30, train=_ALL, tags="interp"),
    _case("one-class", (9,), 16, 1, bias=True, train=_ALL, tags="interp"),
    _case("one-feature", (9,), 1, 33, tags="interp"),
    _case("open-rows", (5, 6), 16, 40, bias=True, train=_ALL, tags="dynamic"),
    _case("primes", (67,), 37, 211, bias=True, tags="interp"),
    _case("primes-train", (67,), 37, 211, bias=True, train=_ALL, temperature=1.5, tags="interp"),
    _case("only-weight", (20,), 24, 70, train="weight", tags="interp"),
    _case("only-bias", (20,), 24, 70, bias=True, train="bias"),
    _case("no-gradient", (20,), 24, 70, train="", tags="interp"),
    _case("peaked", (40,), 32, 300, size=60.0, tags="interp"),
    _case("large-logits", (40,), 32, 300, size=1e4, train="hidden weight", tags="interp"),
    _case("many-tiles", (131,), 40, 1100, tags="interp"),
    _case("many-tiles-train", (131,), 40, 1100, train="hidden weight", temperature=0.5, tags="interp"),
    _case("transposed", (48,), 40, 96, layout=lambda t: t.mT.contiguous().mT, tags="interp"),
    _case("expanded", (1, 40), 40, 96, layout=lambda t: t.expand(3, -1, -1)),
    _case("offset", (33,), 40, 96, layout=lambda t: t[1:], tags="interp"),
    _case("head-32000", (2048,), 512, 32000, tags="bench"),
    _case("head-128256", (16384,), 4096, 128256, tags="gpu bench"),
)


def reference(hidden, weight, target, *, bias=None, temperature=1.0):
    """The log-probability by autograd through its definition."""
    return _both(hidden, weight, target, bias, temperature)[0]


def linear_logprob_with_entropy(hidden, weight, target, *, bias=None, temperature=1.0, backend=None):
    """Both results as one tensor [2, *], for checks that take one output."""
    results = linear_logprob(hidden, weight, target, bias=bias, temperature=temperature, entropy=True, backend=backend)
    return torch.stack(results)


def reference_with_entropy(hidden, weight, target, *, bias=None, temperature=1.0):
    """Both results by autograd through their definition."""
    return torch.stack(_both(hidden, weight, target, bias, temperature))


def _both(hidden, weight, target, bias, temperature) -> tuple[Tensor, Tensor]:
    rows = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None]
    z = definition.logits(rows, weight, bias, temperature)
    logprob, entropy = definition.logprob_and_entropy(z, target.reshape(-1))
    return logprob.reshape(target.shape), entropy.reshape(target.shape)


def _recomputes(arguments: dict) -> bool:
    """Backward computes the logits again: the head trains, or the forward may not keep derivatives."""
    hidden, weight, bias = (arguments[name] for name in ("hidden", "weight", "bias"))
    train_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    return train_head or (hidden.requires_grad and hidden.dtype == torch.float16)


def _flops(entropy: bool) -> Callable[[dict], tuple[int, int]]:
    """A product of [M, d] and [d, V] is 2MdV. Logits are one, in backward again where it recomputes them, and a
    gradient is one; a frozen head has those of backward in the forward."""

    def flops(arguments: dict) -> tuple[int, int]:
        hidden, weight = arguments["hidden"], arguments["weight"]
        product = 2 * hidden.numel() * weight.shape[0]
        if _recomputes(arguments):
            return product, product * (1 + hidden.requires_grad + weight.requires_grad)
        return product * (1 + hidden.requires_grad * (1 + entropy)), 0

    return flops


def _bytes_moved(entropy: bool) -> Callable[[dict], tuple[int, int]]:
    """Every input read once, every output written once; what is kept for backward is an output and an input."""

    def bytes_moved(arguments: dict) -> tuple[int, int]:
        hidden, weight, bias, target = (arguments[name] for name in ("hidden", "weight", "bias", "target"))
        size, wide = hidden.element_size(), max(hidden.element_size(), 4)
        head = size * (weight.numel() + (0 if bias is None else bias.numel()))
        rows = target.numel() * (8 + wide * (1 + entropy))
        forward = size * hidden.numel() + head + rows
        if _recomputes(arguments):
            grads = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
            return forward, forward + wide * target.numel() + size * sum(t.numel() for t in grads)
        kept = size * hidden.numel() * hidden.requires_grad * (1 + entropy)
        return forward + kept, kept + size * hidden.numel() * hidden.requires_grad

    return bytes_moved


_MISUSES = (
    Misuse(replacing(hidden=[1.0]), TypeError, "'hidden'"),
    Misuse(replacing(hidden=torch.ones(6, 5, dtype=torch.int64)), TypeError, "'hidden'"),
    Misuse(replacing(hidden=torch.tensor(1.0)), ValueError, "'hidden'.*one dimension"),
    Misuse(lambda a: {**a, "hidden": a["hidden"][:, :0]}, ValueError, "'hidden'.*one feature"),
    Misuse(lambda a: {**a, "weight": a["weight"][:, :3]}, ValueError, r"'weight'.*\[\*, 5\]"),
    Misuse(lambda a: {**a, "weight": a["weight"][:0]}, ValueError, "'weight'.*one row"),
    Misuse(lambda a: {**a, "weight": a["weight"].half()}, ValueError, "'weight'.*float32, as hidden"),
    Misuse(lambda a: {**a, "weight": a["weight"].to("meta")}, ValueError, "'weight'.*tensor on cpu"),
    Misuse(lambda a: {**a, "bias": a["bias"][:3]}, ValueError, r"'bias'.*\[11\]"),
    Misuse(lambda a: {**a, "bias": a["bias"].double()}, ValueError, "'bias'.*dtype"),
    Misuse(replacing(target=[1] * 6), TypeError, "'target'"),
    Misuse(lambda a: {**a, "target": a["target"].float()}, TypeError, "'target'.*integer"),
    Misuse(lambda a: {**a, "target": a["target"] > 0}, TypeError, "'target'.*integer"),
    Misuse(lambda a: {**a, "target": a["target"][:5]}, ValueError, r"'target'.*\[6\]"),
    Misuse(lambda a: {**a, "target": a["target"].to("meta")}, ValueError, "'target'.*cpu"),
    Misuse(lambda a: {**a, "target": a["target"] * 0 + 11}, ValueError, r"'target'.*0\.\.10, got 11\."),
    Misuse(lambda a: {**a, "target": a["target"] * 0 - 100}, ValueError, r"'target'.*0\.\.10, got -100\..*padding"),
    Misuse(replacing(temperature=0.0), ValueError, "'temperature'"),
    Misuse(replacing(temperature=float("nan")), ValueError, "'temperature'"),
    Misuse(replacing(temperature=float("inf")), ValueError, "'temperature'"),
    Misuse(replacing(temperature="1"), TypeError, "'temperature'"),
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = {"reference": _FLOATS, "cpu": _FLOATS, "triton": _FLOATS[:3]}
_DYNAMIC = {"hidden": {0: "batch", 1: "tokens"}, "target": {0: "batch", 1: "tokens"}}

SPECS = (
    OpSpec(
        name="linear_logprob",
        function=linear_logprob,
        reference=reference,
        cases=CASES,
        dtypes=_DTYPES,
        bytes_moved=_bytes_moved(entropy=False),
        flops=_flops(entropy=False),
        dynamic=_DYNAMIC,
        launches=triton_spec.launches,
        misuses=_MISUSES,
    ),
    OpSpec(
        name="linear_logprob",
        function=linear_logprob_with_entropy,
        reference=reference_with_entropy,
        cases=CASES,
        dtypes=_DTYPES,
        bytes_moved=_bytes_moved(entropy=True),
        flops=_flops(entropy=True),
        dynamic=_DYNAMIC,
    ),
)
