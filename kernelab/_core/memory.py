"""Exact counts of live tensor memory, on real tensors and on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

from .define import BODIES


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside the block and still alive, each counted once whatever views it has.

    Attributes:
        current: bytes alive now.
        peak: the most that ``current`` has been.
        phases: the peak inside each ``phase``.

    Memory that exists before the block counts only after ``track``; an allocator's rounding never counts. Under
    ``FakeTensorMode`` nothing is allocated and the counts are the same: enter it first and make the model inside it.
    What a kernelab op makes and frees inside itself counts too, but for fake tensors off the CPU.
    ``UntypedStorage.resize_`` shows when the storage next passes through an operator.

    Example:
        >>> with LiveBytes() as live:
        ...     x = torch.zeros(1000)
        ...     with live.phase("double"):
        ...         y = (x + x).sum()
        >>> live.current, live.peak, live.phases
        (4004, 8004, {'double': 8004})
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.phases: dict[str, int] = {}
        self._open: list[str] = []
        self._bytes: dict[int, int | None] = {}  # by storage; None is memory from outside

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts the storages of ``tensors``, parameters or optimizer state for instance, from now on."""
        for tensor in tensors:
            for plain in _plain(tensor):
                storage = plain.untyped_storage()
                if self._bytes.get(storage._cdata) is None:
                    self._register(storage, 0)
                self._measure(storage)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Records the peak inside the block as ``phases[name]``, the highest where a name comes again."""
        self._open.append(name)
        self._record()
        try:
            yield
        finally:
            self._open.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # the operators on the tensors inside come here too
        # lift_fresh is how torch.tensor presents what it has just made
        if func is not torch.ops.aten.lift_fresh.default:
            for storage in storages((args, kwargs)):
                if storage._cdata not in self._bytes:
                    self._register(storage, None)
        result = self._run(func, args, kwargs or {})
        for storage in storages(result):
            if storage._cdata not in self._bytes:
                self._register(storage, 0)
            self._measure(storage)
        return result

    def _run(self, func, args, kwargs):
        body = BODIES.get(func)
        if body is None or any(
            isinstance(leaf, FakeTensor) and leaf.device.type != "cpu" for leaf in tree_leaves(args)
        ):
            return func(*args, **kwargs)
        with self:  # which is off while it dispatches
            return body(*args, **kwargs)

    def _register(self, storage: torch.UntypedStorage, size: int | None) -> None:
        if storage._cdata not in self._bytes:
            weakref.finalize(storage, self._forget, storage._cdata).atexit = False
        self._bytes[storage._cdata] = size

    def _measure(self, storage: torch.UntypedStorage) -> None:
        before, now = self._bytes[storage._cdata], storage.nbytes()
        if before is not None and before != now:
            self._bytes[storage._cdata] = now
            self._change(storage._cdata, now - before)

    def _record(self) -> None:
        self.peak = max(self.peak, self.current)
        for name in self._open:
            self.phases[name] = max(self.phases.get(name, 0), self.current)

    def _forget(self, key: int) -> None:
        self._change(key, -(self._bytes.pop(key) or 0))

    def _change(self, key: int, size: int) -> None:
        self.current += size
        self._record()


def saved_bytes(fn: Callable[[], object], *, exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of ``fn()``.

    Whole storages count, once each: a saved slice keeps all the memory it is cut from. Storages of ``nn.Parameter`` and
    of ``exclude`` do not count, nor what a custom Function hides from ``ctx.save_for_backward``.

    Example:
        >>> x = torch.zeros(1000, requires_grad=True)
        >>> saved_bytes(lambda: x.exp())
        4000
    """
    alive = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = fn()
    tensors = [saved.tensor for saved in alive]
    del result  # the graph, and with it every _Saved, lives as long as the result
    parameters = [t for t in tensors if isinstance(t, torch.nn.Parameter) or isinstance(t._base, torch.nn.Parameter)]
    ignored = {storage._cdata for storage in storages([*parameters, *exclude])}
    kept = {storage._cdata: storage.nbytes() for storage in storages(tensors)}
    return sum(size for key, size in kept.items() if key not in ignored)


class _Saved:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def storages(tree: object) -> Iterator[torch.UntypedStorage]:
    """The storages of the tensors in ``tree``."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            for plain in _plain(leaf):
                yield plain.untyped_storage()


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the memory of a wrapper subclass such as DTensor."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain(getattr(tensor, name))
