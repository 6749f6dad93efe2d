"""Attention whose weights depend on the distance of key and query alone: products with Toeplitz matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelab._core import define, registry
from kernelab._core.autograd import differentiable, stored_signature
from kernelab._core.sequences import check_padding_mask, documents_of

from . import reference
from .arguments import WHERE, check, check_packed, no_gradient


def _forward_fake(value, bias, key_padding_mask, documents, causal, queries, query_offset):
    batch, heads, _, features = value.shape
    wide = torch.promote_types(value.dtype, torch.float32)
    groups = 1 if key_padding_mask is None else batch
    peak, mass = (value.new_empty(groups, heads, queries, dtype=wide) for _ in range(2))
    return value.new_empty(batch, heads, queries, features), peak, mass


def _backward_fake(value, bias, *arguments):
    need = arguments[-1]
    return tuple(
        t.new_empty(t.shape) if wanted else no_gradient(value) for t, wanted in zip((value, bias), need, strict=True)
    )


_TENSORS = "Tensor value, Tensor bias, Tensor? key_padding_mask, Tensor? documents, "
_forward = define.define(
    WHERE,
    "forward",
    f"({_TENSORS}bool causal, SymInt queries, SymInt query_offset, str backend) "
    "-> (Tensor out, Tensor peak, Tensor mass)",
    _forward_fake,
)
_backward = define.define(
    WHERE,
    "backward",
    f"({_TENSORS}Tensor peak, Tensor mass, Tensor grad_out, bool causal, SymInt query_offset, bool[] need, "
    "str backend) -> (Tensor dvalue, Tensor dbias)",
    _backward_fake,
)


def _cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "needs CUDA tensors"


registry.register(WHERE, "reference", module=f"{__name__}.reference", priority=0, devices=(), supports=lambda *_: None)
registry.register(
    WHERE, "cpu", module=f"{__name__}.cpu_kernels", priority=10, devices=("cpu",), supports=registry.cpu_support
)
registry.register(WHERE, "cuda", module=f"{__name__}.blocked", priority=10, devices=("cuda",), supports=_cuda)


class _ToeplitzAttention(torch.autograd.Function):
    """``(out, peak, mass)``; the last two serve backward and have no derivative."""

    @staticmethod
    @stored_signature
    def forward(value, bias, key_padding_mask, documents, causal, queries, query_offset, backend):
        return _forward(value, bias, key_padding_mask, documents, causal, queries, query_offset, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        value, bias, key_padding_mask, documents, causal, _, query_offset, ctx.backend = inputs
        ctx.rest = causal, query_offset
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(value, bias, key_padding_mask, documents, *statistics)

    @staticmethod
    def backward(ctx, grad_out, *_):
        if grad_out is None:
            return (None,) * 8
        value, bias, mask, documents, *statistics = ctx.saved_tensors
        rest = *ctx.rest, list(ctx.needs_input_grad[:2])

        def fast(grad_out, value, bias, *statistics):
            return _backward(value, bias, mask, documents, *statistics, grad_out, *rest, ctx.backend)

        def definition(grad_out, value, bias, *statistics):
            return reference.backward(value, bias, mask, documents, *statistics, grad_out, *rest)

        grads = differentiable(fast, definition, grad_out, value, bias, *statistics)
        return *(grad if wanted else None for grad, wanted in zip(grads, rest[2], strict=True)), *[None] * 6


def toeplitz_attention(
    value: Tensor,
    bias: Tensor,
    *,
    causal: bool = False,
    queries: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    query_offset: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention whose weights depend on the distance of key and query alone.

    Query ``i`` stands at position ``i + query_offset``, key ``j`` at ``j``; with ``d`` the key's position less the
    query's and ``c = K + clip(d, -K, K)``::

        out_i = sum_j softmax_j(bias[c]) v_j

    It is :func:`kernelab.ops.relative_attention` with a bias and no content, at the speed of a matrix product: the
    weights of a head serve the whole batch. No tensor of a weight a pair is ever alive. A bias of -inf has weight 0,
    and distances beyond the last that has another are skipped: any fixed profile of finite support is its logarithm.

    Args:
        value: [B, H, Nk, D], float32, bfloat16, float16 or float64.
        bias: [H or 1, 2K+1]; column c is for distance c - K, those at the ends for all distances beyond. float32 is
            allowed beside lower precision.
        causal: a query sees no key with d > 0.
        queries: their number Nq; None: as many as keys.
        key_padding_mask: boolean [B, Nk], True where a key may be attended to. The weights are then normalised for each
            batch element.
        cu_seqlens: int32 or int64 [documents + 1], boundaries ``0, ..., N`` of documents that are packed in a batch of
            1 and do not see each other.
        query_offset: position of query 0; None: ``Nk - Nq``, so that queries end where the keys do, as with a cache.
        backend: "reference", "cpu" or "cuda"; None chooses (``kernelab.explain`` says which and why).

    Returns:
        [B, H, Nq, D]. A query that sees no key gives 0, and gradient 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Boundaries in cu_seqlens are checked on a
            CPU only, since to look at them on a GPU would cost a synchronisation.
        BackendUnavailable: the demanded backend cannot run here.

    Source: the attention of positions alone of Allen-Zhu and Li (arXiv 2305.13673).

    >>> value, bias = torch.randn(2, 4, 10, 16), torch.zeros(4, 2 * 8 + 1)
    >>> out = toeplitz_attention(value, bias, causal=True)  # equal weights: the mean of the values so far
    >>> torch.allclose(out, value.cumsum(2) / torch.arange(1, 11)[:, None], atol=1e-6)
    True
    """
    queries, query_offset = check(value, bias, causal, queries, query_offset)
    batch, heads, keys, _ = value.shape
    check_padding_mask(WHERE, key_padding_mask, value, batch, keys)
    documents = documents_of(WHERE, cu_seqlens, value, batch, keys)
    check_packed(documents, queries, keys, query_offset)
    rest = key_padding_mask, documents, causal, queries, query_offset, backend or ""
    if bias.shape[0] == heads:
        return _ToeplitzAttention.apply(value, bias, *rest)[0]
    # The heads have the same weights: their features are those of one head.
    out = _ToeplitzAttention.apply(value.transpose(1, 2).flatten(2)[:, None], bias, *rest)[0]
    return out[:, 0].unflatten(2, (heads, -1)).transpose(1, 2)
