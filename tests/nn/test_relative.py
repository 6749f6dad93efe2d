"""Every scheme of relative positions against its N x N formula, built from the module's weights."""

from __future__ import annotations

import pytest
import torch
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.models.t5.modeling_t5 import T5Attention

from kernelab.nn import (
    ALiBi,
    Disentangled,
    KeyValueCache,
    RelativeAttention,
    RelativeKey,
    RelativeKeyQuery,
    RotaryAttention,
    T5Bias,
)
from kernelab.nn.positions import alibi_slopes, log_buckets, rotate
from kernelab.nn.schemes import select
from tests.nn import explicit

WIDTH, HEADS, DIM, TOKENS = 24, 4, 5, 13
SCHEMES = {
    "relative_key": {"max_distance": 4, "per_head": True, "value": True},
    "relative_key_query": {"max_distance": 3},
    "disentangled": {"max_distance": 9, "num_buckets": 4},
    "t5": {"max_distance": 7, "num_buckets": 8},
    "alibi": {"trainable": True},
}


def build(position, causal=False, num_kv_heads=2, **options):
    torch.manual_seed(1)
    module = RelativeAttention(
        WIDTH, HEADS, position=position, num_kv_heads=num_kv_heads, head_dim=DIM, causal=causal, **options
    ).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def rows_of(table, reverse=False):
    """[H or 1, N, N, D] from a table [H or 1, 2K+1, D]."""
    reach = table.shape[1] // 2
    distance = explicit.distances(TOKENS).clamp(-reach, reach)
    return table[:, (-distance if reverse else distance) + reach]


def query_term(q, rows):
    return torch.einsum("bhid,hijd->bhij", q, rows.expand(q.shape[1], -1, -1, -1))


def key_term(k, rows):
    return torch.einsum("bhjd,hijd->bhij", k, rows.expand(k.shape[1], -1, -1, -1))


def check(module, scores=None, value_rows=lambda: None, rotation=lambda t: t):
    """Output and every gradient, plain, padded and packed."""
    mask = torch.rand(2, TOKENS) < 0.7
    bounds = torch.tensor([0, 6, 7, TOKENS])
    for batch, visibility in ((2, {}), (2, {"key_padding_mask": mask}), (1, {"cu_seqlens": bounds})):
        x = torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
        seen = explicit.visible(TOKENS, TOKENS, module.causal, *_either(visibility))
        names, parameters = zip(*module.named_parameters(), strict=True)
        inputs = [x, *parameters]
        ours = module(x, **visibility)
        wanted = explicit.attention(module, x, seen, scores=scores, rotate=rotation, value_rows=value_rows())
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
        cotangent = torch.randn_like(ours)
        grads = torch.autograd.grad(ours, inputs, cotangent)
        references = torch.autograd.grad(wanted, inputs, cotangent)
        for name, got, grad in zip(["x", *names], grads, references, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-8, atol=1e-9)
            constant_in_a_row = name in ("k_proj.bias", "position.pos_key_proj.bias")
            assert constant_in_a_row or got.abs().sum() > 1e-3, name


def _either(visibility):
    return visibility.get("key_padding_mask"), visibility.get("cu_seqlens")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_relative_key(causal, reverse):
    module = build("relative_key", causal, query_minus_key=reverse, **SCHEMES["relative_key"])
    table, value_table = module.position.table, module.position.value_table

    def scores(q, k):
        return (q @ k.mT + query_term(q, rows_of(table, reverse))) * DIM**-0.5

    check(module, scores, lambda: rows_of(value_table, reverse))


@pytest.mark.parametrize("reverse", [False, True])
def test_relative_key_query(reverse):
    module = build("relative_key_query", query_minus_key=reverse, **SCHEMES["relative_key_query"])

    def scores(q, k):
        rows = rows_of(module.position.table, reverse)
        return (q @ k.mT + query_term(q, rows) + key_term(k, rows)) * DIM**-0.5

    check(module, scores)


@pytest.mark.parametrize("causal", [False, True])
def test_t5(causal):
    module = build("t5", causal, **SCHEMES["t5"])
    bucket = T5Attention._relative_position_bucket(explicit.distances(TOKENS), not causal, 8, 7)

    def scores(q, k):
        bias = module.position.relative_attention_bias(bucket).permute(2, 0, 1)
        return q @ k.mT * DIM**-0.5 + bias

    check(module, scores)


def test_alibi():
    module = build("alibi", causal=True, trainable=True)

    def scores(q, k):
        bias = -module.position.slopes[:, None, None] * explicit.distances(TOKENS).abs()
        return q @ k.mT * DIM**-0.5 + bias

    check(module, scores)
    fixed = RelativeAttention(WIDTH, HEADS, position="alibi")
    bias = fixed.position(fixed, 3, {})["bias"]
    torch.testing.assert_close(bias, -alibi_slopes(HEADS)[:, None] * torch.tensor([3.0, 2, 1, 0, 1, 2, 3]))
    assert fixed.bfloat16().position(fixed, 3, {})["bias"].dtype == torch.float32


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("buckets", [None, 4])
def test_disentangled_is_debertas(share, buckets):
    module = build("disentangled", num_kv_heads=HEADS, max_distance=9, num_buckets=buckets, share_att_key=share)
    position = module.position
    config = DebertaV2Config(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, relative_attention=True, pos_att_type=["c2p", "p2c"],
        position_buckets=buckets or -1, max_relative_positions=9, share_att_key=share, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    peer = DisentangledSelfAttention(config).double()
    peer.query_proj, peer.key_proj, peer.value_proj = module.q_proj, module.k_proj, module.v_proj
    if not share:
        peer.pos_key_proj, peer.pos_query_proj = position.pos_key_proj, position.pos_query_proj

    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    mask = torch.rand(2, TOKENS) < 0.7
    together = mask[:, None, None] & torch.ones(TOKENS, 1, dtype=torch.bool)
    embeddings = position.rel_embeddings.weight
    inputs = list(module.parameters())
    wanted = module.o_proj(peer(x, together, rel_embeddings=embeddings)[0])
    ours = module(x, key_padding_mask=mask)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)  # the peer takes its scale in float32
    cotangent = torch.randn_like(ours)
    for got, grad in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (ours, wanted)), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [False, True])
def test_disentangled_with_grouped_heads_causal_padded_and_packed(share):
    module = build("disentangled", causal=True, max_distance=9, num_buckets=4, share_att_key=share)
    position, group = module.position, HEADS // module.num_kv_heads

    def scores(q, k):
        bucket = (log_buckets(-explicit.distances(TOKENS), 4, 9) + 4).clamp(0, 7)
        e = position.rel_embeddings.weight[None]
        if share:
            kr = explicit.project(module.k_proj, e, module.num_kv_heads)[0].repeat_interleave(group, 0)
            qr = explicit.project(module.q_proj, e, HEADS)[0]
        else:
            kr, qr = (explicit.project(p, e, HEADS)[0] for p in (position.pos_key_proj, position.pos_query_proj))
        return (q @ k.mT + query_term(q, kr[:, bucket]) + key_term(k, qr[:, bucket])) * (3 * DIM) ** -0.5

    check(module, scores)


def test_rotary():
    torch.manual_seed(1)
    module = RotaryAttention(WIDTH, HEADS, num_kv_heads=2, head_dim=6, rotary_dim=4, theta=50.0, causal=True).double()
    check(module, rotation=lambda t: rotate(t, torch.arange(TOKENS), 4, 50.0))


def make(name):
    if name == "rotary":
        return RotaryAttention(WIDTH, HEADS, num_kv_heads=2, head_dim=6, causal=True).double()
    return build(name, True, **SCHEMES[name])


@pytest.mark.parametrize("name", [*SCHEMES, "rotary"])
def test_cache_in_pieces_packed_documents_alone_and_state_round_trip(name):
    module = make(name)
    x = torch.randn(1, 23, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        whole, cache = module(x), KeyValueCache()
        parts = torch.cat([module(part, cache=cache) for part in x.split([4, 1, 1, 9, 8], dim=1)], 1)
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
        packed = module(x, cu_seqlens=torch.tensor([0, 9, 10, 23]))
        alone = torch.cat([module(part) for part in x.split([9, 1, 13], dim=1)], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)
        other = make(name)
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(x), whole)


def test_left_padding_does_not_change_what_follows():
    module = build("relative_key_query", True, **SCHEMES["relative_key_query"])
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    padded = torch.cat([torch.randn(1, 4, WIDTH, dtype=torch.float64), x], 1)
    mask = torch.arange(13)[None] >= 4
    torch.testing.assert_close(module(padded, key_padding_mask=mask)[:, 4:], module(x), rtol=1e-10, atol=1e-10)


def test_a_shared_scheme_sums_its_gradients():
    scheme = RelativeKey(HEADS, DIM, 4)
    first, second = (RelativeAttention(WIDTH, HEADS, head_dim=DIM, position=scheme) for _ in range(2))
    x = torch.randn(2, TOKENS, WIDTH)
    (first(x).square().sum() + second(x).square().sum()).backward()
    parts = sum(torch.autograd.grad(m(x).square().sum(), scheme.table)[0] for m in (first, second))
    torch.testing.assert_close(scheme.table.grad, parts)


def test_selection_in_training_and_decoding_is_the_same():
    table, row = torch.randn(2, 7, 3, requires_grad=True), torch.tensor([6, 0, 0, 3])
    with torch.no_grad():
        chosen = select(table, row)
    assert torch.equal(chosen, select(table, row))
    assert torch.equal(chosen, table[:, row])


@pytest.mark.parametrize(
    ("named", "make"),
    [
        ("'position'", lambda: RelativeAttention(8, 2, position="relative")),
        ("'position'", lambda: RelativeAttention(8, 2, position=3)),
        ("'widths'", lambda: RelativeAttention(8, 2, position="t5", widths=[1])),
        ("'max_distance'", lambda: RelativeAttention(8, 2, position=RelativeKey(2, 4), max_distance=3)),
        ("'max_distance'", lambda: RelativeKey(2, 4, 0)),
        ("'per_head'", lambda: RelativeKeyQuery(2, 4, 3, per_head=1)),
        ("'num_buckets'", lambda: Disentangled(8, 2, 4, 9, num_buckets=16)),
        ("'rel_embeddings'", lambda: Disentangled(8, 2, 4, 9, num_buckets=4, rel_embeddings=torch.nn.Embedding(9, 8))),
        ("'num_buckets'", lambda: T5Bias(2, num_buckets=3)),
        ("'max_distance'", lambda: T5Bias(2, 8)),
        ("'num_heads'", lambda: ALiBi(0)),
        ("'rotary_dim'", lambda: RotaryAttention(8, 2, rotary_dim=3)),
        ("'rotary_dim'", lambda: RotaryAttention(8, 2, rotary_dim=6)),
        ("'theta'", lambda: RotaryAttention(8, 2, theta=0)),
    ],
)
def test_bad_settings_name_the_argument(named, make):
    with pytest.raises((ValueError, TypeError), match=named):
        make()
