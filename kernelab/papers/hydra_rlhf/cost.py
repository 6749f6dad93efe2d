"""Memory and time of a step by method: at the same batch, and at the largest one that a memory holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from kernelab._core.memory import LiveBytes
from kernelab.experiment.device import from_main
from kernelab.experiment.run import Run
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.fit import most_rows
from kernelab.papers.hydra_rlhf.optimise import PPO
from kernelab.papers.hydra_rlhf.quantized import tensors
from kernelab.papers.hydra_rlhf.roles import METHODS, make_roles
from kernelab.papers.hydra_rlhf.sft import Supervision
from kernelab.papers.hydra_rlhf.task import Task
from kernelab.papers.hydra_rlhf.tokens import Sequences, shuffled

Prompts = tuple[Tensor, Tensor]
Pairs = tuple[Sequences, Sequences]
Part = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Cost:
    """What a step takes: bytes of weights, adapters and optimizer state, peak bytes and seconds by part."""

    method: str
    batch: int
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


def compare(config: Config, run: Run, task: Task) -> tuple[list[Cost], list[Cost]]:
    """Costs of ``cost_methods`` at the config's batch, and at the largest in ``cost_memory``.

    Phases ``cost`` and ``cost_largest``, on copies of the models. What attention holds depends on where answers end, so
    a peak may be a row's above ``cost_memory``.
    """
    if not config.cost_steps:
        return [], []
    equal = _measured(config, run, task, "cost")
    return equal, _measured(config, run, task, "cost_largest") if config.cost_memory else []


def _measured(config: Config, run: Run, task: Task, phase: str) -> list[Cost]:
    """One phase. Its first step counts memory; in the others the contenders take turns."""
    state: dict[str, Any] = {"costs": []}
    start = run.restore(state, phase=phase)
    with torch.random.fork_rng():
        contenders = [] if start else list(_contenders(config, task, phase))
    counted: list[tuple[int, dict[str, int]]] = []
    times: list[list[dict[str, float]]] = [[] for _ in contenders]
    for step in run.steps(start, 1 + config.cost_steps, phase.replace("_", ", ")):
        with torch.random.fork_rng():
            for contender, found in zip(contenders, times, strict=True):
                batch = contender.rows(step)
                if step == 0:
                    seconds(contender.trainer, batch)  # makes the optimizer's state
                    counted.append(live_memory(contender.trainer, batch))
                else:
                    found.append(seconds(contender.trainer, batch))
        if step == config.cost_steps:
            state["costs"] = [
                {
                    "method": contender.method,
                    "batch": contender.batch,
                    "states": states,
                    "peaks": peaks,
                    "seconds": medians(found, contender.batch),
                }
                for contender, (states, peaks), found in zip(contenders, counted, times, strict=True)
            ]
            run.save(step, state)
    return [Cost(**found) for found in state["costs"]]


@dataclass(frozen=True)
class _Contender:
    method: str
    trainer: PPO | Supervision
    batch: int
    task: Task
    seed: int

    def rows(self, step: int) -> Prompts | Pairs:
        """The ``step``-th batch."""
        if isinstance(self.trainer, Supervision):
            return self.task.pairs.pairs(shuffled(step, self.batch, len(self.task.pairs), self.seed))
        return self.task.questions[shuffled(step, self.batch, len(self.task.questions), self.seed)].prompts


def _contenders(config: Config, task: Task, phase: str) -> Iterator[_Contender]:
    config = replace(config, adaptive_kl_target=None)  # its horizon is for the config's own batch
    for name in config.cost_methods:
        contender = _contender(config, task, name)
        if phase == "cost":
            yield contender
        elif batch := _largest_batch(contender, config.cost_memory):
            yield _with_batch(contender, batch)


def _contender(config: Config, task: Task, name: str) -> _Contender:
    copied = task.copied()
    if name == "sft":
        rows = config.batch_size // (config.num_mini_batches * config.gradient_accumulation_steps)
        return _Contender("SFT", Supervision(config, "sft", copied.lm, copied.head), rows, task, config.seed)
    ppo = PPO(make_roles(name, config, copied), task.encoder, config)
    return _Contender(METHODS[name].title, ppo, config.batch_size, task, config.seed)


def _with_batch(contender: _Contender, batch: int) -> _Contender:
    """The same one, with all rows of a batch in memory at once."""
    if isinstance(ppo := contender.trainer, PPO):
        whole = {"num_mini_batches": 1, "gradient_accumulation_steps": 1, "local_rollout_forward_batch_size": 0}
        ppo.config = replace(ppo.config, batch_size=batch, **whole)
    return replace(contender, batch=batch)


def _largest_batch(contender: _Contender, memory: int) -> int:
    """The most rows whose peak is within ``memory``; 0 where one is too many."""

    def peak(batch: int) -> int:
        tried = _with_batch(contender, batch)
        seconds(tried.trainer, tried.rows(0))
        return from_main(max(live_memory(tried.trainer, tried.rows(0))[1].values()))

    return most_rows(peak, memory, start=8)


def live_memory(trainer: PPO | Supervision, batch: Prompts | Pairs) -> tuple[int, dict[str, int]]:
    """Bytes alive between two steps, and the peak within each part of one; exact, once a first step has been taken."""
    optimizers, model = trainer.descent.optimizers, trainer.model
    optimizer_state = chain.from_iterable(state.values() for each in optimizers for state in each.state.values())
    trainer.descent.zero_grad()
    with LiveBytes() as live:
        live.track(filter(torch.is_tensor, chain(tensors(model), optimizer_state)))
        states = live.current
        step(trainer, batch, live.phase)
    return states, live.phases


def seconds(trainer: PPO | Supervision, batch: Prompts | Pairs) -> dict[str, float]:
    """Seconds that each part of a step takes."""
    found: dict[str, float] = {}

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        _synchronize()
        began = time.perf_counter()
        yield
        _synchronize()
        found[part] = time.perf_counter() - began

    step(trainer, batch, timed)
    return found


def step(trainer: PPO | Supervision, batch: Prompts | Pairs, part: Part) -> None:
    """One step, its parts under the context that ``part`` gives for their names; SFT's is all update."""
    if isinstance(trainer, Supervision):
        with part("update"):
            trainer.gradients(*batch)
            trainer.descent.step()
        return
    with part("answer"):
        sequences = trainer.answer(batch)
    with part("score"):
        scores = trainer.score(sequences)
    with part("update"):
        trainer.update(sequences, scores)


def medians(steps: list[dict[str, float]], samples: int) -> dict[str, float]:
    """Of each part's seconds a sample."""
    return {part: statistics.median(times[part] for times in steps) / samples for part in steps[0]}


def table(costs: list[Cost], title: str) -> Table:
    """The costs, a column each."""
    made = Table(title=title)
    for column in ("", *(cost.method for cost in costs)):
        made.add_column(column, justify="right" if column else "left")
    made.add_row("batch", *(str(cost.batch) for cost in costs))
    made.add_row("weights and optimizer state", *(_megabytes(cost.states) for cost in costs))
    for part in costs[-1].peaks:
        made.add_row(f"peak memory, {part}", *(_megabytes(cost.peaks.get(part)) for cost in costs))
    made.add_row("peak memory", *(_megabytes(cost.peak) for cost in costs))
    for part in costs[-1].seconds:
        made.add_row(f"seconds a sample, {part}", *(_seconds(cost.seconds.get(part)) for cost in costs))
    made.add_row("seconds a sample", *(_seconds(cost.seconds_per_sample) for cost in costs))
    return made


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f} MB"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.4f} s"


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
