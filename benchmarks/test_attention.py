"""``relative_attention`` beside old BERT's einsum, SDPA with and without a mask, FlexAttention and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from . import attention
from .provider import BOTH, FORWARD_ONLY, Group

CASES = {case.name: case for case in attention.CASES}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def groups() -> Iterator[Group]:
    for name, case in CASES.items():
        for device in DEVICES:
            if device == "cpu" and "gpu" in case.tags:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for direction in (FORWARD_ONLY, BOTH):
                    yield Group("relative_attention", direction, name, dtype, device)


def grid() -> Iterator:
    for group in groups():
        for name in attention.providers(CASES[group.case], group):
            skip = [pytest.mark.skip("FlexAttention has no backward on a CPU")]
            marks = skip if (name, group.direction, group.device) == ("flex", BOTH, "cpu") else []
            yield pytest.param(group, name, id=f"{group}/{name}", marks=marks)


@pytest.mark.parametrize(("group", "provider"), [*grid()])
def test_attention(measure, group, provider):
    measure(attention.builders(CASES[group.case], group))
