"""The run folder, and what a kill and a resume may and may not change."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kernelab._core.errors import KernelabError
from kernelab.experiment.cli import main
from kernelab.experiment.run import Run
from tests.experiment import toy

PAPERS = {toy.PAPER.key: toy.PAPER}


def run(folder, *flags):
    return main(["run", "toy-paper", "--out", str(folder), *flags], PAPERS)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder) == 0
    return folder


def assert_as_if_undisturbed(folder, whole):
    for name in ("metrics.jsonl", "final.safetensors", "figures/loss.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    claims = [json.loads((one / "results.json").read_text())["claims"] for one in (folder, whole)]
    assert claims[0] == claims[1]


def test_a_run_leaves_the_folder_that_was_promised(whole):
    names = {path.name for path in whole.iterdir()}
    assert {name for name in names if name[0] != "."} == {
        "config.json",
        "metrics.jsonl",
        "timing.jsonl",
        "results.json",
        "figures",
        "checkpoints",
        "final.safetensors",
    }
    results = json.loads((whole / "results.json").read_text())
    assert {"name": "pigs fly", "expected": True, "obtained": False, "passed": False} in results["claims"]
    assert results["seeds"] == [0]
    assert results["wall_seconds"] > 0
    assert results["peak_memory"]["rss_bytes"] > 2**24
    assert results["versions"]["torch"]
    assert results["summary"]["best"] == results["claims"][0]["obtained"]
    steps = [
        (record["phase"], record["step"])
        for record in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    ]
    assert steps == [(phase, step) for phase in ("fit", "tune") for step in range(13)]


def test_killed_in_each_phase_and_resumed_it_is_the_same_run(whole, tmp_path):
    folder = tmp_path / "killed"
    faults = ["--faults", "SIGKILL@fit:5", "SIGKILL@tune:6"]
    for flags in (faults, ["--resume"]):
        killed = subprocess.run(
            [sys.executable, toy.__file__, "run", "toy-paper", "--out", folder, *flags],
            capture_output=True,
            check=False,
        )
        assert killed.returncode == -9, killed.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {**json.loads(lines[-1]), "phase": "tune", "step": 6}  # past the checkpoint at 4
    assert run(folder, "--resume") == 0
    assert_as_if_undisturbed(folder, whole)


def test_killed_before_the_first_checkpoint_it_begins_again(whole, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"phase": "fit", "step": 0, "loss"')
    assert run(tmp_path, "--resume") == 0
    assert_as_if_undisturbed(tmp_path, whole)


def test_resume_of_nothing_begins(whole, tmp_path):
    assert run(tmp_path / "new", "--resume") == 0
    assert_as_if_undisturbed(tmp_path / "new", whole)


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(whole, tmp_path, capfd):
    folder = tmp_path / "stopped run"
    assert run(folder, "--faults", "SIGINT@fit:5", "SIGINT@tune:1") == 130
    assert f"Go on with: kernelab run toy-paper --out '{folder}' --resume" in capfd.readouterr().err
    assert (folder / "checkpoints" / "fit-00000006").is_dir()
    assert run(folder, "--resume") == 130
    assert run(folder, "--resume") == 0
    assert_as_if_undisturbed(folder, whole)


def test_a_fresh_run_never_enters_a_folder_in_use(whole, tmp_path, capsys):
    before = files(whole)
    assert run(whole) == 1
    assert "--resume" in capsys.readouterr().err
    assert files(whole) == before
    (tmp_path / "thesis.txt").write_text("mine")
    for flags in ([], ["--resume"]):
        assert run(tmp_path, *flags) == 1
        assert "holds no run" in capsys.readouterr().err
    assert files(tmp_path) == {"thesis.txt": b"mine"}


def test_resume_with_another_config_names_what_changed(whole, capsys):
    before = files(whole)
    assert run(whole, "--resume", "--steps", "13", "--learning-rate", "0.5") == 1
    error = capsys.readouterr().err
    assert "steps: 12 -> 13" in error
    assert "learning_rate: 0.01 -> 0.5" in error
    assert "seed" not in error
    assert run(whole, "--resume", "--preset", "small") == 1
    assert "steps: 12 -> 40" in capsys.readouterr().err
    other = {"other": dataclasses.replace(toy.PAPER, key="other")}
    assert main(["run", "other", "--out", str(whole), "--resume"], other) == 1
    assert 'paper: "toy_paper" -> "other"' in capsys.readouterr().err
    assert files(whole) == before


def test_resume_of_a_finished_run_shows_its_results_again(whole, capsys):
    before = files(whole)
    assert run(whole, "--resume") == 0
    out = capsys.readouterr().out
    assert "pigs fly" in out
    assert "not reproduced" in out
    assert files(whole) == before


def test_resume_without_a_folder_takes_the_newest_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "toy-paper", "--resume"], PAPERS) == 1
    assert "no run to resume" in capsys.readouterr().err
    assert main(["run", "toy-paper", "--steps", "1"], PAPERS) == 0
    assert main(["run", "toy-paper", "--steps", "2", "--faults", "SIGINT@fit:0"], PAPERS) == 130
    assert main(["run", "toy-paper", "--resume"], PAPERS) == 0
    counts = [len(path.read_text().splitlines()) for path in sorted(Path("runs/toy-paper").glob("*/metrics.jsonl"))]
    assert sorted(counts) == [4, 6]


def test_one_folder_takes_one_run_at_a_time(tmp_path, capsys):
    program = (
        "import pathlib, sys; from kernelab.experiment.folder import held\n"
        "with held(pathlib.Path(sys.argv[1]), {}, resume=False): sys.stdout.write('in\\n'); sys.stdout.flush(); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with other:
        assert other.stdout.readline() == b"in\n"
        (tmp_path / "config.json").unlink()
        assert run(tmp_path) == 1
        assert "another process is running" in capsys.readouterr().err
        other.kill()
    assert run(tmp_path) == 0


@pytest.fixture
def bare(tmp_path):
    with Run(tmp_path, toy.Config(), paper="toy_paper") as made:
        yield made


def test_misuse_of_a_run_is_explained(bare):
    with pytest.raises(KernelabError, match="begins with run"):
        bare.save(0, {})
    with pytest.raises(KernelabError, match="loop"):
        bare.should_checkpoint(0)
    bare.restore({}, "fit")
    with pytest.raises(KernelabError, match="'fit' was begun already"):
        bare.restore({}, "fit")
    with pytest.raises(ValueError, match="phase"):
        bare.restore({}, "a b")
    for _ in bare.steps(0, 1):
        with pytest.raises(KernelabError, match="still running"):
            bare.steps(0, 1)
        with pytest.raises(ValueError, match="every"):
            bare.should_checkpoint(0, every=0)


def test_a_loop_that_was_left_does_not_block_the_next(bare):
    for _ in bare.steps(0, 5):
        break
    assert list(bare.steps(3, 5)) == [3, 4]


def test_checkpoints_are_due_at_intervals_and_at_the_end(bare):
    assert [step for step in bare.steps(0, 10) if bare.should_checkpoint(step, every=4)] == [3, 7, 9]
    assert len([step for step in bare.steps(0, 400) if bare.should_checkpoint(step)]) == 20


@pytest.mark.parametrize(("moment", "saved"), [("before", [3]), ("after", [4]), ("last", [9])])
def test_ctrl_c_at_any_moment_of_a_step_ends_with_a_checkpoint(bare, moment, saved):
    due = []

    def loop():
        for step in bare.steps(0, 10):
            if (moment, step) == ("before", 3):
                signal.raise_signal(signal.SIGINT)
            if bare.should_checkpoint(step, every=100):
                due.append(step)
            if (moment, step) in (("after", 3), ("last", 9)):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert due == saved
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_ends_a_loop_that_saves_nothing(bare):
    done = []

    def loop():
        for step in bare.steps(0, 10):
            signal.raise_signal(signal.SIGINT)
            done.append(step)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert done == [0, 1]


def test_a_second_ctrl_c_stops_at_once(bare):
    def loop():
        for step in bare.steps(0, 10):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError(f"step {step} went on")

    with pytest.raises(KeyboardInterrupt):
        loop()


def test_state_with_other_entries_is_refused(tmp_path):
    with Run(tmp_path, toy.Config(), paper="toy_paper") as first:
        first.restore({"best": 1})
        first.save(3, {"best": 1})
    with Run(tmp_path, toy.Config(), paper="toy_paper") as second, pytest.raises(ValueError, match=r"'best'.*'worst'"):
        second.restore({"worst": 1})


def test_wall_time_and_peak_memory_add_up_over_resumes(tmp_path):
    with Run(tmp_path, toy.Config(), paper="toy_paper") as first:
        first.restore({})
        first.save(3, {})
    state = next((tmp_path / "checkpoints").iterdir()) / "state.json"
    info = json.loads(state.read_text())["info"]
    assert 0 < info["wall_seconds"] < 60
    with Run(tmp_path, toy.Config(), paper="toy_paper") as second:
        assert second.restore({}) == 4
        results = second.finish()
    assert results["wall_seconds"] > info["wall_seconds"]
    assert results["peak_memory"]["rss_bytes"] >= info["peak_memory"]["rss_bytes"]
