"""The run folder: where a run goes, when it may go there, and who holds it."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from kernelab._core.errors import KernelabError
from kernelab.experiment.files import TEMPORARY, write_json

CONFIG, RESULTS = "config.json", "results.json"
_LOCK = TEMPORARY + "lock"


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
    path = folder / CONFIG
    try:
        saved = json.loads(path.read_text())
        return {name: saved[name] for name in ("paper", "preset", "arguments", "processes", "config")}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KernelabError(f"{path} is not what a run wrote there: {type(error).__name__}: {error}") from error


@contextmanager
def held(folder: Path, record: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    """Makes ``folder`` this run's own, alone, or refuses and leaves everything in it as it was.

    A new or empty folder gets ``config.json`` with ``record``; one that holds a run is entered only to ``resume`` it,
    with the same record.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check(folder, record, resume)
        lock = open(folder / _LOCK, "w")  # noqa: SIM115 (held below, once it is known to open)
    except OSError as error:
        raise KernelabError(f"the run folder {folder} cannot be used: {error}") from error
    with lock:
        with suppress(OSError):  # some file systems have no locks
            if not _lock(lock):
                raise KernelabError(f"another process is running in {folder}.")
        _check(folder, record, resume)  # a run may have begun and ended there meanwhile
        if not (folder / CONFIG).exists():
            write_json(folder / CONFIG, record)
        yield


def _lock(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, it dies with the process, not its workers
    except (BlockingIOError, PermissionError):
        return False
    return True


def _check(folder: Path, record: Mapping[str, Any], resume: bool) -> None:
    saved = read_config(folder)
    if saved is None:
        if any(not entry.name.startswith(TEMPORARY) for entry in folder.iterdir()):
            raise KernelabError(f"{folder} is not empty and holds no run; name another folder with --out.")
    elif not resume:
        raise KernelabError(f"{folder} holds a run already; go on with it (--resume) or name another folder (--out).")
    elif changes := _changes(saved, record):
        raise KernelabError(
            f"{folder} was begun with another configuration and cannot be resumed with this one:\n  "
            + "\n  ".join(changes)
            + "\nResume it as it was begun, or begin a new run in another folder."
        )


def _changes(saved: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    old, new = (
        {"paper": one["paper"], "processes": one["processes"], **_flat(one["config"])} for one in (saved, record)
    )
    names = {**old, **new}
    return [
        f"{name}: {_show(old, name)} -> {_show(new, name)}" for name in names if _show(old, name) != _show(new, name)
    ]


def _show(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name]) if name in values else "absent"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
