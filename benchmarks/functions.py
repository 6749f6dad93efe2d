"""Providers that are one differentiable function of keyword arguments, as most are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernelab._core import registry
from tests.contract import arguments as args

from .provider import BOTH, FORWARD_ONLY, SEED, Group, Provider, Results


def backends(op: str, group: Group) -> list[str]:
    """The backends of ``op`` that run here."""
    empty = torch.empty(0, dtype=group.dtype, device=group.device)
    return [name for name in registry.backends(op) if registry.explain(op, empty, backend=name).chosen]


def of_function(
    group: Group,
    arguments: dict,
    function: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    *,
    bytes_moved: tuple[int, int],
    flops: tuple[int, int],
    weights: tuple[str, ...] = (),
) -> Provider:
    """``function`` checked against its plain ``definition``; bytes and FLOPs are (forward, backward)."""
    index = group.direction == BOTH
    return Provider(
        run=partial(results, group, function, arguments),
        exact=lambda dtype: results(group, definition, args.copy(arguments, dtype)),
        graph=partial(function, **arguments) if index else None,
        weights=tuple(arguments[name] for name in weights if arguments[name] is not None),
        work=tuple(sum(amount[: index + 1]) for amount in (bytes_moved, flops)),
    )


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For these shapes, in one graph."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def results(group: Group, function: Callable[..., Tensor], arguments: dict) -> Results:
    """The output and, for both directions, the gradients that the function has."""
    if group.direction == FORWARD_ONLY:
        with torch.no_grad():
            return {"output": function(**arguments)}
    output, leaves = function(**arguments), args.trainable(arguments)
    cotangent = _cotangent(output.shape, output.dtype, output.device)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    named = zip(leaves, grads, strict=True)
    return {"output": output, **{f"gradient of {name}": grad for name, grad in named if grad is not None}}


@functools.lru_cache(maxsize=4)
def _cotangent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same numbers for all dtypes, made before anything is measured."""
    generator = torch.Generator(device).manual_seed(SEED + 1)
    return torch.randn(shape, generator=generator, device=device).to(dtype)
