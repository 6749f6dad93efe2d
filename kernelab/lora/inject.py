"""Puts adapters on a model's layers, finds them again, and enters roles."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn

from kernelab._core.errors import bad_type, bad_value

from .config import LoRAConfig
from .errors import InjectionError, RoleError, UnknownRoleError
from .layer import DTYPES, LoRALayer, attach, features, new_pair
from .roles import Assignment, Router, enter

_REPACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit
_FOUND: weakref.WeakKeyDictionary[nn.Module, Router] = weakref.WeakKeyDictionary()


def inject(
    model: nn.Module,
    adapters: Mapping[str, LoRAConfig],
    target_modules: Iterable[str],
    *,
    freeze_base: bool = True,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Adds LoRA adapters to the linear layers of ``model``, in place.

    A layer is a target if its dotted name equals a target or ends with ``"." + target``, as in PEFT. Its module stays
    where it is, with its parameters and state-dict keys; each adapter adds ``lora_a.<name>`` [r, in] (Kaiming-uniform)
    and ``lora_b.<name>`` [out, r] (zeros). A second call adds further adapters.

    Args:
        model: any module with ``nn.Linear`` layers (subclasses, so 4-bit ones, included) or transformers' ``Conv1D``.
        adapters: a name and a :class:`LoRAConfig` for each adapter.
        target_modules: names, ``["q_proj", "v_proj"]``.
        freeze_base: freeze the parameters that the model has now. Only the first injection does so, and nothing
            else ever writes ``requires_grad``.
        dtype: of the adapters; None: that of each layer's weight.

    Returns:
        ``model``.

    Raises:
        InjectionError: a target matches nothing, or no layer that can carry an adapter; DDP or FSDP has the model
            already; or a 4-bit layer is packed for inference already. The model is unchanged.
        ValueError, TypeError: an argument does not fit; the message names it.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> model = inject(model, {"actor": LoRAConfig(r=4), "critic": LoRAConfig(r=4)}, target_modules=["0", "2"])
    >>> with role(model, "critic"):
    ...     value = model(torch.randn(3, 8))
    """
    _check_adapters(adapters)
    check_dtype("inject", dtype)
    router = find_router(model, "inject", missing=Router)
    if taken := sorted(router.adapters.keys() & adapters.keys()):
        raise bad_value("inject", "adapters", "new names", f"{', '.join(taken)}, which the model has already")
    targets = _targets(model, target_modules)
    pairs = [
        (path, module, name, config, *new_pair(module, config, dtype))
        for name, config in adapters.items()
        for path, module in targets.items()
    ]
    commit(model, router, adapters, pairs, freeze_base)
    return model


def commit(
    model: nn.Module, router: Router, adapters: Mapping[str, LoRAConfig], pairs: list[tuple], freeze_base: bool
) -> None:
    """Attaches (path, module, name, config, A, B) that passed every other check."""
    if (wrapper := distributed_wrapper(model)) is not None:
        raise InjectionError(
            f"the model is in a {type(wrapper).__name__} already, which would not synchronise new parameters. "
            "Add adapters first, then wrap or shard."
        )
    _keep_packing(model)
    if freeze_base and not router.adapters:
        model.requires_grad_(False)
    router.adapters.update(adapters)
    for path, module, name, config, a, b in pairs:
        router.paths.setdefault(name, set()).add(path)
        attach(module, router, path, name, config, a, b)
    _FOUND.clear()


def _keep_packing(model: nn.Module) -> None:
    """On a CPU bitsandbytes packs a 4-bit weight anew, with rounded scales, in its first forward without gradients, and
    passes no gradient from then on. A trunk whose values must not change, and that trains adapters, keeps its own."""
    repacks = {path: module for path, module in model.named_modules() if hasattr(module, _REPACKS)}
    for path, module in repacks.items():
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InjectionError(
                f"{path} was packed for inference by a forward without gradients, and its scales were rounded. "
                "Load the model again and add adapters before it runs."
            )
    for module in repacks.values():
        setattr(module, _REPACKS, False)


def role(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """Inside the block, in this thread, the LoRA layers of ``model`` use the adapter ``name``.

    Nothing of the model is written. Roles nest, the inner one wins; roles of different models are independent. What is
    computed inside keeps its role: backward may run anywhere, with or without checkpointing. A model with one adapter
    uses it without any role. Inside ``torch.func`` transforms, enter the role in the transformed function.

    Args:
        model: the injected model, or any wrapper around it.
        name: an adapter.

    Raises:
        UnknownRoleError: no adapter has this name.
        RoleError: the model has no adapters, or plays streams.

    >>> with role(model, "actor"):
    ...     logits = model(x)
    """
    router = find_router(model, "role")
    return enter(router, Assignment((_known(router, "role", "name", name),)), "role")


def off(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, in this thread, ``model`` is bitwise its base model. See :func:`role`.

    >>> with off(model), torch.no_grad():
    ...     reference = model(x)
    """
    return enter(find_router(model, "off"), Assignment((None,)), "off")


def streams(model: nn.Module, roles: Iterable[str | None]) -> AbstractContextManager[None]:
    """Inside the block, one forward plays several roles: chunk ``i`` of dim 0 uses ``roles[i]``, None is off.

    The caller stacks one equal chunk a role along dim 0; nothing is copied. None chunks give adapters no gradient.
    Every LoRA layer has to see the chunks in this order, so a layer that gets rows gathered by an index (experts) or
    another dimension first cannot be used in streams.

    Args:
        model: the injected model, or any wrapper around it.
        roles: adapter names or None, one a chunk.

    Raises:
        UnknownRoleError: no adapter has this name.
        RoleError: no adapters, streams inside streams; at a layer, an input whose dim 0 does not divide.

    >>> with streams(model, [None, "actor", "critic"]):
    ...     reference, logits, values = model(torch.cat([x, x, x])).chunk(3)
    """
    router = find_router(model, "streams")
    if isinstance(roles, str) or not isinstance(roles, Iterable):
        raise bad_type("streams", "roles", "a list of adapter names or None", roles)
    names = tuple(
        None if name is None else _known(router, "streams", f"roles[{index}]", name) for index, name in enumerate(roles)
    )
    if not names:
        raise bad_value("streams", "roles", "at least one role", "none")
    return enter(router, Assignment(names, streams=True), "streams")


def adapters(model: nn.Module) -> dict[str, LoRAConfig]:
    """The adapters of ``model`` and their settings."""
    return dict(find_router(model, "adapters").adapters)


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, for an optimizer: A and B of every layer that has it.

    >>> optimizer = torch.optim.AdamW(adapter_parameters(model, "actor"), lr=1e-4)
    """
    layers = adapter_layers(model, name, "adapter_parameters")
    return [p for layer in layers for p in (layer.lora_a[name], layer.lora_b[name])]


def adapter_layers(model: nn.Module, name: str, where: str) -> list[LoRALayer]:
    """The layers that have the adapter ``name``."""
    _known(find_router(model, where), where, "name", name)
    return [layer for layer in model.modules() if isinstance(layer, LoRALayer) and name in layer.lora_configs]


def find_router(model: nn.Module, where: str, missing: type[Router] | None = None) -> Router:
    """The router of the one injected model in ``model``; without any, ``missing()`` or an error."""
    if not isinstance(model, nn.Module):
        raise bad_type(where, "model", "a torch.nn.Module", model)
    if (router := _FOUND.get(model)) is not None:
        return router
    routers = {layer.lora_router for layer in model.modules() if isinstance(layer, LoRALayer)}
    if len(routers) > 1:
        raise RoleError(f"{where}: {len(routers)} injected models are inside this {type(model).__name__}. Pass one.")
    if not routers:
        if missing is not None:
            return missing()
        raise RoleError(f"{where}: this {type(model).__name__} has no adapters. Call kernelab.lora.inject first.")
    return _FOUND.setdefault(model, routers.pop())


def distributed_wrapper(model: nn.Module) -> nn.Module | None:
    """The first module that DDP or FSDP has taken over."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    kinds = (nn.parallel.DistributedDataParallel, FSDPModule, FullyShardedDataParallel)
    return next((module for module in model.modules() if isinstance(module, kinds)), None)


def layer_problem(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why this module cannot carry an adapter, or None."""
    if isinstance(module, LoRALayer):
        return None
    kind = f"{path} is a {type(module).__name__}"
    if features(module) is None:
        return f"{kind}; adapters go on nn.Linear and transformers' Conv1D layers"
    if isinstance(module.weight, nn.UninitializedParameter):
        return f"{kind} without a shape yet: run the model once first"
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return (
            f"{kind} whose weight its nn.{type(parent).__name__} reads without calling it, so an adapter has no effect"
        )
    return None


def _check_adapters(adapters: object) -> None:
    if not isinstance(adapters, Mapping):
        raise bad_type("inject", "adapters", "a mapping of names to LoRAConfig", adapters)
    if not adapters:
        raise bad_value("inject", "adapters", "at least one adapter", "none")
    for name, config in adapters.items():
        check_name("inject", "adapters", name)
        if not isinstance(config, LoRAConfig):
            raise bad_type("inject", f"adapters[{name!r}]", "a LoRAConfig", config)


def check_name(where: str, argument: str, name: object) -> None:
    """An adapter's name is a key of ``nn.ParameterDict``."""
    if not isinstance(name, str):
        raise bad_type(where, argument, "adapter names that are strings", name)
    if not name or "." in name or hasattr(nn.ParameterDict(), name):
        raise bad_value(where, argument, "names without a dot that nn.ParameterDict does not use itself", name)


def check_dtype(where: str, dtype: object) -> None:
    """An adapter's dtype is one that the op takes."""
    if dtype is not None and dtype not in DTYPES:
        raise bad_value(where, "dtype", "None, float32, bfloat16, float16 or float64", dtype)


def _known(router: Router, where: str, argument: str, name: object) -> str:
    if not isinstance(name, str) or name not in router.adapters:
        known = ", ".join(repr(known) for known in router.adapters)
        raise UnknownRoleError(f"{where}: argument '{argument}': expected one of {known}, got {name!r}.")
    return name


def _targets(model: nn.Module, target_modules: object) -> dict[str, nn.Module]:
    if isinstance(target_modules, str) or not isinstance(target_modules, Iterable):
        raise bad_type("inject", "target_modules", "a list of module names", target_modules)
    wanted = list(dict.fromkeys(target_modules))
    if not wanted or not all(isinstance(target, str) and target for target in wanted):
        raise bad_value("inject", "target_modules", "module names", repr(wanted))
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for target in wanted:
        matches = {path: module for path, module in modules.items() if _matches(path, target)}
        if not matches:
            raise InjectionError(_nothing_matches(model, target))
        found.update(matches)
    problems = [problem for path, module in found.items() if (problem := layer_problem(model, path, module))]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InjectionError(f"inject: {'; '.join(problems[:3])}{more}.")
    return {path: module for path, module in modules.items() if path in found}


def _matches(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _nothing_matches(model: nn.Module, target: str) -> str:
    text = f"inject: no module is named {target!r} or ends with '.{target}'"
    for path, parameter in model.named_parameters():
        if _matches(path, target):
            return f"{text}; {path} is a parameter of shape {list(parameter.shape)}, and adapters go on linear layers."
    names = {path.rpartition(".")[2] for path, module in model.named_modules() if features(module)}
    close = difflib.get_close_matches(target, names, n=5, cutoff=0.5) or sorted(names)[:20]
    return f"{text}. Linear layers of this model are named: {', '.join(close) or 'none, there are none'}."
