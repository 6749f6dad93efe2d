"""A small model with every kind of checkpointing, and the dense model that an adapter stands for."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from kernelab.lora import LoRAConfig, inject
from kernelab.lora.layer import LoRALayer

WIDTH = 6
TARGETS = ["up", "down", "mix"]
CONFIGS = {"actor": LoRAConfig(r=2, alpha=3), "critic": LoRAConfig(r=3, alpha=5)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(torch.tanh(self.up(h)) * torch.sigmoid(self.up(h))) + torch.softmax(self.mix(h), -1)


class Stack(nn.Module):
    """Four blocks in two stages. ``mode``: plain, or how blocks and stages are checkpointed, outermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.stages = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        self.mode = "plain"

    def forward(self, x: Tensor) -> Tensor:
        outer, _, inner = self.mode.rpartition("/")
        x = self.embed(x).requires_grad_()  # reentrant checkpoints need an input that requires grad
        for stage in self.stages:
            x = _run(partial(self._stage, stage, inner), outer, x)
        return x

    @staticmethod
    def _stage(stage: nn.ModuleList, mode: str, x: Tensor) -> Tensor:
        for block in stage:
            x = _run(block, mode, x)
        return x


def _run(function, mode: str, x: Tensor) -> Tensor:
    if mode in ("", "plain"):
        return function(x)
    if mode == "keywords":
        return checkpoint(lambda y: function(y), y=x, use_reentrant=False)
    return checkpoint(function, x, use_reentrant=mode == "reentrant")


MODES = [
    "plain",
    "reentrant",
    "nonreentrant",
    "keywords",
    "nonreentrant/plain",
    "reentrant/plain",
    "nonreentrant/nonreentrant",
    "nonreentrant/reentrant",
    "reentrant/nonreentrant",
    "reentrant/reentrant",
]


def stack(configs=CONFIGS, seed: int = 0, dtype=torch.float64) -> Stack:
    """An injected model whose B matrices are not zero."""
    torch.manual_seed(seed)
    model = inject(Stack().to(dtype), configs, TARGETS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_()
    return model


def dense(model: Stack, name: str | None, x: Tensor) -> Tensor:
    """The output of the base model with the adapter multiplied into its weights, without any LoRA code."""
    state = {key: value for key, value in model.named_parameters() if "lora_" not in key}
    for path, layer in model.named_modules():
        if name is not None and isinstance(layer, LoRALayer):
            scaling = layer.lora_configs[name].alpha / layer.lora_configs[name].r
            state[f"{path}.weight"] = layer.weight + scaling * layer.lora_b[name] @ layer.lora_a[name]
    return functional_call(Stack().to(x.dtype), state, (x,))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
