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


def make(mesh):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.2), torch.nn.Linear(6, 3))
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(folder, mesh, save_at):
    with Run(folder, Config(), paper="toy_paper") as run:
        model, optimizer = make(mesh)
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


def main(folder):
    mesh = init_device_mesh("cpu", (2,))
    whole = train(folder, mesh, save_at=3)
    assert all(map(torch.equal, whole, train(folder, mesh, save_at=None)))


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    main(Path(sys.argv[1]))
    leave_processes()
