"""Which tests run in which process, and the option that renews the golden tables."""

from __future__ import annotations

import os

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ instead of comparing with it")


def pytest_configure() -> None:
    if INTERPRET:
        from tests.bench import interpreter

        interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := _reason_to_skip(item):
            item.add_marker(pytest.mark.skip(reason=reason))


def _reason_to_skip(item: pytest.Item) -> str | None:
    if item.get_closest_marker("interp") and not INTERPRET:
        return "needs TRITON_INTERPRET=1 in a process of its own"
    if item.get_closest_marker("aot") and INTERPRET:
        return "a kernel decorated under TRITON_INTERPRET=1 cannot be compiled"
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA device"
    return None


@pytest.fixture(scope="session", autouse=True)
def triton_cache(tmp_path_factory: pytest.TempPathFactory):
    """A compilation cache of this session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def check_golden(request: pytest.FixtureRequest):
    """``check_golden(op, launches)``: see tests/bench/golden.py."""
    from functools import partial

    from tests.bench import golden

    return partial(golden.check, update=request.config.getoption("--update-golden"))
