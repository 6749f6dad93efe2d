"""Block sizes of the Triton kernels, from the shape of a head, the dtype and the GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from kernelab._core.launch import power_of_two

PROGRAMS = 512  # that the sums over batch and queries are cut into, in a fixed order, if the rows of a table are few


class Tiles(NamedTuple):
    """Rows of the side that a program keeps, and of a step along the other side."""

    still: int
    moving: int
    warps: int
    stages: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"BLOCK_M": self.still, "BLOCK_N": self.moving, "BAND": power_of_two(self.still + self.moving)}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


class Configuration(NamedTuple):
    """Tiles of every kernel."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles
    tables: Tiles


@functools.lru_cache(maxsize=256)
def configuration(
    queries: int, features: int, dtype: torch.dtype, key_table: bool, value_table: bool, capability: int
) -> Configuration:
    """The largest tiles whose terms fit the registers: a key table needs more of them, a value table the most."""
    terms, width = 2 if value_table else int(key_table), power_of_two(features)
    if capability == 0 or dtype.itemsize == 4 or width > 128:
        config = _small(4 if capability == 0 or (capability == 90 and not terms and width <= 64) else 8)
    elif width > 64:
        config = _wide(terms, capability)
    else:
        config = _narrow(terms, capability)
    if queries <= 16 and config.forward.still > 16:
        config = config._replace(forward=Tiles(16, config.forward.moving, 4, 2))
    return config


def _small(warps: int) -> Configuration:
    tile = Tiles(16, 16, warps, 1)
    return Configuration(tile, tile, tile, tile)


def _narrow(terms: int, capability: int) -> Configuration:
    """Heads of up to 64 features."""
    small, half = Tiles(32, 32, 8, 2), Tiles(64, 32, 8, 2)
    if capability == 90:
        light = Tiles(64, 32, 4, 2)
        return (
            Configuration(Tiles(64, 64, 4, 2), light, light, Tiles(64, 64, 4, 2)),
            Configuration(Tiles(64, 64, 4, 2), light, Tiles(64, 32, 8, 1), small),
            Configuration(half, small, small, small),
        )[terms]
    if capability in (100, 103):
        whole = Tiles(64, 64, 4, 2)
        return (
            Configuration(whole, whole, whole, small),
            Configuration(Tiles(64, 32, 4, 2), half, half, small),
            Configuration(half, half, half, small),
        )[terms]
    light = Tiles(32, 32, 4, 2)
    return (
        Configuration(Tiles(64, 32, 4, 2), light, light, light),
        Configuration(light, light, small, small),
        Configuration(small, small, small, small),
    )[terms]


def _wide(terms: int, capability: int) -> Configuration:
    """Heads of up to 128 features."""
    small, light, smallest = Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1)
    if terms == 2:
        return Configuration(small, smallest, smallest, smallest)
    if terms == 1:
        return Configuration(small, small, small, smallest)
    if capability in (90, 100, 103):
        return Configuration(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), light, small)
    return Configuration(small, small, light, small)
