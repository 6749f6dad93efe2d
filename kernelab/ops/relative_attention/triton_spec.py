"""What ahead-of-time checks know of the Triton backend. Importing it needs no Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

from kernelab._core.launch import TARGETS
from kernelab._core.spec import Launch


class _Attention(NamedTuple):
    """One way to use the op: which tables, and the shapes."""

    name: str
    dtype: torch.dtype
    tables: str  # of query, key, value and bias
    features: int = 64
    causal: bool = True
    queries: int = 512
    key_heads: int = 12
    masked: bool = False
    documents: bool = False
    backward: bool = True
    capabilities: tuple[int, ...] = (90,)


EVERY = (80, 90, 100, 0)
ATTENTIONS = (
    _Attention("bf16 query", torch.bfloat16, "q", capabilities=EVERY),
    _Attention("bf16 query key", torch.bfloat16, "qk", causal=False, capabilities=(80, 90, 100)),
    _Attention("bf16 all", torch.bfloat16, "qkvb", causal=False, capabilities=(80, 90, 100)),
    _Attention("fp32 query", torch.float32, "q", capabilities=(80, 90, 100)),
    _Attention("bf16 bias", torch.bfloat16, "b", causal=False, masked=True),
    _Attention("fp16 documents", torch.float16, "q", 80, documents=True, key_heads=4),
    _Attention("bf16 128 query", torch.bfloat16, "q", 128, causal=False, key_heads=4, capabilities=(80, 90, 100)),
    _Attention("bf16 128 query key", torch.bfloat16, "qk", 128, causal=False),
    _Attention("bf16 256 query", torch.bfloat16, "q", 256, causal=False),
    _Attention("bf16 decode", torch.bfloat16, "q", 128, queries=1, key_heads=4, backward=False),
)


def launches() -> Iterator[Launch]:
    """Every launch of ``ATTENTIONS`` with the block sizes of each architecture, on ``meta`` tensors."""
    for attention in ATTENTIONS:
        for capability in attention.capabilities:
            seen = set()  # backward has one launch of the forward again
            for launch in _plan(attention, capability):
                if capability == 0 and launch.name == "tables":
                    continue  # scalar registers are spilled there, to lanes of vector registers
                if launch.name in seen:
                    continue
                seen.add(launch.name)
                name = f"{TARGETS[capability]} {attention.name}: {launch.name}"
                yield dataclasses.replace(launch, name=name, targets=(TARGETS[capability],))


def _plan(attention: _Attention, capability: int) -> Iterator[Launch]:
    from .triton_launch import plan_backward, plan_forward

    def empty(*shape: int, dtype: torch.dtype = attention.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, heads, keys, rows = 1 if attention.documents else 16, 12, 512, 2 * 64 + 1
    query = empty(batch, heads, attention.queries, attention.features)
    key = empty(batch, attention.key_heads, keys, attention.features)
    shapes = {"q": (heads, rows, attention.features), "k": (heads, rows, attention.features)}
    shapes |= {"v": (heads, rows, attention.features), "b": (heads, rows)}
    tables = [empty(*shape) if name in attention.tables else None for name, shape in shapes.items()]
    mask = empty(batch, keys, dtype=torch.bool) if attention.masked else None
    documents = empty(2, keys, dtype=torch.int32) if attention.documents else None
    inputs = query, key, key, *tables
    rest = attention.causal, True, keys - attention.queries, attention.features**-0.5
    steps, (out, peak, mass) = plan_forward(*inputs, mask, documents, *rest, capability)
    yield from steps
    if attention.backward:
        need = [tensor is not None for tensor in inputs]
        steps, _ = plan_backward(*inputs, mask, documents, out, peak, mass, out, *rest, need, capability)
        yield from steps
