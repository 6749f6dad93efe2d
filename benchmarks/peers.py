"""The same adapters in PEFT, through its public functions."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import torch
from torch import Tensor, nn

from kernelab.lora import LoRAConfig


def peft_model(
    model: nn.Module, adapters: dict[str, LoRAConfig], target_modules: Sequence[str], *, same_dtype: bool
) -> peft.PeftModel:
    """``model`` with PEFT's adapters. ``same_dtype``: in the dtype of the base, where PEFT's default is float32."""
    wrapped = None
    for name, config in adapters.items():
        settings = peft.LoraConfig(
            r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(target_modules)
        )
        if wrapped is None:
            wrapped = peft.get_peft_model(model, settings, name, autocast_adapter_dtype=not same_dtype)
        else:
            wrapped.add_adapter(name, settings, autocast_adapter_dtype=not same_dtype)
    return wrapped


def peft_linear(
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: float,
    *,
    same_dtype: bool,
) -> peft.tuners.lora.Linear:
    """One layer whose adapters, named by their numbers, have the given values."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    configs = {
        str(number): LoRAConfig(r=len(a), alpha=factor * len(a), dropout=dropout)
        for number, (a, factor) in enumerate(zip(lora_a, scaling, strict=False))
    }
    model = peft_model(nn.ModuleDict({"layer": linear}), configs, ["layer"], same_dtype=same_dtype)
    layer = model.base_model.model["layer"]
    with torch.no_grad():
        for name in configs:
            layer.lora_A[name].weight.copy_(lora_a[int(name)])
            layer.lora_B[name].weight.copy_(lora_b[int(name)])
    return layer
