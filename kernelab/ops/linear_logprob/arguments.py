"""Checks the arguments of ``linear_logprob``."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from kernelab._core.arguments import check_input, check_matrix
from kernelab._core.errors import bad_type, bad_value

WHERE = "linear_logprob"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check(hidden: object, weight: object, target: object, bias: object, temperature: object, entropy: object) -> None:
    """All but the values of ``target`` and what autocast may still change, the dtypes."""
    check_input(WHERE, "hidden", hidden)
    if hidden.shape[-1] == 0:
        raise bad_value(WHERE, "hidden", "at least one feature", hidden)
    check_matrix(WHERE, "weight", weight, (None, hidden.shape[-1]), like=hidden)
    if weight.shape[0] == 0:
        raise bad_value(WHERE, "weight", "at least one row", weight)
    if bias is not None:
        check_matrix(WHERE, "bias", bias, (weight.shape[0],), like=hidden)
    if not isinstance(target, Tensor):
        raise bad_type(WHERE, "target", "a tensor of class indices", target)
    if target.dtype not in _INTEGERS:
        raise bad_type(WHERE, "target", "an integer tensor of class indices", target)
    if target.shape != hidden.shape[:-1]:
        raise bad_value(WHERE, "target", f"the leading dimensions {list(hidden.shape[:-1])} of hidden", target)
    if target.device != hidden.device:
        raise bad_value(WHERE, "target", f"a tensor on {hidden.device}, as hidden", target, "Move it with .to(device).")
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise bad_type(WHERE, "temperature", "a number", temperature)
    if not 0 < temperature < math.inf:
        raise bad_value(WHERE, "temperature", "a positive finite number", temperature)
    if not isinstance(entropy, bool):
        raise bad_type(WHERE, "entropy", "True or False", entropy)


def check_range(target: Tensor, classes: int) -> None:
    """The targets are classes. On a GPU that would cost a synchronisation: there the row gives NaN."""
    if target.device.type != "cpu" or target.numel() == 0 or isinstance(target, FakeTensor):
        return
    low, high = (extreme.item() for extreme in torch.aminmax(target))
    if low < 0 or high >= classes:
        value = low if low < 0 else high
        hint = "Give padding any class and drop its result, for instance with a mask."
        raise bad_value(WHERE, "target", f"classes in 0..{classes - 1}", str(value), hint)
