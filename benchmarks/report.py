"""Writes the recorded results as markdown: targets, losses, then every table.

    python benchmarks/report.py [--results DIR] [--output FILE]

Only rows that one process measured together are compared: a group shows its latest session.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import RESULTS, Row, load

# What a caller gets who names no backend, by device; roles and memory have one way.
OURS = ("kernelab/triton", "kernelab/cpu", "kernelab.streams", "kernelab")


class Target(NamedTuple):
    """``measure`` of ``over`` / that of ``under`` is at least (``sign`` +1) or at most (-1) ``bound``."""

    group: tuple[str, str, str, str]  # op, direction, case, dtype
    over: str
    under: str
    sign: int
    bound: float
    measure: str = "median_ms"


_BOTH = ("lora_linear", "forward+backward")
_LOGPROB = ("linear_logprob", "forward+backward", "head-32000", "float32")
_RPE_K = ("rpe-k-512-reach-64", "float32")
_RPE_KQ = ("rpe-kq-64", "float32")
_POSITION_ONLY = ("relative_attention", "forward", "position-only-512")
_SAVED = ("lora_layers", "saved")
_DECODER = ("decoder_layer", "saved", "dropout-0.0")
TARGETS = (
    Target((*_BOTH, "square-1024", "bfloat16"), "peft", "kernelab/cpu", 1, 1.5),
    Target((*_BOTH, "square-1024", "float32"), "peft", "kernelab/cpu", 1, 1.1),
    Target((*_BOTH, "square-1024-dropout", "bfloat16"), "peft-float32-adapters", "kernelab/cpu", 1, 1.8),
    Target((*_BOTH, "square-1024-dropout", "float32"), "peft", "kernelab/cpu", 1, 1.8),
    Target((*_BOTH, "square-1024", "float32"), "kernelab/cpu", "base", -1, 1.12),
    Target(_LOGPROB, "kernelab/cpu", "torch", -1, 0.85),
    Target(_LOGPROB, "kernelab/cpu", "torch", -1, 0.125, "peak_bytes"),
    Target(("relative_attention", "forward", *_RPE_K), "einsum", "kernelab/cpu", 1, 9),
    Target(("relative_attention", "forward", *_RPE_K), "gather-sdpa", "kernelab/cpu", 1, 2),
    Target(("relative_attention", "forward", *_RPE_K), "base", "kernelab/cpu", 1, 1),
    Target(("relative_attention", "forward", *_RPE_KQ), "einsum", "kernelab/cpu", 1, 3),
    Target(("relative_attention", "forward+backward", *_RPE_K), "einsum", "kernelab/cpu", 1, 6),
    Target(("relative_attention", "forward+backward", *_RPE_K), "gather-sdpa", "kernelab/cpu", 1, 2),
    Target(("relative_attention", "forward+backward", *_RPE_K), "base", "kernelab/cpu", 1, 0.95),
    Target(("relative_attention", "forward+backward", *_RPE_KQ), "einsum", "kernelab/cpu", 1, 2.5),
    Target((*_POSITION_ONLY, "float32"), "torch", "kernelab-toeplitz/cpu", 1, 2.2),
    Target((*_POSITION_ONLY, "float32"), "base", "kernelab-toeplitz/cpu", 1, 1.5),
    Target(("window_mean", "forward", "heads-of-a-model", "float32"), "dense", "kernelab/cpu", 1, 20),
    Target((*_SAVED, "dropout-0.0", "bfloat16"), "kernelab", "peft-float32-adapters", -1, 0.65, "saved_bytes"),
    Target((*_SAVED, "dropout-0.05", "bfloat16"), "kernelab", "peft-float32-adapters", -1, 0.35, "saved_bytes"),
    Target((*_SAVED, "dropout-0.05", "bfloat16"), "kernelab", "peft", -1, 0.35, "saved_bytes"),
    Target((*_DECODER, "float32"), "kernelab-recompute", "peft", -1, 0.65, "saved_bytes"),
    Target((*_DECODER, "bfloat16"), "kernelab-recompute", "peft", -1, 0.65, "saved_bytes"),
    Target(("ppo_step", "update", "demo", "float32"), "kernelab", "trl-checkpointing", -1, 0.6),
    Target(("ppo_step", "update", "demo", "float32"), "kernelab", "trl-checkpointing", -1, 0.5, "peak_bytes"),
    Target(("ppo_step", "update", "demo", "float32"), "kernelab", "trl", -1, 0.6),
    Target(("ppo_step", "update", "demo", "float32"), "kernelab", "trl", -1, 0.5, "peak_bytes"),
    Target(("scoring", "forward", "demo", "float32"), "peft", "kernelab.streams", 1, 1.3),
    Target(("switch", "forward", "deep", "float32"), "kernelab.streams", "peft", -1, 0.2),
)

Groups = dict[tuple[str, str, str, str], dict[str, Row]]


def render(rows: Iterable[Row]) -> str:
    """The whole report."""
    lines = ["# Benchmarks", ""]
    for (machine, device), groups in _by_machine(rows).items():
        lines += [f"## {machine} ({device})", "", *_conditions(groups), *_targets(groups), *_losses(groups)]
        for op, direction in dict.fromkeys(key[:2] for key in groups):
            chosen = [providers for key, providers in groups.items() if key[:2] == (op, direction)]
            lines += [f"### {op}, {direction}", "", *_table(chosen), ""]
    return "\n".join(lines)


def _by_machine(rows: Iterable[Row]) -> dict[tuple[str, str], Groups]:
    """By machine and group, the providers of the group's latest session."""
    machines: dict[tuple[str, str], Groups] = {}
    for row in sorted(rows, key=lambda row: row.provenance["date"]):
        groups = machines.setdefault((row.machine, row.device), {})
        providers = groups.setdefault((row.op, row.direction, row.case, row.dtype), {})
        if any(other.provenance["session"] != row.provenance["session"] for other in providers.values()):
            providers.clear()
        providers[row.provider] = row
    return machines


def _conditions(groups: Groups) -> Iterator[str]:
    for origin in {row.provenance["session"]: row.provenance for row in _all(groups)}.values():
        versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
        commit = f"{(origin['commit'] or 'unknown')[:12]}{' with local changes' if origin['dirty'] else ''}"
        threads = f"{origin['threads']} threads ({origin['cpu_capability']})"
        yield f"- {origin['date']}: {threads}, {versions}, commit {commit}"
    yield ""


def _targets(groups: Groups) -> Iterator[str]:
    lines = []
    for target in TARGETS:
        found = groups.get(target.group, {})
        if not {target.over, target.under} <= found.keys():
            continue
        ratio = getattr(found[target.over], target.measure) / getattr(found[target.under], target.measure)
        met = target.sign * ratio >= target.sign * target.bound
        wanted = f"{'≥' if target.sign > 0 else '≤'} {target.bound}"
        what = f"{target.over} / {target.under}, {target.measure}"
        lines.append(
            f"| {' '.join(target.group)} | {what} | {wanted} | {ratio:.3g} | {'met' if met else '**missed**'} |"
        )
    if lines:
        yield from ("### Targets", "", "| group | ratio | target | obtained | |", "|---|---|---|---|---|", *lines, "")


def _losses(groups: Groups) -> Iterator[str]:
    """The peers that are faster, the frozen base apart, which computes less."""
    lines = []
    for key, providers in groups.items():
        ours = _ours(providers)
        for row in providers.values():
            peer = row.provider != "base" and not row.provider.startswith("kernelab")
            if ours and peer and row.median_ms is not None and row.median_ms < ours.median_ms:
                lines.append(
                    f"- {' '.join(key)}: {row.provider} takes {row.median_ms / ours.median_ms:.2f} of our time"
                )
    if lines:
        yield from ("### Where a peer is faster", "", *lines, "")


def _table(groups: Iterable[dict[str, Row]]) -> Iterator[str]:
    columns = (
        "case",
        "dtype",
        "provider",
        "ms (p20-p80)",
        "/ ours",
        "/ base",
        "peak MiB",
        "saved bytes",
        "GB/s (of copy)",
    )
    columns += ("GFLOP/s (of matmul)", "error")
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for providers in groups:
        for row in providers.values():
            yield f"| {' | '.join(_cells(row, _ours(providers)))} |"


def _cells(row: Row, ours: Row | None) -> tuple[str, ...]:
    return (
        row.case,
        row.dtype,
        row.provider,
        _cell(row.median_ms, lambda ms: f"{ms:.3g} ({row.p20_ms:.3g}-{row.p80_ms:.3g})"),
        _cell(row.median_ms if ours else None, lambda ms: f"{ms / ours.median_ms:.2f}"),
        _cell(row.base_ratio, lambda ratio: f"{ratio:.2f}"),
        _cell(row.peak_bytes, lambda size: f"{size / 2**20:.2f}"),
        _cell(row.saved_bytes, lambda size: f"{size:,}"),
        _cell(row.gb_per_s, lambda rate: f"{rate:.1f} ({row.copy_fraction:.0%})"),
        _cell(row.gflop_per_s, lambda rate: f"{rate:.0f} ({row.matmul_fraction:.0%})"),
        f"{row.refcheck_error:.1e}",
    )


def _cell(value, text) -> str:
    return "" if value is None else text(value)


def _ours(providers: dict[str, Row]) -> Row | None:
    return next((providers[name] for name in OURS if name in providers), None)


def _all(groups: Groups) -> Iterator[Row]:
    for providers in groups.values():
        yield from providers.values()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    options = parser.parse_args(arguments)
    rows = load(options.results)
    if not rows:
        parser.error(f"no results below {options.results}: run `pytest benchmarks --benchmark-only --record` first")
    text = render(rows)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
