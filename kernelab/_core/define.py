"""Registers a raw op with ``torch.library``: schema, body, fake.

``Library.define`` + ``impl`` costs about 3 us a call where ``custom_op`` costs 10 to 40. The backend is chosen inside
the body, so compiled and exported graphs stay valid when the choice changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import registry

_LIBRARY = torch.library.Library("kernelab", "FRAGMENT")

# What runs inside each raw op, for a dispatch mode that wants to see it.
BODIES: dict[torch._ops.OpOverload, Callable] = {}


def define(op: str, phase: str, signature: str, fake: Callable) -> Callable:
    """Defines ``kernelab::<op>_<phase>`` and returns it.

    Args:
        op: the op whose backends implement it; each backend's module has a function named ``phase``.
        phase: ``forward``, ``backward``, ...
        signature: schema without the name, its first argument a tensor whose device and dtype decide the backend, its
            last one ``str backend`` without a default (the dispatcher does not forward defaults).
        fake: shapes and dtypes of the outputs, called without the backend argument.
    """
    name = f"{op}_{phase}"

    def body(*args):
        *arguments, backend = args
        module = registry.select(op, backend, arguments[0].device, arguments[0].dtype)
        # Derivatives and casts are the business of what is around the op.
        with torch.no_grad(), torch._C._DisableAutocast():
            return getattr(module, phase)(*arguments)

    _LIBRARY.define(name + signature)
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kernelab::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    operator = getattr(torch.ops.kernelab, name).default
    BODIES[operator] = body
    return operator
