"""CPU: blocks of rows against tiles of classes; sums of the softmax are kept relative to the largest logit so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelab._core import onednn

from .arguments import check_range

SIDE = 1024  # of a tile of logits, where the features leave room
ELEMENTS = 2**22  # of a block of rows or of classes
DHIDDEN_ELEMENTS = 2**25  # of the gradient that backward adds up before it is rounded
NEVER = -1e5  # exp is 0 from here on, in float64 too


class _Sums(NamedTuple):
    """Of a block of rows. ``z - m`` is the distance to the largest logit; the sums leave out the target ``t``, so that
    nothing cancels where it is likely."""

    peak: Tensor  # m [rows]
    picked: Tensor  # z_t [rows]
    mass: Tensor  # sum exp(z_v - m) [rows]
    moment: Tensor  # sum exp(z_v - m) (z_v - m) [rows], for the entropy
    weights: Tensor  # sum exp(z_v - m) w_v [rows, d], for the derivatives
    moments: Tensor  # sum exp(z_v - m) (z_v - m) w_v [rows, d]


def forward(hidden, weight, bias, target, temperature, entropy, keep):
    check_range(target, weight.shape[0])
    rows, features = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logprob, lse = hidden.new_empty(rows, dtype=wide), hidden.new_empty(rows, dtype=wide)
    h = hidden.new_empty(rows if entropy else 0, dtype=wide)
    dlogprob = hidden.new_empty(rows if keep else 0, features)
    dentropy = hidden.new_empty(rows if keep and entropy else 0, features)
    for block in _blocks(0, rows, _side(features)):
        x, t = hidden[block].to(wide), target[block]
        sums = _sums(x, weight, bias, t, temperature, entropy, keep)
        share = (sums.picked - sums.peak).exp_()  # the target's term of the sums
        total = sums.mass + share
        log_total = torch.where(sums.picked == sums.peak, sums.mass.log1p(), total.log())
        logprob[block] = sums.picked - sums.peak - log_total
        lse[block] = sums.peak + log_total
        w = weight[t].to(wide) if keep else None  # [rows, d]
        if keep:
            dlogprob[block] = (_rows(sums.mass) * w - sums.weights) / _rows(total * temperature)
        if entropy:
            share_moment = share * (sums.picked - sums.peak).clamp_(min=NEVER)
            mean = (sums.moment + share_moment) / total  # E[z - m]
            h[block] = log_total - mean
        if keep and entropy:
            first, second = sums.weights + _rows(share) * w, sums.moments + _rows(share_moment) * w
            dentropy[block] = (_rows(mean) * first - second) / _rows(total * temperature)
    return logprob, h, lse, dlogprob, dentropy


def _sums(x, weight, bias, target, temperature, entropy, keep) -> _Sums:
    rows, features = x.shape
    peak = x.new_full((rows,), torch.finfo(x.dtype).min / 2)  # of which a logit can still be subtracted
    picked, mass, moment = x.new_zeros(3, rows)
    weights, moments = x.new_zeros(2, rows if keep else 0, features)
    for tile in _blocks(0, weight.shape[0], _side(features)):
        z, w = _tile(x, weight, bias, tile, temperature)
        top = torch.maximum(peak, z.amax(1))
        inside, column = _targets(target, tile)
        picked[inside] = z[inside, column]
        z[inside, column] = -torch.inf
        z.sub_(_rows(top))
        step = peak - top
        factor = step.exp()
        peak = top
        if entropy:
            moment.addcmul_(mass, step).mul_(factor)
            p = z.exp()
            pz = z.clamp_(min=NEVER).mul_(p)
            moment += pz.sum(1)
        else:
            p = z.exp_()
        if keep and entropy:
            moments = _add_product(moments.addcmul_(weights, _rows(step)).mul_(_rows(factor)), pz, w)
        if keep:
            weights = _add_product(weights.mul_(_rows(factor)), p, w)
        mass.mul_(factor).add_(p.sum(1))
    return _Sums(peak, picked, mass, moment, weights, moments)


def backward(hidden, weight, bias, target, lse, entropy, grad_logprob, grad_entropy, temperature, need):
    (rows, features), classes = hidden.shape, weight.shape[0]
    need_hidden, need_weight, need_bias = need
    dhidden = hidden.new_empty(rows if need_hidden else 0, features)
    dweight = weight.new_zeros(classes if need_weight else 0, features)
    dbias = lse.new_zeros(classes if need_bias else 0)
    for part in _blocks(0, rows, max(1, DHIDDEN_ELEMENTS // max(features, 1))):
        dx = lse.new_zeros(part.stop - part.start, features) if need_hidden else None
        for tile in _blocks(0, classes, _side(features)):
            dw = lse.new_zeros(tile.stop - tile.start, features) if need_weight else None
            for block in _blocks(part.start, part.stop, _side(features)):
                x = hidden[block].to(lse.dtype)
                log_p, w = _tile(x, weight, bias, tile, temperature)
                log_p.sub_(_rows(lse[block]))
                dz = _dz(log_p, _targets(target[block], tile), block, entropy, grad_logprob, grad_entropy)
                dz.div_(temperature)
                if need_hidden:
                    here = slice(block.start - part.start, block.stop - part.start)
                    dx[here] = _add_product(dx[here], dz, w)
                if need_weight:
                    dw = _add_product(dw, dz.mT, x)
                if need_bias:
                    dbias[tile] += dz.sum(0)
            if need_weight:
                dweight[tile] += dw
        if need_hidden:
            dhidden[part] = dx
    return dhidden, dweight, dbias.to(hidden.dtype)


def _dz(log_p, targets, block, entropy, grad_logprob, grad_entropy) -> Tensor:
    """``g ([v = t] - p_v) - g_H p_v (log p_v + H)`` of a tile [rows, classes]."""
    p = log_p.exp()
    slope = -_rows(grad_logprob[block])
    if grad_entropy.numel() > 0:
        slope = slope - _rows(grad_entropy[block]) * log_p.clamp_(min=NEVER).add_(_rows(entropy[block]))
    dz = p.mul_(slope)
    inside, column = targets
    dz[inside, column] += grad_logprob[block][inside]
    return dz


def _tile(x, weight, bias, tile: slice, temperature: float) -> tuple[Tensor, Tensor]:
    """The logits of a tile of classes [rows, classes], and the weights of these classes [classes, d]."""
    w = weight[tile].to(x.dtype)
    b = None if bias is None else bias[tile].to(x.dtype)
    z = onednn.linear(x, w, b) if onednn.wins(x, w) else F.linear(x, w, b)
    return z if temperature == 1.0 else z.div_(temperature), w


def _targets(target: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """The rows whose target is in the tile, and its column there."""
    inside = ((target >= tile.start) & (target < tile.stop)).nonzero()[:, 0]
    return inside, target[inside] - tile.start


def _add_product(total: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """``total + x w``, in ``total`` or in a new tensor."""
    return onednn.linear_add(x, w.mT, total) if onednn.wins(x, w) else total.addmm_(x, w)


def _rows(t: Tensor) -> Tensor:
    return t[:, None]


def _side(features: int) -> int:
    return max(64, min(SIDE, ELEMENTS // max(features, 1)))


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))
