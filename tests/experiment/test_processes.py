"""Two gloo processes: one folder, one line a step, and a resume that is bitwise the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernelab._core.errors import KernelabError
from kernelab.experiment.device import accelerator
from tests.experiment import sharded, toy

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*LAUNCH, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=600
    )


def test_two_processes_write_one_run_and_resume_it(tmp_path):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    flags = ["--steps", "6", "--checkpoint-every", "2"]
    whole = launch(toy.__file__, "run", "toy-paper", "--out", str(folders[0]), *flags)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("pigs fly") == 1
    killed = launch(toy.__file__, "run", "toy-paper", "--out", str(folders[1]), *flags, "--faults", "SIGKILL@tune:2")
    assert killed.returncode != 0
    assert '"phase": "tune", "step": 2' in (folders[1] / "metrics.jsonl").read_text()
    resumed = launch(toy.__file__, "run", "toy-paper", "--out", str(folders[1]), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    records = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [*range(7), *range(7)]
    for name in ("metrics.jsonl", "final.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    results = json.loads((folders[1] / "results.json").read_text())
    assert results["processes"] == 2


def test_a_refusal_is_said_once_and_ends_every_process(tmp_path):
    (tmp_path / "file").write_text("")
    done = launch(toy.__file__, "run", "toy-paper", "--out", str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("holds no run") == 1


def test_without_accelerate_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(KernelabError, match=r"pip install 'kernelab\[rlhf\]'"):
        accelerator()


def test_sharded_state_is_saved_whole_and_resumed(tmp_path):
    done = launch("-m", sharded.__name__, str(tmp_path))
    assert done.returncode == 0, done.stderr
