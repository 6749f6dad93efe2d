"""A script for two processes: FSDP2 shards the trunks, PPO updates them, and checkpoints are written and read.

``python -m tests.papers.hydra_sharded FOLDER``; what it finds is compared with what one process obtains.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.tensor import DTensor

from kernelab.experiment.checkpoint import Checkpoints
from kernelab.experiment.device import from_all, leave_processes, process_index
from kernelab.experiment.files import write_json
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.model import new_reward_head
from kernelab.papers.hydra_rlhf.optimise import PPO
from kernelab.papers.hydra_rlhf.roles import make_roles
from kernelab.papers.hydra_rlhf.rollout import sample_answers
from kernelab.papers.hydra_rlhf.tokens import join
from tests.papers.hydra_models import P, R, V, gpt2, llama

CASES = {"hydra": llama, "ppo": gpt2}


def start(method):
    """PPO as it begins; processes would draw different adapters."""
    torch.manual_seed(0)
    lm = CASES[method]().double().eval()
    task = SimpleNamespace(lm=lm, head=new_reward_head(lm).double(), reward_lm=None, reward_function=None)
    config = Config(method=method, lora_r=3, batch_size=8, num_mini_batches=1, gradient_accumulation_steps=2)
    torch.manual_seed(process_index())
    return PPO(make_roles(method, config, task), SimpleNamespace(end=1), config)


def answers():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (8, P + R), generator=generator)
    prompt_mask = torch.arange(P) >= torch.arange(8)[:, None] % P
    answer_mask = torch.arange(R) <= torch.arange(8)[:, None] % R
    return join((tokens[:, :P], prompt_mask), (tokens[:, P:], answer_mask))


def update(ppo):
    batch = answers()
    torch.manual_seed(5)
    return ppo.update(batch, ppo.score(batch))


def sampled(ppo, index):
    """The answers of a process to its half of the prompts; one ends before the other's."""
    half = answers()[slice(4 * index, 4 * index + 4)]
    torch.manual_seed(index)
    encoder = SimpleNamespace(end=1, pad=0, response_length=R - index)
    with ppo.roles.acting():
        return sample_answers(ppo.roles.actor, (half.tokens[:, :P], half.mask[:, :P]), encoder, 1.0)


def state_of(ppo):
    return {name: value.state_dict() for name, value in ppo.state.items()}


def load(ppo, state):
    for name, value in ppo.state.items():
        value.load_state_dict(state[name])


def local_bytes(ppo):
    """Of the trunks' layers and of the rest, on this process."""
    found = {True: 0, False: 0}
    for name, parameter in ppo.roles.trunks.named_parameters():
        sharded = isinstance(parameter, DTensor)
        assert sharded == (".layers." in name or ".h." in name), name
        found[sharded] += (parameter.to_local() if sharded else parameter).nbytes
    return found[True], found[False]


def main(folder):
    for method in CASES:
        ppo = start(method)
        found = {"bytes": from_all(local_bytes(ppo)), "digest": ppo.roles.base_digest(), "first": update(ppo)}
        state = state_of(ppo)
        if process_index() == 0:
            Checkpoints(folder / "two").save(method, 1, state)
        ppo.roles.save(folder / "two" / method)
        found["answers"] = [tokens.tolist() for tokens in from_all(sampled(ppo, process_index()).tokens)]
        found["second"] = update(ppo)
        for place in ("two", "one"):
            again = start(method)
            load(again, Checkpoints(folder / place).newest(method).load())
            found[f"second after {place}"] = update(again)
        if process_index() == 0:
            write_json(folder / f"{method}.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_processes()
