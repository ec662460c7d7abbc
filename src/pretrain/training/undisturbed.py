"""Training in the midst of a caller's own code: it needs gradients, and seeds torch's global random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["undisturbed"]


@contextlib.contextmanager
def undisturbed(device: torch.device | None = None) -> Iterator[None]:
    """Train with gradients, whatever the caller has switched off, and restore the random state of the caller.

    Args:
        device: where the model runs; None if that is not known yet. The state of GPUs is restored if they are in use.
    """
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # not annotated in torch
    in_use = begun or (device is not None and device.type == "cuda")
    gpus = range(torch.cuda.device_count()) if in_use else ()
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(gpus):
        yield
