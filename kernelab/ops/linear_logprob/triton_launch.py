"""The Triton backend of ``linear_logprob``: plans the launches of a call and runs them one by one.

A plan allocates the results and gives the launches that fill them; between two of them come matrix products of torch.
Ahead-of-time checks plan on ``meta`` tensors and so see the very launches of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv

from kernelab._core.launch import capability, run, unit_stride
from kernelab._core.spec import Launch

from . import triton_kernels as kernels
from .arguments import check_range
from .kept import kept_backward as kept_backward
from .triton_tuning import SCALE, Configuration, configuration, logits_at_a_time, padded, rows_at_a_time

GROUP_M = 8


def forward(hidden, weight, bias, target, temperature, entropy, keep):
    check_range(target, weight.shape[0])
    launches, results = plan_forward(
        hidden, weight, bias, target, temperature, entropy, keep, capability(hidden.device)
    )
    run(launches, hidden)
    return results


def backward(hidden, weight, bias, target, lse, entropy, grad_logprob, grad_entropy, temperature, need):
    arguments = hidden, weight, bias, target, lse, entropy, grad_logprob, grad_entropy, temperature, need
    launches, results = plan_backward(*arguments, capability(hidden.device))
    run(launches, hidden)
    return results


def plan_forward(hidden, weight, bias, target, temperature, entropy, keep, capability: int):
    """``(launches, (logprob, entropy, lse, dlogprob, dentropy))``."""
    rows, features = hidden.shape
    logprob, lse, h = _wide(hidden, rows), _wide(hidden, rows), _wide(hidden, rows if entropy else 0)
    dlogprob = hidden.new_empty(rows if keep else 0, features)
    dentropy = hidden.new_empty(rows if keep and entropy else 0, features)
    results = logprob, h, lse, dlogprob, dentropy
    return _forward(hidden, weight, bias, target, temperature, entropy, keep, results, capability), results


def _forward(hidden, weight, bias, target, temperature, entropy, keep, results, capability) -> Iterator[Launch]:
    logprob, h, lse, dlogprob, dentropy = results
    (rows, features), classes = hidden.shape, weight.shape[0]
    config = configuration(classes, features, hidden.dtype, capability)
    piece = rows_at_a_time(rows, classes, hidden.element_size() * keep, config)
    tiles = _wide(hidden, 2 + entropy, cdiv(classes, config.scores.columns), piece)
    target_logit, rest = _wide(hidden, piece), _wide(hidden, piece) if keep else None
    memory, ones = hidden.new_empty(piece * keep, padded(classes, config)), torch.ones_like(lse[: piece * keep])
    for part in _parts(rows, piece):
        dz = memory[: part.stop - part.start] if keep else None
        logits = Logits(target[part], target_logit, *tiles[:2], tiles[2] if entropy else None, dz, config)
        of_rows = {"logprob_ptr": logprob[part], "lse_ptr": lse[part], "rest_ptr": rest}
        of_rows["entropy_ptr"] = h[part] if entropy else None
        yield logits.scores(hidden[part], weight, bias, temperature)
        yield logits.combine(classes, of_rows)
        if keep:
            yield logits.dz(of_rows, ones, None, temperature)
            torch.mm(dz[:, :classes], weight, out=dlogprob[part])
        if keep and entropy:
            yield logits.dz(of_rows, None, ones, temperature, after_logprob=True)
            torch.mm(dz[:, :classes], weight, out=dentropy[part])


def plan_backward(
    hidden, weight, bias, target, lse, entropy, grad_logprob, grad_entropy, temperature, need, capability: int
):
    """``(launches, (dhidden, dweight, dbias))``. What ``need`` does not ask for is empty and costs nothing."""
    (rows, features), classes = hidden.shape, weight.shape[0]
    dhidden = hidden.new_empty(rows if need[0] else 0, features)
    dweight = hidden.new_empty(classes if need[1] else 0, features)
    results = dhidden, dweight, hidden.new_empty(classes if need[2] else 0)
    others = entropy, grad_logprob, grad_entropy
    return _backward(hidden, weight, bias, target, lse, others, temperature, need, results, capability), results


def _backward(hidden, weight, bias, target, lse, others, temperature, need, results, capability) -> Iterator[Launch]:
    need_hidden, need_weight, need_bias = need
    dhidden, dweight, dbias = results
    (rows, features), classes, itemsize = hidden.shape, weight.shape[0], hidden.element_size()
    config = configuration(classes, features, hidden.dtype, capability)
    if need_weight:
        piece, width = logits_at_a_time(rows, classes, features, itemsize, need_hidden, config)
    else:
        piece, width = rows_at_a_time(rows, classes, itemsize, config), classes
    in_parts = need_hidden and width < classes
    peaks, target_logit = _wide(hidden, cdiv(width, config.scores.columns), piece), _wide(hidden, piece)
    memory, total = hidden.new_empty(piece * padded(width, config)), _wide(hidden, piece * in_parts, features)
    dbias_sum = torch.zeros_like(dbias, dtype=torch.float32)
    for part in _parts(rows, piece):
        count, x = part.stop - part.start, hidden[part]
        h, *grads = (t[part].contiguous() if t.numel() else None for t in others)
        total.zero_()
        for span in _parts(classes, width):
            w, b, columns = weight[span], None if bias is None else bias[span], padded(span.stop - span.start, config)
            dz = memory[: count * columns].view(count, columns)
            logits = Logits(target[part] - span.start, target_logit, peaks, None, None, dz, config)
            yield logits.scores(x, w, b, temperature)
            of_rows = {"logprob_ptr": target_logit[:count] - lse[part], "lse_ptr": lse[part], "rest_ptr": None}
            yield logits.dz({**of_rows, "entropy_ptr": h}, *grads, temperature)
            dz = dz[:, : len(w)]
            if in_parts:
                yield _accumulate(dz, w, total, config)
            elif need_hidden:
                torch.mm(dz, w, out=dhidden[part])
            if need_weight:
                dweight[span].addmm_(dz.mT, x, beta=1 if part.start else 0)
            if need_bias:
                dbias_sum[span] += dz.sum(0, dtype=torch.float32)
        if in_parts:
            dhidden[part] = total[:count]
    dbias.copy_(dbias_sum)


def _wide(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _parts(size: int, piece: int) -> Iterator[slice]:
    """``size`` cut into pieces; one empty part of nothing."""
    for start in range(0, max(size, 1), piece):
        yield slice(start, min(start + piece, size))


@dataclass(frozen=True)
class Logits:
    """What the kernels keep of the logits of some rows and classes."""

    target: Tensor  # [rows], counted from the first of the classes
    target_logit: Tensor  # [at least rows]
    peaks: Tensor  # [tiles, at least rows], as masses and moments, which are kept if not None
    masses: Tensor | None
    moments: Tensor | None
    shares: Tensor | None  # [rows, padded classes], kept if not None; dz later
    config: Configuration

    def scores(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Launch:
        """Computes the logits and what is kept of them."""
        blocks, hidden, (classes, features) = self.config.scores, unit_stride(hidden), weight.shape
        args = {"hidden_ptr": hidden, "weight_ptr": weight, "bias_ptr": bias, **self._args()}
        args |= {"mass_ptr": self.masses, "moment_ptr": self.moments, "target_logit_ptr": self.target_logit}
        args |= {"V": classes, "K": features}
        args |= {"stride_hidden": hidden.stride(0), "stride_wv": weight.stride(0), "stride_wk": weight.stride(1)}
        args |= {"share_ptr": self.shares, "stride_share": 0 if self.shares is None else self.shares.stride(0)}
        args |= {"inverse_temperature": 1 / temperature, "EVEN_K": features % blocks.inner == 0, "GROUP_M": GROUP_M}
        args |= {"BLOCK_M": blocks.rows, "BLOCK_V": blocks.columns, "BLOCK_K": blocks.inner}
        grid = (cdiv(len(hidden), blocks.rows) * cdiv(classes, blocks.columns),)
        return Launch("scores", kernels._linear_logprob_scores_kernel, grid, args, blocks.options)

    def combine(self, classes: int, of_rows: dict[str, Tensor | None]) -> Launch:
        """Computes what is wanted of the rows, if these are all classes."""
        blocks = self.config.combine
        args = {"mass_ptr": self.masses, "moment_ptr": self.moments, "target_logit_ptr": self.target_logit}
        args |= {**self._args(), **of_rows, "V": classes, "tiles": len(self.peaks)}
        args |= {"BLOCK_M": blocks.rows, "BLOCK_T": blocks.columns}
        grid = (cdiv(len(self.target), blocks.rows),)
        return Launch("combine", kernels._linear_logprob_combine_kernel, grid, args, blocks.options)

    def dz(
        self, of_rows: dict[str, Tensor | None], grad_logprob, grad_entropy, temperature: float, after_logprob=False
    ) -> Launch:
        """Makes ``dz / temperature`` of the shares, or of the dz that 1 as grad_logprob has made of them.

        The log-probability matters in rows whose target is one of the classes. A cotangent may be None.
        """
        blocks, (rows, columns) = self.config.dz, self.shares.shape
        args = {**self._args(), "dz_ptr": self.shares, "stride_dz": self.shares.stride(0), "factor": 1 / temperature}
        args |= {"peak_ptr": None, "scale": -temperature} if after_logprob else {"scale": 1 / SCALE}
        args |= {**of_rows, "grad_logprob_ptr": grad_logprob, "grad_entropy_ptr": grad_entropy}
        args |= {"BLOCK_M": blocks.rows, "BLOCK_V": blocks.columns}
        grid = (cdiv(columns, blocks.columns), cdiv(rows, blocks.rows))
        name = "dz of entropy" if after_logprob else "dz"
        return Launch(name, kernels._linear_logprob_dz_kernel, grid, args, blocks.options)

    def _args(self) -> dict:
        args = {"target_ptr": self.target.contiguous(), "peak_ptr": self.peaks}
        return args | {"rows": len(self.target), "stride_tile": self.peaks.stride(0)}


def _accumulate(dz: Tensor, weight: Tensor, total: Tensor, config: Configuration) -> Launch:
    """``total += dz W``."""
    blocks, rows, (classes, features) = config.accumulate, len(dz), weight.shape
    args = {"dz_ptr": dz, "weight_ptr": weight, "total_ptr": total, "rows": rows, "V": classes, "K": features}
    args |= {"stride_dz": dz.stride(0), "stride_wv": weight.stride(0), "stride_wk": weight.stride(1)}
    args |= {"EVEN_V": classes % blocks.inner == 0, "GROUP_M": GROUP_M}
    args |= {"BLOCK_M": blocks.rows, "BLOCK_K": blocks.columns, "BLOCK_V": blocks.inner}
    grid = (cdiv(rows, blocks.rows) * cdiv(features, blocks.columns),)
    return Launch("accumulate", kernels._linear_logprob_accumulate_kernel, grid, args, blocks.options)
