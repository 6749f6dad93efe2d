"""What the compiled kernels of ``lora_linear`` take of each GPU."""

from __future__ import annotations

import pytest

from kernelab.ops.lora_linear import triton_spec

pytestmark = pytest.mark.aot


def test_resources(check_golden):
    table = check_golden("lora_linear", triton_spec.launches())
    loops = [name for name in table if "main" in name and "fp32" not in name]
    for name in (name for name in loops if name.startswith("sm_90")):
        (row,) = table[name].values()
        assert any("wgmma" in instruction for instruction in row.mma), name
        assert row.async_copies or "unaligned" in name, name
    assert any(name.startswith("sm_90") for name in loops)
