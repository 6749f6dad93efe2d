"""Text to padded token rows: prompts on the left, answers on the right of one fixed column."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from kernelab._core.errors import bad_value
from kernelab.papers.hydra_rlhf.data import Preference, Preferences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("kernelab")

_PAD, _END = "<pad>", "<end>"


@dataclass(frozen=True)
class Sequences:
    """Prompts, padded on the left to ``prompt_length`` columns, each followed by an answer, padded on the right.

    Attributes:
        tokens: [B, P + R] int64.
        mask: [B, P + R] bool, False at padding; an answer's end token is part of it.
        prompt_length: P.
    """

    tokens: Tensor
    mask: Tensor
    prompt_length: int

    @property
    def answers(self) -> Tensor:
        """[B, R]"""
        return self.tokens[:, self.prompt_length :]

    @property
    def answer_mask(self) -> Tensor:
        """[B, R]"""
        return self.mask[:, self.prompt_length :]

    @property
    def last(self) -> Tensor:
        """Column of the last answer token, [B]."""
        return self.prompt_length - 1 + self.answer_mask.sum(1)

    @property
    def positions(self) -> Tensor:
        """Position of each token in its own row, without the padding, [B, P + R]."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> Sequences:
        return replace(self, tokens=self.tokens[rows], mask=self.mask[rows])

    def repeat(self, times: int) -> Sequences:
        """The batch stacked ``times`` times along dim 0."""
        return replace(self, tokens=self.tokens.repeat(times, 1), mask=self.mask.repeat(times, 1))

    def to(self, device: torch.device | str) -> Sequences:
        return replace(self, tokens=self.tokens.to(device), mask=self.mask.to(device))


def join(prompts: tuple[Tensor, Tensor], answers: tuple[Tensor, Tensor]) -> Sequences:
    """Prompts and answers, each ``(tokens, mask)``, row by row."""
    tokens, mask = (torch.cat(pair, dim=1) for pair in zip(prompts, answers, strict=True))
    return Sequences(tokens, mask, prompt_length=prompts[0].shape[1])


def stack(*batches: Sequences) -> Sequences:
    """The rows of each batch, in order."""
    columns = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "mask")}
    return replace(batches[0], **columns)


def shuffled(step: int, size: int, count: int, seed: int) -> Tensor:
    """The ``step``-th batch of ``size`` indices out of ``count``, each once an epoch: a function of its arguments.

    >>> sorted(torch.cat([shuffled(step, 2, 4, seed=0) for step in range(2)]).tolist())
    [0, 1, 2, 3]
    """
    positions = torch.arange(step * size, (step + 1) * size)
    orders = {}
    for epoch in (positions // count).unique().tolist():
        orders[epoch] = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return torch.stack([orders[position // count][position % count] for position in positions.tolist()])


class Encoder:
    """Encodes preferences for a tokenizer at fixed lengths.

    What the tokenizer puts before a text (a begin token, say) stays before every prompt. A prompt that is too long
    loses its end or its start, as ``data.keep`` says; an answer that is too long loses its end, the end token too.

    Raises:
        ValueError: the tokenizer has no end token, or ``prompt_length`` leaves no room for a prompt. Without a padding
            token the end token pads, which is no loss: padding is told by the mask alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Preferences, prompt_length: int, response_length: int):
        if tokenizer.eos_token_id is None:
            raise bad_value("hydra-rlhf", "model", "a tokenizer with an end token (eos_token)", tokenizer.name_or_path)
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        self.pad: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.keep = data.keep
        self.prefix = [token for token in tokenizer("")["input_ids"] if token != self.end]
        self.separator = self._ids([data.separator])[0] if data.separator else []
        self.prompt_length, self.response_length = prompt_length, response_length
        self.room = prompt_length - len(self.prefix) - len(self.separator)
        if self.room < 1:
            raise bad_value(
                "hydra-rlhf", "prompt_length", f"at least {prompt_length - self.room + 1} here", prompt_length
            )

    def prompts(self, rows: Sequence[Preference]) -> tuple[Tensor, Tensor]:
        """Tokens and mask, [N, P]."""
        number = {text: index for index, text in enumerate(dict.fromkeys(row.prompt for row in rows))}
        texts = self._ids(number)
        if cut := sum(len(ids) > self.room for ids in texts):
            side = "end" if self.keep == "start" else "start"
            logger.info(
                "%d of %d prompts are longer than %d tokens and cut at their %s", cut, len(texts), self.room, side
            )
        kept = [ids[: self.room] if self.keep == "start" else ids[-self.room :] for ids in texts]
        tokens, mask = self._pad([self.prefix + ids + self.separator for ids in kept], self.prompt_length, left=True)
        order = torch.tensor([number[row.prompt] for row in rows])
        return tokens[order], mask[order]

    def answers(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and mask, [N, R]."""
        rows = [[*ids, self.end][: self.response_length] for ids in self._ids(texts)]
        return self._pad(rows, self.response_length, left=False)

    def decode(self, sequences: Sequences) -> list[str]:
        """The answers as text."""
        return self._texts(sequences.answers, sequences.answer_mask)

    def decode_prompts(self, sequences: Sequences) -> list[str]:
        """The prompts as text, as far as they were kept."""
        end = sequences.prompt_length
        return self._texts(sequences.tokens[:, :end], sequences.mask[:, :end])

    def decode_whole(self, sequences: Sequences) -> list[str]:
        """Each prompt, as far as it was kept, and its answer as one text."""
        return self._texts(sequences.tokens, sequences.mask)

    def _texts(self, tokens: Tensor, mask: Tensor) -> list[str]:
        rows = [ids[keep].tolist() for ids, keep in zip(tokens, mask, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        skip = len(self.prefix)  # a chat template may have written the prefix itself
        return [ids[skip:] if skip and ids[:skip] == self.prefix else ids for ids in found]

    def _pad(self, rows: list[list[int]], length: int, *, left: bool) -> tuple[Tensor, Tensor]:
        tokens = torch.full((len(rows), length), self.pad)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for index, ids in enumerate(rows):
            span = slice(length - len(ids), None) if left else slice(len(ids))
            tokens[index, span] = torch.tensor(ids)
            mask[index, span] = True
        return tokens, mask


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of ``texts``, in lower case, for which a word is the same in code and in a sentence.

    White space is no token: it divides a text, as do punctuation, digits, underscores and inner capitals, and each part
    is encoded as if a space stood before it. So ``setBlocked_domains`` shares its tokens with ``set blocked domains``,
    and a small model can copy them.
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise bad_value("hydra-rlhf", "vocab_size", f"at least {len(alphabet) + 2}, a token for each byte", vocab_size)
    tokenizer = Tokenizer(models.BPE())
    inner_capital = normalizers.Replace(Regex("(?<=[a-z])(?=[A-Z])"), " ")
    tokenizer.normalizer = normalizers.Sequence([inner_capital, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.Split(Regex(r"[a-z]+|\d|[^\sa-z\d]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_PAD, _END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END)
