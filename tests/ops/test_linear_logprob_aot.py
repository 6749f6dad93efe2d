"""What the compiled kernels of ``linear_logprob`` take of each GPU, and the memory of its plans."""

from __future__ import annotations

import pytest

from kernelab.ops.linear_logprob import triton_spec

pytestmark = pytest.mark.aot


def test_resources(check_golden):
    table = check_golden("linear_logprob", triton_spec.launches())
    rows = {name: row for name, targets in table.items() for row in targets.values()}
    for name, row in rows.items():
        if "fp32" in name:
            assert not row.mma, f"{name}: float32 is multiplied in a lower precision"
        if name.startswith("sm_90") and name.endswith(("scores", "accumulate")) and "fp32" not in name:
            assert any("wgmma" in instruction for instruction in row.mma), name
            assert row.async_copies or "unaligned" in name, name
    for part in (
        "sm_90 bf16 128256: score scores",
        "sm_90 bf16 128256: backward accumulate",
        "sm_100 fp32 32000: keep dz of entropy",
    ):
        assert part in rows
