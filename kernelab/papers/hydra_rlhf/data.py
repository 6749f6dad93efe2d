"""Preferences: of two answers to a prompt, the chosen one is better. From the standard library, or from a file."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kernelab._core.errors import ArgumentValueError, bad_value

logger = logging.getLogger("kernelab")

COLUMNS = ("prompt", "chosen", "rejected")
# Left out, so that the data depends on nothing but Python's version: what Linux distributions package apart, and tests.
_APART = {"distutils", "ensurepip", "idlelib", "lib2to3", "test", "tests", "tkinter", "turtle", "turtledemo", "venv"}
Render = Callable[[list[dict[str, str]]], str]


class Preference(NamedTuple):
    """``chosen`` answers ``prompt`` better than ``rejected``; rows of one ``group`` are held out together."""

    prompt: str
    chosen: str
    rejected: str
    group: str


@dataclass(frozen=True)
class Preferences:
    """Rows to train on, rows that no training sees, and how a prompt meets its answer."""

    train: list[Preference]
    held_out: list[Preference]
    separator: str = ""
    """Text between a prompt and its answer."""
    keep: Literal["start", "end"] = "end"
    """The part of a prompt that stays when it is longer than the context."""

    def texts(self) -> Iterator[str]:
        """Every text to train on, once: what a tokenizer may learn from."""
        rows = chain.from_iterable((row.prompt, row.chosen, row.rejected) for row in self.train)
        return iter(dict.fromkeys(rows))


# the standard library -------------------------------------------------------------------------------------------------


class Function(NamedTuple):
    """The source of a function without its docstring, and the docstring's first line."""

    module: str
    source: str
    summary: str


def functions(root: Path | None = None) -> list[Function]:
    """The documented functions of the standard library of this Python (or of the sources under ``root``), in order.

    A method's source begins with the line of its class; comments are not kept. A function is left out if its summary
    has fewer than three words or stands in the rest of its source.
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or not _APART.isdisjoint(parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:  # a template, say
            logger.debug("%s is not read: %s", path, error)
            continue
        found += [function._replace(module=".".join(parts)) for function in _documented(tree)]
    return found


def _documented(node: ast.AST, header: str = "") -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(child):
                summary = text.strip().splitlines()[0].strip()
                child.body = child.body[1:] or [ast.Pass()]
                source = header + ast.unparse(child)
                if len(summary.split()) >= 3 and summary not in source:
                    yield Function("", source, summary)
            yield from _documented(child)
        else:
            yield from _documented(child, f"class {child.name}:\n" if isinstance(child, ast.ClassDef) else header)


def standard_library(held_out: float, rejected_per_prompt: int, seed: int) -> Preferences:
    """Preferences between a function's own summary and another function's, held out by top-level module.

    Each function to train on stands in ``rejected_per_prompt`` rows, each with another rejected summary, taken from the
    same side of the split. ``_pyio`` and ``io`` count as one module, for one is a copy of the other's documentation.
    """
    split: dict[bool, list[Function]] = {False: [], True: []}
    for function in functions():
        split[_is_held_out(_package(function), held_out)].append(function)
    draw = random.Random(seed)
    return Preferences(
        train=_pairs(split[False], rejected_per_prompt, draw),
        held_out=_pairs(split[True], 1, draw),
        separator="\n# Summary:",
        keep="start",
    )


def _package(function: Function) -> str:
    return function.module.partition(".")[0].lstrip("_")


def _pairs(functions: list[Function], rejected_per_prompt: int, draw: random.Random) -> list[Preference]:
    rows = []
    for function in functions:
        for _ in range(rejected_per_prompt):
            rejected = function.summary
            while rejected.casefold() == function.summary.casefold():
                rejected = draw.choice(functions).summary
            rows.append(Preference(function.source, function.summary, rejected, _package(function)))
    return rows


def _is_held_out(group: str, share: float) -> bool:
    digest = hashlib.sha256(group.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# files ----------------------------------------------------------------------------------------------------------------


def read_preferences(path: str | Path, held_out: float, render: Render | None = None) -> Preferences:
    """Preferences from a ``.jsonl`` or ``.parquet`` file with the columns of TRL: prompt, chosen, rejected.

    Each is a text, or a list of messages ``{"role": ..., "content": ...}``; then ``prompt`` may be missing and is what
    ``chosen`` and ``rejected`` have in common. Rows are held out by prompt. A row whose answers are equal prefers
    nothing and is skipped, with a count in the log.

    Args:
        path: the file; blank lines are skipped.
        held_out: share of the prompts to hold out.
        render: text of a list of messages, up to where the answer begins; None: ``role: content`` lines.

    Raises:
        ValueError: names the file, the line or row, and the column.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise bad_value("hydra-rlhf", "data", "a .jsonl or .parquet file", str(path), "TRL's datasets export to both.")
    if not path.is_file():
        raise bad_value("hydra-rlhf", "data", "a file that exists", str(path))
    split: dict[bool, list[Preference]] = {False: [], True: []}
    ties = 0
    for where, row in readers[path.suffix](path):
        preference = _preference(where, row, render or _as_lines)
        if preference.chosen == preference.rejected:
            ties += 1
            continue
        split[_is_held_out(preference.group, held_out)].append(preference)
    if ties:
        logger.warning("%s: %d rows with equal answers are skipped", path, ties)
    for side, rows in (("to train on", split[False]), ("to hold out", split[True])):
        if len(rows) < 2:
            hint = f"{sum(map(len, split.values()))} rows were read; change held_out={held_out} or give more rows."
            raise _broken(str(path), None, f"at least 2 rows {side}", str(len(rows)), hint)
    return Preferences(train=split[False], held_out=split[True])


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
                raise _broken(where, None, "one JSON object a line", _short(line), str(error)) from error
            if not isinstance(row, dict):
                raise _broken(where, None, "a JSON object", _short(row))
            yield where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(columns=columns))
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
    except (ArrowException, OSError) as error:
        raise _broken(str(path), None, "a Parquet file", "another or a damaged one", str(error)) from error


def _preference(where: str, row: dict[str, Any], render: Render) -> Preference:
    needed = COLUMNS[1:] if isinstance(row.get("chosen"), list) else COLUMNS
    for column in needed:
        if column not in row:
            raise _broken(where, column, "a value", "none", f"The row has: {', '.join(row) or 'nothing'}.")
    if isinstance(row["chosen"], list):
        row = _conversation(where, row, render)
    for column in COLUMNS:
        text = row[column]
        if not isinstance(text, str):
            raise _broken(where, column, "a text, or a list of messages in chosen and rejected", _short(text))
        if not text.strip():
            raise _broken(where, column, "a text that is not empty", _short(text))
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _broken(where, column, "Unicode text", _short(text), "It holds half of a surrogate pair.")
    return Preference(row["prompt"], row["chosen"], row["rejected"], group=row["prompt"])


def _conversation(where: str, row: dict[str, Any], render: Render) -> dict[str, str]:
    chosen, rejected = _messages(where, "chosen", row["chosen"]), _messages(where, "rejected", row["rejected"])
    prompt = row.get("prompt")
    if prompt is None:
        pairs = zip(chosen, rejected, strict=False)
        common = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
        if common < 1:
            raise _broken(where, "prompt", "a value, or a beginning that chosen and rejected share", "neither")
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    elif isinstance(prompt, list):
        prompt = _messages(where, "prompt", prompt)
    answers = ("\n".join(message["content"] for message in messages) for messages in (chosen, rejected))
    text = render(prompt) if isinstance(prompt, list) else prompt
    return dict(zip(COLUMNS, (text, *answers), strict=True))


def _messages(where: str, column: str, value: Any) -> list[dict[str, str]]:
    expected = "a list of messages with a role and a text content"
    if not isinstance(value, list) or not value:
        raise _broken(where, column, expected, _short(value))
    for message in value:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise _broken(where, column, expected, _short(message))
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _as_lines(messages: list[dict[str, str]]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages) + "\nassistant:"


def _broken(where: str, column: str | None, expected: str, got: str, hint: str = "") -> ArgumentValueError:
    subject = f"{where}: column '{column}'" if column else where
    return ArgumentValueError(f"{subject}: expected {expected}, got {got}." + (f" {hint}" if hint else ""))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
