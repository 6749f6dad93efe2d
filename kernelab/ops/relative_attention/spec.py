"""What the tests, the AOT checks and the benchmarks know of ``relative_attention``."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from kernelab._core.spec import Case, Misuse, OpSpec, changing, replacing

from . import reference as definition
from . import relative_attention
from .arguments import documents_of, same_reach

# What a scheme adds to the scores and the values.
SCHEMES = {
    "plain": "",
    "query": "query",
    "query-key": "query key",
    "value": "query value",
    "bias": "bias",
    "all": "query key value bias",
}


def _case(
    name: str,
    tables: str = "query key value bias",
    *,
    batch: int = 2,
    heads: tuple[int, int] = (2, 2),
    tokens: tuple[int, int] = (9, 9),
    features: tuple[int, int] = (8, 8),
    reach: int = 3,
    shared: bool = False,
    causal: bool = False,
    content: bool = True,
    offset: int | None = None,
    padding: bool = False,
    lengths: tuple[int, ...] = (),
    size: float = 1.0,
    train: str = "query key value query_table key_table value_table bias",
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    tags: str = "",
) -> Case:
    """Pairs are (query's, key's) number of heads and tokens, and features of (query and key, value). ``lengths`` are
    those of packed documents. Scores have a standard deviation of about ``size`` a term."""
    tables = tables.split()

    def build(device, dtype, generator):
        def random(name, *shape, scale=1.0, layout=lambda t: t):
            values = (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
            return layout(values).requires_grad_(name in train.split())

        (queries, keys), of_tables = tokens, 1 if shared else heads[0]

        def table(name, *features, scale=1.0):
            if name.removesuffix("_table") not in tables:
                return None
            return random(name, of_tables, 2 * reach + 1, *features, scale=scale)

        return {
            "query": random("query", batch, heads[0], queries, features[0], scale=size, layout=layout),
            "key": random("key", batch, heads[1], keys, features[0], layout=layout),
            "value": random("value", batch, heads[1], keys, features[1], layout=layout),
            "query_table": table("query_table", features[0]),
            "key_table": table("key_table", features[0], scale=size),
            "value_table": table("value_table", features[1]),
            "bias": table("bias", scale=size),
            "key_padding_mask": _padding(batch, keys, device) if padding else None,
            "cu_seqlens": _boundaries(lengths, device) if lengths else None,
            "causal": causal,
            "content": content,
            "query_offset": offset,
        }

    return Case(name, build, frozenset(tags.split()))


def _padding(batch: int, keys: int, device: torch.device) -> Tensor:
    """Batch element b lacks its first b keys and its last, the last one all keys."""
    place = torch.arange(keys, device=device)
    first = torch.arange(batch, device=device)[:, None]
    return (place >= first) & (place < keys - 1) & (first < max(batch - 1, 1))


def _boundaries(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device=device)


def _heads_inside(t: Tensor) -> Tensor:
    """As a projection leaves them: [batch, tokens, heads, features] in memory."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _schemes():
    """Every scheme x causal x grouped heads x packed documents x tables of one head."""
    for (scheme, tables), causal, heads, packed, shared in itertools.product(
        SCHEMES.items(), (False, True), ((2, 2), (6, 2)), (False, True), (False, True)
    ):
        if shared and not tables:
            continue
        words = scheme, "causal" * causal, "grouped" * (heads[0] != heads[1]), "packed" * packed, "shared" * shared
        # Under the interpreter every scheme, causal, grouped and packed, but not all of them with all.
        mixed = (causal, heads == (6, 2), packed, shared) in (
            (False, False, False, False),
            (True, True, False, True),
            (False, True, True, False),
            (True, False, True, True),
        )
        yield _case(
            "-".join(word for word in words if word),
            tables,
            batch=1 if packed else 2,
            heads=heads,
            tokens=(23, 23),
            features=(8, 12),
            reach=4,
            shared=shared,
            causal=causal,
            lengths=(7, 0, 1, 15) if packed else (),
            tags="interp" if mixed else "",
        )


# The scores of a query have gradients that sum to zero: so are all sums over whole rows of them, and what is left is
# rounding, which has no scale to be judged by.
_NOT_ZERO = "query key value key_table value_table"
CASES = (
    _case("smallest", heads=(2, 1), tokens=(4, 5), features=(4, 3), reach=2, tags="smallest interp"),
    _case("causal-one-query-table", "query", tokens=(5, 5), features=(4, 4), causal=True, tags="smallest interp"),
    *_schemes(),
    _case("three-groups", heads=(3, 1), tokens=(20, 20), causal=True),
    _case("eight-groups", heads=(8, 1), tokens=(20, 20), padding=True, tags="interp"),
    _case("open-lengths", "query key bias", batch=5, tokens=(10, 10), causal=True, tags="dynamic"),
    _case("bias-alone", "bias", content=False, tags="interp"),
    _case("tables-alone", "query key", content=False, causal=True, tags="interp"),
    _case("key-table-alone", "key", causal=True),
    _case("value-table-alone", "value", tags="interp"),
    _case("no-keys", tokens=(3, 0), tags="interp"),
    _case("no-queries", tokens=(0, 5), tags="interp"),
    _case("no-batch", batch=0),
    _case("one-token", train="value value_table", tokens=(1, 1), features=(16, 16), causal=True, tags="interp"),
    _case("one-query-of-a-cache", tokens=(1, 70), features=(16, 16), reach=20, causal=True, tags="interp"),
    _case("fork-of-a-prefix", batch=3, tokens=(5, 40), features=(16, 16), reach=20, causal=True, tags="interp"),
    _case("queries-inside", tokens=(10, 40), offset=11, causal=True, tags="interp"),
    _case("queries-beyond", train=_NOT_ZERO, tokens=(10, 40), offset=100, causal=True, tags="interp"),
    _case("queries-before", tokens=(10, 40), offset=-7, tags="interp"),
    _case("padding", batch=3, tokens=(33, 33), features=(16, 16), padding=True, causal=True, tags="interp"),
    _case("padding-both-sides", batch=3, tokens=(20, 31), features=(16, 16), padding=True, tags="interp"),
    _case("reach-of-one", tokens=(37, 37), features=(16, 16), reach=1, tags="interp"),
    _case("reach-of-all", tokens=(37, 37), features=(16, 16), reach=36, tags="interp"),
    _case("reach-beyond-all", tokens=(37, 37), features=(16, 16), reach=90, causal=True, tags="interp"),
    _case("reach-of-zero", train=_NOT_ZERO, tokens=(20, 20), features=(16, 16), reach=0, tags="interp"),
    _case("many-tiles", batch=1, heads=(2, 1), tokens=(201, 201), features=(32, 32), reach=13, tags="interp"),
    _case("many-tiles-causal", batch=1, tokens=(201, 201), features=(32, 32), reach=13, causal=True, tags="interp"),
    _case("long-keys", batch=1, tokens=(67, 1100), features=(16, 16), reach=40, causal=True),
    _case(
        "packed-tiles", batch=1, heads=(2, 1), tokens=(200, 200), features=(32, 32), reach=13,
        lengths=(100, 3, 97), causal=True, tags="interp",
    ),
    *(
        _case(f"features-{d}", heads=(2, 1), tokens=(19, 19), features=(d, d), causal=d % 2 == 0, tags=tags)
        for tags, sizes in {"interp": (16, 59, 80, 128), "": (1, 32, 40, 64, 96, 111, 256)}.items()
        for d in sizes
    ),
    _case("value-features", tokens=(19, 19), features=(40, 24), tags="interp"),
    _case("peaked", tokens=(40, 40), features=(16, 16), size=30.0, tags="interp"),
    _case("heads-inside", tokens=(24, 24), features=(16, 16), layout=_heads_inside, tags="interp"),
    _case("column-major", tokens=(24, 24), features=(16, 16), layout=lambda t: t.mT.contiguous().mT, tags="interp"),
    _case("expanded", batch=1, tokens=(24, 24), features=(16, 16), layout=lambda t: t.expand(3, -1, -1, -1)),
    _case("offset", batch=3, tokens=(24, 24), features=(16, 16), layout=lambda t: t[1:], tags="interp"),
    _case("only-tables", tokens=(30, 30), train="query_table key_table value_table bias", tags="interp"),
    _case("only-query", tokens=(30, 30), causal=True, train="query", tags="interp"),
    _case("only-value", tokens=(30, 30), causal=True, train="value value_table", tags="interp"),
    _case("no-gradient", tokens=(30, 30), train=""),
)  # fmt: skip


def reference(
    query, key, value, *, query_table=None, key_table=None, value_table=None, bias=None, causal=False, content=True,
    key_padding_mask=None, cu_seqlens=None, query_offset=None, scale=None,
):  # fmt: skip
    """The output by autograd through its definition."""
    documents = documents_of(cu_seqlens, query, key, query_offset)
    offset = key.shape[2] - query.shape[2] if query_offset is None else query_offset
    tables = same_reach(query_table, key_table, value_table, bias)
    rest = causal, content, offset, query.shape[3] ** -0.5 if scale is None else scale
    return definition.attention(query, key, value, *tables, key_padding_mask, documents, *rest)[0]


def pairs(arguments: dict) -> int:
    """Pairs of a query and a key that it may see, of one head of one batch element; padding is not looked at."""
    queries, keys, offset = arguments["query"].shape[2], arguments["key"].shape[2], arguments["query_offset"]
    if arguments["cu_seqlens"] is not None:
        lengths = arguments["cu_seqlens"].diff().tolist()
        return sum(n * (n + 1) // 2 if arguments["causal"] else n * n for n in lengths)
    if not arguments["causal"]:
        return queries * keys
    offset = keys - queries if offset is None else offset
    return sum(min(max(i + offset + 1, 0), keys) for i in range(queries))


def _flops(arguments: dict) -> tuple[int, int]:
    """Of the products of queries, keys and values; a profile q.table is the less the more tokens there are."""
    query, value = arguments["query"], arguments["value"]
    seen = query.shape[0] * query.shape[1] * pairs(arguments)
    per_key, per_value = query.shape[3] * arguments["content"], value.shape[3]
    return 2 * seen * (per_key + per_value), 2 * seen * (3 * per_key + 2 * per_value)


def _bytes_moved(arguments: dict) -> tuple[int, int]:
    """Every input read once, every output written once; backward reads the output, its cotangent and lse too."""
    names = ("query", "key", "value", "query_table", "key_table", "value_table", "bias")
    inputs = [arguments[name] for name in names if arguments[name] is not None]
    query, value = arguments["query"], arguments["value"]
    rows = query.shape[0] * query.shape[1] * query.shape[2]
    out = rows * value.shape[3] * query.element_size()
    read, lse = sum(t.nbytes for t in inputs), rows * max(query.element_size(), 4)
    return read + out + lse, read + 2 * out + lse + sum(t.nbytes for t in inputs if t.requires_grad)


# The smallest case: batch 2, heads 2 and 1, 4 queries, 5 keys, 4 and 3 features, tables of 2 heads and 5 rows.
_MISUSES = (
    Misuse(replacing(query=[1.0]), TypeError, "'query'"),
    Misuse(changing("query", lambda t: t.long()), TypeError, "'query'"),
    Misuse(changing("query", lambda t: t[0]), ValueError, r"'query'.*\[batch, heads, queries, features\]"),
    Misuse(changing("query", lambda t: t[..., :0]), ValueError, "'query'.*one feature"),
    Misuse(changing("key", lambda t: t[:1]), ValueError, r"'key'.*\[2, heads, keys, features\]"),
    Misuse(changing("key", lambda t: t[..., :3]), ValueError, "'key'.*4 features, as query"),
    Misuse(changing("key", lambda t: t.repeat(1, 3, 1, 1)), ValueError, "'key'.*divides query's 2"),
    Misuse(changing("key", lambda t: t.double()), ValueError, "'key'.*dtype"),
    Misuse(changing("key", lambda t: t.to("meta")), ValueError, "'key'.*cpu"),
    Misuse(changing("value", lambda t: t[:, :, :4]), ValueError, r"'value'.*\[2, 1, 5, \*\]"),
    Misuse(changing("value", lambda t: t[..., :0]), ValueError, "'value'"),
    Misuse(changing("query_table", lambda t: t[:, :4]), ValueError, "'query_table'.*odd number of rows.*-K..K"),
    Misuse(changing("query_table", lambda t: t[..., :3]), ValueError, r"'query_table'.*\[2 or 1, 2K\+1, 4\]"),
    Misuse(changing("key_table", lambda t: t.repeat(2, 1, 1)), ValueError, r"'key_table'.*\[2 or 1, 2K\+1, 4\]"),
    Misuse(changing("key_table", lambda t: t.half()), ValueError, "'key_table'.*dtype"),
    Misuse(changing("value_table", lambda t: t[0]), ValueError, r"'value_table'.*\[2 or 1, 2K\+1, 3\]"),
    Misuse(replacing(value_table=3), TypeError, "'value_table'"),
    Misuse(changing("bias", lambda t: t[:, :0]), ValueError, "'bias'.*odd"),
    Misuse(changing("bias", lambda t: t[..., None]), ValueError, r"'bias'.*\[2 or 1, 2K\+1\]"),
    Misuse(changing("bias", lambda t: t.double()), ValueError, "'bias'.*dtype"),
    Misuse(replacing(key_padding_mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, r"'key_padding_mask'.*\[2, 5\]"),
    Misuse(replacing(key_padding_mask=torch.ones(2, 5)), TypeError, r"'key_padding_mask'.*\.bool\(\)"),
    Misuse(replacing(cu_seqlens=torch.tensor([0, 5])), ValueError, "'cu_seqlens'.*batch of 2"),
    Misuse(replacing(cu_seqlens=torch.tensor([0.0, 5.0])), TypeError, "'cu_seqlens'"),
    Misuse(replacing(causal=1), TypeError, "'causal'"),
    Misuse(replacing(content=None), TypeError, "'content'"),
    Misuse(replacing(query_offset=0.5), TypeError, "'query_offset'"),
    Misuse(replacing(query_offset=True), TypeError, "'query_offset'"),
    Misuse(replacing(scale="1"), TypeError, "'scale'"),
    Misuse(replacing(scale=float("inf")), ValueError, "'scale'"),
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OPEN = {0: "batch", 2: "tokens"}

SPECS = (
    OpSpec(
        name="relative_attention",
        function=relative_attention,
        reference=reference,
        cases=CASES,
        dtypes={"reference": _FLOATS, "cpu": _FLOATS},
        bytes_moved=_bytes_moved,
        flops=_flops,
        dynamic={"query": _OPEN, "key": _OPEN, "value": _OPEN},
        misuses=_MISUSES,
    ),
)
