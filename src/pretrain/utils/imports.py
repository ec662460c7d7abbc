"""Imports by name: of what a user names by its path, and of the modules of Pillow and scikit-learn."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from pretrain.errors import ConfigError, did_you_mean

__all__ = ["call_named", "import_named", "pillow", "sklearn_module"]


def import_named(path: str, setting: str) -> Any:
    """Import what ``package.module:Name`` or ``package.module.Name`` names.

    Args:
        path: the import path; its module must be importable, as from the current folder with ``PYTHONPATH=.``.
        setting: name of the setting in errors.

    Raises:
        ConfigError: there is no such module, or it has nothing of that name.
    """
    module, colon, name = path.partition(":")
    if not colon:
        module, _, name = path.rpartition(".")
    if not module or not name:
        raise ConfigError(f"{setting}: {path!r} is no import path; write package.module:Name.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{setting}: {path!r} cannot be imported ({error}). Name a class or function by its full import path, "
            f"package.module:Name; a module in the current folder is found with PYTHONPATH=."
        ) from error


def call_named(
    make: Callable[..., Any], given: Mapping[str, Any], spell: Callable[[str], str], *first: Any
) -> Any:
    """Return what a function or class that a user named returns.

    Args:
        make: the function or class.
        given: its keyword arguments, as settings name them.
        spell: returns the spelling of an argument in errors.
        *first: its positional arguments, which no setting names.

    Raises:
        ConfigError: an unknown argument (the nearest is suggested), also of what it passes others on to; or one is
            missing.
    """
    name = getattr(make, "__name__", str(make))
    parameters = [*inspect.signature(make).parameters.values()][len(first) :]
    known = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in given:
        if key not in known and not anything:
            raise ConfigError(
                f"{spell(key)}: {name} has no such argument.{did_you_mean(key, known)}"
            )
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in given:
            raise ConfigError(f"{spell(key)} is missing; {name} needs it.")
    try:
        return make(*first, **given)
    except TypeError as error:  # of what it calls with the arguments that it does not name
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in given.keys() - known.keys():
            raise
        inherited = [
            p.name
            for base in getattr(make, "__mro__", ())[:-1]
            for p in [*inspect.signature(base.__init__).parameters.values()][1 + len(first) :]
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        near = did_you_mean(found[1], {*known, *inherited})
        raise ConfigError(f"{spell(found[1])}: {name} has no such argument.{near}") from error


def pillow() -> Any:
    """Return the module ``PIL.Image``.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError as error:
        raise ConfigError(
            "Images are decoded by Pillow, which is not installed. Install it with: pip install pillow"
        ) from error
    return PIL.Image


def sklearn_module(name: str) -> Any:
    """Import a module of scikit-learn.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(f"sklearn.{name}")
    except ImportError as error:
        message = "The classical baselines need scikit-learn: pip install scikit-learn."
        raise ConfigError(f"{message} ({error})") from None
