"""Four models on one trunk are four models: in what they score, and in what their gradients reach."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kernelab._core.errors import KernelabError
from kernelab._core.memory import saved_bytes
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.model import digest, linear_layers, pair_states
from kernelab.papers.hydra_rlhf.roles import METHODS, Trained
from kernelab.papers.hydra_rlhf.sft import Supervised
from kernelab.papers.hydra_rlhf.tokens import join
from tests.papers.hydra_models import B, P, R, check_rows, dense, each_row, expected_logprobs, llama, make, new


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
    def count(parameters):
        return sum(p.numel() for p in parameters)

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
