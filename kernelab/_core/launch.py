"""What the launchers of Triton kernels share. Importing it needs no Triton."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .spec import Launch

# Architectures of ahead-of-time checks, by what ``capability`` says of them.
TARGETS = {80: "sm_80", 90: "sm_90", 100: "sm_100", 0: "gfx942"}


class Blocks(NamedTuple):
    """Sizes of one kernel's blocks: rows and columns of the output, length of a step of the sum."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def capability(device: torch.device) -> int:
    """Compute capability, 90 for an H100; 0 for a GPU of AMD. The interpreter uses the blocks of 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 0 if torch.version.hip else 10 * major + minor


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size`` and 16, the shortest side of a matrix instruction."""
    return max(16, 1 << (size - 1).bit_length())


def unit_stride(t: Tensor) -> Tensor:
    """``t``, or a copy whose last dimension is contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def run(launches: Iterable[Launch], like: Tensor) -> None:
    """Launches on the device of ``like``, in order; an empty grid is none."""
    with torch.cuda.device_of(like):
        for launch in launches:
            if all(launch.grid):
                launch.kernel[launch.grid](**launch.args, **launch.options)
