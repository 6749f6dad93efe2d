"""``kernelab`` for one or more processes, with answers that are a function of the prompt; it may kill itself once.

One process and several draw different random numbers, so only such answers let their numbers be compared.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from kernelab.experiment.cli import main
from kernelab.experiment.run import Run
from kernelab.papers.hydra_rlhf import evaluate, optimise
from kernelab.papers.hydra_rlhf.tokens import join


def answers_of(lm, prompts, encoder, temperature):
    tokens, mask = prompts
    seeds = (tokens * mask).sum(1, keepdim=True)
    columns = torch.arange(1, encoder.response_length + 1)
    answers = seeds * columns.square() % len(encoder.tokenizer)
    return join(prompts, (answers, columns <= 1 + seeds % encoder.response_length))


def longer(prompts, answers, baseline):
    """A judge, to be asked once."""
    assert os.environ.get("RANK", "0") == "0"
    return [0.5 + 0.5 * (len(answer) > len(other)) for answer, other in zip(answers, baseline, strict=True)]


def killing(log, phase, step):
    def logged(run, at, values):
        log(run, at, values)
        marker = Path(run.folder) / "killed"
        if (run._phase, at) == (phase, step) and run.is_main and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return logged


if __name__ == "__main__":
    optimise.sample_answers = evaluate.sample_answers = answers_of
    if "--kill-at" in sys.argv:
        at = sys.argv.index("--kill-at")
        phase, step = sys.argv[at + 1].split(":")
        del sys.argv[at : at + 2]
        Run.log = killing(Run.log, phase, int(step))
    sys.exit(main())
