"""What PEFT's two files say: ``adapter_config.json`` and the keys of ``adapter_model.safetensors``."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from kernelab._core.errors import KernelabError

from .config import LoRAConfig
from .errors import AdapterFileError

log = logging.getLogger("kernelab")

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")

# Settings that change what an adapter computes in a way that is not built here, with their harmless values.
_REFUSED = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # The others write to the base weights.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_USED = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
}
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "velora_config",
}  # fmt: skip


def key(path: str, part: str) -> str:
    """The key of a layer's ``A`` or ``B``."""
    return f"base_model.model.{path}.lora_{part}.weight"


def pairs_of(file: object, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """``{layer path: (A [r, in], B [out, r])}``."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise AdapterFileError(f"{file}: key {name}: expected base_model.model.<module>.lora_A.weight or lora_B.")
        if tensor.dim() != 2 or not tensor.dtype.is_floating_point:
            raise AdapterFileError(f"{file}: key {name}: expected a matrix, got {tensor.dtype} {list(tensor.shape)}.")
        parts.setdefault(match["path"], {})[match["part"]] = tensor
    if not parts:
        raise AdapterFileError(f"{file}: holds no tensor.")
    for path, pair in parts.items():
        if missing := {"A", "B"} - pair.keys():
            raise AdapterFileError(f"{file}: key {key(path, missing.pop())} is missing.")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterFileError(
                f"{file}: key {key(path, 'B')}: expected [out, {pair['A'].shape[0]}] as lora_A is "
                f"{list(pair['A'].shape)}, got {list(pair['B'].shape)}."
            )
    return {path: (pair["A"], pair["B"]) for path, pair in parts.items()}


def to_peft(
    configs: Mapping[str, LoRAConfig], target_modules: Iterable[str], base_name: str | None, transposed: bool
) -> dict:
    """The configuration file of an adapter whose layers have these settings."""
    common = common_config(configs.values())
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": sorted(target_modules),
        "r": common.r,
        "lora_alpha": common.alpha,
        "lora_dropout": common.dropout,
        "use_rslora": common.use_rslora,
        "rank_pattern": {_exactly(path): config.r for path, config in configs.items() if config.r != common.r},
        "alpha_pattern": {
            _exactly(path): config.alpha for path, config in configs.items() if config.alpha != common.alpha
        },
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def from_peft(file: object, peft: object, paths: Iterable[str]) -> dict[str, LoRAConfig]:
    """The settings of each layer."""
    if not isinstance(peft, dict):
        raise AdapterFileError(f"{file}: expected a JSON object, got {type(peft).__name__}.")
    if peft.get("peft_type") != "LORA":
        raise AdapterFileError(f"{file}: key peft_type: expected 'LORA', got {peft.get('peft_type')!r}.")
    for name, harmless in _REFUSED.items():
        if name in peft and peft[name] not in harmless:
            raise AdapterFileError(f"{file}: key {name}: {peft[name]!r} is not supported, only {harmless[0]!r}.")
    if peft.get("loftq_config"):
        raise AdapterFileError(f"{file}: key loftq_config: adapters that replace the base weights are not supported.")
    if unknown := sorted(
        name for name, value in peft.items() if value and name not in _USED | _WITHOUT_EFFECT | _REFUSED.keys()
    ):
        log.warning("%s: ignored, because kernelab does not know them: %s", file, ", ".join(unknown))
    targets = peft.get("target_modules") or []
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise AdapterFileError(f"{file}: key target_modules: expected a list of names or a pattern, got {targets!r}.")
    patterns = {name: peft.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise AdapterFileError(f"{file}: key {name}: expected an object, got {pattern!r}.")
    try:
        re.compile(targets if isinstance(targets, str) else "")
        general = LoRAConfig(
            peft.get("r", 8), peft.get("lora_alpha", 8), peft.get("lora_dropout", 0.0), peft.get("use_rslora", False)
        )
        return {
            path: replace(
                general,
                r=_looked_up(patterns["rank_pattern"], path, general.r),
                alpha=_looked_up(patterns["alpha_pattern"], path, general.alpha),
            )
            for path in paths
        }
    except (KernelabError, re.error) as error:
        raise AdapterFileError(f"{file}: {error}") from error


def targeted(peft: dict, path: str) -> bool | None:
    """Whether the configuration targets this module; None where it does not say."""
    targets = peft.get("target_modules")
    if peft.get("exclude_modules") or peft.get("layers_to_transform") is not None or targets in (None, "all-linear"):
        return None
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def common_config(configs: Iterable[LoRAConfig]) -> LoRAConfig:
    """The most frequent setting."""
    return Counter(configs).most_common(1)[0][0]


def _exactly(path: str) -> str:
    return f"^{re.escape(path)}"


def _looked_up(pattern: dict, path: str, default):
    return next((value for regex, value in pattern.items() if re.match(rf"(.*\.)?({regex})$", path)), default)
