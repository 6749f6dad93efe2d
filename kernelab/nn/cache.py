"""What an attention layer keeps of the tokens it has seen, for decoding token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelab._core.errors import bad_value

WHERE = "KeyValueCache"


class KeyValueCache:
    """Keys and values of the tokens so far, of one attention layer.

    The buffers grow by doubling, so that appending n tokens one by one copies O(n) of them. It serves decoding, not
    training: what requires a gradient is refused, since a later append would overwrite what backward reads. In
    ``memory`` a layer may leave what it needs to compute only once.

    >>> cache = KeyValueCache()
    >>> keys, values = cache.append(torch.ones(2, 4, 3, 16), torch.ones(2, 4, 3, 8))  # batch 2, 4 heads, 3 tokens
    >>> keys, values = cache.append(torch.ones(2, 4, 1, 16), torch.ones(2, 4, 1, 8))
    >>> cache.length, tuple(keys.shape)
    (4, (2, 4, 4, 16))
    """

    def __init__(self) -> None:
        self.length = 0
        self.memory: dict = {}
        self._buffers: list[Tensor] = []  # [B, H, capacity, features] each

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Adds tensors [B, H, N, features], the same ones at each call; returns each with all tokens so far.

        Raises:
            ValueError: a tensor does not continue what the cache holds, or requires a gradient.
        """
        if self._buffers and len(new) != len(self._buffers):
            raise bad_value(WHERE, "new", f"{len(self._buffers)} tensors, as before", f"{len(new)}")
        for tensor, buffer in zip(new, self._buffers or new, strict=True):
            self._check(tensor, buffer, new[0].shape[2])
        end = self.length + new[0].shape[2]
        if not self._buffers or end > self._buffers[0].shape[2]:
            self._grow(new, max(end, 2 * self.length, 16))
        for tensor, buffer in zip(new, self._buffers, strict=True):
            buffer[:, :, self.length : end] = tensor
        self.length = end
        return tuple(buffer[:, :, :end] for buffer in self._buffers)

    def _grow(self, new: tuple[Tensor, ...], capacity: int) -> None:
        buffers = [tensor.new_empty(*tensor.shape[:2], capacity, tensor.shape[3]) for tensor in new]
        for buffer, old in zip(buffers, self._buffers, strict=False):
            buffer[:, :, : self.length] = old[:, :, : self.length]
        self._buffers = buffers

    @staticmethod
    def _check(tensor: Tensor, buffer: Tensor, tokens: int) -> None:
        if torch.is_grad_enabled() and tensor.requires_grad:
            hint = "Decode under torch.no_grad(); to train, pass the whole sequence without a cache."
            raise bad_value(WHERE, "new", "tensors that require no gradient", tensor, hint)
        shape = [*buffer.shape[:2], tokens, buffer.shape[3]]
        if list(tensor.shape) != shape or tensor.dtype != buffer.dtype or tensor.device != buffer.device:
            dtype = str(buffer.dtype).removeprefix("torch.")
            raise bad_value(WHERE, "new", f"{dtype} {shape} on {buffer.device}, as before", tensor)
