import io

from rich.console import Console

from kernelab.experiment import progress
from kernelab.experiment.progress import Progress


def test_plain_lines_are_few_and_say_rate_time_left_and_metrics(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) * 0.5)  # seconds; every look takes half a one
    out = io.StringIO()
    with Progress(Console(file=out), "ppo", done=40, total=140) as shown:
        for step in range(100):
            shown.show({"reward": step / 7, "kl": 0.01234567, "note": "text"})
            shown.advance()
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) <= 6
    assert lines[-1].startswith("ppo 140/140")
    assert lines[-1].endswith("reward 14.14  kl 0.01235")
    assert "1.9 steps/s" in lines[0]
    assert "left" in lines[0]


def test_slow_steps_are_shown_as_seconds_a_step_and_an_ended_loop_says_where(monkeypatch):
    clock = iter([0.0, 4.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with Progress(Console(file=out), "sft", done=0, total=3600) as shown:
        shown.advance()
    assert out.getvalue() == "sft 1/3600  4 s/step  3:59:56 left\n"


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120), "ppo", done=1, total=3) as shown:
        for _ in range(2):
            shown.show({"reward[red]": 0.25})
            shown.advance()
    assert "3/3" in out.getvalue()
    assert "reward[red] 0.25" in out.getvalue()
