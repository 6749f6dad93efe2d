"""PEFT's files both ways, errors that name the file and the key, and writes that happen whole or not at all."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kernelab.lora import (
    AdapterFileError,
    BaseMismatchError,
    LoRAConfig,
    UnknownRoleError,
    adapter_parameters,
    adapters,
    inject,
    load_adapter,
    off,
    role,
    save_adapter,
)
from kernelab.lora.layer import LoRALayer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
TOKENS = torch.arange(24).reshape(2, 12) % 19


def language_model(kind: str, seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def adapted(kind: str = "llama", config: LoRAConfig | None = None) -> nn.Module:
    model = inject(language_model(kind), {"actor": config or LoRAConfig(r=3, alpha=5, dropout=0.1)}, TARGETS[kind])
    with torch.no_grad():
        for parameter in adapter_parameters(model, "actor"):
            parameter.normal_(std=0.3)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def peft_adapter(kind: str, directory, **settings) -> torch.Tensor:
    """Lets PEFT make an adapter, and returns its logits."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"} | settings
    model = get_peft_model(language_model(kind), LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(directory))
    return logits(model)


@pytest.mark.parametrize("config", [LoRAConfig(r=3, alpha=5, dropout=0.1), LoRAConfig(r=4, alpha=2.5, use_rslora=True)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_what_is_saved_here(kind, config, tmp_path):
    from peft import PeftModel

    model = adapted(kind, config)
    save_adapter(model, "actor", tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == [CONFIG, WEIGHTS]
    theirs = PeftModel.from_pretrained(language_model(kind), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(theirs), logits(language_model(kind)), atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.2},
        {"rank_pattern": {"0.*(q_proj|c_attn)": 2}, "alpha_pattern": {"(v_proj|c_attn)": 7, "^.*1.*c_proj|q_proj": 9}},
    ],
)
def test_what_peft_saved_is_read_here_and_saved_again(kind, settings, tmp_path):
    from peft import PeftModel

    want = peft_adapter(kind, tmp_path / "theirs", **settings)
    model = load_adapter(language_model(kind), tmp_path / "theirs", "actor").eval()
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)
    with off(model):
        assert torch.equal(logits(model), logits(language_model(kind)))
    save_adapter(model, "actor", tmp_path / "ours")
    theirs = PeftModel.from_pretrained(language_model(kind), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(theirs), want, rtol=1e-5, atol=1e-6)
    again = load_adapter(language_model(kind), tmp_path / "ours", "actor").eval()
    assert torch.equal(logits(again), logits(model))


def test_loading_over_an_adapter_keeps_its_parameters(tmp_path):
    model = adapted()
    save_adapter(model, "actor", tmp_path)
    want, parameters = logits(model), adapter_parameters(model, "actor")
    with torch.no_grad():
        parameters[0].zero_()
    load_adapter(model, tmp_path, "actor")
    assert all(a is b for a, b in zip(adapter_parameters(model, "actor"), parameters, strict=True))
    assert torch.equal(logits(model), want)


def test_loaded_parameters_own_their_memory(tmp_path):
    save_adapter(adapted(), "actor", tmp_path)
    for parameter in adapter_parameters(load_adapter(language_model("llama"), tmp_path, "actor"), "actor"):
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_loading_under_a_second_name_adds_an_adapter(tmp_path):
    model = adapted()
    save_adapter(model, "actor", tmp_path)
    load_adapter(model, tmp_path, "critic", dtype=torch.bfloat16)
    assert list(adapters(model)) == ["actor", "critic"]
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in adapter_parameters(model, "critic"))
    with role(model, "actor"):
        one = logits(model)
    with role(model, "critic"):
        torch.testing.assert_close(logits(model), one, rtol=0, atol=0.1)


def test_a_wrapper_does_not_change_the_keys(tmp_path):
    model = adapted()
    save_adapter(nn.ModuleDict({"module": model}), "actor", tmp_path)
    assert torch.equal(logits(load_adapter(language_model("llama"), tmp_path, "actor").eval()), logits(model))
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in file.keys()  # noqa: SIM118


def test_targets_are_paths_where_a_name_is_not_enough(tmp_path):
    model = inject(language_model("llama"), {"actor": LoRAConfig()}, ["0.self_attn.q_proj"])
    save_adapter(model, "actor", tmp_path)
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert targets == ["model.layers.0.self_attn.q_proj"]
    loaded = load_adapter(language_model("llama"), tmp_path, "actor")
    assert sum(isinstance(module, LoRALayer) for module in loaded.modules()) == 1


def test_sharded_parameters_are_gathered(process_group, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model, want = adapted(), logits(adapted())
    fully_shard(model)
    assert torch.equal(logits(model), want)
    save_adapter(model, "actor", tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(language_model("llama"), tmp_path / "adapter", "actor").eval()), want)
    with pytest.raises(AdapterFileError, match="Load before sharding"):
        load_adapter(model, tmp_path / "adapter", "actor")


def test_another_base_is_refused_with_the_layer_that_differs(tmp_path):
    save_adapter(adapted(), "actor", tmp_path)
    base = language_model("llama")
    with torch.no_grad():
        base.model.layers[1].self_attn.v_proj.weight[0, 0] += 1e-3
    before = snapshot(base)
    with pytest.raises(BaseMismatchError, match=r"layers\.1\.self_attn\.v_proj differs.*1 of 6 layers"):
        load_adapter(base, tmp_path, "actor")
    with pytest.raises(BaseMismatchError, match="6 of 6"):
        load_adapter(language_model("llama").bfloat16(), tmp_path, "actor")
    assert snapshot(base) == before
    load_adapter(base, tmp_path, "actor", check_base=False)


def snapshot(model: nn.Module) -> list:
    return [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()]


def edit_config(directory, **settings):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | settings))


def edit_weights(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")

BROKEN = {
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
    "pickle": (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), "is a pickle"),
    "no configuration": (lambda d: (d / CONFIG).unlink(), f"{CONFIG}: cannot be read"),
    "broken JSON": (lambda d: (d / CONFIG).write_text('{"r": 8,\n "lora_alpha"'), f"{CONFIG}, line 2: not JSON"),
    "binary JSON": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe"), f"{CONFIG}: cannot be read"),
    "JSON list": (lambda d: (d / CONFIG).write_text("[]"), "expected a JSON object"),
    "truncated": (lambda d: os.truncate(d / WEIGHTS, (d / WEIGHTS).stat().st_size - 9), f"{WEIGHTS}: not a whole"),
    "empty file": (lambda d: os.truncate(d / WEIGHTS, 0), f"{WEIGHTS}: not a whole"),
    "no tensors": (lambda d: edit_weights(d, dict.clear), "holds no tensor"),
    "one part": (lambda d: edit_weights(d, lambda t: t.pop(Q_B)), f"{Q_B} is missing"),
    "both parts": (lambda d: edit_weights(d, lambda t: (t.pop(Q_A), t.pop(Q_B))), f"{Q_A} is missing.*targets"),
    "foreign key": (
        lambda d: edit_weights(d, lambda t: t.update(other=torch.ones(1))),
        "key other: expected base_model",
    ),
    "embedding": (
        lambda d: edit_weights(d, lambda t: t.update({Q_A.replace("_A.weight", "_embedding_A"): torch.ones(1)})),
        "lora_embedding_A: expected",
    ),
    "unknown layer": (
        lambda d: edit_weights(
            d, lambda t: t.update({k.replace("0.self", "7.self"): t[k].clone() for k in (Q_A, Q_B)})
        ),
        r"no module model\.layers\.7\.self_attn",
    ),
    "untargeted layer": (
        lambda d: edit_weights(d, lambda t: t.update({k.replace("q_p", "k_p"): t[k].clone() for k in (Q_A, Q_B)})),
        "k_proj.*does not target",
    ),
    "other width": (
        lambda d: edit_weights(d, lambda t: t.update({Q_A: torch.ones(3, 17)})),
        rf"{Q_A}: expected \[3, 16\]",
    ),
    "other height": (
        lambda d: edit_weights(d, lambda t: t.update({Q_B: torch.ones(9, 3)})),
        rf"{Q_B}: expected \[16, 3\]",
    ),
    "ranks differ": (lambda d: edit_weights(d, lambda t: t.update({Q_B: torch.ones(16, 4)})), "q_proj.lora_B"),
    "integers": (lambda d: edit_weights(d, lambda t: t.update({Q_A: torch.ones(3, 16).long()})), "expected a matrix"),
    "other rank": (lambda d: edit_config(d, r=8), r"lora_A.weight: expected \[8, 24\]"),
    "other type": (lambda d: edit_config(d, peft_type="LOHA"), "peft_type: expected 'LORA', got 'LOHA'"),
    "DoRA": (lambda d: edit_config(d, use_dora=True), "use_dora"),
    "bias": (lambda d: edit_config(d, bias="all"), "key bias: 'all' is not supported"),
    "modules to save": (lambda d: edit_config(d, modules_to_save=["lm_head"]), "modules_to_save"),
    "PiSSA": (lambda d: edit_config(d, init_lora_weights="pissa"), "init_lora_weights"),
    "expert tensors": (lambda d: edit_config(d, target_parameters=["experts.gate_up"]), "target_parameters"),
    "bad rank": (lambda d: edit_config(d, r="8"), "'r'"),
    "bad pattern": (lambda d: edit_config(d, alpha_pattern=[1]), "alpha_pattern"),
    "bad regex": (lambda d: edit_config(d, rank_pattern={"(": 1}), CONFIG),
    "bad target": (lambda d: edit_config(d, target_modules="("), CONFIG),
    "bad targets": (lambda d: edit_config(d, target_modules=[3]), "target_modules: expected a list of names"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_and_change_nothing(case, tmp_path):
    break_it, message = BROKEN[case]
    save_adapter(adapted(), "actor", tmp_path)
    break_it(tmp_path)
    for model in (language_model("llama"), adapted()):
        before, want = snapshot(model), logits(model)
        for name in ("actor", "other"):
            with pytest.raises(AdapterFileError, match=f"(?s){tmp_path}.*{message}"):
                load_adapter(model, tmp_path, name)
        assert snapshot(model) == before
        assert torch.equal(logits(model), want)


def test_settings_of_an_existing_adapter_have_to_agree(tmp_path):
    save_adapter(adapted(), "actor", tmp_path)
    for other in (LoRAConfig(r=3, alpha=6), LoRAConfig(r=4, alpha=5)):
        with pytest.raises(AdapterFileError, match="q_proj: adapter 'actor' of the model has"):
            load_adapter(adapted(config=other), tmp_path, "actor")
    model = inject(language_model("llama"), {"actor": LoRAConfig(r=3, alpha=5)}, ["q_proj"])
    with pytest.raises(AdapterFileError, match=r"differ in layer model\.layers\.0\.mlp\.down_proj"):
        load_adapter(model, tmp_path, "actor")


def test_bad_arguments(tmp_path):
    with pytest.raises(UnknownRoleError, match=r"save_adapter.*'actor'"):
        save_adapter(adapted(), "critic", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"'model'.*a part without model\.layers\.0"):
        save_adapter(adapted().model.layers[1], "actor", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="'name'"):
        load_adapter(adapted(), tmp_path, "a.b")


def test_unknown_settings_are_reported(tmp_path, caplog):
    save_adapter(adapted(), "actor", tmp_path)
    edit_config(tmp_path, new_idea=3, unused=None)
    load_adapter(language_model("llama"), tmp_path, "actor")
    assert "new_idea" in caplog.text
    assert "unused" not in caplog.text


# A save calls fsync for both files, then after each of three replacements; the second replacement commits.
@pytest.mark.parametrize(
    ("call", "fails_at"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1), ("replace", 2)]
)
def test_a_failed_write_leaves_what_was_there(call, fails_at, tmp_path, monkeypatch):
    save_adapter(adapted(), "actor", tmp_path / "old")
    files = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    for directory in ("old", "new"):
        fail(monkeypatch, call, fails_at)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(adapted(config=LoRAConfig(r=2)), "actor", tmp_path / directory)
        monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == files
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("call", "fails_at"), [("fsync", 4), ("fsync", 5), ("replace", 3)])
def test_a_write_that_fails_after_its_commitment_is_the_new_adapter(call, fails_at, tmp_path, monkeypatch):
    save_adapter(adapted(), "actor", tmp_path)
    new = adapted(config=LoRAConfig(r=2))
    fail(monkeypatch, call, fails_at)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(new, "actor", tmp_path)
    monkeypatch.undo()
    assert torch.equal(logits(load_adapter(language_model("llama"), tmp_path, "actor").eval()), logits(new))


def fail(monkeypatch, call: str, fails_at: int) -> None:
    real, calls = getattr(os, call), itertools.count(1)
    monkeypatch.setattr(os, call, lambda *args: disk_full() if next(calls) == fails_at else real(*args))


def disk_full():
    raise OSError("disk full")


@pytest.mark.parametrize("calls", range(1, 4))
def test_a_writer_killed_between_two_replacements(calls, tmp_path, monkeypatch):
    """Before the weights are replaced the old adapter is there, afterwards the new one, with its own configuration."""
    old, new = adapted(), adapted(config=LoRAConfig(r=2, alpha=1))
    save_adapter(old, "actor", tmp_path)
    (tmp_path / "notes.txt").write_text("kept")
    real, count = os.replace, 0

    def replace(*args):
        nonlocal count
        count += 1
        if count == calls:
            os._exit(9)  # as SIGKILL does: no cleaning up
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    process = multiprocessing.get_context("fork").Process(target=save_adapter, args=(new, "actor", tmp_path))
    process.start()
    process.join()
    monkeypatch.undo()
    assert process.exitcode == 9
    loaded = load_adapter(language_model("llama"), tmp_path, "actor").eval()
    assert torch.equal(logits(loaded), logits(old if calls < 3 else new))
    assert adapters(loaded)["actor"].r == (3 if calls < 3 else 2)
    assert (tmp_path / "notes.txt").read_text() == "kept"
    edit_config(tmp_path, lora_alpha=40)  # what is left over does not win against a later edit
    assert adapters(load_adapter(language_model("llama"), tmp_path, "actor"))["actor"].alpha == 40
    save_adapter(new, "actor", tmp_path)
    assert torch.equal(logits(load_adapter(language_model("llama"), tmp_path, "actor").eval()), logits(new))


def _save_forever(directory):
    models = adapted(), adapted(config=LoRAConfig(r=2, alpha=1))
    while True:
        for model in models:
            save_adapter(model, "actor", directory)


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path):
    expected = [logits(adapted()), logits(adapted(config=LoRAConfig(r=2, alpha=1)))]
    save_adapter(adapted(), "actor", tmp_path)
    for trial in range(20):
        process = multiprocessing.get_context("fork").Process(target=_save_forever, args=(tmp_path,))
        process.start()
        time.sleep(0.15 + 0.0037 * trial)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        got = logits(load_adapter(language_model("llama"), tmp_path, "actor").eval())
        assert any(torch.equal(got, want) for want in expected)
