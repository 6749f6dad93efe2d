"""Small language models in float64 and answers of different lengths, for the tests of Hydra-RLHF."""

import copy

import pytest
import torch

from kernelab.papers.hydra_rlhf.model import new_reward_head
from kernelab.papers.hydra_rlhf.tokens import join
from tests.papers.hydra_models import B, P, R, V, gpt2, llama


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


@pytest.fixture
def reward_lm(trunk):
    """Another model than the trunk."""
    other = copy.deepcopy(trunk)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other
