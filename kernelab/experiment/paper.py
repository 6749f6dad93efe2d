"""How a paper presents itself to the command line."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Paper:
    """One paper, as ``kernelab list`` shows it and ``kernelab run`` finds its code.

    Stands as ``PAPER`` in ``kernelab/papers/<key>/__init__.py``, which imports nothing heavy. The last four fields
    name an attribute as ``"module:attribute"`` and are imported only when they are needed:

    - ``config``: a frozen dataclass with a field ``seed``; its module also holds ``PRESETS: dict[str, Config]``
    - ``train``: ``train(config, run) -> dict | None``; what it returns becomes ``summary`` in ``results.json``
    - ``plan``: a function of typed arguments, each of them a flag, that returns something rich can print; an argument
      ``config`` is given the preset's config, and each of its fields is a flag, as in a run
    - ``out_of_memory``: ``out_of_memory(config)`` returns what is printed when a run's memory ran out

    >>> Paper("toy", "A toy", "0000.00000", "Nothing.", config="toy.config:Config", train="toy.train:train").name
    'toy'
    """

    key: str
    title: str
    arxiv: str
    summary: str
    config: str
    train: str
    plan: str | None = None
    out_of_memory: str | None = None

    @property
    def name(self) -> str:
        """The key as the command line shows it."""
        return self.key.replace("_", "-")


def find_papers() -> dict[str, Paper]:
    """Every paper in ``kernelab.papers``, by key."""
    package = import_module("kernelab.papers")
    modules = [import_module(f"kernelab.papers.{found.name}") for found in pkgutil.iter_modules(package.__path__)]
    return {module.PAPER.key: module.PAPER for module in modules}


def load(reference: str) -> Any:
    """The object that ``"module:attribute"`` names."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
