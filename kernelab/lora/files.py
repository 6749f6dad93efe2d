"""Saves and loads adapters as PEFT does.

The weights file also holds a fingerprint of each base weight and the text of the configuration. Replacing it is the
moment of commitment: the new configuration waits beside it, and a load carries it over if the writer was killed there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kernelab._core.errors import bad_value

from .config import LoRAConfig
from .errors import AdapterFileError, BaseMismatchError
from .inject import adapter_layers, check_dtype, check_name, commit, distributed_wrapper, find_router, layer_problem
from .layer import LoRALayer, adapter_dtype, features
from .peft_format import common_config, from_peft, key, pairs_of, targeted, to_peft
from .roles import Router

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PENDING = f".{CONFIG}.pending"
_BASE_KEY, _CONFIG_KEY = "kernelab.base", "kernelab.config"
_SAMPLES = 256

Pairs = dict[str, tuple[Tensor, Tensor]]


def save_adapter(model: nn.Module, name: str, directory: str | os.PathLike) -> None:
    """Writes one adapter so that PEFT and :func:`load_adapter` read it.

    An adapter that is there already is replaced whole or, whatever happens, not at all; other files stay. Parameters
    that FSDP2 has sharded are gathered: call it on every rank, rank 0 writes.

    Args:
        model: the injected model, or any wrapper around it.
        name: the adapter.
        directory: made if it is not there.

    Raises:
        UnknownRoleError: no adapter has this name.
        ValueError: ``model`` is only a part of the adapted model.
        OSError: the directory cannot be written.

    >>> save_adapter(model, "actor", "runs/actor")
    """
    layers = {layer.lora_path: layer for layer in adapter_layers(model, name, "save_adapter")}
    if missing := find_router(model, "save_adapter").paths[name] - layers.keys():
        raise bad_value("save_adapter", "model", "the whole adapted model", f"a part without {min(missing)}")
    tensors = {}
    for path, layer in layers.items():
        shapes = _shapes(layer, layer.lora_configs[name])
        for part, values, shape in zip("AB", (layer.lora_a, layer.lora_b), shapes, strict=True):
            tensors[key(path, part)] = tensor = _whole(values[name]).contiguous()
            if list(tensor.shape) != shape:
                got = f"{key(path, part)} of shape {list(tensor.shape)} instead of {shape}"
                raise bad_value("save_adapter", "model", "whole parameters", got, "Gather its shards first.")
    base = {path: fingerprint(layer.weight) for path, layer in layers.items()}
    config = to_peft(
        {path: layer.lora_configs[name] for path, layer in layers.items()},
        _target_names(model, layers),
        getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        transposed=not any(isinstance(layer, nn.Linear) for layer in layers.values()),
    )
    text = json.dumps(config, indent=2) + "\n"
    if not _sharded(model) or torch.distributed.get_rank() == 0:
        metadata = {"format": "pt", _BASE_KEY: json.dumps(base), _CONFIG_KEY: text}
        _write(Path(directory), text.encode(), safetensors.torch.save(tensors, metadata))


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str,
    *,
    check_base: bool = True,
    freeze_base: bool = True,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Reads an adapter that :func:`save_adapter` or PEFT wrote.

    A new ``name`` is injected into the layers that the files name. An existing one is overwritten in place, so that
    optimizers keep their parameters; its layers, ranks and scales have to be those of the files.

    Args:
        model: the model that was adapted, injected or not.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: the adapter's name in ``model``.
        check_base: compare the base weights with the fingerprints in the file, where it has them.
        freeze_base, dtype: as in :func:`inject`, for a new name.

    Returns:
        ``model``.

    Raises:
        BaseMismatchError: a base weight is not the one that the adapter was trained on.
        AdapterFileError: a file is missing, broken, of an unsupported kind, or does not fit; the message names the file
            and the key. The model is unchanged.

    >>> save_adapter(model, "actor", "runs/actor")
    >>> base = load_adapter(base, "runs/actor", "actor")
    >>> with role(base, "actor"), role(model, "actor"):
    ...     torch.equal(base(x), model(x))
    True
    """
    check_name("load_adapter", "name", name)
    check_dtype("load_adapter", dtype)
    router = find_router(model, "load_adapter", missing=Router)
    weights = Path(directory) / WEIGHTS
    tensors, metadata = _read_weights(weights)
    file, config = _read_config(Path(directory) / CONFIG, metadata)
    pairs = pairs_of(weights, tensors)
    configs = from_peft(file, config, pairs)
    modules = {
        module.lora_path if isinstance(module, LoRALayer) else path: module for path, module in model.named_modules()
    }
    _check_targets(weights, config, model, modules, pairs)
    _check_shapes(weights, model, modules, configs, pairs)
    if check_base and _BASE_KEY in metadata:
        _check_base(weights, metadata[_BASE_KEY], modules, pairs)
    if name in router.adapters:
        _overwrite(weights, model, name, configs, pairs)
        return model
    new = []
    for path, pair in pairs.items():
        module = modules[path]
        to = {"device": module.weight.device, "dtype": adapter_dtype(module, dtype)}
        new.append((path, module, name, configs[path], *(tensor.to(**to) for tensor in pair)))
    commit(model, router, {name: common_config(configs.values())}, new, freeze_base)
    return model


def fingerprint(weight: Tensor) -> str:
    """A short hash of a weight's dtype, its shape and some of its values."""
    flat = _whole(weight).reshape(-1)
    count = min(flat.numel(), _SAMPLES)
    index = torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)
    values = flat[index.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{weight.dtype} {list(weight.shape)} ".encode() + values).hexdigest()[:16]


def _sharded(model: nn.Module) -> bool:
    return not isinstance(distributed_wrapper(model), (NoneType, nn.parallel.DistributedDataParallel))


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _shapes(module: nn.Module, config: LoRAConfig) -> tuple[list[int], list[int]]:
    in_features, out_features = features(module)
    return [config.r, in_features], [out_features, config.r]


def _target_names(model: nn.Module, layers: dict[str, LoRALayer]) -> set[str]:
    """Last components, where no other module of the model has one of them; else whole paths."""
    names = {path.rpartition(".")[2] for path in layers}
    adapted = set(layers.values())
    others = (path.rpartition(".")[2] for path, module in model.named_modules() if module not in adapted)
    return set(layers) if names.intersection(others) else names


# Writing


def _write(directory: Path, config: bytes, weights: bytes) -> None:
    existed = directory.is_dir()
    directory.mkdir(parents=True, exist_ok=True)
    pending = directory / _PENDING
    try:
        with _temporary(directory, config) as new_config, _temporary(directory, weights) as new_weights:
            try:
                os.replace(new_config, pending)
                _sync(directory)
                os.replace(new_weights, directory / WEIGHTS)
            except BaseException:
                if new_weights.exists():
                    pending.unlink(missing_ok=True)
                raise
    except BaseException:
        with contextlib.suppress(OSError):
            if not existed:
                directory.rmdir()
        raise
    _sync(directory)
    with contextlib.suppress(FileNotFoundError):  # another rank was faster
        os.replace(pending, directory / CONFIG)
    _sync(directory)


@contextlib.contextmanager
def _temporary(directory: Path, content: bytes) -> Iterator[Path]:
    path = directory / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        pickled = file.with_suffix(".bin")
        hint = (
            f"{pickled} is a pickle, which is not read; save it as safetensors with PEFT." if pickled.exists() else ""
        )
        raise AdapterFileError(f"{file}: no such file. {hint}".rstrip())
    try:
        with safetensors.safe_open(file, "pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file}: not a whole safetensors file: {error}.") from error


def _read_config(file: Path, metadata: dict[str, str]) -> tuple[Path, object]:
    pending = file.with_name(_PENDING)
    with contextlib.suppress(OSError):
        if pending.is_file() and pending.read_text() == metadata.get(_CONFIG_KEY):
            os.replace(pending, file)
    try:
        return file, json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise AdapterFileError(f"{file}, line {error.lineno}: not JSON: {error.msg}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{file}: cannot be read: {error}.") from error


def _check_targets(file: Path, config: dict, model: nn.Module, modules: dict[str, nn.Module], pairs: Pairs) -> None:
    for path, module in modules.items():
        if path not in pairs and targeted(config, path) and layer_problem(model, path, module) is None:
            raise AdapterFileError(f"{file}: key {key(path, 'A')} is missing, and {CONFIG} targets {path}.")
    for path in pairs:
        if targeted(config, path) is False:
            raise AdapterFileError(f"{file}: key {key(path, 'A')} is not wanted: {CONFIG} does not target {path}.")


def _check_shapes(
    file: Path, model: nn.Module, modules: dict[str, nn.Module], configs: dict[str, LoRAConfig], pairs: Pairs
) -> None:
    for path, (a, b) in pairs.items():
        where = f"{file}: key {key(path, 'A')}"
        if path not in modules:
            raise AdapterFileError(f"{where}: the model has no module {path}.")
        module = modules[path]
        if problem := layer_problem(model, path, module):
            raise AdapterFileError(f"{where}: {problem}.")
        if module.weight.is_meta:
            raise AdapterFileError(f"{where}: {path} is on the meta device. Give the model its weights first.")
        for part, tensor, shape in zip("AB", (a, b), _shapes(module, configs[path]), strict=True):
            if list(tensor.shape) != shape:
                raise AdapterFileError(f"{file}: key {key(path, part)}: expected {shape}, got {list(tensor.shape)}.")


def _check_base(file: Path, text: str, modules: dict[str, nn.Module], pairs: Pairs) -> None:
    try:
        trained_on = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{file}: metadata {_BASE_KEY}: broken: {error}.") from error
    other = [path for path in pairs if path in trained_on and trained_on[path] != fingerprint(modules[path].weight)]
    if other:
        raise BaseMismatchError(
            f"{file}: trained on another base: the weight of {other[0]} differs in dtype, shape or values "
            f"({len(other)} of {len(pairs)} layers differ). Load that base, or pass check_base=False."
        )


def _overwrite(file: Path, model: nn.Module, name: str, configs: dict[str, LoRAConfig], pairs: Pairs) -> None:
    if _sharded(model):
        raise AdapterFileError(f"{file}: adapter {name!r} of the model is sharded. Load before sharding.")
    layers = {layer.lora_path: layer for layer in adapter_layers(model, name, "load_adapter")}
    if different := sorted(layers.keys() ^ pairs.keys()):
        raise AdapterFileError(f"{file}: adapter {name!r} of the model and the file differ in layer {different[0]}.")
    for path, layer in layers.items():
        has, comes = layer.lora_configs[name], configs[path]
        if has.r != comes.r or not math.isclose(has.scaling, comes.scaling):
            raise AdapterFileError(f"{file}: layer {path}: adapter {name!r} of the model has {has}, the file {comes}.")
    with torch.no_grad():
        for path, layer in layers.items():
            for parameter, tensor in zip((layer.lora_a[name], layer.lora_b[name]), pairs[path], strict=True):
                parameter.copy_(tensor)
