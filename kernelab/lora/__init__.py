"""LoRA adapters on any model, switched by role: nothing of the model is written, and gradients keep their role."""

from .config import LoRAConfig
from .errors import AdapterFileError, BaseMismatchError, InjectionError, RoleError, UnknownRoleError
from .files import load_adapter, save_adapter
from .inject import adapter_parameters, adapters, inject, off, role, streams
from .recompute import recompute_activations

__all__ = [
    "AdapterFileError",
    "BaseMismatchError",
    "InjectionError",
    "LoRAConfig",
    "RoleError",
    "UnknownRoleError",
    "adapter_parameters",
    "adapters",
    "inject",
    "load_adapter",
    "off",
    "recompute_activations",
    "role",
    "save_adapter",
    "streams",
]
