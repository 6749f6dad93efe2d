"""``kernelab plan hydra-rlhf``: what a run holds, the largest batch that fits, and what fits if a run did not."""

from __future__ import annotations

import json as json_format
import os
import resource
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Annotated, Any

import torch
import tyro
from rich.console import Group, RenderableType
from rich.json import JSON
from rich.markup import escape
from rich.table import Table

from kernelab._core.errors import bad_value
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.fit import most_rows
from kernelab.papers.hydra_rlhf.predict import KINDS, Plan, predict
from kernelab.papers.hydra_rlhf.roles import METHODS, chosen_methods
from kernelab.papers.hydra_rlhf.sft import STAGES


def plan(
    config: Annotated[Config, tyro.conf.arg(name="")],
    memory: float | None = None,
    json: bool = False,
) -> RenderableType:
    """Predicts the memory of a run without allocating it.

    Args:
        config: the run's own flags, --preset too. --model also takes a name: llama-7b, llama-13b, llama-3-8b.
        memory: bytes; also finds the largest batch_size that PPO has room for, the number of its parts as it is.
        json: print JSON.
    """
    if memory is not None and not 0 < memory <= 1e18:
        raise bad_value("hydra-rlhf", "memory", "more than 0 bytes, at most 1e18", memory)
    plans = [predict(replace(config, method=name)) for name in chosen_methods(config)]
    largest = [None if memory is None else largest_batch(plan.config, memory) for plan in plans]
    if json:
        return JSON(json_format.dumps([_record(*pair, memory) for pair in zip(plans, largest, strict=True)]))
    return Group(*(part for pair in zip(plans, largest, strict=True) for part in _shown(*pair, memory)))


def largest_batch(config: Config, memory: float) -> Plan | None:
    """The plan of PPO with the largest ``batch_size`` that fits, or None; the number of its parts stays."""
    parts = config.num_mini_batches * config.gradient_accumulation_steps
    plans: dict[int, Plan] = {}

    def peak(rows: int) -> int:
        changed = replace(config, batch_size=rows * parts, sft_steps=0, rm_steps=0, adaptive_kl_target=None)
        plans[rows] = predict(changed)
        return plans[rows].peak

    return plans.get(most_rows(peak, memory, config.batch_size // parts))


def smaller(plan: Plan, memory: float) -> Plan | None:
    """The plan of the next smaller setting that fits, or None.

    Fewer answers at once, and more and smaller parts of a mini-batch, come first, for they leave a step what it is;
    then gradient checkpointing. Fewer answers in all, or pairs of supervised training, come where nothing else helps.
    """
    part = max(plan.totals, key=plan.totals.__getitem__)
    while changes := _shrunk(plan.config, part):
        plan = predict(replace(plan.config, **changes))
        too_large = [part for part, total in plan.totals.items() if total > memory]
        if not too_large:
            return plan
        part = too_large[-1]
    return None


def _shrunk(config: Config, part: str) -> dict[str, Any]:
    """The settings that make a part of the run smaller, or none."""
    parts = config.num_mini_batches * config.gradient_accumulation_steps
    rows = config.batch_size // parts
    if part in STAGES and config.sft_batch_size > 1:
        return {"sft_batch_size": config.sft_batch_size // 2}
    if part == "answer":
        at_once = config.local_rollout_forward_batch_size or config.batch_size
        return {"local_rollout_forward_batch_size": at_once // 2} if at_once > 1 else {}
    if config.single_forward and rows > 1:
        return {"batch_size": rows // 2 * parts}
    if part in ("score", "update") and rows > 1:
        factor = next(factor for factor in range(2, rows + 1) if rows % factor == 0)
        return {"gradient_accumulation_steps": config.gradient_accumulation_steps * factor}
    helps = part == "update" or part in STAGES
    return {"gradient_checkpointing": True} if helps and not config.gradient_checkpointing else {}


def out_of_memory(config: Config) -> RenderableType:
    """For a run whose memory ran out: its plan, and the next smaller setting that fits."""
    largest = max((predict(replace(config, method=name)) for name in chosen_methods(config)), key=lambda one: one.peak)
    # A tenth for what is not tensors; and the plan itself has just been refuted, whatever it says.
    limit = min(0.9 * _memory_here(), largest.peak - 1)
    found = smaller(largest, limit)
    lines = [
        "No smaller setting fits." if found is None else f"The next smaller setting that fits: {_flags(config, found)}"
    ]
    if config.cost_steps:
        lines.append("The phases of costs hold the models of all cost_methods; --cost-steps 0 leaves them out.")
    return Group(_table(largest), *lines)


def _flags(before: Config, found: Plan) -> str:
    names = [field.name for field in fields(Config) if field.name != "method"]
    changed = {
        name: getattr(found.config, name) for name in names if getattr(found.config, name) != getattr(before, name)
    }
    flags = (f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in changed.items())
    return f"{' '.join(flags)} ({_size(found.peak)})"


def _memory_here() -> float:
    """Bytes of the accelerator, or of what this process may take."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties().total_memory
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return physical if limit == resource.RLIM_INFINITY else min(physical, limit)


def _shown(plan: Plan, largest: Plan | None, memory: float | None) -> Iterator[RenderableType]:
    yield _table(plan)
    if memory is None:
        return
    parts = plan.config.num_mini_batches * plan.config.gradient_accumulation_steps
    if largest is None:
        yield f"PPO does not fit {_size(memory)} with a batch of {parts}, one answer in each part."
    else:
        found = f"{largest.config.batch_size} ({_size(largest.peak)})"
        yield f"The largest batch of PPO that fits {_size(memory)}: {found}."
    for part in plan.parts.keys() & STAGES.keys():
        if plan.totals[part] > memory:
            yield f"{STAGES[part]} does not fit with a batch of {plan.config.sft_batch_size} pairs."


def _table(plan: Plan) -> Table:
    config = plan.config
    rows = config.batch_size // (config.num_mini_batches * config.gradient_accumulation_steps)
    title = (
        f"{METHODS[config.method].title}, {escape(config.model or 'small Llama')}, {config.dtype}\n"
        f"{config.batch_size} answers, {rows} at once, {config.prompt_length} + {config.response_length} tokens"
    )
    made = Table(title=title, caption="Tensors alone: an allocator and a GPU's libraries take more.")
    made.add_column("peak memory")
    for part in plan.parts:
        made.add_column(STAGES.get(part, part), justify="right")
    for kind in KINDS:
        made.add_row(kind, *(_size(kinds[kind]) if kind in kinds else "" for kinds in plan.parts.values()))
    made.add_section()
    made.add_row("all", *map(_size, plan.totals.values()), style="bold")
    return made


def _record(plan: Plan, largest: Plan | None, memory: float | None) -> dict[str, Any]:
    found = {"method": plan.config.method, "parts": plan.parts, "totals": plan.totals, "peak": plan.peak}
    if memory is not None:
        found |= {"memory": memory, "largest_batch": largest.config.batch_size if largest else None}
    return found


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
