"""Rewards from elsewhere: a Python function, or a sequence classifier of transformers."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernelab._core.errors import bad_value
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.text_function import TextFunction
from kernelab.papers.hydra_rlhf.tokens import Encoder, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def given_reward(config: Config, encoder: Encoder, device: torch.device) -> RewardFunction | RewardModel | None:
    """What the config's ``reward`` or ``reward_model_path`` names."""
    if config.reward is not None:
        return RewardFunction(config.reward, encoder)
    if config.reward_model_path is not None:
        return RewardModel(config.reward_model_path, encoder, getattr(torch, config.dtype)).to(device)
    return None


class RewardFunction:
    """Rewards from a function of texts: ``function(prompts, answers)``, two lists, returns a number for each pair.

    Texts are what the tokenizer makes of the tokens that the policy read and wrote; an answer may be empty.

    Raises:
        ValueError: ``reference`` names no function, or it does not return one finite number for each answer.
    """

    def __init__(self, reference: str, encoder: Encoder):
        self.function, self.encoder = TextFunction("reward", reference), encoder

    def __call__(self, sequences: Sequences) -> Tensor:
        """[B], float32."""
        found = self.function(self.encoder.decode_prompts(sequences), self.encoder.decode(sequences))
        return torch.tensor(found, device=sequences.tokens.device)


class RewardModel(nn.Module):
    """Rewards from a transformers sequence classifier with one label.

    It reads the texts of prompts with their answers, as the policy's tokenizer writes them without special tokens and
    as its own encodes them; one that is longer than its context loses its start. It does not train.

    Args:
        path: the classifier and its tokenizer.
        dtype: of its weights.

    Raises:
        ValueError: it does not load whole, has another number of labels, cannot pad, or returns NaN or infinity.
    """

    def __init__(self, path: str, encoder: Encoder, dtype: torch.dtype):
        super().__init__()
        self.path, self.encoder = path, encoder
        self.lm, self.tokenizer = _load_classifier(path, dtype)
        self.tokenizer.truncation_side = "left"

    @torch.no_grad()
    def forward(self, sequences: Sequences) -> Tensor:
        """[B], float32."""
        texts = self.encoder.decode_whole(sequences)
        length = min(context(self.lm.config), self.tokenizer.model_max_length)
        # on the right, for models that count positions from the first column
        batch = self.tokenizer(
            texts, truncation=True, max_length=length, padding=True, padding_side="right", return_tensors="pt"
        ).to(sequences.tokens.device)
        found = classify(self.lm, batch["input_ids"], batch["attention_mask"])
        for text, value in zip(texts, found.tolist(), strict=True):
            if not math.isfinite(value):
                expected = f"{self.path} to return finite numbers"
                raise bad_value("hydra-rlhf", "reward_model_path", expected, f"{value} for {text!r}")
        return found


def classify(lm: PreTrainedModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """The one label's logits [B] of token rows [B, T], float32."""
    return lm(input_ids=tokens, attention_mask=mask).logits.squeeze(-1).float()


def context(settings: PreTrainedConfig) -> int:
    """The most tokens that a model reads."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _load_classifier(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        lm, found = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        expected = "a transformers sequence classifier with its tokenizer"
        raise bad_value("hydra-rlhf", "reward_model_path", expected, path, str(error)) from error
    rows = lm.get_input_embeddings().num_embeddings
    for holds, expected, got in (
        (not found["missing_keys"], "all weights of a sequence classifier", f"no {', '.join(found['missing_keys'])}"),
        (lm.config.num_labels == 1, "a classifier with 1 label", f"{lm.config.num_labels} labels"),
        (tokenizer.pad_token_id is not None, "a tokenizer with a padding token (pad_token)", "none"),
        (len(tokenizer) <= rows, f"a tokenizer of at most its {rows} tokens", f"{len(tokenizer)}"),
    ):
        if not holds:
            raise bad_value("hydra-rlhf", "reward_model_path", expected, f"{got} in {path}")
    # by which it finds the last token of a row
    lm.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return lm.eval().requires_grad_(False), tokenizer
