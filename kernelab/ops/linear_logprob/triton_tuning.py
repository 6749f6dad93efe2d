"""Block sizes of the Triton kernels, and how many logits are worked on at a time.

Block sizes come from the shape of the head, the dtype and the GPU, never from the rows: the log-probability of a row
does not depend on the other rows of its batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from kernelab._core.launch import Blocks, power_of_two

# Bytes that a call allocates beside its results: the reductions of tiles, and the logits of some rows and columns.
TILE_BYTES, LOGIT_BYTES = 16_000_000, 232_000_000
LEAST_COLUMNS = 1024  # that backward works on at a time
SCALE = 32768.0  # of the shares, which are at most 1: small ones would be subnormal in float16


class Configuration(NamedTuple):
    """Blocks of every kernel for one head."""

    scores: Blocks  # rows and classes of a tile, features of a step
    combine: Blocks  # rows; tiles of a step
    dz: Blocks
    accumulate: Blocks  # rows and features of the result, classes of a step


@functools.lru_cache(maxsize=256)
def configuration(classes: int, features: int, dtype: torch.dtype, capability: int) -> Configuration:
    """Block sizes for a head [classes, features]."""
    fast = dtype.itemsize == 2 and features % 16 == 0  # tensor cores and asynchronous copies
    amd, datacenter = capability == 0, capability in (90, 100, 103)
    if not fast:
        scores = Blocks(64, 128, 32, 8, 3)
    elif datacenter:
        # what follows the loop of scores spills where 256 columns come from tensor memory
        scores = Blocks(128, 256 if capability == 90 else 128, 64, 8, 3)
    else:
        scores = Blocks(128, 128, 32, 8, 2 if amd else 3)
    accumulate = scores._replace(columns=min(scores.columns, power_of_two(features)))
    scores = scores._replace(columns=min(scores.columns, power_of_two(classes)))
    return Configuration(
        scores=scores,
        combine=Blocks(16, 64, 0, 8, 1),
        dz=Blocks(4096 // scores.columns, scores.columns, 0, 4, 1),
        accumulate=accumulate,
    )


def padded(classes: int, config: Configuration) -> int:
    """Numbers in a row of logits in memory: whole tiles."""
    return -(-classes // config.scores.columns) * config.scores.columns


def rows_at_a_time(rows: int, classes: int, itemsize: int, config: Configuration) -> int:
    """Rows whose logits are worked on at a time, all classes of them; ``itemsize`` is 0 if they are not in memory."""
    limit = TILE_BYTES // (12 * -(-classes // config.scores.columns))
    if itemsize:
        limit = min(limit, LOGIT_BYTES // (padded(classes, config) * itemsize))
    return _piece(rows, limit, config.scores.rows)


def logits_at_a_time(
    rows: int, classes: int, features: int, itemsize: int, need_hidden: bool, config: Configuration
) -> tuple[int, int]:
    """Rows and classes whose logits are worked on at a time where the weight gets a gradient.

    All rows of some classes would be best: their rows of the gradient are then complete. If the gradient of ``hidden``
    is a sum over several such steps, it is one in float32, and that many rows are taken as have room for it.
    """
    block = config.scores
    if rows * padded(classes, config) * itemsize <= LOGIT_BYTES:
        return max(rows, 1), classes
    limit = LOGIT_BYTES // (LEAST_COLUMNS * itemsize)
    budget = LOGIT_BYTES
    if need_hidden:
        budget //= 2
        limit = min(limit // 2, budget // (4 * max(features, 1)))
    rows = _piece(rows, limit, block.rows)
    return rows, _piece(classes, budget // (rows * itemsize), block.columns)


def _piece(size: int, limit: int, block: int) -> int:
    """Equal pieces of at most ``limit``, in whole blocks; at least one block."""
    pieces = -(-size // max(limit // block * block, block))
    return -(-size // (max(pieces, 1) * block)) * block if pieces > 1 else max(size, 1)
