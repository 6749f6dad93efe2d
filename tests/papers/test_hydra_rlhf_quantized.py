"""4-bit trunks: fake ones hold what real ones do, and counting their memory or predicting it changes nothing."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kernelab._core.memory import LiveBytes
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.model import mixed_precision
from kernelab.papers.hydra_rlhf.predict import _Sizes
from kernelab.papers.hydra_rlhf.quantized import quantize, tensors


def packed(dtype: torch.dtype, bias: bool = True) -> nn.Module:
    sizes = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=50, attention_bias=bias, mlp_bias=bias, **sizes)).to(dtype).eval()
    lm.requires_grad_(False)
    quantize(lm)
    return lm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fake_trunk_holds_what_a_real_one_does(dtype):
    real = packed(dtype)
    with _Sizes():
        fake = packed(dtype)

    def held(lm: nn.Module) -> list[tuple]:
        return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors(lm)]

    assert held(fake) == held(real)
    assert {name: type(module) for name, module in fake.named_modules()} == {
        name: type(module) for name, module in real.named_modules()
    }
    known = {tensor.data_ptr() for tensor in tensors(real)}
    for name, tensor in real.state_dict().items():  # where bitsandbytes keeps all that belongs to a weight
        assert tensor.data_ptr() in known or name.endswith(("nested_quant_map", "bitsandbytes__nf4")), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_that_is_counted_is_the_same(dtype, bias):
    torch.manual_seed(0)
    layer = packed(getattr(torch, dtype), bias).model.layers[0].mlp.gate_proj
    x = torch.randn(3, 4, 72)
    cotangent = torch.randn(3, 4, 100)

    def product(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        with mixed_precision(Config(dtype=dtype), x.device):
            y = layer(x)
            with torch.no_grad():
                assert torch.equal(layer(x), y)
        y.backward(cotangent.to(y.dtype))
        return [y, x.grad]

    expected = product(x)
    with LiveBytes() as live:
        found = product(x)
    assert all(map(torch.equal, found, expected))
    size = getattr(torch, dtype).itemsize
    with LiveBytes() as live, torch.no_grad(), live.phase("forward"):
        layer(x.to(getattr(torch, dtype)))
    assert 72 * 100 * size < live.phases["forward"] < 72 * 100 * size + 3 * 4 * (72 + 2 * 100) * size + 2000


def test_a_copy_of_a_trunk_is_counted_as_its_own():
    lm = packed(torch.float32)
    with LiveBytes() as live:
        live.track(tensors(lm))
        once = live.current
        live.track(tensors(copy.deepcopy(lm)))
    assert once < live.peak
    assert live.peak == 2 * once


PROGRAM = """
import torch
from torch._subclasses import FakeTensor
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.predict import predict

small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 50, "batch_size": 2, "num_mini_batches": 1}
plan = predict(Config(**small, load_in_4bit=True, optim="adamw_8bit", sft_steps=0))
from bitsandbytes import functional
from bitsandbytes.backends import utils

assert not any(isinstance(table, FakeTensor) for table in [*utils.CODE.values(), *functional.name2qmap.values()])
weight = torch.randn(65, 63)
packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
assert (functional.dequantize_4bit(packed, state) - weight).abs().max() < 1
assert predict(plan.config) == plan
"""


def test_a_prediction_that_comes_first_leaves_no_table_behind():
    """bitsandbytes keeps tables of codes for good: those of its first import, and of the first weight in 4 bits."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
