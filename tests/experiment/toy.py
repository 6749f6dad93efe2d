"""A toy paper: a small network with dropout and AdamW, in two phases. As a script: a ``kernelab`` that knows it."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save_file

from kernelab.experiment import Paper
from kernelab.experiment.cli import main
from kernelab.experiment.device import accelerator
from kernelab.experiment.figures import curves

PAPER = Paper(
    key="toy_paper",
    title="A toy",
    arxiv="0000.00000",
    summary="Learns a line.",
    config=f"{__name__}:Config",
    train=f"{__name__}:train",
    plan=f"{__name__}:plan",
)


@dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 12
    learning_rate: float = 1e-2
    """The optimizer's step size."""
    checkpoint_every: int = 4
    faults: tuple[str, ...] = ()
    """``SIGKILL@fit:5``: what the process sends itself after a step, once a folder."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")


PRESETS = {"demo": Config(), "small": Config(steps=40, learning_rate=3e-3)}


def train(config: Config, run) -> dict:
    acc = accelerator()
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    model, optimizer = acc.prepare(model, optimizer)
    sampler = torch.Generator().manual_seed(config.seed + acc.process_index)
    state = {"model": model, "optimizer": optimizer, "sampler": sampler, "best": float("inf")}
    for phase in ("fit", "tune"):
        start = run.restore(state, phase)
        for step in run.steps(start, config.steps):
            x = torch.randn(8, 4, generator=sampler) + np.random.normal()
            loss = (model(x)[:, 0] - x.sum(-1)).square().mean()
            optimizer.zero_grad()
            acc.backward(loss)
            optimizer.step()
            mean_loss = acc.reduce(loss.detach(), "mean")
            state["best"] = min(state["best"], mean_loss.item())
            run.log(step, {"loss": mean_loss, "best": state["best"]})
            run.timing(step, {"seconds": time.perf_counter()})
            _signal(config.faults, f"{phase}:{step}", run.folder)
            if run.should_checkpoint(step, config.checkpoint_every):
                run.save(step, state)
        run.log(config.steps, {"weight": next(model.parameters()).sum(), "noise": torch.randn(()).item()})
    if run.is_main:
        save_file(acc.unwrap_model(model).state_dict(), run.folder / "final.safetensors")
    run.claim(
        "the loss falls", expected="< first", obtained=state["best"], passed=state["best"] < run.metrics()[0]["loss"]
    )
    run.claim("pigs fly", expected=True, obtained=False, passed=False)
    run.figure("loss", curves(run.metrics("fit"), ["loss", "best"]))
    return {"best": state["best"]}


def plan(batch: int = 8) -> str:
    return f"{batch * 4} floats"


def _signal(faults: tuple[str, ...], here: str, folder) -> None:
    for name in ("SIGKILL", "SIGINT"):
        sent = folder / f"{name}-{here.replace(':', '-')}"
        if f"{name}@{here}" in faults and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), getattr(signal, name))


if __name__ == "__main__":
    sys.exit(main(papers={PAPER.key: PAPER}))
