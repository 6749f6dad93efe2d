"""Hydra-SFT: language model and reward model learn on one trunk, in one pass over both answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.model import pair_states, rewards
from kernelab.papers.hydra_rlhf.tokens import Sequences


@dataclass(frozen=True)
class SFTLoss:
    """The parts of Hydra-SFT's loss, each a mean, and the share of pairs that are ranked right."""

    pair: Tensor
    centre: Tensor
    answer: Tensor
    prompt: Tensor
    accuracy: Tensor

    def total(self, config: Config) -> Tensor:
        """The loss that Hydra-SFT descends."""
        reward = self.pair + config.center_rewards_coefficient * self.centre
        return reward + config.sft_coef * self.answer + config.prompt_coef * self.prompt


def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-log sigmoid(chosen - rejected)``, the mean over pairs of rewards [B]."""
    return -F.logsigmoid(chosen - rejected).mean()


def sft_loss(lm: PreTrainedModel, head: nn.Linear, chosen: Sequences, rejected: Sequences, *, prompts: bool) -> SFTLoss:
    """Pair loss of the rewards, and cross-entropy of the chosen answers and, if asked, of their prompts, [B] pairs.

    The cross-entropies are means over tokens; a prompt's first token is given, not predicted.
    """
    hidden, hidden_rejected = pair_states(lm, chosen, rejected)  # [B, P + R, d]
    reward_chosen, reward_rejected = rewards(head, hidden, chosen), rewards(head, hidden_rejected, rejected)
    begin = 0 if prompts else chosen.prompt_length - 1
    logits = lm.get_output_embeddings()(hidden[:, begin:-1])  # [B, T, V]
    nll = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2),
        chosen.tokens[:, begin + 1 :],
        reduction="none",
    )  # [B, T]
    predicted = chosen.mask[:, begin:-1] & chosen.mask[:, begin + 1 :]
    answers = torch.arange(begin + 1, chosen.tokens.shape[1], device=nll.device) >= chosen.prompt_length
    return SFTLoss(
        pair=pair_loss(reward_chosen, reward_rejected),
        centre=(reward_chosen + reward_rejected).square().mean(),
        answer=_mean(nll, predicted & answers),
        prompt=_mean(nll, predicted & ~answers),
        accuracy=(reward_chosen > reward_rejected).float().mean(),
    )


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)
