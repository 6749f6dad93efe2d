"""What is special to ``relative_attention``: an independent definition, identities, packed documents, warnings."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F

from kernelab._core import registry
from kernelab._core.memory import LiveBytes
from kernelab.ops.relative_attention import relative_attention
from kernelab.ops.relative_attention.spec import SPECS
from tests.contract.error import BACKWARD, FORWARD, check

BACKENDS = [
    pytest.param(backend, marks=pytest.mark.interp if backend == "triton" else ())
    for backend in registry.backends("relative_attention")
]
NAMES = ("query_table", "key_table", "value_table", "bias")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(
    *, batch=2, heads=2, tokens=(21, 21), features=8, reach=4, tables=NAMES, of_tables=None, seed=0, dtype=torch.float32
):
    """Leaves in float32: query, key, value and the tables by name."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    queries, keys = tokens
    made = {"query": random(batch, heads, queries, features)}
    made |= {name: random(batch, heads, keys, features) for name in ("key", "value")}
    of_tables = of_tables or heads
    for name in tables:
        made[name] = random(of_tables, 2 * reach + 1, *([] if name == "bias" else [features]))
    return made


def gradients(arguments: dict, function=relative_attention, seed=1, **options):
    """``(output, {name: gradient})`` for a random cotangent."""
    out = function(**arguments, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    leaves = {name: t for name, t in arguments.items() if t is not None and t.requires_grad}
    return out.detach(), dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangent), strict=True))


def by_pairs(query, key, value, query_table=None, key_table=None, value_table=None, bias=None, causal=False, offset=0):
    """Every pair's rows of the tables, [Nq, Nk, D] of them, as the formula reads; query i at position i + offset."""
    queries, keys, heads = query.shape[2], key.shape[2], query.shape[1]
    distance = torch.arange(keys)[None] - torch.arange(queries)[:, None] - offset

    def rows(table):  # [Hq, Nq, Nk, *]
        reach = table.shape[1] // 2
        return table.expand(heads, *table.shape[1:])[:, distance.clamp(-reach, reach) + reach]

    scores = torch.einsum("bhid,bhjd->bhij", query, key)
    if query_table is not None:
        scores = scores + torch.einsum("bhid,hijd->bhij", query, rows(query_table))
    if key_table is not None:
        scores = scores + torch.einsum("bhjd,hijd->bhij", key, rows(key_table))
    scores = scores / query.shape[3] ** 0.5
    if bias is not None:
        scores = scores + rows(bias)
    if causal:
        scores = scores.masked_fill(distance > 0, -torch.inf)
    p = scores.softmax(-1)
    out = p @ value
    return out if value_table is None else out + torch.einsum("bhij,hijd->bhid", p, rows(value_table))


def doubled(arguments: dict) -> dict:
    return {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in arguments.items()}


def check_all(out, grads: dict, arguments: dict, **options) -> None:
    """The output and the gradients err as the contract allows, against the pairs one by one."""
    plain, plain_grads = gradients(arguments, by_pairs, **options)
    exact, exact_grads = gradients(doubled(arguments), by_pairs, **options)
    check("output", out, plain, exact, FORWARD)
    for name, grad in grads.items():
        check(name, grad, plain_grads[name], exact_grads[name], BACKWARD)


@pytest.mark.parametrize("of_tables", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [1, 5, 36, 50])
@pytest.mark.parametrize("tokens", [1, 2, 37, 65])
def test_the_definition_is_the_formula_pair_by_pair(tokens, reach, causal, of_tables):
    arguments = doubled(make(tokens=(tokens, tokens), reach=reach, of_tables=of_tables))
    out, grads = gradients(arguments, causal=causal, backend="reference")
    expected, expected_grads = gradients(arguments, by_pairs, causal=causal)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=1e-12)


@every_backend
@pytest.mark.parametrize("offset", [0, 7, 20])
def test_a_query_stands_at_its_position(backend, offset):
    arguments = make(tokens=(13, 33))
    out, grads = gradients(arguments, causal=True, query_offset=offset, backend=backend)
    check_all(out, grads, arguments, causal=True, offset=offset)


@every_backend
def test_the_default_offset_ends_queries_where_keys_end(backend):
    arguments = make(tokens=(33, 33))
    whole = relative_attention(**arguments, causal=True, backend=backend)
    last = relative_attention(**arguments | {"query": arguments["query"][:, :, -5:]}, causal=True, backend=backend)
    torch.testing.assert_close(last, whole[:, :, -5:], rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_of_zeros_are_plain_attention(backend, dtype, causal):
    arguments = make(tokens=(40, 40), dtype=dtype)
    zeros = {name: torch.zeros_like(arguments[name]) for name in NAMES}
    heads = [arguments[name] for name in ("query", "key", "value")]
    out = relative_attention(*heads, **zeros, causal=causal, backend=backend)
    exact = F.scaled_dot_product_attention(*(t.double() for t in heads), is_causal=causal)
    check("output", out, F.scaled_dot_product_attention(*heads, is_causal=causal), exact, FORWARD)


@every_backend
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_the_same_for_all_keys_changes_nothing_and_gets_no_gradient(backend, causal):
    """A vector added to every row of the query table, a number to every bias: each adds the same to all scores of a
    query. So the gradients of their rows sum to zero, as every query's score gradients do."""
    arguments = make()
    out, grads = gradients(arguments, causal=causal, backend=backend)
    shifted = dict(arguments)
    shifted["query_table"] = arguments["query_table"].detach() + torch.randn(8)
    shifted["bias"] = arguments["bias"].detach() + 3
    torch.testing.assert_close(
        relative_attention(**shifted, causal=causal, backend=backend).detach(), out, rtol=1e-4, atol=1e-5
    )
    for name in ("query_table", "bias"):
        size = grads[name].abs().sum(1)
        assert (grads[name].sum(1).abs() <= 1e-5 * size + 1e-5).all(), name


@every_backend
def test_one_key_row_for_all_distances_is_a_shift_of_the_queries(backend):
    arguments = make(tables=("key_table",))
    row = torch.randn(2, 1, 8)
    constant = relative_attention(**arguments | {"key_table": row.expand(-1, 9, -1)}, causal=True, backend=backend)
    shifted = relative_attention(
        arguments["query"] + row, arguments["key"], arguments["value"], causal=True, backend=backend
    )
    torch.testing.assert_close(constant, shifted, rtol=1e-4, atol=1e-5)


@every_backend
def test_a_reversed_sequence_with_reversed_tables_gives_the_reversed_result(backend):
    arguments = make(tokens=(30, 30))
    out, grads = gradients(arguments, backend=backend)
    backwards = {name: t.detach().flip(1 if name in NAMES else 2).requires_grad_() for name, t in arguments.items()}
    reversed_out = relative_attention(**backwards, backend=backend)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).flip(2)
    reversed_grads = torch.autograd.grad(reversed_out, list(backwards.values()), cotangent)
    torch.testing.assert_close(reversed_out.flip(2).detach(), out, rtol=1e-4, atol=1e-5)
    for (name, grad), turned in zip(grads.items(), reversed_grads, strict=True):
        torch.testing.assert_close(turned.flip(1 if name in NAMES else 2), grad, rtol=1e-3, atol=1e-4, msg=name)


@every_backend
@pytest.mark.parametrize("causal", [False, True])
def test_rows_beyond_all_distances_change_nothing_and_get_zero(backend, causal):
    tight = make(tokens=(20, 20), reach=19)
    wide = {name: F.pad(t, (0, 0) * (t.dim() - 2) + (30, 30)) if name in NAMES else t for name, t in tight.items()}
    wide = {name: t.detach().requires_grad_() for name, t in wide.items()}
    out, grads = gradients(tight, causal=causal, backend=backend)
    wide_out, wide_grads = gradients(wide, causal=causal, backend=backend)
    torch.testing.assert_close(wide_out, out, rtol=1e-5, atol=1e-6)
    for name, grad in wide_grads.items():
        inner = grad[:, 30:-30] if name in NAMES else grad
        torch.testing.assert_close(inner, grads[name], rtol=1e-4, atol=1e-5, msg=name)
        if name in NAMES:
            assert not grad[:, :30].any()
            assert not grad[:, -30:].any()


@every_backend
def test_tables_of_different_reach(backend):
    arguments = make()
    arguments["query_table"] = torch.randn(2, 3, 8, requires_grad=True)
    arguments["bias"] = torch.randn(1, 15, requires_grad=True)
    out, grads = gradients(arguments, backend=backend)
    check_all(out, grads, arguments)


@every_backend
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_document_does_not_know_its_neighbours(backend, dtype, causal):
    """Perturb one document: the others' outputs and gradients keep their bits."""
    boundaries = torch.tensor([0, 40, 43, 100])
    first, middle, last = slice(0, 40), slice(40, 43), slice(43, 100)
    arguments = make(batch=1, tokens=(100, 100), dtype=dtype)
    out, grads = gradients(arguments, causal=causal, cu_seqlens=boundaries, backend=backend)
    changed = {
        name: torch.cat([t[:, :, :40], t[:, :, 40:43] * -9 + 5, t[:, :, 43:]], 2).detach().requires_grad_()
        if name not in NAMES else t for name, t in arguments.items()
    }  # fmt: skip
    changed_out, changed_grads = gradients(changed, causal=causal, cu_seqlens=boundaries, backend=backend)
    assert not torch.equal(changed_out[:, :, middle], out[:, :, middle])
    for part in (first, last):
        assert torch.equal(changed_out[:, :, part], out[:, :, part])
        for name in ("query", "key", "value"):
            assert torch.equal(changed_grads[name][:, :, part], grads[name][:, :, part]), name


@every_backend
def test_packed_documents_are_the_documents_one_by_one(backend):
    lengths = (17, 0, 1, 30)
    arguments = make(batch=1, tokens=(48, 48))
    packed = relative_attention(
        **arguments, causal=True, cu_seqlens=torch.tensor([0, 17, 17, 18, 48], dtype=torch.int32), backend=backend
    )
    pieces = {name: arguments[name].split(lengths, 2) for name in ("query", "key", "value")}
    for index, part in enumerate(packed.split(lengths, 2)):
        own = arguments | {name: piece[index] for name, piece in pieces.items()}
        torch.testing.assert_close(part, relative_attention(**own, causal=True, backend=backend), rtol=1e-4, atol=1e-5)


@every_backend
def test_padding_is_as_if_the_keys_were_not_there(backend):
    arguments = make(tokens=(24, 24))
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 17:] = False
    out, grads = gradients(arguments, key_padding_mask=mask, query_offset=0, backend=backend)
    short = {name: t[1:, :, :17] if name in ("key", "value") else t for name, t in arguments.items()}
    short["query"] = arguments["query"][1:]
    alone = relative_attention(**short, query_offset=0, backend=backend)
    torch.testing.assert_close(out[1:], alone.detach(), rtol=1e-4, atol=1e-5)
    for name in ("key", "value"):
        assert not grads[name][1, :, 17:].any(), name


@every_backend
def test_queries_before_all_keys_give_zero_and_a_warning(backend):
    arguments = make(tokens=(12, 9))
    with pytest.warns(UserWarning, match=r"query_offset -3 puts the first 3 queries before every key"):
        out, grads = gradients(arguments, causal=True, backend=backend)
    assert not out[:, :, :3].any()
    assert not grads["query"][:, :, :3].any()
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        relative_attention(**arguments, backend=backend)


@pytest.mark.parametrize(
    ("boundaries", "words"),
    [
        ([0, 12, 8, 21], "rise from 0 to 21"),
        ([1, 21], "rise from 0 to 21"),
        ([0, 20], "rise from 0 to 21"),
        ([0, 22], "rise from 0 to 21"),
        ([21], r"shape \[documents \+ 1\]"),
        ([[0, 21]], r"shape \[documents \+ 1\]"),
    ],
)
def test_boundaries_that_fit_no_documents_are_refused(boundaries, words):
    with pytest.raises(ValueError, match=f"'cu_seqlens'.*{words}"):
        relative_attention(**make(batch=1), cu_seqlens=torch.tensor(boundaries))


def test_documents_need_as_many_keys_as_queries_and_no_offset():
    boundaries = torch.tensor([0, 21])
    with pytest.raises(ValueError, match=r"'cu_seqlens'.*as many keys as queries"):
        relative_attention(**make(batch=1, tokens=(21, 22)), cu_seqlens=boundaries)
    with pytest.raises(ValueError, match=r"'query_offset'.*cu_seqlens"):
        relative_attention(**make(batch=1), cu_seqlens=boundaries, query_offset=1)


@every_backend
def test_a_bias_of_float32_beside_bfloat16(backend):
    """Distances that bfloat16 cannot tell apart: a bias of ALiBi's kind is used as it is given."""
    arguments = make(tokens=(300, 300), tables=(), dtype=torch.bfloat16)
    slope = 0.05 * torch.arange(-299.0, 300.0)[None]
    out = relative_attention(**arguments, bias=slope, causal=True, backend=backend)
    exact = by_pairs(**doubled(arguments), bias=slope.double(), causal=True)
    check("output", out, exact.to(torch.bfloat16), exact, FORWARD)


def test_autocast_computes_in_its_dtype_and_leaves_the_bias_alone():
    arguments = make()
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = gradients(arguments, causal=True)
    assert out.dtype == torch.bfloat16
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    narrow = {name: t if name == "bias" else t.detach().bfloat16() for name, t in arguments.items()}
    assert torch.equal(out, relative_attention(**narrow, causal=True))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_one_tensor_in_every_place_compiles(backend):
    x, table = torch.randn(1, 2, 9, 8, requires_grad=True), torch.randn(2, 7, 8, requires_grad=True)

    def function(x, table):
        tables = {"query_table": table, "key_table": table, "value_table": table}
        return relative_attention(x, x, x, **tables, causal=True, backend=backend).square().sum()

    expected = torch.autograd.grad(function(x, table), (x, table))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, table), (x, table)), expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_grows_with_the_sequence_not_with_its_square(direction):
    """On the default backend of a CPU: at four times the tokens at most some four times the memory."""
    peaks = {}
    for tokens in (512, 2048):
        arguments = make(batch=1, heads=1, tokens=(tokens, tokens), features=16, reach=8)
        with LiveBytes() as live:
            out = relative_attention(**arguments, causal=True)
            if direction == "backward":
                out.sum().backward()
        peaks[tokens] = live.peak
    assert peaks[2048] < 2048 * 2048 * 4
    assert peaks[2048] <= 4.5 * peaks[512]


def test_the_case_names_are_unique():
    names = [case.name for case in SPECS[0].cases]
    assert len(names) == len(set(names))
