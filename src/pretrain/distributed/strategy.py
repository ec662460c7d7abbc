"""How one objective is spread over the processes of a run, and how their gradients become one.

One order for one device or a thousand: tensor parallelism, activation checkpointing, compilation block by block,
FSDP2 or DDP, memory, initial weights. Gradients are sums over targets, never means, so every reduction is a sum and
the number of processes shows in the result by rounding alone (and, with tensor parallelism, by which attention weights
dropout drops: each process draws the same mask for its own heads).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
from pretrain.nn.layout import ShardLayout, local
from pretrain.nn.tensor_parallel import Group
from pretrain.objectives.base import Batch, Loss, Objective

__all__ = ["Strategy"]


class _Root(nn.Module):
    """What FSDP2 takes for the root: it renames the class of what it wraps, and an objective is known by its name."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch | None) -> tuple[Tensor, Loss]:
        """The loss, and its total once more: not every torch looks for tensors inside of a dataclass."""
        if batch is None:  # see `replicas`
            total = torch.stack(
                [0.0 * p.sum() for p in self.objective.parameters() if p.requires_grad]
            ).sum()
            return total, Loss(total, total.detach())
        loss: Loss = self.objective(batch)
        return loss.total, loss


class Strategy:
    """An objective on the devices of a world.

    Args:
        objective: its model may lie on the meta device; then it gets its memory, and its weights, here.
        world: the processes; joined, and arranged by the sizes of ``choice``.
        choice: sizes of the mesh, and ``single``, ``ddp`` or ``fsdp``.
        settings: the ``parallel`` section.
        device: of this process.
        gather: type in which FSDP2 gathers the weights of the blocks; their masters and gradients are fp32.

    Attributes:
        layout: which part of every parameter lies here, by its name in the objective and in the model.
        cut: no process has all weights, so that all must take part whenever the model runs.
        untouched: parameters that no gradient reaches on any process, by name; ``uneven`` says that some are reached
            on a few processes only. See ``take_reached``.
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
    ) -> None:
        self.objective, self.world, self.choice, self.settings = objective, world, choice, settings
        self.device = device
        self.untouched: frozenset[str] = frozenset()
        self.uneven = False
        self._ddp: Any = None
        self._root = _Root(objective)
        model = objective.model
        shapes = _shapes(objective)
        self.tp: TensorParallel | None = None
        if choice.sizes.tp > 1:
            group = Group(world.group("tp"), world.tp_rank, choice.sizes.tp)
            self.tp = shard_model(model, group)
        if objective.couples_examples and choice.sizes.dp > 1:
            objective.batch_group = Group(world.batch_group(), world.dp_rank, choice.sizes.dp)
        # A parameter of a block lies on the CPU between the block's passes, though its embeddings do not.
        model.computes_on = device if settings.cpu_offload else None
        self.sharded, self._gather = choice.strategy == "fsdp", gather
        self.layout = self._layout(shapes)
        self.cut = self.layout.dp_shard * self.layout.tp > 1
        model.backbone.set_activation_checkpointing(settings.activation_checkpointing)
        if settings.compile:
            model.backbone.compile_blocks()
        if not settings.cpu_offload and not self.sharded:  # FSDP2 takes it there unit by unit
            _move(objective, device)
        if self.sharded:
            self._shard()
        # Wrapped by FSDP2, a model is of no use by itself, be it cut or not.
        model.layout = self.layout if self.cut or self.sharded else None

    def fill(self, *, initialise: bool) -> None:
        """Take memory for a model that was built without, and give it its weights.

        Args:
            initialise: False where a checkpoint is read into them anyway.
        """
        model, root = self.objective.model, self._root
        if not any(p.is_meta for p in model.parameters()):
            return
        named = [*root.named_parameters(), *root.named_buffers()]
        refuse_lost(self.objective, [name for name, tensor in named if tensor.is_meta])
        # What else the objective owns has its values already: a teacher, a table.
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
        # The checkpoint of an adapter holds nothing of its base.
        if model.start is not None and (initialise or model.adapter is not None):
            model.start(model)
        else:
            model.backbone.init_buffers()
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
        # Behind the root stand the embeddings, the last norm and the head: in fp32, as on one device.
        plain = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
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
        """Let DDP see which parameters are trained now; called before the first step and when others are released."""
        if self.choice.strategy != "ddp" or self.settings.reproducible:
            return
        trained = self.trainable_parameters()
        if not trained:
            return
        if self._ddp is not None:
            self._ddp = None
            gc.collect()  # its buckets, for nothing else collects while training
        unused = self.uneven or bool(self.untouched & trained.keys())
        self._ddp = wrap_ddp(self._root, self.world.group("dp_replicate"), unused=unused)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that learn now, by name."""
        return {name: p for name, p in self.objective.named_parameters() if p.requires_grad}

    def used_parameters(self, batch: Batch) -> set[str]:
        """The parameters that the gradient of a batch would reach in this process, under FSDP2; all must come along."""
        with torch.compiler.set_stance("force_eager"):
            found = find_used_parameters(
                self._root, self._units(), lambda: self.forward_no_sync(batch).total
            )
        self._reshard()
        return {name.removeprefix("objective.") for name in found}

    def set_unused_parameters(self, untouched: set[str], *, uneven: bool) -> None:
        """Learn which parameters no gradient reaches, before FSDP2 reduces and DDP is made.

        Raises:
            TrainingError: a gradient reaches some on a few processes only, and FSDP2 of this torch cannot sum them.
        """
        self.untouched, self.uneven = frozenset(untouched), uneven
        if self.sharded:
            fill_missing_gradients(self._units(), uneven=uneven)

    # ------------------------------------------------------------------ a step

    def forward(self, batch: Batch) -> Loss:
        """Loss of one micro-batch of this process."""
        found: Loss = (self._ddp if self._ddp is not None else self._root)(batch)[1]
        return found

    def forward_no_sync(self, batch: Batch) -> Loss:
        """Loss of one batch outside of the steps; with FSDP2 or tensor parallelism all processes must come along."""
        found: Loss = self._root(batch)[1]
        return found

    def backward_microbatches(self, run: Callable[[int], Tensor], count: int) -> list[Tensor]:
        """Run the micro-batches of this process; afterwards the gradients are those of the global batch.

        Args:
            run: forward and backward of micro-batch ``i`` of this process; returns its summed loss.
            count: micro-batches of this process.
        """
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
        return totals

    @contextlib.contextmanager
    def _synced(self, last: bool) -> Iterator[None]:
        """Reduce gradients after the last micro-batch only; FSDP2 after each if whole ones would take too much."""
        if self._ddp is not None and not last:
            with self._ddp.no_sync():
                yield
            return
        if self.sharded:
            root: Any = self._root
            root.set_requires_gradient_sync(last or not self.choice.whole)
            root.set_is_last_backward(last)
            root.set_requires_all_reduce(last)  # between copies, whose links are the slow ones
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
        # A zero that nothing gave is no gradient: on one process or on many it moves nothing.
        for p, total, times in zip(params, sums, self.world.all_reduce_sum(reached), strict=True):
            p.grad = total if times else None
        return totals

    def reduce_loss_and_norm(
        self, totals: Sequence[Tensor], params: Mapping[str, Tensor]
    ) -> tuple[list[float], float]:
        """The losses of all micro-batches of the global batch in order, and the norm of its gradient.

        It is the one wait for the device in a step, and the same numbers come out on every process.

        Args:
            totals: of this process's micro-batches.
            params: trained parameters by name, with their gradients.
        """
        grads = {name: local(p.grad) for name, p in params.items() if p.grad is not None}
        every = not self.cut  # each process holds whole gradients
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
            slots[-1] = norm  # the same for all, to the last bit
        if self.world.tp_rank == 0:
            first = self.world.dp_rank * len(totals)
            slots[first : first + len(totals)] = torch.stack(list(totals)).float()
        dist.all_reduce(slots)
        *losses, last = slots.tolist()
        return losses, last if every else float(last) ** 0.5

    def clip(self, params: Mapping[str, Tensor], limit: float, norm: float) -> None:
        """Scale gradients so that their norm, as ``settle`` gave it, is at most ``limit``."""
        factor = min(1.0, limit / (norm + 1e-6))
        if factor < 1.0:
            grads = [local(p.grad) for p in params.values() if p.grad is not None]
            torch._foreach_mul_([g for g in grads if g.numel()], factor)

    # ------------------------------------------------------------------ beside the steps

    @property
    def gathered(self) -> torch.dtype:
        """Type of the weights in a forward pass: FSDP2 may gather those of the blocks in half precision."""
        return self._gather if self.sharded else torch.float32

    @property
    def speaks(self) -> bool:
        """Whether this process makes a sample of what the model can do.

        Where the model is cut all must, at the same length; FSDP2 and tensor parallelism together make none, for
        groups that gather by themselves could end a text at different places.
        """
        if self.sharded and self.choice.sizes.tp > 1:
            return False
        return self.cut or self.sharded or self.world.is_rank_zero

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within the context the model can be called by itself, past the objective: all processes must do the same."""
        if not self.sharded:
            yield
            return
        root: Any = self._root
        root.unshard()
        low = self.gathered is not torch.float32  # blocks then hold weights that fp32 cannot meet
        try:
            with torch.autocast(
                self.device.type, dtype=self.gathered if low else None, enabled=low
            ):
                yield
        finally:
            self._reshard()

    @contextlib.contextmanager
    def without_gradient(self) -> Iterator[None]:
        """For an evaluation; FSDP2 writes into tensors that inference mode would freeze."""
        if not self.sharded:
            with torch.inference_mode():
                yield
            return
        try:
            with torch.no_grad():
                yield
        finally:
            self._reshard()

    def _reshard(self) -> None:
        """Let go of whole weights: without a backward pass nothing else does, and the parts are the parameters."""
        for unit in self._units():
            unit.reshard()

    def release(self) -> None:
        """Take back what training wrapped around the objective."""
        self._ddp = self.objective.batch_group = None
        self.objective.model.backbone.plain_blocks()
        self.objective.model.computes_on = None


def _shapes(objective: Objective) -> dict[str, tuple[int, ...]]:
    """Full shapes by the names in the objective (``model.backbone...``) and in the model (``backbone...``)."""
    found = {name: tuple(p.shape) for name, p in objective.named_parameters()}
    return found | {name: tuple(p.shape) for name, p in objective.model.named_parameters()}


def _move(objective: Objective, device: torch.device) -> None:
    """To the device; what has no memory yet waits until it has been cut."""
    if not any(p.is_meta for p in objective.parameters()):
        objective.to(device)
