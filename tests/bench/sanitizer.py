"""What one launch of a kernel touches: bytes, lanes out of bounds, races between programs."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton

HIDDEN = (str(Path(triton.__file__).parent), str(Path(np.__file__).parent), str(Path(__file__).parent))
MANY = -1


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
    faults: Counter[str] = field(default_factory=Counter)

    def assert_clean(self) -> None:
        if self.faults:
            lines = "".join(f"\n  {text}: {lanes} lanes" for text, lanes in self.faults.most_common(20))
            raise SanitizerError(f"{self.kernel}{list(self.grid)}:{lines}")


@dataclass
class Report:
    """Every launch inside one ``with sanitizer()``, in order."""

    launches: list[LaunchReport] = field(default_factory=list)

    def total(self, count: str) -> int:
        return sum(getattr(launch, count) for launch in self.launches)

    def assert_clean(self) -> None:
        for launch in self.launches:
            launch.assert_clean()


class Region:
    """A stretch of memory that the launch may touch, and which program touched each cell of it."""

    def __init__(self, start: int, end: int, names: list[str], cell: int) -> None:
        self.start, self.end, self.names, self.cell = start, end, names, cell
        cells = -(-(end - start) // cell)
        self.written, self.read, self.updated = (np.zeros(cells, np.int32) for _ in range(3))

    def record(self, kind: str, addresses: np.ndarray, itemsize: int, program: int, bits: np.ndarray | None):
        """Lanes that race. ``program`` counts from 1; 0 is nobody and ``MANY`` more than one."""
        width = max(1, itemsize // self.cell)
        cells = ((addresses - self.start) // self.cell)[:, None] + np.arange(width)  # [lanes, width]
        race = self._foreign(self.written, cells, program)
        if kind != "atomic":
            race |= self._foreign(self.updated, cells, program)
        if kind != "load":
            race |= self._foreign(self.read, cells, program)
        if kind == "store":
            lanes = np.arange(len(cells), dtype=np.int32)
            self.written[cells] = lanes[:, None]
            winner = self.written[cells]
            if (winner != lanes[:, None]).any():
                race |= bits[winner] != bits[:, None]
            self.written[cells] = program
        else:
            owner = self.read if kind == "load" else self.updated
            owner[cells] = np.where(np.isin(owner[cells], (0, program)), program, MANY)
        return race.any(axis=1)

    @staticmethod
    def _foreign(owner: np.ndarray, cells: np.ndarray, program: int) -> np.ndarray:
        seen = owner[cells]
        return (seen != 0) & (seen != program)


class Memory:
    """The memory of one launch: the spans of its tensor arguments, merged where they overlap."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        spans = sorted(
            (*_span(tensor), name, tensor.element_size()) for name, tensor in tensors.items() if tensor.numel()
        )
        merged: list[list] = []
        for start, end, name, itemsize in spans:
            if merged and start < merged[-1][1]:
                last = merged[-1]
                last[1], last[3] = max(last[1], end), min(last[3], itemsize)
                last[2].append(name)
            else:
                merged.append([start, end, [name], itemsize])
        self.regions = [Region(*span) for span in merged]
        self.starts = np.array([region.start for region in self.regions], np.int64)
        self.ends = np.array([region.end for region in self.regions], np.int64)

    def locate(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Region of each address, -1 where there is none."""
        if not self.regions:
            return np.full(addresses.shape, -1)
        index = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (index >= 0) & (addresses + itemsize <= self.ends[index])
        return np.where(inside, index, -1)

    def nearest(self, address: int) -> str:
        """The argument that an address out of bounds probably means."""
        if not self.regions:
            return "the launch has no tensor"
        gaps = np.maximum(self.starts - address, address - self.ends + 1)
        region = self.regions[int(gaps.argmin())]
        where = (
            f"{region.start - address} bytes before"
            if address < region.start
            else (f"{address - region.end} bytes past")
        )
        return f"{where} {' | '.join(region.names)}"


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class Launch:
    """One launch while it runs."""

    def __init__(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        self.report = LaunchReport(kernel)
        self.memory = Memory(tensors)
        self.program = 0

    def touch(self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int, value: np.ndarray | None = None):
        """Counts one access and returns the mask of its active lanes that lie in bounds."""
        active = np.broadcast_to(mask, pointers.shape).copy()
        addresses = pointers[active].astype(np.int64)
        if not addresses.size:
            return active
        bits = None
        if kind == "store":
            bits = np.ascontiguousarray(np.broadcast_to(value, pointers.shape)[active]).view(f"u{itemsize}")
        place = self.memory.locate(addresses, itemsize)
        outside = place < 0
        if outside.any():
            self.report.out_of_bounds += int(outside.sum())
            nearest = self.memory.nearest(int(addresses[outside][0]))
            self._fault(f"{kind} out of bounds (first: {nearest})", int(outside.sum()))
            active[active] = ~outside
            addresses, place = addresses[~outside], place[~outside]
            bits = bits[~outside] if bits is not None else None
        count = f"bytes_{ {'load': 'loaded', 'store': 'stored', 'atomic': 'atomic'}[kind] }"
        setattr(self.report, count, getattr(self.report, count) + addresses.size * itemsize)
        for index in np.unique(place):
            region, here = self.memory.regions[index], place == index
            race = region.record(
                kind, addresses[here], itemsize, self.program, bits[here] if bits is not None else None
            )
            if race.any():
                self.report.races += int(race.sum())
                self._fault(f"{kind} races in {' | '.join(region.names)}", int(race.sum()))
        return active

    def _fault(self, text: str, lanes: int) -> None:
        self.report.faults[f"{_kernel_line()}: {text}"] += lanes


def _kernel_line() -> str:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(HIDDEN):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"
