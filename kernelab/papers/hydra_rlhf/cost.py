"""Memory and time of a PPO step by method, at the same batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from rich.table import Table
from torch import Tensor

from kernelab._core.memory import LiveBytes
from kernelab.papers.hydra_rlhf.optimise import PPO

Prompts = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Cost:
    """What a step of PPO takes: bytes of weights, adapters and optimizer state, peak bytes and seconds by part."""

    method: str
    states: int
    peaks: dict[str, int]
    seconds: dict[str, float]
    """Of a sample: medians over the timed steps."""

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def seconds_per_sample(self) -> float:
        return sum(self.seconds.values())


def live_memory(ppo: PPO, prompts: Prompts) -> tuple[int, dict[str, int]]:
    """Bytes alive between two steps, and the peak within each part of one; exact, once a first step has been taken."""
    optimizer_state = chain.from_iterable(state.values() for state in ppo.optimizer.state.values())
    ppo.optimizer.zero_grad()
    with LiveBytes() as live:
        live.track(chain(ppo.roles.parameters(), ppo.roles.buffers(), filter(torch.is_tensor, optimizer_state)))
        states = live.current
        step(ppo, prompts, live.phase)
    return states, live.phases


def seconds(ppo: PPO, prompts: Prompts) -> dict[str, float]:
    """Seconds that each part of a step takes."""
    found: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        _synchronize()
        began = time.perf_counter()
        yield
        _synchronize()
        found[part] = time.perf_counter() - began

    step(ppo, prompts, timed)
    return found


def step(ppo: PPO, prompts: Prompts, part: Callable[[str], AbstractContextManager[None]]) -> dict[str, float]:
    """One step of PPO, its parts under the context that ``part`` gives for their names."""
    with part("answer"):
        sequences = ppo.answer(prompts)
    with part("score"):
        scores = ppo.score(sequences)
    with part("update"):
        return ppo.update(sequences, scores)


def medians(steps: list[dict[str, float]], samples: int) -> dict[str, float]:
    """Of each part's seconds a sample."""
    return {part: statistics.median(times[part] for times in steps) / samples for part in steps[0]}


def table(costs: list[Cost]) -> Table:
    """The costs, the last of them in proportion to the first."""
    made = Table(title="a step of PPO at the same batch")
    for column in ("", *(cost.method for cost in costs), "last / first"):
        made.add_column(column, justify="left" if not column else "right")
    rows: list[tuple[str, list[float], Callable[[float], str]]] = [
        ("weights and optimizer state", [cost.states for cost in costs], _megabytes),
        *((f"peak memory, {part}", [cost.peaks[part] for cost in costs], _megabytes) for part in costs[0].peaks),
        ("peak memory", [cost.peak for cost in costs], _megabytes),
        *((f"seconds a sample, {part}", [cost.seconds[part] for cost in costs], _seconds) for part in costs[0].seconds),
        ("seconds a sample", [cost.seconds_per_sample for cost in costs], _seconds),
    ]
    for name, values, show in rows:
        made.add_row(name, *map(show, values), f"{values[-1] / values[0]:.2f}")
    return made


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def _seconds(value: float) -> str:
    return f"{value:.4f} s"


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
