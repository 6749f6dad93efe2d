"""The transformer with every scheme: decoding and packing equal the whole; loops, gates, gradients, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from kernelab import lora
from kernelab.nn import KeyValueCache, Transformer
from kernelab.nn.decoding import sample
from kernelab.ops import linear_logprob
from tests.nn import explicit

VOCAB = 17
SETTINGS = {
    "absolute": {"max_length": 24},
    "sinusoidal": {},
    "none": {},
    "relative_key": {"max_distance": 3, "position_options": {"value": True}},
    "relative_key_query": {"max_distance": 3},
    "disentangled": {"max_distance": 6, "position_options": {"num_buckets": 4}},
    "t5": {"max_distance": 9, "position_options": {"num_buckets": 8}},
    "alibi": {"position_options": {"trainable": True}},
    "rotary": {"position_options": {"rotary_dim": 4}},
    "position_only": {"max_distance": 4, "num_kv_heads": None},
    "window": {"position_options": {"widths": [1, 2, 4, 20]}, "num_kv_heads": None},
}


def build(position="relative_key", *, causal=True, num_layers=2, **settings):
    """A small model whose logits are far from uniform, float64."""
    torch.manual_seed(3)
    settings = {"num_kv_heads": 2, **SETTINGS[position], **settings}
    model = Transformer(VOCAB, 24, num_layers, 4, position=position, causal=causal, d_ff=40, **settings).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def tokens_of(batch=2, length=11):
    return torch.randint(VOCAB, (batch, length))


@pytest.mark.parametrize("position", SETTINGS)
def test_decoding_gives_what_the_whole_gives(position):
    model = build(position, shared_layers=2, gate=True)
    tokens, cache = tokens_of(length=14), model.new_cache()
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(part, cache=cache) for part in tokens.split([5, 1, 1, 4, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-8, atol=1e-8)

    prompt = tokens[:, :4]
    greedy = model.generate(prompt, 9, temperature=0)
    for _ in range(9):
        with torch.no_grad():
            prompt = torch.cat([prompt, model(prompt)[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, prompt)


@pytest.mark.parametrize("position", SETTINGS)
def test_a_prompt_padded_on_the_left_decodes_as_it_does_alone(position):
    model = build(position)
    prompt = tokens_of(1, 4)
    other = tokens_of(1, 7)
    padded = torch.cat([F.pad(prompt, (3, 0), value=5), other])
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    torch.testing.assert_close(model(padded, key_padding_mask=mask)[:1, 3:], model(prompt), rtol=1e-8, atol=1e-8)
    together = model.generate(padded, 6, key_padding_mask=mask, temperature=0)
    assert torch.equal(together[0, 3:], model.generate(prompt, 6, temperature=0)[0])
    assert torch.equal(together[1], model.generate(other, 6, temperature=0)[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("position", SETTINGS)
def test_packed_documents_and_padded_rows_are_as_they_are_alone(position, causal):
    model = build(position, causal=causal)
    long, short = tokens_of(1, 9), tokens_of(1, 5)
    packed = model(torch.cat([long, short], 1), cu_seqlens=torch.tensor([0, 9, 14]))
    padded = model(torch.cat([long, F.pad(short, (0, 4))]), key_padding_mask=torch.arange(9) < torch.tensor([[9], [5]]))
    for got in (packed[:, :9], padded[:1]):
        torch.testing.assert_close(got, model(long), rtol=1e-8, atol=1e-8)
    for got in (packed[:, 9:], padded[1:, :5]):
        torch.testing.assert_close(got, model(short), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("position", SETTINGS)
def test_gradients_reach_every_parameter_and_the_state_comes_back(position):
    model = build(position, gate=True, tie_embeddings=False, norm="post")
    tokens = tokens_of()
    F.cross_entropy(model(tokens).flatten(0, 1), tokens_of().flatten()).backward()
    for name, parameter in model.named_parameters():
        constant_in_a_row = name.endswith(("k_proj.bias", "pos_key_proj.bias"))
        assert parameter.grad is not None, name
        assert constant_in_a_row or parameter.grad.abs().max() > 1e-7, name
    other = build(position, gate=True, tie_embeddings=False, norm="post")
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))


def test_what_layers_share():
    t5, deberta, alibi = (build(name).layers for name in ("t5", "disentangled", "alibi"))
    assert t5[0].attention.position is t5[1].attention.position
    first, second = (layer.attention.position for layer in deberta)
    assert first.rel_embeddings is second.rel_embeddings
    assert first.pos_key_proj is not second.pos_key_proj
    assert alibi[0].attention.position is not alibi[1].attention.position


def test_loops_are_layers_with_equal_weights_whose_gradients_add_up():
    looped, unrolled = build(num_layers=1, shared_layers=3, gate=True), build(num_layers=3, gate=True)
    state = looped.state_dict()
    for loop in range(3):
        state |= {name.replace("layers.0", f"layers.{loop}"): value for name, value in looped.state_dict().items()}
    unrolled.load_state_dict(state)
    tokens = tokens_of()
    weight = torch.randn(*tokens.shape, VOCAB, dtype=torch.float64)
    for model in (looped, unrolled):
        (model(tokens) * weight).sum().backward()
    torch.testing.assert_close(looped(tokens), unrolled(tokens))
    parameters = dict(unrolled.named_parameters())
    for name, parameter in looped.layers[0].named_parameters():
        wanted = sum(parameters[f"layers.{loop}.{name}"].grad for loop in range(3))
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["pre", "post", "parallel"])
def test_a_layer_is_its_formula(norm):
    model = build("none", num_layers=1, norm=norm, gate=True, activation="gelu_tanh", tie_embeddings=False)
    tokens, layer = tokens_of(), model.layers[0]
    seen = explicit.visible(11, 11, causal=True)

    def attend(x):
        return explicit.attention(layer.attention, x, seen)

    def mlp(x):
        return layer.down_proj(F.gelu(layer.up_proj(x), approximate="tanh"))

    x = model.embedding(tokens)
    if norm == "pre":
        y = x + attend(layer.attention_norm(x))
        y = y + mlp(layer.mlp_norm(y))
    elif norm == "post":
        x = model.embedding_norm(x)
        y = layer.attention_norm(x + attend(x))
        y = layer.mlp_norm(y + mlp(y))
    else:
        y = x + attend(layer.attention_norm(x)) + mlp(layer.attention_norm(x))
    g = (x @ layer.gate.weight.T + layer.gate.bias).sigmoid()
    y = g * y + (1 - g) * x
    y = y if norm == "post" else model.final_norm(y)
    torch.testing.assert_close(model.hidden(tokens), y)
    torch.testing.assert_close(model(tokens), y @ model.head.weight.T)
    logprob = linear_logprob(model.hidden(tokens), model.output_weight, tokens)
    torch.testing.assert_close(logprob, model(tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0])


def test_absolute_positions_are_a_table():
    model = build("absolute", num_layers=1)
    tokens = tokens_of()
    by_hand = build("none", num_layers=1)
    by_hand.load_state_dict({k: v for k, v in model.state_dict().items() if k != "position_embedding.weight"})
    x = model.embedding(tokens) + model.position_embedding.weight[:11]
    torch.testing.assert_close(model.hidden(tokens), model.final_norm(by_hand.layers[0](x)))


@pytest.mark.parametrize("position", ["relative_key_query", "disentangled", "rotary"])
def test_it_compiles_whole_and_once(position):
    torch._dynamo.reset()
    model = build(position, num_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (11, 5):
            tokens, grads = tokens_of(length=length), []
            for run in (compiled, model):
                model.zero_grad()
                logits = run(tokens)
                logits.square().sum().backward()
                grads.append([logits, *(parameter.grad.clone() for parameter in model.parameters())])
            torch.testing.assert_close(*grads)


def test_it_runs_on_tensors_that_have_sizes_only():
    with FakeTensorMode():
        model = Transformer(VOCAB, 24, 2, 4, position="absolute", max_length=24)
        model(tokens_of(1), cu_seqlens=torch.tensor([0, 4, 11])).sum().backward()
        assert model.embedding.weight.grad.shape == (VOCAB, 24)


@pytest.mark.parametrize("position", SETTINGS)
def test_bfloat16_by_autocast_and_by_conversion_stays_near_float32(position):
    model = build(position, norm="post").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    tokens = tokens_of()
    wanted = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.05 * wanted.abs().max().item())
    low = model.bfloat16()(tokens)
    torch.testing.assert_close(low.float(), wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())


def test_sampling_follows_the_distribution_and_the_generator():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(20_000, 4)
    counts = torch.bincount(sample(logits, 2.0, generator=torch.Generator().manual_seed(0)), minlength=4) / 20_000
    torch.testing.assert_close(counts, (logits[0] / 2).softmax(-1), rtol=0, atol=0.015)
    two = torch.bincount(sample(logits, 1.0, 2, torch.Generator().manual_seed(0)), minlength=4) / 20_000
    torch.testing.assert_close(two, torch.tensor([0, 1, 0, 2.718281828]) / 3.718281828, rtol=0, atol=0.015)
    assert sample(torch.tensor([[3e4, 2.9e4]]), 1e-38).tolist() == [0]

    model, prompt = build(), tokens_of()
    first, second, third = (
        model.generate(prompt, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(model.generate(prompt, 5, top_k=1), model.generate(prompt, 5, temperature=0))


def test_rows_end_with_eos():
    model, prompt = build(), tokens_of(4, 3)

    def draw(rows=prompt, **settings):
        return model.generate(rows, 12, temperature=4.0, generator=torch.Generator().manual_seed(0), **settings)

    free = draw()
    eos = int(free[0, 6])
    assert eos not in free[0, 3:6].tolist()
    assert eos not in free[1].tolist()  # a row that goes on
    ended = draw(eos_id=eos)
    assert torch.equal(ended[1], free[1])
    for row, whole in zip(ended[:, 3:], free[:, 3:], strict=True):
        first = min([*(whole == eos).nonzero()[:, 0].tolist(), 12])
        assert torch.equal(row[:first], whole[:first])
        assert (row[first:] == eos).all()
    eos = int(draw(prompt[:1])[0, 3])
    assert draw(prompt[:1], eos_id=eos).shape == (1, 4)
    assert torch.equal(model.generate(prompt, 0), prompt)


def test_new_weights():
    model = Transformer(1000, 256, 4, 4, position="none", shared_layers=2)
    std = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert std["embedding.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["layers.3.up_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["layers.3.down_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)
    assert model.layers[0].attention.q_proj.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("'vocab_size'", {"vocab_size": 0}),
        ("'num_layers'", {"num_layers": 1.5}),
        ("'d_ff'", {"d_ff": -1}),
        ("'shared_layers'", {"shared_layers": True}),
        ("'position'", {"position": "relative"}),
        ("'position'", {"position": ["t5"]}),
        ("'activation'", {"activation": "tanh"}),
        ("'norm'", {"norm": "rms"}),
        ("'dropout'", {"dropout": 1.0}),
        ("'gate'", {"gate": 1}),
        ("'position_options'", {"position_options": ["per_head"]}),
        ("'max_length'", {"position": "absolute"}),
        ("'max_length'", {"max_length": 5}),
        ("'d_model'", {"position": "sinusoidal", "d_model": 9, "num_heads": 3}),
        ("'widths'", {"position_options": {"widths": [1]}}),
        ("'max_distance'", {"position": "alibi", "max_distance": 3}),
        ("'max_distance'", {"position": "none", "max_distance": 3}),
        ("'num_kv_heads'", {"position": "window", "num_kv_heads": 1}),
        ("'max_distance'", {"position": "position_only"}),
        ("'rotary'", {"position": "rotary", "position_options": {"rotary": 3}}),
    ],
)
def test_bad_settings_name_the_argument(named, settings):
    settings = {"vocab_size": 5, "d_model": 8, "num_layers": 1, "num_heads": 2} | settings
    with pytest.raises((ValueError, TypeError), match=named):
        Transformer(**settings)


@pytest.mark.parametrize(
    ("named", "call"),
    [
        ("'tokens'", {"tokens": torch.zeros(2, 3)}),
        ("'tokens'", {"tokens": torch.zeros(3, dtype=torch.long)}),
        ("'tokens'", {"tokens": torch.full((2, 3), VOCAB)}),
        ("'tokens'", {"tokens": torch.full((2, 3), -1)}),
        ("'tokens'", {"tokens": torch.zeros(1, 25, dtype=torch.long)}),
        ("'cu_seqlens'", {"tokens": torch.zeros(1, 40, dtype=torch.long), "cu_seqlens": torch.tensor([0, 10, 40])}),
        ("'cache'", {"cache": KeyValueCache()}),
        ("'cache'", {"cache": [KeyValueCache()]}),
        ("'key_padding_mask'", {"key_padding_mask": torch.ones(2, 4).bool()}),
    ],
)
def test_bad_calls_name_the_argument(named, call):
    model = build("absolute")
    call = {"tokens": torch.zeros(2, 3, dtype=torch.long)} | call
    with pytest.raises((ValueError, TypeError), match=named):
        model(call.pop("tokens"), **call)


@pytest.mark.parametrize(
    ("named", "call"),
    [
        ("'prompt'", {"prompt": torch.zeros(2, 0, dtype=torch.long)}),
        ("'tokens'", {"prompt": torch.zeros(2, 3)}),
        ("'max_new_tokens'", {"max_new_tokens": -1}),
        ("'max_new_tokens'", {"max_new_tokens": 23}),
        ("'key_padding_mask'", {"key_padding_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()}),
        ("'temperature'", {"temperature": -1}),
        ("'temperature'", {"temperature": float("nan")}),
        ("'top_k'", {"top_k": 0}),
        ("'top_k'", {"top_k": VOCAB + 1}),
        ("'eos_id'", {"eos_id": VOCAB}),
    ],
)
def test_bad_decoding_names_the_argument(named, call):
    call = {"prompt": torch.zeros(2, 3, dtype=torch.long), "max_new_tokens": 2} | call
    with pytest.raises((ValueError, TypeError), match=named):
        build("absolute").generate(**call)
    with pytest.raises(ValueError, match="'causal'"):
        build("none", causal=False).generate(tokens_of(), 1)


def test_adapters_find_its_projections():
    model, tokens = build("rotary"), tokens_of()
    before = model(tokens)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    lora.inject(model, adapters={"actor": lora.LoRAConfig(r=2)}, target_modules=names)
    with lora.off(model):
        assert torch.equal(model(tokens), before)
    adapters = lora.adapter_parameters(model, "actor")
    assert len(adapters) == 2 * 2 * len(names)
