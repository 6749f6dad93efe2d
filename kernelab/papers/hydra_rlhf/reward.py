"""A Python function as the reward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernelab._core.errors import bad_value
from kernelab.experiment.paper import load
from kernelab.papers.hydra_rlhf.tokens import Encoder, Sequences


class RewardFunction:
    """Rewards from a function of texts: ``function(prompts, answers)``, two lists, returns a number for each pair.

    Texts are what the tokenizer makes of the tokens that the policy read and wrote; an answer may be empty.

    Args:
        reference: ``package.module:function``, importable from where the run starts.

    Raises:
        ValueError: there is no such function, or it does not return one finite number for each answer.
    """

    def __init__(self, reference: str, encoder: Encoder):
        self.reference, self.encoder = reference, encoder
        expected = "package.module:function that can be imported"
        try:
            self.function = load(reference)
        except (ImportError, AttributeError, ValueError) as error:
            hint = f"{error}. A module beside you is found with PYTHONPATH=."
            raise bad_value("hydra-rlhf", "reward", expected, reference, hint) from error
        if not callable(self.function):
            raise bad_value("hydra-rlhf", "reward", expected, f"{reference}, a {type(self.function).__name__}")

    def __call__(self, sequences: Sequences) -> Tensor:
        """[B], float32."""
        answers = self.encoder.decode(sequences)
        found = self.function(self.encoder.decode_prompts(sequences), answers)
        try:
            values = [float(value) for value in found]
        except (TypeError, ValueError) as error:
            raise self._broken("a list of numbers", repr(found)) from error
        if len(values) != len(answers):
            raise self._broken(f"{len(answers)} numbers, one an answer", f"{len(values)}")
        for answer, value in zip(answers, values, strict=True):
            if not math.isfinite(value):
                raise self._broken("finite numbers", f"{value} for the answer {answer!r}")
        return torch.tensor(values, device=sequences.tokens.device)

    def _broken(self, expected: str, got: str) -> Exception:
        return bad_value("hydra-rlhf", "reward", f"{self.reference} to return {expected}", got)
