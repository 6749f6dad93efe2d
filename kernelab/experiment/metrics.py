"""Append-only JSON lines that a resumed run continues bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernelab._core.errors import KernelabError, bad_type, bad_value
from kernelab.experiment.files import to_json

_NOT_FINITE = ("nan", "inf", "-inf")


class LineFile:
    """An append-only file of JSON lines, each whole or not there; opening it keeps the first ``keep`` bytes, or all."""

    def __init__(self, path: Path, keep: int | None = None):
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        keep = path.read_bytes().rfind(b"\n") + 1 if keep is None else keep
        if os.fstat(self._descriptor).st_size < keep:
            raise KernelabError(f"{path} is shorter than its checkpoints say: it was changed after the run wrote it.")
        os.ftruncate(self._descriptor, keep)

    def append(self, line: bytes) -> None:
        """Adds one line, newline included."""
        written = os.write(self._descriptor, line)
        if written < len(line):
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise KernelabError(f"{self.path}: a line could not be written; the disk is full.")

    def sync(self) -> None:
        """Flushes the file to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class Metrics:
    """The records of a run up to ``offset``, the position in its file that a checkpoint remembers.

    A resumed run keeps the first ``committed`` bytes, those that its checkpoints know of. What it logs again before
    that point, between two finished phases, stands in the file already. Without a ``file`` nothing is written.
    """

    def __init__(self, path: Path, file: LineFile | None, committed: int):
        self.path = path
        self.file = file
        self.committed = committed
        self.offset = 0
        self.records: list[dict[str, Any]] = []

    def append(self, phase: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a record and returns it."""
        line = encode(phase, step, values)
        if self.file and self.offset >= self.committed:
            self.file.append(line)
        self.offset += len(line)
        self.records.append(_decode(line))
        return self.records[-1]

    def rewind(self, offset: int) -> None:
        """Goes to the records of the file's first ``offset`` bytes."""
        with open(self.path, "rb") as file:
            self.records = [_decode(line) for line in file.read(offset).splitlines()]
        self.offset = offset


def encode(phase: str, step: int, values: Mapping[str, Any]) -> bytes:
    """``{"phase": phase, "step": step, **values}`` as a line; the values are numbers, strings or 0-dim tensors."""
    record: dict[str, Any] = {"phase": phase, "step": step}
    for name, value in values.items():
        if name in record:
            raise bad_value("run.log", name, "a metric's name; 'phase' and 'step' are taken", value)
        record[name] = to_json(value, name)
        if isinstance(record[name], (list, dict)):
            raise bad_type("run.log", name, "a number or a 0-dim tensor", value, "Reduce it first.")
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _decode(line: bytes) -> dict[str, Any]:
    record = json.loads(line)
    return {name: float(value) if value in _NOT_FINITE else value for name, value in record.items()}
