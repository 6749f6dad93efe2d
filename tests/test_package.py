"""The package as a whole: layers, a light import, the environment report, the choice of a backend."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernelab
from kernelab import env
from kernelab._core import native, registry
from kernelab._core.errors import BackendUnavailable, NativeLoadError

ROOT = Path(kernelab.__file__).parent
LAYERS = {"_core": 0, "ops": 1, "nn": 2, "lora": 2, "optim": 2, "samplers": 2, "experiment": 3, "papers": 4}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Absolute names of the kernelab modules that a file imports."""
    package = ["kernelab", *path.relative_to(ROOT).parent.parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names += [".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names]
    return [name for name in names if name.split(".")[0] == "kernelab"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_layer_imports_only_what_lies_below_it(path):
    own = path.relative_to(ROOT).parts
    if len(own) == 1:
        return  # kernelab/__init__.py, env.py: the front door sees everything
    for name in imports(path):
        parts = name.split(".")[1:]
        if not parts or parts[0] == own[0] != "papers" or parts[0] not in LAYERS:
            continue
        if own[0] == parts[0] == "papers":
            assert len(parts) == 1 or parts[1] == own[1], f"{path.name} imports another paper: {name}"
            continue
        assert LAYERS[parts[0]] < LAYERS[own[0]], f"{path.name} of layer {own[0]} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_outgrows_600_lines(path):
    assert len(path.read_text().splitlines()) <= 600


def test_no_op_passes_raw_pointers_around_the_loader():
    assert [path for path in MODULES if "ops" in path.parts and "data_ptr(" in path.read_text()] == []


def test_import_is_light_and_silent():
    code = (
        "import sys, kernelab; heavy = {'triton', 'numba', 'transformers', 'matplotlib', 'peft', 'accelerate'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lazy_names_exist_and_unknown_ones_raise():
    assert kernelab.ops.lora_linear.__name__ == "lora_linear"
    assert kernelab.use_backend is registry.use_backend
    with pytest.raises(AttributeError, match="nonsense"):
        _ = kernelab.nonsense


def test_environment_report(capsys):
    assert env.main(["--json", "--selftest"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"]["lora_linear"]["reference"] in ("can run", "chosen")
    assert {row["backend"] for row in report["selftest"]} >= {"reference", "cpu"}
    assert env.main([]) == 0
    assert "lora_linear" in capsys.readouterr().out


@pytest.fixture
def toy_op(monkeypatch):
    """An op ``toy`` whose better backend cannot run."""
    monkeypatch.setattr(registry, "_OPS", {})
    registry._select.cache_clear()
    register = registry.register
    register("toy", "reference", module="kernelab._core", priority=0, devices=(), supports=lambda *_: None)
    register("toy", "cpu", module="kernelab", priority=9, devices=("cpu",), supports=lambda *_: "no compiler")
    register("toy", "cuda", module="kernelab", priority=20, devices=("cuda",), supports=lambda *_: None)
    yield
    registry._select.cache_clear()


def choose(argument="", device="cpu"):
    return registry.select("toy", argument, torch.device(device), torch.float32).__name__


@pytest.mark.usefixtures("toy_op")
def test_the_automatic_choice_falls_back_with_one_log_line_and_strict_forbids_it(monkeypatch, caplog):
    monkeypatch.delenv("KERNELAB_STRICT", raising=False)
    with caplog.at_level(logging.WARNING, "kernelab"):
        assert choose() == choose() == "kernelab._core"
    assert [record.message for record in caplog.records] == [
        "toy on cpu in torch.float32 falls back from cpu to reference: no compiler"
    ]
    monkeypatch.setenv("KERNELAB_STRICT", "1")
    with pytest.raises(BackendUnavailable, match="STRICT"):
        choose()
    assert choose("reference") == "kernelab._core"


@pytest.mark.usefixtures("toy_op")
def test_demands_outrank_each_other_and_raise_when_unmet(monkeypatch):
    monkeypatch.setenv("KERNELAB_BACKEND", "cpu")
    with pytest.raises(BackendUnavailable, match=r"KERNELAB_BACKEND asks for 'cpu'[\s\S]*no compiler"):
        choose()
    with registry.use_backend("reference"):
        assert choose() == "kernelab._core"
        with pytest.raises(BackendUnavailable, match="backend="):
            choose("cpu")
    with pytest.raises(BackendUnavailable, match="expected one of"), registry.use_backend("tpu"):
        pass
    monkeypatch.setenv("KERNELAB_BACKEND", "other=cpu,toy=reference")
    assert choose() == "kernelab._core"
    found = registry.explain("toy", torch.empty(0))
    assert (found.chosen, found.asked_by) == ("reference", "KERNELAB_BACKEND")
    assert found.reasons["cpu"] == "no compiler"
    with pytest.raises(BackendUnavailable, match="no op 'nonsense'"):
        registry.explain("nonsense")


def test_a_missing_extension_is_explained_on_use(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "No module named 'kernelab._C_cpu'"))
    with pytest.raises(NativeLoadError, match=r"KERNELAB_BUILD=cpu pip install"):
        native.call("dropout_float32")


@pytest.mark.skipif(native.reason_missing() is not None, reason="the C++ extension is not built")
def test_the_loader_refuses_what_a_kernel_cannot_read():
    with pytest.raises(ValueError, match="last dimension is contiguous"):
        native.call("dropout_float32", torch.ones(4, 4).T[:, :2])
    with pytest.raises(ValueError, match="CPU tensor"):
        native.call("dropout_float32", torch.ones(4, 4, device="meta"))
