"""What attention looks at, summed over all pairs of query and key without a matrix of them.

With ``p_ij`` the weights of ``kernelab.ops.relative_attention`` and ``d_ij`` the distance of key and query:

    mean weight     A_d = mean of p_ij over the visible pairs with d_ij = d
    boundary        B   = mean of p_ij - A_{d_ij} over the visible pairs of marked positions

Both are sums that the op makes anyway. The gradient of a value table ``w`` is ``dL/dw_d = sum p_ij g_i [d_ij = d]``
for the gradient ``g`` of the output: with values 0 and ``g = 1`` it is the sum of the weights at distance d. And
``sum_ij x_i p_ij y_j`` is x times the output for the values y. Pairs are counted in the same way: where all visible
keys weigh the same, ``p_ij = 1 / n_i``, so that ``g_i = n_i`` gives 1 for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelab._core.arguments import check_input
from kernelab._core.errors import bad_type, bad_value
from kernelab._core.sequences import documents_of
from kernelab.ops import relative_attention

from .arguments import check_count


@torch.no_grad()
def mean_weight_by_distance(query: Tensor, key: Tensor, **keywords) -> Tensor:
    """The mean attention weight at each distance, of each head.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        keywords: of ``relative_attention``: query_table, key_table, bias, causal, content, key_padding_mask,
            cu_seqlens, query_offset, scale, backend.

    Returns:
        [Hq, 2R + 1], float32 (float64 for float64): column R + d is for distance d, R the largest that occurs; the mean
        is over the batch and all pairs that are visible, NaN where there is none.

    Raises:
        ValueError, TypeError: as ``relative_attention``.

    Source: Allen-Zhu and Li (arXiv 2305.13673), position-based attention.

    >>> q, k = torch.randn(2, 1, 4, 10, 16).unbind()  # 4 heads, 10 tokens
    >>> mean_weight_by_distance(q, k, causal=True).shape
    torch.Size([4, 19])
    """
    return _Pairs("mean_weight_by_distance", query, key, keywords).mean_weight()


@torch.no_grad()
def boundary_statistic(
    query: Tensor, key: Tensor, query_marks: Tensor, key_marks: Tensor, shifts: Sequence[int] = (0,), **keywords
) -> Tensor:
    """How much more than is usual at their distance pairs of marked positions weigh, of each head.

    For shifts s of the queries and t of the keys, ``mean over marked i, j of p_{i+s, j+t} - A_d`` where d is the
    distance of that pair and A the mean weight by distance. Pairs that are not visible are left out.

    Args:
        query, key, keywords: as of :func:`mean_weight_by_distance`.
        query_marks: boolean [B, Nq], True at the marked queries, such as the ends of constituents.
        key_marks: boolean [B, Nk], at the marked keys.
        shifts: whole numbers, each taken as s and as t.

    Returns:
        [Hq, shifts, shifts], s before t, float32 (float64 for float64); NaN where no pair is visible.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Source: Allen-Zhu and Li (arXiv 2305.13673), boundary-based attention.

    >>> q, k = torch.randn(2, 1, 4, 10, 16).unbind()
    >>> ends = torch.arange(10)[None] % 3 == 2
    >>> boundary_statistic(q, k, ends, ends, shifts=[-1, 0, 1], causal=True).shape
    torch.Size([4, 3, 3])
    """
    where = "boundary_statistic"
    pairs = _Pairs(where, query, key, keywords)
    _check_marks(where, "query_marks", query_marks, query)
    _check_marks(where, "key_marks", key_marks, key)
    for shift in shifts:
        check_count(where, "shifts", shift, least=None)
    rows, columns = (torch.stack([_shift(m, s) for s in shifts], dim=-1) for m in (query_marks, key_marks))
    count = torch.stack([pairs.count(rows, column) for column in columns.unbind(-1)], dim=-1)  # [distances, S, S]
    usual = torch.einsum("hd,dst->hst", pairs.mean_weight().nan_to_num(0), count)  # NaN is where count is 0
    return (pairs.weight(rows, columns) - usual) / count.sum(0)


class _Pairs:
    """Sums over the visible pairs, in float32 or float64."""

    def __init__(self, where: str, query: Tensor, key: Tensor, keywords: dict) -> None:
        if "value_table" in keywords:
            raise bad_type(where, "value_table", "no such argument: the weights do not depend on it", "one")
        for name, tensor in (("query", query), ("key", key)):
            check_input(where, name, tensor)
            if tensor.dim() != 4:
                raise bad_value(where, name, "shape [batch, heads, tokens, features]", tensor)

        def wide(x: object) -> object:
            floating = isinstance(x, Tensor) and x.is_floating_point()
            return x.detach().to(torch.promote_types(x.dtype, torch.float32)) if floating else x

        self.query, self.key, self.where = wide(query), wide(key), where
        self.keywords = {name: wide(value) for name, value in keywords.items()}

    def mean_weight(self) -> Tensor:
        """[Hq, 2R + 1]."""
        ones = self.query.new_ones(()).expand(*self.query.shape[:3], 1)
        weight = self._by_distance(self.query, self.key, ones, self.keywords)[..., 0]
        every = torch.ones(self.query.shape[0], self.query.shape[2], 1, dtype=torch.bool, device=self.query.device)
        return weight / self.count(every, None)[:, 0]

    def weight(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``sum_ij rows_is p_ij columns_jt``: [B, Nq, S] and [B, Nk, T] give [Hq, S, T]."""
        value = columns.to(self.query.dtype)[:, None].expand(-1, self.key.shape[1], -1, -1)
        with torch.autocast(value.device.type, enabled=False):
            out = relative_attention(self.query, self.key, value, **self.keywords)  # [B, Hq, Nq, T]
            return torch.einsum("bis,bhit->hst", rows.to(out.dtype), out)

    def count(self, rows: Tensor, column: Tensor | None) -> Tensor:
        """Visible pairs by distance, of queries marked in ``rows`` [B, Nq, S] and keys in [B, Nk]: [2R + 1, S]."""
        mask = self.keywords.get("key_padding_mask")
        marked = [m for m in (mask, column) if m is not None]
        keys = torch.stack(marked).all(0) if marked else None
        seen = {"causal", "cu_seqlens", "query_offset", "backend"}
        keywords = {name: value for name, value in self.keywords.items() if name in seen}
        keywords |= {"content": False, "key_padding_mask": keys}
        weight = self._keys_of_queries(keys)[:, None, :, None] * rows[:, None]  # [B, 1, Nq, S]
        query, key = self.query[:, :1], self.key[:, :1]
        return self._by_distance(query, key, weight.to(query.dtype), keywords)[0].round()

    def _by_distance(self, query: Tensor, key: Tensor, weight: Tensor, keywords: dict) -> Tensor:
        """``sum_ij p_ij weight_i`` at each distance: weight [B, H, Nq, F] gives [H, 2R + 1, F]."""
        first, last = -self._offset() - query.shape[2] + 1, key.shape[2] - 1 - self._offset()
        reach = max(abs(first), abs(last))
        table = query.new_zeros(query.shape[1], 2 * reach + 1, weight.shape[-1], requires_grad=True)
        value = query.new_zeros(()).expand(*key.shape[:3], weight.shape[-1])
        with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
            out = relative_attention(query, key, value, value_table=table, **keywords)
            return torch.autograd.grad(out, table, weight)[0]

    def _keys_of_queries(self, keys: Tensor | None) -> Tensor:
        """How many keys, of those where ``keys`` [B, Nk] is True, each query sees: [B, Nq]."""
        batch, _, queries, _ = self.query.shape
        total = self.key.shape[2]
        if keys is None:
            keys = torch.ones(batch, total, dtype=torch.bool, device=self.key.device)
        before = F.pad(keys.long().cumsum(1), (1, 0))  # [B, Nk + 1]
        documents = documents_of(self.where, self.keywords.get("cu_seqlens"), keys, batch, total)
        position = torch.arange(queries, device=keys.device) + self._offset()
        first, end = torch.zeros_like(position), torch.full_like(position, total)
        if documents is not None:
            first, end = documents.long()
        if self.keywords.get("causal", False):
            end = torch.minimum(end, position + 1).clamp(min=0)
        return before[:, end] - before[:, first]

    def _offset(self) -> int:
        """The position of query 0."""
        given = self.keywords.get("query_offset")
        return self.key.shape[2] - self.query.shape[2] if given is None else given


def _shift(marks: Tensor, shift: int) -> Tensor:
    """True at i + shift where [B, N] is True at i."""
    shift = max(-marks.shape[1], min(shift, marks.shape[1]))
    return F.pad(marks, (shift, -shift))


def _check_marks(where: str, name: str, marks: object, like: Tensor) -> None:
    shape = [like.shape[0], like.shape[2]]
    if not isinstance(marks, Tensor) or marks.dtype != torch.bool:
        raise bad_type(where, name, f"a boolean tensor {shape}", marks)
    if list(marks.shape) != shape:
        raise bad_value(where, name, f"shape {shape}", marks)
