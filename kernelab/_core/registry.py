"""Which backend runs an op.

``backend=`` > ``with use_backend(...)`` > ``KERNELAB_BACKEND`` > priority. The first three are demands: unmet, they
raise :class:`BackendUnavailable` with each backend's reason. The automatic choice takes the backend of highest
priority that is made for the device; where that one cannot run it falls back with one log line, which
``KERNELAB_STRICT=1`` turns into an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch

from .errors import BackendUnavailable

log = logging.getLogger("kernelab")

BACKENDS = ("reference", "cpu", "triton", "cuda")
Supports = Callable[[torch.device, torch.dtype], "str | None"]


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: a module, imported on first use, with one function a raw op."""

    name: str
    module: str
    priority: int
    devices: tuple[str, ...]  # device types it is made for (empty: all); the automatic choice considers no other
    supports: Supports  # None, or the reason why it cannot run

    def made_for(self, device: torch.device) -> bool:
        return not self.devices or device.type in self.devices


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` answers: the chosen backend (None: none can run), who asked, each backend's reason."""

    op: str
    chosen: str | None
    asked_by: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend can run'} ({self.asked_by})"]
        return "\n".join(lines + [f"  {name:<10}{reason}" for name, reason in self.reasons.items()])


_OPS: dict[str, dict[str, Backend]] = {}
_CHOICE: ContextVar[str | None] = ContextVar("kernelab_backend", default=None)


def register(op: str, backend: str, *, module: str, priority: int, devices: tuple[str, ...], supports: Supports):
    """Adds a backend to an op. Called once a backend, in the op's ``__init__``."""
    _OPS.setdefault(op, {})[backend] = Backend(backend, module, priority, devices, supports)


def cpu_support(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a CPU backend cannot run on a device (None: it can)."""
    return None if device.type == "cpu" else "needs CPU tensors"


def triton_support(device: torch.device) -> str | None:
    """Why Triton cannot run on a device (None: it can). On a CPU it runs under its interpreter, in tests."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'kernelab[cuda]'"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a GPU (on a CPU: TRITON_INTERPRET=1, for tests)"
    return None if device.type in ("cpu", "cuda") else f"no Triton driver for {device.type}"


def register_usual(op: str, package: str) -> None:
    """Adds the backends reference, cpu and triton, in the modules of ``package`` that ops have for them."""
    register(op, "reference", module=f"{package}.reference", priority=0, devices=(), supports=lambda *_: None)
    register(op, "cpu", module=f"{package}.cpu_kernels", priority=10, devices=("cpu",), supports=cpu_support)
    register(
        op,
        "triton",
        module=f"{package}.triton_launch",
        priority=20,
        devices=("cuda",),
        supports=lambda device, dtype: triton_support(device) or ("no float64" if dtype == torch.float64 else None),
    )


def ops() -> tuple[str, ...]:
    """Names of the registered ops."""
    return tuple(sorted(_OPS))


def backends(op: str) -> tuple[str, ...]:
    """Names of an op's backends, highest priority first."""
    return tuple(b.name for b in sorted(_OPS[op].values(), key=lambda b: -b.priority))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Demands a backend for every kernelab op called inside the block, in this thread.

    >>> with kernelab.use_backend("reference"):
    ...     kernelab.explain("lora_linear").chosen
    'reference'
    """
    if name not in BACKENDS:
        raise BackendUnavailable(f"use_backend: expected one of {', '.join(BACKENDS)}, got {name!r}.")
    token = _CHOICE.set(name)
    try:
        yield
    finally:
        _CHOICE.reset(token)


def demand(op: str, argument: str | None) -> tuple[str, str]:
    """The demanded backend ('' for none) and who demanded it."""
    if argument:
        return argument, "argument backend="
    if inside := _CHOICE.get():
        return inside, "use_backend"
    # "triton", or "lora_linear=cpu,linear_logprob=triton"
    for entry in os.environ.get("KERNELAB_BACKEND", "").split(","):
        name, _, value = entry.strip().rpartition("=")
        if value and name in ("", op):
            return value, "KERNELAB_BACKEND"
    return "", "automatic choice"


def select(op: str, argument: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module of the backend that runs ``op`` on this device and dtype."""
    wish, asked_by = demand(op, argument)
    strict = os.environ.get("KERNELAB_STRICT", "") not in ("", "0")
    return _select(op, wish, asked_by, strict, device, dtype)


@functools.lru_cache(maxsize=1024)
def _select(op: str, wish: str, asked_by: str, strict: bool, device: torch.device, dtype: torch.dtype) -> ModuleType:
    found = _explain(op, wish, asked_by, device, dtype)
    if found.chosen is None:
        raise BackendUnavailable(f"{op} on {device} in {dtype}: {asked_by} asks for {wish or 'any'!r}.\n{found}")
    best = next((b for b in backends(op) if _OPS[op][b].made_for(device)), found.chosen)
    if not wish and best != found.chosen:
        text = f"{op} on {device} in {dtype} falls back from {best} to {found.chosen}: {found.reasons[best]}"
        if strict:
            raise BackendUnavailable(f"{text} (KERNELAB_STRICT is set)")
        log.warning(text)
    return importlib.import_module(_OPS[op][found.chosen].module)


def _explain(op: str, wish: str, asked_by: str, device: torch.device, dtype: torch.dtype) -> Explanation:
    reasons = {name: _OPS[op][name].supports(device, dtype) for name in backends(op)}
    if wish:
        chosen = wish if wish in reasons and reasons[wish] is None else None
        if wish not in reasons:
            reasons[wish] = f"not a backend of {op}"
    else:
        able = (n for n in backends(op) if reasons[n] is None and _OPS[op][n].made_for(device))
        chosen = next(able, None)
    return Explanation(op, chosen, asked_by, {name: reason or "can run" for name, reason in reasons.items()})


def explain(op: str | Callable, *args, backend: str | None = None, **kwargs) -> Explanation:
    """Which backend would run ``op`` on these arguments, who decided, and why the others would not.

    Args:
        op: a public function of ``kernelab.ops``, or its name.
        *args, **kwargs: the arguments of the call; device and dtype are those of the first tensor (else CPU, float32).

    >>> kernelab.explain("lora_linear", torch.zeros(2, 8)).chosen
    'cpu'
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _OPS:
        raise BackendUnavailable(f"explain: no op {name!r}; the ops are {', '.join(ops())}.")
    tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    first = next(tensors, torch.empty(0))
    return _explain(name, *demand(name, backend), first.device, first.dtype)
