"""Injection finds its targets or says why not, and leaves the base as it was."""

from __future__ import annotations

import copy
import hashlib
import io
from itertools import product

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kernelab.lora import (
    InjectionError,
    LoRAConfig,
    RoleError,
    adapter_parameters,
    adapters,
    inject,
    off,
    role,
    save_adapter,
    streams,
)
from kernelab.lora.layer import LoRALayer

from .models import CONFIGS, TARGETS, WIDTH, Block, Stack, dense, stack

X = torch.randn(4, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def base_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            digest.update(f"{name} {parameter.requires_grad}".encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def snapshot(model: nn.Module) -> tuple:
    return tuple((name, id(p), p.requires_grad) for name, p in model.named_parameters()), tuple(
        map(type, model.modules())
    )


def test_names_parameters_and_initial_values():
    base = Stack().double()
    names = [name for name, _ in base.named_parameters()]
    parameters = dict(base.named_parameters())
    model = inject(base, CONFIGS, TARGETS)
    assert model is base
    assert all(model.get_parameter(name) is parameters[name] for name in names)
    assert not any(parameters[name].requires_grad for name in names)
    up = model.stages[0][0].up
    assert isinstance(up, LoRALayer)
    assert isinstance(up, nn.Linear)
    assert (up.in_features, up.out_features, up.weight.shape) == (WIDTH, 2 * WIDTH, (2 * WIDTH, WIDTH))
    assert up.lora_a["actor"].shape == (2, WIDTH)
    assert up.lora_b["critic"].shape == (2 * WIDTH, 3)
    assert up.lora_a["actor"].dtype == torch.float64
    assert up.lora_a["actor"].requires_grad
    assert up.lora_a["actor"].abs().max() <= WIDTH**-0.5
    assert up.lora_a["actor"].abs().min() > 0
    assert not up.lora_b["actor"].any()
    assert "stages.0.0.up.lora_a.actor" in model.state_dict()
    assert "critic: r=3" in repr(up)
    assert len(adapter_parameters(model, "actor")) == 2 * 12
    assert adapters(model) == CONFIGS


def test_targets_match_by_suffix():
    model = inject(Stack(), {"actor": LoRAConfig()}, ["0.1.up", "embed"])
    assert [name for name, m in model.named_modules() if isinstance(m, LoRALayer)] == ["embed", "stages.0.1.up"]


def test_options():
    model = inject(Stack(), {"actor": LoRAConfig()}, TARGETS, freeze_base=False, dtype=torch.bfloat16)
    assert all(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in adapter_parameters(model, "actor")} == {torch.bfloat16}
    with role(model, "actor"):
        assert model(X.float()).dtype == torch.float32


def test_a_second_injection_adds_adapters_and_freezes_nothing():
    model = inject(Stack().double(), {"actor": LoRAConfig()}, ["up"])
    model.embed.requires_grad_(True)
    inject(model, {"critic": LoRAConfig()}, ["up", "down"])
    assert model.embed.weight.requires_grad
    assert not model.stages[0][0].down.weight.requires_grad
    assert list(adapters(model)) == ["actor", "critic"]
    down = model.stages[0][0].down
    with torch.no_grad():
        down.lora_b["critic"].normal_()
    x = torch.randn(2, 2 * WIDTH, dtype=torch.float64)
    with role(model, "actor"):  # which this layer does not have
        assert torch.equal(down(x), nn.Linear.forward(down, x))
    with role(model, "critic"):
        assert not torch.equal(down(x), nn.Linear.forward(down, x))
    with pytest.raises(ValueError, match=r"critic.*has already"):
        inject(model, {"reward": LoRAConfig(), "critic": LoRAConfig()}, ["mix"])


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up = nn.Parameter(torch.zeros(4, 6, 8))
        self.embedding = nn.Embedding(4, WIDTH)
        self.conv = nn.Conv2d(2, 2, 1)
        self.lazy = nn.LazyLinear(3)
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 8)
        self.q_proj = nn.Linear(WIDTH, WIDTH)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], "named 'q_prj'.*q_proj"),
        (["nothing"], "Linear layers of this model are named: .*q_proj"),
        (["proj"], "q_proj"),
        (["gate_up"], r"experts.gate_up is a parameter of shape \[4, 6, 8\]"),
        (["q_proj", "embedding"], "embedding is a Embedding"),
        (["q_proj", "conv"], "conv is a Conv2d"),
        (["lazy"], "without a shape"),
        (["out_proj"], "attention.out_proj.*without calling it"),
        (["linear1"], "encoder.linear1.*without calling it"),
        (["attention"], "attention is a MultiheadAttention"),
        (["q_proj", "typo"], "'typo'"),
    ],
)
def test_targets_that_cannot_carry_adapters(targets, message):
    model = Odd()
    before = snapshot(model)
    with pytest.raises(InjectionError, match=message):
        inject(model, {"actor": LoRAConfig()}, targets)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("adapters", "targets", "error", "message"),
    [
        ({}, ["up"], ValueError, "'adapters'"),
        ([("actor", LoRAConfig())], ["up"], TypeError, "'adapters'"),
        ({"actor": {"r": 8}}, ["up"], TypeError, "LoRAConfig"),
        ({3: LoRAConfig()}, ["up"], TypeError, "strings"),
        ({"a.b": LoRAConfig()}, ["up"], ValueError, "without a dot"),
        ({"keys": LoRAConfig()}, ["up"], ValueError, "nn.ParameterDict"),
        ({"training": LoRAConfig()}, ["up"], ValueError, "nn.ParameterDict"),
        ({"": LoRAConfig()}, ["up"], ValueError, "adapters"),
        ({"actor": LoRAConfig()}, "up", TypeError, "'target_modules'"),
        ({"actor": LoRAConfig()}, [], ValueError, "'target_modules'"),
        ({"actor": LoRAConfig()}, [3], ValueError, "'target_modules'"),
    ],
)
def test_bad_arguments(adapters, targets, error, message):
    model = Stack()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject(model, adapters, targets)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="'dtype'"):
        inject(model, {"actor": LoRAConfig()}, ["up"], dtype=torch.int8)
    with pytest.raises(TypeError, match="'model'"):
        inject("model", {"actor": LoRAConfig()}, ["up"])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"r": 0}, ValueError),
        ({"r": 2.0}, TypeError),
        ({"r": True}, TypeError),
        ({"alpha": float("nan")}, ValueError),
        ({"alpha": "16"}, TypeError),
        ({"dropout": 1.0}, ValueError),
        ({"dropout": -0.1}, ValueError),
        ({"use_rslora": 1}, TypeError),
    ],
)
def test_bad_settings(settings, error):
    with pytest.raises(error, match=f"'{next(iter(settings))}'"):
        LoRAConfig(**settings)


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Packed(nn.Linear):
    """As a quantised layer: the weight says neither the layer's shape nor a floating dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        packed = torch.arange(in_features * out_features, dtype=torch.uint8)[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.view(self.out_features, -1).to(x.dtype), self.bias)


@pytest.mark.parametrize("kind", [Conv1D, Scaled, Packed])
def test_other_linear_layers_keep_their_own_forward(kind):
    module = (Conv1D(4, WIDTH) if kind is Conv1D else kind(WIDTH, 4)).double()
    base = copy.deepcopy(module)
    model = inject(nn.ModuleDict({"proj": module}), CONFIGS, ["proj"])
    assert isinstance(module, kind)
    assert (module.in_features, module.out_features) == (WIDTH, 4)
    with torch.no_grad():
        module.lora_b["actor"].normal_()
    x = X.flatten(0, 1)
    with off(model):
        assert torch.equal(module(x), base(x))
    with role(model, "actor"):
        a, b = module.lora_a["actor"].double(), module.lora_b["actor"].double()
        torch.testing.assert_close(module(x), base(x) + 1.5 * x @ a.T @ b.T, rtol=1e-12, atol=1e-12)
    with streams(model, [None, "actor"]):
        assert torch.equal(module(x)[:6], base(x)[:6])


def test_a_shared_module_is_one_layer_with_one_set_of_parameters():
    shared = nn.Linear(WIDTH, WIDTH)
    model = inject(nn.ModuleDict({"q": shared, "k": shared}), {"actor": LoRAConfig()}, ["q"])
    assert model["k"] is model["q"]
    assert len(adapter_parameters(model, "actor")) == 2


def test_base_is_untouched_by_switches_training_and_export(tmp_path):
    model = stack()
    before, flags = base_hash(model), [p.requires_grad for p in model.parameters()]
    optimizer = torch.optim.AdamW([*adapter_parameters(model, "actor"), *adapter_parameters(model, "critic")], lr=0.1)
    for mode, _ in product(("plain", "reentrant", "nonreentrant"), range(2)):
        model.mode = mode
        with role(model, "actor"):
            loss = model(X).square().mean()
        with role(model, "critic"):
            loss = loss + model(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(250):
        for context in (role(model, "actor"), off(model), role(model, "critic"), streams(model, ["actor", None])):
            with context:
                pass
    save_adapter(model, "actor", tmp_path)
    assert base_hash(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_adapter_without_a_role_gets_no_gradient_and_does_not_move():
    model = stack()
    critic = [p.clone() for p in adapter_parameters(model, "critic")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with role(model, "actor"):
        model(X).square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for p in adapter_parameters(model, "critic"))
    assert all(map(torch.equal, critic, adapter_parameters(model, "critic")))
    assert all(p.grad is not None for p in adapter_parameters(model, "actor"))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_independent(copied):
    model = stack()
    other = copied(model)
    with role(model, "actor"), torch.no_grad():
        want = model(X)
    with role(other, "actor"):
        assert torch.equal(other(X), want)
        with pytest.raises(RoleError, match="no role entered"):
            model(X)  # the role of the copy is not its own
        other(X).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    inject(other, {"reward": LoRAConfig()}, ["embed"])
    assert "reward" not in adapters(model)
    assert type(other.stages[0][0].up) is type(model.stages[0][0].up)


def test_state_dict_moves_adapters_between_models():
    model, other = stack(), stack(seed=5)
    other.load_state_dict(model.state_dict())
    with role(model, "critic"), role(other, "critic"):
        assert torch.equal(model(X), other(X))


def test_dtype_and_mode_follow_the_model():
    model = stack({"actor": LoRAConfig(r=2, dropout=0.5)}).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.eval()(X.bfloat16()).dtype == torch.bfloat16
    assert not model.stages[0][0].up.lora_a.training
    float32 = stack().float()
    with torch.autocast("cpu", torch.bfloat16), streams(float32, [None, "actor"]):
        assert float32.stages[0][0].up(X.float()).dtype == torch.bfloat16


def test_dropout_is_off_in_evaluation_and_scaled_in_training():
    torch.manual_seed(0)
    model = inject(
        nn.ModuleDict({"proj": nn.Linear(64, 1).double()}), {"actor": LoRAConfig(r=64, dropout=0.5)}, ["proj"]
    )
    layer = model["proj"]
    with torch.no_grad():
        layer.lora_a["actor"].copy_(torch.eye(64))
        layer.lora_b["actor"].fill_(1.0)
    x = torch.ones(4096, 64, dtype=torch.float64)
    with off(model):
        base = layer(x)
    sums = (layer(x) - base) / layer.lora_configs["actor"].scaling
    assert abs(sums.mean() - 64) < 1
    assert abs(sums.var() - 64) < 8
    torch.testing.assert_close(model.eval()["proj"](x) - base, torch.full_like(base, 64 * 0.25))


@pytest.mark.parametrize("mode", ["plain", "nonreentrant"])
def test_distributed_data_parallel(process_group, mode):
    model = stack()
    model.mode = mode
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(InjectionError, match="in a DistributedDataParallel already"):
        inject(wrapped, {"reward": LoRAConfig()}, TARGETS)
    with streams(wrapped, [None, "actor", "critic"]):
        wrapped(torch.cat([X, X, X])).square().sum().backward()
    named = {name: p for name, p in model.named_parameters() if "lora_" in name}
    loss = dense(model, "actor", X).square().sum() + dense(model, "critic", X).square().sum()
    for (name, p), want in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-10, msg=name)


def test_a_model_inside_another():
    wrapper = nn.Sequential(stack(), nn.Linear(WIDTH, 1).double())
    with role(wrapper, "critic"):
        wrapper(X)
    with role(wrapper[0].stages[1], "critic"):
        wrapper(X)


def test_torch_func_inside_a_role_entered_in_the_function():
    block = inject(Block().double(), CONFIGS, TARGETS)
    with torch.no_grad():
        for p in adapter_parameters(block, "actor"):
            p.normal_()
    parameters = dict(block.named_parameters())

    def loss(parameters):
        with role(block, "actor"):
            return torch.func.functional_call(block, parameters, (X,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        if "lora_" in name and "actor" in name:
            torch.testing.assert_close(got[name], parameter.grad)


@pytest.mark.slow
def test_compiled_model_obeys_roles():
    block = inject(Block(), CONFIGS, TARGETS)
    with torch.no_grad():
        for name in CONFIGS:
            for p in adapter_parameters(block, name):
                p.normal_()
    compiled = torch.compile(block, backend="aot_eager")
    for name in ("actor", "critic", "actor"):
        with role(block, name):
            torch.testing.assert_close(compiled(X.float()), block(X.float()))
    with off(block):
        torch.testing.assert_close(compiled(X.float()), block(X.float()))
