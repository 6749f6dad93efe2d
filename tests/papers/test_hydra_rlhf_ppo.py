"""Steps of PPO on small models: what moves, what each option changes, and what they do with odd answers and rewards."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.evaluate import evaluate, token_f1
from kernelab.papers.hydra_rlhf.model import mixed_precision
from kernelab.papers.hydra_rlhf.optimise import PPO, Descent, TrainingDiverged, check_finite
from kernelab.papers.hydra_rlhf.quantized import quantize
from kernelab.papers.hydra_rlhf.reward import RewardFunction
from kernelab.papers.hydra_rlhf.roles import METHODS, Scores
from kernelab.papers.hydra_rlhf.rollout import sample_answers
from kernelab.papers.hydra_rlhf.task import Questions
from kernelab.papers.hydra_rlhf.tokens import stack
from tests.papers.hydra_models import TEMPERATURE, B, P, R, V, dense, gpt2, llama, make, new


def ppo_of(trunk, head, method="hydra", **settings):
    sizes = {"batch_size": 6, "num_mini_batches": 1, "num_ppo_epochs": 2}
    config = Config(method=method, temperature=TEMPERATURE, **sizes | settings)
    return PPO(make(method, trunk, head), SimpleNamespace(end=1), config)


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_a_mini_batch_in_parts_takes_the_same_step(trunk, head, sequences):
    batch = stack(sequences, sequences[torch.tensor([2, 0, 1])])
    moved, numbers = [], []
    for parts in (1, 3):
        ppo = ppo_of(trunk, head, gradient_accumulation_steps=parts)
        torch.manual_seed(5)
        numbers.append(ppo.update(batch, ppo.score(batch)))
        moved.append([*ppo.roles.actor_parameters(), *ppo.roles.critic_parameters()])
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-9)
    for whole, in_parts in zip(*moved, strict=True):
        torch.testing.assert_close(whole, in_parts, rtol=0, atol=1e-7)  # Adam divides by small gradients


@pytest.mark.parametrize(("method", "rates"), [("hydra", [4.0, 6.0]), ("ppo", [2.0, 2.0])])
@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_what_trains_whole_has_its_own_learning_rate(trunk, head, method, rates):
    ppo = ppo_of(trunk, head, method, learning_rate=4.0, critic_learning_rate=6.0, full_learning_rate=2.0)
    assert [group["lr"] for group in ppo.optimizer.param_groups] == rates
    ppo.decay(0.5)
    assert [2 * group["lr"] for group in ppo.optimizer.param_groups] == rates


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_an_update_moves_the_roles_and_nothing_else(trunk, head, sequences):
    ppo = ppo_of(trunk, head)
    batch = stack(sequences, sequences)
    base = ppo.roles.base_digest()
    before = {name: p.detach().clone() for name, p in ppo.roles.named_parameters()}
    metrics = ppo.update(batch, ppo.score(batch))
    assert metrics["ratio_error"] == pytest.approx(0, abs=1e-12)
    assert ppo.roles.base_digest() == base
    for name, parameter in ppo.roles.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_a_step_that_is_not_finite_is_not_taken(trunk, head, sequences):
    ppo = ppo_of(trunk, head)
    scores = ppo.score(sequences)
    scores.reward[1] = torch.inf
    before = [p.detach().clone() for p in ppo.roles.parameters()]
    metrics = ppo.update(sequences, scores)
    assert not math.isfinite(metrics["value_loss"])
    assert all(torch.equal(*pair) for pair in zip(before, ppo.roles.parameters(), strict=True))
    with pytest.raises(TrainingDiverged, match=r"PPO step 7: .*value_loss = "):
        check_finite("PPO", 7, metrics)


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_only_answers_without_an_end_are_penalised(trunk, head, sequences):
    tokens = sequences.tokens.masked_fill(sequences.tokens == 1, 2)
    tokens[0, sequences.last[0]] = 1
    batch = replace(sequences, tokens=tokens)
    returns = []
    for penalty in (0.0, 3.0):
        ppo = ppo_of(trunk, head, missing_eos_penalty=penalty, lam=1.0, kl_coef=0.0)
        scores = ppo.score(batch)
        ppo._minibatch = lambda sequences, scores, advantage, returned, outputs: (
            returns.append(returned) or {"ratio_error": 0.0}
        )
        torch.manual_seed(0)
        assert ppo.update(batch, scores)["unfinished"] == pytest.approx(2 / 3)
    loss = (returns[0] - returns[2]).max(1).values
    assert sorted(loss.tolist()) == pytest.approx([0.0, 3.0, 3.0])


@pytest.mark.parametrize("method", METHODS)
def test_the_actor_answers_with_its_adapter_and_cache(trunk, head, sequences, method):
    roles = make(method, trunk, head)
    actor = dense(roles, "actor", trunk)
    prompts = sequences.tokens[:, :P], sequences.mask[:, :P]
    encoder = SimpleNamespace(end=V - 1, pad=0, response_length=R)
    with roles.acting():
        found = sample_answers(roles.actor, prompts, encoder, temperature=1e-6)  # the most probable token, always
    for tokens, mask, answer in zip(*prompts, found.answers, strict=True):
        text = tokens[mask]
        for token in answer:
            with torch.no_grad():
                assert token == actor(input_ids=text[None]).logits[0, -1].argmax()
            if token == encoder.end:
                break
            text = torch.cat([text, token[None]])
    assert found.mask[:, :P].equal(prompts[1])


def test_answers_in_parts_are_the_answers(trunk, head, sequences):
    encoder = SimpleNamespace(end=V - 1, pad=0, response_length=R)
    found = []
    for rows in (0, 2):
        config = Config(temperature=1e-6, local_rollout_forward_batch_size=rows)
        ppo = PPO(make("hydra", trunk, head), encoder, config)
        found.append(ppo.answer((sequences.tokens[:, :P], sequences.mask[:, :P])))
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].mask, found[1].mask)


def test_an_answer_ends_with_its_first_end_token():
    class Speaker:
        def generate(self, input_ids, **kwargs):
            return torch.cat([input_ids, torch.tensor([[5, 1, 1], [5, 6, 1], [1, 1, 1]])], 1)

    encoder = SimpleNamespace(end=1, pad=1, response_length=5)
    prompts = torch.full((3, 2), 3), torch.ones(3, 2, dtype=torch.bool)
    found = sample_answers(Speaker(), prompts, encoder, 1.0)
    assert found.answer_mask.sum(1).tolist() == [2, 3, 1]
    assert found.answers.shape == (3, 5)


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_evaluation_repeats_and_leaves_the_random_generator(trunk, head, sequences):
    roles = make("hydra", trunk, head)
    encoder = SimpleNamespace(
        end=1, pad=0, response_length=R, decode=lambda batch: list(map(str, batch.answers.tolist()))
    )
    questions = Questions((sequences.tokens[:, :P], sequences.mask[:, :P]), ["3 4 5"] * B)
    state = torch.get_rng_state()
    first, again, other = (evaluate(roles, questions, encoder, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.answers == again.answers != other.answers
    assert torch.equal(first.reward, again.reward)
    assert first.gold.tolist() == [token_f1(answer, "3 4 5") for answer in first.answers]


def seen_by_minibatches(ppo):
    """What every mini-batch is given from now on; none takes a step."""
    seen = []
    ppo._minibatch = lambda *given: seen.append(given) or {"ratio_error": 0.0, "policy_kl": 0.0}
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_a_single_forward_takes_the_step_of_scoring_first(trunk, head, sequences, method):
    batch = stack(sequences, sequences[torch.tensor([2, 0, 1])])
    moved, numbers = [], []
    for single in (False, True):
        ppo = ppo_of(trunk, head, method, num_ppo_epochs=1, single_forward=single)
        scores = ppo.score(batch)
        assert (scores.logprob is None) == (scores.value is None) == single
        numbers.append(ppo.update(batch, scores))
        moved.append([p for p in ppo.roles.parameters() if p.requires_grad])
    assert numbers[1]["ratio_error"] == 0
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-9)
    for first, second in zip(*moved, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-7)


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_epochs_end_where_the_policy_is_too_far(trunk, head, sequences):
    batch = stack(sequences, sequences)
    moved = []
    for target, epochs in ((None, 1), (1e-12, 3), (1e6, 3)):
        ppo = ppo_of(trunk, head, num_ppo_epochs=epochs, target_kl=target)
        torch.manual_seed(0)
        metrics = ppo.update(batch, ppo.score(batch))
        moved.append((metrics["minibatches"], [p.detach().clone() for p in ppo.roles.actor_parameters()]))
    steps, parameters = zip(*moved, strict=True)
    assert steps == (1, 2, 3)  # the second mini-batch finds the policy too far and moves nothing
    assert all(map(torch.equal, parameters[0], parameters[1]))
    assert not all(map(torch.equal, parameters[0], parameters[2]))


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_normalized_rewards_forget_their_scale(trunk, head, sequences):
    found = []
    for scale, shift in ((1.0, 0.0), (50.0, -7.0)):
        ppo = ppo_of(trunk, head, normalize_rewards=True, num_ppo_epochs=1)
        seen = seen_by_minibatches(ppo)
        scores = ppo.score(sequences)
        torch.manual_seed(0)
        ppo.update(sequences, replace(scores, reward=scale * scores.reward + shift))
        found.append(seen[0][3])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trunk", [llama], indirect=True)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_estimator_is_the_penalty_of_every_token(trunk, head, sequences, estimator):
    ppo = ppo_of(trunk, head, kl_estimator=estimator, kl_coef=0.7, lam=1.0, num_ppo_epochs=1)
    seen = seen_by_minibatches(ppo)
    scores = ppo.score(sequences)
    torch.manual_seed(0)
    ppo.update(sequences, scores)
    torch.manual_seed(0)
    for row, returned in zip(torch.randperm(B), seen[0][3], strict=True):
        length = int(sequences.answer_mask[row].sum())
        for t in range(length):
            gaps = [float(scores.reference[row, k] - scores.logprob[row, k]) for k in range(t, length)]
            kl = sum(-gap if estimator == "k1" else math.exp(gap) - 1 - gap for gap in gaps)
            assert float(returned[t]) == pytest.approx(float(scores.reward[row]) - 0.7 * kl, abs=1e-9)


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_an_adaptive_coefficient_weighs_the_next_steps_penalty(trunk, head, sequences):
    changed = {"kl_coef": 0.7, "adaptive_kl_target": 0.4, "adaptive_kl_horizon": 6}
    ppo = ppo_of(trunk, head, lam=1.0, num_ppo_epochs=1, **changed)
    seen = seen_by_minibatches(ppo)
    scores = ppo.score(sequences)
    per_answer = ((scores.logprob - scores.reference) * sequences.answer_mask).sum(1)
    scores = replace(scores, reference=scores.logprob - (scores.logprob - scores.reference) * 0.45 / per_answer.mean())
    coefficients = [0.7, 0.7 * (1 + 0.125 * B / 6)]
    for step, coefficient in enumerate(coefficients):
        torch.manual_seed(0)
        metrics = ppo.update(sequences, scores)
        assert metrics["kl"] == pytest.approx(0.45)
        assert metrics["kl_coef"] == pytest.approx(coefficient)
        torch.manual_seed(0)
        kl = ((scores.logprob - scores.reference) * sequences.answer_mask).sum(1)
        returned = (scores.reward - coefficient * kl)[torch.randperm(B)]
        torch.testing.assert_close(seen[step][3][:, 0], returned, rtol=0, atol=1e-9)


@pytest.mark.parametrize("reward", [0.0, 0.1, -3.7e4])
@pytest.mark.parametrize("options", [{}, {"normalize_rewards": True}, {"whiten_rewards": True}])
@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_equal_rewards_teach_the_policy_nothing(trunk, head, sequences, reward, options):
    ppo = ppo_of(trunk, head, kl_coef=0.0, lam=1.0, num_ppo_epochs=1, **options)
    shape = sequences.answers.shape
    old = {"reference": torch.zeros(shape), "logprob": torch.zeros(shape), "value": torch.zeros(shape)}
    seen = seen_by_minibatches(ppo)
    ppo.update(sequences, Scores(torch.full((B,), reward), **old))
    advantage, returned = seen[0][2:4]
    assert advantage.isfinite().all()
    assert returned.isfinite().all()
    if not options.get("whiten_rewards"):
        assert not advantage.any()


@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_answers_that_end_at_once(trunk, head, sequences):
    """An answer is never without a token: its end token gets the reward."""

    class Silent:
        def generate(self, input_ids, **kwargs):
            return torch.cat([input_ids, torch.ones(len(input_ids), 1, dtype=torch.long)], 1)

    encoder = SimpleNamespace(end=1, pad=0, response_length=R)
    batch = sample_answers(Silent(), (sequences.tokens[:, :P], sequences.mask[:, :P]), encoder, 1.0)
    assert batch.answer_mask.sum(1).tolist() == [1] * B
    ppo = ppo_of(trunk, head)
    metrics = ppo.update(batch, ppo.score(batch))
    assert metrics["tokens"] == 1
    assert metrics["unfinished"] == 0
    assert all(map(math.isfinite, metrics.values()))


def test_float16_leaves_out_gradients_beyond_its_scale():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    descent = Descent(Config(dtype="float16"), [optimizer], {"norm": [parameter]})

    def step(factor):
        descent.zero_grad()
        descent.backward(factor * parameter.sum())
        norms = descent.norms()
        descent.step()
        return norms["norm"]

    assert step(1e35) == 0
    assert torch.equal(parameter, torch.ones(2))
    assert descent.scaler.get_scale() == 2**15
    assert step(0.25) == pytest.approx(0.25 * 2**0.5)
    assert torch.equal(parameter, torch.full((2,), 0.75))
    descent.scaler.load_state_dict(descent.scaler.state_dict() | {"scale": 1.0})
    assert not math.isfinite(step(math.inf))


def reward_function(function, monkeypatch, name="rewards"):
    texts = {"decode": lambda batch: ["a", "", "c d"], "decode_prompts": lambda batch: ["p", "q", "r"]}
    monkeypatch.setitem(sys.modules, "user_module", SimpleNamespace(rewards=function))
    return RewardFunction(f"user_module:{name}", SimpleNamespace(**texts))


def test_a_function_gives_the_rewards(trunk, head, sequences, monkeypatch):
    asked = []
    function = reward_function(lambda *texts: asked.append(texts) or torch.tensor([1, 2.5, -3]), monkeypatch)
    assert function(sequences).tolist() == [1, 2.5, -3]
    assert asked == [(["p", "q", "r"], ["a", "", "c d"])]
    for method, trunks in (("ppo", 3), ("lora", 3), ("dynamic", 2), ("j_hydra", 1), ("hydra", 1)):
        roles = make(method, trunk, head, reward_function=function)
        assert len(roles.trunks) == trunks  # no trunk is kept for a reward that nobody reads
        assert roles.score(sequences).reward.tolist() == roles.reward(sequences).tolist() == [1, 2.5, -3]
        assert roles.score(sequences, policy=False).reward.tolist() == [1, 2.5, -3]
        torch.testing.assert_close(
            roles.score(sequences).value, make(method, trunk, head).score(sequences).value, rtol=0, atol=1e-10
        )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, answers: [1, 2], "3 numbers, one an answer, got 2"),
        (lambda prompts, answers: [1, 2, math.nan], "finite numbers, got nan for the answer 'c d'"),
        (lambda prompts, answers: None, "a list of numbers, got None"),
        (lambda prompts, answers: [1, "good", 2], "a list of numbers"),
        (3, "package.module:function"),
    ],
)
def test_a_function_that_gives_no_rewards_is_named(sequences, monkeypatch, function, message):
    with pytest.raises(ValueError, match="user_module:rewards") as error:
        reward_function(function, monkeypatch)(sequences)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="user_module:other"):
        reward_function(function, monkeypatch, name="other")


def test_mixed_precision_sees_what_an_optimizer_writes():
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with mixed_precision(Config(dtype="bfloat16"), x.device):
        before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1)
        after = layer(x)
    assert before.dtype == torch.bfloat16
    torch.testing.assert_close(after, before + x.sum(1, keepdim=True), check_dtype=False, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("trunk", [llama], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations_change_no_bit(trunk, head, sequences, method):
    batch = stack(sequences, sequences)
    moved = []
    for recomputing in (False, True):
        ppo = ppo_of(trunk, head, method)
        ppo.roles.recomputing = recomputing
        torch.manual_seed(5)
        moved.append([ppo.update(batch, ppo.score(batch)), list(ppo.roles.parameters())])
    assert moved[0][0] == moved[1][0]
    assert all(map(torch.equal, moved[0][1], moved[1][1]))


@pytest.mark.parametrize("trunk", [llama], indirect=True)
@pytest.mark.parametrize("method", ["lora", "dynamic", "j_hydra", "hydra"])
def test_trunks_in_4_bits_score_alike_before_and_after_an_update(trunk, head, sequences, method):
    trunk, head = trunk.float(), head.float()
    quantize(trunk)
    plain = llama().eval()
    for name, layer in trunk.named_modules():
        if isinstance(layer, Linear4bit):
            values = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight.data = values.float()
    others = {key: value for key, value in trunk.state_dict().items() if "proj" not in key}
    plain.load_state_dict(others, strict=False)
    batch = stack(sequences, sequences)
    ppo = ppo_of(trunk, head, method)
    expected = make(method, plain, head).score(batch)
    before = ppo.score(batch)
    for name, column in vars(before).items():
        torch.testing.assert_close(column, getattr(expected, name), rtol=1e-4, atol=1e-4)
    digest = ppo.roles.base_digest()
    assert ppo.update(batch, before)["ratio_error"] < 1e-6
    after = ppo.score(batch)
    assert torch.equal(after.reference, before.reference)
    assert torch.equal(after.reward, before.reward)
    assert not torch.equal(after.logprob, before.logprob)
    assert ppo.roles.base_digest() == digest


@pytest.mark.parametrize(("method", "packed"), [("ppo", 2), ("lora", 4), ("dynamic", 2), ("j_hydra", 1), ("hydra", 1)])
@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_4_bits_are_for_trunks_that_do_not_train(trunk, head, method, packed):
    roles = new(method, trunk.float(), head.float(), load_in_4bit=True)
    trunks = [lm for lm in roles.trunks.values() if any(isinstance(layer, Linear4bit) for layer in lm.modules())]
    assert len(trunks) == packed
    assert roles.players["actor"].adapter or roles.trunks["actor"] not in trunks


@pytest.mark.parametrize("trunk", [gpt2], indirect=True)
def test_conv1d_layers_in_4_bits_are_refused(trunk, head):
    with pytest.raises(ValueError, match=r"load_in_4bit.*Conv1D"):
        new("hydra", trunk.float(), head.float(), load_in_4bit=True)
