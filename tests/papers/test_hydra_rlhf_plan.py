"""The planner's bytes are those of a real run; what it recommends fits, and the next larger setting does not."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, T5Config

from benchmarks.memory import hydra as hydra_memory
from kernelab.experiment.cli import main
from kernelab.papers.hydra_rlhf import plan as planner
from kernelab.papers.hydra_rlhf.config import PRESETS, Config
from kernelab.papers.hydra_rlhf.cost import live_memory, seconds
from kernelab.papers.hydra_rlhf.fit import most_rows
from kernelab.papers.hydra_rlhf.model import mixed_precision, new_reward_head
from kernelab.papers.hydra_rlhf.optimise import PPO
from kernelab.papers.hydra_rlhf.plan import largest_batch, smaller
from kernelab.papers.hydra_rlhf.predict import model_sizes, predict
from kernelab.papers.hydra_rlhf.roles import METHODS, Roles
from kernelab.papers.hydra_rlhf.sft import Supervision
from kernelab.papers.hydra_rlhf.task import Rows
from kernelab.papers.hydra_rlhf.tokens import Sequences
from tests.papers.test_hydra_rlhf_run import arguments, write_rows

SIZES = {"vocab_size": 500, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LENGTHS = {"prompt_length": 12, "response_length": 6, "batch_size": 8, "num_mini_batches": 2}


def settings(**changed) -> Config:
    return Config(**{**SIZES, **LENGTHS, "lora_r": 4, "sft_batch_size": 3, **changed})


def ppo_and_prompts(
    config: Config, reward: torch.nn.Module | None = None
) -> tuple[PPO, tuple[torch.Tensor, torch.Tensor]]:
    """A trainer whose answers do not end early, and a batch for it."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(model_sizes(config), dtype=getattr(torch, config.dtype)).eval()
    roles = Roles(METHODS[config.method], lm, new_reward_head(lm), config, reward_function=reward)
    never = SimpleNamespace(end=-1, pad=0, response_length=config.response_length)
    tokens = torch.randint(config.vocab_size, (config.batch_size, config.prompt_length))
    mask = torch.arange(config.prompt_length) > torch.arange(config.batch_size)[:, None] % 2  # some are shorter
    return PPO(roles, never, config), (tokens, mask)


def supervision_and_pairs(config: Config, stage: str) -> tuple[Supervision, tuple[Sequences, Sequences]]:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(model_sizes(config), dtype=torch.float32).eval()
    tokens = torch.randint(config.vocab_size, (20, config.prompt_length + config.response_length))
    mask = torch.arange(config.prompt_length) > torch.arange(20)[:, None] % 2
    answers = tokens[:, config.prompt_length :]
    columns = (tokens[:, : config.prompt_length], mask), *2 * [(answers, torch.ones_like(answers, dtype=torch.bool))]
    pairs = Rows(*columns, [""] * 20).pairs(slice(config.sft_batch_size))
    return Supervision(config, stage, lm, new_reward_head(lm)), pairs


def measured(config: Config, reward: torch.nn.Module | None = None) -> dict[str, int]:
    """Peak bytes of the parts of the second step of a real run."""
    with mixed_precision(config, torch.device("cpu")):
        ppo, prompts = ppo_and_prompts(config, reward)
        seconds(ppo, prompts)  # makes the optimizer's state
        return live_memory(ppo, prompts)[1]


CASES = [
    *(settings(method=name) for name in METHODS),
    *(settings(method=name, dtype="bfloat16") for name in METHODS),
    settings(dtype="float16"),
    settings(batch_size=40, num_mini_batches=1),
    settings(batch_size=4, num_mini_batches=4, lora_r=1),
    settings(prompt_length=60, response_length=4),
    settings(prompt_length=4, response_length=40),
    settings(prompt_length=4, response_length=40, local_rollout_forward_batch_size=3),
    settings(batch_size=24, gradient_accumulation_steps=3, num_ppo_epochs=2),
    settings(method="lora", batch_size=24, gradient_accumulation_steps=6),
    settings(lora_r=40, target_modules=("q_proj", "v_proj")),
    settings(method="dynamic", vocab_size=3000),
    settings(gradient_checkpointing=True, num_hidden_layers=4),
    settings(method="ppo", gradient_checkpointing=True, dtype="bfloat16"),
    settings(method="j_hydra", num_mini_batches=1, single_forward=True),
    settings(method="j_hydra", detach_value=True, prompt_length=30),
    settings(optim="adamw_bnb_8bit", lora_r=90),
    settings(optim="adamw_bnb_8bit", method="ppo", dtype="float16"),
    *(settings(load_in_4bit=True, method=name) for name in ("ppo", "lora", "hydra")),
    settings(load_in_4bit=True, method="dynamic", dtype="bfloat16", prompt_length=30),
    settings(load_in_4bit=True, gradient_checkpointing=True, num_hidden_layers=4),
    settings(load_in_4bit=True, hidden_size=128, prompt_length=3, response_length=3, batch_size=2),
    settings(load_in_4bit=True, optim="adamw_8bit", lora_r=90, dtype="float16", recompute_activations=False),
]


def changes(config: Config) -> str:
    usual = settings()
    return ",".join(f"{name}={value}" for name, value in vars(config).items() if value != getattr(usual, name))


@pytest.mark.parametrize("config", CASES, ids=changes)
def test_the_plan_is_what_a_real_step_of_ppo_holds(config):
    found = predict(replace(config, sft_steps=0, rm_steps=0))
    assert found.totals == pytest.approx(measured(config), rel=0.01)


@pytest.mark.parametrize("stage", ["hydra_sft", "sft", "rm"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "sft_batch_size": 7},
        {"muon_learning_rate": 0.0, "prompt_coef": 0.0},
        {"muon_learning_rate": 0.0, "optim": "adamw_bnb_8bit"},
        {"gradient_checkpointing": True, "num_hidden_layers": 4},
    ],
)
def test_the_plan_is_what_a_real_step_of_supervised_training_holds(stage, changes):
    config = settings(method="hydra" if stage == "hydra_sft" else "dynamic", **changes)
    with mixed_precision(config, torch.device("cpu")):
        supervision, pairs = supervision_and_pairs(config, stage)
        seconds(supervision, pairs)  # makes the optimizers' state
        expected = live_memory(supervision, pairs)[1]["update"]
    if stage == "rm":
        expected += sum(p.numel() * 4 for p in supervision.module.lm.parameters())  # the SFT model waits for PPO
    assert predict(config).totals[stage] == pytest.approx(expected, rel=0.02)


def test_every_byte_has_its_kind():
    config = settings(method="lora")
    kinds = predict(config).parts["update"]
    lm = AutoModelForCausalLM.from_config(model_sizes(config))
    roles = Roles(METHODS["lora"], lm, new_reward_head(lm), config)
    size = {name: p.numel() * p.element_size() for name, p in roles.named_parameters()}
    buffers = sum(b.numel() * b.element_size() for b in roles.buffers())
    adapters = sum(size[name] for name in size if "lora_" in name)
    trained = [p for p in roles.parameters() if p.requires_grad]
    assert kinds["adapters"] == adapters > 0
    assert kinds["weights"] == sum(size.values()) - adapters + buffers
    assert kinds["optimizer state"] == sum(2 * p.numel() * 4 + 4 for p in trained)  # two moments and the step
    whole = predict(settings(prompt_length=2, response_length=2, sft_batch_size=1, muon_learning_rate=0.0))
    kinds = whole.parts["hydra_sft"]
    assert kinds["gradients"] == pytest.approx(kinds["optimizer state"] / 2, rel=1e-3)  # all, before the step
    answer = predict(settings(prompt_length=4, response_length=40)).parts["answer"]
    assert answer["KV cache"] >= 2 * 2 * 8 * 43 * 48 * 4  # layers, keys and values, rows, tokens before the last, width
    assert set(answer) <= set(planner.KINDS)


def test_a_prediction_repeats_and_leaves_no_trace():
    state = torch.get_rng_state()
    assert predict(settings()) == predict(settings())
    assert torch.equal(torch.get_rng_state(), state)
    assert type(torch.ones(1)) is torch.Tensor


def test_a_model_by_path_and_one_that_is_not_there(tmp_path):
    GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64).save_pretrained(tmp_path)
    config = settings(model=str(tmp_path), sft_steps=0)
    assert predict(config).totals == pytest.approx(measured(replace(config, vocab_size=300)), rel=0.01)
    with pytest.raises(ValueError, match="'prompt_length': expected at most 64 tokens"):
        predict(replace(config, prompt_length=60))
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="a causal language model"):
        predict(settings(model=str(tmp_path / "t5")))
    with pytest.raises(ValueError, match=r"'load_in_4bit'.*Conv1D"):
        predict(replace(config, load_in_4bit=True))
    with pytest.raises(ValueError, match="llama-7b"):
        predict(settings(model="llama-7"))


def test_seven_billion_parameters_take_no_memory_here():
    config = Config(model="llama-7b", dtype="bfloat16", lora_r=16, batch_size=1, num_mini_batches=1, sft_steps=0)
    kinds = predict(config).parts["update"]
    assert kinds["weights"] == pytest.approx(2 * 6.738e9, rel=1e-3)
    assert kinds["adapters"] == 4 * 2 * 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert kinds["optimizer state"] == pytest.approx(2 * kinds["adapters"], rel=1e-3)
    packed = predict(replace(config, load_in_4bit=True, optim="adamw_8bit")).parts["update"]
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    scales = 1 / 64 + 4 / (64 * 256)  # a byte for each 64 weights, 4 for each 256 bytes
    assert packed["weights"] == pytest.approx(2 * (6.738e9 - linear) + linear * (1 / 2 + scales), rel=1e-3)
    assert packed["adapters"] == kinds["adapters"]
    assert packed["optimizer state"] == pytest.approx((2 + 8 / 256) / 4 * kinds["adapters"], rel=1e-3)


@given(
    states=st.integers(0, 1000),
    lines=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)), min_size=1, max_size=4),
    jumps=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 2000)), max_size=3),
    memory=st.integers(1, 5000),
    start=st.integers(1, 40),
)
def test_the_search_ends_at_the_most_rows(states, lines, jumps, memory, start):
    def peak(rows: int) -> int:
        working = max(above + slope * rows for above, slope in lines)
        return states + working + sum(size for at, size in jumps if rows >= at)

    fits = most_rows(peak, memory, start)
    assert fits == 0 or peak(fits) <= memory
    assert peak(fits + 1) > memory


def test_the_largest_batch_takes_few_predictions(monkeypatch):
    asked = []
    monkeypatch.setattr(planner, "predict", lambda config: asked.append(config) or predict(config))
    found = largest_batch(settings(num_mini_batches=1), 40e6)
    assert len(asked) <= 5
    assert found.peak <= 40e6 < predict(replace(found.config, batch_size=found.config.batch_size + 1)).peak
    assert largest_batch(settings(), 5e5) is None


@pytest.mark.parametrize(
    ("config", "part", "changed"),
    [
        (settings(batch_size=24, num_mini_batches=1), "update", {"gradient_accumulation_steps": 2}),
        (settings(batch_size=2, num_hidden_layers=6, sft_steps=0), "update", {"gradient_checkpointing": True}),
        (
            settings(batch_size=96, num_mini_batches=48, vocab_size=3000),
            "answer",
            {"local_rollout_forward_batch_size": 48},
        ),
        (settings(sft_batch_size=64), "hydra_sft", {"sft_batch_size": 32}),
        (settings(batch_size=24, num_mini_batches=1, single_forward=True), "update", {"batch_size": 12}),
    ],
)
def test_the_next_smaller_setting(config, part, changed):
    now, wanted = predict(config), predict(replace(config, **changed))
    assert max(now.totals, key=now.totals.__getitem__) == part
    assert wanted.peak < now.peak
    assert smaller(now, wanted.peak) == wanted


def test_smaller_settings_come_one_after_the_other_until_none_is_left():
    now = predict(settings(batch_size=6, num_mini_batches=1, sft_batch_size=4))
    found = smaller(now, 1.3e6)
    assert found.peak <= 1.3e6
    assert found.config == replace(now.config, gradient_accumulation_steps=6, sft_batch_size=1)
    assert smaller(found, 1e6) is None


def plan_command(capsys, *flags: str) -> tuple[int, str, str]:
    sizes = (f"--{name}={value}" for name, value in SIZES.items())
    status = main(["plan", "hydra-rlhf", *sizes, "--num-hidden-layers=1", *flags])
    return status, *capsys.readouterr()


def test_the_command_prints_a_table_and_the_largest_batch(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    status, out, _ = plan_command(capsys, "--num_mini_batches", "4", "--memory", "30e6")
    assert status == 0
    for text in (
        "Hydra-PPO",
        "Hydra-SFT",
        "KV cache",
        "optimizer state",
        "fits 30.00 MB: ",
        "does not fit with a batch",
    ):
        assert text in out
    status, out, _ = plan_command(capsys, "--method", "all", "--sft-steps=0", "--rm-steps=0")
    assert status == 0
    assert all(method.title in out for method in METHODS.values())
    _, out, _ = plan_command(capsys, "--num_mini_batches", "4", "--sft-steps=0", "--memory=1")
    assert "PPO does not fit 0.00 MB with a batch of 4" in out


def test_the_command_prints_json(capsys):
    status, out, _ = plan_command(
        capsys, "--json", "--preset=small", "--method=dynamic", "--memory", "50e6", "--num-mini-batches", "16"
    )
    found = json.loads(out)
    assert status == 0
    config = replace(PRESETS["small"], **SIZES | {"num_hidden_layers": 1}, method="dynamic", num_mini_batches=16)
    assert found[0]["parts"] == predict(config).parts
    assert found[0]["peak"] == max(found[0]["totals"].values())
    assert found[0]["largest_batch"] == largest_batch(config, 50e6).config.batch_size


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--memory", "0"], 1, "'memory': expected more than 0 bytes"),
        (["--memory", "inf"], 1, "at most 1e18"),
        (["--memory", "many"], 2, "--memory"),
        (["--preset", "smal"], 2, "demo, small, paper"),
        (["--preset"], 2, "demo, small, paper"),
        (["--model", "llama-8"], 1, "llama-3-8b"),
        (["--batch-size", "7"], 1, "equal parts of batch_size=7"),
    ],
)
def test_the_command_refuses(capsys, flags, status, message):
    found, _, error = plan_command(capsys, *flags)
    assert found == status
    assert message in error
    assert "Traceback" not in error


def fail_at(monkeypatch, step: int, error: Exception | None) -> None:
    """The update of this step asks the allocator for more than there is, or raises what a GPU's does."""
    update, calls = PPO.update, iter(range(1000))

    def failing(self, *rest):
        if next(calls) == step:
            if error is not None:
                raise error
            torch.empty(2**60, dtype=torch.uint8)
        return update(self, *rest)

    monkeypatch.setattr(PPO, "update", failing)


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")])
def test_a_run_without_memory_says_what_fits_and_loses_nothing(tmp_path, capsys, monkeypatch, error):
    folder = tmp_path / "run"
    given = arguments(folder, write_rows(tmp_path / "rows.jsonl"), "--cost-steps", "0")
    with monkeypatch.context() as patch:
        fail_at(patch, 3, error)
        assert main(given) == 1
    out, printed = capsys.readouterr()
    assert "The next smaller setting that fits: --" in out
    assert "optimizer state" in out
    assert "kernelab: out of memory: " in printed
    assert ("CUDA out of memory" if error else "can't allocate memory") in printed
    assert str(folder) in printed
    assert "Traceback" not in printed
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    assert main([*given, "--resume"]) == 0
    again = (folder / "metrics.jsonl").read_text().splitlines()
    assert again[: len(lines)] == lines


def test_another_error_is_no_question_of_memory(tmp_path, capsys, monkeypatch):
    fail_at(monkeypatch, 0, RuntimeError("shapes do not match"))
    given = arguments(tmp_path / "run", write_rows(tmp_path / "rows.jsonl"), "--cost-steps", "0")
    with pytest.raises(RuntimeError, match="shapes"):
        main(given)
    assert "smaller setting" not in capsys.readouterr().out


def test_a_plan_that_fails_does_not_hide_what_happened(tmp_path, capsys, monkeypatch):
    fail_at(monkeypatch, 0, torch.OutOfMemoryError("no more"))
    monkeypatch.setattr(planner, "predict", lambda config: [][0])
    given = arguments(tmp_path / "run", write_rows(tmp_path / "rows.jsonl"), "--cost-steps", "0")
    assert main(given) == 1
    out, error = capsys.readouterr()
    assert "out of memory: no more" in error
    assert "no plan: IndexError" in out


def test_the_table_of_all_methods_for_a_model_that_is_not_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    table = ["--model", str(tmp_path), "--answers=3", "--prompt-length=8", "--response-length=4", "--lora-r=2"]
    hydra_memory.main(table)
    out = capsys.readouterr().out
    assert all(title in out for title in ("SFT", *(method.title for method in METHODS.values())))
    at_peak = {"weights": 10 * 10**9, "optimizer state": 8 * 10**9, "activations": 40 * 10**9}
    row = hydra_memory.Row("Hydra-PPO", 4, at_peak)
    assert row.sharded == 51e9
    assert row.fit == pytest.approx(4 + (71.1 - 51) / 10)  # 10 GB an answer
