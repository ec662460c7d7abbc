"""Imports by name: of what a user names by its path, and of the modules of scikit-learn."""

from __future__ import annotations

import importlib
from typing import Any

from pretrain.errors import ConfigError

__all__ = ["import_named", "sklearn_module"]


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
