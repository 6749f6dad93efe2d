"""The Triton backend of ``lora_linear``: plans the launches of a call, then runs them.

A plan allocates the results and lists the launches that fill them. Ahead-of-time checks plan on ``meta`` tensors and so
see the very launches of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from kernelab._core.launch import capability, run, unit_stride
from kernelab._core.philox import dropout_threshold
from kernelab._core.spec import Launch

from . import triton_kernels as kernels
from .reference import Segment, segments
from .triton_tuning import Configuration, configuration

NO_DROPOUT = {"seed": 0, "threshold": 0, "DROPOUT": False}


def forward(x, weight, bias, base, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed):
    rows = routing(tuple(counts), tuple(adapters), tuple(keep))
    arguments = x, weight, bias, base, lora_a, lora_b, rows, scaling, dropout_p, seed
    launches, y, s = plan_forward(*arguments, capability(x.device))
    run(launches, x)
    return y, s if rows.kept == rows.slots else s[: rows.kept].clone()  # a slice would hold the other rows too


def backward(dy, x, s, weight, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed, need):
    rows = routing(tuple(counts), tuple(adapters), tuple(keep))
    arguments = dy, x, s, weight, lora_a, lora_b, rows, scaling, dropout_p, seed, need
    launches, *gradients = plan_backward(*arguments, capability(dy.device))
    run(launches, dy)
    return tuple(gradients)


@dataclass(frozen=True)
class Rows:
    """Which rows use which adapter. A row with an adapter has a slot; those that are kept for backward come first."""

    counts: tuple[int, ...]
    adapters: tuple[int, ...]
    keep: tuple[bool, ...]

    @functools.cached_property
    def segments(self) -> list[Segment]:
        return [part for part in segments(self.counts, self.adapters, self.keep) if part.count > 0]

    @functools.cached_property
    def used(self) -> tuple[int, ...]:
        """Adapters of at least one row."""
        return tuple(sorted({part.adapter for part in self.segments if part.adapter >= 0}))

    @functools.cached_property
    def slots(self) -> int:
        return sum(part.count for part in self.segments if part.adapter >= 0)

    @functools.cached_property
    def kept(self) -> int:
        return sum(part.count for part in self.segments if part.kept >= 0)


routing = functools.lru_cache(maxsize=256)(Rows)  # all layers of a model share a few


class Tiles(NamedTuple):
    """A tile table and where the tiles of each adapter are in it."""

    entries: Tensor  # [tiles, 4] int64: row, end, adapter, slot
    spans: dict[int, tuple[int, int]]  # adapter: first tile, number of tiles

    @property
    def count(self) -> int:
        return self.entries.shape[0]


@functools.lru_cache(maxsize=256)
def tile_table(rows: Rows, wanted: tuple[int, ...], block: int, device: torch.device) -> Tiles:
    """Tiles of at most ``block`` rows of the ``wanted`` adapters (-1: off), one adapter after the other.

    A table is copied to the device when it is first used.
    """
    free = rows.kept
    tiles: dict[int, list[tuple[int, ...]]] = {adapter: [] for adapter in wanted}
    for part in rows.segments:
        slot = part.kept
        if part.adapter >= 0 and part.kept < 0:
            slot, free = free, free + part.count
        for start in range(0, part.count if part.adapter in tiles else 0, block):
            end = part.row + min(start + block, part.count)
            tiles[part.adapter].append((part.row + start, end, part.adapter, slot + start))
    entries = [entry for adapter in wanted for entry in tiles[adapter]]
    lengths = [len(tiles[adapter]) for adapter in wanted]
    spans = {adapter: (sum(lengths[:i]), lengths[i]) for i, adapter in enumerate(wanted)}
    return Tiles(torch.tensor(entries, dtype=torch.int64, device=device).reshape(-1, 4), spans)


def plan_forward(x, weight, bias, base, lora_a, lora_b, rows: Rows, scaling, dropout_p, seed, capability: int):
    """``(launches, y, S of all slots)``."""
    n, (m, k) = base.shape[1] if weight is None else weight.shape[0], x.shape
    width = max((a.shape[0] for a in lora_a), default=0)
    config = configuration(n, k, width, x.dtype, capability)
    x, s, y = unit_stride(x), x.new_empty(rows.slots, width), x.new_empty(m, n)
    down, up = _factors(lora_a, rows, rank_first=True), _factors(lora_b, rows, rank_first=False)
    shrink = _shrink("S", x, down, s, rows, rows.used, config, 1 / (1 - dropout_p), _dropout(dropout_p, seed))
    main = _main("y", x, weight, bias, base, s, up, scaling, y, rows, config, NO_DROPOUT)
    return [shrink, main], y, s


def plan_backward(dy, x, s, weight, lora_a, lora_b, rows: Rows, scaling, dropout_p, seed, need, capability: int):
    """``(launches, dx, [dA], [dB])``. What ``need`` does not ask for is empty and costs no launch."""
    need_x, need_a, need_b = need[0], need[1 : 1 + len(lora_a)], need[1 + len(lora_a) :]
    train_a, train_b = (tuple(a for a in rows.used if wanted[a]) for wanted in (need_a, need_b))
    through = tuple(a for a in rows.used if need_x or need_a[a])  # adapters whose dS is wanted
    (m, n), k, width = dy.shape, x.shape[1], max((a.shape[0] for a in lora_a), default=0)
    of_y, of_x = configuration(n, k, width, dy.dtype, capability), configuration(k, n, width, dy.dtype, capability)
    down, up = _factors(lora_a, rows, rank_first=True), _factors(lora_b, rows, rank_first=False)
    dropout, widened = _dropout(dropout_p, seed), [c / (1 - dropout_p) for c in scaling]
    dy, x, s = unit_stride(dy), unit_stride(x), s.contiguous()
    dx, ds = dy.new_empty(m if need_x else 0, k), dy.new_empty(rows.slots, width)
    da, db = _gradients(lora_a, need_a, rows), _gradients(lora_b, need_b, rows)
    launches = []

    once = train_b == through and of_y.once
    if train_b:
        tiles = tile_table(rows, train_b, of_y.gram.rows, dy.device)
        parts = cdiv(n, of_y.gram.columns)
        partial = dy.new_empty(tiles.count, n, width, dtype=torch.float32)
        shrunk = dy.new_empty(parts, rows.slots, width, dtype=torch.float32) if once else None
        launches.append(_gram("dB", dy, s, up, partial, shrunk, tiles, of_y, NO_DROPOUT))
        launches += [_reduce(f"dB{a}", partial, tiles.spans[a], db[a], scaling[a]) for a in train_b]
        if once:
            launches.append(_reduce("dS", shrunk, (0, parts), ds, 1.0))
    if through and not once:
        launches.append(_shrink("dS", dy, up, ds, rows, through, of_x, 1.0, NO_DROPOUT))
    if train_a:
        tiles = tile_table(rows, train_a, of_x.gram.rows, dy.device)
        partial = dy.new_empty(tiles.count, width, k, dtype=torch.float32)
        launches.append(_gram("dA", x, ds, down, partial, None, tiles, of_x, dropout, packed=x.shape[0] != m))
        launches += [_reduce(f"dA{a}", partial, tiles.spans[a], da[a], widened[a]) for a in train_a]
    if need_x:
        transposed = None if weight is None else weight.mT
        launches.append(_main("dx", dy, transposed, None, None, ds, down, widened, dx, rows, of_x, dropout))
    return launches, dx, da, db


def _dropout(dropout_p: float, seed: int) -> dict:
    return {"seed": seed, "threshold": dropout_threshold(dropout_p), "DROPOUT": True} if dropout_p else NO_DROPOUT


def _factors(matrices: Sequence[Tensor], rows: Rows, rank_first: bool) -> dict:
    """The A (``rank_first``) or B of the adapters; none where no row has one: the kernel then has no adapter code."""
    matrices = tuple(t.contiguous() for t in matrices) if rows.used else ()
    ranks = tuple(t.shape[0 if rank_first else 1] for t in matrices)
    return {"factors": matrices, "ranks": ranks, "RANK_FIRST": rank_first}


def _gradients(like: Sequence[Tensor], need: Sequence[bool], rows: Rows) -> list[Tensor]:
    def gradient(index: int, t: Tensor) -> Tensor:
        if not need[index]:
            return t.new_empty(0)
        return t.new_empty(t.shape) if index in rows.used else t.new_zeros(t.shape)

    return [gradient(index, t) for index, t in enumerate(like)]


def _main(name, x, weight, bias, base, t, factors, scaling, out, rows, config: Configuration, dropout) -> Launch:
    """``out = x W^T + bias``, or ``base``, or 0; plus ``scaling D(T F)`` in rows with an adapter."""
    n, wanted = out.shape[1], (-1, *rows.used)
    args = {"t_ptr": t, "y_ptr": out, "N": n, "width": t.shape[1], **factors, **dropout}
    args["scalings"] = tuple(scaling) if rows.used else ()
    # Loads of another rank are narrow, and many at a time would not fit into the registers.
    args["BLOCK_R"] = config.rank_step if all(rank % 16 == 0 for rank in factors["ranks"]) else 16
    if weight is not None and config.fused:
        blocks = config.main_dropout if dropout["DROPOUT"] else config.main
        tiles = tile_table(rows, wanted, blocks.rows, x.device)
        args |= {"x_ptr": x, "w_ptr": weight, "bias_ptr": bias, "tiles_ptr": tiles.entries, "tiles": tiles.count}
        args |= {"K": x.shape[1], "stride_x": x.stride(0), "stride_wn": weight.stride(0), "stride_wk": weight.stride(1)}
        args |= {"EVEN_K": x.shape[1] % blocks.inner == 0, "GROUP_M": 8}
        args |= {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns, "BLOCK_K": blocks.inner}
        grid = (tiles.count * cdiv(n, blocks.columns),)
        return Launch(f"main {name}", kernels._lora_linear_main_kernel, grid, args, blocks.options)
    if weight is not None:
        for part in rows.segments:  # off rows are bitwise those of a call with them alone
            _linear(x[part.rows], weight, bias, out[part.rows])
        base, wanted = out, rows.used
    blocks = config.expand
    base = None if base is None else unit_stride(base)
    tiles = tile_table(rows, wanted, blocks.rows, x.device)
    args |= {"base_ptr": base, "tiles_ptr": tiles.entries, "stride_base": 0 if base is None else base.stride(0)}
    args |= {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns}
    grid = (tiles.count, cdiv(n, blocks.columns))
    return Launch(f"expand {name}", kernels._lora_linear_expand_kernel, grid, args, blocks.options)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.mT, out=out)
    else:
        torch.addmm(bias, x, weight.mT, out=out)


def _shrink(name, x, factors, out, rows, wanted, config: Configuration, factor: float, dropout) -> Launch:
    """``out = factor D(x) F`` in the slots of the wanted adapters."""
    blocks, (_, k), width = config.shrink, x.shape, out.shape[1]
    tiles = tile_table(rows, wanted, blocks.rows, x.device)
    args = {"x_ptr": x, "t_ptr": out, "tiles_ptr": tiles.entries, "K": k, "width": width, "stride_x": x.stride(0)}
    args |= {**factors, **dropout, "factor": factor, "EVEN_K": k % blocks.inner == 0}
    args |= {"BLOCK_M": blocks.rows, "BLOCK_K": blocks.inner, "BLOCK_R": config.rank_block}
    grid = (tiles.count, cdiv(width, config.rank_block))
    return Launch(f"shrink {name}", kernels._lora_linear_shrink_kernel, grid, args, blocks.options)


def _gram(name, x, t, factors, partial, shrunk, tiles, config: Configuration, dropout, packed=False) -> Launch:
    """``partial = D(x)^T T`` of every tile, and ``shrunk = x F`` of every block of columns, unless it is None."""
    blocks, (_, c), width = config.gram, x.shape, t.shape[1]
    args = {"x_ptr": x, "t_ptr": t, "partial_ptr": partial, "shrunk_ptr": shrunk, "tiles_ptr": tiles.entries}
    args |= {"slots": 0 if shrunk is None else shrunk.shape[1], "C": c, "width": width, "stride_x": x.stride(0)}
    args |= {**factors, **dropout, "PACKED": packed}
    args |= {"BLOCK_M": blocks.inner, "BLOCK_C": blocks.columns, "BLOCK_R": config.rank_block}
    grid = (tiles.count, cdiv(c, blocks.columns), cdiv(width, config.rank_block))
    return Launch(f"gram {name}", kernels._lora_linear_gram_kernel, grid, args, blocks.options)


def _reduce(name, partial, span: tuple[int, int], out, factor: float) -> Launch:
    """``out = factor`` times the sum of a span of the partial sums."""
    first, count = span
    args = {"partial_ptr": partial, "out_ptr": out, "first": first, "count": count, "factor": factor}
    args |= {"size": out.numel(), "columns": out.shape[1], "stride": partial.shape[2], "step": partial.stride(0)}
    args |= {"BLOCK_S": 16, "BLOCK": 256}
    return Launch(
        f"reduce {name}", kernels._lora_linear_reduce_kernel, (cdiv(out.numel(), 256),), args, {"num_warps": 4}
    )
