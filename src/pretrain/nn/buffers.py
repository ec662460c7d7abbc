"""Buffers of modules, such as the running statistics of BatchNorm (arXiv 1502.03167).

Persistent buffers are part of the model as its parameters are: files hold them. Others (rotary tables) are computed by
the constructor of their module. Forward passes change persistent buffers, except those that a module names in its
attribute ``constant_buffers``, such as fixed positions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["changing_buffers", "parameters_on_meta", "persistent_buffers", "stored_tensors"]


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of a module and its children by name, each once."""
    owners = dict(module.named_modules())
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        for owner, _, leaf in [name.rpartition(".")]
        if leaf not in owners[owner]._non_persistent_buffers_set
    }


def changing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers that forward passes in training change, by name, each once."""
    owners = dict(module.named_modules())
    return {
        name: buffer
        for name, buffer in persistent_buffers(module).items()
        for owner, _, leaf in [name.rpartition(".")]
        if leaf not in getattr(owners[owner], "constant_buffers", ())
    }


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all that a file of the module must hold, by name: its parameters, then its persistent buffers."""
    return {**dict(module.named_parameters()), **persistent_buffers(module)}


_DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.constant_)


class _ThreadState(threading.local):
    """State of ``parameters_on_meta`` in this thread: parameter -> its replacement; None outside of the context."""

    moved: Any = None


_state = _ThreadState()


class _SkipInitialisation(TorchFunctionMode):
    """Skip random initialisation on the meta device, for which torch may load its compiler, which takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        drawn = options.get("tensor") if func in _DRAWS else None
        if drawn is not None and drawn.is_meta:
            return drawn
        return func(*args, **options)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put the parameters of modules that are constructed inside on the meta device, where they take no memory.

    Buffers get memory and the values of their constructor, unless these are computed from parameters. Each parameter is
    allocated for a moment, which takes no memory either before something is written to it.
    """
    _register()
    _state.moved = WeakIdKeyDictionary()
    try:
        with torch.device("cpu"), _SkipInitialisation():
            yield
    finally:
        _state.moved = None


@cache
def _register() -> None:
    # The hook is never removed: torch iterates over its hooks whenever another thread constructs a module.
    register_module_parameter_registration_hook(_move)  # type: ignore[arg-type] # it may return a parameter


def _move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    moved = _state.moved
    if moved is None or parameter is None or parameter.is_meta:
        return None
    if parameter not in moved:  # a parameter that several modules share stays shared
        moved[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    found: nn.Parameter = moved[parameter]
    return found
