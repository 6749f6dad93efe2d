"""Four models on one trunk are four models: in what they score, and in what their gradients reach."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kernelab._core.errors import KernelabError
from kernelab.lora import LoRAConfig
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.evaluate import evaluate, token_f1
from kernelab.papers.hydra_rlhf.model import digest, linear_layers, new_reward_head, pair_states
from kernelab.papers.hydra_rlhf.optimise import PPO, TrainingDiverged, check_finite
from kernelab.papers.hydra_rlhf.roles import HydraRoles, LoRARoles, Trained
from kernelab.papers.hydra_rlhf.rollout import sample_answers
from kernelab.papers.hydra_rlhf.sft import sft_loss
from kernelab.papers.hydra_rlhf.task import Questions
from kernelab.papers.hydra_rlhf.tokens import join, stack

B, P, R, V, D = 3, 5, 4, 32, 16
TEMPERATURE = 0.8


def llama():
    sizes = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=P + R, **sizes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=P + R))


@pytest.fixture(params=[llama, gpt2])
def trunk(request):
    torch.manual_seed(0)
    return request.param().double().eval()


@pytest.fixture
def head(trunk):
    return new_reward_head(trunk).double()


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (B, P + R), generator=generator)
    prompts, answers = torch.tensor([5, 2, 3]), torch.tensor([4, 1, 3])
    prompt_mask = torch.arange(P) >= P - prompts[:, None]
    return join((tokens[:, :P], prompt_mask), (tokens[:, P:], torch.arange(R) < answers[:, None]))


def make(kind, trunk, head):
    """Roles whose adapters and value head are no longer at their start."""
    torch.manual_seed(2)
    roles = kind(copy.deepcopy(trunk), copy.deepcopy(head), LoRAConfig(r=2, alpha=4), linear_layers(trunk), TEMPERATURE)
    values = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*roles.actor_parameters(), *roles.critic_parameters()]:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=values, dtype=torch.float64))
    return roles


def dense(trunk, parameters):
    """A copy of the trunk with an adapter's ``A, B, A, B, ...`` added to its weights."""
    merged = copy.deepcopy(trunk)
    with torch.no_grad():
        for name, a, b in zip(linear_layers(merged), parameters[::2], parameters[1::2], strict=True):
            layer = merged.get_submodule(name)
            update = 2 * b @ a
            layer.weight += update if isinstance(layer, torch.nn.Linear) else update.T
    return merged


def each_row(lm, sequences):
    """Hidden states of each row alone, without its padding: prompt length, answer tokens, states."""
    for tokens, mask in zip(sequences.tokens, sequences.mask, strict=True):
        kept = tokens[mask]
        hidden = lm.base_model(input_ids=kept[None], use_cache=False).last_hidden_state[0]
        yield int(mask[:P].sum()), kept, hidden


def expected_logprobs(lm, sequences):
    for begin, kept, hidden in each_row(lm, sequences):
        logits = lm.get_output_embeddings()(hidden[begin - 1 : -1]) / TEMPERATURE
        yield F.log_softmax(logits, -1).gather(-1, kept[begin:, None])[:, 0]


def check_rows(found, expected, mask, atol=1e-10):
    for row, real, want in zip(found, mask, expected, strict=True):
        torch.testing.assert_close(row[real], want, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", [HydraRoles, LoRARoles])
def test_scoring_equals_four_dense_models(trunk, head, sequences, kind):
    roles = make(kind, trunk, head)
    actor, critic = dense(trunk, roles.actor_parameters()), dense(trunk, roles.critic_parameters()[:-2])
    with torch.no_grad():
        scores = roles.score(sequences)
        rewards = torch.stack([head(hidden[-1])[0] for _, _, hidden in each_row(trunk, sequences)])
        values = [roles.value_head(hidden[begin - 1 : -1])[:, 0] for begin, _, hidden in each_row(critic, sequences)]
        check_rows(scores.reference, expected_logprobs(trunk, sequences), sequences.answer_mask)
        check_rows(scores.logprob, expected_logprobs(actor, sequences), sequences.answer_mask)
        check_rows(scores.value, values, sequences.answer_mask)
    torch.testing.assert_close(scores.reward, rewards, rtol=0, atol=1e-10)
    torch.testing.assert_close(roles.reward(sequences), rewards, rtol=0, atol=1e-10)
    assert not any(tensor.requires_grad for tensor in vars(scores).values())


def test_the_critic_begins_as_the_reward_model(trunk, head, sequences):
    plain = copy.deepcopy(trunk)
    roles = HydraRoles(trunk, head, LoRAConfig(r=2), linear_layers(trunk), TEMPERATURE)
    values = [head(hidden[begin - 1 : -1])[:, 0] for begin, _, hidden in each_row(plain, sequences)]
    check_rows(roles.score(sequences).value, values, sequences.answer_mask)
    assert roles.value_head.weight is not roles.reward_head.weight


@pytest.mark.parametrize("kind", [HydraRoles, LoRARoles])
def test_the_joint_gradient_is_that_of_two_models(trunk, head, sequences, kind):
    roles = make(kind, trunk, head)
    mask = sequences.answer_mask
    cotangents = torch.randn(2, B, R, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * mask
    parameters = [*roles.actor_parameters(), *roles.critic_parameters()]
    outputs = roles(sequences)
    (cotangents[0] * outputs.logprob + cotangents[1] * outputs.value).sum().backward()
    isolated = make(LoRARoles, trunk, head)
    for logprob, row in zip(expected_logprobs(isolated.actor, sequences), range(B), strict=True):
        (cotangents[0, row][mask[row]] * logprob).sum().backward()
    for (begin, _, hidden), row in zip(each_row(isolated.critic, sequences), range(B), strict=True):
        (cotangents[1, row][mask[row]] * isolated.value_head(hidden[begin - 1 : -1])[:, 0]).sum().backward()
    for mine, other in zip(parameters, [*isolated.actor_parameters(), *isolated.critic_parameters()], strict=True):
        assert other.grad.abs().max() > 1e-6
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-10)
    assert all(p.grad is None for p in roles.parameters() if not p.requires_grad)


def test_a_role_gets_nothing_from_the_other_loss(trunk, head, sequences):
    roles = make(HydraRoles, trunk, head)
    roles(sequences).logprob.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in roles.critic_parameters())
    assert any(p.grad.any() for p in roles.actor_parameters())
    roles.zero_grad()
    roles(sequences).value.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in roles.actor_parameters())
    assert any(p.grad.any() for p in roles.critic_parameters())


def test_the_entropy_carries_no_gradient(trunk, head, sequences):
    assert not make(HydraRoles, trunk, head)(sequences).entropy.requires_grad


def test_hydra_holds_one_trunk_and_lora_four(trunk, head):
    size = sum(p.numel() for p in trunk.parameters())
    hydra, lora = (sum(p.numel() for p in make(kind, trunk, head).parameters()) for kind in (HydraRoles, LoRARoles))
    assert lora - hydra == 3 * size


def test_checkpoint_of_what_trains(trunk, head, sequences):
    roles, other = (
        make(HydraRoles, trunk, head),
        HydraRoles(trunk, head, LoRAConfig(2, 4), linear_layers(trunk), TEMPERATURE),
    )
    state = Trained(roles).state_dict()
    assert {name for name in state["trained"] if "lora" not in name} == {"value_head.weight", "value_head.bias"}
    Trained(other).load_state_dict(state)
    with torch.no_grad():
        for mine, wanted in zip(
            vars(other.score(sequences)).values(), vars(roles.score(sequences)).values(), strict=True
        ):
            assert torch.equal(mine, wanted)
        next(other.reward_head.parameters()).add_(1e-12)
    with pytest.raises(KernelabError, match="sha256"):
        Trained(other).load_state_dict(state)


def test_the_digest_sees_every_byte_and_name():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    first = digest(tensors)
    assert digest(dict(reversed(tensors.items()))) == first
    assert digest({"a": torch.arange(6.0).view(2, 3), "b": tensors["b"]}) != first
    assert digest({"c": tensors["a"], "b": tensors["b"]}) != first
    assert digest({"a": torch.nextafter(tensors["a"], torch.tensor(9.0)), "b": tensors["b"]}) != first


@pytest.mark.parametrize("prompts", [False, True])
def test_hydra_sft_loss_row_by_row(trunk, head, sequences, prompts):
    rejected = join(
        (sequences.tokens[:, :P], sequences.mask[:, :P]),
        (sequences.answers.flip(0), sequences.answer_mask.flip(0)),
    )
    loss = sft_loss(trunk, head, sequences, rejected, prompts=prompts)
    answers, texts, rewards = [], [], []
    for begin, kept, hidden in each_row(trunk, sequences):
        nll = F.cross_entropy(trunk.get_output_embeddings()(hidden[:-1]), kept[1:], reduction="none")
        texts.append(nll[: begin - 1])
        answers.append(nll[begin - 1 :])
        rewards.append(head(hidden[-1])[0])
    worse = [head(hidden[-1])[0] for _, _, hidden in each_row(trunk, rejected)]
    margins = torch.stack(rewards) - torch.stack(worse)
    torch.testing.assert_close(loss.pair, -F.logsigmoid(margins).mean())
    torch.testing.assert_close(loss.centre, (torch.stack(rewards) + torch.stack(worse)).square().mean())
    torch.testing.assert_close(loss.answer, torch.cat(answers).mean(), rtol=0, atol=1e-10)
    expected = torch.cat(texts).mean() if prompts else torch.zeros(()).double()
    torch.testing.assert_close(loss.prompt, expected, rtol=0, atol=1e-10)
    assert loss.accuracy == (margins > 0).float().mean()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_answers_that_share_a_prompt_do_not_see_each_other(trunk, sequences, attention):
    trunk.float().set_attn_implementation(attention)  # transformers' eager attention overflows in float64
    rejected = join(
        (sequences.tokens[:, :P], sequences.mask[:, :P]),
        (sequences.answers.roll(1, 0), sequences.answer_mask.roll(1, 0)),
    )
    with torch.no_grad():
        for found, side in zip(pair_states(trunk, sequences, rejected), (sequences, rejected), strict=True):
            check_rows(found, (hidden for _, _, hidden in each_row(trunk, side)), side.mask, atol=1e-5)


def ppo_of(trunk, head, **settings):
    config = Config(batch_size=6, num_mini_batches=1, num_ppo_epochs=2, temperature=TEMPERATURE, **settings)
    return PPO(make(HydraRoles, trunk, head), SimpleNamespace(end=1), config)


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
        ppo._minibatch = lambda sequences, scores, advantage, returned: returns.append(returned) or {"ratio_error": 0.0}
        torch.manual_seed(0)
        assert ppo.update(batch, scores)["unfinished"] == pytest.approx(2 / 3)
    loss = (returns[0] - returns[2]).max(1).values
    assert sorted(loss.tolist()) == pytest.approx([0.0, 3.0, 3.0])


@pytest.mark.parametrize("kind", [HydraRoles, LoRARoles])
def test_the_actor_answers_with_its_adapter_and_cache(trunk, head, sequences, kind):
    roles = make(kind, trunk, head)
    actor = dense(trunk, roles.actor_parameters())
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
    roles = make(HydraRoles, trunk, head)
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
