"""CPU: blocks of queries against blocks of keys in C++; scores live in a thread's own memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernelab._core import native

from . import cpu_blocked
from .arguments import no_gradient

TASKS = 32  # of backward, where batch and key heads make as many; a task has sums of its own for the tables
SMALL = 2**17  # products of two numbers, up to which a second thread costs more than it saves


class _Call(NamedTuple):
    """What the extension is told of the inputs."""

    arguments: list[object]
    rows: slice  # of the tables, whose distances occur
    heads: tuple[int, ...]  # of the query, key and value table and the bias; 0 where there is none
    sizes: tuple[int, ...]  # numbers of features, value features, table rows and keys, as the extension pads them
    products: int
    wide: torch.dtype


def _prepare(query, key, value, *rest) -> _Call:
    *tables, mask, documents, causal, content, offset, scale = rest
    batch, query_heads, queries, features = query.shape
    _, key_heads, keys, value_features = value.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    count = next((table.shape[1] for table in tables if table is not None), 0)
    first, last = 1 - queries - offset, keys - 1 - offset  # distances that occur
    last = max(first, min(last, 0) if causal else last)
    nearest, farthest = (min(max(d, -(count // 2)), count // 2) for d in (first, last))
    rows = slice(nearest + count // 2, farthest + count // 2 + 1)
    tables = [None if t is None else _contiguous(t[:, rows].to(wide)) for t in tables]
    heads = tuple(0 if t is None else t.shape[0] for t in tables)
    arguments = []
    for tensor in (query, key, value):
        tensor = native.row_major(tensor)
        arguments += tensor, *tensor.stride()[:3]
    for table, of_heads in zip(tables, heads, strict=True):
        arguments += 0 if table is None else table, of_heads
    arguments += (0 if t is None else _contiguous(t) for t in (mask, documents))
    distances = farthest - nearest + 1 if count else 0
    arguments += batch, query_heads, key_heads, queries, keys, features, value_features
    arguments += nearest, distances, causal, content, offset, scale
    sizes = _pad(features), _pad(value_features), _pad(distances) + 32, _pad(keys) + 16
    return _Call(arguments, rows, heads, sizes, batch * query_heads * queries * keys * features, wide)


def _contiguous(t: Tensor) -> Tensor:
    return native.row_major(t.contiguous())


def _pad(size: int) -> int:
    return -(-size // 16) * 16


def _run(phase: str, query: Tensor, call: _Call, tasks: int, numbers: int, *rest: object, sums: int = 0) -> None:
    """``numbers`` of work memory a thread, beside that of the tables and ``sums`` of their gradients."""
    f, v, rows, _ = call.sizes
    threads = 1 if call.products < SMALL else max(1, min(torch.get_num_threads(), tasks))
    tables = 2 * rows * (f * (call.heads[0] + call.heads[1]) + v * call.heads[2])
    work = torch.empty(tables + sums + threads * numbers, dtype=call.wide)
    name = f"relative_attention_{phase}_{str(query.dtype).removeprefix('torch.')}"
    native.call(name, *call.arguments, work, threads, *rest)


def forward(query, key, value, *rest):
    if native.reason_missing() is not None:
        return cpu_blocked.forward(query, key, value, *rest)
    call = _prepare(query, key, value, *rest)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    peak, mass = (query.new_empty(query.shape[:3], dtype=call.wide) for _ in range(2))
    if out.numel() > 0:
        f, v, rows, keys = call.sizes
        numbers = keys * (f + v + 9) + 64 * (f + v + 272 + 2 * rows) + 2048
        _run(
            "forward", query, call, query.shape[0] * query.shape[1] * -(-query.shape[2] // 64), numbers, out, peak, mass
        )
    return out, peak, mass


def backward(query, key, value, *rest):
    if native.reason_missing() is not None:
        return cpu_blocked.backward(query, key, value, *rest)
    *tables, mask, documents, out, peak, mass, grad_out, causal, content, offset, scale, need = rest
    call = _prepare(query, key, value, *tables, mask, documents, causal, content, offset, scale)
    inputs, make = (query, key, value, *tables), Tensor.new_empty if out.numel() > 0 else Tensor.new_zeros
    grads = [make(t, t.shape) if wanted else no_gradient(query) for t, wanted in zip(inputs, need, strict=True)]
    if out.numel() == 0:
        return tuple(grads)
    occurring = [
        make(t, t[:, call.rows].shape, dtype=call.wide) if wanted else None
        for t, wanted in zip(tables, need[3:], strict=True)
    ]
    (batch, query_heads, *_), key_heads = query.shape, key.shape[1]
    chunks = min(batch, -(-TASKS // key_heads))
    f, v, rows, keys = call.sizes
    sums = chunks * query_heads * rows * sum(n for n, heads in zip((f, f, v, 1), call.heads, strict=True) if heads)
    numbers = keys * (3 * f + 2 * v + 11) + 64 * (2 * f + 2 * v + 544 + 4 * rows) + 2048
    grad_out = native.row_major(grad_out)
    dense = (grad if wanted else None for grad, wanted in zip(grads[:3], need[:3], strict=True))
    results = (0 if t is None else t for t in (*dense, *occurring))
    given = grad_out, *grad_out.stride()[:3], *map(_contiguous, (out, peak, mass))
    _run("backward", query, call, chunks * key_heads, numbers, *given, *results, chunks, sums=sums)
    for index, part in enumerate(occurring, 3):
        if part is None:
            continue
        if part.shape == grads[index].shape:
            grads[index] = part.to(grads[index].dtype)
        else:
            grads[index].zero_()[:, call.rows] = part
    return tuple(grads)
