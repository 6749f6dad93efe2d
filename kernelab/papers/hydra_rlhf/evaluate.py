"""What a policy is worth on held-out prompts: its learned reward, and a gold score that training never sees."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernelab.experiment.device import from_all, process_count, process_index
from kernelab.papers.hydra_rlhf.model import pair_states, rewards
from kernelab.papers.hydra_rlhf.roles import Roles
from kernelab.papers.hydra_rlhf.rollout import sample_answers
from kernelab.papers.hydra_rlhf.task import Questions
from kernelab.papers.hydra_rlhf.tokens import Encoder, Sequences


def token_f1(answer: str, truth: str) -> float:
    """F1 of the words of two texts as multisets, in lower case and without punctuation; two empty texts agree.

    >>> token_f1("Return the path.", "Return a path or None.")
    0.5
    """
    found, true = (Counter(re.findall(r"[^\W_]+", text.lower())) for text in (answer, truth))
    total = found.total() + true.total()
    return 2 * (found & true).total() / total if total else 1.0


@torch.no_grad()
def ranking(lm: PreTrainedModel, head: nn.Linear, chosen: Sequences, rejected: Sequences) -> Tensor:
    """Whether the reward of each chosen answer is above that of the rejected one, [N] of 0 and 1."""
    margins = []
    for rows in torch.arange(len(chosen), device=chosen.tokens.device).split(128):
        sides = chosen[rows], rejected[rows]
        better, worse = (rewards(head, *pair) for pair in zip(pair_states(lm, *sides), sides, strict=True))
        margins.append(better - worse)
    return (torch.cat(margins) > 0).float()


@dataclass(frozen=True)
class Evaluation:
    """One answer to each held-out prompt: its reward [N] and gold score [N], and its text."""

    reward: Tensor
    gold: Tensor
    answers: list[str]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its standard error."""

    mean: float
    error: float

    @property
    def in_errors(self) -> float:
        """The mean in standard errors."""
        return self.mean / self.error if self.error else math.copysign(math.inf, self.mean) if self.mean else 0.0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def difference(after: Tensor, before: Tensor) -> Difference:
    """Of two scores of the same prompts, [N]."""
    gain = after.double() - before.double()
    return Difference(gain.mean().item(), (gain.std() / math.sqrt(len(gain))).item())


def evaluate(roles: Roles, questions: Questions, encoder: Encoder, *, seed: int) -> Evaluation:
    """Answers each question once; global random generators are left as they were.

    Equal seeds draw equal random numbers, so that two policies are compared on the same draws.
    """
    count = -(-len(questions) // process_count())  # as many in each process, which repeats the last question if need be
    mine = (process_index() * count + torch.arange(count)).clamp(max=len(questions) - 1)
    learned, answers = [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed + process_index())
        for rows in mine.split(128):
            with roles.acting():
                sequences = sample_answers(roles.actor, questions[rows].prompts, encoder, roles.temperature)
            learned.append(roles.reward(sequences).float().cpu())
            answers += encoder.decode(sequences)
    parts = from_all((learned, answers))
    reward = torch.cat([batch for learned, _ in parts for batch in learned])[: len(questions)]
    texts = [text for _, answers in parts for text in answers][: len(questions)]
    return Evaluation(reward, token_f1s(texts, questions.truths), texts)


def token_f1s(answers: list[str], truths: list[str]) -> Tensor:
    """The gold score of each answer, [N]."""
    return torch.tensor([token_f1(answer, truth) for answer, truth in zip(answers, truths, strict=True)])
