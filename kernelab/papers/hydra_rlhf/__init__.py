"""Hydra-RLHF: the four models of PPO on one trunk, told apart by LoRA adapters and two heads."""

from kernelab.experiment import Paper

PAPER = Paper(
    key="hydra_rlhf",
    title="Efficient RLHF: Reducing the Memory Usage of PPO",
    arxiv="2309.00754",
    summary="PPO from preferences with actor, critic, reference and reward on one trunk",
    config="kernelab.papers.hydra_rlhf.config:Config",
    train="kernelab.papers.hydra_rlhf.train:train",
    plan="kernelab.papers.hydra_rlhf.plan:plan",
    out_of_memory="kernelab.papers.hydra_rlhf.plan:out_of_memory",
)
