"""The processes and devices of a run, through Hugging Face accelerate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kernelab._core.errors import KernelabError

if TYPE_CHECKING:
    from accelerate import Accelerator


def process_index() -> int:
    """This process among those that torchrun or ``accelerate launch`` started; 0 is the main one."""
    return int(os.environ.get("RANK", 0))


def process_count() -> int:
    """How many processes torchrun or ``accelerate launch`` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def accelerator(**options: Any) -> Accelerator:
    """The ``accelerate.Accelerator`` of this run, on the GPU if there is one; ``options`` are its own arguments.

    Raises ``KernelabError`` if accelerate is not installed.
    """
    return _accelerate().Accelerator(**_cpu(), **options)


def from_main(value: Any) -> Any:
    """What the main process passed, on every process."""
    if process_count() == 1:
        return value
    holder = [value]
    _state()
    _accelerate().utils.broadcast_object_list(holder)
    return holder[0]


def from_all(value: Any) -> list[Any]:
    """What each process passed, in their order, on every process."""
    if process_count() == 1:
        return [value]
    _state()
    return _accelerate().utils.gather_object([value])


def leave_processes() -> None:
    """Ends the group of processes, if there is one."""
    if process_count() > 1:
        _state().destroy_process_group()


def _accelerate():
    try:
        import accelerate
    except ImportError as error:
        raise KernelabError("accelerate is not installed; it comes with: pip install 'kernelab[rlhf]'") from error
    return accelerate


def _state():
    return _accelerate().PartialState(**_cpu())


def _cpu() -> dict[str, bool]:
    import torch

    # without a GPU accelerate joins the other processes only when told that they run on the CPU
    return {"cpu": True} if process_count() > 1 and not torch.accelerator.is_available() else {}
