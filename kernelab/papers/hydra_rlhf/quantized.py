"""Trunks in 4 bits (NF4, bitsandbytes), of real tensors and of fake ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from kernelab._core.define import BODIES
from kernelab._core.errors import KernelabError, bad_value
from kernelab.papers.hydra_rlhf.model import linear_layers

if TYPE_CHECKING:
    from types import ModuleType

    from transformers import PreTrainedModel


def import_bitsandbytes() -> ModuleType:
    """Raises ``KernelabError`` if it is not installed."""
    try:
        with unset_fake_temporarily():  # it makes tables as it is imported
            import bitsandbytes
    except ImportError as error:
        raise KernelabError("bitsandbytes is not installed; it comes with: pip install 'kernelab[rlhf]'") from error
    BODIES[torch.ops.bitsandbytes.gemm_4bit.default] = _gemm_4bit
    return bitsandbytes


def quantize(lm: PreTrainedModel) -> None:
    """Puts bitsandbytes' 4-bit layers (NF4, their scales in 8 bits) in the place of the trunk's linear layers.

    Raises:
        KernelabError: bitsandbytes is not installed.
        ValueError: a linear layer is transformers' Conv1D, which has no such form.
    """
    bitsandbytes = import_bitsandbytes()
    layers = {name: lm.get_submodule(name) for name in linear_layers(lm)}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise bad_value("hydra-rlhf", "load_in_4bit", "False, for the model has Conv1D layers", name)
    for name, layer in layers.items():
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        with unset_fake_temporarily():  # the weight that it begins with is a Params4bit, on no device
            packed = bitsandbytes.nn.Linear4bit(
                *sizes, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta"
            )
        packed.weight = _packed(layer.weight.data)
        packed.bias = layer.bias
        packed.support_avx512bf16_for_cpu = False  # or its first forward in eval mode rounds the scales, in place
        lm.set_submodule(name, packed.train(layer.training))


def _packed(weight: Tensor) -> nn.Parameter:
    """bitsandbytes' parameter; of a fake tensor, which it refuses, a plain one that holds the same."""
    bitsandbytes = import_bitsandbytes()
    if not isinstance(weight, FakeTensor):
        return bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(weight.device)
    functional = bitsandbytes.functional
    with patch.dict(functional.name2qmap, dynamic=torch.empty(256)):  # one table for all, kept real
        data, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.quant_state = state
    return parameter


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """All that a model holds: parameters, buffers, and the scales and tables of 4-bit weights."""
    yield from chain(model.parameters(), model.buffers())
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            yield from filter(torch.is_tensor, chain(vars(state).values(), vars(state.state2).values()))


def _gemm_4bit(
    x, packed, shape, absmax, blocksize, quant_type, bias=None, absmax_8bit=None, absmax_code=None, absmax_offset=None
) -> Tensor:
    """What bitsandbytes' product is inside, on a CPU: the weight in the dtype of ``x`` for as long as it takes."""
    ops = torch.ops.bitsandbytes
    with torch.no_grad(), torch._C._DisableAutocast():
        if absmax_8bit is not None:
            absmax = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
        return F.linear(x, ops.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, x.dtype), bias)
