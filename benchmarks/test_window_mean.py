"""``window_mean`` beside the product with dense weights, running sums, and causal SDPA, which does something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernelab.ops import specs
from tests.contract import arguments as args

from .functions import backends, compiled, of_function
from .measure import BASE
from .provider import BOTH, FORWARD_ONLY, SEED, Group, Provider

SPEC = next(spec for spec in specs() if spec.name == "window_mean")
CASES = {case.name: case for case in SPEC.cases if "bench" in case.tags}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def groups() -> Iterator[Group]:
    for name, case in CASES.items():
        for device in DEVICES:
            if device == "cpu" and "gpu" in case.tags:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for direction in (FORWARD_ONLY, BOTH):
                    yield Group(SPEC.name, direction, name, dtype, device)


def providers(group: Group) -> list[str]:
    ours = (f"kernelab/{backend}" for backend in backends(SPEC.name, group))
    return [BASE, *ours, "dense", "cumsum", "torch.compile"]


GRID = [pytest.param(group, name, id=f"{group}/{name}") for group in groups() for name in providers(group)]


@pytest.mark.parametrize(("group", "provider"), GRID)
def test_window_mean(measure, group, provider):
    arguments = args.build(CASES[group.case], group.device, group.dtype, SEED)
    windows = weights(arguments["value"], arguments["widths"])

    def dense(value, **_) -> Tensor:
        """The weights are made once, before."""
        return windows.to(value.dtype) @ value

    builders = {
        BASE: partial(of_case, group, arguments, sdpa, attention),
        "dense": partial(of_case, group, arguments, dense, dense),
        "cumsum": partial(of_case, group, arguments, running_sums, running_sums),
        "torch.compile": lambda: of_case(group, arguments, compiled(running_sums), running_sums),
    }
    for backend in backends(SPEC.name, group):
        ours = partial(SPEC.function, backend=backend)
        builders[f"kernelab/{backend}"] = partial(of_case, group, arguments, ours, SPEC.reference)
    measure(builders)


def weights(value: Tensor, widths: list[int]) -> Tensor:
    """[H, N, N] in the dtype of the values: 1 / width where a key is in the window."""
    behind = torch.arange(value.shape[2], device=value.device)[:, None] - torch.arange(
        value.shape[2], device=value.device
    )
    seen = (behind >= 0) & (behind < torch.tensor(widths, device=value.device)[:, None, None])
    return (seen / seen.sum(-1, keepdim=True)).to(value.dtype)


def running_sums(value, widths, **_) -> Tensor:
    """Differences of running sums, in the dtype of the values."""
    tokens, width = value.shape[2], torch.tensor(widths, device=value.device)
    total = F.pad(value.cumsum(2), (0, 0, 1, 0))  # [B, H, N + 1, D]
    end = torch.arange(1, tokens + 1, device=value.device)
    start = (end - width[:, None]).clamp(min=0)  # [H, N]
    before = total.gather(2, start[None, :, :, None].expand(*value.shape))
    return (total[:, :, 1:] - before) / (end - start)[..., None]


def sdpa(value, **_) -> Tensor:
    return F.scaled_dot_product_attention(value, value, value, is_causal=True)


def attention(value, **_) -> Tensor:
    """The definition of :func:`sdpa`."""
    scores = value @ value.mT * value.shape[3] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=value.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


def of_case(group: Group, arguments: dict, function: Callable, definition: Callable) -> Provider:
    work = {"bytes_moved": SPEC.bytes_moved(arguments), "flops": SPEC.flops(arguments)}
    return of_function(group, arguments, function, definition, **work)
