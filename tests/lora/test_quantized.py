"""Adapters on a base that bitsandbytes has quantised to 4 bits."""

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from kernelab.lora import LoRAConfig, inject, load_adapter, off, role, save_adapter, streams
from kernelab.lora.errors import BaseMismatchError, InjectionError

CONFIGS = {"actor": LoRAConfig(r=4, alpha=6), "critic": LoRAConfig(r=8)}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def quantised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose targets are NF4, as transformers' quantizer makes them."""
    model = copy.deepcopy(model)
    for path, linear in list(model.named_modules()):
        if path.rpartition(".")[2] in TARGETS:
            packed = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(path, packed.to("cpu").eval())
    return model


def dequantised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with the same values in plain linear layers."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=dtype)
            plain.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
            model.set_submodule(path, plain.eval())
    return model


def llama(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(sizes).to(dtype).eval()


def adapted(model: nn.Module) -> nn.Module:
    inject(model, CONFIGS, TARGETS, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def base(dtype):
    return quantised(llama(dtype), dtype)


@pytest.fixture
def tokens():
    return torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(2))


def test_off_is_bitwise_the_quantised_model(base, tokens):
    expected = base(tokens).logits
    with torch.no_grad():
        model = adapted(base)
        with off(model):
            assert torch.equal(model(tokens).logits, expected)
        with role(model, "actor"):
            assert not torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_joint_backward_is_that_of_the_dequantised_model(base, tokens, dtype, checkpointing):
    plain = adapted(dequantised(base, dtype))
    model = adapted(base)
    cotangent = torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(3))

    def losses(lm):
        embedded = lm.get_input_embeddings()(tokens).detach().requires_grad_()

        def logits(embeddings):
            return lm(inputs_embeds=embeddings).logits

        total = 0
        for name in CONFIGS:
            with role(lm, name):
                out = checkpoint(logits, embedded, use_reentrant=False) if checkpointing else logits(embedded)
            total = total + (out.float() * cotangent).sum()
        total.backward()
        return embedded.grad

    gradients = losses(model), losses(plain)
    found, expected = grads(model), grads(plain)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 2 * 3 * 2
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for ours, theirs in [*((found[name], expected[name]) for name in found), gradients]:
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_streams_score_as_the_roles_do_one_by_one(base, tokens, dtype):
    model = adapted(base)
    with torch.no_grad():
        with streams(model, [None, "actor", "critic"]):
            together = model(tokens.repeat(3, 1)).logits.chunk(3)
        with off(model):
            apart = [model(tokens).logits]
        for name in CONFIGS:
            with role(model, name):
                apart.append(model(tokens).logits)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_scoring_leaves_the_weights_and_the_gradients(base, tokens):
    """bitsandbytes alone packs the weights anew in a forward without gradients, and loses every later gradient."""
    model = adapted(base)

    def trained():
        model.zero_grad()
        with role(model, "actor"):
            logits = model(tokens).logits
        logits.float().square().sum().backward()
        return [logits, *grads(model).values()]

    before = trained()
    with off(model), torch.no_grad():
        model(tokens)
    assert all(map(torch.equal, trained(), before))


def test_a_base_that_is_packed_for_inference_is_refused(base, tokens):
    if not base.model.layers[0].self_attn.q_proj.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs for inference only where the CPU has AVX-512 BF16")
    with torch.no_grad():
        base(tokens)
    with pytest.raises(InjectionError, match=r"q_proj.*packed for inference"):
        adapted(base)


def test_packed_weights_are_never_written(base, tokens):
    model = adapted(base)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for name in CONFIGS:
        with role(model, name):
            model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]


def test_adapters_round_trip_through_peft(base, tokens, tmp_path, dtype):
    model = adapted(base)
    save_adapter(model, "actor", tmp_path)
    with role(model, "actor"), torch.no_grad():
        expected = model(tokens).logits
    fresh = quantised(llama(dtype), dtype)
    load_adapter(fresh, tmp_path, "loaded", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(fresh(tokens).logits, expected)
    wrapped = peft.PeftModel.from_pretrained(quantised(llama(dtype), dtype), tmp_path).train()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(wrapped(tokens).logits, expected, rtol=tolerance, atol=tolerance)


def test_another_packed_base_is_refused(base, tmp_path, dtype):
    save_adapter(adapted(base), "actor", tmp_path)
    torch.manual_seed(7)
    other = llama(dtype)
    other.model.layers[0].self_attn.q_proj.weight.data.normal_()
    with pytest.raises(BaseMismatchError, match="q_proj"):
        load_adapter(quantised(other, dtype), tmp_path, "actor")
