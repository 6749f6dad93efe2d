"""One step of PPO: answer prompts, score the answers, update actor and critic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelab._core.errors import KernelabError
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.ppo import advantages, masked_mean, policy_loss, token_rewards, value_loss, whiten
from kernelab.papers.hydra_rlhf.roles import Roles, Scores
from kernelab.papers.hydra_rlhf.rollout import sample_answers
from kernelab.papers.hydra_rlhf.tokens import Encoder, Sequences


class TrainingDiverged(KernelabError, ArithmeticError):
    """A loss or a gradient is not finite; the step's numbers are in ``metrics.jsonl``."""


def check_finite(phase: str, step: int, metrics: dict[str, float]) -> None:
    """Raises if a number of the step is NaN or infinite. The weights are still those of before the step."""
    broken = ", ".join(f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value))
    if broken:
        raise TrainingDiverged(
            f"{phase} step {step}: {broken}. The step was not taken; its numbers are the last line of metrics.jsonl. "
            "Start again with a lower learning rate."
        )


class PPO:
    """The optimizer of the two roles that train, and the three parts of a step: answer, score, update."""

    def __init__(self, roles: Roles, encoder: Encoder, config: Config):
        self.roles, self.encoder, self.config = roles, encoder, config
        self.optimizer = torch.optim.AdamW(
            [
                {"params": roles.actor_parameters(), "lr": config.learning_rate},
                {"params": roles.critic_parameters(), "lr": config.critic_learning_rate},
            ],
            weight_decay=0.0,
        )

    def decay(self, remaining: float) -> None:
        """Sets the learning rates to this share of the config's."""
        rates = (self.config.learning_rate, self.config.critic_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = remaining * rate

    def answer(self, prompts: tuple[Tensor, Tensor]) -> Sequences:
        """The actor's answers to prompts (tokens and mask, [B, P])."""
        with self.roles.acting():
            return sample_answers(self.roles.actor, prompts, self.encoder, self.config.temperature)

    def score(self, sequences: Sequences) -> Scores:
        """All four roles on the answers, as many answers at once as the update takes."""
        count = self.config.num_mini_batches * self.config.gradient_accumulation_steps
        scores = [self.roles.score(sequences[rows]) for rows in self._parts(sequences, count)]
        return Scores(*(torch.cat(column) for column in zip(*(vars(part).values() for part in scores), strict=True)))

    def update(self, sequences: Sequences, scores: Scores) -> dict[str, float]:
        """Takes the config's epochs of clipped steps on a scored rollout; returns the numbers of the step.

        If one of them is not finite, the parameters have not been moved by it.
        """
        config, mask = self.config, sequences.answer_mask
        unfinished = ~(sequences.answers.eq(self.encoder.end) & mask).any(1)
        reward = scores.reward - config.missing_eos_penalty * unfinished
        rewards = token_rewards(reward, scores.logprob, scores.reference, mask, config.kl_coef)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantage, returns = advantages(rewards, scores.value, mask, config.gamma, config.lam)
        advantage = whiten(advantage, mask)
        metrics = {
            "reward": scores.reward.mean().item(),
            "kl": ((scores.logprob - scores.reference) * mask).sum(1).mean().item(),
            "tokens": mask.sum(1).float().mean().item(),
            "unfinished": unfinished.float().mean().item(),
        }
        losses: list[dict[str, float]] = []
        for _ in range(config.num_ppo_epochs):
            for rows in torch.randperm(len(sequences)).chunk(config.num_mini_batches):
                rows = rows.to(mask.device)
                losses.append(self._minibatch(sequences[rows], scores[rows], advantage[rows], returns[rows]))
                if not all(map(math.isfinite, losses[-1].values())):
                    return metrics | losses[-1]
        metrics["ratio_error"] = losses[0].pop("ratio_error")  # the actor has not moved yet: the ratio should be 1
        mean = {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}
        return metrics | mean

    def _minibatch(self, sequences: Sequences, scores: Scores, advantage: Tensor, returns: Tensor) -> dict[str, float]:
        self.optimizer.zero_grad()
        tokens = sequences.answer_mask.sum()
        means: list[Tensor] = []
        ratio_errors: list[Tensor] = []
        for rows in self._parts(sequences, self.config.gradient_accumulation_steps):
            part, old = sequences[rows], scores[rows]
            mask = part.answer_mask
            outputs = self.roles(part)
            actor, clipped = policy_loss(outputs.logprob, old.logprob, advantage[rows], mask, self.config.cliprange)
            critic = value_loss(outputs.value, old.value, returns[rows], mask, self.config.cliprange_value)
            share = mask.sum() / tokens
            (share * (actor + self.config.vf_coef * critic)).backward()
            entropy = masked_mean(outputs.entropy, mask)
            means.append(share * torch.stack([actor, critic, entropy, clipped]).detach())
            ratio_errors.append((((outputs.logprob - old.logprob).exp() - 1).abs() * mask).max().detach())
        groups = [group["params"] for group in self.optimizer.param_groups]
        norms = [torch.nn.utils.clip_grad_norm_(group, self.config.max_grad_norm) for group in groups]
        names = ("policy_loss", "value_loss", "entropy", "clipped", "actor_norm", "critic_norm", "ratio_error")
        values = [*torch.stack(means).sum(0), *norms, torch.stack(ratio_errors).max()]
        metrics = {name: value.item() for name, value in zip(names, values, strict=True)}
        if all(map(math.isfinite, metrics.values())):
            self.optimizer.step()
        return metrics

    def _parts(self, sequences: Sequences, count: int) -> tuple[Tensor, ...]:
        return torch.arange(len(sequences), device=sequences.tokens.device).chunk(count)
