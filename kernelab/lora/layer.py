"""A layer that carries adapters: the module itself, its class extended in place.

The module keeps its identity, parameters, hooks and state-dict keys; each adapter adds the parameters ``lora_a.<name>``
[r, in] and ``lora_b.<name>`` [out, r].
"""

from __future__ import annotations

import functools
import math
import sys
import types

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from kernelab.ops import lora_add, lora_linear

from .config import LoRAConfig
from .errors import RoleError
from .roles import Router, chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_in_function_mode = torch._C._is_torch_function_mode_enabled


class LoRALayer(nn.Module):
    """Mixin that comes before the class of the base layer, whose forward stays the base output."""

    lora_base: type[nn.Module]
    lora_router: Router
    lora_path: str  # name in the model given to inject, which is the name in adapter files
    lora_configs: dict[str, LoRAConfig]  # adapters of this layer
    lora_a: nn.ParameterDict
    lora_b: nn.ParameterDict

    def forward(self, x: Tensor) -> Tensor:
        if _in_function_mode():  # a torch-function mode sees one call, not every attribute that is read here
            return handle_torch_function(LoRALayer.forward, (), self, x)
        roles = chunks(self.lora_router)
        used = [name for name in dict.fromkeys(roles) if name in self.lora_configs]
        if not used:
            return super().forward(x)
        rows = _rows_per_chunk(x, roles, self.lora_path)
        by_dropout: dict[float, list[str]] = {}  # the op takes one probability
        for name in used:
            by_dropout.setdefault(self.lora_configs[name].dropout if self.training else 0.0, []).append(name)
        # From the CPU generator, which a checkpoint restores for its recomputation.
        seed = int(torch.randint(2**63 - 1, ())) if any(by_dropout) else 0
        y = None
        for dropout, names in by_dropout.items():
            number = {name: index for index, name in enumerate(names)}
            adapters = {
                "lora_a": [self.lora_a[name] for name in names],
                "lora_b": [self.lora_b[name] for name in names],
                "scaling": [self.lora_configs[name].scaling for name in names],
                "segments": None if len(roles) == 1 else [(rows, number.get(role)) for role in roles],
                "dropout_p": dropout,
                "seed": seed,
            }
            if y is None and self.lora_base is nn.Linear:
                y = lora_linear(x, self.weight, self.bias, **adapters)
            else:
                y = lora_add(super().forward(x) if y is None else y, x, **adapters)
        return y

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={config.r}" for name, config in self.lora_configs.items())
        return f"{super().extra_repr()}, adapters=({adapters})"

    def __reduce_ex__(self, protocol):
        return _empty, (self.lora_base,), self.__getstate__()


def _rows_per_chunk(x: Tensor, roles: tuple, path: str) -> int:
    if len(roles) == 1:
        return 0
    if x.dim() < 2 or x.shape[0] % len(roles):
        raise RoleError(
            f"streams: dim 0 of the input of {path} has to divide by the {len(roles)} roles, "
            f"got shape {list(x.shape)}. Stack one equal chunk a role along dim 0."
        )
    return math.prod(x.shape[:-1]) // len(roles)


@functools.cache
def _layer_class(base: type[nn.Module]) -> type[LoRALayer]:
    body = {"lora_base": base, "__module__": __name__}
    return types.new_class(
        f"LoRA{base.__name__}", (LoRALayer, base), exec_body=lambda namespace: namespace.update(body)
    )


def _empty(base: type[nn.Module]) -> LoRALayer:
    """What pickle and deepcopy fill with the state of a layer."""
    cls = _layer_class(base)
    return cls.__new__(cls)


def features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a layer that can carry adapters, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    transformers = sys.modules.get("transformers.pytorch_utils")  # a model that has a Conv1D has imported it
    if transformers is not None and isinstance(module, transformers.Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def adapter_dtype(module: nn.Module, wanted: torch.dtype | None) -> torch.dtype:
    """The base weight's dtype, float32 where that is packed, unless another one is wanted."""
    own = module.weight.dtype
    return wanted or (own if own in DTYPES else torch.float32)


def new_pair(module: nn.Module, config: LoRAConfig, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """A: Kaiming-uniform with a = sqrt(5), [r, in]; B: zeros, [out, r]."""
    in_features, out_features = features(module)
    dtype, device = adapter_dtype(module, dtype), module.weight.device
    a = torch.empty(config.r, in_features, device=device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a.to(dtype), torch.zeros(out_features, config.r, dtype=dtype, device=device)


def attach(module: nn.Module, router: Router, path: str, name: str, config: LoRAConfig, a: Tensor, b: Tensor) -> None:
    """Adds an adapter to a layer, which becomes a :class:`LoRALayer` with its first one."""
    if not isinstance(module, LoRALayer):
        module.in_features, module.out_features = features(module)
        module.__class__ = _layer_class(type(module))
        module.lora_router, module.lora_path, module.lora_configs = router, path, {}
        module.lora_a, module.lora_b = nn.ParameterDict(), nn.ParameterDict()
    module.lora_configs[name] = config
    module.lora_a[name], module.lora_b[name] = nn.Parameter(a), nn.Parameter(b)
