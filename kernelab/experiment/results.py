"""``results.json``: what a run claims, and where and how it came about."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PACKAGES = ("kernelab", "torch", "numpy", "triton", "safetensors", "accelerate", "transformers", "peft", "tokenizers")


def environment() -> dict[str, Any]:
    """Versions, git commit and machine."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    machine = {
        "system": platform.platform(),
        "device": device,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return {"versions": versions, "git_commit": git_commit(), "machine": machine}


def git_commit() -> str | None:
    """The commit that this package was run from, ``-dirty`` if its files differ, ``None`` outside its repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else an installed copy would name its user's commit
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory() -> dict[str, int]:
    """High-water marks of this process in bytes: resident memory, and torch's on the GPU if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def show(console: Console, results: Mapping[str, Any], folder: Path) -> None:
    """Prints the claims as a table, and where everything else lies."""
    table = Table("claim", "expected", "obtained", "", title=results["paper"], title_justify="left")
    for claim in results["claims"]:
        mark = Text("passed", "green") if claim["passed"] else Text("not reproduced", "red")
        table.add_row(*(_text(claim[key]) for key in ("name", "expected", "obtained")), mark)
    if results["claims"]:
        console.print(table)
    memory = results["peak_memory"]["rss_bytes"] / 2**20
    line = f"{results['wall_seconds']:.1f} s, peak memory {memory:.0f} MiB, results in {folder}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _text(value: Any) -> Text:
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    return Text(value if isinstance(value, str) else json.dumps(value))
