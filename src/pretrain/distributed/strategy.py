"""Parallelisation of an objective over the ranks of a run, and the reduction of its gradients.

The order is the same on any number of devices: tensor parallelism, activation checkpointing, compilation of each
block, FSDP2 or DDP, memory allocation, initial weights. Gradients are sums over targets, never means, so every
reduction is a sum and the world size changes the result by rounding only (and, with tensor parallelism, by the
attention weights that dropout drops: each rank draws the same mask for its own heads).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pretrain.config import ParallelConfig
from pretrain.distributed.ddp import wrap_ddp
from pretrain.distributed.mesh import ParallelPlan
from pretrain.distributed.reproducible import add_across, tree_sum
from pretrain.distributed.tensor_parallel import (
    TensorParallel,
    reduce_partial_gradients,
    shard_model,
)
from pretrain.distributed.unused_parameters import (
    drop_zero_gradients,
    fill_missing_gradients,
    find_used_parameters,
    refuse_lost,
)
from pretrain.distributed.world import World
from pretrain.errors import ConfigError
from pretrain.nn.buffers import changing_buffers
from pretrain.nn.layout import ShardLayout, local
from pretrain.nn.tensor_parallel import Group
from pretrain.objectives.base import Batch, Loss, Objective

__all__ = ["Strategy"]


class _Root(nn.Module):
    """Root module for FSDP2, which renames the class of what it wraps; the class name of an objective must stay."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch | None) -> tuple[Tensor, Loss]:
        """Return the loss, preceded by its total: not every version of torch finds tensors inside a dataclass."""
        if batch is None:  # see `pretrain.distributed.ddp`
            total = torch.stack(
                [0.0 * p.sum() for p in self.objective.parameters() if p.requires_grad]
            ).sum()
            return total, Loss(total, total.detach())
        loss: Loss = self.objective(batch)
        return loss.total, loss


class Strategy:
    """An objective, parallelised over the devices of a world.

    Args:
        objective: its model may lie on the meta device; ``fill`` then allocates its memory and sets its weights.
        world: the processes, with a process group and a mesh of the sizes of ``choice``.
        choice: sizes of the mesh, and ``single``, ``ddp`` or ``fsdp``.
        settings: the ``parallel`` section.
        device: of this process.
        gather: dtype in which FSDP2 gathers the weights of the blocks; master weights and gradients are fp32.
        compiled: compile the blocks.

    Attributes:
        layout: which shard of every parameter this rank holds, by its name in the objective and in the model.
        cut: no rank has all weights, so that all ranks must take part whenever the model runs.
        untouched: names of the parameters that no gradient reaches on any rank; ``uneven`` is True if a gradient
            reaches some parameters on a few ranks only. See ``set_unused_parameters``.
    """

    def __init__(
        self,
        objective: Objective,
        world: World,
        choice: ParallelPlan,
        settings: ParallelConfig,
        *,
        device: torch.device,
        gather: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.objective, self.world, self.choice, self.settings = objective, world, choice, settings
        self.device = device
        self.untouched: frozenset[str] = frozenset()
        self.uneven = False
        self._ddp: Any = None
        self._root = _Root(objective)
        self._has_buffers = bool(changing_buffers(objective))
        self._buffers: dict[str, Tensor] = {}  # copies of the changing ones before the step
        if settings.reproducible and (found := changing_buffers(objective.model)):
            raise ConfigError(
                f"parallel.reproducible gives the same bits on any number of processes, but {next(iter(found))!r} of "
                f"this {objective.model.backbone.model_type} model is a statistic over the rows of one process. Leave "
                "reproducible out, or use a norm without running statistics (GroupNorm, LayerNorm)."
            )
        model = objective.model
        shapes = _shapes(objective)
        self.tp: TensorParallel | None = None
        if choice.sizes.tp > 1:
            group = Group(world.group("tp"), world.tp_rank, choice.sizes.tp)
            self.tp = shard_model(model, group)
        if objective.couples_examples and choice.sizes.dp > 1:
            objective.batch_group = Group(world.batch_group(), world.dp_rank, choice.sizes.dp)
        # With CPU offload, the parameters lie on the CPU between passes: their device is not where the model computes.
        model.computes_on = device if settings.cpu_offload else None
        self.sharded, self._gather = choice.strategy == "fsdp", gather
        self.layout = self._layout(shapes)
        self.cut = self.layout.dp_shard * self.layout.tp > 1
        model.backbone.set_activation_checkpointing(settings.activation_checkpointing)
        if compiled:
            model.backbone.compile_blocks()
        if not settings.cpu_offload and not self.sharded:  # FSDP2 moves the weights unit by unit
            _move(objective, device)
        if self.sharded:
            self._shard()
        # A model that FSDP2 has wrapped cannot be used by itself, even if it is not sharded.
        model.layout = self.layout if self.cut or self.sharded else None

    def fill(self, *, initialise: bool) -> None:
        """Allocate the memory of a model that was built on the meta device, and set its weights.

        Args:
            initialise: False if a checkpoint is loaded into the weights afterwards.
        """
        model, root = self.objective.model, self._root
        if not any(p.is_meta for p in model.parameters()):
            return
        named = [*root.named_parameters(), *root.named_buffers()]
        refuse_lost(self.objective, [name for name, tensor in named if tensor.is_meta])
        # Other tensors of the objective (a teacher, a table) have their values already.
        kept = {name: local(t.detach()).clone() for name, t in named if not t.is_meta}
        root.to_empty(device="cpu" if self.settings.cpu_offload else self.device)
        with torch.no_grad():
            for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
                if name in kept:
                    local(tensor).copy_(kept[name])
        if self.settings.cpu_offload:
            for module in root.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))
        # The checkpoint of an adapter does not hold the weights of its base model.
        if model.start is not None and (initialise or model.adapter is not None):
            model.start(model)
        model.start = None

    # ------------------------------------------------------------------ building

    def _layout(self, shapes: Mapping[str, tuple[int, ...]]) -> ShardLayout:
        sizes, cuts = self.choice.sizes, {} if self.tp is None else dict(self.tp.cuts)
        cuts |= {f"model.{name}": dim for name, dim in cuts.items()}
        shard = sizes.dp_shard if self.sharded else 1
        return ShardLayout(shapes, sizes.dp // shard, shard, sizes.tp, cuts, self.world.rank)

    def _shard(self) -> None:
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        names = (
            ("dp_replicate", "dp_shard") if self.choice.sizes.dp_replicate > 1 else ("dp_shard",)
        )
        mesh = self.world.mesh(*names)
        offload = CPUOffloadPolicy() if self.settings.cpu_offload else OffloadPolicy()
        low = MixedPrecisionPolicy(
            param_dtype=None if self._gather is torch.float32 else self._gather,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        # The root unit holds the embeddings, the last norm and the head: in fp32, as on one device.
        plain = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        if self._gather is not torch.float32:
            # torch normalises with fp32 running statistics only if weight and bias are in fp32 as well.
            for module in self.objective.modules():
                if isinstance(module, _NormBase) and module.affine:
                    fully_shard(module, mesh=mesh, mp_policy=plain, offload_policy=offload)
        for block in self.objective.model.backbone.blocks():
            fully_shard(
                block,
                mesh=mesh,
                mp_policy=low,
                offload_policy=offload,
                reshard_after_forward=not self.choice.whole,
            )
        fully_shard(self._root, mesh=mesh, mp_policy=plain, offload_policy=offload)
        for module in self._units():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _units(self) -> list[Any]:
        return [m for m in self._root.modules() if hasattr(m, "set_gradient_divide_factor")]

    def wrap(self) -> None:
        """Wrap the objective in DDP for the parameters that are trainable now, or do nothing under other strategies.

        Called before the first step and whenever parameters are unfrozen.
        """
        if self.choice.strategy != "ddp" or self.settings.reproducible:
            return
        trained = self.trainable_parameters()
        if not trained:
            return
        if self._ddp is not None:
            self._ddp = None
            gc.collect()  # frees the buckets, because automatic garbage collection is off during training
        unused = self.uneven or bool(self.untouched & trained.keys())
        self._ddp = wrap_ddp(self._root, self.world.group("dp_replicate"), unused=unused)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trainable now, by name."""
        return {name: p for name, p in self.objective.named_parameters() if p.requires_grad}

    def used_parameters(self, batch: Batch) -> set[str]:
        """Return the parameters that the gradient of a batch reaches on this rank, under FSDP2; all ranks must call."""
        with torch.compiler.set_stance("force_eager"):
            found = find_used_parameters(
                self._root, self._units(), lambda: self.forward_no_sync(batch).total
            )
        self.reshard()
        return {name.removeprefix("objective.") for name in found}

    def set_unused_parameters(self, untouched: set[str], *, uneven: bool) -> None:
        """Set the parameters that no gradient reaches, before FSDP2 reduces gradients and DDP wraps the objective.

        Raises:
            TrainingError: a gradient reaches some on a few ranks only, and FSDP2 of this torch cannot sum them.
        """
        self.untouched, self.uneven = frozenset(untouched), uneven
        if self.sharded:
            fill_missing_gradients(self._units(), uneven=uneven)

    # ------------------------------------------------------------------ a step

    def forward(self, batch: Batch) -> Loss:
        """Return the loss of one micro-batch of this rank."""
        found: Loss = (self._ddp if self._ddp is not None else self._root)(batch)[1]
        return found

    def forward_no_sync(self, batch: Batch) -> Loss:
        """Return the loss of a batch outside training steps; with FSDP2 or tensor parallelism all ranks must call."""
        found: Loss = self._root(batch)[1]
        return found

    def backward_microbatches(self, run: Callable[[int], Tensor], count: int) -> list[Tensor]:
        """Run the micro-batches of this rank; afterwards the gradients are those of the global batch.

        Args:
            run: forward and backward of micro-batch ``i`` of this rank; returns its summed loss.
            count: number of micro-batches of this rank.

        Returns:
            The results of ``run``, in order.
        """
        if self._has_buffers:
            self._buffers = {n: b.clone() for n, b in changing_buffers(self.objective).items()}
        if self.settings.reproducible:
            totals = self._tree(run, count)
        else:
            totals = []
            for i in range(count):
                with self._synced(i == count - 1):
                    totals.append(run(i))
            if self.sharded and self.untouched:
                never = {
                    n: p for n, p in self.trainable_parameters().items() if n in self.untouched
                }
                drop_zero_gradients(never, self.world)
        if self.tp is not None and self.tp.partial:
            named = {
                name.removeprefix("model."): local(p.grad)
                for name, p in self.objective.named_parameters()
                if p.grad is not None
            }
            reduce_partial_gradients(named, self.tp)
        self._broadcast_buffers()
        return totals

    def _broadcast_buffers(self) -> None:
        """Broadcast the changing buffers of rank zero, as DDP does: each rank has updated them from its own rows."""
        if not self._has_buffers or self.world.size == 1:
            return
        buffers = list(changing_buffers(self.objective).values())
        for dtype in sorted({b.dtype for b in buffers}, key=str):
            held = [b for b in buffers if b.dtype is dtype]
            flat = torch.cat([b.reshape(-1) for b in held])
            dist.broadcast(flat, 0)
            for buffer, part in zip(
                held, torch.split(flat, [b.numel() for b in held]), strict=True
            ):
                buffer.copy_(part.view_as(buffer))

    def restore_buffers(self) -> None:
        """Undo what the forward passes of this step did to buffers; called if the step is skipped."""
        if self._has_buffers:
            for name, buffer in changing_buffers(self.objective).items():
                buffer.copy_(self._buffers[name])

    @contextlib.contextmanager
    def _synced(self, last: bool) -> Iterator[None]:
        """Reduce gradients after the last micro-batch only; FSDP2 after each one if whole ones need too much memory."""
        if self._ddp is not None and not last:
            with self._ddp.no_sync():
                yield
            return
        if self.sharded:
            root: Any = self._root
            root.set_requires_gradient_sync(last or not self.choice.whole)
            root.set_is_last_backward(last)
            root.set_requires_all_reduce(last)  # between replicas, which have the slow links
            root.set_reshard_after_backward(last or not self.choice.whole)
        yield

    def _tree(self, run: Callable[[int], Tensor], count: int) -> list[Tensor]:
        totals: list[Tensor] = []
        params = [p for p in self.objective.parameters() if p.requires_grad]
        reached = [0.0] * len(params)

        def leaf(i: int) -> list[Tensor]:
            for p in params:
                p.grad = None
            totals.append(run(i))
            for k, p in enumerate(params):
                reached[k] += p.grad is not None
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]

        sums = tree_sum(leaf, 0, count)
        sizes = self.choice.sizes
        if sizes.dp > 1:
            add_across(sums, self.world.group("dp_replicate"), self.world.dp_rank, sizes.dp)
        # A parameter that no micro-batch of any rank reached has no gradient, so that weight decay does not change it.
        for p, total, times in zip(params, sums, self.world.all_reduce_sum(reached), strict=True):
            p.grad = total if times else None
        return totals

    def reduce_loss_and_norm(
        self, totals: Sequence[Tensor], params: Mapping[str, Tensor]
    ) -> tuple[list[float], float]:
        """Return the losses of all micro-batches of the global batch in order, and the norm of its gradient.

        This is the only synchronisation with the device in a step. All ranks get the same numbers.

        Args:
            totals: summed losses of the micro-batches of this rank.
            params: trainable parameters by name, with their gradients.
        """
        grads = {name: local(p.grad) for name, p in params.items() if p.grad is not None}
        every = not self.cut  # each rank holds whole gradients
        mine = (
            list(grads.values())
            if every
            else [g for n, g in grads.items() if self.layout.counts(n)]
        )
        norm = torch.nn.utils.get_total_norm([g for g in mine if g.numel()])
        norm = norm.to(self.device)
        dp = self.choice.sizes.dp
        if self.world.size == 1:
            *losses, whole = torch.stack([*totals, norm]).tolist()
            return losses, whole
        slots = torch.zeros(dp * len(totals) + 1, dtype=torch.float32, device=self.device)
        if not every:
            slots[-1] = norm.square()
        elif self.world.is_rank_zero:
            slots[-1] = norm  # of rank zero only, so that all ranks get the same bits
        if self.world.tp_rank == 0:
            first = self.world.dp_rank * len(totals)
            slots[first : first + len(totals)] = torch.stack(list(totals)).float()
        dist.all_reduce(slots)
        *losses, last = slots.tolist()
        return losses, last if every else float(last) ** 0.5

    def clip(self, params: Mapping[str, Tensor], limit: float, norm: float) -> None:
        """Scale the gradients so that their norm, as returned by ``reduce_loss_and_norm``, is at most ``limit``."""
        factor = min(1.0, limit / (norm + 1e-6))
        if factor < 1.0:
            grads = [local(p.grad) for p in params.values() if p.grad is not None]
            torch._foreach_mul_([g for g in grads if g.numel()], factor)

    # ------------------------------------------------------------------ outside training steps

    @property
    def gathered(self) -> torch.dtype:
        """Dtype of the weights in a forward pass: FSDP2 may gather those of the blocks in half precision."""
        return self._gather if self.sharded else torch.float32

    @property
    def speaks(self) -> bool:
        """Whether this rank generates samples during training.

        If the model is sharded, all ranks must generate, at the same length. FSDP2 combined with tensor parallelism
        generates none, because groups that gather separately could end a text at different positions.
        """
        if self.sharded and self.choice.sizes.tp > 1:
            return False
        return self.cut or self.sharded or self.world.is_rank_zero

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Make the model callable by itself, without the objective, inside the context; all ranks must enter it."""
        if not self.sharded:
            yield
            return
        root: Any = self._root
        root.unshard()
        low = self.gathered is not torch.float32  # fp32 inputs then need autocast in the blocks
        try:
            with torch.autocast(
                self.device.type, dtype=self.gathered if low else None, enabled=low
            ):
                yield
        finally:
            self.reshard()

    @contextlib.contextmanager
    def without_gradient(self) -> Iterator[None]:
        """Disable gradients for an evaluation; by no_grad under FSDP2, which cannot write into inference tensors."""
        if not self.sharded:
            with torch.inference_mode():
                yield
            return
        try:
            with torch.no_grad():
                yield
        finally:
            self.reshard()

    def reshard(self) -> None:
        """Free the gathered weights: without a backward pass FSDP2 does not, and the shards are the parameters."""
        for unit in self._units():
            unit.reshard()

    def release(self) -> None:
        """Undo what training added to the objective: DDP, the batch group, activation checkpointing and compilation."""
        self._ddp = self.objective.batch_group = None
        self.objective.model.backbone.plain_blocks()
        self.objective.model.computes_on = None


def _shapes(objective: Objective) -> dict[str, tuple[int, ...]]:
    """Return full shapes by the names in the objective (``model.backbone...``) and in the model (``backbone...``)."""
    found = {name: tuple(p.shape) for name, p in objective.named_parameters()}
    return found | {name: tuple(p.shape) for name, p in objective.model.named_parameters()}


def _move(objective: Objective, device: torch.device) -> None:
    """Move the objective to the device; one on the meta device gets its memory later, in ``fill``."""
    if not any(p.is_meta for p in objective.parameters()):
        objective.to(device)
