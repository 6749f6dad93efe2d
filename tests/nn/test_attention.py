"""Self-attention without positions and with rotary ones: projections, visibility, cache, flash-attn, errors."""

from __future__ import annotations

import pytest
import torch

from kernelab.nn import Attention, KeyValueCache, RotaryAttention
from kernelab.nn import attention as attention_file
from tests.nn import explicit

torch.manual_seed(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", ["plain", "masked", "packed"])
def test_plain_attention_is_the_formula(case, causal):
    attention = Attention(24, 4, num_kv_heads=2, head_dim=5, causal=causal).double()
    x = torch.randn(1 if case == "packed" else 3, 11, 24, dtype=torch.float64)
    mask = torch.rand(3, 11) < 0.6 if case == "masked" else None
    bounds = torch.tensor([0, 4, 4, 9, 11]) if case == "packed" else None
    out = attention(x, key_padding_mask=mask, cu_seqlens=bounds)
    wanted = explicit.attention(attention, x, explicit.visible(11, 11, causal, mask, bounds))
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)


def test_a_cache_filled_in_pieces_gives_the_whole():
    attention = Attention(24, 4, num_kv_heads=2, causal=True).double()
    x, cache = torch.randn(2, 40, 24, dtype=torch.float64), KeyValueCache()
    with torch.no_grad():
        parts = [attention(part, cache=cache) for part in x.split([3, 1, 1, 17, 18], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), attention(x), rtol=1e-10, atol=1e-10)
    assert cache.length == 40


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_is_called_as_it_wants_to_be(monkeypatch, packed):
    """A stand-in with flash-attn's layout: [B, N, H, D], or [N, H, D] and boundaries."""
    calls = []

    def one(query, key, value, causal):
        assert query.shape[2:] == (4, 6)
        assert key.shape[2:] == value.shape[2:] == (2, 6)
        calls.append("one")
        seen = explicit.visible(key.shape[1], query.shape[1], causal)  # flash-attn aligns the ends, too
        q, k, v = (t.transpose(1, 2) for t in (query, *(t.repeat_interleave(2, 2) for t in (key, value))))
        return (explicit.weights(q @ k.mT * 6**-0.5, seen) @ v).transpose(1, 2)

    def many(query, key, value, first, second, longest, longest_key, causal):
        assert first.dtype == second.dtype == torch.int32
        assert longest == longest_key >= (first[1:] - first[:-1]).max()
        parts = [t.split((first[1:] - first[:-1]).tolist()) for t in (query, key, value)]
        return torch.cat([one(q[None], k[None], v[None], causal)[0] for q, k, v in zip(*parts, strict=True)])

    attention = RotaryAttention(24, 4, num_kv_heads=2, causal=True).double()
    x = torch.randn(1 if packed else 2, 9, 24, dtype=torch.float64)
    bounds = torch.tensor([0, 4, 9]) if packed else None
    wanted = attention(x, cu_seqlens=bounds)
    monkeypatch.setattr(attention_file, "flash_attn_func", one)
    monkeypatch.setattr(attention_file, "flash_attn_varlen_func", many)
    monkeypatch.setattr(attention_file, "_flash_fits", lambda query: True)
    torch.testing.assert_close(attention(x, cu_seqlens=bounds), wanted)
    assert len(calls) == (2 if packed else 1)
    if not packed:
        cache = KeyValueCache()
        with torch.no_grad():
            pieces = [attention(part, cache=cache) for part in x.split([4, 3, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), wanted)
        attention(x, key_padding_mask=torch.ones(2, 9, dtype=torch.bool))
        assert len(calls) == 5  # padding is not flash-attn's


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_and_one_token(tokens):
    assert Attention(8, 2, causal=True)(torch.randn(2, tokens, 8)).shape == (2, tokens, 8)


@pytest.mark.parametrize(
    ("error", "named", "change"),
    [
        (ValueError, "'x'", {"x": torch.randn(2, 5, 9)}),
        (TypeError, "'x'", {"x": torch.ones(2, 5, 8, dtype=torch.long)}),
        (TypeError, "'key_padding_mask'", {"key_padding_mask": torch.ones(2, 5)}),
        (ValueError, "'key_padding_mask'", {"key_padding_mask": torch.ones(2, 6, dtype=torch.bool)}),
        (ValueError, "'cu_seqlens'", {"cu_seqlens": torch.tensor([0, 5])}),
        (TypeError, "'cu_seqlens'", {"x": torch.randn(1, 5, 8), "cu_seqlens": [0, 5]}),
        (ValueError, "'cu_seqlens'", {"x": torch.randn(1, 5, 8), "cu_seqlens": torch.tensor([0, 6])}),
        (TypeError, "'cache'", {"cache": []}),
        (ValueError, "requires|require no gradient", {"cache": KeyValueCache()}),
    ],
)
def test_bad_calls_name_the_argument(error, named, change):
    call = {"x": torch.randn(2, 5, 8)} | change
    with pytest.raises(error, match=named):
        Attention(8, 2, causal=True)(call.pop("x"), **call)


def test_a_cache_needs_causal_attention_and_stays_empty_after_an_error():
    cache = KeyValueCache()
    with pytest.raises(ValueError, match="'cache'"):
        Attention(8, 2)(torch.randn(1, 3, 8), cache=cache)
    with torch.no_grad(), pytest.raises(ValueError, match="'key_padding_mask'"):
        Attention(8, 2, causal=True)(torch.randn(1, 3, 8), key_padding_mask=torch.ones(1, 2).bool(), cache=cache)
    assert cache.length == 0


def test_a_cache_refuses_what_does_not_continue_it():
    cache = KeyValueCache()
    cache.append(torch.ones(2, 3, 4, 5))
    for wrong in (torch.ones(1, 3, 1, 5), torch.ones(2, 3, 1, 6), torch.ones(2, 3, 1, 5).half()):
        with pytest.raises(ValueError, match="as before"):
            cache.append(wrong)
    with pytest.raises(ValueError, match="1 tensors, as before"):
        cache.append(torch.ones(2, 3, 1, 5), torch.ones(2, 3, 1, 5))
    assert cache.length == 4


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("'num_heads'", (10, 4, {})),
        ("'d_model'", (0, 4, {})),
        ("'num_kv_heads'", (8, 4, {"num_kv_heads": 3})),
        ("'head_dim'", (8, 4, {"head_dim": 0})),
        ("'num_heads'", (8, True, {})),
        ("'causal'", (8, 4, {"causal": 1})),
    ],
)
def test_bad_settings_name_the_argument(named, settings):
    d_model, heads, rest = settings
    with pytest.raises((ValueError, TypeError), match=named):
        Attention(d_model, heads, **rest)
