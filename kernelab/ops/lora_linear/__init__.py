"""Linear layer with LoRA switched per group of rows, in one pass, with gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernelab._core import define, registry
from kernelab._core.arguments import autocast, check_dtype, check_input, check_matrix
from kernelab._core.autograd import differentiable, recorded, stored_signature
from kernelab._core.errors import bad_value

from . import reference
from .arguments import Routing, route

_ROUTING = "SymInt[] counts, int[] adapters, float[] scaling, bool[] keep, float dropout_p, int seed"


def _forward_fake(x, weight, bias, base, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed):
    out_features = base.shape[1] if weight is None else weight.shape[0]
    rank = max((a.shape[0] for a in lora_a), default=0)
    kept = sum(count for count, adapter in zip(counts, adapters, strict=True) if adapter >= 0 and keep[adapter])
    return x.new_empty(x.shape[0], out_features), x.new_empty(kept, rank)


def _backward_fake(dy, x, s, weight, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed, need):
    dx = dy.new_empty(dy.shape[0] if need[0] else 0, x.shape[1])
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else t.new_empty(0)
        for t, needed in zip([*lora_a, *lora_b], need[1:], strict=True)
    ]
    return dx, grads[: len(lora_a)], grads[len(lora_a) :]


_forward = define.define(
    "lora_linear",
    "forward",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor[] lora_a, Tensor[] lora_b, "
    f"{_ROUTING}, str backend) -> (Tensor, Tensor)",
    _forward_fake,
)
_backward = define.define(
    "lora_linear",
    "backward",
    "(Tensor dy, Tensor x, Tensor s, Tensor? weight, Tensor[] lora_a, Tensor[] lora_b, "
    f"{_ROUTING}, bool[] need, str backend) -> (Tensor, Tensor[], Tensor[])",
    _backward_fake,
)


registry.register_usual("lora_linear", __name__)


_FIELDS = len(Routing._fields)


class _LoRALinear(torch.autograd.Function):
    """``(y, S, kept x)``. Backward needs the last two and second derivatives pass through them, so they are outputs;
    in a first-order backward their cotangents are None."""

    @staticmethod
    @stored_signature
    def forward(*inputs):
        # Loose numbers, not a Routing: Dynamo does not trace an open row count through an object.
        x, weight, bias, base, pack_x, backend, *rest = inputs
        routing, adapters = Routing(*rest[:_FIELDS]), rest[_FIELDS:]
        count = len(adapters) // 2
        y, s = _forward(x, weight, bias, base, adapters[:count], adapters[count:], *routing, backend)
        return y, s, torch.cat([x[segment.rows] for segment in routing.kept_segments()]) if pack_x else None

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _, pack_x, ctx.backend, *rest = inputs
        ctx.routing, adapters = Routing(*rest[:_FIELDS]), rest[_FIELDS:]
        _, s, packed_x = output
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.in_features = x.shape
        need_weight, need_adapters = ctx.needs_input_grad[1], ctx.needs_input_grad[6 + _FIELDS :]
        need_a, need_b = need_adapters[: len(adapters) // 2], need_adapters[len(adapters) // 2 :]
        x = packed_x if pack_x else x if need_weight or any(need_a) else None
        ctx.save_for_backward(x, s if any(need_b) else None, weight, *adapters)

    @staticmethod
    def backward(ctx, dy, ds, dx_kept):
        x, s, weight, *adapters = ctx.saved_tensors
        need_x, need_weight, need_bias, need_base = ctx.needs_input_grad[:4]
        need_adapters = ctx.needs_input_grad[6 + _FIELDS :]
        count, routing = len(adapters) // 2, ctx.routing
        dx = dweight = dbias = None
        dadapters = [None] * len(adapters)
        if dy is not None:
            # Empty tensors stand for what was not kept.
            x_or_empty = dy.new_empty(0, ctx.in_features) if x is None else x
            s_or_empty = dy.new_empty(0, 1) if s is None else s
            tensors = [dy, x_or_empty, s_or_empty, *adapters, *([] if weight is None else [weight])]
            need = [need_x, *need_adapters]

            def call(backward, *tail):
                def flat(dy, x, s, *rest):
                    lora_a, lora_b, weight = rest[:count], rest[count : 2 * count], (*rest[2 * count :], None)[0]
                    dx, da, db = backward(dy, x, s, weight, lora_a, lora_b, *routing, need, *tail)
                    return dx, *da, *db

                return flat

            dx, *dadapters = differentiable(call(_backward, ctx.backend), call(reference.backward), *tensors)
            dx = dx if need_x and (weight is not None or adapters) else None
            dadapters = [grad if needed else None for grad, needed in zip(dadapters, need_adapters, strict=True)]
            dweight = dy.mT @ x if need_weight else None
            dbias = dy.sum(0) if need_bias else None
        if ds is not None or dx_kept is not None:
            dx_more, da, db = reference.backward_of_kept(ds, dx_kept, x, adapters[:count], routing, ctx.rows, need_x)
            dx = _sum(dx, dx_more)
            dadapters = [_sum(*pair) for pair in zip(dadapters, [*da, *db], strict=True)]
        return dx, dweight, dbias, dy if need_base else None, None, None, *[None] * _FIELDS, *dadapters


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def _call(x, weight, bias, base, routing: Routing, adapters: list[Tensor], backend: str) -> Tensor:
    inputs = (x, weight, bias, base, *adapters)
    if recorded(*inputs):
        train_weight = weight is not None and weight.requires_grad
        train_a = any(a.requires_grad for a in adapters[: len(adapters) // 2])
        pack_x = train_a and routing.keeps_some_rows() and not train_weight
        return _LoRALinear.apply(x, weight, bias, base, pack_x, backend, *routing, *adapters)[0]
    count = len(adapters) // 2
    return _forward(x, weight, bias, base, adapters[:count], adapters[count:], *routing, backend)[0]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float],
    segments: Sequence[tuple[int, int | None]] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Linear layer whose rows are adapted by one of several LoRA pairs, or by none.

    ``y = x W^T + bias``, plus, in the rows of a segment with adapter ``a``, ``scaling[a] * D(x) A_a^T B_a^T``.
    Rows of a segment without adapter are bitwise what the same backend gives on exactly those rows alone.

    Args:
        x: [*, in], float32, bfloat16, float16 or float64. Its leading dimensions, flattened, are the rows.
        weight: [out, in], dtype of ``x``. It gets a gradient if it requires one.
        bias: [out] or None.
        lora_a: stacked [n, r, in], or a sequence of [r_i, in]. Another floating dtype is cast to that of ``x``.
        lora_b: stacked [n, out, r], or a sequence of [out, r_i]. In a sequence, an adapter that no row uses gets no
            gradient at all (in a stacked tensor its slice gets zeros).
        scaling: a factor, or one an adapter (``alpha / r`` in the paper).
        segments: (count, adapter) pairs that sum to the rows, in their order; adapter None is off. None: adapter 0 on
            every row.
        dropout_p: probability that ``D`` zeroes an element of ``x``, on the adapter's path only; the others are scaled
            by ``1 / (1 - p)``. The mask is a function of (seed, row, column): it is recomputed, never stored.
        seed: 64-bit key of the mask.
        backend: "reference", "cpu" or "triton"; None chooses (``kernelab.explain`` says which and why).

    Returns:
        [*, out], dtype of ``x``; under autocast, the dtype of autocast.

    For backward it keeps ``x`` and ``D(x) A^T`` of the rows whose adapter trains, and nothing of any other row.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailable: the demanded backend cannot run here.

    Source: Hu et al., "LoRA" (arXiv 2106.09685); rows that switch it off, Santacroce et al. (arXiv 2309.00754).

    >>> x, weight = torch.randn(6, 8), torch.randn(4, 8)
    >>> a, b = torch.randn(2, 3, 8), torch.randn(2, 4, 3)          # two adapters of rank 3
    >>> y = lora_linear(x, weight, lora_a=a, lora_b=b, scaling=2.0, segments=[(2, None), (3, 0), (1, 1)])
    >>> torch.allclose(y[5], x[5] @ (weight + 2.0 * b[1] @ a[1]).T, atol=1e-4)
    True
    """
    where = "lora_linear"
    check_input(where, "x", x)
    check_matrix(where, "weight", weight, (None, x.shape[-1]), like=x)
    if bias is not None:
        check_matrix(where, "bias", bias, (weight.shape[0],), like=x)
    x, weight, bias = autocast(x, weight, bias)
    check_dtype(where, "x", x, weight=weight, bias=bias)
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    routing, adapters = route(where, rows, lora_a, lora_b, scaling, segments, dropout_p, seed, weight.shape[0])
    y = _call(rows, weight, bias, None, routing, adapters, backend or "")
    return y.reshape(*x.shape[:-1], weight.shape[0])


def lora_add(
    y: Tensor,
    x: Tensor,
    *,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float],
    segments: Sequence[tuple[int, int | None]] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The adapters of :func:`lora_linear` on top of any base output: a 4-bit layer, a Conv1D, a convolution.

    ``y + scaling[a] * D(x) A_a^T B_a^T`` in the rows of a segment with adapter ``a``; ``y`` unchanged in the others.

    Args:
        y: [*, out], the base layer's output for ``x``. It is not modified.
        x: [*, in] with the leading dimensions and the dtype of ``y``.
        lora_a, lora_b, scaling, segments, dropout_p, seed, backend: as in :func:`lora_linear`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        BackendUnavailable: the demanded backend cannot run here.

    >>> x, base = torch.randn(5, 8), torch.nn.Linear(8, 4)
    >>> a, b = torch.randn(1, 2, 8), torch.randn(1, 4, 2)
    >>> y = lora_add(base(x), x, lora_a=a, lora_b=b, scaling=0.5, segments=[(3, 0), (2, None)])
    >>> torch.equal(y[3:], base(x)[3:])
    True
    """
    where = "lora_add"
    check_input(where, "x", x)
    check_input(where, "y", y)
    if y.shape[:-1] != x.shape[:-1]:
        raise bad_value(where, "y", f"the leading dimensions {list(x.shape[:-1])} of x", y)
    if y.device != x.device:
        raise bad_value(where, "y", f"a tensor on {x.device}, as x", y, "Move it with .to(device).")
    x, y = autocast(x, y)
    check_dtype(where, "x", x, y=y)
    rows, base = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (x, y))
    routing, adapters = route(where, rows, lora_a, lora_b, scaling, segments, dropout_p, seed, y.shape[-1])
    return _call(rows, None, None, base, routing, adapters, backend or "").reshape(y.shape)
