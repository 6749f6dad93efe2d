"""Four models on one trunk are four models: in what they score, and in what their gradients reach."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernelab._core.errors import KernelabError
from kernelab._core.memory import saved_bytes
from kernelab.lora import adapter_parameters
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.evaluate import evaluate, token_f1
from kernelab.papers.hydra_rlhf.model import digest, linear_layers, new_reward_head, pair_states
from kernelab.papers.hydra_rlhf.optimise import PPO, TrainingDiverged, check_finite
from kernelab.papers.hydra_rlhf.roles import METHODS, Roles, Trained
from kernelab.papers.hydra_rlhf.rollout import sample_answers
from kernelab.papers.hydra_rlhf.sft import Supervised
from kernelab.papers.hydra_rlhf.task import Questions
from kernelab.papers.hydra_rlhf.tokens import join, stack

B, P, R, V, D = 3, 5, 4, 32, 16
TEMPERATURE = 0.8


def llama():
    sizes = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=V, max_position_embeddings=P + R, **sizes))
    for name, module in list(lm.named_modules()):
        if isinstance(module, LlamaRMSNorm):  # it computes in float32
            lm.set_submodule(name, torch.nn.RMSNorm(D, eps=module.variance_epsilon))
    return lm


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


def new(method, trunk, head, reward_lm=None, **settings):
    """Roles as PPO begins with them."""
    config = Config(method=method, lora_r=2, lora_alpha=4, temperature=TEMPERATURE, **settings)
    models = (copy.deepcopy(model) for model in (trunk, head, reward_lm))
    lm, head, reward_lm = models
    return Roles(METHODS[method], lm, head, config, reward_lm=reward_lm)


def make(method, trunk, head, reward_lm=None, **settings):
    """Roles of which nothing that trains is at its start."""
    roles = new(method, trunk, head, reward_lm, **settings)
    values = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*roles.actor_parameters(), *roles.critic_parameters()]:
            change = 0.3 * torch.randn(parameter.shape, generator=values, dtype=torch.float64)
            parameter.copy_(change if roles.players["actor"].adapter else parameter + 0.1 * change)
    return roles


@pytest.fixture
def reward_lm(trunk):
    """Another model than the trunk."""
    other = copy.deepcopy(trunk)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other


def dense(roles, name, trunk):
    """The actor or critic as a plain model, its adapter's ``A, B, A, B, ...`` added to the weights of the trunk."""
    player = roles.players[name]
    if player.adapter is None:
        return copy.deepcopy(roles.trunks[player.trunk])
    merged = copy.deepcopy(trunk)
    parameters = adapter_parameters(roles.trunks[player.trunk], player.adapter)
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


@pytest.mark.parametrize("method", METHODS)
def test_scoring_equals_four_dense_models(trunk, head, reward_lm, sequences, method):
    roles = make(method, trunk, head, reward_lm)
    reward_lm = trunk if METHODS[method].joint else reward_lm
    actor, critic = dense(roles, "actor", trunk), dense(roles, "critic", reward_lm)
    with torch.no_grad():
        scores = roles.score(sequences)
        rewards = torch.stack([head(hidden[-1])[0] for _, _, hidden in each_row(reward_lm, sequences)])
        values = [roles.value_head(hidden[begin - 1 : -1])[:, 0] for begin, _, hidden in each_row(critic, sequences)]
        check_rows(scores.reference, expected_logprobs(trunk, sequences), sequences.answer_mask)
        check_rows(scores.logprob, expected_logprobs(actor, sequences), sequences.answer_mask)
        check_rows(scores.value, values, sequences.answer_mask)
    torch.testing.assert_close(scores.reward, rewards, rtol=0, atol=1e-10)
    torch.testing.assert_close(roles.reward(sequences), rewards, rtol=0, atol=1e-10)
    assert not any(tensor.requires_grad for tensor in vars(scores).values())
    off = roles.score(sequences, policy=False)
    torch.testing.assert_close(off.reference, scores.reference, rtol=0, atol=1e-10)
    torch.testing.assert_close(off.reward, scores.reward, rtol=0, atol=1e-10)
    assert off.logprob is off.value is None


def test_every_method_begins_with_the_same_scores(trunk, head, sequences):
    plain = copy.deepcopy(trunk)
    values = [head(hidden[begin - 1 : -1])[:, 0] for begin, _, hidden in each_row(plain, sequences)]
    for method in METHODS:
        roles = new(method, trunk, head)
        scores = roles.score(sequences)
        check_rows(scores.value, values, sequences.answer_mask)  # the critic begins as the reward model
        check_rows(scores.reference, expected_logprobs(plain, sequences), sequences.answer_mask)
        torch.testing.assert_close(scores.logprob, scores.reference, rtol=0, atol=1e-10)
        assert roles.value_head.weight is not roles.reward_head.weight


@pytest.mark.parametrize("method", METHODS)
def test_the_joint_gradient_is_that_of_two_models(trunk, head, reward_lm, sequences, method):
    roles = make(method, trunk, head, reward_lm)
    reward_lm = trunk if METHODS[method].joint else reward_lm
    mask = sequences.answer_mask
    cotangents = torch.randn(2, B, R, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * mask
    outputs = roles(sequences)
    (cotangents[0] * outputs.logprob + cotangents[1] * outputs.value).sum().backward()
    actor, critic = dense(roles, "actor", trunk), dense(roles, "critic", reward_lm)
    value_head = copy.deepcopy(roles.value_head).requires_grad_(True)
    value_head.zero_grad()
    for lm in (actor, critic):
        lm.zero_grad()
        lm.requires_grad_(True)
    for logprob, row in zip(expected_logprobs(actor, sequences), range(B), strict=True):
        (cotangents[0, row][mask[row]] * logprob).sum().backward()
    for (begin, _, hidden), row in zip(each_row(critic, sequences), range(B), strict=True):
        (cotangents[1, row][mask[row]] * value_head(hidden[begin - 1 : -1])[:, 0]).sum().backward()
    expected = expected_gradients(roles, actor, critic)
    for name, parameter in roles.named_parameters():
        if name.startswith("value_head."):
            wanted = value_head.get_parameter(name.removeprefix("value_head.")).grad
        elif parameter.requires_grad:
            wanted = expected.pop(name)
        else:
            assert parameter.grad is None
            continue
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-10)
    assert not expected


def expected_gradients(roles, actor, critic):
    """Of all that trains, the value head apart, from the gradients of the dense actor and critic."""
    found = {}
    for name, lm in (("actor", actor), ("critic", critic)):
        trunk, adapter = roles.players[name]
        if adapter is None:
            whole = lm if name == "actor" else lm.base_model
            kept = {id(p) for p in whole.parameters()}
            found |= {f"trunks.{trunk}.{key}": p.grad for key, p in lm.named_parameters() if id(p) in kept}
            continue
        for layer in linear_layers(lm):
            module = roles.trunks[trunk].get_submodule(layer)
            dense_layer = lm.get_submodule(layer)
            gradient = dense_layer.weight.grad
            gradient = gradient if isinstance(dense_layer, torch.nn.Linear) else gradient.T
            path = f"trunks.{trunk}.{layer}"
            for part, value in (
                (f"{path}.lora_a.{adapter}", 2 * module.lora_b[adapter].detach().T @ gradient),
                (f"{path}.lora_b.{adapter}", 2 * gradient @ module.lora_a[adapter].detach().T),
            ):
                found[part] = found.get(part, 0) + value
    return found


def test_a_role_gets_nothing_from_the_other_loss(trunk, head, sequences):
    roles = make("hydra", trunk, head)
    roles(sequences).logprob.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in roles.critic_parameters())
    assert any(p.grad.any() for p in roles.actor_parameters())
    roles.zero_grad()
    roles(sequences).value.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in roles.actor_parameters())
    assert any(p.grad.any() for p in roles.critic_parameters())


def test_the_entropy_carries_no_gradient(trunk, head, sequences):
    assert not make("hydra", trunk, head)(sequences).entropy.requires_grad


def test_the_value_gradient_can_be_kept_from_the_shared_adapter(trunk, head, sequences):
    for detached in (False, True):
        roles = make("j_hydra", trunk, head, detach_value=detached)
        roles(sequences).value.sum().backward()
        assert all(p.grad.any() for p in roles.value_head.parameters())
        assert any(p.grad is not None and p.grad.any() for p in roles.actor_parameters()) != detached


@pytest.mark.parametrize(
    ("method", "trunks", "adapters", "trained"),
    [("ppo", 4, 0, 2), ("lora", 4, 2, 0), ("dynamic", 2, 2, 0), ("j_hydra", 1, 1, 0), ("hydra", 1, 2, 0)],
)
def test_what_each_method_holds(trunk, head, method, trunks, adapters, trained):
    count = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
    heads, size = 2 * count(head.parameters()), count(trunk.parameters())
    adapter = count(make("hydra", trunk, head).actor_parameters())
    roles = make(method, trunk, head)
    assert count(roles.parameters()) == heads + trunks * size + adapters * adapter
    tied = trunk.lm_head.weight is trunk.base_model.get_input_embeddings().weight
    unused = 0 if tied or not trained else count(trunk.lm_head.parameters())  # the critic's
    expected = heads // 2 + adapters * adapter + trained * size - unused
    assert count([*roles.actor_parameters(), *roles.critic_parameters()]) == expected
    assert len({id(p) for p in roles.parameters()}) == len(list(roles.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_of_what_trains(trunk, head, sequences, method):
    roles, other = make(method, trunk, head), new(method, trunk, head)
    state = Trained(roles).state_dict()
    Trained(other).load_state_dict(state)
    with torch.no_grad():
        for mine, wanted in zip(
            vars(other.score(sequences)).values(), vars(roles.score(sequences)).values(), strict=True
        ):
            assert torch.equal(mine, wanted)
        next(other.reward_head.parameters()).add_(1e-12)
    with pytest.raises(KernelabError, match="sha256"):
        Trained(other).load_state_dict(state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trunk", [llama], indirect=True)
def test_checkpointed_layers_give_the_same_gradients(trunk, head, reward_lm, sequences, method):
    gradients, saved = [], []
    for checkpointing in (False, True):
        roles = make(method, trunk, head, reward_lm, gradient_checkpointing=checkpointing)
        saved.append(saved_bytes(lambda roles=roles: roles(sequences)))
        outputs = roles(sequences)
        (outputs.logprob.sum() + outputs.value.square().sum()).backward()
        gradients.append([p.grad for p in roles.parameters() if p.requires_grad])
        assert not roles.training  # in which transformers would generate without its cache
    assert saved[1] < saved[0]
    assert all(map(torch.equal, *gradients))


def test_the_digest_sees_every_byte_and_name():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    first = digest(tensors)
    assert digest(dict(reversed(tensors.items()))) == first
    assert digest({"a": torch.arange(6.0).view(2, 3), "b": tensors["b"]}) != first
    assert digest({"c": tensors["a"], "b": tensors["b"]}) != first
    assert digest({"a": torch.nextafter(tensors["a"], torch.tensor(9.0)), "b": tensors["b"]}) != first


@pytest.mark.parametrize("stage", ["hydra_sft", "sft", "rm"])
@pytest.mark.parametrize("prompts", [False, True])
def test_supervised_losses_row_by_row(trunk, head, sequences, stage, prompts):
    rejected = join(
        (sequences.tokens[:, :P], sequences.mask[:, :P]),
        (sequences.answers.flip(0), sequences.answer_mask.flip(0)),
    )
    module = Supervised(stage, trunk, head, Config(prompt_coef=float(prompts)))
    found = module(sequences, rejected)
    answers, texts, rewards = [], [], []
    for begin, kept, hidden in each_row(trunk, sequences):
        nll = F.cross_entropy(trunk.get_output_embeddings()(hidden[:-1]), kept[1:], reduction="none")
        texts.append(nll[: begin - 1])
        answers.append(nll[begin - 1 :])
        rewards.append(head(hidden[-1])[0])
    worse = [head(hidden[-1])[0] for _, _, hidden in each_row(trunk, rejected)]
    margins = torch.stack(rewards) - torch.stack(worse)
    expected = {}
    if stage != "sft":
        expected["pair"] = -F.logsigmoid(margins).mean()
        expected["centre"] = (torch.stack(rewards) + torch.stack(worse)).square().mean()
        expected["accuracy"] = (margins > 0).float().mean()
    if stage != "rm":
        expected["answer"] = torch.cat(answers).mean()
    if stage != "rm" and prompts:
        expected["prompt"] = torch.cat(texts).mean()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)
    sum(value for name, value in found.items() if name != "accuracy").backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name  # DDP waits for each that requires one


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
