"""AdamW and Muon, their parameter groups, and optimizer state keyed by parameter name.

AdamW: arXiv 1711.05101. Muon updates the hidden matrices of the blocks; all other parameters, in particular embeddings
and the vocabulary head, are updated by AdamW. L2-SP (arXiv 1802.01483) is decoupled here, like weight decay, but decays
towards the loaded weights instead of zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from pretrain.checkpoint.best import rates_of_run
from pretrain.config import OptimConfig
from pretrain.errors import CheckpointError, ConfigError, did_you_mean
from pretrain.nn.device import local
from pretrain.objectives.base import Objective
from pretrain.training.update_rules import CautiousAdamW, EagerAdamW, Muon

if TYPE_CHECKING:
    from pretrain.distributed.whole_parameters import MatrixCollectives

__all__ = [
    "Optimizers",
    "build_optimizers",
    "lr_of_width",
    "muon_weights",
    "resolve_lr",
    "weights_of",
]

OPTIMIZERS = ("adamw", "muon")
# The automatic rate of AdamW is the lower of the first number over the root of the width and the second over the width;
# the third is the rate of the parameters that Muon does not update.
_LR_BY_ROOT, _LR_BY_WIDTH, _LR_BESIDE_MUON = 0.015, 0.4, 3e-3


class Optimizers:
    """One or two optimizers stepped together, with state keyed by parameter name.

    State keyed by position would be assigned to the wrong parameters once their order changes between resumes.

    Args:
        optimizers: each parameter belongs to one of them.
        names: names of their parameters.
        anchors: initial values of the parameters that L2-SP pulls back to them.
        pull: strength of L2-SP; multiplied by the learning rate of the parameter's group.
    """

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        names: Mapping[Tensor, str],
        anchors: Mapping[Tensor, Tensor] | None = None,
        pull: float = 0.0,
    ) -> None:
        self.optimizers = optimizers
        self._anchors, self._pull = dict(anchors or {}), pull
        self._names = dict(names)
        self._peaks = [[group["lr"] for group in opt.param_groups] for opt in optimizers]

    def set_factor(self, factor: float) -> None:
        """Set every group's learning rate to its peak times ``factor``."""
        for opt, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(opt.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def step(self) -> None:
        """Step all optimizers, then pull parameters towards their anchors."""
        for opt in self.optimizers:
            opt.step()
            for group in opt.param_groups:
                anchored = [p for p in group["params"] if p in self._anchors]
                if anchored:
                    # Above 1 the pull would overshoot the anchor, and diverge.
                    share = min(1.0, group["lr"] * self._pull)
                    with torch.no_grad():
                        anchors = [local(self._anchors[p]) for p in anchored]
                        torch._foreach_lerp_([local(p) for p in anchored], anchors, share)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return the moments as ``{"exp_avg/blocks.0.weight": tensor}``; scalars become 0-d tensors."""
        tensors = {f"anchor/{self._names[p]}": value for p, value in self._anchors.items()}
        for opt in self.optimizers:
            for p, state in opt.state.items():
                for key, value in state.items():
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                    tensors[f"{key}/{self._names[p]}"] = tensor.detach()
        for opt in self.optimizers:
            for group in opt.param_groups:
                # Marks parameters without moments, as they had no gradient yet; other missing moments are an error.
                for p in group["params"]:
                    if p not in opt.state:
                        tensors[f"absent/{self._names[p]}"] = torch.zeros(())
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors that ``state`` returned.

        Raises:
            CheckpointError: moments belong to unknown parameters, are missing or have other shapes.
        """
        params = {name: p for p, name in self._names.items()}
        owner = {
            p: opt for opt in self.optimizers for group in opt.param_groups for p in group["params"]
        }
        for key, tensor in tensors.items():
            field, _, name = key.partition("/")
            if name not in params:
                raise CheckpointError(
                    f"The optimizer state holds {field} of {name!r}, and this model has no such parameter. "
                    "The run was started with another model; use a new train.out."
                )
            p = params[name]
            if field == "absent":
                continue
            if tensor.ndim and tensor.shape != local(p).shape:
                raise CheckpointError(
                    f"The optimizer state holds {field} of {name!r} with shape {tuple(tensor.shape)}, but the "
                    f"parameter has {tuple(local(p).shape)}. Use a new train.out for a changed model."
                )
            if field == "anchor":
                if p in self._anchors:
                    local(self._anchors[p]).copy_(tensor)
                continue
            # The step counter of fused AdamW is on the device of the parameter, like its moments.
            state = tensor.clone().to(p.device)
            if tensor.ndim and local(p) is not p:
                state = torch.zeros_like(p.detach())
                local(state).copy_(tensor)
            owner[p].state[p][field] = state
        loose = [self._names[p] for p in self._anchors if f"anchor/{self._names[p]}" not in tensors]
        if tensors and loose:
            raise CheckpointError(
                f"The optimizer state lacks the value with which {loose[0]!r} started, which optim.l2_sp needs: the "
                "run was started without optim.l2_sp. Set optim.l2_sp=0 or use a new train.out."
            )
        lost = [
            name
            for name, p in params.items()
            if f"absent/{name}" not in tensors and tensors and p not in owner[p].state
        ]
        if lost:
            raise CheckpointError(
                f"The optimizer state lacks the moments of {lost[0]!r} and {len(lost) - 1} more. The run was probably "
                "started with other trainable parameters; use a new train.out."
            )


def lr_of_width(width: int) -> float:
    """Return the automatic learning rate of AdamW for a model of this width.

    The updates of Adam change every weight by about the learning rate, so the change of a layer's output grows with the
    number of its inputs, and the best rate falls with the width, as muP has it (arXiv 2203.03466): at large widths as
    1 / width, within a third of the rates of GPT-3 from 768 to 5,120 (arXiv 2005.14165); at small ones more slowly, as
    in the runs of docs/training.md.
    """
    return min(_LR_BY_ROOT / math.sqrt(width), _LR_BY_WIDTH / width)


def resolve_lr(
    settings: OptimConfig, objective: Objective, out: Path | None = None
) -> tuple[OptimConfig, str]:
    """Return the settings with a number for ``optim.lr: auto``, and its reason in words; others as they are.

    A run that has begun in ``out`` keeps the rate that it began with. An orthogonal update of Muon has the same norm at
    every width, and what is left to AdamW beside it are embeddings, norms and biases, so both rates stay as they are
    in the recipes.
    """
    if settings.lr != "auto":
        return settings, ""
    width = objective.model.backbone.stats().hidden
    began = rates_of_run(out).get("lr") if out is not None and out.is_dir() else None
    if began is not None:
        lr, reason = began, "as the run began"
    elif settings.name == "muon":
        lr, reason = _LR_BESIDE_MUON, "beside Muon, at every width"
    else:
        lr, reason = float(f"{lr_of_width(width):.2g}"), f"for width {width}"
    return dataclasses.replace(settings, lr=lr), f" (auto: {reason})"


def weights_of(module: nn.Module) -> set[Tensor]:
    """Return the weights by which ``module`` multiplies, which alone decay.

    The returned parameters have two dimensions or more and belong to linear layers and convolutions, or have a name
    that contains ``weight``, such as the parts of a parametrized weight. Tables (``nn.Embedding``), norms, and other
    parameters, such as positions, class tokens, mask tokens and queries, are looked up or added.
    """
    multiplied: set[Tensor] = set()
    others: set[Tensor] = set()
    for path, owner in module.named_modules():
        multiplies = isinstance(owner, nn.Linear | _ConvNd)
        parametrized, last = isinstance(owner, ParametrizationList), path.rpartition(".")[2]
        for name, p in owner.named_parameters(recurse=False):
            if isinstance(owner, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm | nn.RMSNorm):
                others.add(p)
            elif p.ndim >= 2 and (multiplies or "weight" in (last if parametrized else name)):
                multiplied.add(p)
    return multiplied - others  # a tied head multiplies by a table


def muon_weights(module: nn.Module, hidden: Iterable[nn.Module]) -> set[Tensor]:
    """Return those of `weights_of` that Muon updates: the matrices of the blocks ``hidden``."""
    inside: set[Tensor] = {p for block in hidden for p in block.parameters() if p.ndim == 2}
    return inside & weights_of(module)


def build_optimizers(
    module: nn.Module,
    settings: OptimConfig,
    hidden: Iterable[nn.Module],
    device: torch.device,
    *,
    scales: Mapping[Tensor, float] | None = None,
    fresh: AbstractSet[Tensor] = frozenset(),
    collectives: MatrixCollectives | None = None,
) -> Optimizers:
    """Group the trainable parameters of ``module`` and create their optimizers.

    Args:
        module: the module to train. A tied matrix is one parameter and is updated once.
        settings: the ``optim`` section.
        hidden: the blocks, of which Muon updates `muon_weights`.
        device: device of the parameters; fused AdamW is used where torch has it.
        scales: factors on the learning rates of parameters; 1 if missing.
        fresh: newly initialised parameters, which get weight decay instead of ``optim.l2_sp``.
        collectives: distributes the updates of Muon over ranks.

    Raises:
        ConfigError: the optimizer is not known, or nothing is trainable.
    """
    if settings.name not in OPTIMIZERS:
        raise ConfigError(
            f"optim.name is {settings.name!r}." + did_you_mean(settings.name, OPTIMIZERS)
        )
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if p.requires_grad}
    if not names:
        raise ConfigError("Nothing is trainable: every parameter of the model is frozen.")
    decaying = weights_of(module)
    orthogonal = muon_weights(module, hidden) if settings.name == "muon" else set()
    matrices = [p for p in names if p in orthogonal]
    others = [p for p in names if p not in orthogonal]
    anchors = {p: p.detach().clone() for p in names if settings.l2_sp and p not in fresh}

    def groups(params: Iterable[Tensor], lr: float) -> list[dict[str, Any]]:
        members_of: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
        for p in params:
            decay = settings.weight_decay if p in decaying and p not in anchors else 0.0
            members_of[decay, (scales or {}).get(p, 1.0)].append(p)
        return [
            {"params": members, "weight_decay": decay, "lr": lr * scale}
            for (decay, scale), members in members_of.items()
        ]

    optimizers: list[torch.optim.Optimizer] = []
    if others:
        adamw = CautiousAdamW if settings.cautious else EagerAdamW
        optimizers.append(
            adamw(
                groups(others, float(settings.lr)),
                betas=settings.betas,
                eps=settings.eps,
                fused=device.type in ("cpu", "cuda", "mps"),
            )
        )
    if matrices:
        optimizers.append(
            Muon(
                groups(matrices, settings.muon_lr),
                cautious=settings.cautious,
                collectives=collectives,
                names=names,
            )
        )
    return Optimizers(optimizers, names, anchors, settings.l2_sp)
