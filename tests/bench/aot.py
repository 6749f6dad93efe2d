"""Compiles Triton kernels for GPUs that are not here, from the arguments of a real launch, and reads what came out.

A driver with no device behind it lets ``kernel.warmup`` specialise on the arguments as a launch would: pointers and
integers divisible by 16, ones, constexprs. Tensors may be on the CPU or on ``meta``.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a block
TENSOR_MEMORY_LIMIT = 512  # columns

NVIDIA = {
    "mma": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+",
    "vector_load": r"\bld\.global[\w.:]*\.(?:v4\.[buf]32|v2\.[buf]64|v8\.[buf]16|v8\.[buf]32)\b",
    "async_copy": r"\bcp\.async(?:\.c[ag]\.shared|\.bulk)[\w.:]*",
}
AMD = {
    "mma": r"\bv_s?mfma_\w+",
    "vector_load": r"\b(?:global_load_dwordx4|buffer_load_dwordx4)\b",
    "async_copy": r"\bglobal_load_lds_\w+",
}
MMA_SHAPE = r"\.(?:aligned|sync|row|col|cta_group::\d|m\d+n\d+k\d+)(?=\.|$)|_\d+x\d+x\d+(?=_)|(?<=_)\d+x\d+x\d+"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of the GPU, and the instructions that make it fast."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    mma: dict[str, int] = field(default_factory=dict)  # count by instruction and operand types
    vector_loads: int = 0  # of 16 bytes or more a thread
    async_copies: int = 0
    tensor_memory: int = 0  # columns, sm_100


class _Driver:
    """As much of Triton's driver interface as compilation asks for."""

    def __init__(self, name: str, target: GPUTarget) -> None:
        self.name, self.target = name, target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"aot {self.name}"  # a kernel keeps one cache a device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


_measured: dict[str, Resources] = {}


def measure(launch, target: str) -> Resources:
    """Resources of ``launch`` (a ``kernelab._core.spec.Launch``) compiled for ``target``, a key of ``TARGETS``."""
    if not isinstance(launch.kernel, JITFunction):
        raise TypeError(f"launch {launch.name}: expected a kernel of @triton.jit, got {type(launch.kernel).__name__}")
    with _no_device(target), contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.args, **launch.options)
    if compiled.hash not in _measured:
        read = _read_amd if target.startswith("gfx") else _read_nvidia
        _measured[compiled.hash] = read(compiled, log.getvalue())
    return _measured[compiled.hash]


@contextlib.contextmanager
def _no_device(target: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Driver(target, TARGETS[target]))
    try:
        with knobs.nvidia.scope(), knobs.compilation.scope():
            knobs.nvidia.dump_ptxas_log = True
            knobs.compilation.always_compile = True  # a cached kernel has no log
            yield
    finally:
        driver._active = before


def _read_nvidia(compiled: CompiledKernel, log: str) -> Resources:
    def last(pattern: str) -> int:
        return int(re.findall(pattern, log)[-1])

    return Resources(
        registers=last(r"Used (\d+) registers"),
        spill_bytes=last(r"(\d+) bytes spill stores") + last(r"(\d+) bytes spill loads"),
        stack_bytes=last(r"(\d+) bytes stack frame"),
        shared_bytes=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,
        **_instructions(compiled.asm["ptx"], NVIDIA),
    )


def _read_amd(compiled: CompiledKernel, log: str) -> Resources:
    code = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

    return Resources(
        registers=value("vgpr_count"),
        spill_bytes=4 * (value("vgpr_spill_count") + value("sgpr_spill_count")),
        stack_bytes=value("private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        **_instructions(code, AMD),
    )


def _instructions(code: str, patterns: dict[str, str]) -> dict[str, object]:
    return {
        "mma": dict(sorted(Counter(re.sub(MMA_SHAPE, "", name) for name in re.findall(patterns["mma"], code)).items())),
        "vector_loads": len(re.findall(patterns["vector_load"], code)),
        "async_copies": len(re.findall(patterns["async_copy"], code)),
    }
