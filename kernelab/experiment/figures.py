"""One style for every figure, without pyplot's global state."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kernelab._core.errors import bad_value
from kernelab.experiment.files import write_atomic

STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10.0,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def figure(rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 4.0) -> tuple[Figure, Any]:
    """``(figure, axes)`` in the house style: one Axes, or an array of them as ``Figure.subplots`` gives; inches."""
    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height))
        FigureCanvasAgg(made)
        return made, made.subplots(rows, columns)


def curves(records: Iterable[Mapping[str, Any]], names: Iterable[str], *, x: str = "step", title: str = "") -> Figure:
    """One panel a metric of ``names`` against ``x``, from the records that have both (see ``run.metrics``).

    >>> curves([{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}], ["loss"]).axes[0].get_ylabel()
    'loss'
    """
    records, names = list(records), list(names)
    if not names:
        raise bad_value("curves", "names", "at least one metric", names)
    made, axes = figure(len(names), width=6.4, height=1.0 + 2.2 * len(names))
    for axis, name in zip([axes] if len(names) == 1 else axes, names, strict=True):
        points = [(record[x], record[name]) for record in records if x in record and name in record]
        if not points:
            raise bad_value("curves", "names", "metrics that the records hold", name)
        axis.plot(*zip(*points, strict=True), linewidth=1.5)
        axis.set_ylabel(name)
    made.axes[-1].set_xlabel(x)
    made.suptitle(title)
    return made


def save(made: Figure, path: Path) -> None:
    """Writes the figure as PNG, atomically; equal figures give equal bytes."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
