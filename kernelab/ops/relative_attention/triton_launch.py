"""The Triton backend of ``relative_attention``: plans the launches of a call and runs them one by one.

A plan allocates the results and gives the launches that fill them. Ahead-of-time checks plan on ``meta`` tensors and so
see the very launches of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from triton import cdiv

from kernelab._core.launch import capability, power_of_two, run, unit_stride
from kernelab._core.spec import Launch

from . import triton_backward, triton_forward, triton_tables
from .arguments import no_gradient
from .triton_tuning import PROGRAMS, Configuration, configuration

LOG2_E = 1.4426950408889634
END_ROWS = 64  # of a step of the sums for the ends of a table
INPUTS = ("query", "key", "value", "query_table", "key_table", "value_table", "bias")


def forward(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    causal, content, query_offset, scale,
):  # fmt: skip
    tensors = query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents
    launches, results = plan_forward(*tensors, causal, content, query_offset, scale, capability(query.device))
    run(launches, query)
    return results


def backward(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    out, peak, mass, grad_out, causal, content, query_offset, scale, need,
):  # fmt: skip
    tensors = query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents
    rest = out, peak, mass, grad_out, causal, content, query_offset, scale, need
    launches, results = plan_backward(*tensors, *rest, capability(query.device))
    run(launches, query)
    return results


def plan_forward(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    causal, content, query_offset, scale, capability: int,
):  # fmt: skip
    """``(launches, (out, peak, mass))``."""
    out = query.new_empty(*query.shape[:3], value.shape[3])
    peak, mass = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    tensors = query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents
    problem = Problem(*tensors, causal, content, query_offset, scale, capability)
    return problem.forward(out, peak, mass), (out, peak, mass)


def plan_backward(
    query, key, value, query_table, key_table, value_table, bias, key_padding_mask, documents,
    out, peak, mass, grad_out, causal, content, query_offset, scale, need, capability: int,
):  # fmt: skip
    """``(launches, gradients)``, seven of them, empty where not needed."""
    inputs = query, key, value, query_table, key_table, value_table, bias
    results = tuple(
        t.new_empty(t.shape) if wanted else no_gradient(query) for t, wanted in zip(inputs, need, strict=True)
    )
    problem = Problem(*inputs, key_padding_mask, documents, causal, content, query_offset, scale, capability)
    return problem.backward(out, peak, mass, grad_out, results, need), results


@dataclass(frozen=True)
class Problem:
    """The inputs of a call."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_table: Tensor | None
    key_table: Tensor | None
    value_table: Tensor | None
    bias: Tensor | None
    key_padding_mask: Tensor | None
    documents: Tensor | None
    causal: bool
    content: bool
    query_offset: int
    scale: float
    capability: int

    def forward(self, out: Tensor, peak: Tensor, mass: Tensor) -> Iterator[Launch]:
        batch, heads, queries, _ = self.query.shape
        columns = self._new_columns()
        if columns is not None:
            yield self._columns(columns)
        tiles = self.config.forward
        args = {**self._inputs, **self._sizes, **self._flags, **self._constants, **tiles.sizes}
        args |= {"columns_ptr": columns, "out_ptr": out, "peak_ptr": peak, "mass_ptr": mass}
        grid = (cdiv(queries, tiles.still) * batch * heads,)
        yield Launch("forward", triton_forward._relative_attention_forward_kernel, grid, args, tiles.options)

    def backward(self, out, peak, mass, grad_out, results: tuple[Tensor, ...], need) -> Iterator[Launch]:
        """Fills the gradients ``results`` of the inputs that ``need`` names."""
        (batch, heads, queries, _), keys = self.query.shape, self.key.shape[2]
        wanted = dict(zip(INPUTS, need, strict=True))
        grads = {name: grad for name, grad, needed in zip(INPUTS, results, need, strict=True) if needed}
        rows = self._wide(7, batch, heads, queries)
        grad_out, out = unit_stride(grad_out), unit_stride(out)
        cotangent = {"grad_out_ptr": grad_out, **_strides("g", grad_out)}
        yield self._rows(rows, out, peak, mass, cotangent)
        columns = self._new_columns()
        if columns is not None:
            yield self._columns(columns)
        ds_of_queries = self._wide(2, batch, heads, queries) if wanted["query_table"] or wanted["bias"] else None
        p_of_queries = self._wide(2, batch, heads, queries) if wanted["value_table"] else None
        ds_of_keys = self._wide(2, batch, heads, keys) if wanted["key_table"] else None
        args = {**self._inputs, **self._sizes, **self._flags, **self._constants, **cotangent}
        args |= {"columns_ptr": columns, "rows_ptr": rows}
        if wanted["query"] or ds_of_queries is not None or p_of_queries is not None:
            tiles, sums = self.config.dq, {"ds_sums_ptr": ds_of_queries, "p_sums_ptr": p_of_queries}
            grid = (cdiv(queries, tiles.still) * batch * heads,)
            changed = args | tiles.sizes | sums | {"dq_ptr": grads.get("query")}
            yield Launch("dq", triton_backward._relative_attention_dq_kernel, grid, changed, tiles.options)
        if wanted["key"] or wanted["value"] or ds_of_keys is not None:
            tiles, sums = self.config.dkv, {"ds_sums_ptr": ds_of_keys}
            grid = (cdiv(keys, tiles.still) * batch * self.key.shape[1],)
            changed = args | tiles.sizes | sums | {"dk_ptr": grads.get("key"), "dv_ptr": grads.get("value")}
            yield Launch("dkv", triton_backward._relative_attention_dkv_kernel, grid, changed, tiles.options)
        ends = {
            "query_table": (self._inputs["query_ptr"], ds_of_queries, self.scale),
            "key_table": (self._inputs["key_ptr"], ds_of_keys, self.scale),
            "value_table": (grad_out, p_of_queries, 1.0),
            "bias": (None, ds_of_queries, 1.0),
        }
        for heads_of_table in {grads[name].shape[0] for name in ends if name in grads}:
            tables = {name: grads[name] for name in ends if name in grads and grads[name].shape[0] == heads_of_table}
            yield from self._table_gradients(tables, ends, rows, cotangent)

    def _table_gradients(self, grads: dict[str, Tensor], ends: dict, rows: Tensor, cotangent: dict) -> Iterator[Launch]:
        """Fills gradients of tables that have equally many heads."""
        batch, heads, queries, _ = self.query.shape
        tables = next(iter(grads.values())).shape[0]
        totals = {name: torch.zeros_like(grad, dtype=torch.float32) for name, grad in grads.items()}
        # rows of the distances that occur, but for the rows at the ends
        lowest, highest = -(queries - 1) - self._sizes["offset"], self.key.shape[2] - 1 - self._sizes["offset"]
        first = max(1, self.reach + lowest)
        end = min(2 * self.reach, self.reach + (min(highest, 0) if self.causal else highest) + 1)
        if first < end:
            tiles = self.config.tables
            blocks = cdiv(end - first, tiles.still) * tables
            parts = max(1, min(PROGRAMS // blocks, cdiv(queries, tiles.moving) * batch * (heads // tables)))
            inner = {name: self._wide(parts, tables, end - first, *grad.shape[2:]) for name, grad in grads.items()}
            args = {**self._inputs, **self._sizes, **self._constants, **cotangent, **tiles.sizes}
            args |= {f"{name.removesuffix('_table')}_part_ptr": inner.get(name) for name in ends}
            args |= {"rows_ptr": rows, "CONTENT": self.content, "batch": batch, "shared": heads // tables}
            args |= {"first_row": first, "end_row": end}
            yield Launch(
                "tables", triton_tables._relative_attention_tables_kernel, (blocks * parts,), args, tiles.options
            )
            for name, total in totals.items():
                total[:, first:end] = inner[name].sum(0)
        for name, total in totals.items():
            x, sums, scale = ends[name]
            if x is None:
                of_heads = sums.sum((1, 3)).mT  # [heads, 2]
            else:
                blocks = cdiv(sums.shape[3], END_ROWS) * batch
                part = self._wide(min(cdiv(PROGRAMS, heads), blocks), heads, 2, x.shape[3])
                yield self._end_rows(x, sums, part, scale, f"end rows {name}")
                of_heads = part.sum(0)
            of_tables = of_heads.sum(0, keepdim=True) if tables == 1 else of_heads
            total[:, 0] += of_tables[:, 0]
            total[:, -1] += of_tables[:, 1]
            grads[name].copy_(total)

    def _rows(self, rows: Tensor, out: Tensor, peak: Tensor, mass: Tensor, cotangent: dict) -> Launch:
        batch, heads, queries, _ = self.query.shape
        block = 4096 // max(self._constants["BLOCK_D"], self._constants["BLOCK_V"])
        names = ("query", "query_table", "value_table", "bias")
        args = {f"{name}_ptr": self._inputs[f"{name}_ptr"] for name in names} | cotangent
        args |= {"out_ptr": out, "rows_ptr": rows, **_strides("o", out)}
        args |= {"peak_ptr": peak.contiguous(), "mass_ptr": mass.contiguous()}
        names = ("stride_qb", "stride_qh", "stride_qn", "stride_ah", "stride_ac", "stride_wh", "stride_wc", "stride_bh")
        args |= {name: self._inputs[name] for name in names} | self._constants | {"BLOCK": block}
        names = ("queries", "heads", "features", "value_features", "reach", "scale")
        args |= {name: self._sizes[name] for name in names}
        grid = (cdiv(queries, block) * batch * heads,)
        kernel = triton_backward._relative_attention_rows_kernel
        return Launch("rows", kernel, grid, args, {"num_warps": 4, "num_stages": 1})

    def _new_columns(self) -> Tensor | None:
        if self.key_table is None:
            return None
        return self._wide(2, self.query.shape[0], self.query.shape[1], self.key.shape[2])

    def _columns(self, columns: Tensor) -> Launch:
        """What the far queries of a key have in common in their logits."""
        key, table, block = self._inputs["key_ptr"], self._inputs["key_table_ptr"], 4096 // self._constants["BLOCK_D"]
        args = {"x_ptr": key, "table_ptr": table, "out_ptr": columns, "rows": key.shape[2], **_strides("x", key)}
        args |= {"stride_th": self._inputs["stride_rh"], "stride_tc": self._inputs["stride_rc"]}
        args |= {name: self._sizes[name] for name in ("heads", "group", "features", "reach", "scale")}
        args |= {"BLOCK": block, "BLOCK_D": self._constants["BLOCK_D"]}
        grid = (cdiv(key.shape[2], block) * columns.shape[1] * columns.shape[2],)
        kernel = triton_forward._relative_attention_columns_kernel
        return Launch("columns", kernel, grid, args, {"num_warps": 4, "num_stages": 1})

    def _end_rows(self, x: Tensor, sums: Tensor, part: Tensor, scale: float, name: str) -> Launch:
        _, batch, heads, rows = sums.shape
        args = {"x_ptr": x, "sums_ptr": sums, "part_ptr": part, "rows": rows, "batch": batch, **_strides("x", x)}
        args |= {"heads": heads, "group": heads // x.shape[1], "features": x.shape[3], "scale": scale}
        args |= {"BLOCK": END_ROWS, "BLOCK_D": power_of_two(x.shape[3])}
        kernel = triton_tables._relative_attention_end_rows_kernel
        return Launch(name, kernel, (len(part) * heads,), args, {"num_warps": 4, "num_stages": 1})

    def _wide(self, *shape: int) -> Tensor:
        return self.query.new_empty(shape, dtype=torch.float32)

    @cached_property
    def config(self) -> Configuration:
        features = max(self.query.shape[3], self.value.shape[3])
        tables = self.key_table is not None, self.value_table is not None
        return configuration(self.query.shape[2], features, self.query.dtype, *tables, self.capability)

    @cached_property
    def reach(self) -> int:
        tables = self.query_table, self.key_table, self.value_table, self.bias
        return next((table.shape[1] // 2 for table in tables if table is not None), 0)

    @cached_property
    def _inputs(self) -> dict:
        """Pointers and strides."""
        args = {}
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            args[f"{name}_ptr"] = x = unit_stride(getattr(self, name))
            args |= _strides(letter, x)
        for name, letter in (("query_table", "a"), ("key_table", "r"), ("value_table", "w"), ("bias", "b")):
            table = getattr(self, name)
            args[f"{name}_ptr"] = table = None if table is None else unit_stride(table)
            args |= dict(zip((f"stride_{letter}h", f"stride_{letter}c"), _table_strides(table), strict=True))
        del args["stride_bc"]
        mask = self.key_padding_mask
        args["mask_ptr"] = None if mask is None else mask.view(torch.uint8)
        args["stride_mb"], args["stride_mn"] = (0, 0) if mask is None else mask.stride()
        args["documents_ptr"] = self.documents
        return args

    @cached_property
    def _sizes(self) -> dict:
        (_, heads, queries, features), keys = self.query.shape, self.key.shape[2]
        # further away than all of the tables, queries are as far from the keys as they can be
        offset = min(max(self.query_offset, -queries - self.reach - 1), keys + self.reach + 1)
        return {
            "queries": queries,
            "keys": keys,
            "offset": offset,
            "heads": heads,
            "group": heads // self.key.shape[1],
            "features": features,
            "value_features": self.value.shape[3],
            "reach": self.reach,
            "scale": self.scale * self._constants["UNIT"],
        }

    @cached_property
    def _flags(self) -> dict:
        return {"CAUSAL": self.causal, "CONTENT": self.content}

    @cached_property
    def _constants(self) -> dict:
        unit = 1.0 if self.query.dtype == torch.float32 else LOG2_E
        widths = {"BLOCK_D": power_of_two(self.query.shape[3]), "BLOCK_V": power_of_two(self.value.shape[3])}
        return {"UNIT": unit, **widths}


def _strides(letter: str, x: Tensor) -> dict[str, int]:
    """Strides of batch, heads and rows."""
    return {f"stride_{letter}{dim}": stride for dim, stride in zip("bhn", x.stride()[:3], strict=True)}


def _table_strides(table: Tensor | None) -> tuple[int, int]:
    """Strides of heads, 0 where all have the same table, and of rows."""
    if table is None:
        return 0, 0
    return 0 if table.shape[0] == 1 else table.stride(0), table.stride(1)
