"""What a run claims, prints and draws."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from kernelab.experiment.run import Run
from kernelab.papers.hydra_rlhf import cost, figures
from kernelab.papers.hydra_rlhf.cost import Cost
from kernelab.papers.hydra_rlhf.evaluate import Difference, Evaluation, difference
from kernelab.papers.hydra_rlhf.task import Task


def report(
    run: Run,
    task: Task,
    ranked: Tensor,
    answers: tuple[Evaluation, Evaluation],
    costs: list[Cost],
    digests: tuple[str, str],
) -> dict[str, Any]:
    """Adds the claims and figures, prints the tables, and returns the summary."""
    before, after = answers
    summary = {
        "held_out_pairs": len(ranked),
        "held_out_prompts": len(after.answers),
        "ranking_accuracy": ranked.mean().item(),
        "reward": {"before": before.reward.mean().item(), "after": after.reward.mean().item()},
        "gold": {"before": before.gold.mean().item(), "after": after.gold.mean().item()},
        "costs": [
            asdict(found) | {"peak": found.peak, "seconds_per_sample": found.seconds_per_sample} for found in costs
        ],
    }
    gain = difference(ranked, torch.full_like(ranked, 0.5))
    _claim_gain(run, "Hydra-SFT ranks held-out pairs above chance", gain)
    _claim_gain(run, "PPO raises the learned reward of held-out prompts", difference(after.reward, before.reward))
    _claim_gain(run, "PPO raises the gold score of held-out prompts", difference(after.gold, before.gold))
    ratio = max((record["ratio_error"] for record in run.metrics("ppo")), default=0.0)
    run.claim("the policy ratio is 1 before the first update", expected=0.0, obtained=ratio, passed=ratio == 0)
    run.claim(
        "PPO leaves the trunk's sha256", expected=digests[0], obtained=digests[1], passed=digests[0] == digests[1]
    )
    if costs:
        lora, hydra = costs
        name = "Hydra-PPO's peak memory over LoRA-PPO's, at the same batch"
        run.claim(name, expected="< 1", obtained=hydra.peak / lora.peak, passed=hydra.peak < lora.peak)
        run.console.print(cost.table(costs))
        run.figure("cost", figures.costs(costs))
    run.console.print(_scores(before, after), _examples(task, before, after))
    for phase, draw in (("sft", figures.supervised), ("ppo", figures.reinforced)):
        if records := run.metrics(phase):
            run.figure(phase, draw(records))
    return summary


def _claim_gain(run: Run, name: str, gain: Difference) -> None:
    obtained = f"{gain} ({gain.in_errors:.1f} standard errors)"
    run.claim(name, expected="more than 3 standard errors", obtained=obtained, passed=gain.in_errors > 3)


def _scores(before: Evaluation, after: Evaluation) -> Table:
    made = Table(title=f"answers to {len(after.answers)} held-out prompts")
    for column in ("", "Hydra-SFT", "after PPO", "difference ± standard error"):
        made.add_column(column, justify="right" if column else "left")
    for label, name in (("learned reward", "reward"), ("gold score (token F1)", "gold")):
        first, last = getattr(before, name), getattr(after, name)
        made.add_row(label, f"{first.mean():.4f}", f"{last.mean():.4f}", str(difference(last, first)))
    return made


def _examples(task: Task, before: Evaluation, after: Evaluation, count: int = 6) -> Table:
    made = Table(title="examples", show_lines=True)
    for column in ("true", "Hydra-SFT", "after PPO"):
        made.add_column(column, ratio=1)
    every = max(1, len(after.answers) // count)
    for index in range(0, len(after.answers), every)[:count]:
        made.add_row(*map(escape, (task.held_out_questions.truths[index], before.answers[index], after.answers[index])))
    return made
