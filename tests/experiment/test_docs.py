import doctest
from importlib import import_module

import pytest
import torch
from rich.console import Console

from kernelab.experiment.run import Run
from tests.experiment.toy import Config


@pytest.mark.parametrize("name", ["checkpoint", "device", "figures", "paper", "progress", "run"])
def test_the_examples_run(name, tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with Run(tmp_path, Config(), paper="toy_paper", console=Console(quiet=True)) as run:
        names = {"folder": tmp_path, "run": run, "model": model, "optimizer": optimizer, "loss": 0.5, "torch": torch}
        outcome = doctest.testmod(import_module(f"kernelab.experiment.{name}"), extraglobs=names)
    assert outcome.attempted > 0
    assert outcome.failed == 0
