"""Measures the providers of a group together, lets pytest-benchmark show each, and records rows on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from . import record
from .measure import Measured, measure_group
from .provider import Group, Provider
from .timing import Replay

CLOCK = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="append the rows of the benchmarks to --results")
    parser.addoption("--results", type=Path, default=record.RESULTS, metavar="DIR", help="default: benchmarks/results")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def measured() -> dict[Group, dict[str, Measured | Exception]]:
    """What the first test of each group has measured for all of them."""
    return {}


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark, measured) -> Callable[[Mapping], None]:
    """``measure(builders)`` reports this test's provider. The first test of a group measures those of all its tests."""
    options = request.config.option
    group, provider = (request.node.callspec.params[name] for name in ("group", "provider"))

    def report(builders: Mapping[str, Callable[[], Provider]]) -> None:
        if group not in measured:
            items = [item for item in request.session.items if not item.get_closest_marker("skip")]
            params = [item.callspec.params for item in items if hasattr(item, "callspec")]
            chosen = {other["provider"]: builders[other["provider"]] for other in params if other.get("group") == group}
            seconds = float(options.benchmark_max_time) * len(chosen)
            measured[group] = measure_group(group, chosen, seconds, options.benchmark_min_rounds)
        found = measured[group][provider]
        if isinstance(found, Exception):
            raise found
        benchmark.group = str(group)
        benchmark.extra_info.update(vars(found.row))
        CLOCK.load(found.durations)
        benchmark.pedantic(lambda: None, rounds=len(found.durations))
        if options.record:
            record.append(found.row, options.results)

    return report
