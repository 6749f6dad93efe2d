"""Statistics of attention against sums over the N x N map, float64."""

from __future__ import annotations

import pytest
import torch

from kernelab.nn import Transformer
from kernelab.nn.statistics import boundary_statistic, mean_weight_by_distance
from tests.nn import explicit

HEADS, DIM = 4, 6


def case(name):
    """Query, key, keywords, and the map [B, H, Nq, Nk] with its distances and what is visible."""
    torch.manual_seed(5)
    batch, queries, keys = {"packed": (1, 12, 12), "decoding": (2, 5, 12), "late": (2, 7, 12)}.get(name, (2, 12, 12))
    offset = 20 if name == "late" else keys - queries
    query, key = torch.randn(batch, HEADS, queries, DIM), torch.randn(batch, 2, keys, DIM)
    query, key, table, bias = (t.double() for t in (query, key, torch.randn(HEADS, 7, DIM), torch.randn(1, 5)))
    keywords = {"query_table": table, "bias": bias, "causal": name in ("causal", "packed", "decoding"), "scale": 0.7}
    mask = torch.rand(batch, keys) < 0.7 if name in ("masked", "packed") else None
    bounds = torch.tensor([0, 4, 5, 12]) if name == "packed" else None
    keywords |= {"key_padding_mask": mask, "cu_seqlens": bounds}
    if name == "late":
        keywords["query_offset"] = offset
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - offset
    rows = distance.clamp(-3, 3) + 3
    scores = query @ key.repeat_interleave(2, 1).mT
    scores = scores + torch.einsum("bhid,hijd->bhij", query, table[:, rows])
    scores = 0.7 * scores + bias[:, distance.clamp(-2, 2) + 2]
    seen = explicit.visible(keys, queries, keywords["causal"], mask, bounds).expand(batch, 1, queries, keys)
    return query, key, keywords, explicit.weights(scores, seen), distance, seen


CASES = ["plain", "causal", "masked", "packed", "decoding", "late"]


@pytest.mark.parametrize("name", CASES)
def test_mean_weight_by_distance(name):
    query, key, keywords, p, distance, seen = case(name)
    ours = mean_weight_by_distance(query, key, **keywords)
    reach = ours.shape[1] // 2
    assert reach == distance.abs().max()
    for d in range(-reach, reach + 1):
        at = seen & (distance == d)
        wanted = (p * at).sum(dim=(0, 2, 3)) / at.sum()
        torch.testing.assert_close(ours[:, reach + d], wanted, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert not ours.isnan().all()


@pytest.mark.parametrize("name", CASES)
def test_boundary_statistic(name):
    query, key, keywords, p, distance, seen = case(name)
    mean = mean_weight_by_distance(query, key, **keywords)
    usual = mean[:, distance + mean.shape[1] // 2].nan_to_num(0)  # [H, Nq, Nk]
    marks = [torch.rand(t.shape[0], t.shape[2]) < 0.4 for t in (query, key)]
    shifts = [-2, 0, 1, 30]
    ours = boundary_statistic(query, key, *marks, shifts, **keywords)
    assert ours.shape == (HEADS, 4, 4)
    for row, s in enumerate(shifts):
        for column, t in enumerate(shifts):
            total, count = torch.zeros(HEADS, dtype=torch.float64), 0
            for b, i, j in (marks[0][:, :, None] & marks[1][:, None]).nonzero().tolist():
                i, j = i + s, j + t
                if 0 <= i < query.shape[2] and 0 <= j < key.shape[2] and seen[b, 0, i, j]:
                    total += p[b, :, i, j] - usual[:, i, j]
                    count += 1
            wanted = total / count if count else torch.full_like(total, torch.nan)
            torch.testing.assert_close(ours[:, row, column], wanted, rtol=1e-9, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("position", ["rotary", "disentangled", "relative_key"])
def test_of_a_layer(position):
    options = {"position_options": {"value": True}} if position == "relative_key" else {}
    model = Transformer(9, 24, 1, 4, position=position, causal=True, **options).double()
    layer = model.layers[0]
    torch.nn.init.normal_(layer.attention.q_proj.weight)
    x = layer.attention_norm(model.embedding(torch.randint(9, (2, 7))))
    mask = torch.arange(7) > torch.tensor([[2], [-1]])
    arguments = layer.attention.scores_of(x, key_padding_mask=mask)
    mean = mean_weight_by_distance(**arguments)
    marks = torch.rand(2, 7) < 0.5
    assert boundary_statistic(**arguments, query_marks=marks, key_marks=marks).shape == (4, 1, 1)
    seen = explicit.visible(7, 7, True, mask)
    p = explicit.weights(_scores(arguments), seen)
    distance = explicit.distances(7)
    for d in range(-6, 1):
        at = seen & (distance == d)
        torch.testing.assert_close(mean[:, 6 + d], (p * at).sum(dim=(0, 2, 3)) / at.sum(), equal_nan=True)


def _scores(arguments):
    scores = arguments["query"] @ arguments["key"].mT
    for name, side in (("query_table", arguments["query"]), ("key_table", arguments["key"])):
        table = arguments.get(name)
        if table is not None:
            reach = table.shape[1] // 2
            rows = table[:, explicit.distances(7).clamp(-reach, reach) + reach].expand(4, -1, -1, -1)
            scores = scores + torch.einsum(f"bh{'i' if side is arguments['query'] else 'j'}d,hijd->bhij", side, rows)
    return scores * arguments.get("scale", arguments["query"].shape[3] ** -0.5)


def test_low_precision_is_summed_in_float32_and_nothing_is_differentiated():
    query, key, keywords, *_ = case("causal")
    low = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    query, key = query.bfloat16().requires_grad_(), key.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = mean_weight_by_distance(query, key, **low)
    high = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in low.items()}
    assert ours.dtype == torch.float32
    assert not ours.requires_grad
    assert query.grad is None
    torch.testing.assert_close(ours, mean_weight_by_distance(query.float(), key.float(), **high), equal_nan=True)


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("'value_table'", {"value_table": torch.zeros(1, 3, DIM)}),
        ("'query_marks'", {"query_marks": torch.ones(1, 4)}),
        ("'key_marks'", {"key_marks": torch.ones(1, 5).bool()}),
        ("'shifts'", {"shifts": [0.5]}),
        ("'causal'", {"causal": 1}),
        ("'query'", {"query": torch.randn(2, 4, DIM)}),
        ("'key'", {"key": [1.0]}),
    ],
)
def test_bad_arguments_are_named(named, change):
    query, marks = torch.randn(1, 2, 4, DIM), torch.ones(1, 4, dtype=torch.bool)
    call = {"query": query, "key": query, "query_marks": marks, "key_marks": marks} | change
    with pytest.raises((ValueError, TypeError), match=named):
        boundary_statistic(**call)


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 3), (1, 1)])
def test_no_and_one_query(queries, keys):
    mean = mean_weight_by_distance(torch.randn(1, 2, queries, DIM), torch.randn(1, 2, keys, DIM))
    assert mean.shape[0] == 2
    assert torch.equal(mean, torch.ones(2, 1)) if queries else mean.isnan().all()
