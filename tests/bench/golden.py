"""The table of what every kernel takes of each GPU, kept in tests/golden/aot/ and compared on every run.

Renew it with ``pytest -m aot --update-golden`` and review the diff.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import triton

from tests.bench.aot import SHARED_LIMIT, TARGETS, TENSOR_MEMORY_LIMIT, Resources, measure

FOLDER = Path(__file__).parents[1] / "golden" / "aot"
REGISTER_GROWTH = 1.10

Table = dict[str, dict[str, Resources]]  # launch name, target


def check(op: str, launches: Iterable, *, update: bool = False, folder: Path = FOLDER) -> Table:
    """Compiles every launch for its targets and compares with ``folder/<op>.json``, or writes it.

    Fails on any spill; on more shared memory than the GPU has; on more than 10 % more registers; on other MMA
    instructions; where vector loads or asynchronous copies were and are no more; on a launch without a row and a row
    without a launch. A table with spills is never written.
    """
    table: Table = {}
    for launch in launches:
        if launch.name in table:
            raise ValueError(f"{op}: two launches are named {launch.name!r}")
        table[launch.name] = {target: measure(launch, target) for target in launch.targets or TARGETS}
    path = folder / f"{op}.json"
    problems = [
        f"{name} {target}: {text}"
        for name, rows in table.items()
        for target, row in rows.items()
        for text in _excesses(target, row)
    ]
    if not update:
        problems += _differences(path, table)
    if problems:
        raise AssertionError(f"{op}: " + "\n  ".join(["compiled kernels changed:", *problems]))
    if update:
        _write(path, table)
    return table


def _excesses(target: str, row: Resources) -> list[str]:
    found = []
    if row.spill_bytes:
        found.append(f"spills {row.spill_bytes} bytes ({row.registers} registers, {row.stack_bytes} bytes of stack)")
    if row.shared_bytes > SHARED_LIMIT[target]:
        found.append(f"{row.shared_bytes} bytes of shared memory, the GPU has {SHARED_LIMIT[target]} a block")
    if row.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"{row.tensor_memory} columns of tensor memory, the GPU has {TENSOR_MEMORY_LIMIT}")
    return found


def _differences(path: Path, table: Table) -> list[str]:
    renew = "run `pytest -m aot --update-golden` and review the diff"
    if not path.exists():
        return [f"{path} is missing: {renew}"]
    stored = json.loads(path.read_text())
    if stored["triton"] != triton.__version__:
        return [f"{path.name} was measured with Triton {stored['triton']}, this is {triton.__version__}: {renew}"]
    golden = {
        name: {target: Resources(**row) for target, row in rows.items()} for name, rows in stored["launches"].items()
    }
    problems = [f"{name}: in {path.name} but not launched: {renew}" for name in golden.keys() - table.keys()]
    problems += [f"{name}: not in {path.name}: {renew}" for name in table.keys() - golden.keys()]
    for name in sorted(golden.keys() & table.keys()):
        for target, new in table[name].items():
            if target not in golden[name]:
                problems.append(f"{name} {target}: not in {path.name}: {renew}")
            else:
                problems += [f"{name} {target}: {text}" for text in _regressions(golden[name][target], new)]
    return problems


def _regressions(old: Resources, new: Resources) -> list[str]:
    found = []
    if new.registers > REGISTER_GROWTH * old.registers:
        found.append(f"{old.registers} -> {new.registers} registers")
    if new.mma.keys() != old.mma.keys():
        found.append(f"MMA instructions {sorted(old.mma)} -> {sorted(new.mma)}")
    if old.vector_loads and not new.vector_loads:
        found.append(f"no 16-byte loads any more (were {old.vector_loads})")
    if old.async_copies and not new.async_copies:
        found.append(f"no asynchronous copies any more (were {old.async_copies})")
    return found


def _write(path: Path, table: Table) -> None:
    launches = []
    for name, rows in sorted(table.items()):
        lines = [f"      {json.dumps(target)}: {json.dumps(asdict(row))}" for target, row in rows.items()]
        launches.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n    }")
    body = ",\n".join(launches)
    text = f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "launches": {{\n{body}\n  }}\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
