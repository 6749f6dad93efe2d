"""A judge beside the gold score: asked in both orders, checked, and not asked again by a resumed run."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from kernelab.experiment.cli import main
from kernelab.papers.hydra_rlhf import judge as judges
from kernelab.papers.hydra_rlhf.judge import both_orders, new_judge
from tests.papers.test_hydra_rlhf_run import arguments, records, write_rows

PROMPTS, ANSWERS, BASELINE = ["p", "q", "r"], ["long", "b", "same"], ["a", "longer", "same"]


@pytest.fixture
def judge_of(monkeypatch):
    def made(function):
        monkeypatch.setitem(sys.modules, "user_module", SimpleNamespace(judge=function))
        return new_judge("user_module:judge")

    return made


def test_it_is_asked_in_both_orders(judge_of):
    asked = []
    judge = judge_of(lambda *texts: asked.append(texts) or [1, 0.25, 0.75] if len(asked) < 1 else [0.5, 1, 0.75])
    assert both_orders(judge, PROMPTS, ANSWERS, BASELINE) == [0.75, 0.125, 0.5]
    judge = judge_of(lambda *texts: asked.append(texts) or [1, 1, 1])
    assert both_orders(judge, PROMPTS, ANSWERS, BASELINE) == [0.5, 0.5, 0.5]  # it likes what comes first
    assert asked[-2:] == [(PROMPTS, ANSWERS, BASELINE), (PROMPTS, BASELINE, ANSWERS)]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1, 0], "3 numbers, one an answer, got 2"),
        ([1, 0, 1.5], "numbers from 0 to 1, got 1.5 for the answer 'same'"),
        ([1, -0.1, 1], "numbers from 0 to 1, got -0.1 for the answer 'b'"),
        ([1, math.nan, 1], "numbers from 0 to 1, got nan"),
        ([1, "A", 0], "a list of numbers"),
        (None, "a list of numbers, got None"),
    ],
)
def test_what_is_no_share_is_refused(judge_of, found, message):
    with pytest.raises(ValueError, match="'judge': expected user_module:judge to return ") as error:
        both_orders(judge_of(lambda *texts: found), PROMPTS, ANSWERS, BASELINE)
    assert message in str(error.value)


ASKED = []


def judge(prompts, answers, baseline):
    """A judge for the runs below; its network fails once."""
    ASKED.append((prompts, answers, baseline))
    if len(ASKED) == 4:
        raise ConnectionError("no network")
    return [len(answer) / (len(answer) + len(other) + 1e-9) for answer, other in zip(answers, baseline, strict=True)]


def test_a_resumed_run_asks_only_for_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judges, "ROWS", 2)
    monkeypatch.setattr(sys.modules[__name__], "ASKED", [])
    monkeypatch.setenv("COLUMNS", "200")
    data = write_rows(tmp_path / "rows.jsonl")
    flags = f"--judge {__name__}:judge --method all --ppo-steps 1 --rm-steps 2 --cost-steps 0 --eval-prompts 5"
    with pytest.raises(ConnectionError, match="no network"):
        main(arguments(tmp_path / "run", data, *flags.split()))
    assert main(["run", "hydra-rlhf", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert "wins by judge" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "results.json").read_text())["summary"]
    assert (summary["judge"], summary["win_rate_against"]) == (f"{__name__}:judge", "SFT")
    asked = [texts for number, texts in enumerate(ASKED) if number != 3 and number != 2]  # one batch was asked in part
    assert len(asked) == 5 * 3 * 2
    for number, (name, scores) in enumerate(summary["methods"].items()):
        first, second = (asked[6 * number + order : 6 * number + 6 : 2] for order in (0, 1))
        answers = [answer for _, batch, _ in first for answer in batch]
        baseline = [answer for _, _, batch in first for answer in batch]
        assert [(prompts, other, mine) for prompts, mine, other in first] == second
        assert len(answers) == 5
        won = [len(mine) / (len(mine) + len(other) + 1e-9) for mine, other in zip(answers, baseline, strict=True)]
        assert scores["win_rate"]["judge"] == pytest.approx(sum(won) / 5, abs=1e-6), name
        assert set(scores["win_rate"]) == {"gold", "judge"}
        assert baseline == [answer for _, _, batch in asked[:6:2] for answer in batch]
    assert all("return self . " in prompt for prompts, _, _ in asked for prompt in prompts)
    assert not any(line["phase"].startswith("judge") for line in records(tmp_path / "run"))
