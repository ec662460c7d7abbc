"""Tensors in, tensors out: the one block that every family is made of, and its parts. Knows no family."""

from __future__ import annotations

import os

# oneDNN keeps a kernel for every shape that it has met, 1,024 by default. Rows of unequal length bring new shapes in
# every step, so the memory of a run on a CPU would grow for hundreds of steps; one step needs a few dozen kernels.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
