"""The mathematics of PPO on answers: rows are answers, columns their tokens, and a mask tells which are real."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernelab.ops import linear_logprob


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask`` is true."""
    return (x * mask).sum() / mask.sum()


def token_logprobs(hidden: Tensor, head: nn.Module, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``tokens`` [B, R], and entropies without gradient, from the states before them [B, R, d]."""
    if type(head) is nn.Linear:  # not a subclass, whose output may be more than its weight's
        logprob, entropy = linear_logprob(
            hidden, head.weight, tokens, bias=head.bias, temperature=temperature, entropy=True
        )
        return logprob, entropy.detach()
    logits = head(hidden)  # [B, R, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_normaliser = logits.logsumexp(-1)
    logprob = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - log_normaliser
    with torch.no_grad():
        entropy = log_normaliser - ((logits - log_normaliser.unsqueeze(-1)).exp() * logits).sum(-1)
    return logprob, entropy


def kl_estimates(logprob: Tensor, reference: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """Estimates of KL(policy || reference) from tokens of the policy (Schulman, 2020).

    With ``l = reference - logprob``, ``k1 = -l`` and ``k3 = e^l - 1 - l``, which is never negative and varies less.
    """
    log_ratio = logprob - reference
    return log_ratio if estimator == "k1" else (-log_ratio).expm1() + log_ratio


def token_rewards(reward: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """``-kl_coef * kl`` at every token, plus ``reward`` [B] at the last one; [B, R]."""
    penalties = -kl_coef * kl * mask
    last = mask.sum(1, keepdim=True) - 1
    return penalties.scatter_add(1, last, reward.unsqueeze(1).to(penalties.dtype))


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """``x`` with variance 1 over ``mask`` and mean 0 (its own mean without ``shift_mean``); 0 spread stays 0 spread."""
    mean = masked_mean(x, mask)
    centred = (x - mean) * mask
    # equal numbers may miss their mean by its rounding, which must not be scaled up to variance 1
    centred = centred.masked_fill(centred.abs() <= 8 * torch.finfo(x.dtype).eps * mean.abs(), 0)
    white = centred * (masked_mean(centred.square(), mask) + 1e-8).rsqrt()
    return white if shift_mean else (white + mean) * mask


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al., arXiv 1506.02438) and returns, both [B, R] and 0 off the mask.

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``, ``return_t = A_t + V_t``; an answer
    ends with V = 0.
    """
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = (rewards + gamma * following - values) * mask
    running = torch.zeros_like(deltas[:, 0])
    columns = []
    for delta in deltas.flip(1).unbind(1):
        running = delta + gamma * lam * running
        columns.append(running)
    advantage = torch.stack(columns[::-1], dim=1) * mask
    return advantage, advantage + values


def policy_loss(
    logprob: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate ``max(-A ratio, -A clip(ratio))``, and the share of tokens where the clip holds."""
    ratio = (logprob - old).exp()
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - cliprange, 1 + cliprange)
    return masked_mean(torch.max(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)


def value_loss(value: Tensor, old: Tensor, returns: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """``max((V - return)^2, (clip(V) - return)^2) / 2``, V kept within ``cliprange`` of its old value."""
    clipped = torch.min(torch.max(value, old - cliprange), old + cliprange)
    return 0.5 * masked_mean(torch.max((value - returns).square(), (clipped - returns).square()), mask)


class KLCoefficient:
    """The weight of the KL penalty, which follows the KL if it has a target (Ziegler et al., arXiv 1909.08593, 2.2).

    ``value <- value (1 + clip(kl / target - 1, -0.2, 0.2) answers / horizon)``; it stays positive while there are fewer
    than ``5 horizon`` answers at a time.

    >>> coefficient = KLCoefficient(0.1, target=6.0, horizon=1000)
    >>> coefficient.update(kl=60.0, answers=500)
    >>> round(coefficient.value, 6)
    0.11
    """

    def __init__(self, value: float, target: float | None, horizon: int):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl: float, answers: int) -> None:
        """Takes note of the mean KL of so many answers."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * answers / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class RunningMoments:
    """Mean and variance of all numbers seen so far (Chan, Golub and LeVeque, 1983), in double precision.

    >>> RunningMoments().normalize(torch.tensor([1.0, 3.0]))
    tensor([-1.,  1.])
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def normalize(self, x: Tensor) -> Tensor:
        """Adds the numbers of ``x``, and gives them with the mean and the variance of all so far as 0 and 1.

        Where all numbers so far are equal, they become 0.
        """
        values = x.double()
        mean, total = values.mean().item(), self.count + x.numel()
        apart = mean - self.mean
        self.squares += (values - mean).square().sum().item() + apart**2 * self.count * x.numel() / total
        self.mean += apart * x.numel() / total
        self.count = total
        spread = math.sqrt(self.squares / total)
        return ((values - self.mean) / spread).to(x.dtype) if spread else torch.zeros_like(x)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
