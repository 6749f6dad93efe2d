"""From flags to a finished run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shlex
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from kernelab._core.errors import KernelabError
from kernelab.experiment.device import from_main, leave_processes, process_count, process_index
from kernelab.experiment.files import to_json
from kernelab.experiment.folder import RESULTS, held, new_folder, newest_folder, read_config
from kernelab.experiment.paper import Paper, load

logger = logging.getLogger("kernelab")


class UsageError(KernelabError):
    """The command line itself is wrong."""


_RESERVED = {"preset", "out", "resume"}


def launch(paper: Paper, arguments: list[str], console: Console) -> None:
    """``kernelab run <paper> <arguments>``."""
    early, others = _early(arguments)
    folder = early.out
    if early.resume and not early.help:
        folder = folder or newest_folder(paper.name)
        saved = read_config(folder)
        if (
            saved and saved["paper"] == paper.key and early.preset is None
        ):  # a run goes on with its own flags unless told otherwise
            early.preset = saved["preset"]
            arguments = ["--preset", early.preset, *saved["arguments"], *arguments]
    preset, config = _parse(paper, early.preset, arguments)
    record = {
        "paper": paper.key,
        "preset": preset,
        "arguments": others,
        "processes": process_count(),
        "config": to_json(config, "config"),
    }
    with ExitStack() as stack:
        folder = _enter(stack, paper, folder, record, early.resume)
        _train(paper, config, folder, console)
    leave_processes()


def preset_config(paper: Paper, arguments: list[str]) -> tuple[Any, list[str]]:
    """The config of the preset that ``--preset`` names, or of the first one, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", const="")
    chosen, others = parser.parse_known_args(arguments)
    presets = _presets(paper)
    if chosen.preset not in (None, *presets):
        raise UsageError(f"--preset: expected one of {', '.join(presets)}, got {chosen.preset!r}.")
    return presets[chosen.preset or next(iter(presets))], others


def _presets(paper: Paper) -> dict[str, Any]:
    return load(paper.config.partition(":")[0] + ":PRESETS")


def _early(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags that decide what the other flags start from, and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    parser.add_argument("--out", nargs="?", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    return parser.parse_known_args(arguments)


def _parse(paper: Paper, preset: str | None, arguments: list[str]) -> tuple[str, Any]:
    """The preset's name and the config: the preset's values, and over them what the flags say."""
    config_type = load(paper.config)
    presets = _presets(paper)
    names = {field.name for field in dataclasses.fields(config_type)}
    if "seed" not in names or names & _RESERVED:
        raise KernelabError(
            f"{paper.config}: expected a field 'seed' and none of {sorted(_RESERVED)}, got {sorted(names)}."
        )
    arg = tyro.conf.arg
    flags = dataclasses.make_dataclass(
        "Flags",
        [
            ("preset", Annotated[Literal[tuple(presets)], arg(help="What the other flags start from.")]),
            ("out", Annotated[Path | None, arg(metavar="DIR", help="The run's folder, else runs/<paper>/<time>.")]),
            ("resume", tyro.conf.FlagCreatePairsOff[Annotated[bool, arg(help="Go on after the last checkpoint.")]]),
            ("config", Annotated[config_type, arg(name="")]),
        ],
    )
    start = preset if preset in presets else next(iter(presets))  # an unknown one is the parser's to refuse
    try:
        chosen = tyro.cli(
            flags,
            args=arguments,
            default=flags(start, None, False, presets[start]),
            prog=f"kernelab run {paper.name}",
            description=f"{paper.title} (arXiv:{paper.arxiv})\n\n{paper.summary}",
            console_outputs=process_index() == 0,
        )
    except ValueError as error:  # from the config's own checks
        raise UsageError(str(error)) from error
    if not 0 <= chosen.config.seed < 2**63:
        raise UsageError(f"--seed: expected a number from 0 to 2**63 - 1, got {chosen.config.seed}.")
    return chosen.preset, chosen.config


def _enter(stack: ExitStack, paper: Paper, folder: Path | None, record: Mapping[str, Any], resume: bool) -> Path:
    """Holds the run's folder until ``stack`` closes; every process gets the main one's folder or its refusal."""
    refusal = None
    if process_index() == 0:
        try:
            folder = folder or new_folder(paper.name)
            stack.enter_context(held(folder, record, resume=resume))
        except KernelabError as error:
            refusal = error
    folder, refused = from_main((folder, refusal is not None))
    if refusal:
        raise refusal
    if refused:
        raise SystemExit(1)  # the main process says why
    return folder


def _train(paper: Paper, config: Any, folder: Path, console: Console) -> None:
    from kernelab.experiment import results
    from kernelab.experiment.run import Run

    finished = folder / RESULTS
    if finished.exists():
        results.show(console, json.loads(finished.read_text()), folder)
        return
    console.print(f"{paper.title} -> {folder}", highlight=False, markup=False, soft_wrap=True)
    with Run(folder, config, paper=paper.key, console=console) as run:
        try:
            summary = load(paper.train)(config, run)
        except KeyboardInterrupt:
            command = ["kernelab", "run", paper.name, "--out", str(folder), "--resume"]
            raise KeyboardInterrupt(shlex.join(command)) from None
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            _advise(paper, config, error, console)
            raise KernelabError(f"out of memory: {error}\nThe checkpoints so far are in {folder}.") from error
        results.show(console, run.finish(summary), folder)


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _advise(paper: Paper, config: Any, error: Exception, console: Console) -> None:
    """Prints what the paper has to say; the other processes of a run would not take part in it."""
    if paper.out_of_memory is None or process_count() > 1:
        return
    traceback.clear_frames(error.__traceback__)  # which hold the run's tensors
    try:
        console.print(load(paper.out_of_memory)(config))
    except Exception as second:
        logger.warning("no plan: %s: %s", type(second).__name__, second)
