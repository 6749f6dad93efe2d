"""Predicts the memory of a run: the trainer's own code on tensors that have sizes and no memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, count
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from kernelab._core.errors import bad_value
from kernelab._core.ledger import Ledger
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.model import mixed_precision, new_reward_head, small_llama
from kernelab.papers.hydra_rlhf.optimise import PPO
from kernelab.papers.hydra_rlhf.quantized import tensors
from kernelab.papers.hydra_rlhf.reward import classify, context
from kernelab.papers.hydra_rlhf.roles import METHODS, Roles
from kernelab.papers.hydra_rlhf.sft import Supervision
from kernelab.papers.hydra_rlhf.tokens import Sequences, join

KINDS = ("weights", "adapters", "optimizer state", "gradients", "KV cache", "logits", "activations")

_LLAMA_7B = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
_LLAMA_13B = {"vocab_size": 32_000, "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40}
_LLAMA_3_8B = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
MODELS = {
    "llama-7b": LlamaConfig(**_LLAMA_7B, num_attention_heads=32),
    "llama-13b": LlamaConfig(**_LLAMA_13B, num_attention_heads=40),
    "llama-3-8b": LlamaConfig(**_LLAMA_3_8B, num_attention_heads=32, num_key_value_heads=8),
}


@dataclass(frozen=True)
class Plan:
    """Bytes by kind when each part of a run holds most: supervised stages, then answer, score and update of PPO."""

    config: Config
    parts: dict[str, dict[str, int]]

    @property
    def totals(self) -> dict[str, int]:
        """Bytes by part."""
        return {part: sum(kinds.values()) for part, kinds in self.parts.items()}

    @property
    def states(self) -> int:
        """Bytes that PPO holds between two steps."""
        return sum(self.parts["update"].get(kind, 0) for kind in ("weights", "adapters", "optimizer state"))

    @property
    def peak(self) -> int:
        return max(self.totals.values())


def predict(config: Config) -> Plan:
    """What a run of one method and one process holds, every answer at its full length; the phase of costs left out.

    A classifier at ``reward_model_path`` reads as many tokens as the policy, though its own tokenizer may make more.
    Bytes of tensors, as :class:`~kernelab._core.memory.LiveBytes` counts them on a CPU: what an allocator rounds up, or
    a GPU's libraries take for themselves, comes on top. So does what reading and packing models takes.

    Raises:
        ValueError: the config's model is not known, or has layers that it cannot hold in 4 bits.

    >>> plan = predict(Config(method="lora", sft_steps=0, rm_steps=0))
    >>> list(plan.totals), plan.peak > plan.states
    (['answer', 'score', 'update'], True)
    """
    method = METHODS[config.method]
    rm_steps = 0 if config.reward_is_given else config.rm_steps
    stages = {"hydra_sft": config.sft_steps} if method.joint else {"sft": config.sft_steps, "rm": rm_steps}
    precision = mixed_precision(config, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]), _Sizes(), precision, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # deepcopy asks for it
        sizes = model_sizes(config)
        reward = _given_reward(config)
        parts = {stage: _supervised(config, sizes, stage, reward) for stage, steps in stages.items() if steps}
        return Plan(config, parts | _ppo(config, sizes, reward))


def model_sizes(config: Config) -> PreTrainedConfig:
    """The sizes of the config's trunk. Nothing is downloaded."""
    if config.model is None:
        return small_llama(config, SimpleNamespace(tokenizer=range(config.vocab_size), end=0, pad=0)).config
    return MODELS.get(config.model) or _settings("model", config.model, f", or one of {', '.join(MODELS)}")


def _settings(argument: str, path: str, otherwise: str = "") -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        expected = f"the folder or file of a transformers config{otherwise}"
        raise bad_value("hydra-rlhf", argument, expected, path) from error


class _Classifier(nn.Module):
    """What is at ``reward_model_path``; a text has as many of its tokens as of the policy's."""

    def __init__(self, path: str, dtype: torch.dtype):
        super().__init__()
        sizes = _settings("reward_model_path", path)
        try:
            lm = AutoModelForSequenceClassification.from_config(sizes, dtype=dtype)
        except ValueError as error:
            raise bad_value("hydra-rlhf", "reward_model_path", "the config of a sequence classifier", path) from error
        self.lm = lm.eval().requires_grad_(False)
        self.lm.config.get_text_config().pad_token_id = 0
        self.length = context(sizes)

    def forward(self, sequences: Sequences) -> Tensor:
        return classify(self.lm, sequences.tokens[:, -self.length :], sequences.mask[:, -self.length :].long())


def _given_reward(config: Config) -> Callable[[Sequences], Tensor] | None:
    if config.reward_model_path is not None:
        return _Classifier(config.reward_model_path, getattr(torch, config.dtype))
    return (lambda sequences: torch.ones(len(sequences))) if config.reward else None


def _trunk(config: Config, sizes: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    length = sum(_lengths(config))
    positions = getattr(sizes, "max_position_embeddings", None) or length
    if positions < length:
        raise bad_value("hydra-rlhf", "prompt_length", f"at most {positions} tokens with response_length", length)
    try:
        return AutoModelForCausalLM.from_config(sizes, dtype=dtype).eval()
    except ValueError as error:
        raise bad_value("hydra-rlhf", "model", "the config of a causal language model", config.model) from error


def _supervised(
    config: Config, sizes: PreTrainedConfig, stage: str, reward: Callable[[Sequences], Tensor] | None
) -> dict[str, int]:
    lm = _trunk(config, sizes, torch.float32)
    waiting = [copy.deepcopy(lm).requires_grad_(False)] if stage == "rm" else []  # the SFT model, for PPO
    waiting += [reward] if isinstance(reward, nn.Module) else []
    supervision = Supervision(config, stage, lm, new_reward_head(lm))
    with _ledger(sizes, supervision, *waiting) as live, live.phase(stage):
        prompts, answers = (_ones(config.sft_batch_size, length) for length in _lengths(config))
        supervision.gradients(join(prompts, answers), join(prompts, answers))
        supervision.descent.step()
    return live.at_peak(stage)


def _ppo(
    config: Config, sizes: PreTrainedConfig, reward: Callable[[Sequences], Tensor] | None
) -> dict[str, dict[str, int]]:
    lm = _trunk(config, sizes, getattr(torch, config.dtype))
    roles = Roles(METHODS[config.method], lm, new_reward_head(lm), config, reward_function=reward)
    ppo = PPO(roles, SimpleNamespace(end=0, pad=0, response_length=config.response_length), _few_parts(config))
    with _ledger(sizes, ppo) as live:
        sequences = _answer(ppo, config, live)
        few = sequences[slice(ppo.config.batch_size)]
        with live.phase("score"):
            scores = ppo.score(few)
        kept = scores[torch.arange(config.batch_size) % ppo.config.batch_size]  # of all answers
        with live.phase("update"):
            ppo.update(few, scores)
        del kept
    return {part: live.at_peak(part) for part in live.phases}


@contextmanager
def _ledger(sizes: PreTrainedConfig, trainer: PPO | Supervision, *others: nn.Module) -> Iterator[Ledger]:
    """Counts from where the optimizers have taken a step."""
    modules, optimizers = nn.ModuleList([trainer.model, *others]), trainer.descent.optimizers
    trained = [p for p in modules.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    modules.zero_grad()
    states = chain.from_iterable(optimizer.state.values() for optimizer in optimizers)
    words = sizes.get_text_config().vocab_size
    with Ledger(lambda tensor: "logits" if words in tensor.shape[1:] else "activations") as live:
        live.label("weights", tensors(modules))
        live.label("adapters", (p for name, p in modules.named_parameters() if ".lora_" in name))
        live.label("optimizer state", (value for state in states for value in state.values() if torch.is_tensor(value)))
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: live.label("gradients", [p.grad]))
        yield live


def _answer(ppo: PPO, config: Config, live: Ledger) -> Sequences:
    """Answers of full length, of which the first and the last token are computed: between them the cache only grows."""

    def label_cache(trunk, args, output) -> None:
        layers = output.past_key_values.layers if output.past_key_values else []
        live.label("KV cache", (value for layer in layers for value in vars(layer).values() if torch.is_tensor(value)))

    def run(length: int, forwards: int) -> None:
        """The phase is the last of so many forwards on prompts of this length, and what is done with its logits."""
        calls = count(1)

        def before(trunk, args) -> None:
            call = next(calls)
            if call == forwards:
                phase.enter_context(live.phase("answer"))
            elif call > forwards:
                raise _Enough

        with ExitStack() as phase, suppress(_Enough), trunk.register_forward_pre_hook(before):
            ppo.answer(_ones(rows, length))

    rows = min(config.batch_size, config.local_rollout_forward_batch_size or config.batch_size)
    prompt_length, response_length = _lengths(config)
    trunk = ppo.roles.actor.base_model
    with trunk.register_forward_hook(label_cache):
        run(prompt_length, forwards=1)
        run(prompt_length + response_length - 2, forwards=2)
    return join(_ones(config.batch_size, prompt_length), _ones(config.batch_size, response_length))


def _lengths(config: Config) -> tuple[int, int]:
    return config.prompt_length, config.response_length


def _ones(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask, [rows, length]."""
    tokens = torch.ones(rows, length, dtype=torch.long)
    return tokens, tokens.bool()


class _Enough(Exception):
    """The forwards that were wanted have run."""


def _few_parts(config: Config) -> Config:
    """The config of a batch of one mini-batch of at most two parts: the further ones hold what the second does."""
    parts = min(config.gradient_accumulation_steps, 2)
    rows = config.batch_size // (config.num_mini_batches * config.gradient_accumulation_steps)
    return replace(
        config,
        batch_size=rows * parts,
        num_mini_batches=1,
        gradient_accumulation_steps=parts,
        num_ppo_epochs=1,
    )


class _Sizes(FakeTensorMode):
    """Tensors that have sizes and no values: asked for a number they say 1, asked a question they say no.

    So no answer ends early, no mask is left out, and every step is finite and taken.
    """

    def __init__(self) -> None:
        super().__init__()
        # Its weak references to parameters would keep module.to(dtype) from replacing them.
        self.fake_tensor_converter.set_tensor_memo = lambda *_: None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __deepcopy__(self, memo) -> _Sizes:
        return self  # else the copy of a tensor would belong to a mode of its own
