"""AdamW and Muon with their parameter groups, and moments that are stored by parameter name.

AdamW: arXiv 1711.05101. Muon (momentum, orthogonalised by a Newton-Schulz iteration): Jordan et al., 2024, with
the quintic coefficients of that work. Muon steps the hidden matrices of the blocks; everything else, embeddings
and the vocabulary head above all, stays with AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import OptimConfig
from pretrain.errors import CheckpointError, ConfigError, did_you_mean
from pretrain.nn.device import multiplies_bf16_fast

__all__ = ["Muon", "Optimizers", "build_optimizers", "orthogonalize"]

OPTIMIZERS = ("adamw", "muon")
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a batch of matrices towards 1, (n, r, c) -> (n, r, c).

    Runs in bf16 where the hardware multiplies it fast; the iteration corrects its own rounding.
    """
    fast = multiplies_bf16_fast(matrices.device)
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for 2-D weights; equal shapes are stepped in one batch.

    Args:
        params: 2-D parameters, or groups of them.
        lr: spectral size of an update; multiplied by sqrt(max(1, rows / columns)).
        momentum: of the Nesterov average.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient are left alone."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[tuple(p.shape)].append(p)
            for shape, params in shapes.items():
                for p in params:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                grads = [p.grad for p in params if p.grad is not None]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                looked_ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
                update = orthogonalize(torch.stack(looked_ahead))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.unbind(0)), alpha=-group["lr"] * scale)


class Optimizers:
    """One or two optimizers stepped together, with state keyed by parameter name.

    State by position diverges after the second resume as soon as the order of parameters changes; by name it
    cannot.
    """

    def __init__(
        self, optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str]
    ) -> None:
        self.optimizers = optimizers
        self._names = dict(names)
        self._peaks = [[group["lr"] for group in opt.param_groups] for opt in optimizers]

    def set_factor(self, factor: float) -> None:
        """Set every group's learning rate to its peak times ``factor``."""
        for opt, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(opt.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def step(self) -> None:
        """Step all of them."""
        for opt in self.optimizers:
            opt.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for opt in self.optimizers:
            opt.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Moments as ``{"exp_avg/blocks.0.weight": tensor}``; scalars become 0-d tensors."""
        found: dict[str, Tensor] = {}
        for opt in self.optimizers:
            for p, state in opt.state.items():
                for key, value in state.items():
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                    found[f"{key}/{self._names[p]}"] = tensor.detach()
        for opt in self.optimizers:
            for group in opt.param_groups:
                # A parameter that no gradient has reached yet has no moments, which is not the same as lost ones.
                for p in group["params"]:
                    if p not in opt.state:
                        found[f"absent/{self._names[p]}"] = torch.zeros(())
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state`` returned.

        Raises:
            CheckpointError: moments of unknown parameters, missing moments or other shapes.
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
            if tensor.ndim and tensor.shape != p.shape:
                raise CheckpointError(
                    f"The optimizer state holds {field} of {name!r} with shape {tuple(tensor.shape)}, but the "
                    f"parameter has {tuple(p.shape)}. Use a new train.out for a changed model."
                )
            # The step counter of fused AdamW lives with the parameter, like its moments.
            opt = owner[p]
            opt.state[p][field] = tensor.clone().to(p.device)
        lost = [
            name
            for name, p in params.items()
            if f"absent/{name}" not in tensors and tensors and p not in owner[p].state
        ]
        if lost:
            raise CheckpointError(
                f"The optimizer state lacks the moments of {lost[0]!r} and {len(lost) - 1} more."
            )


def _decays(name: str, p: Tensor, embeddings: set[int]) -> bool:
    return p.ndim >= 2 and id(p) not in embeddings


def build_optimizers(
    module: nn.Module, settings: OptimConfig, hidden: Iterable[nn.Module], device: torch.device
) -> Optimizers:
    """Group the trainable parameters of ``module`` and make their optimizers.

    Args:
        module: what is trained. A tied matrix is one parameter, and is stepped once.
        settings: the ``optim`` section.
        hidden: the blocks, whose 2-D weights Muon takes.
        device: where the parameters live; fused AdamW is used where torch has it.

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
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    matrices: list[Tensor] = []
    if settings.name == "muon":
        inside = {id(p) for block in hidden for p in block.parameters() if p.ndim == 2}
        inside -= embeddings
        matrices = [p for p in names if id(p) in inside]
    taken = {id(p) for p in matrices}
    rest = {p: name for p, name in names.items() if id(p) not in taken}
    decayed = [p for p, name in rest.items() if _decays(name, p, embeddings)]
    plain = [p for p, name in rest.items() if not _decays(name, p, embeddings)]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, settings.weight_decay), (plain, 0.0))
        if params
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        fused = device.type in ("cpu", "cuda", "mps")
        optimizers.append(
            torch.optim.AdamW(
                groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused
            )
        )
    if matrices:
        optimizers.append(Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay))
    return Optimizers(optimizers, names)
