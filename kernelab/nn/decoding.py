"""The choice of the next token, and the loop that appends it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from kernelab._core.errors import bad_type, bad_value

from .arguments import check_count

WHERE = "generate"


def sample(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Tokens [B] drawn from ``softmax(logits / temperature)`` [B, V], of the ``top_k`` largest; the largest at 0.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0)
    tensor([1])
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, token = (logits, None) if top_k is None else logits.topk(top_k)
    logits = logits.float()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # less the largest: never inf - inf
    drawn = torch.multinomial(p, 1, generator=generator)
    return (drawn if token is None else token.gather(-1, drawn))[:, 0]


def decode(
    step: Callable[[Tensor, Tensor | None], Tensor],
    prompt: Tensor,
    key_padding_mask: Tensor | None,
    max_new_tokens: int,
    eos_id: int | None,
    choose: Callable[[Tensor], Tensor],
) -> Tensor:
    """Prompt [B, P] and what follows; ``step(new tokens, mask of all)`` gives logits [B, V] of the next one."""
    tokens, new, mask = prompt, prompt, key_padding_mask
    ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        chosen = choose(step(new, mask)).to(prompt.dtype)
        if eos_id is not None:
            chosen = torch.where(ended, eos_id, chosen)
            ended = ended | (chosen == eos_id)
        new = chosen[:, None]
        tokens = torch.cat([tokens, new], dim=1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if eos_id is not None and ended.all():
            break
    return tokens


def check_prompt(prompt: Tensor, key_padding_mask: Tensor | None) -> None:
    """At least one token, and the last of each row a real one."""
    if prompt.shape[1] == 0:
        raise bad_value(WHERE, "prompt", "at least one token", prompt)
    if key_padding_mask is not None and not key_padding_mask[:, -1].all():
        hint = "The next token continues the last one: pad on the left."
        raise bad_value(WHERE, "key_padding_mask", "True in the last column", key_padding_mask, hint)


def check_sampling(max_new_tokens: object, temperature: object, top_k: object, eos_id: object, vocab_size: int) -> None:
    """The numbers that say how tokens are drawn."""
    check_count(WHERE, "max_new_tokens", max_new_tokens, least=0)
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise bad_type(WHERE, "temperature", "a number", temperature)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise bad_value(WHERE, "temperature", "a finite number of at least 0", temperature)
    for name, number, least, most in (("top_k", top_k, 1, vocab_size), ("eos_id", eos_id, 0, vocab_size - 1)):
        if number is not None:
            check_count(WHERE, name, number, least)
            if number > most:
                raise bad_value(WHERE, name, f"at most {most}", number)
