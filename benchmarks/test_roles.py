"""Off, actor and critic of one model: the scoring of each Hydra-PPO step, and the switch between roles alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from kernelab.lora import LoRAConfig, inject, off, role, streams

from .measure import BASE
from .peers import peft_model
from .provider import FORWARD_ONLY, SEED, Group, Provider, Results

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"actor": LoRAConfig(r=16, alpha=32), "critic": LoRAConfig(r=16, alpha=32)}
ROLES = (None, *ADAPTERS)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# name: (width, layers, tokens of each stream). "demo" is the trunk of the Hydra-PPO demo. "deep" has the 224 linears of
# a 7B model, too narrow to cost anything but their calls.
SIZES = {"demo": (128, 3, 128), "small": (512, 4, 128), "deep": (16, 32, 8)}


def grid(op: str, dtypes: Sequence[torch.dtype], devices: Sequence[str], names: Sequence[str]) -> list:
    groups = [Group(op, FORWARD_ONLY, *rest) for rest in itertools.product(SIZES, dtypes, devices)]
    return [
        pytest.param(group, name, id=f"{group}/{name}")
        for group in groups
        for name in names
        if not (name == "peft-float32-adapters" and group.dtype == torch.float32)
    ]


OURS, PEFT = ("kernelab.streams", "kernelab.role"), ("peft", "peft-float32-adapters")
SCORING = grid("scoring", (torch.float32, torch.bfloat16), DEVICES, (BASE, *OURS, *PEFT))
SWITCH = grid("switch", (torch.float32,), ("cpu",), (*OURS, "peft"))  # host time, the same for every device


@pytest.mark.parametrize(("group", "provider"), SCORING)
def test_scoring(measure, group, provider):
    model, x = scene(group)
    measure(
        {
            BASE: partial(base, group, model, x),
            "kernelab.streams": partial(one_forward, group, model, x),
            "kernelab.role": partial(of_roles, group, model, x, kernelab_roles),
            "peft": partial(of_roles, group, model, x, partial(peft_roles, same_dtype=True)),
            "peft-float32-adapters": partial(of_roles, group, model, x, partial(peft_roles, same_dtype=False)),
        }
    )


@pytest.mark.parametrize(("group", "provider"), SWITCH)
def test_switch(measure, group, provider):
    model, x = scene(group)
    measure(
        {
            "kernelab.streams": partial(one_forward, group, model, x, only_switch=True),
            "kernelab.role": partial(of_roles, group, model, x, kernelab_roles, only_switch=True),
            "peft": partial(of_roles, group, model, x, partial(peft_roles, same_dtype=True), only_switch=True),
        }
    )


def scene(group: Group) -> tuple[LlamaModel, Tensor]:
    """A model without adapters, and the input embeddings of one stream [1, tokens, width]."""
    width, layers, tokens = SIZES[group.case]
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        vocab_size=32,
    )
    model = LlamaModel(config).eval().to(group.device, group.dtype).requires_grad_(False)
    return model, torch.randn(1, tokens, width).to(group.device, group.dtype)


def hidden(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs_embeds=x, use_cache=False).last_hidden_state


def base(group: Group, model: LlamaModel, x: Tensor) -> Provider:
    """Three forwards without adapters."""
    return Provider(
        run=lambda: {f"output {name}": hidden(model, x) for name in ROLES},
        exact=lambda dtype: dict.fromkeys((f"output {name}" for name in ROLES), dense(model, x, None, dtype)),
    )


def one_forward(group: Group, model: LlamaModel, x: Tensor, *, only_switch: bool = False) -> Provider:
    adapted = injected(model)

    def score() -> Results:
        with streams(adapted, ROLES):
            parts = hidden(adapted, torch.cat([x] * len(ROLES))).chunk(len(ROLES))
        return {f"output {name}": part for name, part in zip(ROLES, parts, strict=True)}

    def switch() -> None:
        with streams(adapted, ROLES):
            pass

    return Provider(run=switch if only_switch else score, exact=partial(exact, model, x), results=score)


def of_roles(group: Group, model: LlamaModel, x: Tensor, make: Callable, *, only_switch: bool = False) -> Provider:
    """A forward in each role; ``make(model)`` gives the adapted model and ``play(name, action)``."""
    adapted, play = make(model)

    def score() -> Results:
        return {f"output {name}": play(name, partial(hidden, adapted, x)) for name in ROLES}

    def switch() -> None:
        for name in ROLES:
            play(name, lambda: None)

    return Provider(run=switch if only_switch else score, exact=partial(exact, model, x), results=score)


def kernelab_roles(model: LlamaModel) -> tuple[nn.Module, Callable]:
    adapted = injected(model)

    def play(name: str | None, action: Callable):
        with off(adapted) if name is None else role(adapted, name):
            return action()

    return adapted, play


def peft_roles(model: LlamaModel, *, same_dtype: bool) -> tuple[nn.Module, Callable]:
    adapted = peft_model(copy.deepcopy(model), ADAPTERS, TARGETS, same_dtype=same_dtype)
    with torch.no_grad():
        for path, name, a, b in adapters(model):
            layer = adapted.base_model.model.get_submodule(path)
            layer.lora_A[name].weight.copy_(a)
            layer.lora_B[name].weight.copy_(b)

    def play(name: str | None, action: Callable):
        if name is None:
            with adapted.disable_adapter():
                return action()
        adapted.set_adapter(name)
        return action()

    return adapted.eval(), play


def injected(model: LlamaModel) -> nn.Module:
    adapted = inject(copy.deepcopy(model), ADAPTERS, TARGETS).eval()
    with torch.no_grad():
        for path, name, a, b in adapters(model):
            layer = adapted.get_submodule(path)
            layer.lora_a[name].copy_(a)
            layer.lora_b[name].copy_(b)
    return adapted


def adapters(model: LlamaModel) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(layer, adapter, A, B), the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    for path, layer in model.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            for name, config in ADAPTERS.items():
                sizes = (config.r, layer.in_features), (layer.out_features, config.r)
                a, b = (torch.randn(size, generator=generator) / size[1] ** 0.5 / 4 for size in sizes)
                yield path, name, a.to(layer.weight), b.to(layer.weight)


def exact(model: LlamaModel, x: Tensor, dtype: torch.dtype) -> Results:
    return {f"output {name}": dense(model, x, name, dtype) for name in ROLES}


def dense(model: LlamaModel, x: Tensor, name: str | None, dtype: torch.dtype) -> Tensor:
    """The model without any adapter code: B A is multiplied into the weights, in float64, then rounded."""
    merged = copy.deepcopy(model).double()
    for path, owner, a, b in adapters(model):
        if owner == name:
            merged.get_submodule(path).weight += ADAPTERS[name].scaling * b.double() @ a.double()
    return hidden(merged.to(dtype), x.to(dtype))
