"""A Llama decoder layer with LoRA on its seven linears: what trains, in kernelab and in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding

from kernelab.lora import LoRAConfig, inject, recompute_activations

from .peers import peft_model
from .provider import SEED, Provider, Results

WIDTH, HIDDEN, HEAD, RANK = 512, 1376, 64, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = {"default": LoRAConfig(r=RANK, alpha=2 * RANK)}
PROVIDERS = ("base", "kernelab", "kernelab-recompute", "peft", "peft-float32-adapters")

Forward = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """A frozen decoder layer and the table of its positions, which a model has once."""

    def __init__(self, dtype: torch.dtype, tokens: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_attention_heads=WIDTH // HEAD,
            attn_implementation="sdpa",
        )
        torch.manual_seed(SEED)
        self.layer = LlamaDecoderLayer(config, 0).to(dtype).requires_grad_(False)
        cos, sin = LlamaRotaryEmbedding(config)(torch.empty((), dtype=dtype), torch.arange(tokens)[None])
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, position_embeddings=(self.cos, self.sin))


def adapters(layer: Layer) -> dict[str, Tensor]:
    """``path.a`` [r, in] and ``path.b`` [out, r], the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    values = {}
    for path, linear in layer.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            for part, size in (("a", (RANK, linear.in_features)), ("b", (linear.out_features, RANK))):
                value = torch.randn(size, generator=generator) / size[1] ** 0.5 / 4
                values[f"{path}.{part}"] = value.to(linear.weight.dtype)
    return values


def adapted(name: str, dtype: torch.dtype, tokens: int) -> tuple[Forward, dict[str, Tensor]]:
    """The forward of a provider, and what it trains."""
    layer = Layer(dtype, tokens)
    if name == "base":
        return layer, {}
    values, trained = adapters(layer), {}
    if name.startswith("kernelab"):
        model = inject(layer, ADAPTER, TARGETS)
        forward = partial(_inside, recompute_activations if name == "kernelab-recompute" else nullcontext, model)
    else:
        forward = peft_model(layer, ADAPTER, TARGETS, same_dtype=name == "peft")
        model = forward.base_model.model
    for key, value in values.items():
        path, _, part = key.rpartition(".")
        linear = model.get_submodule(path)
        if name.startswith("kernelab"):
            parameter = getattr(linear, f"lora_{part}")["default"]
        else:
            parameter = getattr(linear, f"lora_{part.upper()}")["default"].weight
        with torch.no_grad():
            parameter.copy_(value)
        trained[key] = parameter
    return forward, trained


def _inside(context: Callable, model: nn.Module, x: Tensor) -> Tensor:
    with context():
        return model(x)


def inputs(dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """The hidden states and a cotangent of the output, [1, tokens, width]."""
    generator = torch.Generator().manual_seed(SEED)
    return tuple(torch.randn(1, tokens, WIDTH, generator=generator).to(dtype) for _ in range(2))


def training(name: str, dtype: torch.dtype, tokens: int) -> Provider:
    """Forward and backward."""
    forward, trained = adapted(name, dtype, tokens)
    x, dy = inputs(dtype, tokens)
    return Provider(run=partial(_gradients, forward, trained, x, dy), exact=partial(_exact, name, x, dy))


def _gradients(forward: Forward, trained: dict[str, Tensor], x: Tensor, dy: Tensor) -> Results:
    x = x.detach().requires_grad_()
    y = forward(x)
    grads = torch.autograd.grad(y, [x, *trained.values()], dy)
    return {"output": y, **{f"gradient of {key}": grad for key, grad in zip(("x", *trained), grads, strict=True)}}


def _exact(name: str, x: Tensor, dy: Tensor, dtype: torch.dtype) -> Results:
    """The layer without any adapter code: ``B A`` is added to its weights."""
    layer = Layer(x.dtype, x.shape[1])
    values = {} if name == "base" else adapters(layer)
    layer = layer.to(dtype)
    values = {key: value.to(dtype).requires_grad_() for key, value in values.items()}

    def forward(x: Tensor) -> Tensor:
        paths = {key.rpartition(".")[0] for key in values}
        merged = {
            f"{path}.weight": layer.get_submodule(path).weight
            + ADAPTER["default"].scaling * values[f"{path}.b"] @ values[f"{path}.a"]
            for path in paths
        }
        return functional_call(layer, merged, (x,))

    return _gradients(forward, values, x.to(dtype), dy.to(dtype))
