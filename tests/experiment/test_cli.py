import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest

from kernelab import __version__
from kernelab.experiment.cli import main
from kernelab.experiment.paper import Paper, find_papers, load
from tests.experiment import toy

PAPERS = {toy.PAPER.key: toy.PAPER, "other": dataclasses.replace(toy.PAPER, key="other", plan=None)}


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """``command("run", "toy-paper")`` -> (status, stdout, stderr), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        status = main(arguments, PAPERS)
        return status, *capsys.readouterr()

    return call


def test_list_names_the_papers(command):
    status, out, _ = command("list")
    assert status == 0
    for text in ("toy-paper", "other", "0000.00000", "A toy", "Learns a line."):
        assert text in out


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["run", "--help"], ["--version"]])
def test_light_commands_do_not_import_torch(arguments):
    program = (
        "import sys; from kernelab.experiment.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or ('torch is imported' if 'torch' in sys.modules else 0))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "kernelab" in done.stdout or "arXiv" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "Did you mean list?"),
        (["list", "all"], "no arguments"),
        (["run"], "Papers: other, toy-paper"),
        (["run", "--preset", "demo", "toy-paper"], "the paper comes first"),
        (["run", "toy-papr"], "Did you mean toy-paper?"),
        (["run", "zzz"], "Papers: other, toy-paper"),
        (["run", "toy-paper", "--preset", "smal"], "'demo', 'small'"),
        (["run", "toy-paper", "--preset"], "--preset"),
        (["run", "toy-paper", "--lerning-rate", "1"], "--learning-rate"),
        (["run", "toy-paper", "--seed", "one"], "--seed"),
        (["run", "toy-paper", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["run", "toy-paper", "--seed", "-1"], "--seed: expected a number from 0"),
        (["plan", "other"], "other has no plan"),
        (["plan", "toy-paper", "--btch", "1"], "--batch"),
    ],
)
def test_wrong_usage_is_status_2_with_a_hint_and_nothing_made(command, tmp_path, arguments, message):
    status, _, error = command(*arguments)
    assert status == 2
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_presets_values(command):
    status, out, _ = command("run", "toy_paper", "--preset", "small", "--help")
    assert status == 0
    assert "The optimizer's step size. (default: 0.003)" in out


def test_plan(command):
    assert command("plan", "toy-paper", "--batch", "3") == (0, "12 floats\n", "")


def test_preset_flags_and_default_folder(command, tmp_path):
    for _ in range(2):  # in the same second too
        assert (
            command("run", "toy_paper", "--preset=small", "--steps", "1", "--checkpoint_every", "7", "--seed", "5")[0]
            == 0
        )
    folders = list((tmp_path / "runs" / "toy-paper").iterdir())
    assert len(folders) == 2
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["preset"] == "small"
    assert config["config"] == {
        "seed": 5,
        "steps": 1,
        "learning_rate": 3e-3,
        "checkpoint_every": 7,
        "faults": [],
    }


def test_an_error_of_the_run_is_status_1_without_a_traceback(command, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, error = command("run", "toy-paper", "--out", "file")
    assert status == 1
    assert error.startswith("kernelab: the run folder file cannot be used")


def test_a_config_that_takes_the_commands_own_flags_is_refused(command):
    PAPERS["bad"] = Paper("bad", "", "", "", config="tests.experiment.test_cli:Bad", train="")
    try:
        status, _, error = command("run", "bad")
    finally:
        del PAPERS["bad"]
    assert status == 1
    assert "'seed'" in error


@dataclasses.dataclass(frozen=True)
class Bad:
    out: str = ""


PRESETS = {"demo": Bad()}


@pytest.mark.parametrize("paper", find_papers().values(), ids=lambda paper: paper.key)
def test_every_paper_keeps_the_contract(paper, capsys):
    config_type, presets = load(paper.config), load(paper.config.partition(":")[0] + ":PRESETS")
    assert dataclasses.is_dataclass(config_type)
    assert config_type.__dataclass_params__.frozen
    assert "demo" in presets
    assert all(type(preset) is config_type for preset in presets.values())
    for reference in filter(None, (paper.train, paper.plan)):
        assert importlib.util.find_spec(reference.partition(":")[0])
    assert main(["run", paper.name, "--help"]) == 0
    assert paper.arxiv in capsys.readouterr().out


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "kernelab", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kernelab {__version__}\n", "")
