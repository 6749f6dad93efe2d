"""Second derivatives of ops whose backward is a kernel.

An opaque backward gives silently wrong second derivatives. Under grad mode (``create_graph=True``; always inside
``torch.func``) the fast backward therefore runs inside a Function whose own derivative is the reference's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor


def stored_signature(function: Callable) -> Callable:
    """Decorates the ``forward`` of a Function that has ``setup_context``: its ``apply`` asks for the signature at every
    call, which costs tens of microseconds unless it is stored."""
    function.__signature__ = inspect.signature(function)
    return function


class _FastWithReferenceDerivative(torch.autograd.Function):
    @staticmethod
    @stored_signature
    def forward(fast: Callable, reference: Callable, *tensors: Tensor):
        return fast(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.reference, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        _, vjp = torch.func.vjp(ctx.reference, *ctx.saved_tensors)
        return None, None, *vjp(cotangents)


def differentiable(fast: Callable, reference: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``fast(*tensors)``; where grad mode is on its derivative is that of ``reference(*tensors)``.

    Both return a tuple of tensors of equal shapes. ``reference`` is plain differentiable torch.
    """
    if not torch.is_grad_enabled():
        return fast(*tensors)
    return _FastWithReferenceDerivative.apply(fast, reference, *tensors)
