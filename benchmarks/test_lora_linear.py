"""``lora_linear`` and ``lora_add`` beside torch, torch.compile and PEFT, and beside the frozen linear alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernelab._core import registry
from kernelab.ops import lora_add, lora_linear, specs
from tests.contract import arguments as args

from .measure import BASE
from .peers import peft_linear
from .provider import BOTH, FORWARD_ONLY, SEED, Group, Provider, Results

SPEC = next(spec for spec in specs() if spec.function is lora_linear)
CASES = {case.name: case for case in SPEC.cases if {"bench", "smallest"} & case.tags}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

Dropout = Callable[[Tensor, float], Tensor]


def groups() -> Iterator[Group]:
    for name, case in CASES.items():
        for device in DEVICES:
            if device == "cpu" and "gpu" in case.tags:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for direction in (FORWARD_ONLY, BOTH):
                    yield Group(SPEC.name, direction, name, dtype, device)


def backends(group: Group) -> list[str]:
    empty = torch.empty(0, dtype=group.dtype, device=group.device)
    return [name for name in registry.backends(SPEC.name) if registry.explain(SPEC.name, empty, backend=name).chosen]


def providers(group: Group) -> list[str]:
    ours = [f"{function}/{backend}" for function in ("kernelab", "kernelab-add") for backend in backends(group)]
    peft = ["peft", *(["peft-float32-adapters"] if group.dtype != torch.float32 else [])]
    return [BASE, *ours, "torch", "torch.compile", *peft]


GRID = [pytest.param(group, name, id=f"{group}/{name}") for group in groups() for name in providers(group)]


@pytest.mark.parametrize(("group", "provider"), GRID)
def test_lora_linear(measure, group, provider):
    arguments = args.build(CASES[group.case], group.device, group.dtype, SEED)
    if arguments["bias"] is not None:
        arguments["bias"].requires_grad_(False)  # as PEFT has it
    builders = {
        BASE: partial(frozen_linear, group, arguments),
        "torch": partial(of_function, group, arguments, plain, torch_dropout=True),
        "torch.compile": partial(compiled, group, arguments),
        "peft": partial(of_peft, group, arguments, same_dtype=True),
        "peft-float32-adapters": partial(of_peft, group, arguments, same_dtype=False),
    }
    for backend in backends(group):
        builders[f"kernelab/{backend}"] = partial(of_function, group, arguments, partial(lora_linear, backend=backend))
        builders[f"kernelab-add/{backend}"] = partial(of_function, group, arguments, partial(add, backend=backend))
    measure(builders)


def plain(x, weight, bias, *, lora_a, lora_b, scaling, segments, dropout_p, seed, dropout: Dropout = F.dropout):
    """What one writes in torch without a library."""
    rows = x.flatten(0, -2)
    base = F.linear(rows, weight, bias)
    parts = []
    for rows_g, y_g, adapter in _split(segments, rows, base):
        if adapter is not None:
            s_g = F.linear(dropout(rows_g, dropout_p) if dropout_p else rows_g, lora_a[adapter])
            y_g = y_g + scaling[adapter] * F.linear(s_g, lora_b[adapter])
        parts.append(y_g)
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(*x.shape[:-1], -1)


def add(x, weight, bias, **rest):
    """The frozen linear, then the adapters in place of a sum."""
    return lora_add(F.linear(x, weight, bias), x, **rest)


def of_function(group: Group, arguments: dict, function: Callable, *, torch_dropout: bool = False) -> Provider:
    """A provider that is one differentiable function of the op's arguments."""
    exact = _with_torch_dropout(arguments, group.dtype) if torch_dropout else SPEC.reference
    return Provider(
        run=partial(_results, group, function, arguments, _cotangent(arguments)),
        exact=partial(_exact, group, exact, arguments),
        graph=partial(function, **arguments) if group.direction == BOTH else None,
        weights=_weights(arguments),
        work=_work(group, arguments),
    )


def frozen_linear(group: Group, arguments: dict) -> Provider:
    def linear(x, weight, bias, **rest):
        return F.linear(x, weight, bias)

    rows = arguments["x"].numel() // arguments["x"].shape[-1]
    return Provider(
        run=partial(_results, group, linear, arguments, _cotangent(arguments)),
        exact=partial(_exact, group, linear, arguments),
        graph=partial(linear, **arguments) if group.direction == BOTH else None,
        weights=_weights(arguments),
        work=_work(group, {**arguments, "segments": [(rows, None)]}),
    )


def compiled(group: Group, arguments: dict) -> Provider:
    # Eager torch's random numbers, or the dropped elements could not be known and checked.
    options = {"fallback_random": True} if arguments["dropout_p"] else None
    torch._dynamo.reset()
    function = torch.compile(plain, dynamic=False, fullgraph=True, options=options)
    return of_function(group, arguments, function, torch_dropout=True)


def of_peft(group: Group, arguments: dict, *, same_dtype: bool) -> Provider:
    """PEFT's layer. It plays one adapter at a time, so segments are calls after a switch, each with its backward."""
    names = ("weight", "bias", "lora_a", "lora_b", "scaling", "dropout_p")
    layer = peft_linear(*(arguments[name] for name in names), same_dtype=same_dtype)
    x, cotangent = arguments["x"].detach().flatten(0, -2), _cotangent(arguments).flatten(0, -2)
    parts = [
        (x_g.clone().requires_grad_(), dy_g, None if adapter is None else str(adapter))
        for x_g, dy_g, adapter in _split(arguments["segments"], x, cotangent)
    ]
    switches = len(parts) > 1

    def forward(x_g: Tensor, name: str | None) -> Tensor:
        if switches:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
        return layer(x_g)

    def run() -> Results:
        if group.direction == FORWARD_ONLY:
            with torch.no_grad():
                return {"output": [forward(x_g, name) for x_g, _, name in parts]}
        results: dict = {"output": [], "gradient of x": []}
        for x_g, dy_g, name in parts:
            y_g = forward(x_g, name)
            pair = [] if name is None else [layer.lora_A[name].weight, layer.lora_B[name].weight]
            dx_g, *grads = torch.autograd.grad(y_g, [x_g, *pair], dy_g)
            results["output"].append(y_g)
            results["gradient of x"].append(dx_g)
            results.update({f"gradient of lora_{side}[{name}]": g for side, g in zip("ab", grads, strict=False)})
        return results

    def checked() -> Results:
        results, shape = run(), arguments["x"].shape
        dx = {"gradient of x": torch.cat(results["gradient of x"]).view(shape)} if "gradient of x" in results else {}
        return {**results, "output": torch.cat(results["output"]).view(*shape[:-1], -1), **dx}

    dropout_dtype = group.dtype if same_dtype else torch.float32
    return Provider(
        run=run,
        exact=partial(_exact, group, _with_torch_dropout(arguments, dropout_dtype), arguments),
        results=checked,
        graph=(lambda: [forward(x_g, name) for x_g, _, name in parts]) if group.direction == BOTH else None,
        work=_work(group, arguments),
    )


def _results(group: Group, function: Callable, arguments: dict, cotangent: Tensor) -> Results:
    """The output and, for both directions, the gradients that the function has."""
    if group.direction == FORWARD_ONLY:
        with torch.no_grad():
            return {"output": function(**arguments)}
    output, leaves = function(**arguments), args.trainable(arguments)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype), allow_unused=True)
    named = zip(leaves, grads, strict=True)
    return {"output": output, **{f"gradient of {name}": grad for name, grad in named if grad is not None}}


def _exact(group: Group, function: Callable, arguments: dict, dtype: torch.dtype) -> Results:
    return _results(group, function, args.copy(arguments, dtype), _cotangent(arguments))


def _with_torch_dropout(arguments: dict, dtype: torch.dtype) -> Callable:
    """The definition with the masks that ``F.dropout`` draws after the check's seed, segment by segment."""
    p = arguments["dropout_p"]
    if not p:
        return SPEC.reference
    torch.manual_seed(SEED)
    rows = arguments["x"].detach().flatten(0, -2)
    parts = _split(arguments["segments"], torch.ones_like(rows, dtype=dtype))
    masks = [F.dropout(ones, p) > 0 for ones, adapter in parts if adapter is not None]

    def function(**values) -> Tensor:
        remaining = iter(masks)
        return plain(**values, dropout=lambda x, p: x * next(remaining) / (1 - p))

    return function


def _split(segments, *matrices: Tensor) -> Iterator[tuple]:
    """(rows of each matrix..., adapter) for each segment."""
    counts, adapters = zip(*(segments or [(len(matrices[0]), 0)]), strict=True)
    return zip(*(matrix.split(counts) for matrix in matrices), adapters, strict=True)


def _cotangent(arguments: dict) -> Tensor:
    x, weight = arguments["x"], arguments["weight"]
    generator = torch.Generator(x.device).manual_seed(SEED + 1)
    shape = (*x.shape[:-1], weight.shape[0])
    return torch.randn(shape, generator=generator, device=x.device).to(x.dtype)


def _weights(arguments: dict) -> tuple[Tensor, ...]:
    named = (arguments["weight"], arguments["bias"], *arguments["lora_a"], *arguments["lora_b"])
    return tuple(tensor for tensor in named if tensor is not None)


def _work(group: Group, arguments: dict) -> tuple[int, int]:
    forward, both = ((f, f + b) for f, b in (SPEC.bytes_moved(arguments), SPEC.flops(arguments)))
    index = group.direction == BOTH
    return forward[index], both[index]
