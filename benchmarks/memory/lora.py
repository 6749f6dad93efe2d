"""Bytes that LoRA keeps for backward, a token: kernelab's adapters and PEFT's.

    python benchmarks/memory/lora.py [--record]

Of the seven linear layers of a transformer layer alone, which keep nothing when frozen, and of a whole Llama layer.
Deterministic: the same on every machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import decoder, record
from benchmarks.peers import peft_model
from benchmarks.provider import SEED, Provider, refcheck
from kernelab._core.memory import LiveBytes, saved_bytes
from kernelab.lora import LoRAConfig, inject

WIDTH, HIDDEN, TOKENS, RANK = 1024, 2752, 16, 16
# Layers that read the same input share a line.
INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
TARGETS = [name for names in INPUTS for name in names]


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in TARGETS:
            inputs = HIDDEN if name == "down_proj" else WIDTH
            outputs = HIDDEN if name in ("gate_proj", "up_proj") else WIDTH
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        shared = zip(INPUTS, inputs, strict=True)
        return {f"output {name}": getattr(self, name)(x) for names, x in shared for name in names}


def measure(dtype: torch.dtype, dropout: float) -> list[record.Row]:
    """One row a provider; each first proves, without dropout, that it computes the layers with their adapters."""
    torch.manual_seed(SEED)
    base, config = (
        Projections().to(dtype).requires_grad_(False),
        {"default": LoRAConfig(r=RANK, alpha=32, dropout=dropout)},
    )
    inputs = [
        torch.randn(TOKENS, HIDDEN if "down_proj" in names else WIDTH).to(dtype).requires_grad_() for names in INPUTS
    ]
    ours = inject(copy.deepcopy(base), config, TARGETS)
    models = {"kernelab": ours, "peft": peft_model(copy.deepcopy(base), config, TARGETS, same_dtype=True)}
    if dtype != torch.float32:
        models["peft-float32-adapters"] = peft_model(copy.deepcopy(base), config, TARGETS, same_dtype=False)
    for name in TARGETS:
        a, b = ours.get_submodule(name).lora_a["default"], ours.get_submodule(name).lora_b["default"]
        nn.init.normal_(b, std=0.1)
        for model in list(models.values())[1:]:
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data.copy_(a.detach())
            layer.lora_B["default"].weight.data.copy_(b.detach())
    rows = []
    for provider, model in models.items():
        error = refcheck(Provider(run=partial(model.eval(), *inputs), exact=partial(_merged, ours, inputs)), dtype)
        saved = saved_bytes(partial(model.train(), *inputs))
        rows.append(_row("lora_layers", f"dropout-{dropout}", dtype, provider, error, saved))
    return rows


def measure_decoder(dtype: torch.dtype) -> list[record.Row]:
    """One row a provider, checked with its gradients. What other layers share, the table of positions, is not counted;
    the frozen layer keeps what its attention, its norms and its products need."""
    rows = []
    for provider in decoder.PROVIDERS:
        if provider == "peft-float32-adapters" and dtype == torch.float32:
            continue
        error = refcheck(decoder.training(provider, dtype, TOKENS), dtype)
        forward, _ = decoder.adapted(provider, dtype, TOKENS)
        rows.append(_row("decoder_layer", "dropout-0.0", dtype, provider, error, _kept(forward, dtype)))
    return rows


def _kept(forward: decoder.Forward, dtype: torch.dtype) -> int:
    """Bytes that live after ``forward`` besides its output. Hooks that count would switch recomputation off."""
    leaf = decoder.inputs(dtype, TOKENS)[0].requires_grad_()
    for _ in range(2):  # the first call makes what stays
        with LiveBytes() as live:
            output = forward(leaf * 1)
    return live.current - output.nbytes


def _row(op: str, case: str, dtype: torch.dtype, provider: str, error: float, saved: int) -> record.Row:
    return record.Row(
        op=op,
        direction="saved",
        case=case,
        dtype=str(dtype)[6:],
        device="cpu",
        machine=record.machine("cpu"),
        provider=provider,
        refcheck_error=error,
        saved_bytes=saved // TOKENS,
    )


def _merged(adapted: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    results = {}
    for names, x in zip(INPUTS, inputs, strict=True):
        for name in names:
            layer = adapted.get_submodule(name)
            a, b, factor = layer.lora_a["default"], layer.lora_b["default"], layer.lora_configs["default"].scaling
            weight = layer.weight.double() + factor * b.double() @ a.double()
            results[f"output {name}"] = x.detach().to(dtype) @ weight.to(dtype).mT
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the rows to --results")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    table = Table("op", "case", "dtype", "provider", "bytes", "/ peft", title="Kept for backward, a token", box=None)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (measure(dtype, 0.0), measure(dtype, 0.05), measure_decoder(dtype)):
            peft = next(row.saved_bytes for row in rows if row.provider == "peft")
            for row in rows:
                numbers = f"{row.saved_bytes:,}", f"{row.saved_bytes / peft:.2f}"
                table.add_row(row.op, row.case, row.dtype, row.provider, *numbers)
                if options.record:
                    record.append(row, options.results)
    Console().print(table)


if __name__ == "__main__":
    main()
