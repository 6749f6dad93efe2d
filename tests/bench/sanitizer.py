"""What the launches of Triton kernels touch: bytes, lanes out of bounds, races between programs.

    with sanitizer() as report:
        kernel[grid](x, y, n, BLOCK=1024)
    assert report.launches[0].bytes_loaded == 4 * n

Under TRITON_INTERPRET=1 (see interpreter.py) every launch is watched, in such a block or not. It raises
``SanitizerError`` if a lane read or wrote outside the launch's tensors (such a lane is masked off), if two programs
touched the same address and one of them wrote it without an atomic, if two lanes of one store disagree, if an integer
of 32 bits or less overflows, or if a ``tl.device_assert`` fails.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton

BYTES = {"load": "bytes_loaded", "store": "bytes_stored", "atomic": "bytes_atomic"}
NOT_KERNEL = tuple(str(Path(file).parent) + os.sep for file in (triton.__file__, np.__file__, __file__))
NOBODY, SEVERAL = 0, -1  # beside program numbers, which count from 1
ADDRESS_BITS = 48


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

    strict: bool
    reachable: dict[str, torch.Tensor]
    launches: list[LaunchReport] = field(default_factory=list)

    def total(self, count: str) -> int:
        return sum(getattr(launch, count) for launch in self.launches)

    def assert_clean(self) -> None:
        for launch in self.launches:
            launch.assert_clean()


_reports: list[Report] = []


@contextmanager
def sanitizer(*, strict: bool = True, reachable: Iterable[torch.Tensor] = ()) -> Iterator[Report]:
    """Collects a report of every launch in the block, where ``torch.empty`` gives NaN.

    ``strict=False`` records faults without raising, for tests of faulty kernels. ``reachable`` are tensors that kernels
    find through a table of pointers.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    report = Report(strict, {f"reachable[{index}]": tensor for index, tensor in enumerate(reachable)})
    _reports.append(report)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield report
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _reports.pop()


class RunningLaunch:
    """One launch while its programs run.

    A pointer carries in its upper 16 bits which argument it comes from, so that leaving one tensor is a fault even
    where another begins. Pointers out of a table in memory carry 0.
    """

    def __init__(self, kernel: str, arguments: dict[str, torch.Tensor]) -> None:
        self.report = LaunchReport(kernel)
        self.program = NOBODY
        self.names = [None, *arguments]
        spans = [_span(tensor) for tensor in arguments.values()]
        self.starts, self.ends = np.array([(0, 0), *spans], np.int64).T
        self.tags = {id(tensor): tag << ADDRESS_BITS for tag, tensor in enumerate(arguments.values(), start=1)}
        for report in _reports:
            report.launches.append(self.report)
            arguments = arguments | report.reachable
        self.regions = _regions(arguments)
        self.region_starts = np.array([region.start for region in self.regions], np.int64)
        self.region_ends = np.array([region.end for region in self.regions], np.int64)

    def judge(self) -> None:
        if all(report.strict for report in _reports):
            self.report.assert_clean()

    def touch(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int, bits: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Counts one access. Gives the addresses and the mask of the active lanes in bounds; ``bits`` are stored."""
        active = np.array(np.broadcast_to(mask, pointers.shape))
        lanes = np.flatnonzero(active)
        argument, address = np.divmod(pointers.reshape(-1)[lanes].astype(np.int64), 1 << ADDRESS_BITS)
        place = self._locate(argument, address, itemsize)
        if (outside := place < 0).any():
            self._out_of_bounds(kind, argument[outside], address[outside])
            active.reshape(-1)[lanes[outside]] = False
            lanes, address, place = (each[~outside] for each in (lanes, address, place))
        setattr(self.report, BYTES[kind], getattr(self.report, BYTES[kind]) + lanes.size * itemsize)
        for index in np.unique(place):
            here, region = place == index, self.regions[index]
            race = region.touch(kind, address[here], itemsize, self.program)
            if kind == "store":
                values = np.broadcast_to(bits, pointers.shape).reshape(-1)[lanes[here]]
                race |= _disagree(address[here], values)
            if race.any():
                self.report.races += int(race.sum())
                self.fault(f"{kind} races with another program or lane in {region.names}", int(race.sum()))
        return pointers & np.uint64((1 << ADDRESS_BITS) - 1), active

    def _locate(self, argument: np.ndarray, address: np.ndarray, itemsize: int) -> np.ndarray:
        """Index of the region of each address, -1 where the argument does not reach."""
        if not self.regions:
            return np.full(address.shape, -1)
        region = np.searchsorted(self.region_starts, address, "right") - 1
        known = np.clip(argument, 0, len(self.starts) - 1)
        start = np.where(known > 0, self.starts[known], self.region_starts[region])
        end = np.where(known > 0, self.ends[known], self.region_ends[region])
        inside = (known == argument) & (region >= 0) & (start <= address) & (address + itemsize <= end)
        return np.where(inside, region, -1)

    def _out_of_bounds(self, kind: str, argument: np.ndarray, address: np.ndarray) -> None:
        first, where = int(argument[0]), "not in any argument"
        if 0 < first < len(self.names):
            before, past = int(self.starts[first] - address[0]), int(address[0] - self.ends[first])
            where = f"{before} bytes before" if before > 0 else f"{past} bytes past"
            where += f" {self.names[first]}"
        self.report.out_of_bounds += address.size
        self.fault(f"{kind} out of bounds, first lane {where}", address.size)

    def fault(self, text: str, lanes: int) -> None:
        self.report.faults[f"{_kernel_line()}: {text}"] += lanes


class Region:
    """A stretch of memory that a launch may touch, in cells of its smallest element, and who touched each cell."""

    def __init__(self, start: int, end: int, cell: int, names: str) -> None:
        self.start, self.end, self.cell, self.names = start, end, cell, names
        shape = -(-(end - start) // cell)
        # zeros are NOBODY, and cost no memory where nobody touches them
        self.owners = {kind: np.zeros(shape, np.int32) for kind in ("load", "store", "atomic")}

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

    def _cells(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        width = max(1, itemsize // self.cell)
        return ((addresses - self.start) // self.cell)[:, None] + np.arange(width)  # [lanes, width]


def _disagree(addresses: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Lanes of one store that write something else than another lane at the same address."""
    order = np.argsort(addresses, kind="stable")
    result = np.zeros(len(addresses), bool)
    result[order[1:]] = (np.diff(addresses[order]) == 0) & (np.diff(values[order]) != 0)
    return result


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first to after the last element."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _regions(tensors: dict[str, torch.Tensor]) -> list[Region]:
    """The spans of the tensors, joined where they overlap."""
    joined: list[list] = []
    spans = [(*_span(tensor), tensor.element_size(), name) for name, tensor in tensors.items() if tensor.numel()]
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
