"""What an op declares about itself: one specification feeds the tests, the AOT checks, the benchmarks and the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """One set of arguments of an op.

    Attributes:
        name: unique within the op.
        build: ``(device, dtype, generator) -> keyword arguments`` of the public function. Tensors that get gradients
            have ``requires_grad`` set.
        tags: "smallest" (gradcheck, opcheck, one graph; the first such case stands for the op), "interp" (run under
            Triton's interpreter too), "bench" (measured), "gpu" (too large for a CPU test), "dynamic" (exported
            with the specification's open dimensions).
    """

    name: str
    build: Callable[[torch.device, torch.dtype, torch.Generator], dict]
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Launch:
    """One kernel launch with its real call signature, for ahead-of-time compilation."""

    name: str
    kernel: object  # a triton.jit function
    grid: tuple[int, ...]
    args: dict  # argument name -> tensor (meta is enough), number or constexpr
    options: dict  # num_warps, num_stages
    targets: tuple[str, ...] = ()  # architectures whose block sizes these are, "sm_90"; none: all


@dataclass(frozen=True)
class Misuse:
    """A call that must be refused: what to change in the smallest case, the exception, words of its message."""

    change: Callable[[dict], dict]
    error: type[Exception]
    words: str


def replacing(**values: object) -> Callable[[dict], dict]:
    """A change of arguments: these have other values."""
    return lambda arguments: {**arguments, **values}


def changing(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[dict], dict]:
    """A change of arguments: one is made from what it was."""
    return lambda arguments: {**arguments, name: change(arguments[name])}


@dataclass(frozen=True)
class OpSpec:
    """Everything the contract suite, the AOT checks and the benchmarks need to know of an op.

    Attributes:
        name: name of the op in the registry.
        function: the public function.
        reference: the definition, with the same keyword arguments (``backend`` apart), in plain differentiable torch.
        cases: from smallest to largest.
        dtypes: a backend's dtypes, by its name.
        bytes_moved: ``arguments -> (forward, backward)`` bytes that a kernel must at least read and write.
        flops: ``arguments -> (forward, backward)``.
        dynamic: dimensions that a compiled or exported graph leaves open, by argument, for the case tagged "dynamic".
        launches: the Triton launches of the tuned configurations, for AOT.
        misuses: calls that must be refused.
        second_order: False where a second derivative raises ``DoubleBackwardUnsupported``.
    """

    name: str
    function: Callable
    reference: Callable
    cases: tuple[Case, ...]
    dtypes: dict[str, tuple[torch.dtype, ...]]
    bytes_moved: Callable[[dict], tuple[int, int]]
    flops: Callable[[dict], tuple[int, int]]
    dynamic: dict[str, dict[int, str]] = field(default_factory=dict)
    launches: Callable[[], Iterable[Launch]] | None = None
    misuses: tuple[Misuse, ...] = field(default=())
    second_order: bool = True

    def case(self, tag: str) -> Case:
        """The first case with a tag."""
        return next(case for case in self.cases if tag in case.tags)
