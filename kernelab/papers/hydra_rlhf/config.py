"""The settings of a run. PPO's carry the names that TRL's ``PPOConfig`` gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kernelab._core.errors import bad_value

MethodName = Literal["ppo", "lora", "dynamic", "j_hydra", "hydra"]

_POSITIVE = (
    *("prompt_length", "response_length", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("rejected_per_prompt", "sft_batch_size", "sft_learning_rate", "batch_size", "num_mini_batches", "num_ppo_epochs"),
    *("learning_rate", "critic_learning_rate", "full_learning_rate", "max_grad_norm", "cliprange", "cliprange_value"),
    *("temperature", "gradient_accumulation_steps", "lora_r", "lora_alpha", "adaptive_kl_horizon"),
)
_NOT_NEGATIVE = (
    *("sft_steps", "rm_steps", "sft_coef", "center_rewards_coefficient", "prompt_coef", "weight_decay", "ppo_steps"),
    *("kl_coef", "vf_coef", "muon_learning_rate", "missing_eos_penalty", "eval_prompts", "cost_steps", "cost_memory"),
    "local_rollout_forward_batch_size",
)
_FRACTIONS = ("gamma", "lam")


@dataclass(frozen=True)
class Config:
    """Supervised training of the models that PPO starts from, then PPO."""

    seed: int = 0

    data: str | None = None
    """Columns prompt, chosen, rejected (.jsonl or .parquet); none: the docstrings of the standard library."""
    held_out: float = 0.15
    """Share of the modules (of the prompts, with a file) that no training sees."""
    rejected_per_prompt: int = 4
    """Pairs made of each standard-library function, each with another function's docstring as the rejected answer."""
    prompt_length: int = 64
    """Tokens of a prompt; longer ones are cut: a function at its end, a file's prompt at its start."""
    response_length: int = 20
    """Tokens of an answer, end token included."""

    model: str | None = None
    """A transformers causal LM with its tokenizer, by path; none: a small Llama and a tokenizer trained on the data."""
    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen trunks in PPO, and of autocast where whole models train, whose weights stay float32. With float16
    the losses are scaled (torch.amp.GradScaler)."""
    load_in_4bit: bool = False
    """Hold the linear layers of trunks that do not train in 4 bits (NF4, bitsandbytes) in PPO."""
    optim: Literal["adamw_torch", "adamw_bnb_8bit", "adamw_8bit"] = "adamw_torch"
    """AdamW: torch's, or bitsandbytes', by either name, which keeps the moments of tensors of at least 4096 elements in
    8 bits."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for backward, and compute the layer again there."""
    recompute_activations: bool = True
    """In PPO compute norms, activations and products of activations again in backward, where LoRA layers would keep
    them; the numbers are the same to the last bit."""

    sft_steps: int = 420
    """Of Hydra-SFT, or of the supervised fine-tuning that a separate reward model begins from."""
    rm_steps: int = 200
    """Of the separate reward model that j_hydra and hydra do without; 0: it is the SFT model with its reward head."""
    sft_batch_size: int = 32
    sft_learning_rate: float = 1e-2
    muon_learning_rate: float = 5e-3
    """Of Muon, which then trains the matrices of the trunk's layers in Hydra-SFT; 0: AdamW trains them too."""
    sft_coef: float = 1.0
    """Weight of the cross-entropy of the chosen answer in Hydra-SFT's loss; the pair loss has weight 1."""
    center_rewards_coefficient: float = 0.05
    """Weight of the square of both rewards' sum, which keeps a prompt from moving its answers' rewards together."""
    prompt_coef: float = 0.3
    """Weight of the cross-entropy of the prompt, which the paper does not have: an untrained trunk learns to read."""
    weight_decay: float = 0.1

    method: Literal[MethodName, "all"] = "hydra"
    """ppo: four models, two of them trained whole. lora: LoRA on these two (LoRA-PPO). dynamic: reference and reward
    are actor and critic with LoRA off, two trunks. hydra: one trunk, two adapters. j_hydra: one trunk, one adapter for
    actor and critic. all: one after the other, on the same data."""
    lora_r: int = 8
    lora_alpha: float = 16
    target_modules: tuple[str, ...] = ()
    """Layers that get adapters, by the end of their names; none: every linear layer of the trunk."""
    ppo_steps: int = 40
    batch_size: int = 64
    """Prompts answered in each PPO step."""
    local_rollout_forward_batch_size: int = 0
    """Prompts that a process answers at once; 0: all. Other draws, and less memory for keys and values."""
    num_mini_batches: int = 8
    gradient_accumulation_steps: int = 1
    """Parts of a mini-batch that are in memory one after the other."""
    num_ppo_epochs: int = 1
    learning_rate: float = 1e-3
    """Of the actor's adapter."""
    critic_learning_rate: float = 2e-3
    """Of the critic's adapter and the value head."""
    full_learning_rate: float = 1e-4
    """Of an actor, or a critic with its value head, that is trained whole."""
    max_grad_norm: float = 1.0
    """Of each adapter's gradient, and of the whole model's in Hydra-SFT."""
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Of the KL to the reference, from each token: k1 is -l, k3 is exp(l) - 1 - l, l = log(reference / policy)."""
    target_kl: float | None = None
    """KL of the policy to that of the rollout at which a step's epochs end, in nats a token (k3); none: they do not."""
    adaptive_kl_target: float | None = None
    """KL to the reference, in nats an answer (k1), that kl_coef is adapted to, beginning with its value here; none: it
    is not. Each step multiplies it by 1 + clip(KL / target - 1, -0.2, 0.2) * batch_size / adaptive_kl_horizon."""
    adaptive_kl_horizon: int = 10_000
    """Answers in which a KL that is far off changes kl_coef by a fifth."""
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    detach_value: bool = False
    """j_hydra: the value loss trains the value head alone, not the adapter that it shares with the policy."""
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    single_forward: bool = False
    """Take the old log-probabilities and values from the update's own forward, so that scoring computes only reference
    and reward. Needs num_ppo_epochs, num_mini_batches and gradient_accumulation_steps of 1."""
    reward: str | None = None
    """package.module:function that takes the texts of prompts and of answers, two lists, and returns a number for each:
    used in PPO instead of the reward model."""
    reward_model_path: str | None = None
    """A transformers sequence classifier with one label and its tokenizer, by path: used in PPO instead of the reward
    model. It reads a prompt and its answer as one text without special tokens; of one that is too long, the end."""
    normalize_rewards: bool = False
    """Give all rewards so far the mean 0 and the variance 1, before missing_eos_penalty is taken."""
    temperature: float = 1.0
    missing_eos_penalty: float = 0.0
    """Taken from the reward of an answer that does not end within response_length."""

    judge: str | None = None
    """package.module:function that takes the texts of prompts, of answers, and of a baseline's answers, three lists,
    and returns for each the share that the answer wins, from 0 to 1: asked in both orders after PPO, for win rates."""
    eval_prompts: int = 0
    """Held-out prompts that are answered before and after PPO, and held-out pairs that are ranked; 0: all."""
    cost_steps: int = 5
    """PPO steps in which cost_methods are timed side by side, and their peak memory counted; 0: not at all."""
    cost_methods: tuple[Literal["sft", MethodName], ...] = ("lora", "hydra")
    """sft: a step of supervised fine-tuning, with the rows that PPO's update holds at once."""
    cost_memory: int = 0
    """Bytes: the methods are also timed at the largest batch whose peak these hold; 0: not."""

    def __post_init__(self) -> None:
        for names, holds, expected in (
            (_POSITIVE, lambda value: value > 0, "more than 0"),
            (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
            (_FRACTIONS, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
            (("held_out",), lambda value: 0 < value < 1, "a share between 0 and 1"),
        ):
            for name in names:
                if not holds(getattr(self, name)):
                    raise bad_value("hydra-rlhf", name, expected, getattr(self, name))
        for name in ("prompt_length", "response_length"):
            if getattr(self, name) < 2:
                raise bad_value("hydra-rlhf", name, "at least 2 tokens", getattr(self, name))
        for name, parts in (
            ("num_mini_batches", self.num_mini_batches),
            ("gradient_accumulation_steps", self.num_mini_batches * self.gradient_accumulation_steps),
        ):
            if self.batch_size % parts:
                raise bad_value("hydra-rlhf", name, f"equal parts of batch_size={self.batch_size}", f"{parts} parts")
        for name in ("target_kl", "adaptive_kl_target"):
            if (target := getattr(self, name)) is not None and not target > 0:
                raise bad_value("hydra-rlhf", name, "more than 0, or none", target)
        if self.adaptive_kl_target is not None:
            if not self.kl_coef:
                raise bad_value("hydra-rlhf", "kl_coef", "more than 0 with adaptive_kl_target, which multiplies it", 0)
            if self.adaptive_kl_horizon < self.batch_size:
                expected = f"at least batch_size={self.batch_size}"
                raise bad_value("hydra-rlhf", "adaptive_kl_horizon", expected, self.adaptive_kl_horizon)
        if self.reward is not None and self.reward_model_path is not None:
            raise bad_value("hydra-rlhf", "reward_model_path", "none with a reward", self.reward_model_path)
        once = ("num_ppo_epochs", "num_mini_batches", "gradient_accumulation_steps")
        if self.single_forward and (name := next((name for name in once if getattr(self, name) > 1), None)):
            raise bad_value("hydra-rlhf", name, "1 with single_forward", getattr(self, name))
        if self.detach_value and self.method not in ("j_hydra", "all"):
            raise bad_value("hydra-rlhf", "detach_value", "method j_hydra, whose losses share an adapter", self.method)
        if self.cost_steps and not self.cost_methods:
            raise bad_value("hydra-rlhf", "cost_methods", "at least one method, or cost_steps=0", "none")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise bad_value("hydra-rlhf", "hidden_size", "an even number for each attention head", self.hidden_size)

    @property
    def reward_is_given(self) -> bool:
        """Whether PPO's rewards come from elsewhere than a reward model of the run's own."""
        return self.reward is not None or self.reward_model_path is not None


PRESETS = {
    "demo": Config(),
    "small": Config(
        vocab_size=3072,
        hidden_size=192,
        num_hidden_layers=4,
        prompt_length=96,
        response_length=24,
        sft_steps=400,
        rm_steps=120,
        ppo_steps=60,
        method="all",
        local_rollout_forward_batch_size=32,
        cost_methods=("sft", "ppo", "lora", "dynamic", "j_hydra", "hydra"),
        cost_memory=60_000_000,
    ),
    "paper": Config(
        model="meta-llama/Llama-2-7b-hf",
        dtype="bfloat16",
        prompt_length=400,
        response_length=400,
        sft_steps=30_000,
        rm_steps=30_000,
        sft_batch_size=2,
        sft_learning_rate=1e-6,
        muon_learning_rate=0.0,
        center_rewards_coefficient=0.0,
        prompt_coef=0.0,
        lora_r=128,
        lora_alpha=1,
        ppo_steps=1_200,
        batch_size=50,
        num_mini_batches=1,
        gradient_accumulation_steps=25,
        num_ppo_epochs=4,
        learning_rate=5e-5,
        critic_learning_rate=5e-5,
        full_learning_rate=5e-6,
        kl_coef=0.02,
        eval_prompts=500,
        cost_steps=0,
    ),
}
