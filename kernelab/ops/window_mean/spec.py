"""What the tests, the AOT checks and the benchmarks know of ``window_mean``."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from kernelab._core.sequences import documents_of
from kernelab._core.spec import Case, Misuse, OpSpec, changing, replacing

from . import reference as definition
from . import triton_spec, window_mean
from .arguments import check


def _case(
    name: str,
    widths: int | tuple[int, ...],
    *,
    batch: int = 2,
    heads: int = 2,
    tokens: int = 23,
    features: int = 12,
    causal: bool = True,
    padding: bool = False,
    lengths: tuple[int, ...] = (),
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    tags: str = "",
) -> Case:
    """``lengths``: of packed documents. ``layout`` makes another tensor of the values."""

    def build(device, dtype, generator):
        values = torch.randn((batch, heads, tokens, features), generator=generator, device=device).to(dtype)
        values = layout(values)
        return {
            "value": values.requires_grad_(),
            "widths": list(widths) if isinstance(widths, tuple) else widths,
            "causal": causal,
            "key_padding_mask": _padding(values.shape[0], tokens, device) if padding else None,
            "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], device=device) if lengths else None,
        }

    return Case(name, build, frozenset(tags.split()))


def _padding(batch: int, tokens: int, device: torch.device) -> Tensor:
    """Batch element b lacks its first b tokens and its last and one in the middle, the last one all."""
    place = torch.arange(tokens, device=device)
    first = torch.arange(batch, device=device)[:, None]
    return (place >= first) & (place < tokens - 1) & (place != tokens // 2) & (first < batch - 1)


CASES = (
    _case("smallest", (2, 3), tokens=5, features=3, padding=True, tags="smallest interp"),
    _case("both-sides", (1, 3), tokens=5, features=3, causal=False, tags="smallest interp"),
    *(
        _case(f"{words}{'' if causal else 'both-sides-'}{width}", width, causal=causal, tags=tags, **more)
        for words, more in {
            "": {"tokens": 37},
            "padded-": {"tokens": 37, "batch": 3, "padding": True},
            "packed-": {"batch": 1, "tokens": 46, "lengths": (7, 0, 1, 15, 20, 3)},
        }.items()
        for causal in (True, False)
        for width, tags in ((1, ""), (2, ""), (7, "interp"), (36, ""), (37, ""), (1000, "interp"))
    ),
    _case("open-lengths", (3, 50), batch=5, tokens=10, tags="dynamic"),
    _case("no-tokens", 3, tokens=0, tags="interp"),
    _case("no-batch", 3, batch=0),
    _case("one-token", (1, 5), tokens=1, tags="interp"),
    _case("one-feature", (4, 9), features=1, tags="interp"),
    _case("many-heads", (1, 3, 7, 15, 31, 63, 127, 255), heads=8, tokens=300, features=16, tags="interp"),
    _case("many-heads-both-sides", (1, 3, 7, 15, 31, 63, 127), heads=7, tokens=300, causal=False, tags="interp"),
    _case("long", (13, 1023), batch=1, tokens=4500, features=8),
    *(
        _case(f"features-{d}", (5, 17), features=d, causal=d % 2 == 0, tags=tags)
        for tags, sizes in {"interp": (16, 64, 100), "": (2, 15, 17, 32, 63, 65, 80, 128, 131, 200)}.items()
        for d in sizes
    ),
    _case("heads-inside", (5, 9), layout=lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), tags="interp"),
    _case("column-major", (5, 9), layout=lambda t: t.mT.contiguous().mT, tags="interp"),
    _case("expanded", (5, 9), batch=1, layout=lambda t: t.expand(3, -1, -1, -1), padding=True),
    _case("offset", (5, 9), batch=3, layout=lambda t: t[1:], tags="interp"),
    _case(
        "heads-of-a-model", tuple(2 ** (h % 8 + 1) - 1 for h in range(12)), batch=4, heads=12, tokens=512, features=64,
        tags="bench",
    ),
)  # fmt: skip


def reference(value, widths, *, causal=True, key_padding_mask=None, cu_seqlens=None):
    """The output by autograd through its definition."""
    documents = documents_of("", cu_seqlens, value, value.shape[0], value.shape[2])
    return definition.forward(value, check(value, widths, causal), causal, key_padding_mask, documents)


def _flops(arguments: dict) -> tuple[int, int]:
    """Two additions and a product an element, in time that is the memory's."""
    return 3 * arguments["value"].numel(), 3 * arguments["value"].numel()


def _bytes_moved(arguments: dict) -> tuple[int, int]:
    """Every input read once, every output written once."""
    return 2 * arguments["value"].nbytes, 2 * arguments["value"].nbytes


# The smallest case: batch 2, 2 heads, 5 tokens, 3 features.
_MISUSES = (
    Misuse(replacing(value=[1.0]), TypeError, "'value'"),
    Misuse(changing("value", lambda t: t.long()), TypeError, "'value'"),
    Misuse(changing("value", lambda t: t[0]), ValueError, r"'value'.*\[batch, heads, tokens, features\]"),
    Misuse(changing("value", lambda t: t[..., :0]), ValueError, "'value'.*not 0"),
    Misuse(replacing(widths=0), ValueError, "'widths'.*at least 1"),
    Misuse(replacing(widths=[3, -1]), ValueError, "'widths'.*at least 1"),
    Misuse(replacing(widths=[3]), ValueError, "'widths'.*2 of them"),
    Misuse(replacing(widths=[3, 2.0]), TypeError, "'widths'"),
    Misuse(replacing(widths=True), TypeError, "'widths'"),
    Misuse(replacing(widths=None), TypeError, "'widths'"),
    Misuse(replacing(causal=1), TypeError, "'causal'"),
    Misuse(replacing(key_padding_mask=torch.ones(2, 4, dtype=torch.bool)), ValueError, r"'key_padding_mask'.*\[2, 5\]"),
    Misuse(replacing(key_padding_mask=torch.ones(2, 5)), TypeError, r"'key_padding_mask'.*\.bool\(\)"),
    Misuse(replacing(cu_seqlens=torch.tensor([0, 5])), ValueError, "'cu_seqlens'.*batch of 2"),
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OPEN = {0: "batch", 2: "tokens"}

SPECS = (
    OpSpec(
        name="window_mean",
        function=window_mean,
        reference=reference,
        cases=CASES,
        dtypes={"reference": _FLOATS, "cpu": _FLOATS, "triton": _FLOATS[:3]},
        bytes_moved=_bytes_moved,
        flops=_flops,
        dynamic={"value": _OPEN},
        launches=triton_spec.launches,
        misuses=_MISUSES,
    ),
)
