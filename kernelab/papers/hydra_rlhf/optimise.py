"""One step of PPO: answer prompts, score the answers, update actor and critic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kernelab._core.errors import KernelabError
from kernelab.experiment.device import from_main, uses_fsdp
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.ppo import (
    KLCoefficient,
    RunningMoments,
    advantages,
    kl_estimates,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from kernelab.papers.hydra_rlhf.processes import (
    WholeOptimizer,
    average,
    clip_gradients,
    gathered,
    largest,
    replicated,
    share,
    synchronised,
)
from kernelab.papers.hydra_rlhf.quantized import import_bitsandbytes
from kernelab.papers.hydra_rlhf.roles import Outputs, Roles, Scores, Trained
from kernelab.papers.hydra_rlhf.rollout import sample_answers
from kernelab.papers.hydra_rlhf.tokens import Encoder, Sequences, stack


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


def adamw(
    config: Config, parameters: Iterable[Any], *, fused: bool | None = None, **settings: Any
) -> torch.optim.Optimizer:
    """The AdamW that ``optim`` names; ``fused`` is an argument of torch's.

    Raises:
        KernelabError: bitsandbytes is not installed.
    """
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, fused=fused, **settings)
    return import_bitsandbytes().optim.AdamW8bit(parameters, **settings)


class Descent:
    """Backward, gradient clipping and the optimizers' step; with float16 the loss is scaled.

    Args:
        groups: parameters by the name of their gradient's norm, each clipped to ``max_grad_norm``.
    """

    def __init__(
        self,
        config: Config,
        optimizers: Iterable[torch.optim.Optimizer],
        groups: Mapping[str, list[nn.Parameter]],
    ):
        self.optimizers, self.groups, self.max_norm = list(optimizers), groups, config.max_grad_norm
        device = next(iter(groups.values()))[0].device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradients to those that are there."""
        self.scaler.scale(loss).backward()

    def norms(self) -> dict[str, float]:
        """Clips the gradients and returns their norms of before.

        A gradient that is too large for float16's scale counts as 0: ``step`` leaves it out and lowers the scale. At a
        scale below 1 the scale is no longer to blame.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norms = {name: clip_gradients(group, self.max_norm).item() for name, group in self.groups.items()}
        too_large = not all(map(math.isfinite, norms.values()))
        return dict.fromkeys(norms, 0.0) if too_large and self.scaler.get_scale() > 1 else norms

    def step(self, *, taken: bool = True) -> None:
        """Moves the parameters, or not, after ``norms``."""
        for optimizer in self.optimizers if taken else ():
            self.scaler.step(optimizer)
        self.scaler.update()


class PPO:
    """The optimizer of the two roles that train, and the three parts of a step: answer, score, update.

    Each part takes and returns the whole batch; of several processes each works on its share.
    """

    def __init__(self, roles: Roles, encoder: Encoder, config: Config):
        self.roles, self.encoder, self.config = roles, encoder, config
        self.rates = [
            rate if roles.players[name].adapter else config.full_learning_rate
            for name, rate in (("actor", config.learning_rate), ("critic", config.critic_learning_rate))
        ]
        parameters = roles.actor_parameters(), roles.critic_parameters()
        self.optimizer = adamw(
            config,
            [{"params": each, "lr": rate} for each, rate in zip(parameters, self.rates, strict=True)],
            weight_decay=0.0,
            fused=not uses_fsdp(),  # torch does not mix sharded and whole tensors
        )
        groups = {"actor_norm": roles.actor_parameters(), "critic_norm": roles.critic_parameters()}
        self.descent = Descent(config, [self.optimizer], groups)
        self.moments = RunningMoments()
        self.kl_coef = KLCoefficient(config.kl_coef, config.adaptive_kl_target, config.adaptive_kl_horizon)
        self.model = replicated(roles)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        sharded = isinstance(self.optimizer, torch.optim.AdamW)  # or may be; bitsandbytes' never is
        return {
            "roles": Trained(self.roles),
            "optimizer": WholeOptimizer(self.optimizer) if sharded else self.optimizer,
            "scaler": self.descent.scaler,
            "reward_moments": self.moments,
            "kl_coef": self.kl_coef,
        }

    def decay(self, remaining: float) -> None:
        """Sets the learning rates to this share of what they began with."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = remaining * rate

    def answer(self, prompts: tuple[Tensor, Tensor]) -> Sequences:
        """The actor's answers to prompts (tokens and mask, [B, P])."""
        mine = share(len(prompts[0]))
        at_once = self.config.local_rollout_forward_batch_size or len(prompts[0])
        parts = zip(*(column[mine].split(at_once) for column in prompts), strict=True)
        with self.roles.acting():
            answers = [sample_answers(self.roles.actor, part, self.encoder, self.config.temperature) for part in parts]
        return gathered(stack(*answers))

    def score(self, sequences: Sequences) -> Scores:
        """All four roles on the answers, as many answers at once as the update takes.

        With ``single_forward`` only reference and reward: the others come from the update.
        """
        mine = sequences[share(len(sequences))]
        count = self.config.num_mini_batches * self.config.gradient_accumulation_steps
        parts = [self.roles.score(mine[rows], policy=not self.config.single_forward) for rows in _parts(mine, count)]
        return gathered(Scores.join(parts))

    def update(self, sequences: Sequences, scores: Scores) -> dict[str, float]:
        """Takes the config's epochs of clipped steps on a scored rollout; returns the numbers of the step.

        If one of them is not finite, the parameters have not been moved by it.
        """
        config, mask = self.config, sequences.answer_mask
        outputs = None
        if config.single_forward:
            mine = share(len(sequences))
            outputs = self.model(sequences[mine])
            old = {"logprob": outputs.logprob.detach(), "value": outputs.value.detach()}
            scores = gathered(replace(scores[mine], **old))
        unfinished = ~(sequences.answers.eq(self.encoder.end) & mask).any(1)
        reward = self.moments.normalize(scores.reward) if config.normalize_rewards else scores.reward
        reward = reward - config.missing_eos_penalty * unfinished
        kl = kl_estimates(scores.logprob, scores.reference, config.kl_estimator)
        rewards = token_rewards(reward, kl, mask, self.kl_coef.value)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantage, returns = advantages(rewards, scores.value, mask, config.gamma, config.lam)
        advantage = whiten(advantage, mask)
        metrics = {
            "reward": scores.reward.mean().item(),
            "kl": ((scores.logprob - scores.reference) * mask).sum(1).mean().item(),
            "kl_coef": self.kl_coef.value,
            "tokens": mask.sum(1).float().mean().item(),
            "unfinished": unfinished.float().mean().item(),
        }
        losses: list[dict[str, float]] = []
        for rows in self._minibatches(len(sequences)):
            rows = rows[share(len(rows))].to(mask.device)
            losses.append(self._minibatch(sequences[rows], scores[rows], advantage[rows], returns[rows], outputs))
            if not all(map(math.isfinite, losses[-1].values())):
                return metrics | losses[-1]
            if self._is_far(losses[-1]):
                break
        self.kl_coef.update(metrics["kl"], len(sequences))
        metrics["ratio_error"] = losses[0]["ratio_error"]  # the actor has not moved yet: the ratio should be 1
        metrics["minibatches"] = len(losses)
        mean = {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}
        return mean | metrics

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        """Indices of the rows of each step."""
        if self.config.single_forward:
            yield torch.arange(count)
            return
        for _ in range(self.config.num_ppo_epochs):
            yield from from_main(torch.randperm(count)).chunk(self.config.num_mini_batches)

    def _minibatch(
        self, sequences: Sequences, scores: Scores, advantage: Tensor, returns: Tensor, outputs: Outputs | None
    ) -> dict[str, float]:
        """One step, unless its numbers are not finite or the policy is too far from the rollout's."""
        config = self.config
        self.descent.zero_grad()
        tokens = average(sequences.answer_mask.sum())
        means: list[Tensor] = []
        ratio_errors: list[Tensor] = []
        parts = _parts(sequences, config.gradient_accumulation_steps)
        for number, rows in enumerate(parts, 1):
            part, old = sequences[rows], scores[rows]
            mask = part.answer_mask
            with synchronised(self.model, number == len(parts)):
                found = outputs or self.model(part)
                actor, clipped = policy_loss(found.logprob, old.logprob, advantage[rows], mask, config.cliprange)
                critic = value_loss(found.value, old.value, returns[rows], mask, config.cliprange_value)
                share_of_tokens = mask.sum() / tokens
                self.descent.backward(share_of_tokens * (actor + config.vf_coef * critic))
            with torch.no_grad():
                entropy = masked_mean(found.entropy, mask)
                log_ratio = found.logprob - old.logprob
                far = masked_mean(log_ratio.expm1() - log_ratio, mask)
                means.append(share_of_tokens * torch.stack([actor, critic, entropy, clipped, far]))
                ratio_errors.append(((log_ratio.exp() - 1).abs() * mask).max())
        names = ("policy_loss", "value_loss", "entropy", "clipped", "policy_kl")
        values = average(torch.stack(means).sum(0))
        metrics = {name: value.item() for name, value in zip(names, values, strict=True)}
        metrics |= self.descent.norms() | {"ratio_error": largest(torch.stack(ratio_errors).max()).item()}
        if all(map(math.isfinite, metrics.values())):
            self.descent.step(taken=not self._is_far(metrics))
        return metrics

    def _is_far(self, metrics: Mapping[str, float]) -> bool:
        return self.config.target_kl is not None and metrics["policy_kl"] > self.config.target_kl


def _parts(sequences: Sequences, count: int) -> tuple[Tensor, ...]:
    return torch.arange(len(sequences), device=sequences.tokens.device).chunk(count)
