"""Which parameters a gradient reaches, where that differs from process to process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pretrain.parallel.regions import local
from pretrain.parallel.world import World

__all__ = ["drop_zeros", "reached_parameters"]


def reached_parameters(
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
    known: dict[
        int, tuple[Tensor, str]
    ] = {}  # a tensor that is kept cannot lend its number to another

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


def drop_zeros(params: Mapping[str, nn.Parameter], world: World) -> None:
    """Where nothing gave a gradient there is none, as on one device: weight decay then moves nothing.

    Args:
        params: that no gradient reached before the first step, with zeros that were filled in for what did not come.
        world: the processes, which all come along.
    """
    held = [p for _, p in sorted(params.items()) if p.grad is not None]
    reached = world.total([float(local(p.grad).any()) for p in held if p.grad is not None])
    for p, count in zip(held, reached, strict=True):
        if not count:
            p.grad = None
