"""Selective activation recomputation: what is cheap to compute is computed again in backward, where it would be saved.

A torch-function mode notes which cheap call made a tensor. Where autograd saves that tensor, and keeps what the call
read anyway, saved-tensor hooks keep the call instead. Any other tensor is saved as ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from operator import methodcaller
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .roles import Saved, hooks_allowed

# One pass over memory each, and the same result every time.
_CHEAP = {F.gelu, F.layer_norm, F.rms_norm, F.silu, Tensor.float, Tensor.mul, Tensor.to, torch.mul}
_MOST_CALLS = 8  # for one tensor: a long chain of cheap calls is not cheap


@contextlib.contextmanager
def recompute_activations() -> Iterator[None]:
    """Inside the block, a forward saves less for backward: selective activation recomputation.

    Inputs of LoRA layers that a norm, an activation or a product has made are computed again in backward, from tensors
    that autograd saves anyway; so are factors of such products, and float32 copies of half-precision tensors. Backward
    may run anywhere; with as many threads as the forward it gives bitwise the same gradients. A tensor that was written
    to in place raises as ever, but writes through ``Tensor.data`` are not seen.

    Where other saved-tensor hooks are on already (inside a checkpointed function, ``save_on_cpu``), they stay in effect
    and the block changes nothing; what is checkpointed inside the block stays so.

    Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198).

    >>> with role(model, "actor"), recompute_activations():
    ...     loss = model(x).square().mean()
    >>> loss.backward()
    """
    with contextlib.ExitStack() as stack:
        if hooks_allowed():
            recomputation = stack.enter_context(_Recomputation())
            stack.enter_context(saved_tensors_hooks(recomputation.pack, lambda packed: packed.get()))
        yield


class _Read(NamedTuple):
    """A tensor that a call read, and its version then."""

    tensor: Tensor
    version: int


class _Call(NamedTuple):
    """A cheap call; its tensors are each a ``_Read``."""

    function: Callable
    arguments: tuple
    calls: int  # at most so many, with this one, make its result from what is kept
    context: Callable[[], AbstractContextManager] = contextlib.nullcontext


class _Recipe:
    """A cheap call that backward makes again, its tensors packed. All who need its result share it."""

    def __init__(self, call: _Call, arguments: list) -> None:
        self._function, _, self.calls, self._context = call
        self._arguments = arguments
        self.users = self._waiting = 0
        self._result: Saved | None = None

    def get(self) -> Tensor:
        saved = self._result
        if saved is None:
            arguments = [a.get() if isinstance(a, Saved | _Recipe) else a for a in self._arguments]
            with torch.no_grad(), self._context():
                saved = Saved.of(self._function(*arguments))
            self._waiting = self.users
        self._waiting -= 1
        self._result = saved if self._waiting > 0 else None
        return saved.get()


class _Recomputation(TorchFunctionMode):
    """Knows, for a tensor at a version, which call made it and how it is packed."""

    def __init__(self) -> None:
        super().__init__()
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._made.clear()  # it holds what the calls have read

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _CHEAP and result.requires_grad and not torch.compiler.is_compiling():
            self._note(result, func, args, kwargs)
        return result

    def _note(self, result: Tensor, function: Callable, args: tuple, kwargs: dict) -> None:
        arguments = tuple(_Read(a, a._version) if isinstance(a, Tensor) else a for a in (*args, *kwargs.values()))
        read = [argument.tensor for argument in arguments if isinstance(argument, _Read)]
        # `Tensor.to` may return what it was given, or fetch it from another device.
        known = all(tensor is not result and tensor.device == result.device for tensor in read)
        calls = 1 + sum(map(self._calls, read))
        if known and calls <= _MOST_CALLS and result.layout == torch.strided:
            repeat = partial(_call, function, tuple(kwargs))
            self._made[result] = result._version, _Call(repeat, arguments, calls, _autocast(result.device.type))

    def _calls(self, tensor: Tensor) -> int:
        _, known = self._packed.get(tensor) or self._made.get(tensor) or (None, None)
        if known is None and tensor._base is not None:
            return 1 + self._calls(tensor._base)
        return getattr(known, "calls", 0)

    def pack(self, tensor: Tensor) -> Saved | _Recipe:
        return _shared(self._find(tensor) or self._keep(tensor, Saved.of(tensor)))

    def _keep(self, tensor: Tensor, packed: Saved | _Recipe) -> Saved | _Recipe:
        # An entry must not keep its own key alive, which a leaf that stands for itself would.
        own = isinstance(packed, Saved) and packed.tensor is tensor
        self._packed[tensor] = tensor._version, None if own else packed
        return packed

    def _find(self, tensor: Tensor) -> Saved | _Recipe | None:
        """How ``tensor`` is packed already, or can be made from what is."""
        version, packed = self._packed.get(tensor, (None, None))
        if version == tensor._version:
            return packed or Saved.of(tensor)
        call = self._origin(tensor)
        if call is None:
            return None
        arguments = [self._source(argument, tensor.nbytes // 2) for argument in call.arguments]
        if any(isinstance(argument, _Read) for argument in arguments):
            return None
        return self._keep(tensor, _Recipe(call, [_shared(argument) for argument in arguments]))

    def _origin(self, tensor: Tensor) -> _Call | None:
        version, call = self._made.pop(tensor, (None, None))
        if version == tensor._version:
            return call
        base = tensor._base
        if base is not None and _is_reshaped(base, tensor):
            return _Call(methodcaller("view", tensor.shape), (_Read(base, base._version),), 1 + self._calls(base))
        return None

    def _source(self, argument: object, limit: int) -> object:
        """A tensor that a call read, packed, if it is kept anyway or has at most ``limit`` bytes; else the argument."""
        if not isinstance(argument, _Read):
            return argument
        tensor, version = argument
        if tensor._version != version or tensor.untyped_storage().nbytes() == 0:  # written to, or freed by FSDP
            return argument
        packed = self._find(tensor)
        if packed is None and tensor.nbytes <= limit:
            # Nothing else keeps it, so the program may write to it.
            packed = self._keep(tensor, Saved.of(tensor.detach().clone()))
        return packed or argument


def _is_reshaped(base: Tensor, view: Tensor) -> bool:
    """``view`` is all of ``base`` in its order, bit for bit."""
    if base.layout != torch.strided or not view.is_floating_point() or view.is_neg():
        return False
    same = (base.dtype, base.numel(), base.storage_offset()) == (view.dtype, view.numel(), view.storage_offset())
    return same and base.is_contiguous() and view.is_contiguous()


def _shared(packed):
    if isinstance(packed, _Recipe):
        packed.users += 1
    return packed


def _call(function: Callable, names: tuple[str, ...], *arguments) -> Tensor:
    """The last arguments have these names."""
    count = len(arguments) - len(names)
    return function(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))


def _autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """Makes the autocast of now."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return partial(torch.autocast, device_type, dtype, enabled)
