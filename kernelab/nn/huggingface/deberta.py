"""DeBERTa-v2 and v3 with their disentangled attention in linear memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Encoder,
    DisentangledSelfAttention,
    make_log_bucket_position,
)

from kernelab._core.errors import bad_value
from kernelab.nn.attention import merge_heads, split_heads
from kernelab.ops import relative_attention

from .interface import say

WHERE = "replace_disentangled_attention"


def replace_disentangled_attention(model: nn.Module) -> nn.Module:
    """Runs the disentangled attention of a DeBERTa-v2 or v3 model of transformers through ``relative_attention``::

        score_ij = (q_i.k_j + q_i.kr_b + k_j.qr_b) / sqrt(3 D),   b = clip(bucket(i - j) + S, 0, 2S - 1)

    with ``kr`` and ``qr`` the embeddings of the S buckets to each side, projected. Parameters, their names and values
    stay as they are, results too, those of padding excepted, which there are means of all values. Neither scores nor
    positions nor masks of pairs are in memory.

    What has no such form goes the old way, and the log says so once: dropout of attention weights in training,
    ``output_attentions``, and masks or positions that a caller gives for pairs.

    Args:
        model: any module with DeBERTa-v2 layers in it; it is changed in place.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no such layer in ``model``.

    Source: He, Liu, Gao and Chen (arXiv 2006.03654); He, Gao and Chen (arXiv 2111.09543).

    >>> from transformers import DebertaV2Config, DebertaV2Model
    >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    >>> config = DebertaV2Config(vocab_size=50, relative_attention=True, pos_att_type=["p2c", "c2p"], **sizes)
    >>> model = replace_disentangled_attention(DebertaV2Model(config).eval())
    >>> model(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 32])
    """
    new = {DisentangledSelfAttention: _SelfAttention, DebertaV2Encoder: _Encoder}
    found = [module for module in model.modules() if type(module) in (*new, *new.values())]
    if not found:
        raise bad_value(WHERE, "model", "a model with DeBERTa-v2 layers", type(model).__name__)
    for module in found:
        module.__class__ = new.get(type(module), type(module))
    return model


class _Encoder(DebertaV2Encoder):
    def get_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """[B, 1, 1, N] of a mask of keys."""
        return (
            attention_mask[:, None, None] if attention_mask.dim() == 2 else super().get_attention_mask(attention_mask)
        )

    def get_rel_pos(self, hidden_states, query_states=None, relative_pos=None):
        """None, unless the caller has them."""
        return relative_pos


class _SelfAttention(DisentangledSelfAttention):
    def forward(
        self,
        hidden_states,
        attention_mask,
        output_attentions=False,
        query_states=None,
        relative_pos=None,
        rel_embeddings=None,
    ):
        reason = (
            "dropout of attention weights" * (self.training and self.dropout.p > 0)
            or "a mask of its own for every query" * (attention_mask.shape[1:3] != (1, 1))
            or "positions of the caller" * (relative_pos is not None)
            or "output_attentions" * output_attentions
        )
        if reason:
            say(reason, "transformers' disentangled attention")
            arguments = hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            return super().forward(*arguments)
        inputs = hidden_states if query_states is None else query_states, hidden_states, hidden_states
        projections = zip((self.query_proj, self.key_proj, self.value_proj), inputs, strict=True)
        terms = 1 + sum(term in self.pos_att_type for term in ("c2p", "p2c"))
        out = relative_attention(
            *(split_heads(project(x), self.num_attention_heads) for project, x in projections),
            **self.tables(hidden_states.shape[1], rel_embeddings),
            key_padding_mask=attention_mask[:, 0, 0].bool(),
            scale=(terms * self.attention_head_size) ** -0.5,
        )
        return merge_heads(out), None

    def tables(self, tokens: int, rel_embeddings: Tensor | None) -> dict[str, Tensor]:
        """[H, 2K+1, D] of the terms that there are, for the op's distances j - i."""
        if not self.relative_attention:
            return {}
        reach = min(max(tokens - 1, 0), self.max_relative_positions)  # beyond, all distances share a bucket
        distance = torch.arange(reach, -reach - 1, -1, device=rel_embeddings.device)  # i - j
        if self.position_buckets > 0:
            distance = make_log_bucket_position(distance, self.position_buckets, self.max_relative_positions).long()
        rows = (distance + self.pos_ebd_size).clamp(0, 2 * self.pos_ebd_size - 1)
        embeddings = self.pos_dropout(rel_embeddings)[: 2 * self.pos_ebd_size]
        shared = self.share_att_key
        project = {
            "query_table": ("c2p", self.key_proj if shared else getattr(self, "pos_key_proj", None)),
            "key_table": ("p2c", self.query_proj if shared else getattr(self, "pos_query_proj", None)),
        }
        return {
            name: split_heads(F.embedding(rows, projection(embeddings))[None], self.num_attention_heads)[0]
            for name, (term, projection) in project.items()
            if term in self.pos_att_type
        }
