"""Progress of a loop: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

_SHOWN = 4


class Progress:
    """Shows ``done`` of ``total`` steps, their rate, the time left and the first few of the last metrics.

    >>> with Progress(run.console, "train", done=0, total=2) as progress:
    ...     progress.show({"loss": 0.5})
    ...     progress.advance()
    """

    def __init__(self, console: Console, label: str, done: int, total: int, seconds_between_lines: float = 10.0):
        self.console = console
        self.label = label
        self.done = self.first = done
        self.total = total
        self._seconds_between_lines = seconds_between_lines
        self._metrics = ""
        self._bar = self._task = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _RateColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[metrics]}", style="dim", markup=False),
            )
            self._bar = RichProgress(*columns, console=self.console)
            self._task = self._bar.add_task(self.label, completed=self.done, total=self.total, metrics="")
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()
        elif self.done > self.first and self.done < self.total:
            self._line()

    def show(self, metrics: Mapping[str, Any]) -> None:
        """Metrics to show beside the next step."""
        numbers = [(name, value) for name, value in metrics.items() if isinstance(value, (int, float))]
        self._metrics = "  ".join(f"{name} {value:.4g}" for name, value in numbers[:_SHOWN])

    def advance(self) -> None:
        """One more step is done."""
        self.done += 1
        if self._bar:
            self._bar.update(self._task, advance=1, metrics=self._metrics)
        elif self.done == self.total or time.monotonic() - self._last_line >= self._seconds_between_lines:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = (self.done - self.first) / max(self._last_line - self._started, 1e-9)
        left = int((self.total - self.done) / rate)
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        text = f"{self.label} {self.done}/{self.total}  {_rate(rate)}  {clock}  {self._metrics}"
        self.console.print(text.rstrip(), markup=False, highlight=False, soft_wrap=True)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed) if task.speed else "", style="progress.data.speed")


def _rate(rate: float) -> str:
    return f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step"
