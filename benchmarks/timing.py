"""How time, memory and the machine's own ceilings are measured."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator

import torch

WARMUPS = 3
MOST_ROUNDS = 1000


def interleaved(
    calls: dict[str, Callable[[], object]], device: str, seconds: float, min_rounds: int
) -> dict[str, list[float]]:
    """Seconds that each call takes, round after round. A round runs all of them once, in a random order, so that what
    disturbs the machine falls on all of them alike."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set, and the interpreter's times mean nothing.")
    once = _cuda_timer() if device == "cuda" else _cpu_seconds
    names, order = list(calls), random.Random(0)
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARMUPS):
            call()
    deadline = time.perf_counter() + seconds
    with _no_collection():
        for round_number in range(MOST_ROUNDS):
            if round_number >= min_rounds and time.perf_counter() > deadline:
                break
            order.shuffle(names)
            for name in names:
                durations[name].append(once(calls[name]))
    return durations


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freeing it is not part of the call
    return seconds


def _cuda_timer() -> Callable[[Callable[[], object]], float]:
    """Device time of a call whose inputs are not in the L2 cache. While the cache is overwritten the host runs ahead,
    so that launches of less than that do not count."""
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(call: Callable[[], object]) -> float:
        cache.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return once


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Replay:
    """A clock for pytest-benchmark that shows durations measured elsewhere: it is read before and after each round."""

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, durations: list[float]) -> None:
        """The next rounds take ``durations``."""
        self._readings = itertools.chain.from_iterable((0.0, seconds) for seconds in durations)

    def __call__(self) -> float:
        return next(self._readings)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most memory that ``call`` has allocated at one moment, its results included.

    On a CPU from the allocator's own events: a dispatch mode does not see the temporaries inside a custom operator.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes), default=0)


@functools.cache
def copy_ceiling(device: str) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    size = (1 << 30 if device == "cuda" else 1 << 27) // 4
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), device)


@functools.cache
def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of torch's product of two square matrices."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _median(lambda: a @ b, device)


def _median(call: Callable[[], object], device: str) -> float:
    return statistics.median(interleaved({"": call}, device, seconds=0.3, min_rounds=5)[""])
