"""What is special to the Triton kernels of ``relative_attention``; tests/contract/ has what every backend promises."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernelab._core.memory import LiveBytes
from kernelab.ops.relative_attention import reference
from tests.bench.sanitizer import sanitizer
from tests.contract.error import BACKWARD, FORWARD, check

pytestmark = pytest.mark.interp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INPUTS = ("query", "key", "value", "query_table", "key_table", "value_table", "bias")


@pytest.fixture
def triton():
    """The backend's module."""
    from kernelab.ops.relative_attention import triton_launch

    return triton_launch


def make(
    tables="qkvb", batch=1, heads=2, key_heads=1, queries=40, keys=60, features=16, value_features=24, reach=5,
    shared=False, causal=False, content=True, masked=False, boundaries=None, offset=None, dtype=torch.float32, seed=0,
    scale=0.15,
):  # fmt: skip
    """Arguments that the raw forward and backward share."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    mask = documents = None
    if masked:
        mask = torch.rand(batch, keys, generator=generator) > 0.3
        mask[0, : keys // 4] = False
    if boundaries is not None:
        queries, keys = boundaries[-1], boundaries[-1]
        spans = [(a, b) for a, b in itertools.pairwise(boundaries) for _ in range(b - a)]
        documents = torch.tensor(spans, dtype=torch.int32).T.contiguous()
    heads_of_tables, rows = 1 if shared else heads, 2 * reach + 1
    return {
        "query": random(batch, heads, queries, features),
        "key": random(batch, key_heads, keys, features),
        "value": random(batch, key_heads, keys, value_features),
        "query_table": random(heads_of_tables, rows, features) if "q" in tables else None,
        "key_table": random(heads_of_tables, rows, features) if "k" in tables else None,
        "value_table": random(heads_of_tables, rows, value_features) if "v" in tables else None,
        "bias": random(heads_of_tables, rows) if "b" in tables else None,
        "key_padding_mask": mask,
        "documents": documents,
        "causal": causal,
        "content": content,
        "query_offset": keys - queries if offset is None else offset,
        "scale": scale,
    }


def exactly(call: dict) -> dict:
    return {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in call.items()}


def every_need(call: dict) -> list[bool]:
    need = [call[name] is not None for name in INPUTS]
    need[0] &= call["content"] or need[3]
    need[1] &= call["content"] or need[4]
    return need


def backward_arguments(call: dict, need=None) -> dict:
    """Arguments of the raw backward, after a forward."""
    out, peak, mass = reference.attention(**call)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    results = {"out": out, "peak": peak, "mass": mass, "grad_out": grad_out}
    return {**call, **results, "need": every_need(call) if need is None else list(need)}


def check_forward(got, call: dict) -> None:
    plain, exact = reference.attention(**call), reference.attention(**exactly(call))
    for name, *triple in zip(("out", "peak", "mass"), got, plain, exact, strict=True):
        check(name, *triple, FORWARD)
    blind = exact[2] == 0
    assert all((t[blind] == 0).all() for t in got)


def check_backward(got, arguments: dict) -> None:
    plain, exact = reference.backward(**arguments), reference.backward(**exactly(arguments))
    for name, wanted, *triple in zip(INPUTS, arguments["need"], got, plain, exact, strict=True):
        check(f"gradient of {name}", *triple, BACKWARD)
        assert triple[0].is_contiguous()
        assert wanted or triple[0].numel() == 0


def check_both(triton, call: dict) -> None:
    check_forward(triton.forward(**call), call)
    arguments = backward_arguments(call)
    check_backward(triton.backward(**arguments), arguments)


SCHEMES = {"plain": "", "query": "q", "query-key": "qk", "value": "v", "bias": "b", "all": "qkvb"}


@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("tables", SCHEMES.values(), ids=SCHEMES.keys())
def test_schemes(triton, tables, causal):
    """Low, near and high keys of the tiles, more of them than one of each."""
    dtype = torch.float16 if causal else torch.bfloat16
    check_both(triton, make(tables, queries=150, keys=210, reach=9, causal=causal, dtype=dtype))
    check_both(triton, make(tables, heads=1, causal=causal))


VARIETIES = {
    "shared tables, groups of heads": {"shared": True, "heads": 4, "key_heads": 2, "batch": 2, "queries": 20},
    "masked": {"masked": True, "batch": 2, "queries": 30, "keys": 40},
    "masked causal": {"masked": True, "causal": True, "queries": 50, "keys": 50},
    "documents": {"boundaries": [0, 17, 17, 26, 60]},
    "documents causal": {"boundaries": [0, 17, 17, 26, 60], "causal": True, "shared": True},
    "no content": {"content": False},
    "bias without content": {"content": False, "tables": "b"},
    "negative scale": {"scale": -0.2, "causal": True},
    "reach 1": {"reach": 1},
    "reach beyond every key": {"reach": 90},
    "one query": {"dtype": torch.float16, "queries": 1, "keys": 130, "causal": True},
    "queries before the keys": {"offset": -30, "causal": True},
    "queries among the keys": {"offset": 7},
    "queries after the keys": {"offset": 65, "reach": 20},
    "odd features": {"features": 59, "scale": 1 / 8, "value_features": 80, "queries": 20, "keys": 30},
    "many features": {"dtype": torch.bfloat16, "features": 256, "scale": 1 / 16, "queries": 20, "keys": 30},
}


@pytest.mark.parametrize("variety", VARIETIES.values(), ids=VARIETIES.keys())
def test_varieties(triton, variety):
    check_both(triton, make(**variety))


@pytest.mark.parametrize(
    ("offset", "reach", "keys"), [(-(10**12), 9, 50), (10**12, 9, 50), (0, 0, 50), (0, 9, 1)], ids=str
)
def test_gradients_that_are_zero(triton, offset, reach, keys):
    """Logits that differ from query to query only, or a query of one key: sums that cancel, on the scale of terms."""
    call = make(offset=offset, reach=reach, queries=40 if keys > 1 else 1, keys=keys)
    check_forward(triton.forward(**call), call)
    arguments = backward_arguments(call)
    plain, exact = reference.backward(**arguments), reference.backward(**exactly(arguments))
    for name, *triple in zip(INPUTS, triton.backward(**arguments), plain, exact, strict=True):
        cancels = name in ("query_table", "bias") or keys == 1 or name == "key"
        check(name, *triple, BACKWARD, terms=torch.full_like(triple[2], 20.0) if cancels else None)


def test_no_queries_or_keys(triton):
    for queries, keys in ((0, 5), (5, 0), (0, 0)):
        call = make(queries=queries, keys=keys)
        results = triton.forward(**call)
        assert results[0].shape == (1, 2, queries, 24)
        assert all((t == 0).all() for t in results)
        arguments = backward_arguments(call)
        for grad, name in zip(triton.backward(**arguments), INPUTS, strict=True):
            assert grad.shape == call[name].shape
            assert (grad == 0).all()


@pytest.mark.parametrize("tables", ["", "qkvb"])
def test_every_need_gets_its_gradients_and_nothing_else(triton, tables):
    call = make(tables, queries=20, keys=40, dtype=torch.bfloat16)
    arguments = backward_arguments(call)
    whole = triton.backward(**arguments)
    for index, wanted in enumerate(arguments["need"]):
        for need in ([i == index for i in range(7)], [i != index for i in range(7)]):
            need = [a and b for a, b in zip(need, arguments["need"], strict=True)]
            if wanted:
                for grad, expected, asked in zip(
                    triton.backward(**arguments | {"need": need}), whole, need, strict=True
                ):
                    assert torch.equal(grad, expected) if asked else grad.numel() == 0


def test_tables_of_different_heads(triton):
    call = make(heads=4, key_heads=2, queries=40, keys=50)
    call |= {name: call[name][:1] for name in ("query_table", "bias")}
    call["bias"] = call["bias"].float()
    check_both(triton, call)


def test_bias_that_switches_distances_off(triton):
    call = make("qb", reach=5, queries=80, keys=80)
    call["bias"][0, 0] = call["bias"][1, -1] = call["bias"][1, 4] = float("-inf")
    check_forward(triton.forward(**call), call)
    arguments = backward_arguments(call)
    check_backward(triton.backward(**arguments), arguments)


def spaced(t):
    """Unit stride, but rows further apart than they are long."""
    return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]


def transposed(t):
    return t.mT.contiguous().mT


def by_token(t):
    """[batch, tokens, heads, features] in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def repeated(t):
    return t[:1].expand_as(t)


@pytest.mark.parametrize("layout", [spaced, transposed, by_token, repeated])
def test_any_strides_give_the_result_of_contiguous_tensors(triton, layout):
    call = make(batch=2, queries=20, keys=40, heads=2, dtype=torch.bfloat16, masked=True)
    arguments = backward_arguments(call)
    names = [
        name
        for name in (*INPUTS, "grad_out", "key_padding_mask")
        if layout is not by_token or call.get(name, arguments[name]).dim() == 4
    ]
    strange = {name: layout(arguments[name]) for name in names}
    plain = {name: t.contiguous() for name, t in strange.items()}
    of_forward = call.keys()
    for ours, expected in zip(
        triton.forward(**call | {n: t for n, t in strange.items() if n in of_forward}),
        triton.forward(**call | {n: t for n, t in plain.items() if n in of_forward}), strict=True
    ):  # fmt: skip
        assert torch.equal(ours, expected)
    for ours, expected in zip(
        triton.backward(**arguments | strange), triton.backward(**arguments | plain), strict=True
    ):
        assert torch.equal(ours, expected)
        assert ours.is_contiguous()


def test_offsets_beyond_31_bits(triton):
    """Queries, keys and values lie 2^25 elements apart; memory is touched where they are."""
    call = make("q", queries=80, keys=80, heads=1, dtype=torch.bfloat16)
    far = {}
    for name in ("query", "key", "value"):
        t = call[name]
        far[name] = torch.empty_strided(t.shape, (0, 0, 2**25, 1), dtype=t.dtype).copy_(t)
    pairs = zip(triton.forward(**call | far), triton.forward(**call), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    arguments = backward_arguments(call)
    pairs = zip(triton.backward(**arguments | far), triton.backward(**arguments), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("causal", [False, True])
def test_documents_do_not_see_each_other(triton, causal):
    call = make("qk", boundaries=[0, 50, 130], causal=causal, dtype=torch.bfloat16)
    arguments = backward_arguments(call)
    changed = {name: arguments[name].clone() for name in ("query", "key", "value", "grad_out")}
    for t in changed.values():
        t[:, :, :50] *= 3
    before, after = triton.forward(**call), triton.forward(**call | {n: changed[n] for n in ("query", "key", "value")})
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :, 50:], new[:, :, 50:])
        assert not torch.equal(old[:, :, :50], new[:, :, :50])
    arguments |= dict(zip(("out", "peak", "mass"), before, strict=True))
    changed |= dict(zip(("out", "peak", "mass"), after, strict=True))
    pairs = zip(triton.backward(**arguments)[:3], triton.backward(**arguments | changed)[:3], strict=True)
    assert all(torch.equal(old[:, :, 50:], new[:, :, 50:]) for old, new in pairs)


def test_a_hidden_key_changes_nothing(triton):
    """Whatever it holds: its logits overflow float32 as powers."""
    call = make("qv", masked=True, dtype=torch.bfloat16, queries=80, keys=80)
    call["key_padding_mask"][0, -1] = True
    arguments = backward_arguments(call)
    changed = {name: arguments[name].clone() for name in ("key", "value")}
    hidden = ~call["key_padding_mask"][0]
    for t in changed.values():
        t[:, :, hidden] = 1e4
    for old, new in zip(triton.forward(**call), triton.forward(**call | changed), strict=True):
        assert torch.equal(old, new)
    before, after = triton.backward(**arguments), triton.backward(**arguments | changed)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)
    assert (before[1][:, :, hidden] == 0).all()
    assert (before[2][:, :, hidden] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_far_keys_cost_what_plain_attention_costs(triton, causal):
    """Beyond reach no band is loaded and multiplied: the flops of a query table do not grow with the keys."""

    def flops(tables, keys):
        call = make(
            tables, queries=64, keys=keys, heads=1, features=64, value_features=64, reach=30, causal=causal,
            dtype=torch.bfloat16,
        )  # fmt: skip
        with sanitizer() as report:
            triton.forward(**call)
            triton.backward(**backward_arguments(call))
        for launch in report.launches:
            assert launch.out_of_bounds == launch.races == launch.bytes_atomic == 0
        return report.total("dot_flops")

    assert flops("q", 640) - flops("", 640) == flops("q", 320) - flops("", 320) > 0


def triton_bytes(call: dict, tile: int) -> int:
    """Bytes that the forward of a query table loads and stores, for whole tiles, causal, and queries that end where the
    keys do."""
    _, heads, queries, features = call["query"].shape
    reach, keys, size = call["query_table"].shape[1] // 2, call["key"].shape[2], call["query"].element_size()
    total = 0
    for first in range(0, queries, tile):
        position = first + keys - queries
        tiles = (position + tile) // tile
        near = tiles - max(position - reach + 1, 0) // tile
        total += size * features * (2 + tile + 2 * tile * tiles + 2 * tile * near + tile) + 8 * tile
    return total * heads


def test_bytes_of_the_forward_are_those_of_the_closed_form(triton):
    call = make(
        "q", queries=256, keys=384, heads=2, features=64, value_features=64, reach=30, causal=True, dtype=torch.bfloat16
    )
    with sanitizer() as report:
        triton.forward(**call)
    assert report.total("bytes_loaded") + report.total("bytes_stored") == triton_bytes(call, 64)


@pytest.mark.parametrize("reach", [64, 4095])
def test_memory_is_linear_in_the_sequence(triton, reach):
    """No tensor of a score a pair, nor of a score a query and distance."""
    batch, heads, tokens, features = 4, 12, 4096, 64

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    query, table = empty(batch, heads, tokens, features), empty(heads, 2 * reach + 1, features)
    tensors = query, query, query, table, table, table, empty(heads, 2 * reach + 1), None, None
    rest = True, True, 0, 0.125

    def peak(plan, *arguments):
        with LiveBytes() as live:
            launches, results = plan(*arguments, capability=90)
            for _ in launches:
                pass
        return live.peak - sum(t.nbytes for t in results)

    row = 4 * batch * heads * tokens
    assert peak(triton.plan_forward, *tensors, *rest) <= 2 * row
    statistic = empty(batch, heads, tokens, dtype=torch.float32)
    saved = query, statistic, statistic, query
    parts = 4 * 3 * 2 * heads * (2 * reach + 1) * (features + 1)
    assert peak(triton.plan_backward, *tensors, *saved, *rest, [True] * 7) <= 15 * row + max(parts, 40e6)
