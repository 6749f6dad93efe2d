"""Work divided among the processes of a run: each has its share of the rows, and what counts is taken over all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from kernelab.experiment.device import accelerator, from_all, process_count, process_index

Batch = TypeVar("Batch")


def share(count: int) -> slice:
    """The rows of ``count`` that this process works on.

    >>> share(5)
    slice(0, 5, None)
    """
    begin, end = (count * index // process_count() for index in (process_index(), process_index() + 1))
    return slice(begin, end)


def gathered(batch: Batch) -> Batch:
    """A dataclass of tensors with the rows of all processes, in their order."""
    if process_count() == 1:
        return batch
    columns = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    parts = from_all({name: value.cpu() for name, value in columns.items()})
    whole = {name: torch.cat([part[name] for part in parts]).to(value.device) for name, value in columns.items()}
    return replace(batch, **whole)


def average(x: Tensor) -> Tensor:
    """The mean of what each process passed."""
    return x if process_count() == 1 else accelerator().reduce(x.detach().float(), "mean")


def largest(x: Tensor) -> Tensor:
    """The largest of what each process passed."""
    return x if process_count() == 1 else accelerator().reduce(x.detach(), "max")


def replicated(module: nn.Module) -> nn.Module:
    """The module, which from now on gets the mean of all processes' gradients."""
    if process_count() == 1:
        return module
    accelerator()  # joins the other processes
    return nn.parallel.DistributedDataParallel(module)


def synchronised(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Inside the block a replicated model's backward averages over processes ``now``, or leaves it to a later one."""
    return nullcontext() if now or process_count() == 1 else model.no_sync()
