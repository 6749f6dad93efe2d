"""What the tests, the AOT checks and the benchmarks know of ``lora_linear`` and ``lora_add``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from kernelab._core.spec import Case, Misuse, OpSpec, replacing

from . import lora_add, lora_linear, triton_spec
from . import reference as definition
from .arguments import route

SCALING = (2.0, 0.5, 1.25)
MANY = [(9, None), (10, 1), (11, 0), (140, 0), (12, 1), (7, None), (5, 0), (6, None), (8, 1)]


def _case(
    name: str,
    leading: tuple[int, ...],
    in_features: int,
    out_features: int,
    ranks: Sequence[int],
    segments: Sequence[tuple[int, int | None]] | None = None,
    *,
    bias: bool = False,
    train_weight: bool = False,
    dropout_p: float = 0.0,
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda t: t,
    tags: str = "",
) -> Case:
    def build(device, dtype, generator):
        def random(*shape, scale=1.0, grad=True):
            return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype).requires_grad_(grad)

        x = layout(random(*leading, in_features, grad=False)).requires_grad_()
        return {
            "x": x,
            "weight": random(out_features, in_features, scale=in_features**-0.5, grad=train_weight),
            "bias": random(out_features) if bias else None,
            "lora_a": [random(rank, in_features, scale=in_features**-0.5) for rank in ranks],
            "lora_b": [random(out_features, rank) for rank in ranks],
            "scaling": SCALING[: len(ranks)],
            "segments": segments,
            "dropout_p": dropout_p,
            "seed": 2**40 + 17,
        }

    return Case(name, build, frozenset(tags.split()))


CASES = (
    _case(
        "smallest", (6,), 5, 4, (2, 3), [(2, 0), (1, None), (3, 1)], bias=True, dropout_p=0.4, tags="smallest interp"
    ),
    _case("one-row", (), 24, 16, (4,), tags="interp"),
    _case("no-rows", (0,), 16, 8, (2,), [(0, 0)], tags="interp"),
    _case("all-off", (9,), 16, 24, (4,), [(9, None)], tags="interp"),
    _case("empty-segments", (7,), 16, 8, (2, 2), [(0, 1), (4, 0), (0, None), (3, None), (0, 0)], tags="interp"),
    _case("open-rows", (5, 6), 16, 12, (4,), bias=True, tags="dynamic"),
    _case("primes", (67,), 37, 53, (3, 7), [(13, 1), (17, None), (37, 0)], bias=True, tags="interp"),
    _case("mixed-ranks", (96,), 64, 80, (8, 16, 64), [(31, 2), (33, 0), (1, None), (31, 1)], tags="interp"),
    _case("same-adapter-twice", (40,), 32, 48, (8,), [(11, 0), (9, None), (20, 0)], tags="interp"),
    _case("dropout", (4, 33), 50, 64, (8, 4), [(66, 0), (33, None), (33, 1)], dropout_p=0.5, tags="interp"),
    _case("many-tiles", (208,), 160, 272, (4, 8), MANY, bias=True, dropout_p=0.25, tags="interp"),
    _case("train-weight", (3, 5, 7), 32, 24, (4,), bias=True, train_weight=True),
    _case("transposed", (48,), 40, 32, (8,), layout=lambda t: t.mT.contiguous().mT, tags="interp"),
    _case("expanded", (1, 40), 40, 32, (8,), layout=lambda t: t.expand(3, -1, -1)),
    _case("offset", (33,), 40, 32, (8,), [(16, 0), (16, None)], layout=lambda t: t[1:], tags="interp"),
    _case("streams", (3, 128, 128), 256, 256, (16, 16), [(16384, None), (16384, 0), (16384, 1)], tags="gpu bench"),
    _case("square-1024", (2048,), 1024, 1024, (16,), tags="bench"),
    _case("square-1024-dropout", (2048,), 1024, 1024, (16,), dropout_p=0.05, tags="bench"),
    _case("roles-1024", (3, 1024), 1024, 1024, (16, 16), [(1024, None), (1024, 0), (1024, 1)], tags="bench"),
)


def _parse(where: str, x, out_features, lora_a, lora_b, scaling, segments, dropout_p, seed):
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    routing, adapters = route(where, rows, lora_a, lora_b, scaling, segments, dropout_p, seed, out_features)
    return rows, routing, adapters[: len(adapters) // 2], adapters[len(adapters) // 2 :]


def linear_reference(x, weight, bias=None, *, lora_a, lora_b, scaling, segments=None, dropout_p=0.0, seed=0):
    """``lora_linear`` by autograd through its definition."""
    rows, routing, a, b = _parse("", x, weight.shape[0], lora_a, lora_b, scaling, segments, dropout_p, seed)
    y, _ = definition.forward(rows, weight, bias, None, a, b, *routing)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def add_reference(y, x, *, lora_a, lora_b, scaling, segments=None, dropout_p=0.0, seed=0):
    """``lora_add`` by autograd through its definition."""
    rows, routing, a, b = _parse("", x, y.shape[-1], lora_a, lora_b, scaling, segments, dropout_p, seed)
    base = y.flatten(0, -2) if y.dim() > 1 else y[None]
    out, _ = definition.forward(rows, None, None, base, a, b, *routing)
    return out.reshape(y.shape)


def _sizes(arguments: dict) -> tuple[int, int, int, list[tuple[int, int]]]:
    x, out_features = arguments["x"], arguments["lora_b"][0].shape[0]
    rows = x.numel() // x.shape[-1]
    segments = arguments["segments"] if arguments["segments"] is not None else [(rows, 0)]
    on = [(count, arguments["lora_a"][adapter].shape[0]) for count, adapter in segments if adapter is not None]
    return rows, x.shape[-1], out_features, on


def flops(arguments: dict) -> tuple[int, int]:
    """2MNK for the base (forward, and backward to x), 2mr(K + N) forward and 4mr(K + N) backward an on-segment."""
    m, k, n, on = _sizes(arguments)
    base = 2 * m * n * k if "weight" in arguments else 0
    adapter = sum(2 * count * rank * (k + n) for count, rank in on)
    return base + adapter, base + 2 * adapter


def bytes_moved(arguments: dict) -> tuple[int, int]:
    """Every input read once, every output written once."""
    m, k, n, on = _sizes(arguments)
    size = arguments["x"].element_size()
    used = {a for _, a in arguments["segments"] or [(0, 0)] if a is not None}
    adapters = sum(arguments["lora_a"][a].numel() + arguments["lora_b"][a].numel() for a in used)
    weight = n * k if "weight" in arguments else m * n
    kept = sum(count * (k + rank) for count, rank in on)
    return size * (m * k + weight + adapters + m * n), size * (m * n + weight + 2 * adapters + kept + m * k)


_MISUSES = (
    Misuse(replacing(x=torch.ones(6, 5, dtype=torch.int64)), TypeError, "'x'"),
    Misuse(replacing(x=[1.0]), TypeError, "'x'"),
    Misuse(replacing(segments=[(2, 0), (3, 1)]), ValueError, "'segments'.*6 rows.*sum of 5"),
    Misuse(replacing(segments=[(6, 2)]), ValueError, r"segments\[0\].*0\.\.1"),
    Misuse(replacing(segments=[(7, 0), (-1, 1)]), ValueError, r"segments\[1\]"),
    Misuse(replacing(segments=[(6.0, 0)]), TypeError, r"segments\[0\]"),
    Misuse(replacing(segments=6), TypeError, "segments"),
    Misuse(replacing(scaling=[1.0, float("nan")]), ValueError, "scaling.*finite"),
    Misuse(replacing(scaling=[1.0]), ValueError, "scaling.*2 numbers"),
    Misuse(replacing(scaling="1"), TypeError, "scaling"),
    Misuse(replacing(dropout_p=1.0), ValueError, "dropout_p"),
    Misuse(replacing(seed=0.5), TypeError, "seed"),
    Misuse(replacing(seed=2**63), ValueError, "seed"),
    Misuse(lambda a: {**a, "lora_a": a["lora_a"][:1]}, ValueError, "lora_b"),
    Misuse(lambda a: {**a, "lora_a": [t[:0] for t in a["lora_a"]]}, ValueError, "rank of at least 1"),
    Misuse(lambda a: {**a, "lora_b": [t[:, :1] for t in a["lora_b"]]}, ValueError, r"lora_b\[0\].*\[4, 2\]"),
    Misuse(lambda a: {**a, "lora_a": [t.to("meta") for t in a["lora_a"]]}, ValueError, r"lora_a\[0\].*tensor on cpu"),
)
_LINEAR_MISUSES = (
    Misuse(lambda a: {**a, "weight": a["weight"][:, :3]}, ValueError, r"'weight'.*\[\*, 5\]"),
    Misuse(lambda a: {**a, "weight": a["weight"].half()}, ValueError, "'weight'.*dtype"),
    Misuse(lambda a: {**a, "bias": a["bias"][:3]}, ValueError, r"'bias'.*\[4\]"),
)
_ADD_MISUSES = (Misuse(lambda a: {**a, "y": a["y"][:3]}, ValueError, "'y'.*leading dimensions"),)

_ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = {"reference": _ALL, "cpu": _ALL, "triton": _ALL[:3]}


def _add_case(case: Case) -> Case:
    def build(device, dtype, generator):
        arguments = case.build(device, dtype, generator)
        x, weight = arguments["x"], arguments.pop("weight")
        arguments.pop("bias")
        y = torch.randn((*x.shape[:-1], weight.shape[0]), generator=generator, device=device).to(dtype)
        return {"y": y.requires_grad_(), **arguments}

    return dataclasses.replace(case, build=build)


SPECS = (
    OpSpec(
        name="lora_linear",
        function=lora_linear,
        reference=linear_reference,
        cases=CASES,
        dtypes=DTYPES,
        bytes_moved=bytes_moved,
        flops=flops,
        dynamic={"x": {0: "batch", 1: "tokens"}},
        launches=triton_spec.launches,
        misuses=_MISUSES + _LINEAR_MISUSES,
    ),
    OpSpec(
        name="lora_linear",
        function=lora_add,
        reference=add_reference,
        cases=tuple(_add_case(case) for case in CASES if case.name != "train-weight"),
        dtypes=DTYPES,
        bytes_moved=bytes_moved,
        flops=flops,
        dynamic={"x": {0: "batch", 1: "tokens"}, "y": {0: "batch", 1: "tokens"}},
        misuses=_MISUSES + _ADD_MISUSES,
    ),
)
