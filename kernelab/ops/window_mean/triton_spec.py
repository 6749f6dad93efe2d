"""What ahead-of-time checks know of the Triton backend. Importing it needs no Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from kernelab._core.launch import TARGETS
from kernelab._core.spec import Launch


def launches() -> Iterator[Launch]:
    """The launches of a forward and a backward, with padding and with documents, on ``meta`` tensors."""
    from .triton_launch import plan

    for capability, target in TARGETS.items():
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            x = torch.empty(4, 8, 4096, 64, dtype=dtype, device="meta")
            inverse = torch.empty(4, 8, 4096, device="meta")
            documents = torch.empty(2, 4096, dtype=torch.int32, device="meta")
            back = [2 ** (head + 1) - 2 for head in range(8)]
            plans = {
                "forward": plan(x, None, inverse[:1], back, [0] * 8, None, capability),
                "backward": plan(x, inverse, inverse[:, :1], [0] * 8, back, None, capability),
                "packed": plan(x[:1], None, inverse[:1], back, back, documents, capability),
            }
            for words, (steps, _) in plans.items():
                for launch in steps:
                    words_of = f"{target} {name} {words}: {launch.name}"
                    yield dataclasses.replace(launch, name=words_of, targets=(target,))
