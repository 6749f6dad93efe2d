"""Supervised training before PPO: language model and reward model on one trunk (Hydra-SFT), or each on its own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernelab.experiment.run import Run
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.model import hidden_states, linear_layers, pair_states, rewards
from kernelab.papers.hydra_rlhf.optimise import Descent, adamw, check_finite
from kernelab.papers.hydra_rlhf.processes import average, replicated, share
from kernelab.papers.hydra_rlhf.task import Rows
from kernelab.papers.hydra_rlhf.tokens import Sequences, shuffled

STAGES = {"hydra_sft": "Hydra-SFT", "sft": "SFT", "rm": "reward model"}


def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-log sigmoid(chosen - rejected)``, the mean over pairs of rewards [B]."""
    return -F.logsigmoid(chosen - rejected).mean()


class Supervised(nn.Module):
    """A language model, a reward head, and what a stage trains of them.

    Args:
        stage: ``hydra_sft`` learns from both answers on one trunk, ``sft`` from the chosen one without the head, ``rm``
            from the rewards without the output head.
        config: with a ``prompt_coef`` the prompts are learned too.
    """

    def __init__(self, stage: str, lm: PreTrainedModel, head: nn.Linear, config: Config):
        super().__init__()
        self.stage, self.prompts, self.checkpointing = stage, config.prompt_coef > 0, config.gradient_checkpointing
        if self.checkpointing:
            lm.activation_checkpointing_enable()
        self.lm = lm.requires_grad_(stage != "rm")
        if stage == "rm":
            lm.base_model.requires_grad_(True)
        self.head = head.requires_grad_(stage != "sft")

    def forward(self, chosen: Sequences, rejected: Sequences) -> dict[str, Tensor]:
        """The parts of the loss, each a mean, and the share of pairs [B] that are ranked right."""
        self.lm.train(self.checkpointing)  # the mode in which transformers checkpoints its layers
        try:
            if self.stage == "sft":
                return language_losses(self.lm, hidden_states(self.lm, chosen), chosen, prompts=self.prompts)
            hidden, hidden_rejected = pair_states(self.lm, chosen, rejected)  # [B, P + R, d]
            losses = reward_losses(rewards(self.head, hidden, chosen), rewards(self.head, hidden_rejected, rejected))
            if self.stage == "hydra_sft":
                losses |= language_losses(self.lm, hidden, chosen, prompts=self.prompts)
            return losses
        finally:
            self.lm.eval()


def reward_losses(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Of the rewards of pairs [B]: the pair loss, and the square of both rewards' sum."""
    return {
        "pair": pair_loss(chosen, rejected),
        "centre": (chosen + rejected).square().mean(),
        "accuracy": (chosen > rejected).float().mean(),
    }


def language_losses(lm: PreTrainedModel, hidden: Tensor, chosen: Sequences, *, prompts: bool) -> dict[str, Tensor]:
    """Cross-entropy of the answers and, if asked, of their prompts, from the last hidden states [B, P + R, d].

    Means over the tokens of all processes; a prompt's first token is given, not predicted.
    """
    begin = 0 if prompts else chosen.prompt_length - 1
    logits = lm.get_output_embeddings()(hidden[:, begin:-1])  # [B, T, V]
    nll = F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2),
        chosen.tokens[:, begin + 1 :],
        reduction="none",
    )  # [B, T]
    predicted = chosen.mask[:, begin:-1] & chosen.mask[:, begin + 1 :]
    answers = torch.arange(begin + 1, chosen.tokens.shape[1], device=nll.device) >= chosen.prompt_length
    losses = {"answer": _mean(nll, predicted & answers)}
    return losses | ({"prompt": _mean(nll, predicted & ~answers)} if prompts else {})


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / average(mask.sum()).clamp(min=1)


class Supervision:
    """A stage's models, optimizers and loss, and one step of it."""

    def __init__(self, config: Config, stage: str, lm: PreTrainedModel, head: nn.Linear):
        module = Supervised(stage, lm, head, config)
        self.optimizers = sft_optimizers(config, module)
        self.peaks = {name: optimizer.defaults["lr"] for name, optimizer in self.optimizers.items()}
        self.descent = Descent(
            config, self.optimizers.values(), {"norm": [p for p in module.parameters() if p.requires_grad]}
        )
        self.weights = {
            "pair": 1.0,
            "centre": config.center_rewards_coefficient,
            "answer": config.sft_coef,
            "prompt": config.prompt_coef,
        }
        self.module, self.model = module, replicated(module)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"lm": self.module.lm, "head": self.module.head, "scaler": self.descent.scaler, **self.optimizers}

    def decay(self, remaining: float) -> None:
        """Sets the learning rates to this share of the config's."""
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = remaining * self.peaks[name]

    def gradients(self, chosen: Sequences, rejected: Sequences) -> dict[str, float]:
        """Computes the gradients of this process's share of a batch; returns the numbers of the step."""
        losses = self.model(chosen, rejected)
        loss = sum(weight * losses[name] for name, weight in self.weights.items() if name in losses)
        self.descent.zero_grad()
        self.descent.backward(loss)
        norms = self.descent.norms()
        return {name: average(value).item() for name, value in {"loss": loss, **losses}.items()} | norms


def supervise(config: Config, run: Run, stage: str, lm: PreTrainedModel, head: nn.Linear, pairs: Rows) -> None:
    """Trains ``lm`` and ``head`` in place; ``stage``, one of STAGES, is the phase of the run."""
    steps = config.rm_steps if stage == "rm" else config.sft_steps
    supervision = Supervision(config, stage, lm, head)
    start = run.restore(supervision.state, phase=stage)
    for step in run.steps(start, steps, STAGES[stage]):
        supervision.decay(warm_cosine(step, steps))
        rows = shuffled(step, config.sft_batch_size, len(pairs), config.seed)[share(config.sft_batch_size)]
        metrics = supervision.gradients(*pairs.pairs(rows))
        run.log(step, metrics)
        check_finite(STAGES[stage], step, metrics)
        supervision.descent.step()
        if run.should_checkpoint(step, every=max(1, steps // 5)):
            run.save(step, supervision.state)


def sft_optimizers(config: Config, module: Supervised) -> dict[str, torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the trunk's layers, if it is asked for, and AdamW for the rest."""
    names = {f"lm.{layer}.weight" for layer in linear_layers(module.lm)} if config.muon_learning_rate else set()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if name in names]
    others = [p for name, p in trained.items() if name not in names]
    decay = {"weight_decay": config.weight_decay}
    made: dict[str, torch.optim.Optimizer] = {
        "adamw": adamw(config, others, lr=config.sft_learning_rate, betas=(0.9, 0.95), **decay)
    }
    if matrices:
        made["muon"] = torch.optim.Muon(matrices, lr=config.muon_learning_rate, adjust_lr_fn="match_rms_adamw", **decay)
    return made


def warm_cosine(step: int, steps: int, warm_up: int = 30) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine from 1 to 0.05."""
    return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
