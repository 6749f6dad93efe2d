"""The most memory that attention with a table of distances takes, by the length of the sequence.

    python benchmarks/memory/attention.py [--record]

RPE_k, causal, 12 heads of 64 features, distances to 64, float32: ``relative_attention``, old BERT's einsum, and SDPA
with a gathered mask. Outputs and gradients count, inputs do not; nor does what torch's own operators free inside
themselves, which favours the peers. Deterministic: the same on every machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import attention, record
from benchmarks.provider import BOTH, FORWARD_ONLY, Group, refcheck
from kernelab._core.memory import LiveBytes

LENGTHS = 128, 256, 512, 1024
PEERS = "gather-sdpa", "einsum"


def measure(direction: str, tokens: int) -> Iterator[record.Row]:
    """One row a provider; each first proves that it computes the case."""
    case = attention.case(f"rpe-k-{tokens}", "query", tokens=tokens, reach=64, causal=True)
    group = Group("relative_attention", direction, case.name, torch.float32, "cpu")
    builders = attention.builders(case, group)
    ours = [name for name in builders if name.startswith("kernelab/")]
    for name in (*ours, *PEERS):
        provider = builders[name]()
        error = refcheck(provider, group.dtype)
        with LiveBytes() as live:
            provider.run()
        yield record.Row(
            op=group.op,
            direction=f"peak of {direction}",
            case=case.name,
            dtype="float32",
            device="cpu",
            machine=record.machine("cpu"),
            provider=name,
            refcheck_error=error,
            peak_bytes=live.peak,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the rows to --results")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    table = Table("direction", "tokens", "provider", "MiB", "bytes a token", title="Peak memory of attention", box=None)
    for direction in (FORWARD_ONLY, BOTH):
        for tokens in LENGTHS:
            for row in measure(direction, tokens):
                size = row.peak_bytes
                table.add_row(direction, str(tokens), row.provider, f"{size / 2**20:.2f}", f"{size // tokens:,}")
                if options.record:
                    record.append(row, options.results)
    Console().print(table)


if __name__ == "__main__":
    main()
