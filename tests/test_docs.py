"""Every example in a docstring and in the README runs."""

from __future__ import annotations

import copy
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import kernelab
from kernelab import lora

ROOT = Path(kernelab.__file__).parent
README = ROOT.parent / "README.md"
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text() and "experiment" not in path.parts  # tests/experiment has a run for these
)


def namespace() -> dict:
    """What an example may use without saying where it comes from: a batch, a model, and it without adapters."""
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    adapters = {"actor": lora.LoRAConfig(), "critic": lora.LoRAConfig()}
    model = lora.inject(copy.deepcopy(base), adapters, target_modules=["0"])
    names = {"torch": torch, "nn": torch.nn, "kernelab": kernelab, "x": torch.randn(3, 8), "base": base, "model": model}
    return names | {name: getattr(lora, name) for name in lora.__all__}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), extraglobs=namespace())
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("readme", [README, ROOT / "nn" / "README.md"], ids=lambda path: path.parent.name)
def test_readme_examples(readme):
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(readme), "exec"), {})


def test_readme_names_every_op_and_paper():
    text = README.read_text()
    papers = [path.parent.name for path in (ROOT / "papers").glob("*/__init__.py")]
    for name in [*kernelab.ops.__all__, *papers]:
        assert name in text or name.replace("_", "-") in text, name
