"""Rows of results, with where and when they come from, appended as JSON lines."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import re
import subprocess
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from kernelab import env

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One provider of one group in one session. What was not measured is None."""

    op: str
    direction: str
    case: str
    dtype: str
    device: str
    machine: str
    provider: str
    refcheck_error: float
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    base_ratio: float | None = None  # median over that of the group's frozen linear
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    copy_fraction: float | None = None  # of the bandwidth of a copy on this machine
    matmul_fraction: float | None = None  # of the rate of a square product on this machine
    provenance: dict = dataclasses.field(default_factory=lambda: provenance())


@functools.cache
def provenance() -> dict:
    """What a reader needs to judge or repeat a row; the same for all rows of a session."""
    versions = env.versions()
    commit = _git("rev-parse", "HEAD")
    return {
        "session": uuid.uuid4().hex[:12],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "commit": commit or None,
        "dirty": bool(_git("status", "--porcelain", ":/", ":(top,exclude)benchmarks/results")) if commit else None,
        "versions": {name: versions[name] for name in ("kernelab", "python", "torch", "cuda", "triton", "peft")},
    }


@functools.cache
def machine(device: str) -> str:
    """The name of the GPU, or of the CPU with its family and model where the system tells them."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    return f"{name} family {fields['cpu family']} model {fields['model']}" if "model" in fields else name


def append(row: Row, results: Path) -> Path:
    """Adds the row to ``results/<machine>/<op>.jsonl`` in one write."""
    folder = results / re.sub(r"[^a-z0-9]+", "-", row.machine.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{row.op}.jsonl"
    with open(file, "a") as lines:
        lines.write(json.dumps(dataclasses.asdict(row)) + "\n")
    return file


def load(results: Path) -> list[Row]:
    """All rows below ``results``, oldest first in each file.

    Raises:
        ValueError: a line is no row; names the file and the line.
    """
    rows = []
    for file in sorted(results.glob("*/*.jsonl")):
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            try:
                rows.append(Row(**json.loads(line)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {number}: not a row of results: {error}") from error
    return rows


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()
