"""Rewards from a sequence classifier by path: what it reads, what is refused, and a run with it."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from kernelab.experiment.cli import main
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.data import Preference, Preferences
from kernelab.papers.hydra_rlhf.predict import predict
from kernelab.papers.hydra_rlhf.reward import RewardModel, classify
from kernelab.papers.hydra_rlhf.roles import METHODS
from kernelab.papers.hydra_rlhf.tokens import Encoder, join, train_tokenizer
from tests.papers.hydra_models import llama, make
from tests.papers.test_hydra_rlhf_plan import measured, settings
from tests.papers.test_hydra_rlhf_run import arguments, method_summary, records, write_rows

TEXTS = ["get the path of the file", "set it", "the value of a node is in the list of all nodes"]
LENGTH = 24


def classifier(folder, kind="gpt2", *, labels=1, words=600, **changed):
    """A small classifier and its tokenizer, whose padding token is another than the config says."""
    tokenizer = train_tokenizer(TEXTS * 3, 600)
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    torch.manual_seed(1)
    both = {"vocab_size": words, "num_labels": labels}
    width = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    made = {
        "gpt2": lambda: GPT2ForSequenceClassification(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=LENGTH, initializer_range=0.5, **both)
        ),
        "llama": lambda: LlamaForSequenceClassification(
            LlamaConfig(max_position_embeddings=LENGTH, pad_token_id=7, initializer_range=0.5, **width, **both)
        ),
        "bert": lambda: BertForSequenceClassification(
            BertConfig(max_position_embeddings=LENGTH, initializer_range=0.5, **width, **both)
        ),
    }[kind]()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def reading(path, texts, dtype=torch.float32):
    """The model, and what it makes of the texts."""
    model = RewardModel(path, SimpleNamespace(decode_whole=lambda sequences: texts), dtype)
    return model, model(SimpleNamespace(tokens=torch.zeros(1)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_a_text_has_the_reward_that_it_has_alone(tmp_path, kind, side):
    model, _ = reading(classifier(tmp_path, kind), TEXTS)
    model.tokenizer.padding_side = side
    found = model(SimpleNamespace(tokens=torch.zeros(1)))
    assert found.dtype == torch.float32
    for text, value in zip(TEXTS, found, strict=True):
        tokens = torch.tensor([model.tokenizer(text)["input_ids"]])
        expected = model.lm(input_ids=tokens).logits[0, 0]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert found.std() > 0.01
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.lm.training


def test_a_text_that_is_too_long_loses_its_start(tmp_path):
    path = classifier(tmp_path)
    long = " ".join(TEXTS * 3)
    model, found = reading(path, [long, TEXTS[0]])
    tokens = torch.tensor([model.tokenizer(long)["input_ids"]])
    assert tokens.shape[1] > LENGTH
    torch.testing.assert_close(found[:1], classify(model.lm, tokens[:, -LENGTH:], torch.ones(1, LENGTH)))
    model.tokenizer.model_max_length = 5
    shorter = model(SimpleNamespace(tokens=torch.zeros(1)))
    torch.testing.assert_close(shorter[:1], classify(model.lm, tokens[:, -5:], torch.ones(1, 5)))


def test_it_reads_prompt_and_answer_in_one(tmp_path):
    rows = [Preference("def get_path(self):", "get the path", "set it", ""), Preference("a b", "c", "d", "")]
    tokenizer = train_tokenizer([*TEXTS, rows[0].prompt], 600)
    encoder = Encoder(tokenizer, Preferences(rows, rows, separator=" ->"), 16, 6)
    sequences = join(encoder.prompts(rows), encoder.answers([row.chosen for row in rows]))
    model = RewardModel(classifier(tmp_path), encoder, torch.float32)
    expected = reading(str(tmp_path), [f"{row.prompt} -> {row.chosen}" for row in rows])[1]
    torch.testing.assert_close(model(sequences), expected)
    assert model.encoder.decode_whole(sequences)[1] == "a b -> c"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": 3}, "a classifier with 1 label, got 3 labels"),
        ({"pad_token": None}, "a padding token"),
        ({"words": 200}, "a tokenizer of at most its 200 tokens"),
    ],
)
def test_a_classifier_that_cannot_reward_is_refused(tmp_path, changed, message):
    path = classifier(tmp_path, **changed)
    with pytest.raises(ValueError, match="'reward_model_path'") as error:
        reading(path, TEXTS)
    assert message in str(error.value)
    assert path in str(error.value)


def test_what_is_no_classifier_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'reward_model_path': expected a transformers sequence classifier.*no/such"):
        reading("no/such/folder", TEXTS)
    (tmp_path / "file").write_text("[]")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="'reward_model_path'"):
            reading(str(path), TEXTS)
    llama().save_pretrained(tmp_path)  # a language model, whose score would be drawn at random
    train_tokenizer(TEXTS, 600).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"all weights of a sequence classifier, got no score\.weight"):
        reading(str(tmp_path), TEXTS)


def test_rewards_that_are_not_finite_are_named(tmp_path):
    model, _ = reading(classifier(tmp_path), TEXTS)
    with torch.no_grad():
        model.lm.score.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="finite numbers, got nan for 'get the path of the file'"):
        model(SimpleNamespace(tokens=torch.zeros(1)))


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_it_belongs_to_what_does_not_train(tmp_path, trunk, head, sequences):
    path = classifier(tmp_path)
    rewards = {}
    for method in METHODS:
        model, rewards[method] = reading(path, TEXTS)
        roles = make(method, trunk, head, reward_function=model)
        assert "reward" not in roles.players
        assert torch.equal(roles.score(sequences).reward, rewards[method])
        before = roles.base_digest()
        roles(sequences)
        assert not roles.reward_function.lm.training
        with torch.no_grad():
            model.lm.score.weight.add_(1)
        assert roles.base_digest() != before


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("classifier"))


@pytest.mark.parametrize("flags", ["--method lora", "--method hydra --dtype bfloat16 --gradient-checkpointing"])
def test_a_run_is_rewarded_by_it(tmp_path, path, flags):
    data = write_rows(tmp_path / "rows.jsonl")
    folder = tmp_path / "run"
    given = ["--reward-model-path", path, "--rm-steps", "3", "--cost-methods", "hydra", *flags.split()]
    assert main(arguments(folder, data, *given)) == 0
    method = flags.split()[1]
    assert {line["phase"] for line in records(folder)} == {"sft" if method == "lora" else "hydra_sft", f"ppo_{method}"}
    assert method_summary(folder, method)["ranking_accuracy"] is None or method == "hydra"
    assert not (folder / "reward_model").exists()
    (cost,) = json.loads((folder / "results.json").read_text())["summary"]["costs"]
    size = 2 if "bfloat16" in flags else 4
    weights = size * sum(p.numel() for p in RewardModel(path, None, torch.float32).parameters())
    assert cost["states"] > weights
    assert main(["run", "hydra-rlhf", "--out", str(folder), "--resume"]) == 0


def test_a_reward_comes_from_one_place(path):
    with pytest.raises(ValueError, match="'reward_model_path': expected none with a reward"):
        Config(reward="module:function", reward_model_path=path)


class Classifier(torch.nn.Module):
    """The classifier at ``path`` on the policy's own tokens."""

    def __init__(self, path, dtype):
        super().__init__()
        self.lm = RewardModel(path, None, dtype).lm

    def forward(self, sequences):
        return classify(self.lm, sequences.tokens, sequences.mask.long())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("changes", [{"method": "lora"}, {"method": "hydra", "dtype": "bfloat16"}])
def test_the_plan_counts_it(tmp_path, kind, changes):
    path = classifier(tmp_path, kind)
    config = settings(reward_model_path=path, **changes)
    found = predict(config)
    assert set(found.parts) - {"answer", "score", "update"} == {"hydra_sft" if config.method == "hydra" else "sft"}
    reward = Classifier(path, getattr(torch, config.dtype))
    totals = {part: found.totals[part] for part in ("answer", "score", "update")}
    assert totals == pytest.approx(measured(config, reward), rel=0.01)
    without = predict(replace(config, reward_model_path=None, reward="module:function"))
    size = sum(held.numel() * held.element_size() for held in (*reward.parameters(), *reward.buffers()))
    for part in found.parts:
        assert found.parts[part]["weights"] == pytest.approx(without.parts[part]["weights"] + size, rel=1e-3)


def test_a_plan_for_what_is_no_classifier(tmp_path):
    with pytest.raises(ValueError, match="'reward_model_path': expected the folder or file of a transformers config"):
        predict(settings(reward_model_path=str(tmp_path / "nowhere")))
