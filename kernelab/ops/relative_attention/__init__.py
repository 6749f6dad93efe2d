"""Attention with learned tables of the distance between query and key, in linear memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernelab._core import define, registry
from kernelab._core.arguments import autocast, check_dtype
from kernelab._core.autograd import differentiable, recorded, stored_signature

from . import reference
from .arguments import (
    WHERE,
    check_heads,
    check_mask,
    check_rest,
    check_table,
    documents_of,
    no_gradient,
    same_reach,
    warn_of_queries_without_keys,
)


def _forward_fake(query, key, value, *_):
    wide = torch.promote_types(query.dtype, torch.float32)
    peak, mass = (query.new_empty(query.shape[:3], dtype=wide) for _ in range(2))
    return query.new_empty(*query.shape[:3], value.shape[3]), peak, mass


def _backward_fake(*arguments):
    inputs, need = arguments[:7], arguments[-1]
    return tuple(
        t.new_empty(t.shape) if wanted else no_gradient(inputs[0]) for t, wanted in zip(inputs, need, strict=True)
    )


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? query_table, Tensor? key_table, Tensor? value_table, "
    "Tensor? bias, Tensor? key_padding_mask, Tensor? documents, "
)
_REST = "bool causal, bool content, SymInt query_offset, float scale, "
_forward = define.define(
    WHERE, "forward", f"({_TENSORS}{_REST}str backend) -> (Tensor out, Tensor peak, Tensor mass)", _forward_fake
)
_backward = define.define(
    WHERE,
    "backward",
    f"({_TENSORS}Tensor out, Tensor peak, Tensor mass, Tensor grad_out, {_REST}bool[] need, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)

registry.register(WHERE, "reference", module=f"{__name__}.reference", priority=0, devices=(), supports=lambda *_: None)
registry.register(
    WHERE, "cpu", module=f"{__name__}.cpu_kernels", priority=10, devices=("cpu",), supports=registry.cpu_support
)
registry.register(
    WHERE,
    "triton",
    module=f"{__name__}.triton_launch",
    priority=20,
    devices=("cuda",),
    supports=lambda device, dtype: "no float64" if dtype == torch.float64 else registry.triton_support(device),
)


class _RelativeAttention(torch.autograd.Function):
    """``(out, peak, mass)``; the last two serve backward and have no derivative."""

    @staticmethod
    @stored_signature
    def forward(
        query, key, value, query_table, key_table, value_table, bias, mask, documents,
        causal, content, query_offset, scale, backend,
    ):  # fmt: skip
        tensors = query, key, value, query_table, key_table, value_table, bias, mask, documents
        return _forward(*tensors, causal, content, query_offset, scale, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, causal, content, query_offset, scale, ctx.backend = inputs
        ctx.rest = causal, content, query_offset, scale
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 14
        *tensors, out, peak, mass = ctx.saved_tensors
        content, need = ctx.rest[1], list(ctx.needs_input_grad[:7])
        need[0] &= content or tensors[3] is not None
        need[1] &= content or tensors[4] is not None
        present = [tensor is not None for tensor in tensors]

        def with_blanks(given):
            given = iter(given)
            return [next(given) if there else None for there in present]

        def fast(grad_out, out, peak, mass, *given):
            return _backward(*with_blanks(given), out, peak, mass, grad_out, *ctx.rest, need, ctx.backend)

        def definition(grad_out, out, peak, mass, *given):
            return reference.backward(*with_blanks(given), out, peak, mass, grad_out, *ctx.rest, need)

        given = (tensor for tensor in tensors if tensor is not None)
        grads = differentiable(fast, definition, grad_out, out, peak, mass, *given)
        return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *[None] * 7


def _apart(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Views of those that came before: torch.compile refuses one tensor in two places of a Function."""
    return [
        t.view_as(t) if t is not None and any(t is other for other in tensors[:index]) else t
        for index, t in enumerate(tensors)
    ]


def relative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_table: Tensor | None = None,
    key_table: Tensor | None = None,
    value_table: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    content: bool = True,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    query_offset: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention whose scores and values depend on the distance of key and query through learned tables.

    Query ``i`` stands at position ``i + query_offset``, key ``j`` at ``j``; with ``d`` the key's position less the
    query's and ``c = K + clip(d, -K, K)``::

        score_ij = scale * (q_i.k_j * content + q_i.query_table[c] + k_j.key_table[c]) + bias[c]
        out_i = sum_j softmax_j(score_ij) (v_j + value_table[c])

    Memory is linear in the sequence: no tensor of a score a pair, nor of a score a query and distance, is ever alive.
    Every table gets its gradient, without atomics: two runs give equal bits.

    Args:
        query: [B, Hq, Nq, D], float32, bfloat16, float16 or float64.
        key: [B, Hkv, Nk, D]; Hkv divides Hq, and query head h uses key head ``h // (Hq // Hkv)``.
        value: [B, Hkv, Nk, Dv].
        query_table, key_table: [Hq or 1, 2K+1, D] or None. Row c is for distance c - K; the rows at the ends stand for
            all distances beyond. A table with 1 head serves all. Tables may differ in K.
        value_table: [Hq or 1, 2K+1, Dv] or None.
        bias: [Hq or 1, 2K+1] or None, not multiplied by ``scale``; float32 is allowed beside lower precision.
        causal: a query sees no key with d > 0.
        content: False leaves the term q.k out.
        key_padding_mask: boolean [B, Nk], True where a key may be attended to.
        cu_seqlens: int32 or int64 [documents + 1], boundaries ``0, ..., N`` of documents that are packed in a batch of
            1 and do not see each other.
        query_offset: position of query 0; None: ``Nk - Nq``, so that queries end where the keys do, as with a KV
            cache. With cu_seqlens it is 0.
        scale: None: ``1 / sqrt(D)``.
        backend: "reference", "cpu" or "triton"; None chooses (``kernelab.explain`` says which and why).

    Returns:
        [B, Hq, Nq, Dv]. A query that sees no key gives 0, and gradient 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Boundaries in cu_seqlens are checked on a
            CPU only, since to look at them on a GPU would cost a synchronisation.
        BackendUnavailable: the demanded backend cannot run here.

    Source: Shaw, Uszkoreit and Vaswani (arXiv 1803.02155); Huang, Liang, Xu and Xiang (arXiv 2009.13658).

    >>> q, k, v = torch.randn(3, 2, 4, 10, 16).unbind()  # batch 2, 4 heads, 10 tokens, 16 features
    >>> table = torch.zeros(4, 2 * 8 + 1, 16)  # distances -8..8
    >>> out = relative_attention(q, k, v, query_table=table, key_table=table, causal=True)
    >>> plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(out, plain, atol=1e-5)
    True
    """
    check_heads(query, key, value)
    check_table("query_table", query_table, query, query.shape[3])
    check_table("key_table", key_table, query, query.shape[3])
    check_table("value_table", value_table, query, value.shape[3])
    check_table("bias", bias, query, None)
    check_mask(key_padding_mask, query, key)
    check_rest(causal, content, query_offset, scale)
    documents = documents_of(cu_seqlens, query, key, query_offset)
    if query_offset is None:
        query_offset = key.shape[2] - query.shape[2]
    warn_of_queries_without_keys(causal, query_offset)
    heads = autocast(query, key, value, query_table, key_table, value_table)
    query, key, value, query_table, key_table, value_table = _apart(heads)
    tables = {"query_table": query_table, "key_table": key_table, "value_table": value_table}
    check_dtype(WHERE, "query", query, key=key, value=value, **tables)
    if bias is not None and bias.dtype != torch.float32:
        check_dtype(WHERE, "query", query, bias=bias)
    tensors = query, key, value, *same_reach(query_table, key_table, value_table, bias), key_padding_mask, documents
    rest = causal, content, query_offset, query.shape[3] ** -0.5 if scale is None else float(scale), backend or ""
    return (_RelativeAttention.apply if recorded(*tensors) else _forward)(*tensors, *rest)[0]
