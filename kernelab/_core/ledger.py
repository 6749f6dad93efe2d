"""What live memory is for, at the moment when there is most of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, count

import torch
from torch.utils._pytree import tree_leaves

from .memory import LiveBytes, storages


class Ledger(LiveBytes):
    """:class:`LiveBytes` that also tells what the bytes at the peak of a phase were for.

    A label may come after the peak, as long as the storage is alive: what a gradient is becomes known when autograd
    has put it there. The last label holds.

    Args:
        guess: the label of a tensor that an operator returns, or None. It does not replace another label.

    Example:
        >>> with Ledger() as live:
        ...     weight = torch.zeros(10)
        ...     with live.phase("forward"):
        ...         y = (weight + 1).exp()
        ...     live.label("weights", [weight])
        >>> live.at_peak("forward") == {"weights": 40, "": 80}
        True
    """

    def __init__(self, guess: Callable[[torch.Tensor], str | None] = lambda tensor: None) -> None:
        super().__init__()
        self._guess = guess
        self._count = count()
        self._numbers: dict[int, int] = {}  # of the storages alive; unlike a key, a number does not come again
        self._labels: dict[int, str] = {}
        self._log: list[tuple[int, int]] = []  # storage, bytes more or less
        self._spans: dict[str, list[tuple[int, int]]] = {}  # of the log, by phase

    def label(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Counts the storages of ``tensors`` and says what they are for."""
        tensors = list(tensors)
        self.track(tensors)
        for storage in storages(tensors):
            self._labels[self._numbers[storage._cdata]] = name

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        first = len(self._log)
        try:
            with super().phase(name):
                yield
        finally:
            self._spans.setdefault(name, []).append((first, len(self._log)))

    def at_peak(self, phase: str) -> dict[str, int]:
        """Bytes by label, ``""`` for what has none, when the phase held most; they sum to ``phases[phase]``."""
        totals = [0, *accumulate(size for _, size in self._log)]
        moments = [moment for first, last in self._spans[phase] for moment in range(first, last + 1)]
        found: Counter[str] = Counter()
        for number, size in self._log[: max(moments, key=totals.__getitem__)]:
            found[self._labels.get(number, "")] += size
        return {name: size for name, size in found.items() if size}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (name := self._guess(leaf)):
                for storage in storages(leaf):
                    self._labels.setdefault(self._numbers[storage._cdata], name)
        return result

    def _register(self, storage: torch.UntypedStorage, size: int | None) -> None:
        super()._register(storage, size)
        self._numbers.setdefault(storage._cdata, next(self._count))

    def _change(self, key: int, size: int) -> None:
        super()._change(key, size)
        self._log.append((self._numbers[key], size))

    def _forget(self, key: int) -> None:
        super()._forget(key)
        del self._numbers[key]
