"""The command line: ``kernelab list``, ``kernelab run <paper>``, ``kernelab plan <paper>``."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from kernelab import __version__
from kernelab._core.errors import KernelabError
from kernelab.experiment.device import process_index
from kernelab.experiment.launch import UsageError, launch, preset_config
from kernelab.experiment.paper import Paper, find_papers, load

USAGE = """\
usage: kernelab list                         the papers
       kernelab run <paper> [flags]          run one; `kernelab run <paper> --help` shows its flags
       kernelab plan <paper> [flags]         what a run needs, without running it
       kernelab --version

kernelab run hydra-rlhf --preset demo
kernelab run hydra-rlhf --resume             go on with the newest run that was cut off
"""


def main(argv: Sequence[str] | None = None, papers: Mapping[str, Paper] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(quiet=process_index() > 0)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        with _logging(console):
            _dispatch(arguments, find_papers() if papers is None else papers, console)
        return 0
    except SystemExit as error:  # from the flags' parser, which has printed its message
        if isinstance(error.code, str):
            raise
        return error.code or 0
    except KernelabError as error:
        errors.print(f"kernelab: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as error:
        errors.print("kernelab: interrupted." + (f" Go on with: {error}" if str(error) else ""))
        return 130


def _dispatch(arguments: list[str], papers: Mapping[str, Paper], console: Console) -> None:
    commands = {"run": launch, "plan": _plan}
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        console.print(USAGE, end="", markup=False, highlight=False)
    elif command == "--version":
        console.print(f"kernelab {__version__}", highlight=False)
    elif command == "list":
        _list(arguments[1:], papers, console)
    elif command not in commands:
        raise UsageError(f"unknown command {command!r}." + _suggest(command, ["list", *commands]) + "\n" + USAGE)
    elif arguments[1:2] in (["-h"], ["--help"]):
        console.print(USAGE, end="", markup=False, highlight=False)
    else:
        paper = _find(arguments[1:2], command, papers)
        commands[command](paper, arguments[2:], console)


def _list(arguments: list[str], papers: Mapping[str, Paper], console: Console) -> None:
    if arguments:
        raise UsageError(f"kernelab list takes no arguments, got {shlex.join(arguments)!r}.")
    table = Table("paper", "arXiv", "title", box=None)
    for paper in sorted(papers.values(), key=lambda paper: paper.key):
        table.add_row(paper.name, paper.arxiv, Text(f"{paper.title}\n").append(paper.summary, "dim"))
    console.print(table, highlight=False)


def _find(named: list[str], command: str, papers: Mapping[str, Paper]) -> Paper:
    known = sorted(paper.name for paper in papers.values())
    if not named or named[0].startswith("-"):
        raise UsageError(f"the paper comes first: kernelab {command} <paper> [flags]. Papers: {', '.join(known)}.")
    key = named[0].replace("-", "_")
    if key not in papers:
        raise UsageError(
            f"unknown paper {named[0]!r}." + (_suggest(named[0], known) or f" Papers: {', '.join(known)}.")
        )
    return papers[key]


def _plan(paper: Paper, arguments: list[str], console: Console) -> None:
    if paper.plan is None:
        raise UsageError(f"{paper.name} has no plan; `kernelab run {paper.name} --help` shows what it can do.")
    function = load(paper.plan)
    if "config" in inspect.signature(function).parameters:
        config, arguments = preset_config(paper, arguments)
        function = functools.partial(function, config=config)
    plan = tyro.cli(function, args=arguments, prog=f"kernelab plan {paper.name}")
    if plan is not None:
        console.print(plan)


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.replace("_", "-"), list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


@contextmanager
def _logging(console: Console) -> Iterator[None]:
    """Shows the package's log on the run's console, above the progress bar."""
    logger = logging.getLogger("kernelab")
    handler = RichHandler(console=console, show_time=False, show_path=False)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
