"""What ahead-of-time checks and byte counts know of the Triton backend. Importing it needs no Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

from kernelab._core.launch import TARGETS
from kernelab._core.spec import Launch

from .triton_tuning import Configuration, configuration

ENTRY = 4 * 8  # bytes of a tile table's entry


class _Step(NamedTuple):
    """Forward and backward of a layer of which half the rows are off."""

    name: str
    dtype: torch.dtype
    out_features: int
    in_features: int
    ranks: tuple[int, ...]
    dropout_p: float = 0.0
    has_weight: bool = True  # else lora_add
    capabilities: tuple[int, ...] = (80, 90, 100, 0)


STEPS = (
    _Step("bf16 r16", torch.bfloat16, 4096, 4096, (16, 16)),
    _Step("bf16 r128 dropout", torch.bfloat16, 11008, 4096, (128,), dropout_p=0.05),
    _Step("fp16 r8 r64", torch.float16, 4096, 1024, (8, 64)),
    _Step("fp32 r16", torch.float32, 4096, 4096, (16,), dropout_p=0.05, capabilities=(80, 90, 100)),
    _Step("bf16 unaligned", torch.bfloat16, 4095, 4093, (12,), capabilities=(90,)),
    _Step("bf16 add", torch.bfloat16, 4096, 4096, (16,), has_weight=False, capabilities=(90,)),
)


def launches() -> Iterator[Launch]:
    """Every launch of ``STEPS`` with the block sizes of each architecture, on ``meta`` tensors."""
    for step in STEPS:
        for capability in step.capabilities:
            for launch in _plan(step, capability):
                name = f"{TARGETS[capability]} {step.name}: {launch.name}"
                yield dataclasses.replace(launch, name=name, targets=(TARGETS[capability],))


def _plan(step: _Step, capability: int) -> list[Launch]:
    from .triton_launch import plan_backward, plan_forward, routing

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=step.dtype, device="meta")

    n, k, adapters = step.out_features, step.in_features, len(step.ranks)
    rows = routing((4096, *[2048] * adapters), (-1, *range(adapters)), (True,) * adapters)
    m, scaling = sum(rows.counts), [2.0] * adapters
    a, b = [empty(rank, k) for rank in step.ranks], [empty(n, rank) for rank in step.ranks]
    weight, base = (empty(n, k), None) if step.has_weight else (None, empty(m, n))
    tail = a, b, rows, scaling, step.dropout_p, 2**40
    forward, _, s = plan_forward(empty(m, k), weight, None, base, *tail, capability)
    need = [True] * (1 + 2 * adapters)
    backward, *_ = plan_backward(empty(m, n), empty(rows.kept, k), s, weight, *tail, need, capability)
    same = [f"reduce d{matrix}{adapter}" for matrix in "AB" for adapter in range(1, adapters)]
    return [launch for launch in [*forward, *backward] if launch.name not in same]


def triton_bytes(arguments: dict) -> tuple[int, int]:
    """Bytes that the launches of ``(forward, backward)`` load and store, where x and all adapters get gradients.

    Counted as the interpreter counts: every lane that is not masked, with the block sizes that it uses.
    """
    x, lora_a = arguments["x"], arguments["lora_a"]
    n, k, size = arguments["lora_b"][0].shape[0], x.shape[-1], x.element_size()
    segments = arguments["segments"] or [(x.numel() // k, 0)]
    ranks = {adapter: lora_a[adapter].shape[0] for _, adapter in segments if adapter is not None}
    parts = [(count, ranks.get(adapter, 0)) for count, adapter in segments if count > 0]  # rank 0: off
    on = [(count, rank) for count, rank in parts if rank]
    used = {adapter for count, adapter in segments if adapter is not None and count > 0}
    slots, width, rank_sum = _rows(on), max(ranks.values(), default=0), sum(ranks[adapter] for adapter in used)
    to_y, to_x = configuration(n, k, width, x.dtype, 90), configuration(k, n, width, x.dtype, 90)
    has_weight, has_bias = "weight" in arguments, arguments.get("bias") is not None

    def factors(block: int, features: int) -> int:  # every tile reads the A or B of its adapter
        return size * features * sum(-(-count // block) * rank for count, rank in on)

    def shrink(config: Configuration, features: int) -> int:
        rank_blocks = -(-width // config.rank_block)
        entries = ENTRY * _tiles(on, config.shrink.rows) * rank_blocks
        return entries + size * slots * (features * rank_blocks + width) + factors(config.shrink.rows, features)

    def main(config: Configuration, inner: int, features: int, dropout: bool, bias: bool, base: bool) -> int:
        if has_weight and config.fused:
            blocks, rows = config.main_dropout if dropout else config.main, parts
        else:
            blocks, rows, base = config.expand, on if has_weight else parts, base or has_weight
        sweeps, tiles = -(-features // blocks.columns), _tiles(rows, blocks.rows)
        adapter = size * sweeps * sum(count * rank for count, rank in on) + factors(blocks.rows, features)
        gemm = size * (_rows(rows) * inner * sweeps + tiles * features * (inner + bias)) if blocks.inner else 0
        return ENTRY * tiles * sweeps + adapter + gemm + size * _rows(rows) * features * (1 + base)

    def gram(config: Configuration, features: int, once: bool) -> int:
        sweeps, rank_blocks = -(-features // config.gram.columns), -(-width // config.rank_block)
        splits = _tiles(on, config.gram.rows)
        read = ENTRY * splits * sweeps * rank_blocks + size * slots * (features * rank_blocks + width * sweeps)
        partial = 4 * features * (splits * width + sum(-(-count // config.gram.rows) * rank for count, rank in on))
        shrunk = factors(config.gram.rows, features) + (8 * sweeps + size) * slots * width
        return read + partial + size * features * rank_sum + (shrunk if once else 0)

    if not parts:
        return 0, 0
    once, dropout = to_y.once, arguments["dropout_p"] > 0
    forward = shrink(to_y, k) + main(to_y, k, n, False, has_bias, not has_weight)
    backward = gram(to_y, n, once) + (0 if once else shrink(to_x, n)) + gram(to_x, k, False)
    return forward, backward + main(to_x, n, k, dropout, False, False)


def _rows(parts: list[tuple[int, int]]) -> int:
    return sum(count for count, _ in parts)


def _tiles(parts: list[tuple[int, int]], block: int) -> int:
    return sum(-(-count // block) for count, _ in parts)
