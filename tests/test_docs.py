"""Every example in a docstring and in the README runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import kernelab

ROOT = Path(kernelab.__file__).parent
README = ROOT.parent / "README.md"
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "kernelab": kernelab})
    assert result.failed == 0
    assert result.attempted > 0


def test_readme_examples():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def test_readme_names_every_op_and_paper():
    text = README.read_text()
    papers = [path.parent.name for path in (ROOT / "papers").glob("*/__init__.py")]
    for name in [*kernelab.ops.__all__, *papers]:
        assert name in text or name.replace("_", "-") in text, name
