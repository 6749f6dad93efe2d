"""What can go wrong with adapters, roles and adapter files."""

from kernelab._core.errors import ArgumentValueError, KernelabError


class RoleError(KernelabError, RuntimeError):
    """A role cannot be entered here, or a layer cannot know which one it plays."""


class UnknownRoleError(RoleError, ArgumentValueError):
    """No adapter of the model has this name."""


class InjectionError(KernelabError, ValueError):
    """A target is not there, or is no layer that can carry an adapter."""


class AdapterFileError(KernelabError, ValueError):
    """An adapter's files are missing, broken, or do not fit the model."""


class BaseMismatchError(AdapterFileError):
    """The adapter was trained on other base weights."""
