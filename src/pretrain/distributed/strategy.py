"""Training of an objective on one device: where it lies, its forward and backward passes, and its gradients.

`pretrain.distributed.parallel_strategy.ParallelStrategy` does the same on several devices. Whatever the strategy,
gradients are sums over targets, never means, so every reduction is a sum and the world size changes the result by
rounding only (and, with tensor parallelism, by the attention weights that dropout drops: each rank draws the same mask
for its own heads).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import ParallelConfig
from pretrain.distributed.mesh import ParallelPlan
from pretrain.distributed.world import World
from pretrain.errors import ModelError
from pretrain.nn.buffers import changing_buffers
from pretrain.nn.device import local
from pretrain.nn.layout import ShardLayout
from pretrain.objectives.base import Batch, Loss, Objective

__all__ = ["Strategy"]


class Strategy:
    """An objective on one device; the base class of several.

    The order is the same on any number of devices: tensor parallelism, activation checkpointing, compilation of each
    block, FSDP2 or DDP, memory allocation, initial weights.

    Args:
        objective: its model may lie on the meta device; ``fill`` then allocates its memory and sets its weights.
        world: the processes, with a process group and a mesh of the sizes of ``choice`` if there are several.
        choice: sizes of the mesh, and ``single``, ``ddp`` or ``fsdp``.
        settings: the ``parallel`` section.
        device: of this process.
        compiled: whether to compile the blocks, and why.

    Attributes:
        compiled: whether the blocks are compiled until ``release``, and why.
        layout: which shard of every parameter this rank holds, by its name in the objective and in the model.
        sharded: FSDP2 shards the weights.
        cut: no rank has all weights, so that all ranks must take part whenever the model runs.
        gathered: dtype of the weights in a forward pass: FSDP2 may gather those of the blocks in half precision.
        unused_parameters: names of the parameters that no gradient reaches on any rank; see ``set_unused_parameters``.
        uneven: whether a gradient reaches some parameters on a few ranks only.
    """

    sharded = False
    cut = False
    gathered = torch.float32

    def __init__(
        self,
        objective: Objective,
        world: World,
        choice: ParallelPlan,
        settings: ParallelConfig,
        *,
        device: torch.device,
        compiled: tuple[bool, str] = (False, ""),
    ) -> None:
        self.objective, self.world, self.choice, self.settings = objective, world, choice, settings
        self.device, self.compiled = device, compiled
        self.unused_parameters: frozenset[str] = frozenset()
        self.uneven = False
        self._has_buffers = bool(changing_buffers(objective))
        self._buffers: dict[str, Tensor] = {}  # copies of the changing ones before the step
        model = objective.model
        self.layout = self._divide(_shapes(objective))
        # With CPU offload, the parameters lie on the CPU between passes: their device is not where the model computes.
        model.computes_on = device if settings.cpu_offload else None
        model.backbone.set_activation_checkpointing(settings.activation_checkpointing)
        if compiled[0]:
            model.backbone.compile_blocks()
        self._place()
        # A model that FSDP2 has wrapped cannot be used by itself, even if it is not sharded.
        model.layout = self.layout if self.cut or self.sharded else None

    # ------------------------------------------------------------------ building

    def _divide(self, shapes: Mapping[str, tuple[int, ...]]) -> ShardLayout:
        """Divide the model over the ranks as far as that comes before its blocks are compiled; return the layout."""
        return ShardLayout(shapes, 1, 1, 1, {}, 0)

    def _place(self) -> None:
        """Move the objective to the device; one on the meta device gets its memory later, in ``fill``."""
        if not any(p.is_meta for p in self.objective.parameters()):
            self.objective.to(self.device)

    def run_eagerly(self, why: str) -> None:
        """Replace the compiled blocks by eager ones."""
        self.objective.model.backbone.eager_blocks()
        self.compiled = False, why

    def fill(self, *, initialise: bool) -> None:
        """Allocate the memory of a model that was built on the meta device, and set its weights.

        Args:
            initialise: False if a checkpoint is loaded into the weights afterwards.
        """
        objective, model = self.objective, self.objective.model
        if not any(p.is_meta for p in model.parameters()):
            return
        named = [*objective.named_parameters(), *objective.named_buffers()]
        _refuse_meta_tensors(objective, [name for name, tensor in named if tensor.is_meta])
        # Other tensors of the objective (a teacher, a table) have their values already.
        kept = {name: local(t.detach()).clone() for name, t in named if not t.is_meta}
        self._allocate()
        with torch.no_grad():
            for name, tensor in [*objective.named_parameters(), *objective.named_buffers()]:
                if name in kept:
                    local(tensor).copy_(kept[name])
        # The checkpoint of an adapter does not hold the weights of its base model.
        if model.start is not None and (initialise or model.adapter is not None):
            model.start(model)
        model.start = None

    def _allocate(self) -> None:
        self.objective.to_empty(device=self.device)

    def broadcast_initial_values(self) -> None:
        """Give all ranks the values of the first one that holds them: random initial values may differ."""

    def wrap(self) -> None:
        """Wrap the objective for the parameters that are trainable now, if the strategy does so (DDP).

        Called before the first step and whenever parameters are unfrozen.
        """

    def matrix_collectives(self) -> Any:
        """Return the collectives of an optimizer that works on whole matrices; None if it needs none."""
        return None

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trainable now, by name."""
        return {name: p for name, p in self.objective.named_parameters() if p.requires_grad}

    def set_unused_parameters(self, unused: set[str], *, uneven: bool) -> None:
        """Set the parameters that no gradient reaches, before FSDP2 reduces gradients and DDP wraps the objective.

        Raises:
            TrainingError: a gradient reaches some on a few ranks only, and FSDP2 of this torch cannot sum them.
        """
        self.unused_parameters, self.uneven = frozenset(unused), uneven

    # ------------------------------------------------------------------ a step

    def forward(self, batch: Batch) -> Loss:
        """Return the loss of one micro-batch of this rank."""
        found: Loss = self.objective(batch)
        return found

    def forward_no_sync(self, batch: Batch) -> Loss:
        """Return the loss of a batch outside training steps; with FSDP2 or tensor parallelism all ranks must call."""
        return Strategy.forward(self, batch)

    def backward_microbatches(self, run: Callable[[int], Tensor], count: int) -> list[Tensor]:
        """Run the micro-batches of this rank; afterwards the gradients are those of the global batch.

        Args:
            run: forward and backward of micro-batch ``i`` of this rank; returns its summed loss.
            count: number of micro-batches of this rank.

        Returns:
            The results of ``run``, in order.
        """
        self._keep_buffers()
        return [run(i) for i in range(count)]

    def _keep_buffers(self) -> None:
        if self._has_buffers:
            self._buffers = {n: b.clone() for n, b in changing_buffers(self.objective).items()}

    def restore_buffers(self) -> None:
        """Undo what the forward passes of this step did to buffers; called if the step is skipped."""
        if self._has_buffers:
            for name, buffer in changing_buffers(self.objective).items():
                buffer.copy_(self._buffers[name])

    def reduce_loss_and_norm(
        self, totals: Sequence[Tensor], params: Mapping[str, Tensor]
    ) -> tuple[list[float], float]:
        """Return the losses of all micro-batches of the global batch in order, and the norm of its gradient.

        A step synchronises with the device in this method only. All ranks get the same numbers.

        Args:
            totals: summed losses of the micro-batches of this rank.
            params: trainable parameters by name, with their gradients.
        """
        grads = [local(p.grad) for p in params.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g for g in grads if g.numel()])
        *losses, whole = torch.stack([*totals, norm.to(self.device)]).tolist()
        return losses, whole

    def clip(self, params: Mapping[str, Tensor], limit: float, norm: float) -> None:
        """Scale the gradients so that their norm, as returned by ``reduce_loss_and_norm``, is at most ``limit``."""
        factor = min(1.0, limit / (norm + 1e-6))
        if factor < 1.0:
            grads = [local(p.grad) for p in params.values() if p.grad is not None]
            torch._foreach_mul_([g for g in grads if g.numel()], factor)

    # ------------------------------------------------------------------ outside training steps

    @property
    def generates_samples(self) -> bool:
        """Whether this rank generates samples during training.

        If the model is sharded, all ranks must generate, at the same length. FSDP2 combined with tensor parallelism
        generates none, because groups that gather separately could end a text at different positions.
        """
        return True

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Make the model callable by itself, without the objective, inside the context; all ranks must enter it."""
        yield

    @contextlib.contextmanager
    def without_gradient(self) -> Iterator[None]:
        """Disable gradients for an evaluation; by no_grad under FSDP2, which cannot write into inference tensors."""
        with torch.inference_mode():
            yield

    def reshard(self) -> None:
        """Free the gathered weights: without a backward pass FSDP2 does not, and the shards are the parameters."""

    def release(self) -> None:
        """Undo what training added to the objective: DDP, the batch group, activation checkpointing and compilation."""
        self.objective.batch_group = None
        self.objective.model.backbone.plain_blocks()
        self.objective.model.computes_on = None


def _shapes(objective: Objective) -> dict[str, tuple[int, ...]]:
    """Return full shapes by the names in the objective (``model.backbone...``) and in the model (``backbone...``)."""
    found = {name: tuple(p.shape) for name, p in objective.named_parameters()}
    return found | {name: tuple(p.shape) for name, p in objective.model.named_parameters()}


def _refuse_meta_tensors(objective: nn.Module, empty: Sequence[str]) -> None:
    """Refuse meta tensors outside of the model: only the model's own weights are set later.

    Args:
        objective: the objective that owns the parameters and buffers.
        empty: names of those on the meta device.

    Raises:
        ModelError: one of them lies outside of ``objective.model``.
    """
    for name in empty:
        if not name.startswith("model."):
            raise ModelError(
                f"{name} of {type(objective).__name__} has no values: it was made from "
                "weights of the model, which several processes load only later. Make it when it is first used, or pass "
                "a model that has been loaded."
            )
