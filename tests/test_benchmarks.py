"""The benchmarks themselves: that they run, refuse what is wrong, and report what was measured."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import attention, decoder, record, report, timing
from benchmarks.measure import measure_group
from benchmarks.memory import attention as attention_memory
from benchmarks.memory import lora as memory
from benchmarks.provider import BOTH, FORWARD_ONLY, Group, Provider
from kernelab.ops import lora_linear
from tests.contract import arguments as args

ROOT = Path(__file__).parents[1]
GROUP = "lora_linear/forward+backward/smallest/float32/cpu"


def run_pytest(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_pytest_at_the_root_collects_benchmarks_and_skips_them():
    done = run_pytest("-k", f"{GROUP}/base")
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
    assert "--benchmark-skip" in done.stdout


def test_a_small_case_runs_and_appends_the_row_that_pytest_benchmark_shows(tmp_path):
    shown, results = tmp_path / "shown.json", tmp_path / "results"
    done = run_pytest(
        *("benchmarks", "--benchmark-only", "--benchmark-max-time", "0.01", "--benchmark-json", str(shown)),
        *("-k", f"{GROUP} and (base or kernelab/cpu or peft)", "--record", "--results", str(results)),
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
    rows = {row.provider: row for row in record.load(results)}
    assert list(rows) == ["base", "kernelab/cpu", "peft"]
    assert [file.name for file in results.glob("*/*")] == ["lora_linear.jsonl"]
    for row in rows.values():
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.rounds >= 5
        assert row.base_ratio == row.median_ms / rows["base"].median_ms
        assert 0 < row.refcheck_error < 1e-5
        assert row.peak_bytes > 0
        assert row.gb_per_s > 0
        assert row.copy_fraction > 0
        assert row.provenance["session"] == rows["base"].provenance["session"]
        assert row.provenance["versions"]["torch"] == torch.__version__
    benchmarks = json.loads(shown.read_text())["benchmarks"]
    assert {one["group"] for one in benchmarks} == {GROUP}
    for one in benchmarks:
        row = rows[one["extra_info"]["provider"]]
        assert one["stats"]["median"] == pytest.approx(row.median_ms / 1e3)
        assert one["stats"]["rounds"] == row.rounds
    text = report.render(rows.values())
    assert all(provider in text for provider in rows)


def test_without_record_nothing_is_written(tmp_path):
    results = tmp_path / "results"
    done = run_pytest("benchmarks", "--benchmark-only", "-k", f"{GROUP}/base", "--results", str(results))
    assert "1 passed" in done.stdout
    assert not results.exists()


def test_the_interpreter_is_never_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="times mean nothing"):
        measure_group(Group("double", FORWARD_ONLY, "", torch.float32, "cpu"), {}, seconds=0.0, min_rounds=1)


def provider(factor: float) -> Provider:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    return Provider(run=lambda: {"output": x * factor}, exact=lambda dtype: {"output": x.to(dtype) * 2})


def missing() -> Provider:
    raise RuntimeError("cannot be built")


def test_a_wrong_provider_is_refused_and_the_others_are_measured():
    group = Group("double", FORWARD_ONLY, "case", torch.float32, "cpu")
    builders = {"base": lambda: provider(2), "wrong": lambda: provider(2 + 1e-5), "missing": missing}
    found = measure_group(group, builders, seconds=0.0, min_rounds=7)
    assert isinstance(found["wrong"], AssertionError)
    assert "output" in str(found["wrong"])
    assert isinstance(found["missing"], RuntimeError)
    row, durations = found["base"]
    assert row.rounds == len(durations) == 7
    assert row.base_ratio == 1
    assert 64 * 32 * 4 <= row.peak_bytes < 64 * 32 * 4 + 64  # and a few scalars
    unnamed = Provider(run=lambda: {}, exact=provider(2).exact)
    assert "expected ['output']" in str(measure_group(group, {"": lambda: unnamed}, 0.0, 1)[""])


def test_a_round_runs_every_call_once():
    calls = []
    durations = timing.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, "cpu", 0.0, 4)
    rounds = [calls[i : i + 3] for i in range(timing.WARMUPS * 3, len(calls), 3)]
    assert [sorted(one) for one in rounds] == [["a", "b", "c"]] * 4
    assert len({tuple(one) for one in rounds}) > 1  # in changing order
    assert [len(values) for values in durations.values()] == [4, 4, 4]


def test_peak_bytes_see_inside_an_operator():
    x, a, b = torch.ones(256, 64), torch.ones(1, 4, 64), torch.ones(1, 64, 4)
    weight = torch.ones(64, 64)
    output = 256 * 64 * 4

    def call(dropout_p):
        return lora_linear(x, weight, lora_a=a, lora_b=b, scaling=1.0, dropout_p=dropout_p, backend="reference")

    assert timing.peak_bytes(lambda: x + x, "cpu") == output
    assert timing.peak_bytes(lambda: x + (x + x), "cpu") == 2 * output
    assert timing.peak_bytes(lambda: call(0.5), "cpu") >= timing.peak_bytes(lambda: call(0.0), "cpu") + output


def row(provider: str, median: float, session: str = "1", **changes) -> record.Row:
    group = {"op": "lora_linear", "direction": "forward+backward", "case": "square-1024", "dtype": "bfloat16"}
    origin = {**record.provenance(), "session": session, "date": f"2026-01-0{session}"}
    times = {"median_ms": median, "p20_ms": median, "p80_ms": median}
    fields = {**group, "device": "cpu", "machine": "M", "provider": provider, "refcheck_error": 0.0, **times}
    return record.Row(**{**fields, "provenance": origin, **changes})


def test_the_report_compares_one_session_and_shows_losses():
    ours, peft, other = row("kernelab/cpu", 2.0), row("peft", 4.0), row("torch", 1.0)
    text = report.render([ours, peft, other])
    assert "| ≥ 1.5 | 2 | met |" in text
    assert "torch takes 0.50 of our time" in text
    assert "peft takes" not in text
    text = report.render([ours, peft, other, row("kernelab/cpu", 3.0, session="2"), row("peft", 3.0, session="2")])
    assert "| ≥ 1.5 | 1 | **missed** |" in text
    assert "| torch |" not in text  # of an older session
    # A peer alone has nothing to be compared with.
    assert "Targets" not in report.render([peft])
    assert "float32" not in report.render([dataclasses.replace(peft, dtype="bfloat16")])


def test_a_broken_line_is_named(tmp_path):
    file = record.append(row("peft", 1.0), tmp_path)
    with open(file, "a") as lines:
        lines.write('{"op": "lora_linear"\n')
    with pytest.raises(ValueError, match=r"lora_linear\.jsonl, line 2: not a row"):
        record.load(tmp_path)
    with pytest.raises(SystemExit):  # nothing there
        report.main(["--results", str(tmp_path / "nothing")])


def test_saved_bytes_of_lora(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "RANK", 2)
    for name, size in (("WIDTH", 64), ("HIDDEN", 172)):
        monkeypatch.setattr(memory, name, size)
        monkeypatch.setattr(decoder, name, size)
    memory.main(["--record", "--results", str(tmp_path)])
    rows = {(row.op, row.dtype, row.case, row.provider): row.saved_bytes for row in record.load(tmp_path)}
    linears = 3 * memory.WIDTH + memory.HIDDEN + 7 * memory.RANK  # inputs once each, and D(x) A^T of every layer
    # Two residuals, query, key, value and output of the attention, and again the norms' outputs; gate and up, and again
    # silu(gate) and its product with up; the statistics of two norms and of one head.
    decoder_layer = 8 * decoder.WIDTH + 4 * decoder.HIDDEN + 7 * decoder.RANK
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        for dropout in ("dropout-0.0", "dropout-0.05"):
            assert rows["lora_layers", dtype, dropout, "kernelab"] == itemsize * linears
        assert rows["lora_layers", dtype, "dropout-0.0", "peft"] == itemsize * linears
        upcast = (4 - itemsize) * 2 * decoder.WIDTH  # transformers' norms work in float32
        assert rows["decoder_layer", dtype, "dropout-0.0", "kernelab"] == itemsize * decoder_layer + upcast + 4 * 3
        assert rows["decoder_layer", dtype, "dropout-0.0", "peft"] == itemsize * decoder_layer + upcast + 4 * 3
        less = itemsize * (decoder_layer - 2 * decoder.WIDTH - 2 * decoder.HIDDEN) + 4 * 3
        assert rows["decoder_layer", dtype, "dropout-0.0", "kernelab-recompute"] == less
    bfloat16 = [rows["lora_layers", "bfloat16", "dropout-0.05", provider] for provider in ("kernelab", "peft")]
    assert bfloat16[0] < 0.35 * bfloat16[1]


@pytest.mark.parametrize(
    ("terms", "causal", "content", "functions"),
    [
        ("query", True, True, "plain gather_sdpa einsum"),
        ("query key", False, True, "plain gather_sdpa einsum"),
        ("query key bias", True, True, "plain gather_sdpa"),
        ("bias", False, True, "plain gather_sdpa"),
        ("bias", True, False, "plain toeplitz"),
    ],
)
def test_the_ways_to_compute_attention_agree(terms, causal, content, functions):
    case = attention.case("", terms, heads=2, batch=3, tokens=17, reach=5, causal=causal, content=content)
    arguments = args.build(case, "cpu", torch.float64)
    leaves = list(args.trainable(arguments).values())
    exact = attention.definition(**arguments)
    cotangent = torch.randn_like(exact)
    grads = torch.autograd.grad(exact, leaves, cotangent, allow_unused=True)
    for name in (*functions.split(), "ours"):
        output = getattr(attention, name)(**arguments)
        torch.testing.assert_close(output, exact)
        torch.testing.assert_close(torch.autograd.grad(output, leaves, cotangent, allow_unused=True), grads)


def test_attention_is_measured_beside_its_peers():
    case = next(case for case in attention.CASES if "smallest" in case.tags)
    for direction in (FORWARD_ONLY, BOTH):
        group = Group("relative_attention", direction, case.name, torch.float32, "cpu")
        names = [name for name in attention.providers(case, group) if name not in ("flex", "torch.compile")]
        assert {"base", "kernelab/reference", "torch", "gather-sdpa", "einsum"} <= set(names)
        builders = attention.builders(case, group)
        found = measure_group(group, {name: builders[name] for name in names}, 0.0, 2)
        assert {name: value for name, value in found.items() if isinstance(value, Exception)} == {}


def test_peak_memory_of_attention(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_memory, "LENGTHS", (128, 256))
    attention_memory.main(["--record", "--results", str(tmp_path)])
    rows = {(row.direction, row.provider, row.case): row.peak_bytes for row in record.load(tmp_path)}
    directions = {direction for direction, _, _ in rows}
    assert directions == {"peak of forward", "peak of forward+backward"}
    providers = {provider for _, provider, _ in rows}
    assert providers >= {"kernelab/reference", *attention_memory.PEERS}
    for direction in directions:
        growth = {name: rows[direction, name, "rpe-k-256"] / rows[direction, name, "rpe-k-128"] for name in providers}
        assert growth["einsum"] > 3.5
        assert growth.get("kernelab/cpu", 2) < 2.2
