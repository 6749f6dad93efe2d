"""BERT and its kin with the relative positions that transformers 5 no longer has."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernelab._core.errors import bad_type, bad_value

from . import interface

WHERE = "relative_bert"
_TERMS = {"relative_key": ("query",), "relative_key_query": ("query", "key")}


@functools.cache
def relative_bert(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class with ``config.position_embedding_type`` "relative_key" or "relative_key_query", as in transformers 4::

        score_ij = (q_i.k_j + q_i.e_ij) / sqrt(D)               relative_key
        score_ij = (q_i.k_j + q_i.e_ij + k_j.e_ij) / sqrt(D)    relative_key_query
        e_ij = distance_embedding[i - j + P - 1]

    Every self-attention has its ``distance_embedding`` [2P - 1, D], P being ``config.max_position_embeddings``, under
    the name of old checkpoints, which ``from_pretrained`` and ``load_state_dict`` take unchanged. As there, absolute
    positions are loaded and saved but not added. It runs with ``attn_implementation="kernelab"``, whatever is asked,
    since no other knows of distances.

    Args:
        model_class: BertModel, BertForMaskedLM, RobertaForMaskedLM or another whose self-attention goes through
            transformers' attention interface.

    Raises:
        TypeError: ``model_class`` is no model class of transformers, or has no such self-attention (when it is built).
        ValueError: the config has another ``position_embedding_type`` (when it is built).

    Source: Huang, Liang, Xu and Xiang (arXiv 2009.13658), methods 4 and Shaw's; transformers 4.

    >>> from transformers import BertConfig, BertForMaskedLM
    >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    >>> config = BertConfig(vocab_size=50, position_embedding_type="relative_key_query", **sizes)
    >>> model = relative_bert(BertForMaskedLM)(config)  # or .from_pretrained(path of an old checkpoint)
    >>> model.bert.encoder.layer[0].attention.self.distance_embedding.weight.shape
    torch.Size([1023, 8])
    """
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise bad_type(WHERE, "model_class", "a model class of transformers", model_class)

    class Relative(model_class):
        def __init__(self, config, *args, **kwargs):
            kind = getattr(config, "position_embedding_type", None)
            if kind not in _TERMS:
                raise bad_value(WHERE, "config.position_embedding_type", " or ".join(map(repr, _TERMS)), kind)
            interface.register()
            config._attn_implementation = interface.NAME
            super().__init__(config, *args, **kwargs)
            _add_distances(self, config)

    Relative.__name__, Relative.__qualname__ = model_class.__name__, model_class.__qualname__  # what a config remembers
    return Relative


def _add_distances(model: PreTrainedModel, config) -> None:
    modules = dict(model.named_modules())
    layers = [module for name, module in modules.items() if f".{name}".endswith(".attention.self")]
    if not layers or not all(hasattr(layer, "attention_head_size") and hasattr(layer, "is_causal") for layer in layers):
        expected = "a model whose layers have attention.self, as BERT's, which asks transformers' attention interface"
        raise bad_type(WHERE, "model_class", expected, type(model).__bases__[0])
    for layer in layers:
        layer.relative_terms = _TERMS[config.position_embedding_type]
        table = nn.Embedding(2 * config.max_position_embeddings - 1, layer.attention_head_size, dtype=model.dtype)
        nn.init.normal_(table.weight, std=config.initializer_range)
        layer.distance_embedding = table
        layer.register_forward_pre_hook(_check_implementation)
    for name, module in modules.items():
        if f".{name}".endswith(".embeddings.position_embeddings"):
            module.register_forward_hook(_nothing)


def _check_implementation(layer: nn.Module, _) -> None:
    chosen = layer.config._attn_implementation
    if chosen != interface.NAME:
        raise bad_value(WHERE, "attn_implementation", repr(interface.NAME), chosen, "No other knows of distances.")


def _nothing(_, __, absolute: Tensor) -> Tensor:
    return torch.zeros_like(absolute)
