"""Layers shared by all model families: the transformer block and its parts, losses and tensor-parallel collectives.

Nothing in this package depends on a model family. The kernel of Triton is imported when it is used, and the loss by
what needs only its sizes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pretrain.utils.on_use import on_use

if TYPE_CHECKING:
    from pretrain.nn import loss as loss
    from pretrain.nn import loss_kernel as loss_kernel

# oneDNN caches one kernel per shape, 1,024 by default. Rows of unequal length have new shapes in every step, so the
# memory of a run on a CPU would grow for hundreds of steps; one step needs a few dozen kernels.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

__getattr__ = on_use(__name__, {"pretrain.nn.loss": (), "pretrain.nn.loss_kernel": ()})
