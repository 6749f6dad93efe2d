"""What is compared: groups of providers, each checked against the definition before it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.contract.error import BACKWARD, FORWARD, check

SEED = 20
FORWARD_ONLY, BOTH = "forward", "forward+backward"

# Named results; a list holds consecutive parts along dim 0.
Results = Mapping[str, Tensor | list[Tensor]]


@dataclass(frozen=True)
class Group:
    """What the providers of one table have in common. ``forward`` runs without autograd."""

    op: str
    direction: str
    case: str
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return "/".join((self.op, self.direction, self.case, str(self.dtype)[6:], self.device))


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Attributes:
        run: what is measured.
        exact: ``dtype -> results``, the definition of what ``run`` computes, in plain torch at that dtype.
        results: what is compared with ``exact``; None: what ``run`` returns.
        graph: makes the autograd graph of the forward, whose saved bytes are counted; None: there is none.
        weights: the tensors that do not count as saved.
        work: bytes that must be moved and FLOPs that must be done, at least.
    """

    run: Callable[[], object]
    exact: Callable[[torch.dtype], Results]
    results: Callable[[], Results] | None = None
    graph: Callable[[], object] | None = None
    weights: tuple[Tensor, ...] = ()
    work: tuple[int, int] | None = None


def refcheck(provider: Provider, dtype: torch.dtype) -> float:
    """The largest error of the provider's results, relative to the largest element of each.

    Raises:
        AssertionError: a result errs more than the contract allows.
    """
    torch.manual_seed(SEED)
    got = (provider.results or provider.run)()
    exact, plain = provider.exact(torch.float64), provider.exact(dtype)
    assert got.keys() == exact.keys(), f"results {sorted(got)}, expected {sorted(exact)}"
    errors = [0.0]
    for name, value in exact.items():
        value, one, plain_one = _whole(value), _whole(got[name]), _whole(plain[name])
        factor = FORWARD if name.startswith("output") else BACKWARD
        # An adapter may have another dtype than the group.
        check(name, one.to(plain_one.dtype), plain_one, value, factor)
        errors.append(((one.double() - value).abs().max() / value.abs().max()).item())
    return max(errors)


def _whole(value: Tensor | list[Tensor]) -> Tensor:
    return (torch.cat(value) if isinstance(value, list) else value).detach()
