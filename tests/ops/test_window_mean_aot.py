"""What the compiled kernels of ``window_mean`` take of each GPU."""

from __future__ import annotations

import pytest

from kernelab.ops.window_mean import triton_spec

pytestmark = pytest.mark.aot


def test_resources(check_golden):
    table = check_golden("window_mean", triton_spec.launches())
    rows = {name: row for name, targets in table.items() for row in targets.values()}
    assert any(name.endswith("sums") for name in rows)
    for name, row in rows.items():
        if name.startswith("sm_") and name.endswith(": window"):
            assert row.mma, f"{name}: no matrix instruction"
