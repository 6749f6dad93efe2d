"""A judge's opinion of answers: the share of prompts at which they win against another policy's."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelab.experiment.device import from_main
from kernelab.experiment.run import Run
from kernelab.papers.hydra_rlhf.text_function import TextFunction

ROWS = 32
"""Prompts that a judge is asked about at once."""


def new_judge(reference: str) -> TextFunction:
    """``function(prompts, answers, baseline)``, three lists of texts: which share of a prompt each answer wins.

    1 is a win against the baseline's answer, 0 a loss, 0.5 a tie.
    """
    return TextFunction("judge", reference, numbers="numbers from 0 to 1", allowed=lambda value: 0 <= value <= 1)


def both_orders(judge: TextFunction, prompts: list[str], answers: list[str], baseline: list[str]) -> list[float]:
    """The shares that the answers win, as means of the two orders: a judge that prefers a place changes nothing."""
    first, second = judge(prompts, answers, baseline), judge(prompts, baseline, answers)
    return [(won + 1 - lost) / 2 for won, lost in zip(first, second, strict=True)]


def judged(
    run: Run, name: str, judge: TextFunction, prompts: list[str], answers: list[str], baseline: list[str]
) -> Tensor:
    """The share that each answer wins, [N]; phase ``judge_<name>``, so that a resumed run asks only for the rest."""
    state: dict[str, list[float]] = {"won": []}
    start = run.restore(state, phase=f"judge_{name}")
    for step in run.steps(start, -(-len(prompts) // ROWS), "judge"):
        rows = slice(step * ROWS, (step + 1) * ROWS)
        found = both_orders(judge, prompts[rows], answers[rows], baseline[rows]) if run.is_main else None
        state["won"] = [*state["won"], *from_main(found)]
        if run.should_checkpoint(step, every=1):
            run.save(step, state)
    return torch.tensor(state["won"], dtype=torch.float64)
