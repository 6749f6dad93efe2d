"""Two gloo processes obtain what one obtains, and resume bitwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.papers import hydra_processes
from tests.papers.test_hydra_rlhf_run import arguments, records, write_rows

ROOT = Path(__file__).parents[2]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FLAGS = (
    "--batch-size 8 --gradient-accumulation-steps 2 --num-ppo-epochs 2 --normalize-rewards --ppo-steps 3 --rm-steps 4"
)


def launch(launcher, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, *launcher, hydra_processes.__file__, *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.mark.parametrize(
    "flags",
    [
        "--method all --gradient-checkpointing --target-kl 1e-3 --cost-steps 0",
        "--method j_hydra --single-forward --num-ppo-epochs 1 --num-mini-batches 1 --gradient-accumulation-steps 1",
    ],
)
def test_two_processes_obtain_what_one_does(tmp_path, data, flags):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, launcher in zip(folders, ([], TWO), strict=True):
        done = launch(launcher, *arguments(folder, data, *FLAGS.split(), *flags.split()))
        assert done.returncode == 0, done.stderr
    for mine, other in zip(*map(records, folders), strict=True):
        assert mine.pop("phase") == other.pop("phase")
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)  # sums of another order, in float32
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert [result["processes"] for result in results] == [1, 2]
    for name, wanted in results[0]["summary"]["methods"].items():
        found = results[1]["summary"]["methods"][name]
        for score in ("reward", "gold"):
            assert found[score] == pytest.approx(wanted[score], rel=1e-4, abs=1e-5)


def test_two_processes_resume_bitwise(tmp_path, data):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    flags = [*FLAGS.split(), "--cost-steps", "1"]
    assert launch(TWO, *arguments(folders[0], data, *flags)).returncode == 0
    killed = launch(TWO, *arguments(folders[1], data, *flags), "--kill-at", "ppo_hydra:1")
    assert killed.returncode != 0
    assert not (folders[1] / "results.json").exists()
    resumed = launch(TWO, "run", "hydra-rlhf", "--out", str(folders[1]), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert records(folders[0]) == records(folders[1])
    for name in ("actor", "critic"):
        adapters = [load_file(folder / "adapters" / name / "adapter_model.safetensors") for folder in folders]
        assert adapters[0].keys() == adapters[1].keys()
        assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_rows_that_do_not_divide_are_refused(tmp_path, data):
    done = launch(TWO, *arguments(tmp_path / "run", data, "--batch-size", "6", "--num-mini-batches", "2"))
    assert done.returncode != 0
    assert "batch_size" in done.stderr
    assert "a multiple of 4 with 2 processes" in done.stderr
