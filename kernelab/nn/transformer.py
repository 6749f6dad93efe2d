"""A transformer, encoder or decoder, with any scheme of positions, layers that may be looped, and decoding."""

from __future__ import annotations

import math
import numbers
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from kernelab._core.errors import bad_type, bad_value
from kernelab._core.sequences import check_padding_mask, documents_of

from .arguments import check_cache, check_count, check_flag
from .attention import Attention
from .cache import KeyValueCache
from .decoding import check_prompt, check_sampling, decode, sample
from .layer import ACTIVATIONS, NORMS, Layer
from .position_only import PositionOnlyAttention
from .positions import sinusoids, token_positions
from .relative import RelativeAttention
from .rotary import RotaryAttention
from .schemes import SCHEMES
from .window import WindowAttention

WHERE = "Transformer"
EMBEDDED = ("absolute", "sinusoidal", "none")  # added to the embeddings, or not there
WITHOUT_CONTENT = {"position_only": PositionOnlyAttention, "window": WindowAttention}
POSITIONS = (*EMBEDDED, "rotary", *SCHEMES, *WITHOUT_CONTENT)
_STD = 0.02  # of new weights, as in BERT and GPT-2


class Transformer(nn.Module):
    """Tokens to logits, or to hidden states that ``kernelab.ops.linear_logprob`` takes with ``output_weight``.

    Args:
        vocab_size, d_model, num_layers, num_heads: as their names say.
        position: how tokens know where they stand. Added to the embeddings: "absolute" (learned), "sinusoidal",
            "none"; in the attention: "rotary", or "relative_key", "relative_key_query", "disentangled", "t5", "alibi"
            of :mod:`kernelab.nn.schemes`; in place of content: "position_only", "window". Layers share the bias of
            "t5" and the embeddings of "disentangled".
        position_options: keyword arguments of the scheme, as ``{"per_head": True}`` or ``{"rotary_dim": 32}``.
        max_distance: of the scheme, where it has one; None: its default.
        max_length: the number of positions that "absolute" has.
        causal: a decoder; False: an encoder.
        shared_layers: how often the stack of layers is run, with the same weights; False: once.
        gate: after each layer, ``y = g * layer(x) + (1 - g) * x`` with ``g = sigmoid(W x + b)``.
        num_kv_heads, head_dim: as of :class:`Attention`.
        d_ff: features between up_proj and down_proj; None: ``4 * d_model``.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        norm: LayerNorm before each part ("pre"), after its residual ("post", then of the embeddings too), or one
            before attention and MLP side by side ("parallel", as in Phi).
        dropout: of embeddings and residuals, in training mode.
        bias: the projections of the attention have biases.
        tie_embeddings: the output head is the embedding.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Sources: Vaswani et al. (arXiv 1706.03762); looped layers: Dehghani et al. (arXiv 1807.03819); the gate: Csordás,
    Irie and Schmidhuber (arXiv 2110.07732).

    >>> model = Transformer(50, 32, num_layers=1, num_heads=4, position="relative_key_query", shared_layers=3)
    >>> model(torch.randint(50, (2, 10))).shape
    torch.Size([2, 10, 50])
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        *,
        position: str = "relative_key",
        position_options: dict | None = None,
        max_distance: int | None = None,
        max_length: int | None = None,
        causal: bool = False,
        shared_layers: int | bool = False,
        gate: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        d_ff: int | None = None,
        activation: str = "gelu",
        norm: str = "pre",
        dropout: float = 0.0,
        bias: bool = True,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        counts = {"vocab_size": vocab_size, "d_model": d_model, "num_layers": num_layers}
        counts |= {"shared_layers": 1 if shared_layers is False else shared_layers}
        if d_ff is not None:
            counts["d_ff"] = d_ff
        for name, count in counts.items():
            check_count(WHERE, name, count)
        for name, flag in {"gate": gate, "tie_embeddings": tie_embeddings}.items():
            check_flag(WHERE, name, flag)
        _check_choice("position", position, POSITIONS)
        _check_choice("activation", activation, tuple(ACTIVATIONS))
        _check_choice("norm", norm, NORMS)
        _check_embedded(position, d_model, max_length)
        if not isinstance(position_options, (dict, type(None))):
            raise bad_type(WHERE, "position_options", "a dict or None", position_options)
        if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout < 1:
            raise bad_value(WHERE, "dropout", "a probability 0 <= p < 1", dropout)

        self.vocab_size, self.position, self.causal, self.max_length = vocab_size, position, causal, max_length
        self.loops = counts["shared_layers"]
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_length, d_model) if position == "absolute" else None
        self.embedding_norm = nn.LayerNorm(d_model) if norm == "post" else None
        self.dropout = nn.Dropout(dropout)
        options = (position_options or {}) | ({} if max_distance is None else {"max_distance": max_distance})
        heads = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "causal": causal, "bias": bias}
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            first = self.layers[0].attention if self.layers else None
            attention = _attention(position, first, d_model, num_heads, heads, options)
            rest = {"activation": activation, "norm": norm, "dropout": dropout, "gate": gate}
            self.layers.append(Layer(attention, d_model, d_ff or 4 * d_model, **rest))
        self.final_norm = None if norm == "post" else nn.LayerNorm(d_model)
        self.head = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)
        self._initialise(1.0 if norm == "post" else 2 * num_layers * self.loops)

    def _initialise(self, residuals: float) -> None:
        """Normal weights; those that write to the residual stream are narrower by the root of how many there are."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=_STD / math.sqrt(residuals) if writes else _STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def output_weight(self) -> Tensor:
        """The output head, [vocab_size, d_model]."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_cache(self) -> list[KeyValueCache]:
        """An empty cache for ``forward``: one for each run of each layer."""
        return [KeyValueCache() for _ in range(self.loops * len(self.layers))]

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """Logits [B, N, vocab_size] of tokens [B, N].

        Args:
            tokens: int64 or int32.
            key_padding_mask: boolean [B, cached + N], True where a token may be attended to. Positions that are added
                to the embeddings start at the first such token.
            cu_seqlens: int32 or int64 [documents + 1], boundaries of documents packed in a batch of 1; they do not see
                each other, and positions start again with each.
            cache: of :meth:`new_cache`; holds the tokens before these and takes these.
        """
        call = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens, "cache": cache}
        return F.linear(self.hidden(tokens, **call), self.output_weight)

    def hidden(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """Hidden states [B, N, d_model] before the output head; arguments as of :meth:`forward`."""
        seen, documents = self._check_call(tokens, key_padding_mask, cu_seqlens, cache)
        x = self.embedding(tokens)
        if self.position in ("absolute", "sinusoidal"):
            visible = {"key_padding_mask": key_padding_mask, "documents": documents}
            position = token_positions(tokens.shape[1], seen, **visible, device=tokens.device)
            x = x + self._embed(position).to(x.dtype)
        x = self.dropout(x if self.embedding_norm is None else self.embedding_norm(x))
        call = {"key_padding_mask": key_padding_mask, "cu_seqlens": cu_seqlens}
        for run, layer in enumerate([*self.layers] * self.loops):
            x = layer(x, cache=None if cache is None else cache[run], **call)
        return x if self.final_norm is None else self.final_norm(x)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        key_padding_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prompt [B, P] and up to ``max_new_tokens`` more, drawn one by one from ``softmax(logits / temperature)``.

        With a cache: each step runs one token. Dropout is as the module's mode says; ``model.eval()`` turns it off.

        Args:
            prompt: int64 or int32, at least one token; shorter ones are padded on the left.
            key_padding_mask: boolean [B, P], False at the padding.
            temperature: 0 takes the most probable token.
            top_k: only so many of the most probable tokens are drawn from; None: all.
            eos_id: ends a row, which is then filled with it; all rows ended, decoding stops.
            generator: source of the randomness; None: torch's own.

        Raises:
            ValueError, TypeError: an argument does not fit, or the model is not causal; the message names it.
        """
        if not self.causal:
            raise bad_value("generate", "causal", "a Transformer with causal=True", "an encoder")
        self._check_call(prompt, key_padding_mask, None, None)
        check_prompt(prompt, key_padding_mask)
        check_sampling(max_new_tokens, temperature, top_k, eos_id, self.vocab_size)
        if self.max_length is not None and prompt.shape[1] + max_new_tokens - 1 > self.max_length:
            most = self.max_length - prompt.shape[1] + 1
            raise bad_value("generate", "max_new_tokens", f"at most {most} after this prompt", max_new_tokens)
        cache = self.new_cache()

        def step(new: Tensor, mask: Tensor | None) -> Tensor:
            last = self.hidden(new, key_padding_mask=mask, cache=cache)[:, -1]
            return F.linear(last, self.output_weight)

        choose = partial(sample, temperature=temperature, top_k=top_k, generator=generator)
        return decode(step, prompt, key_padding_mask, max_new_tokens, eos_id, choose)

    def _embed(self, position: Tensor) -> Tensor:
        """What positions [N] or [B, N] add to the embeddings, [*, d_model]."""
        if self.position == "sinusoidal":
            return sinusoids(position, self.embedding.embedding_dim)
        _check_range("cu_seqlens", f"documents of at most max_length {self.max_length}", position, self.max_length)
        return self.position_embedding(position)

    def _check_call(self, tokens: object, mask: object, cu_seqlens: object, cache: object) -> tuple:
        """Returns how many tokens the cache holds, and the documents of ``cu_seqlens``."""
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            raise bad_type(WHERE, "tokens", "an int64 or int32 tensor", tokens)
        if tokens.dim() != 2:
            raise bad_value(WHERE, "tokens", "shape [batch, tokens]", tokens)
        _check_range("tokens", f"numbers from 0 to {self.vocab_size - 1}", tokens, self.vocab_size)
        check_cache(WHERE, self.causal, cache, cu_seqlens)
        seen = 0 if cache is None else self._seen(cache)
        batch, new = tokens.shape
        check_padding_mask(WHERE, mask, tokens, batch, seen + new)
        if self.max_length is not None and cu_seqlens is None and seen + new > self.max_length:
            expected = f"at most max_length {self.max_length} tokens, {seen} of which the cache holds"
            raise bad_value(WHERE, "tokens", expected, tokens)
        return seen, documents_of(WHERE, cu_seqlens, tokens, batch, new)

    def _seen(self, cache: object) -> int:
        runs = self.loops * len(self.layers)
        if not isinstance(cache, list) or not all(isinstance(one, KeyValueCache) for one in cache):
            raise bad_type(WHERE, "cache", "what new_cache() gives, or None", cache)
        if len(cache) != runs or len({one.length for one in cache}) != 1:
            raise bad_value(WHERE, "cache", f"{runs} caches of equal length, from new_cache()", f"{len(cache)}")
        return cache[0].length


def _attention(
    position: str, first: nn.Module | None, d_model: int, num_heads: int, heads: dict, options: dict
) -> nn.Module:
    """The attention of one layer; ``first`` is that of the layer before all, with which some schemes share."""
    if position in EMBEDDED:
        return Attention(d_model, num_heads, **heads, **options)
    if position == "rotary":
        return RotaryAttention(d_model, num_heads, **heads, **options)
    if position in WITHOUT_CONTENT:
        if heads["num_kv_heads"] is not None:
            raise bad_value(WHERE, "num_kv_heads", f"None with position {position!r}", heads["num_kv_heads"])
        heads = {name: value for name, value in heads.items() if name != "num_kv_heads"}
        return WITHOUT_CONTENT[position](d_model, num_heads, **heads, **options)
    if position == "t5" and first is not None:
        return RelativeAttention(d_model, num_heads, position=first.position, **heads)
    if position == "disentangled" and first is not None:
        options = options | {"rel_embeddings": first.position.rel_embeddings}
    return RelativeAttention(d_model, num_heads, position=position, **heads, **options)


def _check_choice(name: str, choice: object, choices: tuple[str, ...]) -> None:
    if not isinstance(choice, str) or choice not in choices:
        raise bad_value(WHERE, name, f"one of {', '.join(choices)}", choice)


def _check_embedded(position: str, d_model: int, max_length: object) -> None:
    if position == "absolute":
        check_count(WHERE, "max_length", max_length)
    elif max_length is not None:
        raise bad_value(WHERE, "max_length", f"None with position {position!r}", max_length)
    if position == "sinusoidal" and d_model % 2:
        raise bad_value(WHERE, "d_model", "an even number with sinusoidal positions", d_model)


def _check_range(name: str, expected: str, numbers: Tensor, end: int) -> None:
    """``0 <= number < end``, on a CPU: to look at them on a GPU would cost a wait."""
    readable = (
        numbers.device.type == "cpu" and not isinstance(numbers, FakeTensor) and not torch.compiler.is_compiling()
    )
    if not readable or numbers.numel() == 0:
        return
    least, most = (int(number) for number in numbers.aminmax())
    if least < 0 or most >= end:
        raise bad_value(WHERE, name, expected, f"numbers from {least} to {most}")
