"""A script for two processes: FSDP2 trains, saves, goes on; a second model resumes and must end equal."""

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kernelab.experiment.device import FullState, leave_processes, process_index
from kernelab.experiment.run import Run
from tests.experiment.toy import Config


def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.2), torch.nn.Linear(6, 3))
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(folder, save_at):
    with Run(folder, Config(), paper="toy_paper") as run:
        model, optimizer = make()
        torch.manual_seed(process_index())
        state = {"training": FullState(model, optimizer)}
        for step in run.steps(run.restore(state), 6):
            loss = model(torch.randn(5, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == save_at:
                run.save(step, state)
    return [parameter.full_tensor() for parameter in model.parameters()]


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    folder = Path(sys.argv[1])
    whole = train(folder, save_at=3)
    assert all(map(torch.equal, whole, train(folder, save_at=None)))
    leave_processes()
