"""What a run claims, prints and draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from kernelab.experiment.run import Run
from kernelab.papers.hydra_rlhf import cost, figures
from kernelab.papers.hydra_rlhf.cost import Cost
from kernelab.papers.hydra_rlhf.evaluate import Difference, Evaluation, difference
from kernelab.papers.hydra_rlhf.roles import METHODS
from kernelab.papers.hydra_rlhf.sft import STAGES
from kernelab.papers.hydra_rlhf.task import Task


@dataclass(frozen=True)
class Result:
    """What one method obtained: held-out pairs that its reward model ranks right, answers before and after PPO.

    ``judged`` [N] is the share of each prompt that the answers after PPO win, if a judge was asked.
    """

    method: str
    ranked: Tensor | None
    before: Evaluation
    after: Evaluation
    digests: tuple[str, str]
    judged: Tensor | None = None

    @property
    def title(self) -> str:
        return METHODS[self.method].title

    @property
    def start(self) -> str:
        """What PPO started from."""
        return "Hydra-SFT" if METHODS[self.method].joint else "SFT"

    def summary(self, baseline: Evaluation) -> dict[str, Any]:
        """Means, and the shares of prompts won against the baseline, where equal gold scores count half."""
        ahead = self.after.gold - baseline.gold
        win_rate = {"gold": ((ahead > 0).double() + 0.5 * (ahead == 0)).mean().item()}
        if self.judged is not None:
            win_rate["judge"] = self.judged.mean().item()
        return {
            "ranking_accuracy": None if self.ranked is None else self.ranked.mean().item(),
            "reward": {"before": self.before.reward.mean().item(), "after": self.after.reward.mean().item()},
            "gold": {"before": self.before.gold.mean().item(), "after": self.after.gold.mean().item()},
            "win_rate": win_rate,
        }


def baseline_of(results: list[Result]) -> Result:
    """The one whose start, an SFT model if there is one, all win against or lose to."""
    return next((result for result in results if result.start == "SFT"), results[0])


def report(run: Run, task: Task, results: list[Result], costs: tuple[list[Cost], list[Cost]]) -> dict[str, Any]:
    """Adds the claims and figures, prints the tables, and returns the summary."""
    baseline = baseline_of(results)
    methods = {
        result.method: result.summary(baseline.before) | {"kl": _last(run.metrics(f"ppo_{result.method}"), "kl")}
        for result in results
    }
    for result in {result.start: result for result in results}.values():
        if result.ranked is not None:
            gain = difference(result.ranked, torch.full_like(result.ranked, 0.5))
            _claim_gain(run, f"{result.start}'s reward ranks held-out pairs above chance", gain)
    for result in results:
        _claim_method(run, result)
    _claim_costs(run, *costs)
    for found, title in zip(costs, ("a step", "a step, each at its largest batch"), strict=True):
        if found:
            run.console.print(cost.table(found, title))
    if costs[0]:
        run.figure("cost", figures.costs(costs[0]))
    run.console.print(_scores(results, baseline, methods), _examples(task, results[-1]))
    for phase, title in STAGES.items():
        if records := run.metrics(phase):
            run.figure(phase, figures.supervised(records, title))
    for result in results:
        if records := run.metrics(f"ppo_{result.method}"):
            run.figure(f"ppo_{result.method}", figures.reinforced(records, result.title))
    return {
        "held_out_pairs": len(task.held_out_pairs) if baseline.ranked is None else len(baseline.ranked),
        "held_out_prompts": len(baseline.after.answers),
        "win_rate_against": baseline.start,
        "judge": run.config.judge,
        "methods": methods,
        "costs": _cost_summary(costs[0]),
        "costs_at_largest_batch": _cost_summary(costs[1]),
    }


def _cost_summary(costs: list[Cost]) -> list[dict[str, Any]]:
    return [asdict(found) | {"peak": found.peak, "seconds_per_sample": found.seconds_per_sample} for found in costs]


def _claim_method(run: Run, result: Result) -> None:
    for label, name in (("learned reward", "reward"), ("gold score", "gold")):
        gain = difference(getattr(result.after, name), getattr(result.before, name))
        _claim_gain(run, f"{result.title} raises the {label} of held-out prompts", gain)
    ratio = max((record["ratio_error"] for record in run.metrics(f"ppo_{result.method}")), default=0.0)
    name = f"the policy ratio of {result.title} is 1 before the first update"
    run.claim(name, expected=0.0, obtained=ratio, passed=ratio == 0)
    first, last = result.digests
    run.claim(
        f"{result.title} leaves the sha256 of what does not train", expected=first, obtained=last, passed=first == last
    )


def _claim_costs(run: Run, equal: list[Cost], largest: list[Cost]) -> None:
    lora, hydra = (METHODS[name].title for name in ("lora", "hydra"))

    def below_one(name: str, costs: list[Cost], first: str, second: str, value: str, paper: str) -> None:
        found = {cost.method: getattr(cost, value) for cost in costs}
        if {first, second} <= found.keys():
            ratio = found[first] / found[second]
            run.claim(f"{first}'s {name} over {second}'s", expected=f"< 1{paper}", obtained=ratio, passed=ratio < 1)

    below_one("peak memory", equal, lora, "SFT", "peak", "")
    below_one("peak memory at the same batch", equal, hydra, lora, "peak", "")
    below_one("seconds a sample at the same batch", equal, hydra, lora, "seconds_per_sample", " (by its FLOPs 0.88)")
    paper = " (the paper: 0.35)"
    below_one("seconds a sample, each at its largest batch", largest, hydra, lora, "seconds_per_sample", paper)


def _claim_gain(run: Run, name: str, gain: Difference) -> None:
    obtained = f"{gain} ({gain.in_errors:.1f} standard errors)"
    run.claim(name, expected="more than 3 standard errors", obtained=obtained, passed=gain.in_errors > 3)


def _scores(results: list[Result], baseline: Result, methods: dict[str, dict[str, Any]]) -> Table:
    count = len(baseline.after.answers)
    made = Table(
        title=f"answers to {count} held-out prompts; difference ± standard error; wins against {baseline.start};"
        " KL to the start in the last step, nats an answer"
    )
    wins = [f"wins by {name}" for name in methods[baseline.method]["win_rate"]]
    for column in ("", "from", "pairs", "reward", "difference", "gold", "difference", *wins, "KL"):
        made.add_column(column, justify="right" if column not in ("", "from") else "left")
    for result in results:
        summary = methods[result.method]
        row = [result.title, result.start, _share(summary["ranking_accuracy"])]
        for name in ("reward", "gold"):
            first, last = getattr(result.before, name), getattr(result.after, name)
            row += [f"{last.mean():.4f}", str(difference(last, first))]
        kl = "" if summary["kl"] is None else f"{summary['kl']:.2f}"
        made.add_row(*row, *map(_share, summary["win_rate"].values()), kl)
    return made


def _last(records: list[dict[str, Any]], name: str) -> float | None:
    return records[-1][name] if records else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _examples(task: Task, result: Result, count: int = 6) -> Table:
    made = Table(title="examples", show_lines=True)
    for column in ("true", result.start, result.title):
        made.add_column(column, ratio=1)
    before, after = result.before.answers, result.after.answers
    every = max(1, len(after) // count)
    for index in range(0, len(after), every)[:count]:
        made.add_row(*map(escape, (task.held_out_questions.truths[index], before[index], after[index])))
    return made
