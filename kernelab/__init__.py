"""Kernel-optimised training: adapter switching, relative attention, coordinate clipping, diffusion steps.

Importing kernelab needs only torch, touches no GPU and prints nothing; what is below it loads on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_PACKAGES = ("experiment", "lora", "nn", "ops", "papers")
_FUNCTIONS = {
    "explain": "kernelab.ops",  # through the ops, which register as they load
    "use_backend": "kernelab._core.registry",
    "KernelabError": "kernelab._core.errors",
    "BackendUnavailable": "kernelab._core.errors",
}
__all__ = [*_FUNCTIONS, *_PACKAGES]


def __getattr__(name: str):
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
