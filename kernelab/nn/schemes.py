"""Schemes of relative positions: each module yields tables of the distance for ``kernelab.ops.relative_attention``.

A scheme is called as ``scheme(attention, reach, memory)``: the :class:`RelativeAttention` it belongs to, the largest
distance that occurs, and a dict that lives as long as a decoding does (of its own for every call where nothing is
decoded). It returns keyword arguments of ``relative_attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelab._core.errors import bad_type, bad_value

from .arguments import check_count, check_flag
from .attention import split_heads
from .positions import alibi_slopes, log_buckets, t5_buckets

_STD = 0.02  # of new tables, as of BERT's embeddings


class RelativeKey(nn.Module):
    """A learned vector for each distance, met by the query: ``q_i.(k_j + r_c)``; with ``value`` also ``v_j + w_c``.

    Args:
        num_heads, head_dim: of the attention.
        max_distance: K; the rows of the table are the distances -K..K, farther ones use the last.
        per_head: each head has its table, else one serves all.
        value: the values have a table as well.
        query_minus_key: rows count the query's position less the key's, as in old BERT, instead of the reverse.

    Source: Shaw, Uszkoreit and Vaswani (arXiv 1803.02155).

    >>> RelativeKey(4, 16, max_distance=8).table.shape
    torch.Size([1, 17, 16])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        max_distance: int = 16,
        *,
        per_head: bool = False,
        value: bool = False,
        query_minus_key: bool = False,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        for name, number in (("num_heads", num_heads), ("head_dim", head_dim), ("max_distance", max_distance)):
            check_count(where, name, number)
        for name, flag in (("per_head", per_head), ("value", value), ("query_minus_key", query_minus_key)):
            check_flag(where, name, flag)
        self.query_minus_key = query_minus_key
        shape = num_heads if per_head else 1, 2 * max_distance + 1, head_dim
        self.table = nn.Parameter(torch.empty(shape))
        self.value_table = nn.Parameter(torch.empty(shape)) if value else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal numbers."""
        for table in self.parameters():
            nn.init.normal_(table, std=_STD)

    def forward(self, attention: nn.Module, reach: int, memory: dict) -> dict[str, Tensor | None]:
        """The query table, and that of the values."""
        return {"query_table": self._rows(self.table), "value_table": self._rows(self.value_table)}

    def _rows(self, table: Tensor | None) -> Tensor | None:
        return table.flip(1) if table is not None and self.query_minus_key else table


class RelativeKeyQuery(RelativeKey):
    """One learned vector for each distance, met by query and key: ``q_i.k_j + q_i.r_c + k_j.r_c``.

    Arguments as of :class:`RelativeKey`. Source: Huang, Liang, Xu and Xiang (arXiv 2009.13658), method 4.

    >>> RelativeKeyQuery(4, 16, max_distance=8, per_head=True).table.shape
    torch.Size([4, 17, 16])
    """

    def forward(self, attention: nn.Module, reach: int, memory: dict) -> dict[str, Tensor | None]:
        """One table twice, and that of the values."""
        tables = super().forward(attention, reach, memory)
        return {**tables, "key_table": tables["query_table"]}


class Disentangled(nn.Module):
    """DeBERTa's content to position and position to content: ``(q_i.k_j + q_i.kr_c + k_j.qr_c) / sqrt(3 D)``.

    Distances fall into buckets (:func:`log_buckets`) whose embeddings E are projected: ``kr = E W_k^T``,
    ``qr = E W_q^T``, by projections of their own, or by the attention's with ``share_att_key``.

    Args:
        d_model, num_heads, head_dim: of the attention.
        max_distance: distances from here on share a bucket.
        num_buckets: buckets of one sign, less than ``2 max_distance - 2``; None: one for each distance.
        share_att_key: position embeddings go through q_proj and k_proj of the attention, as in DeBERTa v3.
        rel_embeddings: an embedding [2 num_buckets, d_model] that layers share; None: one of its own.

    Source: He, Liu, Gao and Chen (arXiv 2006.03654); buckets and names of parameters as in DeBERTa v2.

    >>> Disentangled(64, 4, 16, num_buckets=8, max_distance=32).rel_embeddings.weight.shape
    torch.Size([16, 64])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        max_distance: int = 512,
        *,
        num_buckets: int | None = 256,
        share_att_key: bool = False,
        rel_embeddings: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        for name, number in (("d_model", d_model), ("num_heads", num_heads), ("head_dim", head_dim)):
            check_count(where, name, number)
        check_count(where, "max_distance", max_distance)
        check_flag(where, "share_att_key", share_att_key)
        if num_buckets is not None:
            check_count(where, "num_buckets", num_buckets, least=2)
            if num_buckets // 2 >= max_distance - 1:
                expected = f"at most 2 max_distance - 3 = {2 * max_distance - 3}, or None for a bucket a distance"
                raise bad_value(where, "num_buckets", expected, num_buckets)
        self.max_distance, self.num_buckets = max_distance, num_buckets
        rows = 2 * (num_buckets or max_distance)
        if rel_embeddings is None:
            rel_embeddings = nn.Embedding(rows, d_model)
            nn.init.normal_(rel_embeddings.weight, std=_STD)
        if not isinstance(rel_embeddings, nn.Embedding):
            raise bad_type(where, "rel_embeddings", "an nn.Embedding or None", rel_embeddings)
        if rel_embeddings.weight.shape != (rows, d_model):
            raise bad_value(where, "rel_embeddings", f"an embedding [{rows}, {d_model}]", rel_embeddings)
        self.rel_embeddings = rel_embeddings
        self.pos_key_proj = None if share_att_key else nn.Linear(d_model, num_heads * head_dim)
        self.pos_query_proj = None if share_att_key else nn.Linear(d_model, num_heads * head_dim)

    def forward(self, attention: nn.Module, reach: int, memory: dict) -> dict[str, Tensor | float]:
        """Tables for the distances that occur, and the scale of three terms."""
        if "rows" not in memory:
            memory["rows"] = self._project(attention)
        to_position, to_content = memory["rows"]  # [H, buckets, D] each
        last = min(reach, self.max_distance)
        distance = torch.arange(last, -last - 1, -1, device=to_position.device)  # the query's position less the key's
        if self.num_buckets is not None:
            distance = log_buckets(distance, self.num_buckets, self.max_distance)
        half = to_position.shape[1] // 2
        bucket = (distance + half).clamp(0, 2 * half - 1)
        tables = {"query_table": select(to_position, bucket), "key_table": select(to_content, bucket)}
        return {**tables, "scale": (3 * to_position.shape[2]) ** -0.5}

    def _project(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        """What queries and keys meet, [H, buckets, D] each."""
        rows = self.rel_embeddings.weight[None]  # [1, buckets, d_model]
        if self.pos_key_proj is not None:
            return tuple(split_heads(p(rows), attention.num_heads)[0] for p in (self.pos_key_proj, self.pos_query_proj))
        group = attention.num_heads // attention.num_kv_heads
        keys = split_heads(attention.k_proj(rows), attention.num_kv_heads)[0].repeat_interleave(group, dim=0)
        return keys, split_heads(attention.q_proj(rows), attention.num_heads)[0]


class T5Bias(nn.Module):
    """A learned number for each bucket of distances and head (:func:`t5_buckets`), added to the score.

    Args:
        num_heads: of the attention.
        max_distance: distances from here on share a bucket.
        num_buckets: at least 4, or 2 without ``bidirectional``.
        bidirectional: keys before and after the query have buckets of their own; False for causal attention.

    Source: Raffel et al. (arXiv 1910.10683); the name of the parameter is T5's. T5 itself has no ``1 / sqrt(D)``.

    >>> T5Bias(8).relative_attention_bias.weight.shape
    torch.Size([32, 8])
    """

    def __init__(
        self, num_heads: int, max_distance: int = 128, *, num_buckets: int = 32, bidirectional: bool = True
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_count(where, "num_heads", num_heads)
        check_flag(where, "bidirectional", bidirectional)
        check_count(where, "num_buckets", num_buckets, least=4 if bidirectional else 2)
        exact = num_buckets // (4 if bidirectional else 2)
        check_count(where, "max_distance", max_distance, least=exact + 1)
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)
        nn.init.normal_(self.relative_attention_bias.weight, std=_STD)

    def forward(self, attention: nn.Module, reach: int, memory: dict) -> dict[str, Tensor]:
        """The bias of each distance."""
        weight = self.relative_attention_bias.weight
        last = min(reach, self.max_distance)
        distance = torch.arange(-last, last + 1, device=weight.device)
        bucket = t5_buckets(distance, weight.shape[0], self.max_distance, self.bidirectional)
        return {"bias": select(_wide(weight)[None], bucket)[0].mT}  # [H, distances]


class ALiBi(nn.Module):
    """A penalty that is linear in the distance: ``-slope_h |j - i|`` is added to the score.

    Args:
        num_heads: of the attention.
        trainable: the slopes (:func:`alibi_slopes`) are a parameter.

    Source: Press, Smith and Lewis (arXiv 2108.12409).

    >>> ALiBi(4, trainable=True).slopes
    Parameter containing:
    tensor([0.2500, 0.0625, 0.0156, 0.0039], requires_grad=True)
    """

    def __init__(self, num_heads: int, *, trainable: bool = False) -> None:
        super().__init__()
        check_count("ALiBi", "num_heads", num_heads)
        check_flag("ALiBi", "trainable", trainable)
        self.slopes = nn.Parameter(alibi_slopes(num_heads)) if trainable else None

    def forward(self, attention: nn.Module, reach: int, memory: dict) -> dict[str, Tensor]:
        """The bias of each distance that occurs, at least float32."""
        device = attention.q_proj.weight.device
        slopes = alibi_slopes(attention.num_heads, device) if self.slopes is None else _wide(self.slopes)
        distance = torch.arange(-reach, reach + 1, device=device)
        return {"bias": -slopes[:, None] * distance.abs()}


def select(table: Tensor, row: Tensor) -> Tensor:
    """Rows ``row`` [n] of a table [H, rows, D]. Its gradient is summed in a fixed order, which indexing's is not."""
    if not (torch.is_grad_enabled() and table.requires_grad):
        return table[:, row]
    chosen = (row[:, None] == torch.arange(table.shape[1], device=row.device)).to(table.dtype)  # [n, rows]
    with torch.autocast(table.device.type, enabled=False):
        return chosen @ table


def _wide(table: Tensor) -> Tensor:
    return table.to(torch.promote_types(table.dtype, torch.float32))


SCHEMES = {
    "relative_key": RelativeKey,
    "relative_key_query": RelativeKeyQuery,
    "disentangled": Disentangled,
    "t5": T5Bias,
    "alibi": ALiBi,
}
