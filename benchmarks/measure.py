"""From the providers of a group to its rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kernelab._core.memory import saved_bytes

from . import timing
from .provider import Group, Provider, refcheck
from .record import Row, machine

BASE = "base"  # the provider that the others are compared with: the frozen layer or model without adapters


class Measured(NamedTuple):
    """A row and the seconds of each round that it stands for."""

    row: Row
    durations: list[float]


def measure_group(
    group: Group, builders: Mapping[str, Callable[[], Provider]], seconds: float, min_rounds: int
) -> dict[str, Measured | Exception]:
    """Every provider of the group by name: what was measured, or why it was not. Only what passes :func:`refcheck` is
    measured; all of these together, for about ``seconds``."""
    found: dict[str, Measured | Exception] = {}
    providers, errors, memory = {}, {}, {}
    for name, build in builders.items():
        try:
            provider = build()
            errors[name] = refcheck(provider, group.dtype)
            saved = saved_bytes(provider.graph, exclude=provider.weights) if provider.graph else None
            memory[name] = {"peak_bytes": timing.peak_bytes(provider.run, group.device), "saved_bytes": saved}
            providers[name] = provider
        except Exception as error:  # the test of this provider raises it; the others go on
            found[name] = error
    calls = {name: provider.run for name, provider in providers.items()}
    durations = timing.interleaved(calls, group.device, seconds, max(min_rounds, 2))  # quantiles take two
    medians = {name: statistics.median(values) for name, values in durations.items()}
    for name, provider in providers.items():
        row = Row(
            op=group.op,
            direction=group.direction,
            case=group.case,
            dtype=str(group.dtype)[6:],
            device=group.device,
            machine=machine(group.device),
            provider=name,
            refcheck_error=errors[name],
            **_times(durations[name]),
            **memory[name],
            **_rates(group, provider, medians[name]),
            base_ratio=medians[name] / medians[BASE] if BASE in medians else None,
        )
        found[name] = Measured(row, durations[name])
    return found


def _times(durations: list[float]) -> dict[str, float | int]:
    p20, median, p80 = (1e3 * statistics.quantiles(durations, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "rounds": len(durations)}


def _rates(group: Group, provider: Provider, seconds: float) -> dict[str, float]:
    if provider.work is None:
        return {}
    bandwidth, rate = (amount / seconds for amount in provider.work)
    return {
        "gb_per_s": bandwidth / 1e9,
        "gflop_per_s": rate / 1e9,
        "copy_fraction": bandwidth / timing.copy_ceiling(group.device),
        "matmul_fraction": rate / timing.matmul_ceiling(group.device, group.dtype),
    }
