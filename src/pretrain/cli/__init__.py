"""The command line: one function per command, and the parsing of arguments into settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.cli import main as main

__getattr__ = on_use(__name__, {"pretrain.cli.main": ()})
