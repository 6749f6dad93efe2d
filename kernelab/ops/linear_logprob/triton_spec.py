"""What ahead-of-time checks and byte counts know of the Triton backend. Importing it needs no Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

from kernelab._core.launch import TARGETS
from kernelab._core.spec import Launch

from .triton_tuning import configuration, padded


class _Head(NamedTuple):
    name: str
    dtype: torch.dtype
    classes: int
    features: int
    bias: bool = False
    capabilities: tuple[int, ...] = (80, 90, 100, 0)


HEADS = (
    _Head("bf16 128256", torch.bfloat16, 128256, 4096),
    _Head("fp32 32000", torch.float32, 32000, 2048, capabilities=(80, 90, 100)),
    _Head("fp16 bias 50257", torch.float16, 50257, 1600, bias=True, capabilities=(90,)),
)


def launches() -> Iterator[Launch]:
    """Every launch of ``HEADS`` with the block sizes of each architecture, on ``meta`` tensors."""
    for head in HEADS:
        for capability in head.capabilities:
            for launch in _plan(head, capability):
                name = f"{TARGETS[capability]} {head.name}: {launch.name}"
                yield dataclasses.replace(launch, name=name, targets=(TARGETS[capability],))


def _plan(head: _Head, capability: int) -> Iterator[Launch]:
    """Scoring, the forward of a frozen head with entropy, and the backward of a head that trains."""
    from .triton_launch import plan_backward, plan_forward

    def empty(*shape: int, dtype: torch.dtype = head.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 2048
    hidden, weight = empty(rows, head.features), empty(head.classes, head.features)
    model = hidden, weight, empty(head.classes) if head.bias else None, empty(rows, dtype=torch.int64)
    per_row = [empty(rows, dtype=torch.float32) for _ in range(4)]
    plans = {
        "score": plan_forward(*model, 1.0, False, False, capability),
        "keep": plan_forward(*model, 1.0, True, True, capability),
        "backward": plan_backward(*model, *per_row, 1.0, [True, True, True], capability),
    }
    for plan, (steps, _) in plans.items():
        seen = set()  # later pieces have the launches of the first
        for launch in steps:
            if launch.name not in seen:
                seen.add(launch.name)
                yield dataclasses.replace(launch, name=f"{plan} {launch.name}")


def triton_bytes(arguments: dict, entropy: bool) -> tuple[int, int]:
    """Bytes that the launches of ``(forward, backward)`` load and store, torch's matrix products apart.

    Counted as the interpreter counts: every lane that is not masked, with the block sizes that it uses; for as many
    logits as are worked on at once.
    """
    hidden, weight, bias, target = (arguments[name] for name in ("hidden", "weight", "bias", "target"))
    m, (v, d), size = target.numel(), weight.shape, hidden.element_size()
    config = configuration(v, d, hidden.dtype, 90)
    tiles, row_blocks = -(-v // config.scores.columns), -(-m // config.scores.rows)
    train_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    keep = hidden.requires_grad and not train_head and hidden.dtype != torch.float16

    def scores(reductions: int, shares: bool) -> int:
        operands = size * (m * d * tiles + v * row_blocks * (d + (bias is not None)))
        return operands + 8 * m * tiles + 4 * m + 4 * reductions * m * tiles + size * m * padded(v, config) * shares

    def dz(others: int) -> int:  # numbers of a row beside the target
        return 2 * size * m * padded(v, config) + m * tiles * (8 + 4 * others)

    combine = 4 * m * tiles * (3 + entropy) + m * (8 + 4 + 8 + 4 * entropy + 4 * keep)
    forward = scores(2 + entropy, keep) + combine + (dz(5) if keep else 0) + (dz(3) if keep and entropy else 0)
    if keep or not (hidden.requires_grad or train_head):
        return forward, 0
    return forward, scores(1, True) + dz(6 if entropy else 4)
