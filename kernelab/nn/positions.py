"""Positions, distances and their buckets, as plain functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_positions(
    tokens: int,
    offset: int = 0,
    *,
    key_padding_mask: Tensor | None = None,
    documents: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Positions of ``tokens`` new tokens after ``offset`` earlier ones, int64 [N]; [B, N] with a mask.

    They start again with each document, where ``documents[0]`` [N] is the first token of each token's one; and at the
    first token that ``key_padding_mask`` [B, offset + N] lets be seen: padding before it stands at 0.

    >>> token_positions(5, documents=torch.tensor([[0, 0, 2, 2, 2], [2, 2, 5, 5, 5]]))
    tensor([0, 1, 0, 1, 2])
    >>> token_positions(2, 2, key_padding_mask=torch.tensor([[False, True, True, True]]))
    tensor([[1, 2]])
    """
    position = torch.arange(offset, offset + tokens, device=device)
    if documents is not None:
        position = position - documents[0]
    if key_padding_mask is not None and tokens:
        first = key_padding_mask.to(torch.uint8).argmax(1, keepdim=True)  # [B, 1]
        position = (position - first).clamp(min=0)
    return position


def sinusoids(position: Tensor, features: int) -> Tensor:
    """Float32 [*, features]: sines, then cosines, of position * 10000^(-2i / features); ``features`` is even.

    Source: Vaswani et al. (arXiv 1706.03762).

    >>> sinusoids(torch.arange(3), 8).shape
    torch.Size([3, 8])
    """
    angle = _angles(position, features, 10000.0, torch.float32)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def rotate(x: Tensor, position: Tensor, rotary_dim: int, theta: float = 10000.0) -> Tensor:
    """Rotary positions: pairs ``(x_i, x_{i + rotary_dim / 2})`` of x [*, N, D] turned by the angle position * theta_i.

    ``theta_i = theta^(-2i / rotary_dim)``, position [N]; features from ``rotary_dim`` on stay. Angles are float32,
    float64 for a float64 x. Source: Su et al. (arXiv 2104.09864), pairs split in halves as in GPT-NeoX and Phi.

    >>> rotate(torch.ones(1, 2), torch.tensor([1]), rotary_dim=2)
    tensor([[-0.3012,  1.3818]])
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = _angles(position, rotary_dim, theta, wide)  # [N, rotary_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :rotary_dim].to(wide).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return turned if rotary_dim == x.shape[-1] else torch.cat([turned, x[..., rotary_dim:]], dim=-1)


def _angles(position: Tensor, features: int, theta: float, dtype: torch.dtype) -> Tensor:
    """[*, features / 2]. Computed anew: a buffer would lose its digits in ``model.bfloat16()``."""
    exponent = torch.arange(0, features, 2, device=position.device, dtype=dtype) / features
    return position[..., None].to(dtype) * (1.0 / theta**exponent)


def log_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """DeBERTa's buckets of integer distances, odd in the distance, about ``-num_buckets .. num_buckets``.

    Up to ``num_buckets // 2`` a distance is its own bucket; from there to ``max_distance - 1`` they widen as the
    logarithm does, up to ``num_buckets - 1``. Source: He et al. (arXiv 2111.09543), in float32 as published.

    >>> log_buckets(torch.tensor([-40, 0, 3, 4, 5, 15]), num_buckets=8, max_distance=16)
    tensor([-10,   0,   3,   4,   5,   7])
    """
    middle = num_buckets // 2
    size = distance.abs()
    growth = (size.clamp(min=middle) / middle).log() / torch.tensor((max_distance - 1) / middle).log()
    far = (growth * (middle - 1)).ceil().to(distance.dtype) + middle
    return torch.where(size <= middle, distance, far * distance.sign())


def t5_buckets(distance: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """T5's buckets ``0 .. num_buckets - 1`` of integer distances, key less query.

    Half of the buckets of a side hold one distance each, the others widen as the logarithm does up to
    ``max_distance``; with ``bidirectional`` each sign has half of the buckets, else distances above 0 share bucket 0.
    Source: Raffel et al. (arXiv 1910.10683).

    >>> t5_buckets(torch.tensor([-200, -1, 0, 1, 200]))
    tensor([15,  1,  0, 17, 31])
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    size = distance.abs() if bidirectional else (-distance).clamp(min=0)
    growth = (size.clamp(min=1) / exact).log() / math.log(max_distance / exact)
    far = (exact + (growth * (side - exact)).to(distance.dtype)).clamp(max=side - 1)
    bucket = torch.where(size < exact, size, far)
    return bucket + side * (distance > 0) if bidirectional else bucket


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """ALiBi's slopes, float32 [H]: ``2^(-8 h / H)`` for h = 1..H, a power of two; the rest from between those.

    Source: Press, Smith and Lewis (arXiv 2108.12409).

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    power = 1 << (num_heads.bit_length() - 1)
    main = torch.arange(1, power + 1, device=device) / power
    between = (2 * torch.arange(num_heads - power, device=device) + 1) / (2 * power)
    return torch.exp2(-8 * torch.cat([main, between]))
