"""The processes and devices of a run, through Hugging Face accelerate."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

from kernelab._core.errors import KernelabError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def process_index() -> int:
    """This process among those that torchrun, ``accelerate launch`` or MPI started; 0 is the main one."""
    return _from_environment(0, "RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def process_count() -> int:
    """How many processes torchrun, ``accelerate launch`` or MPI started; 1 without them."""
    return _from_environment(1, "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def uses_fsdp() -> bool:
    """Whether the processes of this run are to shard models among themselves (FSDP2).

    ``accelerate launch --use_fsdp --fsdp_version 2`` asks for it, as do ``ACCELERATE_USE_FSDP=true FSDP_VERSION=2`` in
    the environment of torchrun. Raises ``KernelabError`` if another version of FSDP is asked for.
    """
    if process_count() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise KernelabError(f"FSDP version {version} is not supported: launch with --fsdp_version 2 (FSDP_VERSION=2).")
    return True


def accelerator(**options: Any) -> Accelerator:
    """The ``accelerate.Accelerator`` of this run, on the GPU if there is one; ``options`` are its own arguments.

    Raises ``KernelabError`` if accelerate is not installed.
    """
    return _accelerate().Accelerator(**_cpu(), **options)


class FullState:
    """A model and its optimizer as one entry of a run's state, whether or not their tensors are sharded (FSDP2).

    Every process takes part in gathering and in loading; only the main one holds the whole.

    >>> state = {"training": FullState(model, optimizer)}
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )


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
        # meshes and sharded tensors in cycles hold subgroups, whose threads abort the process if they live to its exit
        gc.collect()


def _from_environment(default: int, *names: str) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


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
