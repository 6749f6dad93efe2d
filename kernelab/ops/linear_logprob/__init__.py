"""Log-probability of a target, and the entropy, from hidden states and the output head, without logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelab._core import define, registry
from kernelab._core.arguments import autocast, check_dtype
from kernelab._core.autograd import differentiable, recorded, stored_signature

from . import reference
from .arguments import WHERE, check


def _forward_fake(hidden, weight, bias, target, temperature, entropy, keep):
    rows, features = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def per_row(wanted: bool) -> Tensor:
        return hidden.new_empty(rows if wanted else 0, dtype=wide)

    def gradient(wanted: bool) -> Tensor:
        return hidden.new_empty(rows if wanted else 0, features)

    return per_row(True), per_row(entropy), per_row(True), gradient(keep), gradient(keep and entropy)


def _backward_fake(hidden, weight, bias, target, lse, entropy, grad_logprob, grad_entropy, temperature, need):
    rows = hidden.shape[0] if need[0] else 0
    dhidden = hidden.new_empty(rows, hidden.shape[1])
    classes = weight.shape[0]
    dweight = weight.new_empty(classes if need[1] else 0, weight.shape[1])
    return dhidden, dweight, weight.new_empty(classes if need[2] else 0)


_forward = define.define(
    "linear_logprob",
    "forward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, float temperature, bool entropy, bool keep, "
    "str backend) -> (Tensor logprob, Tensor entropy, Tensor lse, Tensor dlogprob, Tensor dentropy)",
    _forward_fake,
)
_backward = define.define(
    "linear_logprob",
    "backward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor lse, Tensor entropy, Tensor grad_logprob, "
    "Tensor grad_entropy, float temperature, bool[] need, str backend) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    _backward_fake,
)
_kept_backward = define.define(
    "linear_logprob",
    "kept_backward",
    "(Tensor dlogprob, Tensor dentropy, Tensor grad_logprob, Tensor grad_entropy, str backend) -> Tensor dhidden",
    lambda dlogprob, *_: torch.empty_like(dlogprob),
)


registry.register_usual("linear_logprob", __name__)


class _LinearLogprob(torch.autograd.Function):
    """``(logprob, entropy, lse, dlogprob, dentropy)``; the last three serve backward and have no derivative."""

    @staticmethod
    @stored_signature
    def forward(hidden, weight, bias, target, temperature, entropy, keep, backend):
        return _forward(hidden, weight, bias, target, temperature, entropy, keep, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, weight, bias, target, ctx.temperature, _, ctx.keep, ctx.backend = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target, *kept)

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy, *_):
        hidden, weight, bias, target, entropy, lse, dlogprob, dentropy = ctx.saved_tensors
        grad_logprob = torch.zeros_like(lse) if grad_logprob is None else grad_logprob
        grad_entropy = lse.new_empty(0) if grad_entropy is None else grad_entropy
        need, temperature, backend = list(ctx.needs_input_grad[:3]), ctx.temperature, ctx.backend

        def fast(grad_logprob, grad_entropy, hidden, weight, target, lse, entropy, dlogprob, dentropy, *bias):
            if ctx.keep:
                dhidden = _kept_backward(dlogprob, dentropy, grad_logprob, grad_entropy, backend)
                return dhidden, weight.new_empty(0, weight.shape[1]), weight.new_empty(0)
            bias = bias[0] if bias else None
            tail = grad_logprob, grad_entropy, temperature, need
            return _backward(hidden, weight, bias, target, lse, entropy, *tail, backend)

        def definition(grad_logprob, grad_entropy, hidden, weight, target, lse, entropy, dlogprob, dentropy, *bias):
            bias = bias[0] if bias else None
            tail = grad_logprob, grad_entropy, temperature, need
            return reference.backward(hidden, weight, bias, target, lse, entropy, *tail)

        tensors = [grad_logprob, grad_entropy, hidden, weight, target, lse, entropy, dlogprob, dentropy]
        grads = differentiable(fast, definition, *tensors, *([] if bias is None else [bias]))
        return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *[None] * 5


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of ``target`` under the softmax of a linear layer; no tensor of a logit a class is ever alive.

    ``logprob = z_t - log sum_v exp(z_v)`` with ``z = (hidden W^T + bias) / temperature``, and on demand the entropy
    ``-sum_v p_v log p_v`` of ``p = softmax(z)``.

    Args:
        hidden: [*, d], float32, bfloat16, float16 or float64.
        weight: [V, d], dtype of ``hidden``: the output head. It gets a gradient if it requires one.
        target: [*], an integer in 0..V-1 each. There is no index to ignore: give padding any class, drop its result.
        bias: [V] or None, added to the logits. A class of bias -inf has probability 0.
        temperature: a positive number that divides the logits.
        entropy: return the entropy too. Where it is only looked at, compute it under ``torch.no_grad``: its gradient
            is a third matrix product.
        backend: "reference", "cpu" or "triton"; None chooses (``kernelab.explain`` says which and why).

    Returns:
        logprob [*], or (logprob [*], entropy [*]); float32, float64 for float64 inputs. Logits are never rounded to
        less. Gradients flow through both.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A target outside 0..V-1 raises on a CPU;
            on a GPU it makes its row NaN, since to look would cost a synchronisation.
        BackendUnavailable: the demanded backend cannot run here.

    If neither ``weight`` nor ``bias`` trains, the forward keeps the derivative by ``hidden``, which takes the place of
    a backward pass over the head; else backward computes the logits again, in tiles.

    Source: the policy head of PPO, as in Santacroce et al. (arXiv 2309.00754); the running sums of a softmax, Milakov
    and Gimelshein (arXiv 1805.02867).

    >>> hidden, head, tokens = torch.randn(2, 5, 16), torch.randn(100, 16), torch.randint(100, (2, 5))
    >>> logprob, entropy = linear_logprob(hidden, head, tokens, temperature=0.7, entropy=True)
    >>> expected = torch.distributions.Categorical(logits=hidden @ head.T / 0.7)
    >>> torch.allclose(logprob, expected.log_prob(tokens), atol=1e-4)
    True
    >>> torch.allclose(entropy, expected.entropy(), atol=1e-4)
    True
    """
    check(hidden, weight, target, bias, temperature, entropy)
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_dtype(WHERE, "hidden", hidden, weight=weight, bias=bias)
    rows = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None]
    arguments = rows, weight, bias, target.reshape(rows.shape[0]).long(), float(temperature), entropy
    train_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if recorded(rows, weight, bias):
        # float16 has no room for the derivatives of likely targets before a loss scale lifts them.
        keep = not train_head and rows.dtype != torch.float16
        logprob, h, *_ = _LinearLogprob.apply(*arguments, keep, backend or "")
    else:
        logprob, h, *_ = _forward(*arguments, False, backend or "")
    logprob = logprob.reshape(target.shape)
    return (logprob, h.reshape(target.shape)) if entropy else logprob
