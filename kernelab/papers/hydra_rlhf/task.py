"""What a run works on: the preferences, encoded, and the model that learns from them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernelab._core.errors import bad_value
from kernelab.experiment.device import accelerator
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.data import Preference, read_preferences, standard_library
from kernelab.papers.hydra_rlhf.judge import new_judge
from kernelab.papers.hydra_rlhf.model import load_hydra, new_reward_head, small_llama
from kernelab.papers.hydra_rlhf.reward import RewardFunction, RewardModel, given_reward
from kernelab.papers.hydra_rlhf.roles import chosen_methods
from kernelab.papers.hydra_rlhf.text_function import TextFunction
from kernelab.papers.hydra_rlhf.tokens import Encoder, Sequences, join, train_tokenizer

Padded = tuple[Tensor, Tensor]
"""Token rows and their mask, [N, T] each."""


@dataclass(frozen=True)
class Rows:
    """Encoded preferences, and the chosen answers as text."""

    prompts: Padded
    chosen: Padded
    rejected: Padded
    truths: list[str]

    @classmethod
    def encode(cls, rows: list[Preference], encoder: Encoder, device: torch.device) -> Rows:
        truths = [row.chosen for row in rows]
        columns = encoder.prompts(rows), encoder.answers(truths), encoder.answers([row.rejected for row in rows])
        return cls(*((tokens.to(device), mask.to(device)) for tokens, mask in columns), truths)

    def __len__(self) -> int:
        return len(self.truths)

    def pairs(self, rows: Tensor | slice = slice(None)) -> tuple[Sequences, Sequences]:
        """The prompts with their chosen, and with their rejected answers."""
        prompts, chosen, rejected = (
            (tokens[rows], mask[rows]) for tokens, mask in (self.prompts, self.chosen, self.rejected)
        )
        return join(prompts, chosen), join(prompts, rejected)


@dataclass(frozen=True)
class Questions:
    """Distinct prompts, and the chosen answer to each, which only the gold score sees."""

    prompts: Padded
    truths: list[str]

    @classmethod
    def of(cls, rows: list[Preference], encoded: Rows, limit: int = 0) -> Questions:
        """The first ``limit`` distinct prompts of the rows, or all (0)."""
        first = {row.prompt: index for index, row in reversed(list(enumerate(rows)))}
        chosen = sorted(first.values())[: limit or None]
        tokens, mask = encoded.prompts
        return cls((tokens[chosen], mask[chosen]), [encoded.truths[index] for index in chosen])

    def __len__(self) -> int:
        return len(self.truths)

    def texts(self, encoder: Encoder) -> list[str]:
        """The prompts as text, as far as they were kept."""
        return encoder.decode_prompts(Sequences(*self.prompts, prompt_length=encoder.prompt_length))

    def __getitem__(self, rows: Tensor) -> Questions:
        tokens, mask = self.prompts
        return Questions((tokens[rows], mask[rows]), [self.truths[row] for row in rows.tolist()])


@dataclass(frozen=True)
class Task:
    """The models and their data: preference pairs to learn from, questions to answer, and as much that is held out.

    ``head`` reads rewards from ``reward_lm``, or from ``lm`` where there is none; PPO asks the ``reward_function``
    instead, if there is one. The ``judge`` compares answers with a baseline's.
    """

    lm: PreTrainedModel
    head: nn.Linear
    encoder: Encoder
    pairs: Rows
    questions: Questions
    held_out_pairs: Rows
    held_out_questions: Questions
    reward_lm: PreTrainedModel | None = None
    reward_function: RewardFunction | RewardModel | None = None
    judge: TextFunction | None = None

    def copied(self) -> Task:
        """The same task with models of its own."""
        models = ("lm", "head", "reward_lm")
        return replace(self, **{name: copy.deepcopy(getattr(self, name)) for name in models})


def prepare(config: Config) -> Task:
    """Reads the data and makes or loads tokenizer, trunk and reward head, all from the config."""
    device = accelerator().device
    lm = tokenizer = head = None
    if config.model:
        lm, tokenizer, head = load_hydra(config.model, config.prompt_length + config.response_length)
    if config.data:
        chat = tokenizer is not None and tokenizer.chat_template is not None
        render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True) if chat else None
        data = read_preferences(config.data, config.held_out, render)
    else:
        data = standard_library(config.held_out, config.rejected_per_prompt, config.seed)
    if tokenizer is None:
        tokenizer = train_tokenizer(data.texts(), config.vocab_size)
    encoder = Encoder(tokenizer, data, config.prompt_length, config.response_length)
    lm = lm or small_llama(config, encoder)
    if head is None and (name := _head_needs(config)):
        raise bad_value("hydra-rlhf", name, "more than 0, for the model has no reward head", 0)
    if config.gradient_checkpointing and not lm.supports_gradient_checkpointing:
        raise bad_value("hydra-rlhf", "gradient_checkpointing", "False, for the model cannot do it", True)
    head = head or new_reward_head(lm)
    lm.to(device).eval()  # dropout stays off: old and new log-probabilities must come from one function
    pairs, held_out = (Rows.encode(rows, encoder, device) for rows in (data.train, data.held_out))
    return Task(
        lm=lm,
        head=head.to(device),
        encoder=encoder,
        pairs=pairs,
        questions=Questions.of(data.train, pairs),
        held_out_pairs=held_out,
        held_out_questions=Questions.of(data.held_out, held_out, config.eval_prompts),
        reward_function=given_reward(config, encoder, device),
        judge=new_judge(config.judge) if config.judge is not None else None,
    )


def _head_needs(config: Config) -> str | None:
    """The setting that leaves a new reward head untrained though a reward is read from it."""
    if config.reward_is_given:
        return None
    steps = {"sft_steps" if method.joint else "rm_steps" for method in chosen_methods(config).values()}
    return next((name for name in sorted(steps) if not getattr(config, name)), None)
