"""Supervised training, then PPO on frozen trunks, and what both are worth on prompts that no training saw."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from kernelab._core.errors import bad_value
from kernelab.experiment.device import process_count, process_index, uses_fsdp
from kernelab.experiment.run import Run
from kernelab.papers.hydra_rlhf.config import Config
from kernelab.papers.hydra_rlhf.cost import compare
from kernelab.papers.hydra_rlhf.evaluate import Evaluation, evaluate, ranking, token_f1s
from kernelab.papers.hydra_rlhf.judge import judged
from kernelab.papers.hydra_rlhf.model import mixed_precision, save_hydra
from kernelab.papers.hydra_rlhf.optimise import PPO, check_finite
from kernelab.papers.hydra_rlhf.report import Result, baseline_of, report
from kernelab.papers.hydra_rlhf.roles import Roles, chosen_methods, make_roles
from kernelab.papers.hydra_rlhf.sft import supervise
from kernelab.papers.hydra_rlhf.task import Task, prepare
from kernelab.papers.hydra_rlhf.tokens import shuffled


def train(config: Config, run: Run) -> dict[str, Any]:
    """What PPO starts from; the costs of methods side by side; PPO; the held-out scores before and after."""
    _check_processes(config)
    transformers_logging.disable_progress_bar()
    task = prepare(config)
    methods = chosen_methods(config)
    kinds = sorted({method.joint for method in methods.values()})
    starts: dict[bool, Task] = {}
    ranked: dict[bool, Tensor | None] = {}
    before: dict[bool, Evaluation] = {}
    results: list[Result] = []
    with mixed_precision(config, task.lm.device):
        for joint in kinds:
            starts[joint], ranked[joint] = begin(config, run, task.copied() if len(kinds) > 1 else task, joint=joint)
        costs = compare(config, run, starts[kinds[-1]])
        for name, method in methods.items():
            start = starts[method.joint]
            roles = make_roles(name, config, start.copied() if len(methods) > 1 else start)
            digest = roles.base_digest()
            if method.joint not in before:
                before[method.joint] = evaluate(roles, task.held_out_questions, task.encoder, seed=config.seed)
            reinforce(config, run, task, name, roles)
            after = evaluate(roles, task.held_out_questions, task.encoder, seed=config.seed)
            roles.save(run.folder / "adapters" / (name if len(methods) > 1 else ""))
            digests = digest, roles.base_digest()
            results.append(Result(name, ranked[method.joint], before[method.joint], after, digests))
    if task.judge is not None:
        prompts, baseline = task.held_out_questions.texts(task.encoder), baseline_of(results).before.answers
        results = [
            replace(result, judged=judged(run, result.method, task.judge, prompts, result.after.answers, baseline))
            for result in results
        ]
    return report(run, task, results, costs)


def _check_processes(config: Config) -> None:
    """Each of several processes gets as many rows as the others, and with FSDP what it can shard."""
    parts = config.num_mini_batches * config.gradient_accumulation_steps
    for name, least in (("batch_size", parts * process_count()), ("sft_batch_size", process_count())):
        if (size := getattr(config, name)) % least:
            raise bad_value("hydra-rlhf", name, f"a multiple of {least} with {process_count()} processes", size)
    if not uses_fsdp():
        return
    for name, refused, expected in (
        ("load_in_4bit", config.load_in_4bit, "False with FSDP, which does not shard 4-bit layers"),
        ("optim", config.optim != "adamw_torch", "adamw_torch with FSDP, which does not shard moments in 8 bits"),
        ("dtype", config.dtype == "float16", "bfloat16 or float32 with FSDP, whose gradients are not scaled"),
        ("cost_steps", config.cost_steps, "0 with FSDP, whose buffers are not counted"),
    ):
        if refused:
            raise bad_value("hydra-rlhf", name, expected, getattr(config, name))


def begin(config: Config, run: Run, task: Task, *, joint: bool) -> tuple[Task, Tensor | None]:
    """The task with the trained models that PPO starts from, and the held-out pairs that they rank right."""
    saved = {}
    if joint:
        supervise(config, run, "hydra_sft", task.lm, task.head, task.pairs)
        saved["model"] = task.lm, task.head
    else:
        supervise(config, run, "sft", task.lm, task.head, task.pairs)
        saved["sft_model"] = task.lm, None
        if task.reward_function is None:
            task = replace(task, reward_lm=copy.deepcopy(task.lm))
            supervise(config, run, "rm", task.reward_lm, task.head, task.pairs)
            saved["reward_model"] = task.reward_lm, task.head
    ranked = None
    if joint or task.reward_lm:
        pairs = task.held_out_pairs.pairs(slice(config.eval_prompts or None))
        ranked = ranking(task.reward_lm or task.lm, task.head, *pairs)
    for folder, (lm, head) in saved.items():
        if run.is_main:
            save_hydra(run.folder / folder, lm, head, task.encoder.tokenizer)
        lm.to(getattr(torch, config.dtype))
    return task, ranked


def reinforce(config: Config, run: Run, task: Task, name: str, roles: Roles) -> None:
    """Phase ``ppo_<name>``."""
    if process_index():
        torch.manual_seed(config.seed + process_index())  # the main process goes on with the seed
    ppo = PPO(roles, task.encoder, config)
    start = run.restore(ppo.state, phase=f"ppo_{name}")
    for step in run.steps(start, config.ppo_steps, roles.title):
        ppo.decay(1 - step / config.ppo_steps)
        questions = task.questions[shuffled(step, config.batch_size, len(task.questions), config.seed)]
        answers = ppo.answer(questions.prompts)
        metrics = ppo.update(answers, ppo.score(answers))
        gold = token_f1s(task.encoder.decode(answers), questions.truths).mean()
        run.log(step, metrics | {"gold": gold})
        check_finite(roles.title, step, metrics)
        if run.should_checkpoint(step, every=max(1, config.ppo_steps // 5)):
            run.save(step, ppo.state)
