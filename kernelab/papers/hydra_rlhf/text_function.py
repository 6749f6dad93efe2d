"""A user's Python function of texts."""

from __future__ import annotations

import math
from collections.abc import Callable

from kernelab._core.errors import bad_value
from kernelab.experiment.paper import load


class TextFunction:
    """A function by reference that takes lists of texts, of the same length, and returns a number for each row.

    Args:
        argument: the field of the config that names it.
        reference: ``package.module:function``, importable from where the run starts.
        numbers: what the numbers have to be, in words, and ``allowed``, whether one of them is.

    Raises:
        ValueError: there is no such function, or it does not return one allowed number for each row.
    """

    def __init__(
        self,
        argument: str,
        reference: str,
        *,
        numbers: str = "finite numbers",
        allowed: Callable[[float], bool] = math.isfinite,
    ):
        self.argument, self.reference, self.numbers, self.allowed = argument, reference, numbers, allowed
        expected = "package.module:function that can be imported"
        try:
            self.function = load(reference)
        except (ImportError, AttributeError, ValueError) as error:
            hint = f"{error}. A module beside you is found with PYTHONPATH=."
            raise bad_value("hydra-rlhf", argument, expected, reference, hint) from error
        if not callable(self.function):
            raise bad_value("hydra-rlhf", argument, expected, f"{reference}, a {type(self.function).__name__}")

    def __call__(self, prompts: list[str], answers: list[str], *others: list[str]) -> list[float]:
        found = self.function(prompts, answers, *others)
        try:
            values = [float(value) for value in found]
        except (TypeError, ValueError) as error:
            raise self._broken("a list of numbers", repr(found)) from error
        if len(values) != len(answers):
            raise self._broken(f"{len(answers)} numbers, one an answer", f"{len(values)}")
        for answer, value in zip(answers, values, strict=True):
            if not self.allowed(value):
                raise self._broken(self.numbers, f"{value} for the answer {answer!r}")
        return values

    def _broken(self, expected: str, got: str) -> Exception:
        return bad_value("hydra-rlhf", self.argument, f"{self.reference} to return {expected}", got)
