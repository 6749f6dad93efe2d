"""Second derivatives of ops whose backward is a kernel.

An opaque backward gives silently wrong second derivatives. Under grad mode (``create_graph=True``; always inside
``torch.func``) the fast backward therefore runs inside a Function whose own derivative is the reference's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

_hooks = torch._C._autograd


def stored_signature(function: Callable) -> Callable:
    """Decorates the ``forward`` of a Function that has ``setup_context``: its ``apply`` asks for the signature at every
    call, which costs tens of microseconds unless it is stored."""
    function.__signature__ = inspect.signature(function)
    return function


def recorded(*tensors: Tensor | None) -> bool:
    """Whether an op on these is to go through its Function: a raw op would silently end what autograd follows.

    Forward-mode differentiation too, which a Function refuses by name.
    """
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return needed or forward_ad._current_level >= 0


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
        saved = ctx.saved_tensors
        floats = [index for index, tensor in enumerate(saved) if tensor.is_floating_point()]

        def reference(*values):
            replaced = dict(zip(floats, values, strict=True))
            return ctx.reference(*(replaced.get(index, tensor) for index, tensor in enumerate(saved)))

        with _no_saved_tensor_hooks():
            _, vjp = torch.func.vjp(reference, *(saved[index] for index in floats))
            grads = dict(zip(floats, vjp(cotangents), strict=True))
        return None, None, *(grads.get(index) for index in range(len(saved)))


@contextlib.contextmanager
def _no_saved_tensor_hooks() -> Iterator[None]:
    """``torch.func`` refuses to run under the hooks that the caller of backward may have open."""
    pairs = []
    while (pair := _hooks._top_saved_tensors_default_hooks(False)) is not None:
        pairs.append(pair)
        _hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(pairs):
            _hooks._push_saved_tensors_default_hooks(*pair)


def differentiable(fast: Callable, reference: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``fast(*tensors)``; where grad mode is on its derivative is that of ``reference(*tensors)``.

    Both return a tuple of tensors of equal shapes. ``reference`` is plain differentiable torch;
    tensors of integers are constants to it.
    """
    if not torch.is_grad_enabled():
        return fast(*tensors)
    return _FastWithReferenceDerivative.apply(fast, reference, *tensors)
