"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all; never a pickle."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from kernelab._core.errors import bad_value
from kernelab.experiment.files import TEMPORARY, sync, write_atomic
from kernelab.experiment.state import decode, encode

logger = logging.getLogger("kernelab")

_TENSORS, _STATE, _MARKER = "tensors.safetensors", "state.json", "complete.json"
_PHASE = re.compile(r"[A-Za-z0-9_]+")
_NAME = re.compile(rf"(?P<phase>{_PHASE.pattern})-(?P<step>[0-9]{{8,}})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, after ``step`` steps of ``phase``; ``info`` is what was saved beside the state."""

    folder: Path
    phase: str
    step: int
    info: dict[str, Any]

    def load(self) -> Any:
        """The saved state; tensors on the CPU."""
        tree = json.loads((self.folder / _STATE).read_text())["state"]
        return decode(tree, load_file(self.folder / _TENSORS))


class Checkpoints:
    """The checkpoints of one run: ``<phase>-<step>/`` folders, the last ``keep`` of the phase being trained.

    Of every other phase the newest one is kept. A checkpoint is written under a temporary name, flushed, marked and
    renamed, so a crash at any moment leaves the earlier ones untouched.

    >>> checkpoints = Checkpoints(folder)
    >>> checkpoints.save("train", 10, {"weight": torch.ones(3)})
    >>> checkpoints.newest("train").load()
    {'weight': tensor([1., 1., 1.])}
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise bad_value("Checkpoints", "keep", "at least 1", keep)
        self.folder = Path(folder)
        self.keep = keep

    def save(self, phase: str, step: int, state: Any, info: dict[str, Any] | None = None) -> None:
        """Writes nested ``state`` (see :func:`kernelab.experiment.state.encode`) after ``step`` steps of ``phase``."""
        check_phase(phase)
        tree, tensors = encode(state)
        content = {"phase": phase, "step": step, "info": info or {}, "state": tree}
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"{phase}-{step:08d}"
        temporary = self.folder / (TEMPORARY + final.name)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            save_file(tensors, temporary / _TENSORS)
            sync(temporary / _TENSORS)
            write_atomic(temporary / _STATE, json.dumps(content, allow_nan=False).encode())
            digests = {name: _sha256(temporary / name) for name in (_TENSORS, _STATE)}
            write_atomic(temporary / _MARKER, json.dumps(digests).encode())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if final.exists():  # torn, or from a run that went on from an earlier step
            self._remove(final)
        os.replace(temporary, final)
        sync(self.folder)
        self._prune(phase, step)

    def newest(self, phase: str) -> Checkpoint | None:
        """The newest complete checkpoint of ``phase``; one that is torn is skipped with a log line."""
        folders = reversed(self._folders().get(phase, []))
        return next(filter(None, (_open(folder) for _, folder in folders)), None)

    def all(self) -> list[Checkpoint]:
        """The newest complete checkpoint of every phase."""
        return [found for phase in self._folders() if (found := self.newest(phase))]

    def clean(self) -> None:
        """Removes what a killed process left under a temporary name."""
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)

    def _folders(self) -> dict[str, list[tuple[int, Path]]]:
        """``(step, folder)`` by phase, oldest first."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for folder in self.folder.glob("*"):
            if name := _NAME.fullmatch(folder.name):
                found.setdefault(name["phase"], []).append((int(name["step"]), folder))
        return {phase: sorted(folders) for phase, folders in sorted(found.items())}

    def _prune(self, phase: str, step: int) -> None:
        for name, folders in self._folders().items():
            ahead = [folder for at, folder in folders if name == phase and at > step]  # a run went back before them
            behind = [folder for _, folder in folders if folder not in ahead]
            for folder in ahead + behind[: -self.keep if name == phase else -1]:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        discarded = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        shutil.rmtree(discarded, ignore_errors=True)
        os.replace(folder, discarded)  # a half-deleted folder never has a checkpoint's name
        shutil.rmtree(discarded)


def check_phase(phase: str) -> None:
    """Raises unless ``phase`` can be part of a folder's name."""
    if not isinstance(phase, str) or not _PHASE.fullmatch(phase):
        raise bad_value("run", "phase", "letters, digits and underscores", phase)


def _open(folder: Path) -> Checkpoint | None:
    try:
        digests = json.loads((folder / _MARKER).read_text())
        if any(_sha256(folder / name) != digests[name] for name in (_TENSORS, _STATE)):
            raise ValueError("its files are not those that were written")
        content = json.loads((folder / _STATE).read_text())
        return Checkpoint(folder, content["phase"], content["step"], content["info"])
    except (OSError, ValueError, KeyError) as error:
        logger.warning("checkpoint %s is not complete and is skipped: %s", folder, error)
        return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
