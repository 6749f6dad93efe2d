"""Attention with fixed, equal weights: the mean of the values over a window, whatever its width in the same time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernelab._core import define, registry
from kernelab._core.autograd import differentiable, stored_signature
from kernelab._core.sequences import check_padding_mask, documents_of

from . import reference
from .arguments import WHERE, check

_REST = "SymInt[] widths, bool causal, Tensor? key_padding_mask, Tensor? documents, str backend"
_forward = define.define(
    WHERE, "forward", f"(Tensor value, {_REST}) -> Tensor", lambda value, *_: value.new_empty(value.shape)
)
_backward = define.define(
    WHERE, "backward", f"(Tensor grad_out, {_REST}) -> Tensor", lambda grad, *_: grad.new_empty(grad.shape)
)

registry.register_usual(WHERE, __name__)


class _WindowMean(torch.autograd.Function):
    @staticmethod
    @stored_signature
    def forward(value, widths, causal, key_padding_mask, documents, backend):
        return _forward(value, widths, causal, key_padding_mask, documents, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.widths, ctx.causal, key_padding_mask, documents, ctx.backend = inputs
        ctx.save_for_backward(key_padding_mask, documents)

    @staticmethod
    def backward(ctx, grad_out):
        window = ctx.widths, ctx.causal, *ctx.saved_tensors

        def fast(grad_out):
            return (_backward(grad_out, *window, ctx.backend),)

        def definition(grad_out):
            return (reference.backward(grad_out, *window),)

        return *differentiable(fast, definition, grad_out), *[None] * 5


def window_mean(
    value: Tensor,
    widths: int | Sequence[int],
    *,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mean of the values over a window around every token, of another width in every head.

    ``out_i = mean of v_j`` over the tokens ``j`` with ``0 <= i - j < width`` if causal, ``|i - j| < width`` if not,
    that exist, are no padding and belong to the document of ``i``.

    The time is O(N) whatever the widths. No sum is a difference of sums: the error does not grow along the sequence,
    and a large, infinite or NaN value leaves no trace once it is out of the window.

    Args:
        value: [B, H, N, D], float32, bfloat16, float16 or float64. Sums are float32, float64 for float64.
        widths: an integer of at least 1, or one for each head.
        causal: a token sees no later one.
        key_padding_mask: boolean [B, N], True where a token counts.
        cu_seqlens: int32 or int64 [documents + 1], boundaries ``0, ..., N`` of documents that are packed in a batch of
            1 and do not see each other.
        backend: "reference", "cpu" or "triton"; None chooses (``kernelab.explain`` says which and why).

    Returns:
        [B, H, N, D]; a token that sees none gives 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Boundaries in cu_seqlens are checked on a
            CPU only, since to look at them on a GPU would cost a synchronisation.
        BackendUnavailable: the demanded backend cannot run here.

    Source: the uniform attention of Allen-Zhu and Li (arXiv 2305.13673); van Herk (1992), Gil and Werman (1993).

    >>> value = torch.arange(6.0).view(1, 1, 6, 1)
    >>> window_mean(value, 3)[0, 0, :, 0]
    tensor([0.0000, 0.5000, 1.0000, 2.0000, 3.0000, 4.0000])
    """
    widths = check(value, widths, causal)
    check_padding_mask(WHERE, key_padding_mask, value, value.shape[0], value.shape[2])
    documents = documents_of(WHERE, cu_seqlens, value, value.shape[0], value.shape[2])
    return _WindowMean.apply(value, widths, causal, key_padding_mask, documents, backend or "")
