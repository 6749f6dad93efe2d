"""Files that are whole or not there, and strict JSON for anything a run records."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernelab._core.errors import bad_type

TEMPORARY = ".tmp-"


def write_atomic(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path``: after a crash at any moment the file is the old one or the new one, whole."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(to_json(value, path.name), indent=2, allow_nan=False) + "\n").encode())


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, where: str = "value") -> Any:
    """``value`` in JSON's own types.

    Dataclasses become objects, paths and enums strings, 0-dim tensors and numpy scalars numbers. A float that JSON
    cannot write becomes the string that ``float`` reads back: ``"nan"``, ``"inf"``, ``"-inf"``.
    """
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name), where) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [to_json(item, f"{where}[{index}]") for index, item in enumerate(items)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return to_json(value.item(), where)
    if hasattr(value, "tolist"):
        return to_json(value.tolist(), where)
    raise bad_type("kernelab run", where, "numbers, strings, None, lists and dicts of them", type(value).__name__)
