"""The figures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from kernelab.experiment.figures import curves, figure
from kernelab.papers.hydra_rlhf.cost import Cost


def reinforced(records: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Reward, KL to the reference, gold score and entropy of the answers of each PPO step."""
    return curves(records, ["reward", "kl", "gold", "entropy"], title=f"{title} on training prompts")


def supervised(records: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """A stage's losses and the share of pairs ranked right, as far as it has them."""
    return curves(records, [name for name in ("pair", "answer", "accuracy") if name in records[0]], title=title)


def costs(found: Sequence[Cost]) -> Figure:
    """Peak memory and seconds a sample of each method, by part of the step."""
    made, (memory, time) = figure(1, 2, width=5.0 + 2.0 * len(found), height=3.6)
    names = [cost.method for cost in found]
    memory.bar(names, [cost.peak / 1e6 for cost in found], label="peak")
    memory.bar(names, [cost.states / 1e6 for cost in found], label="weights and optimizer state")
    memory.set_ylabel("MB")
    bottom = [0.0] * len(found)
    for part in found[-1].seconds:
        parts = [cost.seconds.get(part, 0.0) * 1e3 for cost in found]
        time.bar(names, parts, bottom=bottom, label=part)
        bottom = [low + part for low, part in zip(bottom, parts, strict=True)]
    time.set_ylabel("milliseconds a sample")
    for axis in (memory, time):
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return made
