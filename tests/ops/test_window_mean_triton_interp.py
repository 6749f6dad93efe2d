"""What is special to the Triton kernels of ``window_mean``; tests/contract/ has what every backend promises."""

from __future__ import annotations

import pytest
import torch

from kernelab.ops.window_mean import window_mean
from tests.bench.sanitizer import sanitizer
from tests.contract.error import FORWARD, check

pytestmark = pytest.mark.interp


def bytes_of(widths, **seen):
    value = torch.randn(1, len(widths), 1024, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with sanitizer() as report:
        got = window_mean(value, widths, backend="triton", **seen)
    plain, exact = (window_mean(v, widths, backend="reference", **seen) for v in (value, value.double()))
    check("out", got, plain, exact, FORWARD)
    loaded = report.total("bytes_loaded") + report.total("bytes_stored")
    return loaded / value.nbytes, len(report.launches)


def test_a_wide_window_costs_little_more_than_a_narrow_one():
    narrow, launches = bytes_of([20])
    assert launches == 1  # no block is in all windows of a tile
    wide, launches = bytes_of([900])
    assert launches == 2
    assert narrow < 4  # read, with the block before, and written
    assert wide < 6


def test_documents_do_not_reach_into_each_other():
    bounds = torch.tensor([0, 300, 301, 900, 1024])
    for causal in (True, False):
        bytes_of([700, 30], causal=causal, cu_seqlens=bounds)


def test_offsets_beyond_31_bits():
    value = torch.randn(1, 1, 90, 8).bfloat16()
    far = torch.empty_strided(value.shape, (0, 0, 2**25, 1), dtype=torch.bfloat16).copy_(value)
    assert torch.equal(window_mean(far, 70, backend="triton"), window_mean(value, 70, backend="triton"))
