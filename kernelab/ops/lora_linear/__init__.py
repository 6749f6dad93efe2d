"""Linear layer with LoRA switched per group of rows, in one pass, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelab._core import define, registry
from kernelab._core.autograd import differentiable
from kernelab._core.errors import bad_value

from . import reference
from .arguments import Routing, check_input, check_matrix, route

_ROUTING = "SymInt[] counts, int[] adapters, float[] scaling, bool[] keep, float dropout_p, int seed"


def _forward_fake(x, weight, bias, base, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed):
    out_features = base.shape[1] if weight is None else weight.shape[0]
    rank = max((a.shape[0] for a in lora_a), default=0)
    kept = sum(count for count, adapter in zip(counts, adapters, strict=True) if adapter >= 0 and keep[adapter])
    return x.new_empty(x.shape[0], out_features), x.new_empty(kept, rank)


def _backward_fake(dy, x, s, weight, lora_a, lora_b, counts, adapters, scaling, keep, dropout_p, seed, need):
    in_features = lora_a[0].shape[1] if weight is None else weight.shape[1]
    dx = dy.new_empty(dy.shape[0] if need[0] else 0, in_features)
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else t.new_empty(0)
        for t, needed in zip([*lora_a, *lora_b], need[1:], strict=True)
    ]
    return dx, grads[: len(lora_a)], grads[len(lora_a) :]


_forward = define.define(
    "lora_linear",
    "forward",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor[] lora_a, Tensor[] lora_b, "
    f"{_ROUTING}, str backend) -> (Tensor, Tensor)",
    _forward_fake,
)
_backward = define.define(
    "lora_linear",
    "backward",
    "(Tensor dy, Tensor x, Tensor s, Tensor? weight, Tensor[] lora_a, Tensor[] lora_b, "
    f"{_ROUTING}, bool[] need, str backend) -> (Tensor, Tensor[], Tensor[])",
    _backward_fake,
)


def _triton_support(device: torch.device, dtype: torch.dtype) -> str | None:
    return registry.triton_support(device) or (
        None if dtype in (torch.float32, torch.bfloat16, torch.float16) else f"no {dtype} kernel"
    )


def _register(backend: str, module: str, priority: int, devices: tuple[str, ...], supports) -> None:
    path = f"{__name__}.{module}"
    registry.register("lora_linear", backend, module=path, priority=priority, devices=devices, supports=supports)


_register("reference", "reference", 0, registry.DEVICES, lambda device, dtype: None)
_register("cpu", "cpu_kernels", 10, ("cpu",), registry.cpu_support)


class _LoRALinear(torch.autograd.Function):
    """``(y, S, kept x)``. The last two are outputs because backward needs them and second derivatives pass through
    them; their cotangents are None in a first-order backward."""

    @staticmethod
    def forward(x, weight, bias, base, routing: Routing, keep_x: bool, backend: str, *adapters: Tensor):
        lora_a, lora_b = adapters[: len(adapters) // 2], adapters[len(adapters) // 2 :]
        y, s = _forward(x, weight, bias, base, lora_a, lora_b, *routing.arguments, backend)
        return y, s, _kept_rows(x, routing) if keep_x else None

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, ctx.routing, keep_x, ctx.backend, *adapters = inputs
        _, s, kept_x = output
        ctx.set_materialize_grads(False)
        count = len(adapters) // 2
        _, ctx.need_weight, ctx.need_bias, *_ = ctx.needs_input_grad
        need_a, need_b = ctx.needs_input_grad[7 : 7 + count], ctx.needs_input_grad[7 + count :]
        save_x = kept_x if keep_x else x if ctx.need_weight or any(need_a) else None
        ctx.save_for_backward(save_x, s if any(need_b) else None, weight, *adapters)

    @staticmethod
    def backward(ctx, dy, ds, dkept_x):
        x, s, weight, *adapters = ctx.saved_tensors
        need_x, _, _, need_base, _, _, _, *need_adapters = ctx.needs_input_grad
        return dy
