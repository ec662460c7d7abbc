"""Helpers for all packages: durable files, locks, strict JSON, tensors on disk, line charts.

Of the rest of the package they import only ``pretrain.errors`` and ``pretrain.printing``.
``hub_files`` is imported when it is used: only what is named on the Hub needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.utils import hub_files as hub_files

__getattr__ = on_use(__name__, {"pretrain.utils.hub_files": ()})
