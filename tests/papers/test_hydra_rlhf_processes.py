"""Two gloo processes obtain what one obtains, with DDP and with FSDP2, and resume bitwise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kernelab._core.errors import KernelabError
from kernelab.experiment.checkpoint import Checkpoints
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.train import train
from tests.papers import hydra_processes, hydra_sharded
from tests.papers.test_hydra_rlhf_run import arguments, records, write_rows

ROOT = Path(__file__).parents[2]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what `accelerate launch` sets
FLAGS = (
    "--batch-size 8 --gradient-accumulation-steps 2 --num-ppo-epochs 2 --normalize-rewards --ppo-steps 3 --rm-steps 4"
    " --eval-prompts 5 --adaptive-kl-target 0.5 --adaptive-kl-horizon 20"
)


def launch(launcher, *arguments, program=(hydra_processes.__file__,), **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    program = [sys.executable, *launcher, *program, *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=600)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.mark.parametrize(
    "flags",
    [
        "--method all --gradient-checkpointing --target-kl 1e-3 --cost-steps 0",
        "--method j_hydra --single-forward --num-ppo-epochs 1 --num-mini-batches 1 --gradient-accumulation-steps 1"
        " --cost-steps 0 --judge hydra_processes:longer",
    ],
)
def test_two_processes_obtain_what_one_does(tmp_path, data, flags):
    one, *others = folders = [tmp_path / "one", tmp_path / "ddp", tmp_path / "fsdp"]
    for folder, launcher, variables in zip(folders, ([], TWO, TWO), ({}, {}, FSDP), strict=True):
        done = launch(launcher, *arguments(folder, data, *FLAGS.split(), *flags.split()), **variables)
        assert done.returncode == 0, done.stderr
    for folder in others:
        check_same_numbers(folder, one)
        check_same_weights(folder / "adapters", one / "adapters")


def check_same_numbers(folder, one):
    for mine, other in zip(records(folder), records(one), strict=True):
        assert mine.pop("phase") == other.pop("phase")
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)  # sums of another order, in float32
    found, wanted = (json.loads((place / "results.json").read_text()) for place in (folder, one))
    assert (found["processes"], wanted["processes"]) == (2, 1)
    assert all(claim["passed"] for claim in found["claims"] if "sha256" in claim["name"])
    for name, numbers in wanted["summary"]["methods"].items():
        for score in ("reward", "gold", "win_rate"):
            assert found["summary"]["methods"][name][score] == pytest.approx(numbers[score], rel=1e-4, abs=1e-5)


def check_same_weights(folder, one):
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert files
    for file in files:
        mine, other = load_file(folder / file), load_file(one / file)
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("variables", "cost_steps"), [({}, 1), (FSDP, 0)], ids=["ddp", "fsdp"])
def test_two_processes_resume_bitwise(tmp_path, data, variables, cost_steps):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    flags = [*FLAGS.split(), "--cost-steps", str(cost_steps)]
    assert launch(TWO, *arguments(folders[0], data, *flags), **variables).returncode == 0
    killed = launch(TWO, *arguments(folders[1], data, *flags), "--kill-at", "ppo_hydra:1", **variables)
    assert killed.returncode != 0
    assert not (folders[1] / "results.json").exists()
    resumed = launch(TWO, "run", "hydra-rlhf", "--out", str(folders[1]), "--resume", **variables)
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


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What one process obtains, by method, in a folder where two have written what they obtained with FSDP."""
    folder = tmp_path_factory.mktemp("sharded")
    found = {}
    for method in hydra_sharded.CASES:
        ppo = hydra_sharded.start(method)
        trunks = list(ppo.roles.trunks.named_parameters())
        layers = sum(p.nbytes for name, p in trunks if ".layers." in name or ".h." in name)
        found[method] = {"layers": layers, "rest": sum(p.nbytes for _, p in trunks) - layers}
        found[method] |= {"digest": ppo.roles.base_digest(), "first": hydra_sharded.update(ppo)}
        Checkpoints(folder / "one").save(method, 1, hydra_sharded.state_of(ppo))
        ppo.roles.save(folder / "one" / method)
        found[method]["answers"] = [hydra_sharded.sampled(ppo, index).tokens.tolist() for index in range(2)]
        found[method]["second"] = hydra_sharded.update(ppo)
    done = launch([*TWO, "-m"], str(folder), program=(hydra_sharded.__name__,), **FSDP)
    assert done.returncode == 0, done.stderr
    return folder, found


@pytest.mark.parametrize("method", hydra_sharded.CASES)
def test_each_process_holds_half_of_the_layers(sharded, method):
    folder, one = sharded
    for layers, rest in json.loads((folder / f"{method}.json").read_text())["bytes"]:
        assert rest == one[method]["rest"]
        assert layers == pytest.approx(one[method]["layers"] / 2, rel=0.1)  # rows that do not divide by two


@pytest.mark.parametrize("method", hydra_sharded.CASES)
def test_sharded_trunks_learn_what_whole_ones_do(sharded, method):
    folder, one = sharded
    two, one = json.loads((folder / f"{method}.json").read_text()), one[method]
    assert two["digest"] == one["digest"]
    assert two["answers"] == one["answers"]
    for step in ("first", "second"):
        assert two[step] == pytest.approx(one[step], rel=1e-5, abs=1e-6)
    check_same_weights(folder / "two" / method, folder / "one" / method)


@pytest.mark.parametrize("method", hydra_sharded.CASES)
def test_a_checkpoint_is_the_same_on_any_number_of_processes(sharded, method):
    folder, one = sharded
    two = json.loads((folder / f"{method}.json").read_text())
    assert two["second after two"] == two["second"]
    assert two["second after one"] == pytest.approx(one[method]["second"], rel=1e-5, abs=1e-6)
    ppo = hydra_sharded.start(method)
    hydra_sharded.load(ppo, Checkpoints(folder / "two").newest(method).load())
    assert hydra_sharded.update(ppo) == pytest.approx(one[method]["second"], rel=1e-5, abs=1e-6)


def test_accelerate_launch_shards_trunks(tmp_path, data):
    one = launch([], *arguments(tmp_path / "one", data, "--ppo-steps", "1", "--cost-steps", "0"))
    assert one.returncode == 0, one.stderr
    flags = ["--model", str(tmp_path / "one" / "model"), "--sft-steps", "0", "--cost-steps", "0", "--batch-size", "8"]
    options = "--num_processes 2 --main_process_port 0 --use_fsdp --fsdp_version 2 -m kernelab"
    launcher = ["-m", "accelerate.commands.launch", *options.split()]
    done = launch(launcher, *arguments(tmp_path / "two", data, *flags), program=())
    assert done.returncode == 0, done.stderr
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    adapted = peft.PeftModel.from_pretrained(lm, tmp_path / "two" / "adapters" / "actor").eval()
    tokens = torch.arange(8)[None]
    with adapted.disable_adapter():
        plain = adapted(input_ids=tokens).logits
    assert not torch.equal(adapted(input_ids=tokens).logits, plain)


@pytest.mark.parametrize(
    ("settings", "version", "message"),
    [
        ({}, "2", "'cost_steps': expected 0 with FSDP"),
        ({"cost_steps": 0, "dtype": "float16"}, "2", "'dtype': expected bfloat16 or float32 with FSDP"),
        ({"cost_steps": 0, "load_in_4bit": True}, "2", "'load_in_4bit': expected False with FSDP"),
        ({"cost_steps": 0, "optim": "adamw_8bit"}, "2", "'optim': expected adamw_torch with FSDP"),
        ({"cost_steps": 0}, "1", "--fsdp_version 2"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(monkeypatch, settings, version, message):
    for name, value in (FSDP | {"WORLD_SIZE": "2", "FSDP_VERSION": version}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KernelabError, match=re.escape(message)):
        train(Config(**settings), None)
