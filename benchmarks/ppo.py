"""A step of Hydra-PPO and of TRL's PPOTrainer on the same small model and tokens: peak memory, and time by part.

    python benchmarks/ppo.py [--steps 5] [--record]

TRL answers with its policy; kernelab scores and learns from those answers. The policy's LoRA, the batch, mini-batches,
epochs and losses are the same. TRL trains a whole value model, since it has LoRA for the policy alone, and keeps a
reward model; its reference is the policy with the adapter disabled. Bytes are counted exactly, seconds are medians of
steps taken in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import transformers
from peft import LoraConfig
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks import record
from benchmarks.provider import SEED
from kernelab._core.memory import LiveBytes
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.cost import live_memory
from kernelab.papers.hydra_rlhf.model import linear_layers, new_reward_head, small_llama
from kernelab.papers.hydra_rlhf.optimise import PPO
from kernelab.papers.hydra_rlhf.roles import METHODS, Roles
from kernelab.papers.hydra_rlhf.tokens import Sequences

PAD, END = 0, 1
# TRL's loop clips no gradients, and answers as many prompts at once as a mini-batch has.
CONFIG = replace(Config(), num_ppo_epochs=1, max_grad_norm=1e9, local_rollout_forward_batch_size=8)


class Tokenizer:
    """The ids that the trainers ask for. TRL is told no end token, so every answer has its full length."""

    pad_token_id, eos_token_id = PAD, END

    def __len__(self) -> int:
        return CONFIG.vocab_size


class Peer:
    """TRL's trainer, one step at a time, and the answers and times of its last one."""

    def __init__(self, lm: nn.Module, head: nn.Linear, prompts: Tensor, folder: str, checkpointing: bool):
        part = CONFIG.batch_size // CONFIG.num_mini_batches
        arguments = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            total_episodes=CONFIG.batch_size,
            per_device_train_batch_size=part,
            gradient_accumulation_steps=CONFIG.num_mini_batches,
            num_mini_batches=CONFIG.num_mini_batches,
            num_ppo_epochs=CONFIG.num_ppo_epochs,
            local_rollout_forward_batch_size=CONFIG.local_rollout_forward_batch_size,
            response_length=CONFIG.response_length,
            temperature=CONFIG.temperature,
            kl_coef=CONFIG.kl_coef,
            cliprange=CONFIG.cliprange,
            cliprange_value=CONFIG.cliprange_value,
            vf_coef=CONFIG.vf_coef,
            gamma=CONFIG.gamma,
            lam=CONFIG.lam,
            gradient_checkpointing=checkpointing,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            seed=SEED,
        )
        value, reward = (_scorer(lm, head) for _ in range(2))
        self.trainer = PPOTrainer(
            args=arguments,
            processing_class=Tokenizer(),
            model=copy.deepcopy(lm),
            ref_model=None,
            reward_model=reward.requires_grad_(False),
            value_model=value,
            train_dataset=datasets.Dataset.from_dict({"input_ids": prompts.tolist()}),
            data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
            peft_config=LoraConfig(r=CONFIG.lora_r, lora_alpha=CONFIG.lora_alpha, target_modules=linear_layers(lm)),
        )
        if checkpointing:
            self.trainer.model.gradient_checkpointing_enable()
        self.trainer.callback_handler.callbacks = []
        self.seconds: dict[str, float] = {}
        self.answers = torch.empty(0)

    def parameters(self) -> Iterator[Tensor]:
        yield from self.trainer.model.parameters()
        yield from self.trainer.reward_model.parameters()

    def step(self) -> None:
        """Answers, scores and updates once. ``update`` is the time inside accelerate's accumulation blocks."""
        accelerator, generate = self.trainer.accelerator, ppo_trainer.batch_generation
        accumulate, update, answered = accelerator.accumulate, 0.0, 0.0

        @contextlib.contextmanager
        def timed(*models):
            nonlocal update, answered
            began = time.perf_counter()
            self.seconds.setdefault("score", began - answered)
            with accumulate(*models):
                yield
            update += time.perf_counter() - began

        def recorded(*arguments):
            nonlocal answered
            self.answers, logits = generate(*arguments)
            answered = time.perf_counter()
            return self.answers, logits

        self.seconds = {}
        accelerator.accumulate, ppo_trainer.batch_generation = timed, recorded
        try:
            with contextlib.redirect_stdout(None):
                self.trainer.train()
        finally:
            accelerator.accumulate, ppo_trainer.batch_generation = accumulate, generate
        self.seconds["update"] = update


def _scorer(lm: nn.Module, head: nn.Linear) -> nn.Module:
    """``lm`` with ``head`` as transformers' sequence classifier, which TRL wants for values and rewards."""
    settings = copy.deepcopy(lm.config)
    settings.num_labels = 1
    model = transformers.LlamaForSequenceClassification(settings)
    model.model.load_state_dict(lm.model.state_dict())
    model.score.weight.data.copy_(head.weight.data)
    return model


def sequences(answers: Tensor) -> Sequences:
    return Sequences(answers, answers != PAD, CONFIG.prompt_length)


@torch.no_grad()
def refcheck(lm: nn.Module, reference: Tensor, found: Sequences) -> float:
    """Largest difference of kernelab's log-probabilities of the reference and those that TRL's functions give."""
    logits = ppo_trainer.forward(lm, found.tokens, PAD).logits[:, CONFIG.prompt_length - 1 : -1] / CONFIG.temperature
    error = (ppo_trainer.selective_log_softmax(logits, found.answers) - reference).abs().max().item()
    if error > 1e-4:
        raise AssertionError(f"kernelab and TRL score the same answers differently, by {error}")
    return error


def measure(steps: int) -> list[record.Row]:
    """Rows of kernelab and of TRL with and without its default, gradient checkpointing."""
    torch.manual_seed(SEED)
    encoder = SimpleNamespace(tokenizer=Tokenizer(), pad=PAD, end=END, response_length=CONFIG.response_length)
    lm = small_llama(CONFIG, encoder).eval()
    head = new_reward_head(lm)
    nn.init.zeros_(head.bias)  # transformers' classifier has none
    prompts = torch.randint(2, CONFIG.vocab_size, (CONFIG.batch_size, CONFIG.prompt_length))
    seconds: dict[str, list[dict[str, float]]] = {}
    everything = torch.ones_like(prompts, dtype=torch.bool)
    with tempfile.TemporaryDirectory() as folder:
        peers = {
            name: Peer(lm, head, prompts, folder, checkpointing)
            for name, checkpointing in (("trl", False), ("trl-checkpointing", True))
        }
        roles = Roles(METHODS["hydra"], copy.deepcopy(lm), copy.deepcopy(head), CONFIG)
        ours = PPO(roles, encoder, CONFIG)
        peaks = {}
        for name, peer in peers.items():
            with LiveBytes() as live:
                live.track(peer.parameters())
                peer.step()
            peaks[name] = live.peak
        found = sequences(peers["trl"].answers)
        error = refcheck(lm, ours.score(found).reference, found)
        ours.update(found, ours.score(found))  # makes the optimizer's state
        peaks["kernelab"] = max(live_memory(ours, (prompts, everything))[1].values())
        for _ in range(steps):
            for name, peer in peers.items():
                peer.step()
                seconds.setdefault(name, []).append(peer.seconds)
            found = sequences(peers["trl"].answers)
            began = time.perf_counter()
            scores = ours.score(found)
            scored = time.perf_counter()
            ours.update(found, scores)
            mine = {"score": scored - began, "update": time.perf_counter() - scored}
            seconds.setdefault("kernelab", []).append(mine)
    return [
        record.Row(
            op="ppo_step",
            direction=part,
            case="demo",
            dtype="float32",
            device="cpu",
            machine=record.machine("cpu"),
            provider=name,
            refcheck_error=error,
            rounds=steps,
            peak_bytes=peaks[name],
            **_milliseconds([step[part] for step in seconds[name]]),
        )
        for part in ("score", "update")
        for name in ("kernelab", *peers)
    ]


def _milliseconds(times: list[float]) -> dict[str, float]:
    low, high = (statistics.quantiles(times, n=5)[index] for index in (0, 3))
    return {"median_ms": 1e3 * statistics.median(times), "p20_ms": 1e3 * low, "p80_ms": 1e3 * high}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append the rows to --results")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    rows = measure(options.steps)
    table = Table("part", "provider", "ms (p20-p80)", "kernelab / it", "peak MB of the step", "kernelab / it")
    ours = {row.direction: row for row in rows if row.provider == "kernelab"}
    for row in rows:
        mine = ours[row.direction]
        times = f"{row.median_ms:.0f} ({row.p20_ms:.0f}-{row.p80_ms:.0f})"
        ratios = f"{mine.median_ms / row.median_ms:.2f}", f"{mine.peak_bytes / row.peak_bytes:.2f}"
        table.add_row(row.direction, row.provider, times, ratios[0], f"{row.peak_bytes / 1e6:.1f}", ratios[1])
        if options.record:
            record.append(row, options.results)
    Console().print(table)


if __name__ == "__main__":
    main()
