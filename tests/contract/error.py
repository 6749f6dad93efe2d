"""The contract's measure of error: a kernel may err at most ``factor`` times as much as plain torch at its dtype.

Both are compared with the float64 reference; 4 ULP of the result's scale are always allowed. Where a result may be a
single sum that cancels, its scale is that of its terms, not of what they leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0


def check(name: str, got: Tensor, plain: Tensor, exact: Tensor, factor: float, terms: Tensor | None = None) -> None:
    """Raises AssertionError where ``got`` is further from ``exact`` (float64) than plain torch's error allows."""
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    ulp, scale = torch.finfo(got.dtype).eps, exact if terms is None else terms
    for measure, norm in (("largest", _largest), ("mean square", _mean_square)):
        error, allowed = norm(got.double() - exact), factor * norm(plain.double() - exact) + 4 * ulp * norm(scale)
        assert error <= allowed, (
            f"{name}: {measure} error {error:.3g}, allowed {allowed:.3g} (plain torch's {factor} times)"
        )


def _largest(t: Tensor) -> float:
    return t.abs().max().item()


def _mean_square(t: Tensor) -> float:
    return t.square().mean().sqrt().item()
