"""What the compiled kernels of ``relative_attention`` take of each GPU."""

from __future__ import annotations

import pytest

from kernelab.ops.relative_attention import triton_spec

pytestmark = pytest.mark.aot

# Tiles of 64 queries fit the registers of an H100 for these; the others have smaller ones, multiplied by mma.sync.
WGMMA = [
    *(f"sm_90 bf16 query: {kernel}" for kernel in ("forward", "dq", "dkv", "tables")),
    *(f"sm_90 bf16 query key: {kernel}" for kernel in ("forward", "dq", "dkv")),
    *(f"sm_90 bf16 bias: {kernel}" for kernel in ("forward", "dq", "dkv", "tables")),
    *(f"sm_90 {name}: forward" for name in ("bf16 all", "fp16 documents", "bf16 128 query")),
]


def test_resources(check_golden):
    table = check_golden("relative_attention", triton_spec.launches())
    rows = {name: row for name, targets in table.items() for row in targets.values()}
    for name, row in rows.items():
        if "fp32" in name:
            assert not row.mma, f"{name}: float32 is multiplied in a lower precision"
        elif name.endswith(("forward", "dq", "dkv", "tables")):
            assert row.mma, name
    for name in WGMMA:
        assert any("wgmma" in instruction for instruction in rows[name].mma), name
