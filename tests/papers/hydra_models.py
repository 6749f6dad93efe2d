"""Small language models in float64, their roles, and the same models spelled out: dense, one row at a time."""

import copy

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernelab.lora import adapter_parameters
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.model import linear_layers
from kernelab.papers.hydra_rlhf.roles import METHODS, Roles

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


def new(method, trunk, head, reward_lm=None, *, reward_function=None, **settings):
    """Roles as PPO begins with them."""
    config = Config(method=method, lora_r=2, lora_alpha=4, temperature=TEMPERATURE, **settings)
    lm, head, reward_lm = (copy.deepcopy(model) for model in (trunk, head, reward_lm))
    return Roles(METHODS[method], lm, head, config, reward_lm=reward_lm, reward_function=reward_function)


def make(method, trunk, head, reward_lm=None, **settings):
    """Roles of which nothing that trains is at its start."""
    roles = new(method, trunk, head, reward_lm, **settings)
    values = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*roles.actor_parameters(), *roles.critic_parameters()]:
            change = 0.3 * torch.randn(parameter.shape, generator=values, dtype=torch.float64)
            parameter.copy_(change if roles.players["actor"].adapter else parameter + 0.1 * change)
    return roles


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
