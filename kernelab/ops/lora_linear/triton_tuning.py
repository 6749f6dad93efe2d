"""Block sizes of the Triton kernels, from the shape of the matrices, the dtype and the GPU; never from the rows.

A row's result therefore does not depend on the other rows of its batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from kernelab._core.launch import Blocks, power_of_two

# Where the main GEMM is Triton's, with the adapter inside; elsewhere it is cuBLAS's, and a kernel adds the adapter.
# float32 is elsewhere because Triton multiplies it without tensor cores. Not yet measured on a GPU.
FUSED_DTYPES = (torch.bfloat16, torch.float16)


class Configuration(NamedTuple):
    """Blocks of every kernel that reads rows of ``inner`` elements or writes rows of ``columns``."""

    fused: bool  # the main GEMM has the adapter inside
    once: bool  # gram reads dy once for dB and dS
    main: Blocks
    main_dropout: Blocks
    expand: Blocks
    shrink: Blocks
    gram: Blocks  # rows: of one partial sum; columns: of x; inner: rows of a step
    rank_step: int  # ranks that the main GEMM and expand take at a time
    rank_block: int  # ranks of one program of shrink and gram


@functools.lru_cache(maxsize=256)
def configuration(columns: int, inner: int, rank: int, dtype: torch.dtype, capability: int) -> Configuration:
    """Block sizes for ``[rows, inner] @ [inner, columns]`` with adapters of at most ``rank``."""
    fast = dtype.itemsize == 2 and columns % 16 == 0 and inner % 16 == 0  # tensor cores and asynchronous copies
    amd, datacenter = capability == 0, capability in (90, 100, 103)
    stages = 2 if amd else 3
    rank_block = min(power_of_two(rank), 128 if fast else 32)
    if fast:
        main = Blocks(128, 256 if datacenter or capability == 80 else 128, 64 if datacenter else 32, 8, stages)
        shrink = Blocks(32, 0, 64, 4, 5 if datacenter else stages)
        gram = Blocks(0, 256 if rank <= 64 else 128, 64, 8, stages) if datacenter else Blocks(0, 128, 32, 8, stages)
    else:
        # gram: at 64 columns, with dropout, Triton 3.7 makes tf32 of float32 on sm_100, whatever precision one asks for
        main, shrink, gram = Blocks(64, 64, 32, 4, stages), Blocks(32, 0, 32, 4, stages), Blocks(0, 32, 32, 4, stages)
    main = main._replace(columns=min(main.columns, power_of_two(columns)))
    # Rows of one partial sum: a program for every multiprocessor from 4096 rows on, but few bytes beside those of x.
    rows = max(32 * -(-columns // gram.columns), 8 * rank)
    return Configuration(
        fused=dtype in FUSED_DTYPES,
        once=16 * rank <= gram.columns * dtype.itemsize,  # partial sums of dS: at most half the bytes of dy
        main=main,
        main_dropout=main._replace(columns=min(main.columns, 128)),
        expand=Blocks(64, min(64, power_of_two(columns)), 0, 4, 1),
        shrink=shrink,
        gram=gram._replace(rows=min(1024, max(128, power_of_two(rows)))),
        rank_step=min(rank_block, 64 if datacenter else 32),
        rank_block=rank_block,
    )
