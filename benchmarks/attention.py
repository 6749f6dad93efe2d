"""Cases of relative-position attention, and the ways to compute them with ``relative_attention`` and without it.

All are functions of the same arguments: query, key and value [B, H, N, D], a ``table`` [H or 1, 2K+1, D] of the
distances, which ``terms`` multiply with the query, the key, or both; a ``bias`` [H, 2K+1]; ``causal``; and ``content``,
whether the term q.k is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kernelab._core.spec import Case
from kernelab.ops import relative_attention, specs
from kernelab.ops.toeplitz_attention import toeplitz_attention
from tests.contract import arguments as args

from .functions import backends, compiled, of_function
from .measure import BASE
from .provider import FORWARD_ONLY, SEED, Group, Provider

SPEC = next(spec for spec in specs() if spec.function is relative_attention)


def case(
    name: str,
    terms: str,
    *,
    batch: int = 1,
    heads: int = 12,
    tokens: int,
    reach: int,
    causal: bool = False,
    content: bool = True,
    shared: bool = True,
    tags: str = "bench",
) -> Case:
    """``shared``: one table serves all heads."""
    terms = tuple(terms.split())

    def build(device, dtype, generator):
        def random(*shape):
            return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

        query, key, value = (random(batch, heads, tokens, 64) for _ in range(3))
        rows = 2 * reach + 1
        return {
            "query": query,
            "key": key,
            "value": value,
            "table": random(1 if shared else heads, rows, 64) if {"query", "key"} & set(terms) else None,
            "bias": random(heads, rows) if "bias" in terms else None,
            "terms": terms,
            "causal": causal,
            "content": content,
        }

    return Case(name, build, frozenset(tags.split()))


_GPU = "bench gpu"
CASES = (
    case("smallest", "query key", heads=2, tokens=9, reach=3, causal=True, tags="smallest"),
    case("rpe-k-512-reach-64", "query", tokens=512, reach=64, causal=True),
    case("rpe-k-512-reach-16", "query", tokens=512, reach=16, causal=True),
    case("rpe-k-64", "query", batch=16, heads=8, tokens=64, reach=16, causal=True),
    case("rpe-kq-512", "query key", tokens=512, reach=64),
    case("rpe-kq-64", "query key", batch=8, heads=8, tokens=64, reach=16),
    case("t5-512", "bias", tokens=512, reach=128),
    case("position-only-512", "bias", batch=4, tokens=512, reach=511, causal=True, content=False),
    case("rpe-k-512-batch-96", "query", batch=96, tokens=512, reach=64, causal=True, tags=_GPU),
    case("rpe-k-4096", "query", batch=4, tokens=4096, reach=128, causal=True, tags=_GPU),
    case("rpe-kq-512-batch-96", "query key", batch=96, tokens=512, reach=64, tags=_GPU),
    case("rpe-kq-64-batch-256", "query key", batch=256, heads=8, tokens=64, reach=16, tags=_GPU),
    case("disentangled-512", "query key", batch=32, tokens=512, reach=511, shared=False, tags=_GPU),
    case("t5-512-batch-96", "bias", batch=96, tokens=512, reach=128, tags=_GPU),
    case("position-only-512-batch-96", "bias", batch=96, tokens=512, reach=511, causal=True, content=False, tags=_GPU),
)


def providers(case: Case, group: Group) -> list[str]:
    """Who can compute the case. SDPA and FlexAttention have no way to leave q.k out; old BERT had one table a layer."""
    sizes = case.build(torch.device("meta"), group.dtype, None)
    peers = ["torch", "torch.compile"]
    if not sizes["content"]:
        peers += [f"kernelab-toeplitz/{backend}" for backend in backends("toeplitz_attention", group)]
    else:
        peers += ["gather-sdpa", "flex"]
        if sizes["table"] is not None and len(sizes["table"]) == 1:
            peers += ["einsum"]
    return [BASE, *(f"kernelab/{backend}" for backend in backends(SPEC.name, group)), *peers]


def builders(case: Case, group: Group) -> dict[str, Callable[[], Provider]]:
    """All of :func:`providers` and maybe more."""
    arguments = args.build(case, group.device, group.dtype, SEED)
    if group.direction == FORWARD_ONLY:  # FlexAttention on a CPU refuses inputs that require gradients even then
        for tensor in args.trainable(arguments).values():
            tensor.requires_grad_(False)
    functions = {  # and what each is checked against
        BASE: (sdpa, without_tables),
        "torch": (plain, plain),
        "einsum": (einsum, einsum),
        "gather-sdpa": (gather_sdpa, plain),
        **{
            f"kernelab/{backend}": (partial(ours, backend=backend), definition)
            for backend in backends(SPEC.name, group)
        },
        **{
            f"kernelab-toeplitz/{backend}": (partial(toeplitz, backend=backend), definition)
            for backend in backends("toeplitz_attention", group)
        },
    }
    found = {name: partial(_provider, group, arguments, *pair) for name, pair in functions.items()}
    blocks = _causal_blocks(arguments) if arguments["causal"] else None
    found["flex"] = partial(_provider, group, arguments, partial(flex, block_mask=blocks), plain, compile=True)
    found["torch.compile"] = partial(_provider, group, arguments, definition, definition, compile=True)
    return found


def _provider(group: Group, arguments: dict, function: Callable, exact: Callable, *, compile: bool = False) -> Provider:
    sizes = of_the_op(**arguments)
    work = {"bytes_moved": SPEC.bytes_moved(sizes), "flops": SPEC.flops(sizes)}
    function = compiled(function) if compile else function
    return of_function(group, arguments, function, exact, **work, weights=("table", "bias"))


def of_the_op(query, key, value, table, bias, terms, causal, content) -> dict:
    """The arguments as ``relative_attention`` and its specification know them."""
    tables = {f"{name}_table": table if name in terms else None for name in ("query", "key", "value")}
    nothing = dict.fromkeys(("key_padding_mask", "cu_seqlens", "query_offset"))
    rest = {"bias": bias, "causal": causal, "content": content}
    return {"query": query, "key": key, "value": value, **tables, **rest, **nothing}


def ours(*, backend: str | None = None, **arguments) -> Tensor:
    return relative_attention(**of_the_op(**arguments), backend=backend)


def toeplitz(query, key, value, table, bias, terms, causal, content, *, backend: str | None = None) -> Tensor:
    """Of a case without content."""
    return toeplitz_attention(value, bias, causal=causal, backend=backend)


def definition(**arguments) -> Tensor:
    return SPEC.reference(**of_the_op(**arguments))


def scores(query, key, table, bias, terms, content) -> Tensor:
    """Of every pair, with the products with the table gathered: [B or 1, H, N, N]."""
    rows, scale = _rows(query, table, bias), query.shape[3] ** -0.5
    s = query.new_zeros(1, 1, 1, 1)
    if "query" in terms:
        s = s + _gather(query @ table.mT, rows) * scale
    if "key" in terms:
        s = s + _gather(key @ table.mT, rows.mT).mT * scale
    if "bias" in terms:
        s = s + bias[None, :, rows]
    return s + query @ key.mT * scale if content else s


def plain(query, key, value, table, bias, terms, causal, content) -> Tensor:
    """What torch without a library computes in the dtype of the inputs. Without content all of a batch share it."""
    s = scores(query, key, table, bias, terms, content)
    return _hide(s, causal).softmax(-1) @ value


def einsum(query, key, value, table, bias, terms, causal, content) -> Tensor:
    """As BERT had it in transformers 4: a row of the table for every pair, [N, N, D]."""
    of_pairs = table[0][_rows(query, table, bias)]
    s = query @ key.mT
    if "query" in terms:
        s = s + torch.einsum("bhid,ijd->bhij", query, of_pairs)
    if "key" in terms:
        s = s + torch.einsum("bhjd,ijd->bhij", key, of_pairs)
    return _hide(s * query.shape[3] ** -0.5, causal).softmax(-1) @ value


def gather_sdpa(query, key, value, table, bias, terms, causal, content) -> Tensor:
    """SDPA with the scores of the table as its mask."""
    mask = _hide(scores(query, key, table, bias, terms, content=False), causal)
    return F.scaled_dot_product_attention(query, key, value, mask.expand(*query.shape[:3], -1))


def sdpa(query, key, value, table, bias, terms, causal, content) -> Tensor:
    """Without table and bias: another function, which computes less."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def without_tables(query, key, value, table, bias, terms, causal, content) -> Tensor:
    """The definition of :func:`sdpa`."""
    return plain(query, key, value, None, None, (), causal, content=True)


def flex(query, key, value, table, bias, terms, causal, content, *, block_mask) -> Tensor:
    """FlexAttention, which reads the products with the table from tensors [B, H, N, 2K+1]. To be compiled."""
    scale, reach = query.shape[3] ** -0.5, (table if bias is None else bias).shape[1] // 2
    of_query = query @ table.mT if "query" in terms else None
    of_key = key @ table.mT if "key" in terms else None

    def score_mod(score, b, h, i, j):
        row = (j - i).clamp(-reach, reach) + reach
        if of_query is not None:
            score = score + of_query[b, h, i, row] * scale
        if of_key is not None:
            score = score + of_key[b, h, j, row] * scale
        return score if bias is None else score + bias[h, row]

    return flex_attention(query, key, value, score_mod=score_mod, block_mask=block_mask)


def _causal_blocks(arguments: dict) -> BlockMask:
    tokens, device = arguments["query"].shape[2], arguments["query"].device
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=device)


def _rows(query: Tensor, table: Tensor | None, bias: Tensor | None) -> Tensor:
    """The table's row for every pair, [N, N]."""
    reach = (table if bias is None else bias).shape[1] // 2 if table is not None or bias is not None else 0
    position = torch.arange(query.shape[2], device=query.device)
    return (position - position[:, None]).clamp(-reach, reach) + reach


def _gather(profile: Tensor, rows: Tensor) -> Tensor:
    return profile.gather(-1, rows.expand(*profile.shape[:2], -1, -1))


def _hide(s: Tensor, causal: bool) -> Tensor:
    if not causal:
        return s
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
