"""Actor, critic, reference and reward model: on one trunk (Hydra-PPO) or on four (LoRA-PPO)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernelab._core.errors import KernelabError
from kernelab.lora import LoRAConfig, adapter_parameters, inject, role, streams
from kernelab.papers.hydra_rlhf.model import before_answers, digest, hidden_states, rewards
from kernelab.papers.hydra_rlhf.ppo import token_logprobs
from kernelab.papers.hydra_rlhf.tokens import Sequences


@dataclass(frozen=True)
class Scores:
    """What PPO keeps of a rollout: its reward [B], and the rest at each answer token [B, R]."""

    reward: Tensor
    reference: Tensor
    logprob: Tensor
    value: Tensor

    def __getitem__(self, rows: Tensor) -> Scores:
        return Scores(self.reward[rows], self.reference[rows], self.logprob[rows], self.value[rows])


@dataclass(frozen=True)
class Outputs:
    """Actor and critic at each answer token [B, R], in one graph; the entropy is without gradient."""

    logprob: Tensor
    entropy: Tensor
    value: Tensor


class Roles(nn.Module, ABC):
    """The four models of PPO. Two adapters and the value head train; a trunk is never written.

    The value head begins as a copy of the reward head, so the critic begins as the reward model.
    """

    title: str

    def __init__(self, head: nn.Linear, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.reward_head = head.requires_grad_(False)
        self.value_head = copy.deepcopy(head).requires_grad_(True)

    @property
    @abstractmethod
    def actor(self) -> PreTrainedModel:
        """The language model that answers, inside ``acting()``."""

    @property
    @abstractmethod
    def critic(self) -> PreTrainedModel:
        """The model whose states the value head reads."""

    @abstractmethod
    def acting(self) -> AbstractContextManager[None]:
        """Inside the block, ``actor`` answers with its adapter."""

    @abstractmethod
    def score(self, sequences: Sequences) -> Scores:
        """All four roles, without gradients."""

    @abstractmethod
    def forward(self, sequences: Sequences) -> Outputs:
        """The two roles that train."""

    @abstractmethod
    def reward(self, sequences: Sequences) -> Tensor:
        """The reward model alone, without gradients, [B]."""

    def actor_parameters(self) -> list[nn.Parameter]:
        return adapter_parameters(self.actor, "actor")

    def critic_parameters(self) -> list[nn.Parameter]:
        return [*adapter_parameters(self.critic, "critic"), *self.value_head.parameters()]

    def base_digest(self) -> str:
        """sha256 of all that does not train."""
        return digest({name: p for name, p in self.named_parameters() if not p.requires_grad})

    def _logprobs(self, lm: PreTrainedModel, hidden: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        states = before_answers(hidden, sequences)
        return token_logprobs(states, lm.get_output_embeddings(), sequences.answers, self.temperature)

    def _values(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        states = before_answers(hidden, sequences)
        return self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1)


class HydraRoles(Roles):
    """One trunk: the actor and the critic are its adapters, the reference and the reward two heads of one pass without.

    Args:
        lm: the trunk; it gets the adapters, in place.
        head: its reward head.
        targets: names of the layers that get adapters.
    """

    title = "Hydra-PPO"

    def __init__(
        self, lm: PreTrainedModel, head: nn.Linear, adapter: LoRAConfig, targets: Sequence[str], temperature: float
    ):
        super().__init__(head, temperature)
        self.trunk = inject(lm, {"actor": adapter, "critic": adapter}, targets, dtype=head.weight.dtype)

    @property
    def actor(self) -> PreTrainedModel:
        return self.trunk

    critic = actor

    def acting(self) -> AbstractContextManager[None]:
        return role(self.trunk, "actor")

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        with streams(self.trunk, [None, "actor", "critic"]):
            base, actor, critic = hidden_states(self.trunk, sequences.repeat(3)).chunk(3)
        reference, _ = self._logprobs(self.trunk, base, sequences)
        logprob, _ = self._logprobs(self.trunk, actor, sequences)
        return Scores(rewards(self.reward_head, base, sequences), reference, logprob, self._values(critic, sequences))

    def forward(self, sequences: Sequences) -> Outputs:
        with streams(self.trunk, ["actor", "critic"]):
            actor, critic = hidden_states(self.trunk, sequences.repeat(2)).chunk(2)
        return Outputs(*self._logprobs(self.trunk, actor, sequences), self._values(critic, sequences))

    @torch.no_grad()
    def reward(self, sequences: Sequences) -> Tensor:
        with streams(self.trunk, [None]):
            return rewards(self.reward_head, hidden_states(self.trunk, sequences), sequences)


class LoRARoles(Roles):
    """Four trunks, each a copy of ``lm``: what PPO with LoRA takes without switching. See :class:`HydraRoles`."""

    title = "LoRA-PPO"

    def __init__(
        self, lm: PreTrainedModel, head: nn.Linear, adapter: LoRAConfig, targets: Sequence[str], temperature: float
    ):
        super().__init__(head, temperature)
        self.reward_lm = lm.requires_grad_(False)
        self.reference_lm = copy.deepcopy(lm)
        self.actor_lm = inject(copy.deepcopy(lm), {"actor": adapter}, targets, dtype=head.weight.dtype)
        self.critic_lm = inject(copy.deepcopy(lm), {"critic": adapter}, targets, dtype=head.weight.dtype)

    @property
    def actor(self) -> PreTrainedModel:
        return self.actor_lm

    @property
    def critic(self) -> PreTrainedModel:
        return self.critic_lm

    def acting(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.no_grad()
    def score(self, sequences: Sequences) -> Scores:
        reference, _ = self._logprobs(self.reference_lm, hidden_states(self.reference_lm, sequences), sequences)
        outputs = self(sequences)
        return Scores(self.reward(sequences), reference, outputs.logprob, outputs.value)

    def forward(self, sequences: Sequences) -> Outputs:
        logprob, entropy = self._logprobs(self.actor_lm, hidden_states(self.actor_lm, sequences), sequences)
        return Outputs(logprob, entropy, self._values(hidden_states(self.critic_lm, sequences), sequences))

    @torch.no_grad()
    def reward(self, sequences: Sequences) -> Tensor:
        return rewards(self.reward_head, hidden_states(self.reward_lm, sequences), sequences)


class Trained:
    """The part of :class:`Roles` that a checkpoint holds: what trains, and the digest of what it was trained on."""

    def __init__(self, roles: Roles):
        self.roles = roles
        self.base = roles.base_digest()

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base, "trained": {name: p.detach() for name, p in self._parameters().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``KernelabError`` if the trunk is not the one that the saved adapters were trained on."""
        if state["base"] != self.base:
            raise KernelabError(
                f"the checkpoint's adapters were trained on a trunk with sha256 {state['base'][:12]}..., this one has "
                f"{self.base[:12]}...: resume with the model and the data of the first start."
            )
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(state["trained"][name])

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.roles.named_parameters() if p.requires_grad}
