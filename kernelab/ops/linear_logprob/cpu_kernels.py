"""CPU: blocks of rows against tiles of classes; sums of the softmax are kept relative to the largest logit so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelab._core import native, onednn

from .arguments import check_range
from .kept import kept_backward as kept_backward

SIDE = 1024  # of a tile of logits, where the features leave room
ELEMENTS = 2**22  # of a block of rows or of classes
PART_ELEMENTS = 2**24  # of the rows whose gradient backward adds up before it is rounded
GRADIENT_ELEMENTS = 2**20  # of the gradient by logits, where that makes a tile of more than SIDE classes
WORK_BYTES = 2**27  # of the extension, where that leaves a thread 16 rows
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
    results = logprob, h, lse, dlogprob, dentropy
    fill = _fill_native if _native_can(weight) else _fill_torch
    if rows > 0:
        fill(results, hidden, weight, bias, target, temperature, entropy, keep)
    return results


def _fill_native(results, hidden, weight, bias, target, temperature, entropy, keep):
    logprob, h, lse, dlogprob, dentropy = results
    rest = h if entropy else 0, dlogprob if keep else 0, dentropy if keep and entropy else 0
    _call("forward", hidden, weight, bias, target, temperature, logprob, lse, *rest)


def _call(phase, hidden, weight, bias, target, temperature, *rest):
    (rows, features), wide = hidden.shape, torch.promote_types(hidden.dtype, torch.float32)
    threads = max(1, min(torch.get_num_threads(), rows // 16))
    per_row = 3 * features + 512  # numbers of work memory
    largest_block = max(16, min(192, WORK_BYTES // (threads * per_row * wide.itemsize)))
    blocks = threads * -(-rows // (threads * largest_block))
    block = -(-rows // (16 * blocks)) * 16
    hidden, target = native.row_major(hidden), native.row_major(target)
    native.call(
        f"linear_logprob_{phase}_{str(hidden.dtype).removeprefix('torch.')}",
        *(hidden, hidden.stride(0), weight, weight.stride(0), 0 if bias is None else native.row_major(bias)),
        *(target, rows, features, weight.shape[0], temperature, block),
        *(torch.empty(threads * (block * per_row + 2**15), dtype=wide), threads, *rest),
    )


def _fill_torch(results, hidden, weight, bias, target, temperature, entropy, keep):
    logprob, h, lse, dlogprob, dentropy = results
    for block in _blocks(0, hidden.shape[0], _side(hidden.shape[1])):
        x, t = hidden[block].to(lse.dtype), target[block]
        sums = _sums(x, weight, bias, t, temperature, entropy, keep)
        share = (sums.picked - sums.peak).exp_()  # the target's term of the sums
        total = sums.mass + share
        log_total = torch.where(sums.picked == sums.peak, sums.mass.log1p(), total.log())
        logprob[block] = sums.picked - sums.peak - log_total
        lse[block] = sums.peak + log_total
        w = weight[t].to(x.dtype) if keep else None  # [rows, d]
        if keep:
            dlogprob[block] = (_rows(sums.mass) * w - sums.weights) / _rows(total * temperature)
        if entropy:
            share_moment = share * (sums.picked - sums.peak).clamp_(min=NEVER)
            mean = (sums.moment + share_moment) / total  # E[z - m]
            h[block] = log_total - mean
        if keep and entropy:
            first, second = sums.weights + _rows(share) * w, sums.moments + _rows(share_moment) * w
            dentropy[block] = (_rows(mean) * first - second) / _rows(total * temperature)


def _sums(x, weight, bias, target, temperature, entropy, keep) -> _Sums:
    rows, features = x.shape
    peak = x.new_full((rows,), torch.finfo(x.dtype).min / 2)  # of which a logit can still be subtracted
    picked, mass, moment = x.new_zeros(3, rows)
    weights, moments = x.new_zeros(2, rows if keep else 0, features)
    for tile in _blocks(0, weight.shape[0], _side(features)):
        z, w = _tile(x, weight, bias, tile, temperature)
        top = torch.maximum(peak, z.amax(1))
        inside, column = _targets(target, tile)
        own = z.gather(1, column)
        picked = torch.where(inside, own[:, 0], picked)
        z.scatter_(1, column, torch.where(_rows(inside), -torch.inf, own))
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
            _add_product(moments.addcmul_(weights, _rows(step)).mul_(_rows(factor)), pz, w)
        if keep:
            _add_product(weights.mul_(_rows(factor)), p, w)
        mass.mul_(factor).add_(p.sum(1))
    return _Sums(peak, picked, mass, moment, weights, moments)


def backward(hidden, weight, bias, target, lse, entropy, grad_logprob, grad_entropy, temperature, need):
    (rows, features), classes = hidden.shape, weight.shape[0]
    need_hidden, need_weight, need_bias = need
    dhidden = hidden.new_empty(rows if need_hidden else 0, features)
    dweight = weight.new_zeros(classes if need_weight else 0, features)
    dbias = lse.new_zeros(classes if need_bias else 0)
    fast = _native_can(weight)
    gradient, share = (_gradient_native, 1) if fast else (_gradient_torch, 4)  # torch makes more tensors of a tile
    for part in _blocks(0, rows, max(64, min(4096, PART_ELEMENTS // max(features, 1)))):
        per_row = target[part], lse[part], entropy[part], grad_logprob[part], grad_entropy[part]
        dx = lse.new_zeros(part.stop - part.start if need_hidden else 0, features)
        for tile in _blocks(0, classes, max(SIDE // share, GRADIENT_ELEMENTS // share // (part.stop - part.start))):
            dz = gradient(hidden[part], weight, bias, *per_row, temperature, tile)  # [rows, classes]
            if need_hidden:
                _add_product(dx, dz, weight[tile].to(dz.dtype))
            if need_weight:
                dweight[tile] = _add_product(dweight[tile].to(lse.dtype), dz.mT, hidden[part].to(dz.dtype))
            if need_bias:
                dbias[tile] += dz.sum(0, dtype=dbias.dtype)
        if need_hidden:
            dhidden[part] = dx
    return dhidden, dweight, dbias.to(hidden.dtype)


def _gradient_native(
    hidden, weight, bias, target, lse, entropy, grad_logprob, grad_entropy, temperature, tile
) -> Tensor:
    rows, classes = hidden.shape[0], tile.stop - tile.start
    dz = torch.empty(classes, rows, dtype=torch.float32 if hidden.dtype == torch.float16 else hidden.dtype)
    by_entropy = (entropy, native.row_major(grad_entropy)) if grad_entropy.numel() > 0 else (0, 0)
    rest = lse, by_entropy[0], native.row_major(grad_logprob), by_entropy[1], tile.start, tile.stop, dz, rows
    _call("gradient", hidden, weight, bias, target, temperature, *rest)
    return dz.mT


def _gradient_torch(
    hidden, weight, bias, target, lse, entropy, grad_logprob, grad_entropy, temperature, tile
) -> Tensor:
    """``g ([v = t] - p_v) - g_H p_v (log p_v + H)``, over the temperature."""
    log_p, _ = _tile(hidden.to(lse.dtype), weight, bias, tile, temperature)
    log_p.sub_(_rows(lse))
    inside, column = _targets(target, tile)
    own = log_p.gather(1, column)  # [rows, 1]
    p = log_p.exp()
    slope = -_rows(grad_logprob)
    if grad_entropy.numel() > 0:
        slope = slope - _rows(grad_entropy) * log_p.clamp_(min=NEVER).add_(_rows(entropy))
    # expm1: 1 - p of a target that is nearly sure cancels
    by_entropy = (slope + _rows(grad_logprob)).expand_as(p).gather(1, column) * own.exp()
    own = by_entropy - _rows(grad_logprob) * own.expm1()
    dz = p.mul_(slope)
    own = torch.where(_rows(inside), own, dz.gather(1, column))
    return dz.scatter_(1, column, own).div_(temperature)


def _tile(x, weight, bias, tile: slice, temperature: float) -> tuple[Tensor, Tensor]:
    """The logits of a tile of classes [rows, classes], and the weights of these classes [classes, d]."""
    w = weight[tile].to(x.dtype)
    b = None if bias is None else bias[tile].to(x.dtype)
    z = onednn.linear(x, w, b) if onednn.wins(x, w) else F.linear(x, w, b)
    return z if temperature == 1.0 else z.div_(temperature), w


def _targets(target: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Whether a row's target is in the tile [rows], and its column there [rows, 1] (any where it is not)."""
    inside = (target >= tile.start) & (target < tile.stop)
    return inside, _rows(target.clamp(tile.start, tile.stop - 1) - tile.start)


def _native_can(weight: Tensor) -> bool:
    return native.reason_missing() is None and weight.stride(1) == 1


def _add_product(total: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """``total += x w``."""
    if onednn.wins(x, w):
        return total.add_(onednn.linear(x, w.mT, None))
    return total.addmm_(x, w) if x.dtype == total.dtype else total.add_(x @ w)


def _rows(t: Tensor) -> Tensor:
    return t[:, None]


def _side(features: int) -> int:
    return max(64, min(SIDE, ELEMENTS // max(features, 1)))


def _blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))
