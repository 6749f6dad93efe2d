"""Hydra-SFT, then PPO on its frozen trunk, and what both are worth on prompts that no training saw."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from kernelab._core.errors import KernelabError
from kernelab.experiment.device import process_count
from kernelab.experiment.run import Run
from kernelab.lora import LoRAConfig, save_adapter
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.cost import Cost, live_memory, medians, seconds
from kernelab.papers.hydra_rlhf.evaluate import evaluate, ranking, token_f1s
from kernelab.papers.hydra_rlhf.model import linear_layers, save_hydra
from kernelab.papers.hydra_rlhf.optimise import PPO, check_finite
from kernelab.papers.hydra_rlhf.report import report
from kernelab.papers.hydra_rlhf.roles import HydraRoles, LoRARoles, Roles, Trained
from kernelab.papers.hydra_rlhf.sft import sft_loss
from kernelab.papers.hydra_rlhf.task import Task, prepare
from kernelab.papers.hydra_rlhf.tokens import shuffled

METHODS: dict[str, type[Roles]] = {"lora": LoRARoles, "hydra": HydraRoles}


def train(config: Config, run: Run) -> dict[str, Any]:
    """Hydra-SFT; the costs of LoRA-PPO and Hydra-PPO side by side; PPO; the held-out scores before and after."""
    if process_count() > 1:
        raise KernelabError("hydra-rlhf runs on one device: start it with one process.")
    transformers_logging.disable_progress_bar()
    task = prepare(config)
    dtype = getattr(torch, config.dtype)
    with torch.autocast(task.lm.device.type, dtype, enabled=dtype != torch.float32):
        supervise(config, run, task)
        ranked = ranking(task.lm, task.head, *task.held_out_pairs.pairs(slice(config.eval_prompts or None)))
        save_hydra(run.folder / "model", task.lm, task.head, task.encoder.tokenizer)
        task.lm.to(dtype)
        costs = compare_costs(config, run, task)
        roles = make_roles(config.method, config, task)
        digest = roles.base_digest()
        before = evaluate(roles, task.held_out_questions, task.encoder, seed=config.seed)
        reinforce(config, run, task, roles)
        after = evaluate(roles, task.held_out_questions, task.encoder, seed=config.seed)
    for lm, name in ((roles.actor, "actor"), (roles.critic, "critic")):
        save_adapter(lm, name, run.folder / "adapters" / name)
    return report(run, task, ranked, (before, after), costs, (digest, roles.base_digest()))


def supervise(config: Config, run: Run, task: Task) -> None:
    """Phase ``sft``: Hydra-SFT."""
    optimizers = sft_optimizers(config, task)
    peaks = {name: optimizer.defaults["lr"] for name, optimizer in optimizers.items()}
    parameters = [*task.lm.parameters(), *task.head.parameters()]
    state = {"lm": task.lm, "head": task.head, **optimizers}
    start = run.restore(state, phase="sft")
    for step in run.steps(start, config.sft_steps, "Hydra-SFT"):
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = peaks[name] * warm_cosine(step, config.sft_steps)
        rows = shuffled(step, config.sft_batch_size, len(task.pairs), config.seed)
        losses = sft_loss(task.lm, task.head, *task.pairs.pairs(rows), prompts=config.prompt_coef > 0)
        loss = losses.total(config)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        metrics = {name: value.item() for name, value in {"loss": loss, "norm": norm, **vars(losses)}.items()}
        run.log(step, metrics)
        check_finite("Hydra-SFT", step, metrics)
        for optimizer in optimizers.values():
            optimizer.step()
        if run.should_checkpoint(step, every=max(1, config.sft_steps // 5)):
            run.save(step, state)


def sft_optimizers(config: Config, task: Task) -> dict[str, torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the trunk's layers, if it is asked for, and AdamW for the rest."""
    names = {f"{layer}.weight" for layer in linear_layers(task.lm)} if config.muon_learning_rate else set()
    matrices = [p for name, p in task.lm.named_parameters() if name in names]
    others = [p for name, p in task.lm.named_parameters() if name not in names]
    decay = {"weight_decay": config.weight_decay}
    made: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(
            [*others, *task.head.parameters()], lr=config.sft_learning_rate, betas=(0.9, 0.95), **decay
        )
    }
    if matrices:
        made["muon"] = torch.optim.Muon(matrices, lr=config.muon_learning_rate, adjust_lr_fn="match_rms_adamw", **decay)
    return made


def warm_cosine(step: int, steps: int, warm_up: int = 30) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine from 1 to 0.05."""
    return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def make_roles(method: str, config: Config, task: Task) -> Roles:
    adapter = LoRAConfig(r=config.lora_r, alpha=config.lora_alpha)
    targets = config.target_modules or linear_layers(task.lm)
    return METHODS[method](task.lm, task.head, adapter, targets, config.temperature)


def compare_costs(config: Config, run: Run, task: Task) -> list[Cost]:
    """Phase ``cost``: a step of each method in turn, on copies of the model. The first step counts memory."""
    if not config.cost_steps:
        return []
    state: dict[str, Any] = {"costs": []}
    start = run.restore(state, phase="cost")
    with torch.random.fork_rng():
        contenders = {} if start else {name: _contender(name, config, task) for name in METHODS}
    memory, times = {}, {name: [] for name in METHODS}
    for step in run.steps(start, 1 + config.cost_steps, "cost of PPO"):
        prompts = task.questions[shuffled(step, config.batch_size, len(task.questions), config.seed)].prompts
        with torch.random.fork_rng():
            for name, ppo in contenders.items():
                if step == 0:
                    seconds(ppo, prompts)  # makes the optimizer's state
                    memory[name] = live_memory(ppo, prompts)
                else:
                    times[name].append(seconds(ppo, prompts))
        if step == config.cost_steps:
            state["costs"] = [
                {
                    "method": METHODS[name].title,
                    "states": memory[name][0],
                    "peaks": memory[name][1],
                    "seconds": medians(times[name], config.batch_size),
                }
                for name in METHODS
            ]
            run.save(step, state)
    return [Cost(**found) for found in state["costs"]]


def _contender(name: str, config: Config, task: Task) -> PPO:
    copied = Task(**{**vars(task), "lm": copy.deepcopy(task.lm), "head": copy.deepcopy(task.head)})
    return PPO(make_roles(name, config, copied), task.encoder, config)


def reinforce(config: Config, run: Run, task: Task, roles: Roles) -> None:
    """Phase ``ppo``."""
    ppo = PPO(roles, task.encoder, config)
    state = {"roles": Trained(roles), "optimizer": ppo.optimizer}
    start = run.restore(state, phase="ppo")
    for step in run.steps(start, config.ppo_steps, roles.title):
        ppo.decay(1 - step / config.ppo_steps)
        questions = task.questions[shuffled(step, config.batch_size, len(task.questions), config.seed)]
        answers = ppo.answer(questions.prompts)
        metrics = ppo.update(answers, ppo.score(answers))
        gold = token_f1s(task.encoder.decode(answers), questions.truths).mean()
        run.log(step, metrics | {"gold": gold})
        check_finite("PPO", step, metrics)
        if run.should_checkpoint(step, every=max(1, config.ppo_steps // 5)):
            run.save(step, state)
