"""Predicted memory of SFT and of PPO's five methods for a model that is not here, beside what the paper states.

    python benchmarks/memory/hydra.py [--model llama-7b] [--answers 4] [--lora-r 128] [--prompt-length 400] ...

Deterministic: the same on every machine, and no GPU is needed. Bytes of tensors; the settings are those of the preset
``paper``, with all answers in memory at once.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernelab.papers.hydra_rlhf.config import PRESETS, Config
from kernelab.papers.hydra_rlhf.predict import predict
from kernelab.papers.hydra_rlhf.roles import METHODS

# Totals of table 1 (arXiv 2309.00754), Llama-7b on StackExchange, in bytes. PPO was not run there: 220 GB, an estimate.
PAPER = {"LoRA-PPO": 68.0e9, "J-Hydra-PPO": 67.9e9, "Hydra-PPO": 71.1e9}
ESTIMATE = {"PPO": 220e9}
DEVICES = 8  # of ZeRO-1, each with its share of the optimizer state

DIFFERENCES = f"""\
- What trains, adapters or whole models, is float32 here, as are its gradients and AdamW's two moments: 16 bytes a
  parameter. Frozen trunks are 16-bit. "rest": activations, logits, cache, and autocast's 16-bit copies of whole models.
- "ZeRO-1": ours with 1/{DEVICES} of the optimizer state, on each of {DEVICES} devices. The author's job files use it.
- "fit": the answers at once with which ours, with ZeRO-1, reaches the paper's total. That it differs between methods
  suggests that the paper's totals stand at different batches.
"""


@dataclass(frozen=True)
class Row:
    """A method and what it holds at its peak, by kind."""

    title: str
    answers: int
    kinds: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.kinds.values())

    @property
    def rest(self) -> int:
        """Bytes that grow with the answers."""
        return sum(self.kinds.get(kind, 0) for kind in ("KV cache", "logits", "activations"))

    @property
    def sharded(self) -> float:
        """Bytes of one device with ZeRO-1."""
        return self.peak - self.kinds["optimizer state"] * (1 - 1 / DEVICES)

    @property
    def fit(self) -> float | None:
        total = PAPER.get(self.title)
        return None if total is None else self.answers * (1 + (total - self.sharded) / self.rest)


def rows(config: Config) -> list[Row]:
    """SFT of the language model, then the methods."""
    found = []
    for name, method in track(METHODS.items(), "predicting", transient=True, console=Console(stderr=True)):
        parts = predict(replace(config, method=name, sft_steps=1 if name == "lora" else 0, rm_steps=0)).parts
        if "sft" in parts:
            found.insert(0, Row("SFT", config.sft_batch_size, parts.pop("sft")))
        found.append(Row(method.title, config.batch_size, max(parts.values(), key=lambda kinds: sum(kinds.values()))))
    return found


def table(config: Config, found: list[Row]) -> Table:
    lengths = f"{config.prompt_length} + {config.response_length} tokens"
    made = Table(title=f"GB of {config.model}, {config.dtype}, rank {config.lora_r}, {config.batch_size} x {lengths}")
    made.add_column("")
    states = ("weights", "adapters", "optimizer state", "gradients")
    for column in ("paper", "ours", *states, "rest", "ZeRO-1", "fit"):
        made.add_column(column, justify="right")
    for row in found:
        paper = _gigabytes(PAPER.get(row.title))
        if row.title in ESTIMATE:
            paper = f"{_gigabytes(ESTIMATE[row.title])} (estimate)"
        sizes = (row.peak, *(row.kinds.get(kind, 0) for kind in states), row.rest, row.sharded)
        made.add_row(row.title, paper, *map(_gigabytes, sizes), "" if row.fit is None else f"{row.fit:.1f}")
    return made


def _gigabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.1f}"


def main(arguments: list[str] | None = None) -> None:
    paper = PRESETS["paper"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", help="the folder of a transformers config, or a name")
    parser.add_argument("--dtype", default=paper.dtype, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--answers", type=int, default=4, metavar="N", help="held at once, and SFT's pairs")
    for name in ("lora_r", "prompt_length", "response_length"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(paper, name), metavar="N")
    options = vars(parser.parse_args(arguments))
    answers = options.pop("answers")
    at_once = {"num_mini_batches": 1, "gradient_accumulation_steps": 1}
    config = replace(paper, **options, **at_once, batch_size=answers, sft_batch_size=answers)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table(config, rows(config)))
    if config.model == "llama-7b":
        console.print(DIFFERENCES, end="")


if __name__ == "__main__":
    main()
