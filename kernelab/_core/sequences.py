"""What ops over sequences share: padding masks, and documents packed one after the other."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .errors import bad_type, bad_value


def check_padding_mask(where: str, mask: object, like: Tensor, batch: int, keys: int) -> None:
    """A boolean ``key_padding_mask`` [batch, keys] on the device of ``like``, or None."""
    shape = [batch, keys]
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise bad_type(where, "key_padding_mask", f"a boolean tensor {shape} or None", mask)
    if mask.dtype != torch.bool:
        hint = "True marks a key that is attended to; a mask of 0 and 1 becomes one with .bool()."
        raise bad_type(where, "key_padding_mask", "a boolean tensor", mask, hint)
    if list(mask.shape) != shape:
        raise bad_value(where, "key_padding_mask", f"shape {shape}", mask)
    _check_device(where, "key_padding_mask", mask, like)


def documents_of(where: str, cu_seqlens: object, like: Tensor, batch: int, tokens: int) -> Tensor | None:
    """First key of each token's document and the one after its last, int32 [2, tokens].

    The boundaries are checked on a CPU only, since to look at them on a GPU would cost a synchronisation.
    """
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise bad_type(where, "cu_seqlens", "an int32 or int64 tensor of document boundaries or None", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise bad_value(where, "cu_seqlens", "shape [documents + 1], 0 first", cu_seqlens)
    if batch != 1:
        hint = "Packed documents stand one after the other in a batch of one."
        raise bad_value(where, "cu_seqlens", "None unless the batch is 1", f"a batch of {batch}", hint)
    _check_device(where, "cu_seqlens", cu_seqlens, like)
    if cu_seqlens.device.type == "cpu" and not isinstance(cu_seqlens, FakeTensor) and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in itertools.pairwise(bounds)):
            raise bad_value(where, "cu_seqlens", f"boundaries that rise from 0 to {tokens}", bounds)
    bounds = cu_seqlens.contiguous()
    position = torch.arange(tokens, device=like.device, dtype=bounds.dtype)
    document = torch.searchsorted(bounds, position, right=True).clamp(1, bounds.shape[0] - 1)
    return torch.stack([bounds[document - 1], bounds[document]]).int()


def document_slices(documents: Tensor | None, tokens: int) -> list[slice]:
    """The documents, one after the other; without ``documents`` all tokens are one."""
    if documents is None:
        return [slice(0, tokens)]
    first = documents[0].tolist()
    starts = [i for i in range(tokens) if i == 0 or first[i] != first[i - 1]]
    return [slice(a, b) for a, b in itertools.pairwise([*starts, tokens])]


def _check_device(where: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise bad_value(where, name, f"a tensor on {like.device}, as the input", tensor, "Move it with .to(device).")
