"""Whole runs at a tiny size: what they write, what they refuse, and that a kill costs nothing."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kernelab.experiment.cli import main
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.model import load_hydra
from kernelab.papers.hydra_rlhf.roles import METHODS
from kernelab.papers.hydra_rlhf.tokens import train_tokenizer

SIZES = "--prompt-length 12 --response-length 5 --vocab-size 600 --hidden-size 16 --num-hidden-layers 1 --lora-r 2"
LENGTHS = (
    "--held-out 0.3 --sft-steps 8 --sft-batch-size 4 --ppo-steps 6 --batch-size 6 --num-mini-batches 2 --cost-steps 1"
)
WORDS = ["path", "file", "name", "list", "node", "value", "text", "line", "size", "time"]


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)


def write_rows(path: Path) -> Path:
    rows = []
    for i, word in enumerate(WORDS * 4):
        other = WORDS[(i + 3) % 10]
        chosen, rejected = f"get the {word}", f"set a {other} to {i}"
        rows.append({"prompt": f"def get_{word}(self): return self.{word}{i}", "chosen": chosen, "rejected": rejected})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def arguments(folder: Path, data: Path | None, *more: str) -> list[str]:
    given = ["--data", str(data)] if data else []
    return ["run", "hydra-rlhf", "--out", str(folder), *SIZES.split(), *LENGTHS.split(), *given, *more]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def method_summary(folder: Path, method: str) -> dict:
    return json.loads((folder / "results.json").read_text())["summary"]["methods"][method]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(folder, data)) == 0
    return folder


def test_a_run_leaves_everything_it_promises(finished):
    result = json.loads((finished / "results.json").read_text())
    claims = {claim["name"]: claim for claim in result["claims"]}
    assert len(claims) == 7
    assert claims["Hydra-PPO leaves the sha256 of what does not train"]["passed"]
    assert claims["the policy ratio of Hydra-PPO is 1 before the first update"]["obtained"] < 1e-5
    assert result["summary"]["win_rate_against"] == "Hydra-SFT"
    assert result["summary"]["judge"] is None
    assert result["summary"]["methods"]["hydra"]["kl"] == records(finished)[-1]["kl"]
    (rate,) = result["summary"]["methods"]["hydra"]["win_rate"].items()
    assert rate[0] == "gold"
    assert 0 <= rate[1] <= 1
    lora, hydra = result["summary"]["costs"]
    assert hydra["states"] < lora["states"]
    assert set(hydra["seconds"]) == set(hydra["peaks"]) == {"answer", "score", "update"}
    assert {path.name for path in (finished / "figures").iterdir()} == {"hydra_sft.png", "ppo_hydra.png", "cost.png"}
    lines = records(finished)
    assert [line["step"] for line in lines if line["phase"] == "hydra_sft"] == list(range(8))
    ppo = [line for line in lines if line["phase"].startswith("ppo_")]
    assert [line["step"] for line in ppo] == list(range(6))
    assert {"reward", "kl", "gold", "entropy", "policy_loss", "value_loss", "clipped"} <= set(ppo[0])
    assert abs(ppo[0]["kl"]) < 1e-5
    assert any(abs(line["kl"]) > 1e-5 for line in ppo)


def test_the_model_and_its_adapters_load_elsewhere(finished):
    lm = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    tokens = torch.tensor([tokenizer("def get_path(self):")["input_ids"]])
    plain = lm(input_ids=tokens).logits
    adapted = peft.PeftModel.from_pretrained(lm, finished / "adapters" / "actor").eval()
    assert not torch.equal(adapted(input_ids=tokens).logits, plain)
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=tokens).logits, plain)


def test_ppo_goes_on_from_a_saved_model_without_sft(finished, tmp_path, data):
    flags = ["--model", str(finished / "model"), "--sft-steps", "0", "--ppo-steps", "1", "--cost-steps", "0"]
    assert main(arguments(tmp_path / "run", data, *flags)) == 0
    summaries = [method_summary(folder, "hydra") for folder in (finished, tmp_path / "run")]
    assert summaries[0]["ranking_accuracy"] == summaries[1]["ranking_accuracy"]
    assert summaries[0]["reward"]["before"] == pytest.approx(summaries[1]["reward"]["before"])


def kill_at(folder: Path, phase: str, step: int, arguments: list[str]) -> None:
    """Runs ``kernelab`` and kills it once it has logged this step."""
    program = [sys.executable, "-m", "kernelab", *arguments]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as process:
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            lines = (folder / "metrics.jsonl").read_bytes() if (folder / "metrics.jsonl").exists() else b""
            if f'"phase": "{phase}", "step": {step}'.encode() in lines:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize(("phase", "step"), [("hydra_sft", 4), ("ppo_hydra", 3)])
def test_a_killed_run_resumes_to_the_same_numbers(finished, tmp_path, data, phase, step):
    folder = tmp_path / "run"
    kill_at(folder, phase, step, arguments(folder, data))
    assert main(["run", "hydra-rlhf", "--out", str(folder), "--resume"]) == 0
    check_same(folder, finished)


def check_same(folder: Path, finished: Path) -> None:
    assert records(folder) == records(finished)
    mine, whole = (method_summary(place, "hydra") for place in (folder, finished))
    assert mine == whole
    for part in ("actor", "critic"):
        adapters = [place / "adapters" / part / "adapter_model.safetensors" for place in (folder, finished)]
        weights = [load_file(path) for path in adapters]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_twenty_kills_at_random_moments_cost_nothing(finished, tmp_path, data):
    moments, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        folder = tmp_path / str(runs)
        resume = ["run", "hydra-rlhf", "--out", str(folder), "--resume"]
        given = resume if (folder / "config.json").exists() else arguments(folder, data)
        with subprocess.Popen([sys.executable, "-m", "kernelab", *given], stdout=subprocess.DEVNULL) as process:
            try:
                assert process.wait(moments.uniform(3, 9)) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                continue
        check_same(folder, finished)
        runs += 1
    assert runs


ALL = (
    "--method all --ppo-steps 2 --rm-steps 4 --normalize-rewards --num-ppo-epochs 2 --target-kl 0.05 "
    "--adaptive-kl-target 0.5 --adaptive-kl-horizon 6"
)


@pytest.fixture(scope="module")
def all_methods(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs") / "all"
    costs = ["--cost-methods", "sft", *METHODS, "--cost-memory", "800000"]
    assert main(arguments(folder, data, *ALL.split(), *costs)) == 0
    return folder


def test_all_methods_side_by_side(all_methods):
    result = json.loads((all_methods / "results.json").read_text())
    assert result["summary"]["win_rate_against"] == "SFT"
    assert list(result["summary"]["methods"]) == list(METHODS)
    phases = dict.fromkeys(line["phase"] for line in records(all_methods))
    assert list(phases) == ["sft", "rm", "hydra_sft", *(f"ppo_{name}" for name in METHODS)]
    first = {line["phase"]: line for line in reversed(records(all_methods))}
    for name in METHODS:
        assert abs(first[f"ppo_{name}"]["kl"]) < 1e-5
        assert first[f"ppo_{name}"]["ratio_error"] < 1e-5
        weights = [line["kl_coef"] for line in records(all_methods) if line["phase"] == f"ppo_{name}"]
        assert weights == pytest.approx([0.05, 0.04])
    unmoved = [claim for claim in result["claims"] if "sha256" in claim["name"]]
    assert len(unmoved) == 5
    assert all(claim["passed"] for claim in unmoved)
    states = [cost["states"] for cost in result["summary"]["costs"]]
    sft, full, lora, dynamic, shared, hydra = states
    assert full > sft > dynamic
    assert full > lora > dynamic > hydra > shared
    assert len(result["summary"]["costs_at_largest_batch"]) == 6
    for largest in result["summary"]["costs_at_largest_batch"]:
        a_row = (largest["peak"] - largest["states"]) / largest["batch"]  # answers end elsewhere in every step
        assert a_row > 0
        assert largest["peak"] <= 800_000 + a_row
        assert largest["batch"] > 1
    names = {path.parent.name for path in (all_methods / "adapters").rglob("adapter_model.safetensors")}
    assert names == {"actor", "critic", "shared"}
    AutoModelForCausalLM.from_pretrained(all_methods / "adapters" / "ppo" / "actor")


@pytest.mark.parametrize(("phase", "step"), [("rm", 2), ("ppo_dynamic", 0)])
def test_a_killed_run_of_all_methods_resumes(all_methods, tmp_path, data, phase, step):
    folder = tmp_path / "run"
    kill_at(folder, phase, step, arguments(folder, data, *ALL.split(), "--cost-steps", "0"))
    assert main(["run", "hydra-rlhf", "--out", str(folder), "--resume"]) == 0
    assert records(folder) == records(all_methods)
    for name in METHODS:
        assert method_summary(folder, name) == method_summary(all_methods, name)


def test_lora_ppo_from_hydra_sft_learns_the_same(finished, tmp_path, data):
    flags = f"--method lora --model {finished / 'model'} --sft-steps 0 --rm-steps 0 --ppo-steps 1 --cost-steps 0"
    assert main(arguments(tmp_path / "run", data, *flags.split())) == 0
    mine, other = (method_summary(tmp_path / "run", "lora"), method_summary(finished, "hydra"))
    assert mine["ranking_accuracy"] == other["ranking_accuracy"]
    assert mine["reward"]["before"] == pytest.approx(other["reward"]["before"], abs=1e-5)


@pytest.fixture
def saved_gpt2(tmp_path):
    """A model with dropout and its tokenizer, which has no padding token."""
    tokenizer = train_tokenizer(["def get_path(self): return the path"], 600)
    tokenizer.pad_token = None
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 17}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_causal_lm_by_path_without_a_padding_token(saved_gpt2, tmp_path, data):
    flags = ["--model", str(saved_gpt2), "--cost-steps", "0", "--sft-steps", "2", "--ppo-steps", "2"]
    assert main(arguments(tmp_path / "run", data, *flags)) == 0
    lm, _, head = load_hydra(str(tmp_path / "run" / "model"), 17)
    assert type(lm).__name__ == "GPT2LMHeadModel"
    assert head.weight.shape == (1, 16)
    with pytest.raises(ValueError, match="17 tokens"):
        load_hydra(str(tmp_path / "run" / "model"), 18)


def test_a_loaded_model_computes_the_same_in_training_mode(saved_gpt2):
    lm, _, _ = load_hydra(str(saved_gpt2), 17)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(lm.eval()(input_ids=tokens).logits, lm.train()(input_ids=tokens).logits)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(saved_gpt2):
    tokenizer = AutoTokenizer.from_pretrained(saved_gpt2)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(saved_gpt2)
    with pytest.raises(ValueError, match=rf"at most its {len(tokenizer) - 1} tokens, got {len(tokenizer)}"):
        load_hydra(str(saved_gpt2), 17)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["hydra", "ppo"])
def test_16_bits_run(tmp_path, data, dtype, method):
    flags = f"--dtype {dtype} --method {method} --cost-steps 0 --sft-steps 2 --rm-steps 2 --ppo-steps 2"
    assert main(arguments(tmp_path / "run", data, *flags.split())) == 0


def rewards(prompts, answers):
    """A reward for the run below."""
    assert all("return self . " in prompt for prompt in prompts)
    return [len(answer) / 100 for answer in answers]


def test_a_python_function_as_the_reward(tmp_path, data, monkeypatch):
    flags = f"--reward {__name__}:rewards --method lora --rm-steps 0 --cost-steps 0 --ppo-steps 2"
    assert main(arguments(tmp_path / "run", data, *flags.split())) == 0
    assert method_summary(tmp_path / "run", "lora")["ranking_accuracy"] is None
    assert {line["phase"] for line in records(tmp_path / "run")} == {"sft", "ppo_lora"}
    assert not (tmp_path / "run" / "reward_model").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--sft-steps", "0"], "no reward head"),
        (["--method", "lora", "--rm-steps", "0"], "no reward head"),
        (["--reward", "no.such.module:function"], "no.such.module"),
        (["--reward", "json"], "package.module:function"),
        (["--judge", "no.such.module:function"], "'judge': expected package.module:function"),
        (["--reward-model-path", "no/such/folder"], "no/such/folder"),
        (["--single-forward"], "num_mini_batches"),
        (["--detach-value"], "j_hydra"),
        (["--target-kl", "0"], "target_kl"),
        (["--adaptive-kl-target", "0"], "adaptive_kl_target"),
        (["--adaptive-kl-target", "6", "--adaptive-kl-horizon", "5"], "at least batch_size=6"),
        (["--adaptive-kl-target", "6", "--kl-coef", "0"], "kl_coef"),
        (["--lam", "1.5"], "lam"),
        (["--learning-rate", "0"], "learning_rate"),
        (["--num-mini-batches", "4"], "equal parts of batch_size=6"),
        (["--target-modules", "q_prj"], "q_prj"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, data, capsys, flags, message):
    assert main(arguments(tmp_path / "run", data, *flags)) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(("phase", "name"), [("hydra_sft", "pair"), ("ppo_hydra", "value_loss")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data, capsys, monkeypatch, phase, name):
    nan = torch.tensor(math.nan, requires_grad=True)
    loss = "sft.pair_loss" if name == "pair" else "optimise.value_loss"
    monkeypatch.setattr(f"kernelab.papers.hydra_rlhf.{loss}", lambda value, *args: (value * nan).sum())
    assert main(arguments(tmp_path / "run", data, "--cost-steps", "0")) != 0
    error = capsys.readouterr().err
    assert f"{name} = nan" in error
    assert "step 0" in error
    last = records(tmp_path / "run")[-1]
    assert (last["phase"], last["step"], last[name]) == (phase, 0, "nan")


def test_the_config_names_what_is_wrong():
    for field, value in [
        ("temperature", 0),
        ("kl_coef", -0.1),
        ("held_out", 1.0),
        ("hidden_size", 130),
        ("response_length", 1),
    ]:
        with pytest.raises(ValueError, match=field):
            Config(**{field: value})
