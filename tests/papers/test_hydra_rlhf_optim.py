"""AdamW with its moments in 8 bits: what it holds, what it computes, and that a run goes on with it bitwise."""

from __future__ import annotations

import sys

import pytest
import torch

from kernelab._core.errors import KernelabError
from kernelab.experiment.checkpoint import Checkpoints
from kernelab.experiment.cli import main
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.cost import live_memory, step
from kernelab.papers.hydra_rlhf.model import mixed_precision
from kernelab.papers.hydra_rlhf.optimise import PPO, Descent, adamw
from kernelab.papers.hydra_rlhf.quantized import quantize
from kernelab.papers.hydra_rlhf.sft import Supervision
from tests.papers.hydra_models import llama
from tests.papers.test_hydra_rlhf_plan import ppo_and_prompts, settings, supervision_and_pairs
from tests.papers.test_hydra_rlhf_run import arguments, check_same, kill_at, write_rows

WIDE = {"lora_r": 90, "muon_learning_rate": 0.0}  # 90 x 48 elements and more
EIGHT = {"optim": "adamw_bnb_8bit", **WIDE}


def trainer_and_batch(config: Config, stage: str):
    return ppo_and_prompts(config) if stage == "ppo" else supervision_and_pairs(config, stage)


def train(trainer: PPO | Supervision, batch, config: Config, steps: range) -> None:
    with mixed_precision(config, torch.device("cpu")):
        for number in steps:
            torch.manual_seed(number)
            trainer.decay(1 - number / 10)
            step(trainer, batch, lambda part: torch.enable_grad())


def numbers(trainer: PPO | Supervision) -> dict[str, torch.Tensor]:
    """All that a step changes."""
    found = dict(trainer.model.named_parameters())
    for optimizer in trainer.descent.optimizers:
        for index, state in enumerate(optimizer.state.values()):
            found |= {f"{index}/{name}": torch.as_tensor(value) for name, value in state.items()}
    return found | {"scale": torch.tensor(trainer.descent.scaler.get_scale())}


@pytest.mark.parametrize("stage", ["ppo", "hydra_sft"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_goes_on_from_a_checkpoint_bitwise(tmp_path, stage, dtype):
    config = settings(**EIGHT, dtype=dtype)
    whole, batch = trainer_and_batch(config, stage)
    train(whole, batch, config, range(4))
    first, _ = trainer_and_batch(config, stage)
    train(first, batch, config, range(2))
    state = {name: value.state_dict() for name, value in first.state.items()}
    Checkpoints(tmp_path).save(stage, 2, state)
    again, _ = trainer_and_batch(config, stage)
    for name, saved in Checkpoints(tmp_path).newest(stage).load().items():
        again.state[name].load_state_dict(saved)
    train(again, batch, config, range(2, 4))
    found, expected = numbers(again), numbers(whole)
    assert found.keys() == expected.keys()
    assert any(value.dtype == torch.uint8 and value.any() for value in expected.values())
    for name, value in expected.items():
        assert value.dtype == found[name].dtype, name
        assert torch.equal(value, found[name]), name
    with mixed_precision(config, torch.device("cpu")):
        assert live_memory(again, batch)[0] == live_memory(whole, batch)[0]


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adamw_8bit"])
@pytest.mark.parametrize("stage", ["ppo", "hydra_sft"])
def test_it_is_adamw_with_coarser_moments(stage, name):
    """The first step computes with exact moments, the later ones with rounded ones."""
    moved = []
    for optim in ("adamw_torch", name):
        config = settings(**WIDE, optim=optim, num_mini_batches=1)
        trainer, batch = trainer_and_batch(config, stage)
        trained = [p for p in trainer.model.parameters() if p.requires_grad and p.numel() >= 4096]
        begun = [p.detach().clone() for p in trained]
        steps = []
        for number in range(3):
            train(trainer, batch, config, range(number, number + 1))
            steps.append(torch.cat([(p - start).flatten() for p, start in zip(trained, begun, strict=True)]).detach())
        moved.append(steps)
    torch.testing.assert_close(moved[0][0], moved[1][0], rtol=1e-3, atol=1e-7)
    apart = (moved[0][2] - moved[1][2]).norm() / moved[0][2].norm()
    assert 1e-3 < apart < 0.2


def test_the_bytes_that_it_saves():
    states = []
    for config in (settings(**WIDE), settings(**EIGHT)):
        ppo, prompts = ppo_and_prompts(config)
        train(ppo, prompts, config, range(1))
        states.append(live_memory(ppo, prompts)[0])
    sizes = [p.numel() for p in ppo.model.parameters() if p.requires_grad]
    large = [size for size in sizes if size >= 4096]
    assert 0.9 * sum(sizes) < sum(large) < sum(sizes)
    blocks = sum(-(-size // 256) for size in large)
    eight = 2 * sum(large) + 2 * 4 * blocks + 2 * 256 * 4  # moments, their scales, two tables
    assert states[0] - states[1] == 8 * sum(large) + 4 * len(sizes) - eight  # torch keeps the step in a tensor


def test_clipping_and_scaling_come_before_it():
    parameter = torch.nn.Parameter(torch.ones(8192))
    config = Config(dtype="float16", optim="adamw_bnb_8bit", max_grad_norm=2.0)
    optimizer = adamw(config, [parameter], lr=0.1)
    descent = Descent(config, [optimizer], {"norm": [parameter]})

    def norm(factor: float) -> float:
        descent.zero_grad()
        descent.backward(factor * parameter.sum())
        found = descent.norms()["norm"]
        descent.step()
        return found

    assert norm(1e35) == 0
    assert torch.equal(parameter, torch.ones(8192))
    assert not optimizer.state
    assert norm(0.5) == pytest.approx(0.5 * 8192**0.5)
    largest = optimizer.state[parameter]["absmax1"]  # of each block's first moment: a tenth of the clipped gradient
    torch.testing.assert_close(largest, torch.full((32,), 0.1 * 2 / 8192**0.5), rtol=1e-3, atol=0)


def test_without_bitsandbytes_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for wants in (lambda: adamw(Config(optim="adamw_8bit"), []), lambda: quantize(llama())):
        with pytest.raises(KernelabError, match=r"bitsandbytes is not installed; .*kernelab\[rlhf\]"):
            wants()


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    flags = ["--optim", "adamw_8bit", "--lora-r", "256", "--cost-steps", "0", "--sft-steps", "2"]
    data = write_rows(tmp_path / "rows.jsonl")
    assert main(arguments(tmp_path / "whole", data, *flags)) == 0
    kill_at(tmp_path / "run", "ppo_hydra", 3, arguments(tmp_path / "run", data, *flags))
    assert main(["run", "hydra-rlhf", "--out", str(tmp_path / "run"), "--resume"]) == 0
    check_same(tmp_path / "run", tmp_path / "whole")
