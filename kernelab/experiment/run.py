"""What a paper's ``train(config, run)`` is given: phases, metrics, checkpoints, claims and figures."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from kernelab._core.errors import KernelabError, bad_value
from kernelab.experiment import results
from kernelab.experiment.checkpoint import Checkpoints, check_phase
from kernelab.experiment.device import from_all, process_count, process_index
from kernelab.experiment.files import to_json, write_json
from kernelab.experiment.folder import RESULTS
from kernelab.experiment.metrics import LineFile, Metrics, encode
from kernelab.experiment.progress import Progress
from kernelab.experiment.rng import rng_state, seed_everything, set_rng_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Run:
    """One run in its folder. Every process calls the same methods; only the main one writes.

    A run is one or more phases, each a ``restore``, a loop over ``steps`` and a ``save`` now and then. Resumed,
    ``train`` is called again from the top: a finished phase loads the state it ended with and its loop is empty, the
    interrupted one goes on after its newest checkpoint, and the code between runs again. So a resumed run equals an
    uninterrupted one bit for bit, if all that a phase changes is in its state and the global random generators.

    >>> state = {"model": model, "optimizer": optimizer}
    >>> start = run.restore(state, phase="sft")
    >>> for step in run.steps(start, 100):
    ...     run.log(step, {"loss": loss})
    ...     if run.should_checkpoint(step):
    ...         run.save(step, state)
    """

    def __init__(self, folder: Path, config: Any, *, paper: str, console: Console | None = None, keep: int = 2):
        self.folder = Path(folder)
        self.config = config
        self.paper = paper
        self.is_main = process_index() == 0
        self.console = console or Console(quiet=not self.is_main)
        self._checkpoints = Checkpoints(self.folder / "checkpoints", keep)
        if self.is_main:
            self._checkpoints.clean()
        self._saved = {found.phase: found for found in self._checkpoints.all()}
        infos = [found.info for found in self._saved.values()]
        committed = max((info["metrics_bytes"] for info in infos), default=0)
        path = self.folder / "metrics.jsonl"
        self._metrics = Metrics(path, LineFile(path, committed) if self.is_main else None, committed)
        self._timing = LineFile(self.folder / "timing.jsonl") if self.is_main else None
        self._earlier = max((info["wall_seconds"] for info in infos), default=0.0)
        self._peaks = [info["peak_memory"] for info in infos]
        self._began = time.monotonic()
        self._claims: list[dict[str, Any]] = []
        self._phase: str | None = None
        self._phases: set[str] = set()
        self._total: int | None = None
        self._progress: Progress | None = None
        self._loop = lambda: None
        self._stop_asked = self._stop_heard = False
        seed_everything(config.seed)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception) -> None:
        if loop := self._loop():
            loop.close()
        if self.is_main:
            self._metrics.file.close()
            self._timing.close()

    # phases -----------------------------------------------------------------------------------------------------------

    def restore(self, state: dict[str, Any], phase: str = "train") -> int:
        """Begins ``phase``: loads its newest checkpoint into ``state`` and returns the number of steps done, else 0.

        ``state`` maps names to objects with ``state_dict`` and ``load_state_dict``, to ``torch.Generator`` or
        ``numpy.random.Generator``, which are loaded in place, or to plain data (numbers, strings, tensors, arrays,
        nested in dicts, lists and tuples), which is replaced in ``state``; its tensors come back on the CPU. Of several
        processes, what an object's ``state_dict`` holds is the main one's; the rest is each process's own.
        """
        check_phase(phase)
        if phase in self._phases:
            raise KernelabError(f"run.restore: phase {phase!r} was begun already; give each phase its own name.")
        self._phase = phase
        self._phases.add(phase)
        found = self._saved.get(phase)
        if found is None:
            return 0
        saved = found.load()
        own = saved["own"][process_index()]
        values = {**saved["shared"], **own["data"]}
        if set(values) != set(state):
            raise bad_value("run.restore", "state", f"the entries of {found.folder}: {sorted(values)}", sorted(state))
        for name, value in values.items():
            state[name] = _put(state[name], value)
        self._metrics.rewind(found.info["metrics_bytes"])
        set_rng_state(own["rng"])
        return found.step

    def steps(self, start: int, total: int, label: str | None = None) -> Iterator[int]:
        """``start, ..., total - 1`` under a progress bar; ``label`` is the phase's name unless given.

        Ctrl-C lets the step end and asks for a checkpoint; a second one stops at once.
        """
        if self._loop():
            raise KernelabError("run.steps: the loop of another phase is still running; loops follow each other.")
        loop = self._steps(start, total, label or self._phase or "train")
        self._loop = weakref.ref(loop)  # weak: a loop left by `break` or by an error must end there
        return loop

    def _steps(self, start: int, total: int, label: str) -> Iterator[int]:
        self._total = total
        try:
            with Progress(self.console, label, start, total) as self._progress, self._interrupts():
                for step in range(start, total):
                    late = self._stop_asked  # after the last step's should_checkpoint
                    yield step
                    self._progress.advance()
                    if self._stop_heard or late:
                        raise KeyboardInterrupt
                if self._stop_asked:
                    raise KeyboardInterrupt
        finally:
            self._total = self._progress = None

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not usual or process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield  # several processes would stop at different steps
            return

        def ask(signum, frame):
            self._stop_asked = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print is not reentrant

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def should_checkpoint(self, step: int, every: int | None = None) -> bool:
        """Whether ``step`` ends with a checkpoint: each ``every`` (a 20th of the loop), the last, or after Ctrl-C."""
        if self._total is None:
            raise KernelabError("run.should_checkpoint: it answers inside a loop over run.steps.")
        if every is not None and every < 1:
            raise bad_value("run.should_checkpoint", "every", "at least 1", every)
        self._stop_heard = self._stop_asked
        done = step + 1
        return done % (every or max(1, self._total // 20)) == 0 or done == self._total or self._stop_heard

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint after which a resumed run goes on at ``step + 1``; the last thing in a loop's body."""
        if self._phase is None:
            raise KernelabError("run.save: a phase begins with run.restore(state).")
        shared = {name: value.state_dict() for name, value in state.items() if hasattr(value, "state_dict")}
        data = {name: _take(value) for name, value in state.items() if name not in shared}
        tree = {"shared": shared, "own": from_all({"data": data, "rng": rng_state()})}
        if not self.is_main:
            return
        self._metrics.file.sync()
        info = {
            "metrics_bytes": self._metrics.offset,
            "wall_seconds": self._wall_seconds(),
            "peak_memory": self._peak_memory(),
        }
        self._checkpoints.save(self._phase, step + 1, tree, info)

    # what a run writes down -------------------------------------------------------------------------------------------

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line to ``metrics.jsonl``: numbers and 0-dim tensors, nothing that depends on the clock."""
        record = self._metrics.append(self._phase or "train", step, values)
        if self._progress:
            self._progress.show({name: record[name] for name in values})

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line to ``timing.jsonl``, which a resume leaves as it is: a step that ran twice has two lines."""
        if self._timing:
            self._timing.append(encode(self._phase or "train", step, values))

    def metrics(self, phase: str | None = None) -> list[dict[str, Any]]:
        """The records logged so far, those of before a resume included: of one phase, or all."""
        return [dict(record) for record in self._metrics.records if phase in (None, record["phase"])]

    def claim(self, name: str, *, expected: Any, obtained: Any, passed: bool) -> None:
        """Adds a claim of the paper to the results: what was expected, what was obtained, and whether it holds."""
        claim = {"name": name, "expected": expected, "obtained": obtained, "passed": bool(passed)}
        self._claims.append(to_json(claim, "claim"))

    def figure(self, name: str, figure: Figure) -> None:
        """Writes ``figures/<name>.png``."""
        if not self.is_main:
            return
        from kernelab.experiment.figures import save

        (self.folder / "figures").mkdir(exist_ok=True)
        save(figure, self.folder / "figures" / f"{name}.png")

    def finish(self, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes ``results.json``, with which the run is over, and returns what it holds."""
        record = {
            "paper": self.paper,
            "claims": self._claims,
            "summary": to_json(summary or {}, "summary"),
            "seeds": [self.config.seed],
            "wall_seconds": self._wall_seconds(),
            "peak_memory": self._peak_memory(),
            "processes": process_count(),
            **results.environment(),
        }
        if self.is_main:
            self._metrics.file.sync()
            write_json(self.folder / RESULTS, record)
        return record

    def _wall_seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began

    def _peak_memory(self) -> dict[str, int]:
        peaks = [*self._peaks, results.peak_memory()]
        return {name: max(peak.get(name, 0) for peak in peaks) for name in peaks[-1]}


def _take(value: Any) -> Any:
    """The state of a generator, or plain data as it is."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value


def _put(target: Any, saved: Any) -> Any:
    """``target`` with its saved state, or the saved plain data in its place."""
    if hasattr(target, "load_state_dict"):
        target.load_state_dict(saved)
    elif isinstance(target, torch.Generator):
        target.set_state(saved)
    elif isinstance(target, np.random.Generator):
        target.bit_generator.state = saved
    else:
        return saved
    return target
