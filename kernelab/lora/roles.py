"""Which adapter a LoRA layer uses, kept as data, and how a checkpoint's recomputation finds it again.

A role lives in a context variable, never in a module. A checkpoint runs the forward again inside backward, where the
``with`` block is over or another one is open. The roles of the first run therefore travel with what autograd saves:
entering a role pushes saved-tensor hooks whose unpack writes the roles into the metadata of the autograd node that is
being evaluated, and a layer that runs inside a backward reads them from that node. A node's roles never change, so what
is found there is never stale; where nothing is found the layer raises.

torch applies only the innermost pair of hooks (a non-reentrant checkpoint pushes one, ``save_on_cpu`` another), so
other pairs on the stack are wrapped, and what they do is preserved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from .config import LoRAConfig
from .errors import RoleError

_current_task = torch._C._current_graph_task_id  # -1 outside a backward
_current_node = torch._C._current_autograd_node
_top = torch._C._autograd._top_saved_tensors_default_hooks
_push = torch._C._autograd._push_saved_tensors_default_hooks
_pop = torch._C._autograd._pop_saved_tensors_default_hooks
_transform = torch._C._functorch.peek_interpreter_stack  # None outside torch.func's transforms
_METADATA = "kernelab.lora.roles"

HookPair = tuple[Callable, Callable]


class Router:
    """Identity of one injected model, shared by its layers, with the settings and the layers of its adapters."""

    def __init__(self) -> None:
        self.adapters: dict[str, LoRAConfig] = {}
        self.paths: dict[str, set[str]] = {}

    def __repr__(self) -> str:
        return f"Router({', '.join(self.adapters)})"


class Assignment(NamedTuple):
    """What one model plays: an adapter (None: off) for each of the equal chunks of dim 0."""

    chunks: tuple[str | None, ...]
    streams: bool = False


class Roles(NamedTuple):
    """The assignments of all models at one moment. Compared by identity."""

    assignments: Mapping[Router, Assignment]
    task: int  # the backward in which they were entered, -1: outside
    complete: bool = True  # a model that is not in ``assignments`` plays no role; else nobody knows


NO_ROLES = Roles({}, -1)
_UNKNOWN = Roles({}, -1, complete=False)
_AMBIENT: ContextVar[Roles] = ContextVar("kernelab_roles", default=NO_ROLES)


def current() -> Roles:
    """The roles of the code that runs now."""
    ambient, task = _AMBIENT.get(), _current_task()
    if ambient.task == task:
        return ambient
    node = _current_node()
    if node is None:
        return _UNKNOWN
    if (recorded := node.metadata.get(_METADATA)) is not None:
        return recorded
    # A reentrant checkpoint saves its inputs after its forward, where any open role has hooks: no record, no role.
    return NO_ROLES if getattr(node, "_forward_cls", None) is CheckpointFunction else _UNKNOWN


class Saved(NamedTuple):
    """A tensor that hooks keep for backward, with the check that torch leaves to them."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Saved:
        # The detached alias keeps the storage and the version counter, not the node that would close a cycle.
        return cls(tensor if tensor.is_leaf else tensor.detach(), tensor._version)

    def get(self) -> Tensor:
        tensor, version = self
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a {tensor.dtype} tensor of shape {list(tensor.shape)} is at version {tensor._version}; expected "
                f"version {version} instead."
            )
        return tensor


class _Hooks:
    """Saved-tensor hooks that keep the roles of each node, around another pair whose work they preserve."""

    def __init__(self, roles: Roles | None = None, inner: HookPair | None = None) -> None:
        self.roles, self.inner = roles, inner  # the roles that were open when ``inner`` was pushed

    def pack(self, tensor: Tensor):
        return current(), Saved.of(tensor) if self.inner is None else self.inner[0](tensor)

    def unpack(self, packed: tuple) -> Tensor:
        node, (roles, saved) = _current_node(), packed
        if self.inner is None:
            _record(node, roles)
            return saved.get()
        _record(node, self.roles)  # for the recomputation that a checkpoint's unpack starts
        tensor = self.inner[1](saved)
        _record(node, roles)
        return tensor


_PLAIN = _Hooks()


def _record(node, roles: Roles) -> None:
    if node is not None:
        node.metadata[_METADATA] = roles


def _bind(roles: Roles, push: bool = True) -> bool:
    """Wraps the hooks on this thread's stack that are not ours yet: those pushed since ``roles`` were entered.
    If there are none at all, pushes ours and returns True."""
    foreign = []
    while (pair := _top(False)) is not None and not isinstance(getattr(pair[0], "__self__", None), _Hooks):
        foreign.append(pair)
        _pop()
    for pair in reversed(foreign):
        hooks = _Hooks(roles, pair)
        _push(hooks.pack, hooks.unpack)
    # torch.func's transforms allow neither hooks nor checkpoints.
    push = push and pair is None and not foreign and _transform() is None
    if push:
        _push(_PLAIN.pack, _PLAIN.unpack)
    return push


def hooks_allowed() -> bool:
    """Whether further hooks would hide nobody's, of this thread."""
    pair = _top(False)
    return (pair is None or pair[0] == _PLAIN.pack) and _transform() is None


@contextlib.contextmanager
def enter(router: Router, assignment: Assignment, where: str) -> Iterator[None]:
    """Plays ``assignment`` on the model of ``router`` inside the block."""
    outer = current()
    played = outer.assignments.get(router)
    if played is not None and played.streams:
        raise RoleError(f"{where}: inside streams, where every chunk has its role already. Leave the streams first.")
    roles = Roles({**outer.assignments, router: assignment}, _current_task(), outer.complete)
    pushed = _bind(outer)
    token = _AMBIENT.set(roles)
    try:
        yield
    finally:
        _AMBIENT.reset(token)
        if pushed:
            _pop()


def chunks(router: Router) -> tuple[str | None, ...]:
    """The adapters that a layer of ``router`` uses now, one for each of the equal chunks of dim 0."""
    roles = current()
    # Inside a backward further checkpoints may follow; the engine restores the stack after each node.
    _bind(roles, push=_current_task() != -1)
    if roles.assignments and _top(True) is None and _transform() is None:
        raise RoleError(
            "the role was entered in another thread, or is left already. Enter it in the thread that calls."
        )
    assignment = roles.assignments.get(router)
    if assignment is not None:
        return assignment.chunks
    names = ", ".join(repr(name) for name in router.adapters)
    if not roles.complete:
        raise RoleError(
            "a LoRA layer runs inside a backward, and the role of its forward cannot be told. Run the forward inside "
            "`with kernelab.lora.role(model, name):`, with the checkpoint's tensors as positional arguments "
            f"(adapters: {names})."
        )
    if len(router.adapters) == 1:
        return tuple(router.adapters)
    raise RoleError(
        f"a LoRA layer is called with no role entered, and the model has the adapters {names}: which one is meant? "
        "Call it inside `with kernelab.lora.role(model, name):`, or `with kernelab.lora.off(model):` for none."
    )
