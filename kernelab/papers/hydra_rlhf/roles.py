"""Actor, critic, reference and reward model: which trunk plays each, and with which adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernelab._core.errors import KernelabError
from kernelab.experiment.device import process_index, uses_fsdp
from kernelab.lora import (
    LoRAConfig,
    adapter_parameters,
    inject,
    recompute_activations,
    role,
    save_adapter,
    streams,
)
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.model import before_answers, digest, hidden_states, linear_layers, rewards
from kernelab.papers.hydra_rlhf.ppo import token_logprobs
from kernelab.papers.hydra_rlhf.processes import shard, shard_like, whole_state
from kernelab.papers.hydra_rlhf.quantized import quantize
from kernelab.papers.hydra_rlhf.tokens import Sequences

if TYPE_CHECKING:
    from kernelab.papers.hydra_rlhf.task import Task


class Player(NamedTuple):
    """A trunk, by name, and the adapter with which it plays a role; None: without."""

    trunk: str
    adapter: str | None = None


@dataclass(frozen=True)
class Method:
    """A way to hold PPO's four models. An actor or critic without adapter is trained whole."""

    title: str
    reference: Player
    reward: Player
    actor: Player
    critic: Player

    @property
    def joint(self) -> bool:
        """Whether one trunk plays all, so that PPO starts from Hydra-SFT; else from an SFT and a reward model."""
        return self.reference.trunk == self.reward.trunk

    def players(self) -> dict[str, Player]:
        """By role, in the order in which a pass computes them."""
        return {name: getattr(self, name) for name in ("reference", "reward", "actor", "critic")}


METHODS = {
    "ppo": Method(
        "PPO",
        reference=Player("reference"),
        reward=Player("reward"),
        actor=Player("actor"),
        critic=Player("critic"),
    ),
    "lora": Method(
        "LoRA-PPO",
        reference=Player("reference"),
        reward=Player("reward"),
        actor=Player("actor", "actor"),
        critic=Player("critic", "critic"),
    ),
    "dynamic": Method(
        "Dynamic LoRA-PPO",
        reference=Player("sft"),
        reward=Player("rm"),
        actor=Player("sft", "actor"),
        critic=Player("rm", "critic"),
    ),
    "j_hydra": Method(
        "J-Hydra-PPO",
        reference=Player("trunk"),
        reward=Player("trunk"),
        actor=Player("trunk", "shared"),
        critic=Player("trunk", "shared"),
    ),
    "hydra": Method(
        "Hydra-PPO",
        reference=Player("trunk"),
        reward=Player("trunk"),
        actor=Player("trunk", "actor"),
        critic=Player("trunk", "critic"),
    ),
}


def chosen_methods(config: Config) -> dict[str, Method]:
    """The methods of a run, by name."""
    return METHODS if config.method == "all" else {config.method: METHODS[config.method]}


@dataclass(frozen=True)
class Scores:
    """What PPO keeps of a rollout: its reward [B], and the rest at each answer token [B, R].

    ``logprob`` and ``value`` are None where the update is to take them from its own forward.
    """

    reward: Tensor
    reference: Tensor
    logprob: Tensor | None = None
    value: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> Scores:
        return Scores(*(None if column is None else column[rows] for column in vars(self).values()))

    @classmethod
    def join(cls, parts: list[Scores]) -> Scores:
        """The rows of all parts, in order."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


@dataclass(frozen=True)
class Outputs:
    """Actor and critic at each answer token [B, R], in one graph; the entropy is without gradient."""

    logprob: Tensor
    entropy: Tensor
    value: Tensor


class Roles(nn.Module):
    """The four models of PPO. The adapters and the value head train, or whole trunks where there are no adapters.

    The value head begins as a copy of the reward head, so the critic begins as the reward model. A trunk that several
    roles share runs once for all of them.

    Args:
        method: who plays what.
        lm: the language model to begin from; the first trunk made of it is ``lm`` itself, with adapters put in place.
        head: the reward head.
        reward_lm: the model under ``head``, and so under the critic; None: ``lm``.
        reward_function: rewards [B] of answers, instead of the reward model's; may be a module that does not train.
    """

    def __init__(
        self,
        method: Method,
        lm: PreTrainedModel,
        head: nn.Linear,
        config: Config,
        *,
        reward_lm: PreTrainedModel | None = None,
        reward_function: Callable[[Sequences], Tensor] | None = None,
    ):
        super().__init__()
        self.title = method.title
        self.temperature = config.temperature
        self.detached = config.detach_value and method.actor == method.critic
        self.checkpointing, self.recomputing = config.gradient_checkpointing, config.recompute_activations
        self.reward_function = reward_function
        self.players = method.players()
        if reward_function is not None:
            del self.players["reward"]
        self.reward_head = head.requires_grad_(False)
        self.value_head = copy.deepcopy(head).requires_grad_(True)
        self.trunks = nn.ModuleDict(self._copies(lm, reward_lm or lm))
        targets = config.target_modules or linear_layers(lm)
        whole = {player.trunk for player in (method.actor, method.critic) if player.adapter is None}
        for trunk, model in self.trunks.items():
            if config.load_in_4bit and trunk not in whole:
                quantize(model)
            names = self._adapters_of(trunk)
            if names:
                adapter = LoRAConfig(r=config.lora_r, alpha=config.lora_alpha)
                inject(model, dict.fromkeys(names, adapter), targets, dtype=head.weight.dtype)
        for name in ("actor", "critic"):
            if self.players[name].adapter is None:
                model = self._trunk(name).to(head.weight.dtype)  # small updates would be lost in 16 bits
                (model if name == "actor" else model.base_model).requires_grad_(True)
            if self.checkpointing:
                self._trunk(name).activation_checkpointing_enable()

    @property
    def actor(self) -> PreTrainedModel:
        """The language model that answers, inside ``acting()``."""
        return self._trunk("actor")

    def acting(self) -> AbstractContextManager[None]:
        """Inside the block, ``actor`` answers with its adapter."""
        adapter = self.players["actor"].adapter
        return role(self.actor, adapter) if adapter else nullcontext()

    @torch.no_grad()
    def score(self, sequences: Sequences, *, policy: bool = True) -> Scores:
        """All four roles, without gradients; without ``policy`` the two that do not train."""
        found = self._play(sequences, "reference", "reward", *(("actor", "critic") if policy else ()))
        reference, _ = found["reference"]
        logprob, _ = found.get("actor", (None, None))
        return Scores(found["reward"], reference, logprob, found.get("critic"))

    def forward(self, sequences: Sequences) -> Outputs:
        """The two roles that train."""
        self.train(self.checkpointing)  # the mode in which transformers checkpoints its layers
        try:
            with recompute_activations() if self.recomputing else nullcontext():
                found = self._play(sequences, "actor", "critic")
        finally:
            self.eval()
        return Outputs(*found["actor"], found["critic"])

    @torch.no_grad()
    def reward(self, sequences: Sequences) -> Tensor:
        """The rewards of answers alone, without gradients, [B]."""
        return self._play(sequences, "reward")["reward"]

    def actor_parameters(self) -> list[nn.Parameter]:
        return self._trained("actor")

    def critic_parameters(self) -> list[nn.Parameter]:
        """The critic's own, the value head last: an adapter that the actor shares is the actor's."""
        shared = self.players["actor"] == self.players["critic"]
        return [*([] if shared else self._trained("critic")), *self.value_head.parameters()]

    def base_digest(self) -> str:
        """sha256 of all that does not train."""
        return digest({name: p for name, p in self.named_parameters() if not p.requires_grad})

    def save(self, folder: Path) -> None:
        """Writes what trained: the adapters as PEFT does, or whole models, and the value head.

        Every process calls it, the main one writes.
        """
        is_main = process_index() == 0
        for name in ("actor", "critic"):
            adapter, lm = self.players[name].adapter, self._trunk(name)
            if adapter:
                if is_main or uses_fsdp():  # every process takes part in gathering shards
                    save_adapter(lm, adapter, folder / adapter)
                continue
            state = whole_state(lm.state_dict())
            if is_main:
                lm.save_pretrained(folder / name, state_dict=state)
        if is_main:
            save_file(self.value_head.state_dict(), folder / "value_head.safetensors")

    def _copies(self, lm: PreTrainedModel, reward_lm: PreTrainedModel) -> dict[str, PreTrainedModel]:
        """A trunk by name, each a model of its own; what reads rewards and values begins as the reward model."""
        made: dict[str, PreTrainedModel] = {}
        for trunk in dict.fromkeys(player.trunk for player in self.players.values()):
            roles = {name for name, player in self.players.items() if player.trunk == trunk}
            source = reward_lm if roles <= {"reward", "critic"} else lm
            taken = any(model is source for model in made.values())
            made[trunk] = (copy.deepcopy(source) if taken else source).requires_grad_(False)
        return made

    def _adapters_of(self, trunk: str) -> list[str]:
        return list(dict.fromkeys(p.adapter for p in self.players.values() if p.trunk == trunk and p.adapter))

    def _trunk(self, name: str) -> PreTrainedModel:
        return self.trunks[self.players[name].trunk]

    def _trained(self, name: str) -> list[nn.Parameter]:
        lm, adapter = self._trunk(name), self.players[name].adapter
        return adapter_parameters(lm, adapter) if adapter else [p for p in lm.parameters() if p.requires_grad]

    def _play(self, sequences: Sequences, *names: str) -> dict[str, Any]:
        """What each role makes of the answers, from one pass of each trunk that plays any of them."""
        found: dict[str, Any] = {}
        if "reward" in names and self.reward_function is not None:
            found["reward"] = self.reward_function(sequences)
        for trunk in self.trunks:
            played = {name: player for name, player in self.players.items() if name in names and player.trunk == trunk}
            if played:
                found |= self._pass(trunk, {name: player.adapter for name, player in played.items()}, sequences)
        return found

    def _pass(self, trunk: str, played: dict[str, str | None], sequences: Sequences) -> dict[str, Any]:
        lm, adapters = self.trunks[trunk], list(dict.fromkeys(played.values()))
        with streams(lm, adapters) if self._adapters_of(trunk) else nullcontext():
            chunks = hidden_states(lm, sequences.repeat(len(adapters))).chunk(len(adapters))
        return {name: self._read(name, chunks[adapters.index(adapter)], sequences) for name, adapter in played.items()}

    def _read(self, name: str, hidden: Tensor, sequences: Sequences) -> Any:
        """A role's answer from its last hidden states [B, P + R, d]."""
        if name == "reward":
            return rewards(self.reward_head, hidden, sequences)
        states = before_answers(hidden, sequences)
        if name == "critic":
            states = states.detach() if self.detached else states
            return self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1)
        head = self._trunk(name).get_output_embeddings()
        return token_logprobs(states, head, sequences.answers, self.temperature)


def make_roles(name: str, config: Config, task: Task) -> Roles:
    """The four models of the method ``name``, made of the task's, some of which they take over.

    With FSDP the layers of their trunks are sharded over the processes.
    """
    roles = Roles(
        METHODS[name],
        task.lm,
        task.head,
        config,
        reward_lm=task.reward_lm,
        reward_function=task.reward_function,
    )
    for trunk in roles.trunks.values():
        shard(trunk)
    return roles


class Trained:
    """The part of :class:`Roles` that a checkpoint holds: what trains, and the digest of what it was trained on."""

    def __init__(self, roles: Roles):
        self.roles = roles
        self.base = roles.base_digest()

    def state_dict(self) -> dict[str, Any]:
        return whole_state({"base": self.base, "trained": {name: p.detach() for name, p in self._parameters().items()}})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``KernelabError`` if the trunk is not the one that the saved adapters were trained on."""
        if state["base"] != self.base:
            raise KernelabError(
                f"the checkpoint's adapters were trained on a trunk with sha256 {state['base'][:12]}..., this one has "
                f"{self.base[:12]}...: resume with the model and the data of the first start."
            )
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(shard_like(state["trained"][name], parameter))

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.roles.named_parameters() if p.requires_grad}
