"""Which parameters a gradient reaches, where that differs from process to process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.distributed.world import World
from pretrain.errors import ModelError, TrainingError
from pretrain.nn.layout import local

__all__ = ["drop_zero_gradients", "fill_missing_gradients", "find_used_parameters", "refuse_lost"]


def find_used_parameters(
    root: nn.Module, units: Sequence[nn.Module], run: Callable[[], Tensor]
) -> set[str]:
    """Names of the parameters at the ends of the graph behind a loss; nothing is run backwards.

    FSDP2 puts whole parameters in the place of its parts while a unit runs, so that they have to be looked at then.

    Args:
        root: whose parameters are asked for.
        units: modules inside of it whose parameters may be others while they run; with the root itself, if it is one.
        run: computes the loss.
    """
    prefixes = {id(module): f"{name}." if name else "" for name, module in root.named_modules()}
    # With the tensor: while it is kept, no other can have its number.
    known: dict[int, tuple[Tensor, str]] = {}

    def look(module: nn.Module, _: Any) -> None:
        for name, parameter in module.named_parameters():
            known[id(parameter)] = (parameter, prefixes[id(module)] + name)

    hooks = [unit.register_forward_pre_hook(look) for unit in units]
    try:
        total = run()  # the graph lives as long as its end does
        ends = _ends(total.grad_fn)
    finally:
        for hook in hooks:
            hook.remove()
    return {known[end][1] for end in ends if end in known}


def _ends(start: Any) -> set[int]:
    """``id`` of the leaves behind a node of the autograd graph."""
    found, seen, todo = set(), {start}, [start]
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for other, _ in getattr(node, "next_functions", ()):
            if other is not None and other not in seen:
                seen.add(other)
                todo.append(other)
    return found


def fill_missing_gradients(units: Sequence[Any], *, uneven: bool) -> None:
    """Let FSDP2 reduce zeros where no gradient came; later batches may be uneven where the first ones were not.

    It packs what there is without asking which: gradients of different parameters would be added.

    Args:
        units: what FSDP2 has wrapped.
        uneven: that has been seen already.

    Raises:
        TrainingError: so it has, and this torch cannot.
    """
    for unit in units:
        if hasattr(unit, "set_reduce_scatter_unused_params"):
            unit.set_reduce_scatter_unused_params(True)
        elif uneven:
            raise TrainingError(
                "A gradient reaches some parameters on a few of the processes only, which FSDP2 of torch "
                f"{torch.__version__} cannot sum. Use parallel.strategy=ddp, or torch 2.13."
            )


def refuse_lost(objective: nn.Module, empty: Sequence[str]) -> None:
    """Outside of the model nobody would give values to what has none.

    Args:
        objective: whose parameters and buffers they are.
        empty: names, behind ``objective.``, of those on the meta device.

    Raises:
        ModelError: one of them lies outside of ``objective.model``.
    """
    for name in empty:
        if not name.startswith("objective.model."):
            raise ModelError(
                f"{name.removeprefix('objective.')} of {type(objective).__name__} was made of weights that several "
                "processes read later. Make it when it is first needed, or give a model that has been loaded."
            )


def drop_zero_gradients(params: Mapping[str, nn.Parameter], world: World) -> None:
    """Where nothing gave a gradient there is none, as on one device: weight decay then moves nothing.

    Args:
        params: that no gradient reached before the first step, with zeros that were filled in for what did not come.
        world: the processes, which all come along.
    """
    held = [p for _, p in sorted(params.items()) if p.grad is not None]
    reached = world.all_reduce_sum([float(local(p.grad).any()) for p in held if p.grad is not None])
    for p, count in zip(held, reached, strict=True):
        if not count:
            p.grad = None
