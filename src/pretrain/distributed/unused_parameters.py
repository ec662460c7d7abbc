"""Detection and handling of parameters that a gradient does not reach on some or all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.distributed.world import World
from pretrain.errors import TrainingError
from pretrain.nn.device import local

__all__ = ["drop_zero_gradients", "fill_missing_gradients", "find_used_parameters"]


def find_used_parameters(
    root: nn.Module, units: Sequence[nn.Module], run: Callable[[], Tensor]
) -> set[str]:
    """Return the names of the parameters that are leaves of the graph of a loss, without a backward pass.

    FSDP2 replaces the shards by whole parameters while a unit runs, so the parameters are recorded at that time.

    Args:
        root: module whose parameters are examined.
        units: modules whose parameters may be replaced while they run; includes the root if it is such a module.
        run: computes the loss.
    """
    prefixes = {id(module): f"{name}." if name else "" for name, module in root.named_modules()}
    # The tensor is kept as well, so that its id cannot be reused.
    parameters: dict[int, tuple[Tensor, str]] = {}

    def look(module: nn.Module, _: Any) -> None:
        for name, parameter in module.named_parameters():
            parameters[id(parameter)] = (parameter, prefixes[id(module)] + name)

    hooks = [unit.register_forward_pre_hook(look) for unit in units]
    try:
        total = run()  # keeps the graph alive
        ends = _ends(total.grad_fn)
    finally:
        for hook in hooks:
            hook.remove()
    return {parameters[end][1] for end in ends if end in parameters}


def _ends(start: Any) -> set[int]:
    """Return the ``id`` of each leaf of the autograd graph below a node."""
    leaves, seen, todo = set(), {start}, [start]
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for other, _ in getattr(node, "next_functions", ()):
            if other is not None and other not in seen:
                seen.add(other)
                todo.append(other)
    return leaves


def fill_missing_gradients(units: Sequence[Any], *, uneven: bool) -> None:
    """Make FSDP2 reduce zeros for missing gradients, as later batches may be uneven even if the first ones are not.

    FSDP2 packs only the gradients that exist: if these differ between ranks, gradients of different parameters would
    be added.

    Args:
        units: the modules that FSDP2 has wrapped.
        uneven: a gradient has been seen to reach some parameters on a few ranks only.

    Raises:
        TrainingError: ``uneven`` is True, and this version of torch does not support it.
    """
    for unit in units:
        if hasattr(unit, "set_reduce_scatter_unused_params"):
            unit.set_reduce_scatter_unused_params(True)
        elif uneven:
            raise TrainingError(
                "A gradient reaches some parameters on a few of the processes only, which FSDP2 of torch "
                f"{torch.__version__} cannot sum. Use parallel.strategy=ddp, or torch 2.13."
            )


def drop_zero_gradients(params: Mapping[str, nn.Parameter], world: World) -> None:
    """Set gradients to None that are zero on all ranks, as on one device, so that weight decay changes nothing.

    A collective, which all ranks must call.

    Args:
        params: parameters that no gradient reached before the first step; missing gradients were filled with zeros.
        world: the processes.
    """
    with_gradient = [p for _, p in sorted(params.items()) if p.grad is not None]
    reached = world.all_reduce_sum(
        [float(local(p.grad).any()) for p in with_gradient if p.grad is not None]
    )
    for p, count in zip(with_gradient, reached, strict=True):
        if not count:
            p.grad = None
