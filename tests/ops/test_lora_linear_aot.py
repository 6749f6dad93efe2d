"""What the compiled kernels of ``lora_linear`` take of each GPU."""

from __future__ import annotations

import pytest

from kernelab.ops.lora_linear import triton_spec

pytestmark = pytest.mark.aot


def test_resources(check_golden):
    table = check_golden("lora_linear", triton_spec.launches())
    rows = {name: row for name, targets in table.items() for row in targets.values()}
    for name, row in rows.items():
        if "fp32" in name:
            assert not row.mma, f"{name}: float32 is multiplied in a lower precision"
        if name.startswith("sm_90") and "main" in name:
            assert any("wgmma" in instruction for instruction in row.mma), name
            assert row.async_copies or "unaligned" in name, name
    for part in ("sm_90 bf16 r16: main y", "sm_90 bf16 r16: main dx", "sm_100 fp32 r16: gram dA"):
        assert part in rows
