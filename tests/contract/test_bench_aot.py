"""Compilation without a GPU: what is read from the kernels, and which changes of it fail."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime import driver

from kernelab._core.spec import Launch
from tests.bench import aot, golden
from tests.bench.aot import TARGETS, measure
from tests.contract.bench_kernels import copy_kernel, matmul_kernel, softmax_kernel

pytestmark = pytest.mark.aot


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def copy_launch(x: torch.Tensor | None = None, n: int = 4096) -> Launch:
    x = meta(n) if x is None else x
    return Launch("copy", copy_kernel, (4,), {"x_ptr": x, "y_ptr": meta(n), "n": n, "BLOCK": 1024}, {"num_warps": 4})


def softmax_launch(columns: int = 1024, warps: int = 4) -> Launch:
    args = {"x_ptr": meta(8, columns), "y_ptr": meta(8, columns), "columns": columns, "BLOCK": columns}
    return Launch("softmax", softmax_kernel, (8,), args, {"num_warps": warps})


def matmul_launch(dtype: torch.dtype = torch.bfloat16, tile: int = 128, warps: int = 8, stages: int = 3) -> Launch:
    size = {"M": 1024, "N": 1024, "K": 1024, "BM": tile, "BN": tile, "BK": 32}
    tensors = {name: meta(1024, 1024, dtype=dtype) for name in ("x_ptr", "w_ptr", "y_ptr")}
    options = {"num_warps": warps, "num_stages": stages}
    return Launch("matmul", matmul_kernel, (8, 8), {**tensors, **size, "PRECISION": "tf32"}, options)


def test_right_kernels_match_their_golden_table(check_golden):
    check_golden("bench", [copy_launch(), softmax_launch(), matmul_launch()])


@pytest.mark.parametrize(
    ("target", "mma"),
    [
        ("sm_80", "mma.f32.bf16.bf16.f32"),
        ("sm_90", "wgmma.mma_async.f32.bf16.bf16"),
        ("sm_100", "tcgen05.mma.kind::f16"),
        ("gfx942", "v_mfma_f32_bf16"),
    ],
)
def test_matmul_uses_the_matrix_units_of_each_gpu(target: str, mma: str):
    row = measure(matmul_launch(), target)
    assert list(row.mma) == [mma]
    assert row.mma[mma] > 0
    assert row.spill_bytes == row.stack_bytes == 0
    assert 16 < row.registers <= 256
    assert row.shared_bytes >= 2 * (128 + 128) * 32 * 2
    assert (row.async_copies > 0) == target.startswith("sm")
    assert (row.tensor_memory > 0) == (target == "sm_100")


def test_the_arguments_are_specialised_as_in_a_launch():
    assert measure(copy_launch(), "sm_90").vector_loads == 1
    assert measure(copy_launch(torch.zeros(4096).bfloat16()), "sm_90").vector_loads == 1
    assert measure(copy_launch(torch.zeros(4097).bfloat16()[1:]), "sm_90").vector_loads == 0  # 2 bytes off alignment
    assert measure(copy_launch(n=4095), "sm_90").vector_loads == 0  # the mask cuts through 16 bytes


def test_a_compiled_launch_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch):
    before = measure(softmax_launch(), "sm_80")
    monkeypatch.setattr(softmax_kernel, "compile", None)
    assert measure(softmax_launch(), "sm_80") is before


def test_a_kernel_in_the_file_cache_can_be_measured(monkeypatch: pytest.MonkeyPatch):
    before = measure(softmax_launch(), "sm_80")
    monkeypatch.setattr(aot, "_measured", {})
    softmax_kernel.device_caches.clear()
    assert measure(softmax_launch(), "sm_80") == before


def test_the_driver_is_put_back_even_when_compilation_fails():
    before = driver._active
    launch = matmul_launch()
    with pytest.raises(CompilationError):
        measure(replace(launch, args={**launch.args, "BM": 100}), "sm_90")  # not a power of two
    assert driver._active is before


def test_only_jit_functions_can_be_measured():
    with pytest.raises(TypeError, match=r"launch copy: expected a kernel of @triton\.jit, got function"):
        measure(replace(copy_launch(), kernel=copy_kernel.fn), "sm_90")


# --- the golden table


@pytest.fixture
def table(tmp_path: Path) -> Path:
    golden.check("op", [copy_launch(), matmul_launch()], update=True, folder=tmp_path)
    return tmp_path


def expect(folder: Path, launches: list[Launch], text: str, update: bool = False) -> None:
    before = (folder / "op.json").read_bytes()
    with pytest.raises(AssertionError, match=text):
        golden.check("op", launches, update=update, folder=folder)
    assert (folder / "op.json").read_bytes() == before


def edit(folder: Path, launch: str, target: str, **values) -> None:
    path = folder / "op.json"
    stored = json.loads(path.read_text())
    stored["launches"][launch][target].update(values)
    path.write_text(json.dumps(stored))


def test_an_unchanged_kernel_passes_and_its_table_is_stable(table: Path, tmp_path_factory: pytest.TempPathFactory):
    launches = [copy_launch(), matmul_launch()]
    golden.check("op", launches, folder=table)
    again = tmp_path_factory.mktemp("again")
    golden.check("op", launches[::-1], update=True, folder=again)
    assert (again / "op.json").read_bytes() == (table / "op.json").read_bytes()
    assert [path.name for path in again.iterdir()] == ["op.json"]


def test_a_spill_fails_and_is_never_written(table: Path):
    spilling = replace(softmax_launch(8192, warps=1), name="copy")
    expect(table, [spilling, matmul_launch()], r"copy sm_90: spills \d+ bytes \(255 registers")
    expect(table, [spilling, matmul_launch()], "copy sm_90: spills", update=True)


def test_register_growth_fails(table: Path):
    expect(table, [copy_launch(), matmul_launch(warps=4)], r"matmul sm_90: \d+ -> \d{3} registers")
    registers = measure(matmul_launch(), "sm_80").registers
    edit(table, "matmul", "sm_80", registers=round(registers / 1.09))
    golden.check("op", [copy_launch(), matmul_launch()], folder=table)  # less than 10 %
    edit(table, "matmul", "sm_80", registers=round(registers / 1.12))
    expect(table, [copy_launch(), matmul_launch()], "matmul sm_80: .* registers")


def test_another_matrix_instruction_fails(table: Path):
    text = r"matmul sm_90: MMA instructions \['wgmma.mma_async.f32.bf16.bf16'\] -> \['wgmma.mma_async.f32.tf32.tf32'\]"
    expect(table, [copy_launch(), matmul_launch(torch.float32)], text)
    small = r"matmul sm_90: MMA instructions \['wgmma.mma_async.f32.bf16.bf16'\] -> \['mma.f32.bf16.bf16.f32'\]"
    expect(table, [copy_launch(), matmul_launch(tile=32)], small)  # too small a tile for wgmma


def test_lost_vector_loads_and_lost_asynchronous_copies_fail(table: Path):
    misaligned = copy_launch(torch.zeros(4097).bfloat16()[1:])
    expect(table, [misaligned, matmul_launch()], r"copy sm_90: no 16-byte loads any more \(were 1\)")
    expect(table, [copy_launch(), matmul_launch(stages=1)], "matmul sm_80: no asynchronous copies any more")


def test_more_shared_memory_than_there_is_fails(table: Path):
    expect(table, [copy_launch(), matmul_launch(stages=16)], r"matmul sm_80: \d+ bytes of shared memory")


def test_more_tensor_memory_than_there_is_fails(table: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(golden, "measure", lambda *of: replace(measure(*of), tensor_memory=1024))
    expect(table, [copy_launch(), matmul_launch()], "matmul sm_100: 1024 columns of tensor memory", update=True)


def test_rows_and_launches_must_match(table: Path, monkeypatch: pytest.MonkeyPatch):
    expect(table, [copy_launch()], "matmul: in op.json but not launched")
    expect(table, [copy_launch(), matmul_launch(), softmax_launch()], "softmax: not in op.json")
    with pytest.raises(ValueError, match="op: two launches are named 'copy'"):
        golden.check("op", [copy_launch(), copy_launch()], folder=table)
    monkeypatch.setitem(golden.TARGETS, "sm_120", TARGETS["sm_100"])
    monkeypatch.setitem(golden.SHARED_LIMIT, "sm_120", 100_000)
    expect(table, [copy_launch(), matmul_launch()], "copy sm_120: not in op.json")


def test_a_missing_or_foreign_table_says_how_to_renew_it(table: Path):
    path = table / "op.json"
    path.write_text(path.read_text().replace(triton.__version__, "3.5.0"))
    expect(table, [copy_launch(), matmul_launch()], r"measured with Triton 3.5.0.*`pytest -m aot --update-golden`")
    shutil.rmtree(table)
    with pytest.raises(AssertionError, match=r"op.json is missing: run `pytest -m aot --update-golden`"):
        golden.check("op", [copy_launch()], folder=table)


def test_every_target_of_the_table_is_compiled(table: Path):
    stored = json.loads((table / "op.json").read_text())
    assert all(list(rows) == list(TARGETS) for rows in stored["launches"].values())
