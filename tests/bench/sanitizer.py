"""What one launch of a kernel touches: bytes, lanes out of bounds, races between programs."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton

BYTES = {"load": "bytes_loaded", "store": "bytes_stored", "atomic": "bytes_atomic"}
NOT_KERNEL = tuple(str(Path(file).parent) + os.sep for file in (triton.__file__, np.__file__, __file__))
NOBODY, SEVERAL = 0, -1  # beside program numbers, which count from 1


class SanitizerError(AssertionError):
    """A kernel did what is undefined on a GPU."""


@dataclass
class LaunchReport:
    """Counts of one launch. A lane that a mask switches off counts nothing; the same address twice counts twice."""

    kernel: str
    grid: tuple[int, ...] = ()
    bytes_loaded: int = 0
    bytes_stored: int = 0
    bytes_atomic: int = 0
    dot_flops: int = 0
    out_of_bounds: int = 0
    races: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # what and at which line: lanes

    def assert_clean(self) -> None:
        if self.faults:
            lines = [f"  {text}: {lanes} lanes" for text, lanes in self.faults.most_common(20)]
            raise SanitizerError("\n".join([f"kernel {self.kernel} on grid {self.grid}:", *lines]))


@dataclass
class Report:
    """The launches inside one ``with sanitizer()``, in order."""

    launches: list[LaunchReport] = field(default_factory=list)

    def total(self, count: str) -> int:
        return sum(getattr(launch, count) for launch in self.launches)

    def assert_clean(self) -> None:
        for launch in self.launches:
            launch.assert_clean()


class Launch:
    """One launch while its programs run."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self.report = LaunchReport(kernel)
        self.regions = _regions(tensors)
        self.starts = np.array([region.start for region in self.regions], np.int64)
        self.ends = np.array([region.end for region in self.regions], np.int64)
        self.program = NOBODY

    def touch(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int, bits: np.ndarray | None = None
    ) -> np.ndarray:
        """Counts one access; the result is the mask of its active lanes in bounds. ``bits`` are the values stored."""
        active = np.array(np.broadcast_to(mask, pointers.shape))
        lanes = np.flatnonzero(active)
        addresses = pointers.reshape(-1)[lanes].astype(np.int64)
        place = self._locate(addresses, itemsize)
        if (outside := place < 0).any():
            self._out_of_bounds(kind, addresses[outside])
            active.reshape(-1)[lanes[outside]] = False
            lanes, addresses, place = (each[~outside] for each in (lanes, addresses, place))
        setattr(self.report, BYTES[kind], getattr(self.report, BYTES[kind]) + lanes.size * itemsize)
        for index in np.unique(place):
            here, region = place == index, self.regions[index]
            race = region.touch(kind, addresses[here], itemsize, self.program)
            if kind == "store":
                values = np.broadcast_to(bits, pointers.shape).reshape(-1)[lanes[here]]
                race |= region.disagree(addresses[here], values)
            if race.any():
                self.report.races += int(race.sum())
                self._fault(f"{kind} races with another program or lane in {region.names}", int(race.sum()))
        return active

    def _locate(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Index of the region of each address, -1 where there is none."""
        if not self.regions:
            return np.full(addresses.shape, -1)
        index = np.searchsorted(self.starts, addresses, "right") - 1
        return np.where(addresses + itemsize <= self.ends[index], index, -1)  # below the first start: index -1 already

    def _out_of_bounds(self, kind: str, addresses: np.ndarray) -> None:
        text = "no argument is a tensor"
        if self.regions:
            first = int(addresses[0])
            before, past = self.starts - first, first - self.ends
            nearest = int(np.maximum(before, past).argmin())
            gap = f"{before[nearest]} bytes before" if before[nearest] > 0 else f"{past[nearest]} bytes past"
            text = f"first lane {gap} {self.regions[nearest].names}"
        self.report.out_of_bounds += addresses.size
        self._fault(f"{kind} out of bounds, {text}", addresses.size)

    def _fault(self, text: str, lanes: int) -> None:
        self.report.faults[f"{_kernel_line()}: {text}"] += lanes


class Region:
    """A stretch of memory that a launch may touch, in cells of its smallest element, and who touched each cell."""

    def __init__(self, start: int, end: int, cell: int, names: str) -> None:
        self.start, self.end, self.cell, self.names = start, end, cell, names
        shape = -(-(end - start) // cell)
        self.owners = {kind: np.full(shape, NOBODY, np.int32) for kind in ("load", "store", "atomic")}

    def touch(self, kind: str, addresses: np.ndarray, itemsize: int, program: int) -> np.ndarray:
        """Lanes that conflict with an earlier access of another program. Loads agree, and so do atomics."""
        cells = self._cells(addresses, itemsize)
        race = np.zeros(cells.shape, bool)
        for earlier, owner in self.owners.items():
            if earlier == kind != "store":
                continue
            seen = owner[cells]
            race |= (seen != NOBODY) & (seen != program)
        owner = self.owners[kind]
        seen = owner[cells]
        owner[cells] = np.where((seen == NOBODY) | (seen == program), program, SEVERAL)
        return race.any(axis=1)

    def disagree(self, addresses: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Lanes of one store that write something else than another lane at the same address."""
        order = np.argsort(addresses, kind="stable")
        same = np.diff(addresses[order]) == 0
        differ = np.diff(values[order]) != 0
        result = np.zeros(len(addresses), bool)
        result[order[1:]] = same & differ
        return result

    def _cells(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        width = max(1, itemsize // self.cell)
        return ((addresses - self.start) // self.cell)[:, None] + np.arange(width)  # [lanes, width]


def _regions(tensors: dict[str, torch.Tensor]) -> list[Region]:
    """The spans of the tensors from first to last element, joined where they overlap."""
    joined: list[list] = []
    spans = []
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            itemsize = tensor.element_size()
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * itemsize, itemsize, name))
    for start, end, itemsize, name in sorted(spans):
        if joined and start < joined[-1][1]:
            _, last_end, last_itemsize, names = joined[-1]
            joined[-1][1:] = [max(end, last_end), min(itemsize, last_itemsize), f"{names}, {name}"]
        else:
            joined.append([start, end, itemsize, name])
    return [Region(*span) for span in joined]


def _kernel_line() -> str:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(NOT_KERNEL):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"
