"""The run folder: where a run goes, when it may go there, and who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kernelab._core.errors import KernelabError
from kernelab.experiment.files import TEMPORARY, write_json

CONFIG, RESULTS = "config.json", "results.json"
_MISSING = object()


def new_folder(paper: str) -> Path:
    """A fresh ``runs/<paper>/<time>``, made now, so that two runs of one second differ."""
    parent = Path("runs", paper)
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in (stamp, *(f"{stamp}-{count}" for count in range(2, 1000))):
        try:
            (parent / name).mkdir()
        except FileExistsError:
            continue
        return parent / name
    raise KernelabError(f"no free folder name under {parent}; name one with --out.")


def newest_folder(paper: str) -> Path:
    """The folder under ``runs/<paper>`` whose run began last."""
    found = sorted(Path("runs", paper).glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime_ns)
    if not found:
        raise KernelabError(f"there is no run to resume in {Path('runs', paper)}; name its folder with --out.")
    return found[-1].parent


def read_config(folder: Path) -> dict[str, Any] | None:
    """What ``config.json`` of a run folder says, or ``None`` when there is none."""
    try:
        return json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise KernelabError(f"{folder / CONFIG} cannot be read: {error}") from error


@contextmanager
def held(folder: Path, record: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    """Makes ``folder`` this run's own, alone, or refuses and leaves everything in it as it was.

    A new or empty folder gets ``config.json`` with ``record``; one that holds a run is entered only to ``resume`` it,
    with the same record.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise KernelabError(f"the run folder {folder} cannot be made: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise KernelabError(f"another process is running in {folder}.") from None
    try:
        _enter(folder, record, resume)
        yield
    finally:
        os.close(lock)


def _enter(folder: Path, record: Mapping[str, Any], resume: bool) -> None:
    saved = read_config(folder)
    if saved is None:
        if any(not entry.name.startswith(TEMPORARY) for entry in folder.iterdir()):
            raise KernelabError(f"{folder} is not empty and holds no run; name another folder with --out.")
        write_json(folder / CONFIG, record)
        return
    if not resume:
        raise KernelabError(
            f"{folder} holds a run already; continue it with --resume, or name another folder with --out."
        )
    changes = _changes(saved, record)
    if changes:
        raise KernelabError(
            f"{folder} was begun with another configuration and cannot be resumed with this one:\n  "
            + "\n  ".join(changes)
            + "\nResume it as it was begun, or begin a new run in another folder."
        )


def _changes(saved: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    old, new = (
        {**_flat(one["config"]), "paper": one["paper"], "processes": one["processes"]} for one in (saved, record)
    )
    show = lambda value: "(absent)" if value is _MISSING else json.dumps(value)  # noqa: E731
    return [
        f"{name}: {show(old.get(name, _MISSING))} -> {show(new.get(name, _MISSING))}"
        for name in {**old, **new}
        if old.get(name, _MISSING) != new.get(name, _MISSING)
    ]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
