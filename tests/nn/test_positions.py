"""Buckets, slopes, sinusoids and rotations against transformers' own, and positions of packed and padded tokens."""

from __future__ import annotations

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers.models.phi.modeling_phi import apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from kernelab._core.sequences import documents_of
from kernelab.nn.positions import alibi_slopes, log_buckets, rotate, sinusoids, t5_buckets, token_positions


@pytest.mark.parametrize(("buckets", "reach"), [(256, 512), (2, 7), (3, 9), (8, 16), (32, 33), (64, 2048)])
def test_log_buckets_are_debertas(buckets, reach):
    distance = torch.arange(-reach - 300, reach + 301)
    ours = log_buckets(distance, buckets, reach)
    assert torch.equal(ours, make_log_bucket_position(distance, buckets, reach).long())
    assert torch.equal(ours, -log_buckets(-distance, buckets, reach))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (4, 3), (7, 20), (64, 1000)])
def test_t5_buckets_are_t5s(buckets, reach, bidirectional):
    distance = torch.arange(-reach - 300, reach + 301)
    wanted = T5Attention._relative_position_bucket(distance, bidirectional, buckets, reach)
    assert torch.equal(t5_buckets(distance, buckets, reach, bidirectional), wanted)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 15, 20, 71])
def test_alibi_slopes_are_blooms(heads):
    wanted = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), wanted, rtol=1e-6, atol=0)


def test_rotation_is_phis_and_keeps_scores_of_equal_distance():
    x, position = torch.randn(2, 3, 9, 16, dtype=torch.float64), torch.arange(5, 14)
    angle = position[:, None] * 100.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    wanted, _ = apply_rotary_pos_emb(x[..., :12], x[..., :12], cos, sin)
    ours = rotate(x, position, 12, theta=100.0)
    torch.testing.assert_close(ours[..., :12], wanted)
    assert torch.equal(ours[..., 12:], x[..., 12:])
    later = rotate(x, position + 40, 12, theta=100.0)
    torch.testing.assert_close(ours @ ours.mT, later @ later.mT)


def test_rotation_in_bfloat16_loses_only_the_rounding_of_its_result():
    x, position = torch.randn(4, 8).bfloat16(), torch.tensor([3, 1000, 4001, 60_000])
    assert torch.equal(rotate(x, position, 8), rotate(x.float(), position, 8).bfloat16())


def test_sinusoids_are_the_formula():
    position = torch.tensor([[0, 3], [17, 500]])
    angle = position[..., None].double() / 10000 ** (torch.arange(4).double() / 4)
    wanted = torch.cat([angle.sin(), angle.cos()], -1)
    torch.testing.assert_close(sinusoids(position, 8).double(), wanted, rtol=1e-4, atol=1e-4)


def test_positions_start_again_with_each_document_and_after_padding():
    bounds = torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32)
    documents = documents_of("test", bounds, bounds, 1, 7)
    assert token_positions(7, documents=documents).tolist() == [0, 1, 2, 0, 0, 1, 2]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    assert token_positions(5, key_padding_mask=mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert token_positions(2, 3, key_padding_mask=mask).tolist() == [[1, 2], [3, 4], [3, 4]]
    assert token_positions(0, 3).tolist() == []
