"""Errors that say what went wrong, in which argument, what was expected, what came, and what to do."""

from __future__ import annotations

import sys


class KernelabError(Exception):
    """Base of every error that kernelab raises on purpose."""


class ArgumentValueError(KernelabError, ValueError):
    """An argument has the right type but an impossible value, shape, dtype or device."""


class ArgumentTypeError(KernelabError, TypeError):
    """An argument has the wrong type."""


class BackendUnavailable(KernelabError, RuntimeError):
    """A demanded backend cannot run here; the message lists every backend with its reason."""


class NativeLoadError(KernelabError, ImportError):
    """The compiled extension is missing or does not load; raised on first use, never on import."""


class DoubleBackwardUnsupported(KernelabError, RuntimeError):
    """A second derivative was asked of an op that has none; silence would mean a wrong Hessian."""


def describe(value: object) -> str:
    """A short description of any value, for the "got" part of a message."""
    torch = sys.modules.get("torch")  # not imported here: `kernelab list` and `--help` start without it
    if torch and isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    if torch and isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        return f"{type(value).__name__} of {len(value)}: " + "; ".join(describe(item) for item in value[:4])
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def bad_value(where: str, argument: str, expected: str, got: object, hint: str = "") -> ArgumentValueError:
    """``ValueError`` for ``argument`` of ``where``. A string ``got`` is used as it is."""
    return ArgumentValueError(_text(where, argument, expected, got, hint))


def bad_type(where: str, argument: str, expected: str, got: object, hint: str = "") -> ArgumentTypeError:
    """``TypeError`` for ``argument`` of ``where``. A string ``got`` is used as it is."""
    return ArgumentTypeError(_text(where, argument, expected, got, hint))


def _text(where: str, argument: str, expected: str, got: object, hint: str) -> str:
    got = got if isinstance(got, str) else describe(got)
    return f"{where}: argument '{argument}': expected {expected}, got {got}." + (f" {hint}" if hint else "")
