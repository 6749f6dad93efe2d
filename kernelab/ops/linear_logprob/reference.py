"""The definition of ``linear_logprob`` in plain torch: differentiable, any floating dtype.

Rows ``h`` [d], head ``W`` [V, d], target ``t``, temperature ``T``:

    z = (W h + b) / T,   lse = log sum_v exp(z_v),   p_v = exp(z_v - lse)
    logprob = z_t - lse,   H = -sum_v p_v log p_v                                        forward
    dz_v = g ([v = t] - p_v) - g_H p_v (log p_v + H)                                     backward
    dh = W^T dz / T,   dW = sum over rows of dz h^T / T,   db = sum over rows of dz / T

where ``g`` and ``g_H`` are the cotangents of ``logprob`` and ``H``. Logits are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import check_range
from .kept import kept_backward as kept_backward


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """``z`` [M, V]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)) / temperature


def logprob_and_entropy(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``(logprob [M], H [M])``; a target that is no class makes NaN, and NaN gradients."""
    log_p = torch.log_softmax(z, dim=-1)
    is_class = (target >= 0) & (target < z.shape[-1])
    picked = log_p.gather(-1, torch.where(is_class, target, 0)[:, None])[:, 0]
    return picked * torch.where(is_class, 1.0, math.nan), -p_log_p(log_p).sum(-1)


def p_log_p(log_p: Tensor) -> Tensor:
    """``p log p``, which is 0 where p is."""
    possible = log_p != -math.inf
    return torch.where(possible, log_p.exp() * torch.where(possible, log_p, 0), 0)


def forward(hidden, weight, bias, target, temperature, entropy, keep):
    """``(logprob, H, lse, d logprob / d hidden, d H / d hidden)``; what is not asked for is empty."""
    check_range(target, weight.shape[0])
    z = logits(hidden, weight, bias, temperature)
    logprob, h = logprob_and_entropy(z, target)
    ones, zeros = torch.ones_like(logprob), torch.zeros_like(logprob)

    def derivative(grad_logprob: Tensor, grad_entropy: Tensor, wanted: bool) -> Tensor:
        tail = grad_logprob, grad_entropy, temperature, [wanted, False, False]
        return backward(hidden, weight, bias, target, logprob, h, *tail)[0]

    dlogprob, dentropy = derivative(ones, zeros, keep), derivative(zeros, ones, keep and entropy)
    return logprob, h if entropy else h.new_empty(0), torch.logsumexp(z, dim=-1), dlogprob, dentropy


def backward(hidden, weight, bias, target, lse, entropy, grad_logprob, grad_entropy, temperature, need):
    """``(dhidden, dweight, dbias)``, what is not needed empty. Recomputes all: ``lse`` and ``entropy`` are not read."""
    z = logits(hidden, weight, bias, temperature)
    dz = _dz(z, target, grad_logprob, grad_entropy) / temperature
    dhidden = (dz @ weight.to(z.dtype)).to(hidden.dtype) if need[0] else hidden.new_empty(0, hidden.shape[1])
    dweight = (dz.mT @ hidden.to(z.dtype)).to(weight.dtype) if need[1] else hidden.new_empty(0, hidden.shape[1])
    dbias = dz.sum(0).to(hidden.dtype) if need[2] else hidden.new_empty(0)
    return dhidden, dweight, dbias


def _dz(z: Tensor, target: Tensor, grad_logprob: Tensor, grad_entropy: Tensor) -> Tensor:
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    is_target = torch.arange(z.shape[-1], device=z.device) == target[:, None]
    is_class = (target >= 0) & (target < z.shape[-1])
    g = grad_logprob * torch.where(is_class, 1.0, math.nan)
    dz = g[:, None] * (is_target.to(p.dtype) - p)
    if grad_entropy.numel() == 0:
        return dz
    terms = p_log_p(log_p)
    return dz - grad_entropy[:, None] * (terms - p * terms.sum(-1, keepdim=True))
