"""The trunk, a causal language model of transformers, and its reward head."""

from __future__ import annotations

import hashlib
import inspect
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kernelab._core.errors import bad_value
from kernelab.papers.hydra_rlhf.processes import whole
from kernelab.papers.hydra_rlhf.tokens import Sequences, stack

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from kernelab.papers.hydra_rlhf.config import Config
    from kernelab.papers.hydra_rlhf.tokens import Encoder

REWARD_HEAD = "reward_head.safetensors"


def mixed_precision(config: Config, device: torch.device) -> torch.autocast:
    """Autocast to the config's dtype.

    Its cache stays off: until the block ends it would give the 16-bit copies of weights that an optimizer has moved.
    """
    dtype = getattr(torch, config.dtype)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def small_llama(config: Config, encoder: Encoder) -> PreTrainedModel:
    """An untrained Llama of the config's size, with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=len(encoder.tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=-(-config.hidden_size * 8 // 3) // 16 * 16,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.prompt_length + config.response_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=encoder.end,
        pad_token_id=encoder.pad,
    )
    return LlamaForCausalLM(sizes)


def load_hydra(path: str, length: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, nn.Linear | None]:
    """A causal language model of at least ``length`` positions, in float32, its tokenizer, and its reward head if any.

    Raises:
        ValueError: it does not load, is too short, or has logits that are not its output head times its hidden states.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        settings = AutoConfig.from_pretrained(path)
        for name in _dropouts(settings):
            setattr(settings, name, 0.0)  # old and new log-probabilities must come from one function, in any mode
        lm = AutoModelForCausalLM.from_pretrained(path, config=settings, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise bad_value(
            "hydra-rlhf", "model", "a transformers causal LM with its tokenizer", path, str(error)
        ) from error
    lm.generation_config = GenerationConfig()  # its own top-k or penalties would sample from another policy
    positions = getattr(lm.config, "max_position_embeddings", None) or length
    if positions < length:
        raise bad_value("hydra-rlhf", "prompt_length", f"at most {positions} tokens with response_length", str(length))
    if (rows := lm.get_input_embeddings().num_embeddings) < len(tokenizer):
        raise bad_value(
            "hydra-rlhf", "model", f"a tokenizer of at most its {rows} tokens", f"{len(tokenizer)} in {path}"
        )
    if not _is_head_times_hidden(lm.eval()):
        raise bad_value("hydra-rlhf", "model", "logits that are the output head times the hidden states", path)
    head = None
    if (file := Path(path) / REWARD_HEAD).is_file():
        head = new_reward_head(lm)
        head.load_state_dict(load_file(file))
    return lm, tokenizer, head


def _dropouts(settings: PreTrainedConfig) -> list[str]:
    """Names of a model's settings that drop units or layers at random in training."""
    kinds = ("dropout", "layerdrop", "pdrop")
    return [name for name, value in vars(settings).items() if name.endswith(kinds) and isinstance(value, float)]


@torch.no_grad()
def _is_head_times_hidden(lm: PreTrainedModel) -> bool:
    tokens = torch.arange(4)[None]
    hidden = hidden_states(lm, Sequences(tokens, torch.ones_like(tokens, dtype=torch.bool), prompt_length=4))
    head = lm.get_output_embeddings()
    return isinstance(head, nn.Linear) and torch.allclose(
        head(hidden), lm(input_ids=tokens).logits, rtol=1e-3, atol=1e-3
    )


def save_hydra(folder: Path, lm: PreTrainedModel, head: nn.Linear | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes what :func:`load_hydra` reads; the folder appears whole, or stays as it is if it is there."""
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    lm.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if head is not None:
        save_file(head.state_dict(), temporary / REWARD_HEAD)
    temporary.rename(folder)


def new_reward_head(lm: PreTrainedModel) -> nn.Linear:
    """An untrained layer that reads a reward from a hidden state; float32."""
    return nn.Linear(lm.get_output_embeddings().in_features, 1)


def linear_layers(lm: PreTrainedModel) -> list[str]:
    """Names of the trunk's linear layers, the output head not among them."""
    from transformers.pytorch_utils import Conv1D

    head = lm.get_output_embeddings()
    return [name for name, layer in lm.named_modules() if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head]


def hidden_states(lm: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The trunk's last hidden states, [B, P + R, d]."""
    return _run_trunk(lm, sequences.tokens, sequences.mask.long(), sequences.positions)


def pair_states(lm: PreTrainedModel, chosen: Sequences, rejected: Sequences) -> tuple[Tensor, Tensor]:
    """The last hidden states with each of two answers to the same prompts, [B, P + R, d] and [B, P + R, d].

    The trunk reads a prompt once and its two answers after it, each blind to the other and at the positions it would
    have alone. Where the attention takes no mask of our own, or the trunk no positions, the pairs are two batches.
    """
    if lm.config._attn_implementation != "sdpa" or not _takes_positions(lm):
        return hidden_states(lm, stack(chosen, rejected)).chunk(2)
    prompt, end = chosen.prompt_length, chosen.tokens.shape[1]
    tokens = torch.cat([chosen.tokens, rejected.answers], 1)  # [B, P + R + R]
    positions = torch.cat([chosen.positions, rejected.positions[:, prompt:]], 1)
    real = torch.cat([chosen.mask, rejected.answer_mask], 1)
    seen = torch.ones(2 * (tokens.shape[1],), dtype=torch.bool, device=tokens.device).tril()
    seen[end:, prompt:end] = False
    itself = torch.eye(len(seen), dtype=torch.bool, device=tokens.device)  # no row of a softmax may be empty
    mask = seen & real[:, None] | itself  # [B, T, T]
    hidden = _run_trunk(lm, tokens, mask[:, None], positions)
    return hidden[:, :end], torch.cat([hidden[:, :prompt], hidden[:, end:]], 1)


def _run_trunk(lm: PreTrainedModel, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    placed = {"position_ids": positions} if _takes_positions(lm) else {}
    return lm.base_model(input_ids=tokens, attention_mask=mask, use_cache=False, **placed).last_hidden_state


def _takes_positions(lm: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(lm.base_model.forward).parameters


def before_answers(hidden: Tensor, sequences: Sequences) -> Tensor:
    """The states from which each answer token is predicted, [B, R, d]."""
    return hidden[:, sequences.prompt_length - 1 : -1]


def rewards(head: nn.Linear, hidden: Tensor, sequences: Sequences) -> Tensor:
    """The head's reading at the last token of each answer, [B]."""
    rows = torch.arange(len(sequences), device=hidden.device)
    return head(hidden[rows, sequences.last].to(head.weight.dtype)).squeeze(-1)


def digest(parameters: dict[str, Tensor]) -> str:
    """sha256 of named tensors: names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(parameters.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
