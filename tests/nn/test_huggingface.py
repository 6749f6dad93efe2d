"""Models of transformers on ``relative_attention``, against transformers' own attention."""

from __future__ import annotations

import functools
import json
import logging

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    StaticCache,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, build_relative_position

from kernelab.nn.huggingface import interface, register, relative_bert, replace_disentangled_attention
from kernelab.ops import relative_attention

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5_SIZES = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5_SIZES |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
CAUSAL = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2)),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES)),
    "phi": (PhiForCausalLM, PhiConfig(**SIZES)),
}
MODELS = CAUSAL | {
    "bert": (BertForMaskedLM, BertConfig(**SIZES)),
    "bert-decoder": (BertLMHeadModel, BertConfig(**SIZES, is_decoder=True)),
}


@pytest.fixture(autouse=True)
def _registered():
    torch.manual_seed(0)
    register()
    interface.say.cache_clear()


@pytest.fixture
def no_sdpa(monkeypatch):
    """Nothing may go through tensors of the size of the scores."""

    def refuse(*_, **__):
        raise AssertionError("went through sdpa_attention_forward")

    monkeypatch.setattr(interface, "sdpa_attention_forward", refuse)


def build(model_class, config, dtype=torch.float64) -> nn.Module:
    """A model in evaluation whose parameters, norms and biases too, are random."""
    model = model_class(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


def tokens(batch=3, length=17, left=False):
    """Token ids and their mask; row b has b padding tokens."""
    ids = torch.randint(3, 40, (batch, length))
    place = torch.arange(length).flip(0) if left else torch.arange(length)
    return ids, (place < length - torch.arange(batch)[:, None]).long()


def results(model, *args, valid, **kwargs):
    """The logits at valid places, and the gradients."""
    model.zero_grad()
    logits = model(*args, **kwargs).logits[valid.bool()]
    cotangent = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(logits, list(model.parameters()), cotangent, allow_unused=True)
    return {"logits": logits.detach(), **dict(zip(dict(model.named_parameters()), grads, strict=True))}


def assert_same(ours, expected, tolerance=1e-10):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert ours[name] is None, name
        else:
            error = (ours[name] - value).abs().max().item()
            assert error <= tolerance * max(1.0, value.abs().max().item()), (name, error)


def compare(model, *args, **kwargs):
    """kernelab attention and torch's in the same model. Eager attention works in float32."""
    model.set_attn_implementation("sdpa")
    expected = results(model, *args, **kwargs)
    model.set_attn_implementation("kernelab")
    assert_same(results(model, *args, **kwargs), expected)


@pytest.mark.usefixtures("no_sdpa")
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_as_with_sdpa(name, padding):
    ids, mask = tokens(left=padding == "left")
    valid = torch.ones_like(mask) if padding == "none" else mask
    compare(build(*MODELS[name]), ids, attention_mask=None if padding == "none" else mask, valid=valid)


@pytest.mark.usefixtures("no_sdpa")
@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_may_be_asked_to_look_both_ways(padded):
    ids, mask = tokens()
    valid = mask if padded else torch.ones_like(mask)
    compare(build(*MODELS["llama"]), ids, attention_mask=mask if padded else None, valid=valid, is_causal=False)


@pytest.mark.usefixtures("no_sdpa")
@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_a_cache_equals_sdpa(name):
    model = build(*CAUSAL[name])
    ids, mask = tokens(left=True)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for implementation in ("sdpa", "kernelab"):
        model.set_attn_implementation(implementation)
        found.append(model.generate(ids, attention_mask=mask, pad_token_id=0, **options))
    assert torch.equal(found[1].sequences, found[0].sequences)
    torch.testing.assert_close(torch.stack(found[1].logits), torch.stack(found[0].logits), atol=1e-10, rtol=0)


def test_a_static_cache_and_a_continued_one_equal_sdpa():
    model = build(*MODELS["llama"])
    ids, mask = tokens(left=True)
    static = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    found = []
    for implementation in ("sdpa", "kernelab"):
        model.set_attn_implementation(implementation)
        generated = model.generate(ids, attention_mask=mask, pad_token_id=0, **static)
        cache = model(ids[:, :7]).past_key_values
        found.append((generated, model(ids[:, 7:], past_key_values=cache).logits))  # 10 queries, 17 keys
    assert torch.equal(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-10, rtol=0)


def test_float32_and_a_model_loaded_for_kernelab(tmp_path):
    build(*MODELS["bert"], torch.float32).save_pretrained(tmp_path)
    ids, mask = tokens()
    eager = BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="eager")
    ours = BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="kernelab")
    valid = mask.bool()
    difference = ours(ids, attention_mask=mask).logits[valid] - eager(ids, attention_mask=mask).logits[valid]
    assert difference.abs().max() < 1e-5


def sliding_window():
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5)
    ids, mask = tokens(left=True)
    return MistralForCausalLM, config, {"input_ids": ids, "attention_mask": mask, "valid": mask}


def packed_positions():
    ids, _ = tokens(batch=1)
    positions = torch.cat([torch.arange(6), torch.arange(11)])[None]
    return *MODELS["llama"], {
        "input_ids": ids,
        "position_ids": positions,
        "use_cache": False,
        "valid": torch.ones_like(ids),
    }


def mask_of_the_user():
    ids, _ = tokens(batch=2)
    mask = torch.rand(2, 1, 17, 17) < 0.5
    mask = (mask | torch.eye(17, dtype=torch.bool)).double().log().clamp(min=-1e300)
    return *MODELS["llama"], {"input_ids": ids, "attention_mask": mask, "valid": torch.ones_like(ids)}


@pytest.mark.parametrize("case", [sliding_window, packed_positions, mask_of_the_user])
def test_other_masks_go_through_sdpa_and_the_log_says_so(case, caplog):
    model_class, config, kwargs = case()
    with caplog.at_level(logging.WARNING, "kernelab"):
        compare(build(model_class, config), **kwargs)
    (message,) = (record.message for record in caplog.records)
    assert "a mask of its own for every query" in message


def test_dropout_goes_through_sdpa_with_the_same_draws(caplog):
    ids, mask = tokens(left=True)
    model = build(LlamaForCausalLM, LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    found = []
    for implementation in ("sdpa", "kernelab"):
        model.set_attn_implementation(implementation)
        torch.manual_seed(3)
        with caplog.at_level(logging.WARNING, "kernelab"):
            found.append(results(model, ids, attention_mask=mask, valid=mask))
    assert_same(*found)
    assert [record.message for record in caplog.records] == [
        "kernelab attention: dropout of attention weights goes through torch's scaled_dot_product_attention"
    ]


def test_a_mask_says_more_than_the_layer_does():
    query, key, value = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64).unbind()
    mask = torch.rand(2, 7) < 0.7
    mask[:, 0] = True
    for causal, shaped in ((True, mask[:, None]), (False, mask[:, None, None])):
        layer = nn.Module()
        layer.is_causal = not causal
        out, _ = interface.attention(layer, query, key, value, shaped)
        exact = relative_attention(query, key, value, causal=causal, key_padding_mask=mask)
        torch.testing.assert_close(out, exact.transpose(1, 2))


def test_the_mask_of_keys_follows_the_window_of_a_cache():
    padding = torch.rand(2, 9) < 0.5  # of 9 tokens the cache has the last 6
    found = interface.mask(2, 1, 6, q_offset=8, kv_offset=3, attention_mask=padding)
    assert torch.equal(found, padding[:, None, 3:])
    assert interface.mask(2, 4, 9, q_offset=3, attention_mask=padding).shape == (2, 1, 4, 9)  # not at the end


def test_what_cannot_be_computed_is_refused_by_name():
    ids, _ = tokens()
    gemma = build(Gemma2ForCausalLM, Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))
    gemma.set_attn_implementation("kernelab")
    with pytest.raises(ValueError, match=r"'softcap'.*eager"):
        gemma(ids)
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    with pytest.raises(ValueError, match=r"'output_attentions'.*eager"):
        interface.attention(nn.Module(), q, k, v, None, output_attentions=True)
    with pytest.raises(ValueError, match=r"'attention_mask'.*kernelab mask function"):
        interface.attention(nn.Module(), q, k, v, torch.ones(1, 5, dtype=torch.bool))


@pytest.mark.usefixtures("no_sdpa")
@pytest.mark.parametrize(
    ("model_class", "config"), [(T5ForConditionalGeneration, T5Config), (MT5ForConditionalGeneration, MT5Config)]
)
def test_t5_trains_and_generates_without_a_bias_of_pairs(model_class, config, monkeypatch):
    model = build(model_class, config(**T5_SIZES, dropout_rate=0.0, decoder_start_token_id=0))
    ids, mask = tokens(length=30)
    answer, _ = tokens(length=20)
    compare(model, ids, attention_mask=mask, decoder_input_ids=answer, valid=torch.ones_like(answer))
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in model.state_dict()
    shapes = []
    monkeypatch.setattr(interface, "relative_attention", spy(interface.relative_attention, shapes))
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=6)
    assert set(shapes) == {(4, 25), (4, 1)}  # distances -12..12, and cross-attention
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model.generate(ids, attention_mask=mask, max_new_tokens=6))


@pytest.mark.usefixtures("no_sdpa")
def test_t5_with_checkpoints_has_the_same_gradients():
    model = build(T5ForConditionalGeneration, T5Config(**T5_SIZES, dropout_rate=0.0, decoder_start_token_id=0))
    model.set_attn_implementation("kernelab")
    ids, mask = tokens(length=30)
    answer, _ = tokens(length=20)
    arguments = {"attention_mask": mask, "decoder_input_ids": answer, "valid": torch.ones_like(answer)}
    expected = results(model.train(), ids, **arguments)
    model.activation_checkpointing_enable()
    assert_same(results(model, ids, **arguments), expected)


def spy(function, shapes):
    def called(*args, bias, **kwargs):
        shapes.append(tuple(bias.shape))
        return function(*args, bias=bias, **kwargs)

    return called


def test_t5_with_a_static_cache_and_with_dropout():
    model = build(T5ForConditionalGeneration, T5Config(**T5_SIZES, dropout_rate=0.4, decoder_start_token_id=0))
    ids, mask = tokens(length=30)
    answer, _ = tokens(length=20)
    options = {"max_new_tokens": 5, "cache_implementation": "static", "disable_compile": True}
    layer = model.encoder.block[0].layer[0].SelfAttention
    found = []
    for implementation in ("sdpa", "kernelab"):
        model.set_attn_implementation(implementation)
        assert layer.compute_bias(2, 9, past_seen_tokens=4).shape == (1, 4, 2, 9)
        generated = model.eval().generate(ids, attention_mask=mask, **options)
        torch.manual_seed(3)
        trained = results(
            model.train(), ids, attention_mask=mask, decoder_input_ids=answer, valid=torch.ones_like(answer)
        )
        found.append((generated, trained))
    assert torch.equal(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])


OLD = {"relative_key": ("query",), "relative_key_query": ("query", "key")}


def einsum_attention(module, query, key, value, attention_mask, terms, **_):
    """As transformers 4 had it: a row of the table for every pair, queries ending where keys do."""
    queries, keys = query.shape[2], key.shape[2]
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    rows = module.distance_embedding(i - j + module.config.max_position_embeddings - 1)  # [Nq, Nk, D]
    scores = query @ key.mT
    if "query" in terms:
        scores = scores + torch.einsum("bhid,ijd->bhij", query, rows)
    if "key" in terms:
        scores = scores + torch.einsum("bhjd,ijd->bhij", key, rows)
    scores = scores / query.shape[3] ** 0.5
    if attention_mask is not None:
        visible = attention_mask[:, 0, 0] if attention_mask.dim() == 4 else attention_mask[:, 0]
        scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
    if module.is_causal:
        scores = scores.masked_fill(j > i, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def relative(model_class, config_class, kind, dtype=torch.float64, **changes):
    config = config_class(**SIZES, max_position_embeddings=24, position_embedding_type=kind, **changes)
    return build(relative_bert(model_class), config, dtype)


def by_einsum(monkeypatch, kind, compute):
    with monkeypatch.context() as patch:
        replaced = functools.partial(einsum_attention, terms=OLD[kind])
        patch.setitem(AttentionInterface._global_mapping, "kernelab", replaced)
        return compute()


@pytest.mark.usefixtures("no_sdpa")
@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize(
    ("model_class", "config_class"), [(BertForMaskedLM, BertConfig), (RobertaForMaskedLM, RobertaConfig)]
)
def test_relative_positions_give_the_logits_and_gradients_of_the_einsum(model_class, config_class, kind, monkeypatch):
    model = relative(model_class, config_class, kind)
    ids, mask = tokens()
    compute = functools.partial(results, model, ids, attention_mask=mask, valid=mask)
    ours, expected = compute(), by_einsum(monkeypatch, kind, compute)
    assert_same(ours, expected)
    (prefix,) = (name for name in ours if name.endswith("layer.1.attention.self.distance_embedding.weight"))
    assert ours[prefix].abs().max() > 0
    assert all(grad is None for name, grad in ours.items() if name.endswith("embeddings.position_embeddings.weight"))


@pytest.mark.parametrize("kind", OLD)
def test_an_old_checkpoint_loads_by_its_names_and_gives_its_logits(kind, monkeypatch, tmp_path):
    config = BertConfig(**SIZES, max_position_embeddings=24, position_embedding_type=kind)
    plain = BertForMaskedLM(config)
    old = {name: torch.randn_like(value) * 0.1 for name, value in plain.state_dict().items()}
    old |= {f"bert.encoder.layer.{n}.attention.self.distance_embedding.weight": torch.randn(47, 8) for n in range(2)}
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"]
    model = relative_bert(BertForMaskedLM)(config).eval()
    model.load_state_dict(old)
    ids, mask = tokens()

    def compute():
        return model(ids, attention_mask=mask).logits[mask.bool()]

    ours = compute()
    assert (ours - by_einsum(monkeypatch, kind, compute)).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert saved.keys() <= old.keys()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    loaded, report = relative_bert(BertForMaskedLM).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    ids, mask = ids[:, :9], mask[:, :9]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_relative_positions_decode_with_a_cache(monkeypatch):
    model = relative(BertLMHeadModel, BertConfig, "relative_key_query", is_decoder=True)
    ids, mask = tokens(left=True)
    compute = functools.partial(results, model, ids, attention_mask=mask, valid=mask)
    assert_same(compute(), by_einsum(monkeypatch, "relative_key_query", compute))
    whole = model(ids[:1]).logits
    cache = model(ids[:1, :9]).past_key_values
    parts = [model(ids[:1, 9:13], past_key_values=cache).logits]
    parts += [model(ids[:1, n : n + 1], past_key_values=cache).logits for n in range(13, 17)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, 9:], atol=1e-10, rtol=0)
    static = StaticCache(model.config, max_cache_len=20)
    with pytest.raises(ValueError, match="StaticCache"):
        model(ids[:1], past_key_values=static)


@pytest.mark.parametrize("causal", [False, True])
def test_tables_written_out_for_every_pair_are_the_same_function(causal):
    """What dropout takes, with a probability that drops nothing."""
    query, key, value = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64).unbind()
    query_table, key_table = torch.randn(2, 1, 5, 8, dtype=torch.float64).unbind()
    tables = {"query_table": query_table, "key_table": key_table, "bias": torch.randn(4, 9, dtype=torch.float64)}
    padding = torch.rand(2, 7) < 0.7
    padding[:, 0] = True
    for visible in (interface._Visible(causal), interface._Visible(causal, padding)):
        for queries in (1, 3, 7):
            last = query[:, :, -queries:]
            rest = visible, tables, None, 0.0, 0.3
            written, _ = interface._by_sdpa(nn.Module(), last, key, value, *rest)
            fused = relative_attention(
                last, key, value, **tables, causal=causal, key_padding_mask=visible.padding, scale=0.3
            )
            torch.testing.assert_close(written, fused.transpose(1, 2))


def test_relative_bert_refuses_what_would_lose_the_positions():
    with pytest.raises(TypeError, match="'model_class'"):
        relative_bert(nn.Linear)
    with pytest.raises(ValueError, match=r"position_embedding_type.*relative_key.*absolute"):
        relative_bert(BertForMaskedLM)(BertConfig(**SIZES, position_embedding_type="absolute"))
    for model_class, config in ((LlamaForCausalLM, LlamaConfig), (DebertaV2ForMaskedLM, DebertaV2Config)):
        with pytest.raises(TypeError, match=r"attention\.self"):
            relative_bert(model_class)(config(**SIZES, position_embedding_type="relative_key"))
    model = relative(BertForMaskedLM, BertConfig, "relative_key")
    ids, _ = tokens(length=25)
    with pytest.raises(ValueError, match="24 tokens of distance_embedding"):
        model(
            inputs_embeds=torch.randn(1, 25, 32),
            position_ids=torch.zeros(1, 25, dtype=torch.long),
            token_type_ids=torch.zeros(1, 25, dtype=torch.long),
        )
    model.bert.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation"):
        model(ids[:, :5])


DEBERTA = {"pos_att_type": ["p2c", "c2p"], "relative_attention": True, "norm_rel_ebd": "layer_norm"}
DEBERTAS = {
    "v3": {**DEBERTA, "share_att_key": True, "position_buckets": 6, "max_relative_positions": 11},
    "separate-projections": {**DEBERTA, "position_buckets": 6, "max_relative_positions": 11},
    "no-buckets": {**DEBERTA, "max_relative_positions": 9},
    "c2p": {**DEBERTA, "pos_att_type": ["c2p"], "norm_rel_ebd": "none"},
    "p2c-convolution": {**DEBERTA, "pos_att_type": ["p2c"], "conv_kernel_size": 3},
    "no-positions": {"pos_att_type": ["c2p"]},
}


def deberta(name="v3", **changes):
    return build(DebertaV2ForMaskedLM, DebertaV2Config(**SIZES, **DEBERTAS[name], **changes))


@pytest.mark.parametrize("name", DEBERTAS)
def test_deberta_gives_the_logits_and_gradients_of_transformers(name, monkeypatch):
    model = deberta(name)
    ids, mask = tokens()
    names = list(model.state_dict())
    expected = results(model, ids, attention_mask=mask, valid=mask)
    assert replace_disentangled_attention(model) is model
    assert list(model.state_dict()) == names
    monkeypatch.setattr(DisentangledSelfAttention, "forward", None)
    assert_same(results(model, ids, attention_mask=mask, valid=mask), expected, 1e-6)  # scales are float32 there
    replace_disentangled_attention(model)  # again is no error


def test_deberta_drops_the_same_features():
    model = deberta(hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.0).train()
    ids, mask = tokens()
    found = []
    for change in (lambda model: model, replace_disentangled_attention):
        torch.manual_seed(3)
        found.append(results(change(model), ids, attention_mask=mask, valid=mask))
    assert_same(found[1], found[0], 1e-6)


@pytest.mark.parametrize(("buckets", "most"), [(6, 11), (4, 3), (2, 30), (16, 20), (-1, 9), (256, 512)])
def test_deberta_has_one_row_for_all_distances_beyond(buckets, most):
    config = DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["c2p"], position_buckets=buckets, max_relative_positions=most
    )
    layer = deberta_layer(config)
    rows = torch.randn(2 * (buckets if buckets > 0 else most), 32)
    length = min(3 * most, most + 64)
    longest, longer = (layer.tables(tokens, rows)["query_table"] for tokens in (most + 1, length))
    assert longest.shape == longer.shape == (4, 2 * most + 1, 8)
    index = torch.arange(length)
    index = build_relative_position(index[:, None], index[:, None], buckets, most)[0] + len(rows) // 2
    exact = layer.pos_key_proj(rows).view(-1, 4, 8)[index.clamp(0, len(rows) - 1)]  # [Nq, Nk, H, D]
    kept = longer[:, (torch.arange(length) - torch.arange(length)[:, None]).clamp(-most, most) + most]
    torch.testing.assert_close(kept, exact.permute(2, 0, 1, 3))


def deberta_layer(config):
    return replace_disentangled_attention(DisentangledSelfAttention(config)).eval()


def test_deberta_goes_the_old_way_where_it_must(caplog):
    ids, mask = tokens()
    pairs = (torch.rand(3, 17, 17) < 0.7).long() | torch.eye(17, dtype=torch.long)
    hidden = torch.randn(3, 17, 32, dtype=torch.float64)
    positions = torch.randint(-5, 6, (1, 17, 17))
    model = deberta(attention_probs_dropout_prob=0.4)

    def compute():
        torch.manual_seed(3)
        dropped = results(model.train(), ids, attention_mask=mask, valid=mask)
        masked = model.eval().deberta.encoder(hidden, pairs).last_hidden_state
        placed = model.deberta.encoder(hidden, mask, relative_pos=positions).last_hidden_state[mask.bool()]
        weights = model(ids, output_attentions=True).attentions
        return dropped, masked, placed, weights

    expected = compute()
    replace_disentangled_attention(model)
    with caplog.at_level(logging.WARNING, "kernelab"):
        dropped, *others = compute()
    assert_same(dropped, expected[0])
    torch.testing.assert_close(others, list(expected[1:]))
    assert [record.message.split(" goes ")[0].split(": ")[1] for record in caplog.records] == [
        "dropout of attention weights",
        "a mask of its own for every query",
        "positions of the caller",
        "output_attentions",
    ]
    with pytest.raises(ValueError, match="DeBERTa-v2 layers"):
        replace_disentangled_attention(nn.Linear(2, 2))


def t5():
    model = T5EncoderModel(T5Config(**T5_SIZES, dropout_rate=0.0))
    model.set_attn_implementation("kernelab")
    return model


def llama():
    model = LlamaForCausalLM(MODELS["llama"][1])
    model.set_attn_implementation("kernelab")
    return model


def old_bert():
    return relative_bert(BertForMaskedLM)(
        BertConfig(**SIZES, max_position_embeddings=800, position_embedding_type="relative_key_query")
    ).eval()


def new_deberta():
    config = DebertaV2Config(**SIZES, **DEBERTAS["v3"], max_position_embeddings=800)
    return replace_disentangled_attention(DebertaV2ForMaskedLM(config).eval())


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operator makes; kernelab's ops are one operator each."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("make", [t5, llama, old_bert, new_deberta])
def test_no_tensor_has_an_element_for_every_pair(make):
    model = make()
    ids, mask = tokens(batch=1, length=500)
    with Largest() as largest:
        model(ids, attention_mask=mask)[0].sum().backward()
    assert largest.elements < 500 * 500
