"""Checks of tensor arguments that ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import bad_type, bad_value

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_input(where: str, name: str, x: object) -> None:
    """A floating tensor with at least one dimension."""
    if not isinstance(x, Tensor):
        raise bad_type(where, name, "a tensor", x)
    if x.dtype not in FLOATS:
        raise bad_type(where, name, "float32, bfloat16, float16 or float64", x, "Convert it with .to(weight.dtype).")
    if x.dim() == 0:
        raise bad_value(where, name, "at least one dimension", x)


def check_matrix(where: str, name: str, tensor: object, shape: tuple[int | None, ...], like: Tensor | None) -> None:
    """A floating tensor of ``shape`` (None: any size), on the device of ``like``."""
    if not isinstance(tensor, Tensor):
        raise bad_type(where, name, "a tensor", tensor)
    if tensor.dtype not in FLOATS:
        raise bad_type(where, name, "float32, bfloat16, float16 or float64", tensor)
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise bad_value(where, name, f"shape [{wanted}]", tensor)
    if like is not None and tensor.device != like.device:
        raise bad_value(where, name, f"a tensor on {like.device}, as the input", tensor, "Move it with .to(device).")


def check_dtype(where: str, name: str, tensor: Tensor, **others: Tensor | None) -> None:
    """The others have the dtype of ``tensor``, which is argument ``name``."""
    for other_name, other in others.items():
        if other is not None and other.dtype != tensor.dtype:
            expected = f"dtype {tensor.dtype}, as {name}"
            raise bad_value(where, other_name, expected, other, "Convert one of them with .to(dtype).")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where it is on, as ``F.linear`` would cast them; float64 is left alone."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
