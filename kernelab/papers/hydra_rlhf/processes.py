"""Work divided among the processes of a run: each has its share of the rows, and what counts is taken over all.

With FSDP2 each also holds only its shard of the trunks' layers, as DTensors. Digests and what is written down are of
whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import reduce
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_map_only

from kernelab._core.errors import bad_value
from kernelab.experiment.device import accelerator, from_all, process_count, process_index, uses_fsdp

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    joined = {name: torch.cat([part[name] for part in parts]).to(value.device) for name, value in columns.items()}
    return replace(batch, **joined)


def average(x: Tensor) -> Tensor:
    """The mean of what each process passed."""
    return x if process_count() == 1 else accelerator().reduce(x.detach().float(), "mean")


def largest(x: Tensor) -> Tensor:
    """The largest of what each process passed."""
    return x if process_count() == 1 else accelerator().reduce(x.detach(), "max")


def shard(lm: PreTrainedModel) -> None:
    """Shards the layers of a trunk over the processes, if they use FSDP.

    Embeddings and output head, which are read outside of the trunk's forward too, and the last norm stay whole.

    Raises:
        ValueError: the model does not say which of its modules are layers.
    """
    if not uses_fsdp():
        return
    accelerator()  # joins the other processes
    layers = [layer for layer in lm.base_model.modules() if type(layer).__name__ in (lm._no_split_modules or ())]
    if not layers:
        raise bad_value("hydra-rlhf", "model", "a model that names its layers (_no_split_modules)", type(lm).__name__)
    for parameter in lm.parameters():
        torch.distributed.broadcast(parameter.data, src=0)  # each process has drawn adapters of its own
    others = set(lm.parameters()).difference(*(layer.parameters() for layer in layers))
    for layer in layers:
        fully_shard(layer)
    fully_shard(lm.base_model, ignored_params=others)


def replicated(module: nn.Module) -> nn.Module:
    """The module, which from now on gets the mean of all processes' gradients."""
    if process_count() == 1:
        return module
    accelerator()  # joins the other processes
    wrapper = nn.parallel.DistributedDataParallel
    sharded = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    wrapper._set_params_and_buffers_to_ignore_for_model(module, sharded)  # FSDP averages their gradients itself
    return wrapper(module)


def synchronised(model: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Inside the block a replicated model's backward averages over processes ``now``, or leaves it to a later one."""
    return nullcontext() if now or process_count() == 1 else model.no_sync()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients down to the norm ``max_norm`` if theirs is larger; returns theirs."""
    sharded, others = [], []
    for parameter in parameters:
        if parameter.grad is not None:
            (sharded if isinstance(parameter, DTensor) else others).append(parameter)
    kinds = [kind for kind in (sharded, others) if kind]  # torch does not mix them
    norm = reduce(torch.hypot, (whole(get_total_norm([parameter.grad for parameter in kind])) for kind in kinds))
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """Nested state with its sharded tensors whole on the CPU of the main process, and None on the others."""

    def gather(shard: DTensor) -> Tensor | None:
        tensor = shard.full_tensor()
        return tensor.cpu() if process_index() == 0 else None

    return tree_map_only(DTensor, gather, state)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as ``like`` is, if it is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class WholeOptimizer:
    """What a checkpoint holds of AdamW: the same on any number of processes, with FSDP or without."""

    def __init__(self, optimizer: torch.optim.AdamW):
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return whole_state(self.optimizer.state_dict())

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        parameters = list(chain.from_iterable(group["params"] for group in self.optimizer.param_groups))
        state = {
            index: {
                name: shard_like(value, parameters[index]) if value.shape == parameters[index].shape else value
                for name, value in values.items()
            }
            for index, values in saved["state"].items()
        }
        groups = [
            group | {"fused": own["fused"]}  # which depends on what is sharded here
            for group, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
