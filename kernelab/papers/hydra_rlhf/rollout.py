"""Answers of a language model, sampled with its key-value cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from kernelab.experiment.device import uses_fsdp
from kernelab.papers.hydra_rlhf.tokens import Encoder, Sequences, join


@torch.no_grad()
def sample_answers(
    lm: PreTrainedModel, prompts: tuple[Tensor, Tensor], encoder: Encoder, temperature: float
) -> Sequences:
    """One answer to each prompt (tokens and mask, [B, P]), drawn from ``softmax(logits / temperature)`` alone.

    Draws from torch's global generator.
    """
    tokens, mask = prompts
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=encoder.response_length,
        eos_token_id=encoder.end,
        pad_token_id=encoder.pad,
    )
    # with FSDP a process whose answers have ended goes on, for the others need its shards
    output = lm.generate(
        input_ids=tokens, attention_mask=mask.long(), generation_config=settings, synced_gpus=uses_fsdp()
    )
    answers = output[:, tokens.shape[1] :]
    answers = F.pad(answers, (0, encoder.response_length - answers.shape[1]), value=encoder.pad)
    is_end = answers == encoder.end
    return join(prompts, (answers, is_end.cumsum(1) - is_end.long() == 0))  # the first end token belongs to the answer
