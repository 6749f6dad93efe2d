"""What the tests, the AOT checks and the benchmarks know of ``toeplitz_attention``."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from kernelab._core.sequences import documents_of
from kernelab._core.spec import Case, Misuse, OpSpec, changing, replacing

from . import reference as definition
from . import toeplitz_attention
from .arguments import check


def _case(
    name: str,
    *,
    batch: int = 2,
    heads: int = 2,
    tokens: tuple[int, int] = (23, 23),
    features: int = 12,
    reach: int = 8,
    shared: bool = False,
    size: float = 1.0,
    profile: Callable[[Tensor], Tensor] | None = None,
    causal: bool = False,
    offset: int | None = None,
    padding: bool = False,
    lengths: tuple[int, ...] = (),
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    train: str = "value bias",
    tags: str = "",
) -> Case:
    """``tokens``: queries and keys. ``shared``: one bias for all heads. It has a standard deviation of ``size``, or is
    the ``profile`` of the distances -reach..reach. ``lengths``: of packed documents. ``layout`` makes another tensor.
    """

    def build(device, dtype, generator):
        queries, keys = tokens
        values = layout(torch.randn((batch, heads, keys, features), generator=generator, device=device).to(dtype))
        rows = 1 if shared else heads
        bias = torch.randn((rows, 2 * reach + 1), generator=generator, device=device) * size
        if profile is not None:
            bias = profile(torch.arange(-reach, reach + 1, device=device)).expand(rows, -1)
        return {
            "value": values.requires_grad_("value" in train),
            "bias": bias.to(dtype).requires_grad_("bias" in train),
            "causal": causal,
            "queries": queries,
            "key_padding_mask": _padding(values.shape[0], keys, device) if padding else None,
            "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], device=device) if lengths else None,
            "query_offset": offset,
        }

    return Case(name, build, frozenset(tags.split()))


def _padding(batch: int, keys: int, device: torch.device) -> Tensor:
    """Batch element b lacks its first b keys and its last, the last one all keys."""
    place = torch.arange(keys, device=device)
    first = torch.arange(batch, device=device)[:, None]
    return (place >= first) & (place < keys - 1) & (first < max(batch - 1, 1))


def _steep(distance: Tensor) -> Tensor:
    """Falls by 8 from distance to distance: far keys have the weight 0 in float32, but count where they are alone."""
    return -8.0 * distance.abs()


def _rising(distance: Tensor) -> Tensor:
    """The furthest key has the largest weight."""
    return 8.0 * distance.abs()


def _bounded(distance: Tensor) -> Tensor:
    """A Gaussian that ends before the table does."""
    return torch.where(distance.abs() < 6, -distance.square() / 18.0, -torch.inf)


# Where all keys of a query are in one column of the bias, or one weight is nearly all, the bias has no gradient but
# rounding errors: tests/ops/ compares those with the size of their terms.
CASES = (
    _case("smallest", tokens=(4, 5), features=3, reach=2, padding=True, tags="smallest"),
    _case("causal-smallest", tokens=(5, 5), features=3, reach=2, causal=True, tags="smallest"),
    *(
        _case("-".join(words), causal="causal" in words, shared="shared" in words, **more)
        for kind, more in {
            "plain": {"tokens": (150, 150)},
            "padding": {"tokens": (150, 150), "batch": 3, "padding": True},
            "packed": {"tokens": (146, 146), "batch": 1, "lengths": (7, 0, 1, 115, 20, 3)},
        }.items()
        for words in ((kind,), (kind, "causal"), (kind, "shared"), (kind, "causal", "shared"))
    ),
    _case("open-lengths", batch=5, tokens=(10, 10), features=8, causal=True, tags="dynamic"),
    *(
        _case(f"{name}{'-causal' * causal}{'-padding' * padding}", tokens=(140, 140), reach=139, profile=profile,
              causal=causal, padding=padding, batch=3, train=train)
        for name, profile, train in (
            ("steep", _steep, "value"), ("rising", _rising, "value bias"), ("bounded", _bounded, "value bias")
        )
        for causal in (False, True)
        for padding in (False, True)
    ),
    _case("nothing-but-infinity", profile=lambda d: torch.full(d.shape, -torch.inf), train="value"),
    _case("peaked", size=6.0),
    _case("peaked-padding", size=6.0, padding=True, batch=3, tokens=(70, 70), causal=True),
    _case("no-keys", tokens=(3, 0)),
    _case("no-queries", tokens=(0, 5)),
    _case("no-batch", batch=0),
    _case("no-batch-padding", batch=0, padding=True),
    _case("one-token", tokens=(1, 1), causal=True),
    _case("one-query-of-a-cache", tokens=(1, 70), causal=True),
    _case("some-queries-of-a-cache", tokens=(5, 170), causal=True, padding=True),
    _case("queries-inside", tokens=(70, 140), offset=11, causal=True),
    _case("queries-beyond", tokens=(10, 40), offset=100, causal=True, train="value"),
    _case("queries-before", tokens=(100, 40), offset=-70, causal=True),
    _case("queries-before-all", tokens=(10, 40), offset=-20, causal=True),
    _case("reach-of-zero", tokens=(70, 70), reach=0, train="value"),
    _case("reach-beyond-all", tokens=(70, 70), reach=190, causal=True),
    _case("one-feature", features=1, causal=True),
    _case("many-features", tokens=(200, 200), features=96, batch=4, causal=True),
    _case("many-features-padding", tokens=(200, 200), features=96, batch=3, padding=True),
    _case("heads-inside", layout=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    _case("column-major", layout=lambda t: t.mT.contiguous().mT),
    _case("expanded", batch=1, layout=lambda t: t.expand(3, -1, -1, -1)),
    _case("offset", batch=3, layout=lambda t: t[1:]),
    _case("only-bias", train="bias"),
    _case("only-value", train="value", causal=True),
    _case("no-gradient", train=""),
    _case("heads-of-a-model", batch=4, heads=12, tokens=(512, 512), features=64, reach=511, causal=True, tags="bench"),
)  # fmt: skip


def reference(value, bias, *, causal=False, queries=None, key_padding_mask=None, cu_seqlens=None, query_offset=None):
    """The output by autograd through its definition."""
    queries, query_offset = check(value, bias, causal, queries, query_offset)
    documents = documents_of("", cu_seqlens, value, value.shape[0], value.shape[2])
    bias = bias.expand(value.shape[1], -1)
    return definition.forward(value, bias, key_padding_mask, documents, causal, queries, query_offset)[0]


def _flops(arguments: dict) -> tuple[int, int]:
    """A product with the values; backward has two. Keys that a query cannot see are not multiplied."""
    value, queries = arguments["value"], arguments["queries"]
    pairs = queries * value.shape[2] // (2 if arguments["causal"] else 1)
    product = 2 * pairs * value.shape[0] * value.shape[1] * value.shape[3]
    return product, 2 * product


def _bytes_moved(arguments: dict) -> tuple[int, int]:
    """Every input read once, every output written once; backward reads the values, the output and its cotangent."""
    value, bias = arguments["value"], arguments["bias"]
    out = value.nbytes // max(value.shape[2], 1) * arguments["queries"]
    inputs = value.nbytes + bias.nbytes
    return inputs + out, 2 * inputs + 2 * out


# The smallest case: batch 2, 2 heads, 4 queries, 5 keys, 3 features, K = 2.
_MISUSES = (
    Misuse(replacing(value=[1.0]), TypeError, "'value'"),
    Misuse(changing("value", lambda t: t.long()), TypeError, "'value'"),
    Misuse(changing("value", lambda t: t[0]), ValueError, r"'value'.*\[batch, heads, keys, features\]"),
    Misuse(changing("value", lambda t: t[..., :0]), ValueError, "'value'.*not 0"),
    Misuse(replacing(bias=None), TypeError, r"'bias'.*\[2 or 1, 2K\+1\]"),
    Misuse(changing("bias", lambda t: t[0]), ValueError, r"'bias'.*\[2 or 1, 2K\+1\]"),
    Misuse(changing("bias", lambda t: t.repeat(2, 1)), ValueError, r"'bias'.*\[2 or 1, 2K\+1\]"),
    Misuse(changing("bias", lambda t: t[:, :4]), ValueError, "'bias'.*odd number of columns.*-K..K"),
    Misuse(changing("bias", lambda t: t.double()), ValueError, "'bias'.*dtype"),
    Misuse(changing("bias", lambda t: t.to("meta")), ValueError, "'bias'.*cpu"),
    Misuse(replacing(causal=1), TypeError, "'causal'"),
    Misuse(replacing(queries=2.0), TypeError, "'queries'"),
    Misuse(replacing(queries=-1), ValueError, "'queries'.*at least 0"),
    Misuse(replacing(query_offset=True), TypeError, "'query_offset'"),
    Misuse(replacing(key_padding_mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, r"'key_padding_mask'.*\[2, 5\]"),
    Misuse(replacing(key_padding_mask=torch.ones(2, 5)), TypeError, r"'key_padding_mask'.*\.bool\(\)"),
    Misuse(replacing(cu_seqlens=torch.tensor([0, 5])), ValueError, "'cu_seqlens'.*batch of 2"),
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SPECS = (
    OpSpec(
        name="toeplitz_attention",
        function=toeplitz_attention,
        reference=reference,
        cases=CASES,
        dtypes={"reference": _FLOATS, "cpu": _FLOATS, "cuda": _FLOATS},
        bytes_moved=_bytes_moved,
        flops=_flops,
        dynamic={"value": {0: "batch", 2: "tokens"}},
        misuses=_MISUSES,
    ),
)
