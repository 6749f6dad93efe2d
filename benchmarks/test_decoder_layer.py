"""Forward and backward of a decoder layer: the time of selective recomputation. Its bytes are in `memory/lora.py`."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from . import decoder
from .provider import BOTH, Group

TOKENS = 512
GROUPS = [Group("decoder_layer", BOTH, "llama-512", dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)]
GRID = [
    pytest.param(group, name, id=f"{group}/{name}")
    for group in GROUPS
    for name in decoder.PROVIDERS
    if not (name == "peft-float32-adapters" and group.dtype == torch.float32)
]


@pytest.mark.parametrize(("group", "provider"), GRID)
def test_decoder_layer(measure, group, provider):
    measure({name: partial(decoder.training, name, group.dtype, TOKENS) for name in decoder.PROVIDERS})
