"""``linear_logprob`` beside torch with all logits in memory, in checkpointed pieces, and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernelab.ops import specs
from tests.contract import arguments as args

from .functions import backends, compiled, of_function
from .provider import BOTH, FORWARD_ONLY, SEED, Group, Provider

SPECS = {spec.function.__name__: spec for spec in specs() if spec.name == "linear_logprob"}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
PIECE = 256  # rows of the checkpointed way


def groups() -> Iterator[Group]:
    for op, spec in SPECS.items():
        for case in spec.cases:
            for device in DEVICES:
                if not {"bench", "smallest"} & case.tags or (device == "cpu" and "gpu" in case.tags):
                    continue
                for dtype in (torch.float32, torch.bfloat16):
                    for direction in (FORWARD_ONLY, BOTH):
                        yield Group(op, direction, case.name, dtype, device)


def providers(group: Group) -> list[str]:
    return [
        *(f"kernelab/{backend}" for backend in backends(SPECS[group.op].name, group)),
        "torch",
        "torch-checkpoint",
        "torch.compile",
    ]


GRID = [pytest.param(group, name, id=f"{group}/{name}") for group in groups() for name in providers(group)]


@pytest.mark.parametrize(("group", "provider"), GRID)
def test_linear_logprob(measure, group, provider):
    spec = SPECS[group.op]
    case = next(case for case in spec.cases if case.name == group.case)
    arguments = args.build(case, group.device, group.dtype, SEED)
    plain = partial(eager, entropy="entropy" in group.op)
    builders = {
        "torch": partial(of_head, group, arguments, plain, plain),
        "torch-checkpoint": partial(of_head, group, arguments, partial(in_pieces, plain), plain),
        "torch.compile": lambda: of_head(group, arguments, compiled(plain), plain),
    }
    for backend in backends(spec.name, group):
        ours = partial(spec.function, backend=backend)
        builders[f"kernelab/{backend}"] = partial(of_head, group, arguments, ours, spec.reference)
    measure(builders)


def eager(hidden, weight, target, bias, temperature, *, entropy: bool) -> Tensor:
    """What one writes in torch without a library, in the dtype of the inputs."""
    z = F.linear(hidden, weight, bias)
    log_p = torch.log_softmax(z if temperature == 1.0 else z / temperature, dim=-1)
    logprob = log_p.gather(-1, target[..., None])[..., 0]
    return torch.stack([logprob, -(log_p.exp() * log_p).sum(-1)]) if entropy else logprob


def in_pieces(function: Callable, hidden, weight, target, bias, temperature) -> Tensor:
    """``function`` on some rows at a time, its logits forgotten and computed again in backward."""
    pairs = zip(hidden.split(PIECE), target.split(PIECE), strict=True)
    parts = [checkpoint(function, h, weight, t, bias, temperature, use_reentrant=False) for h, t in pairs]
    return torch.cat(parts, dim=-1)


def of_head(group: Group, arguments: dict, function: Callable, definition: Callable) -> Provider:
    spec = SPECS[group.op]
    work = {"bytes_moved": spec.bytes_moved(arguments), "flops": spec.flops(arguments)}
    return of_function(group, arguments, function, definition, **work, weights=("weight", "bias", "target"))
