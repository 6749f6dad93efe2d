"""``python -m kernelab.env``: versions, which backend of which op can run here and why, and a self-test.

``--json`` prints the same as JSON (for bug reports), ``--selftest`` runs every op once on every backend that can run
here and compares with its float64 definition.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from . import __version__
from ._core import native, registry
from .ops import specs

_PACKAGES = ("torch", "triton", "numpy", "numba", "safetensors", "transformers", "accelerate", "peft")


def versions() -> dict[str, str | None]:
    """Versions of what matters to a bug report; None: not installed."""
    found: dict[str, str | None] = {"kernelab": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def devices() -> list[str]:
    """``cpu`` and the names of the GPUs."""
    return ["cpu", *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))]


def backends() -> dict[str, dict[str, str]]:
    """``{op: {backend: "chosen" | "can run" | reason}}`` for float32 on the best device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = {}
    for op in registry.ops():
        found = registry.explain(op, torch.empty(0, device=device))
        table[op] = dict(found.reasons)
        if found.chosen:
            table[op][found.chosen] = "chosen"
    return table


def selftest() -> list[dict]:
    """One row an op, backend and dtype that can run here: the largest error against the float64 definition."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [
        _compare(spec, backend, dtype, device)
        for spec in specs()
        for backend, dtypes in spec.dtypes.items()
        for dtype in dtypes
        if registry.explain(spec.name, torch.empty(0, dtype=dtype, device=device), backend=backend).chosen
    ]


def _compare(spec, backend: str, dtype: torch.dtype, device: torch.device) -> dict:
    def build():
        return spec.case("smallest").build(device, dtype, torch.Generator(device).manual_seed(0))

    def wide(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        return [wide(item) for item in value] if isinstance(value, list) else value

    with torch.no_grad():
        exact = spec.reference(**{name: wide(value) for name, value in build().items()})
        error = (spec.function(**build(), backend=backend).double() - exact).abs().max().item()
    # Inputs are of order one and sums are short: a wrong kernel errs by far more than this.
    passed = error <= 64 * torch.finfo(dtype).eps * exact.abs().max().item()
    name = str(dtype).removeprefix("torch.")
    return {"op": spec.function.__name__, "backend": backend, "dtype": name, "error": error, "passed": passed}


def main(arguments: list[str] | None = None) -> int:
    """The command; its status is 1 where a self-test fails."""
    parser = argparse.ArgumentParser(prog="python -m kernelab.env", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--selftest", action="store_true", help="run every op on every backend that can run here")
    options = parser.parse_args(arguments)
    report = {
        "versions": versions(),
        "devices": devices(),
        "threads": torch.get_num_threads(),
        "extension": native.reason_missing() or "loaded",
        "backends": backends(),
    }
    if options.selftest:
        report["selftest"] = selftest()
    console = Console()
    if options.json:
        console.out(json.dumps(report, indent=2), highlight=False)
    else:
        _show(console, report)
    return 0 if all(row["passed"] for row in report.get("selftest", [])) else 1


def _show(console: Console, report: dict) -> None:
    console.print("versions   " + "  ".join(f"{name} {value or '-'}" for name, value in report["versions"].items()))
    console.print(f"devices    {', '.join(report['devices'])} ({report['threads']} threads)")
    console.print(f"extension  {report['extension']}")
    table = Table("op", "backend", "here (float32)")
    for op, reasons in report["backends"].items():
        for backend, reason in reasons.items():
            table.add_row(op, backend, reason)
    console.print(table)
    if "selftest" in report:
        table = Table("op", "backend", "dtype", "largest error", "")
        for row in report["selftest"]:
            verdict = "ok" if row["passed"] else "FAILED"
            table.add_row(row["op"], row["backend"], row["dtype"], f"{row['error']:.2e}", verdict)
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
