"""Parallelisation of an objective over the ranks of a run, and the reduction of its gradients."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from pretrain.config import ParallelConfig
from pretrain.distributed.mesh import ParallelPlan
from pretrain.distributed.reproducible import add_across, tree_sum
from pretrain.distributed.strategy import Strategy
from pretrain.distributed.tensor_parallel import (
    TensorParallel,
    reduce_partial_gradients,
    shard_model,
)
from pretrain.distributed.unused_parameters import (
    drop_zero_gradients,
    fill_missing_gradients,
    find_used_parameters,
)
from pretrain.distributed.whole_parameters import MatrixCollectives, broadcast_initial_values
from pretrain.distributed.world import World
from pretrain.errors import ConfigError
from pretrain.nn.buffers import changing_buffers
from pretrain.nn.device import local
from pretrain.nn.layout import ShardLayout
from pretrain.nn.tensor_parallel import Group
from pretrain.objectives.base import Batch, Loss, Objective

__all__ = ["ParallelStrategy"]

# The name of the option since torch 2.13, and its earlier name.
_KNOWN = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _KNOWN else "broadcast_buffers"


class _Root(nn.Module):
    """Root module for FSDP2, which renames the class of what it wraps; the class name of an objective must stay."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch | None) -> tuple[Tensor, Loss]:
        """Return the loss, preceded by its total: not every version of torch finds tensors inside a dataclass."""
        if batch is None:  # see `_order_buckets`
            total = torch.stack(
                [0.0 * p.sum() for p in self.objective.parameters() if p.requires_grad]
            ).sum()
            return total, Loss(total, total.detach())
        loss: Loss = self.objective(batch)
        return loss.total, loss


class ParallelStrategy(Strategy):
    """An objective, parallelised over the devices of a world.

    Args:
        objective, world, choice, settings, device, compiled: see `Strategy`.
        gather: dtype in which FSDP2 gathers the weights of the blocks; master weights and gradients are fp32.
    """

    world: Any  # of several processes, or of one that has a process group or a reproducible run

    def __init__(
        self,
        objective: Objective,
        world: World,
        choice: ParallelPlan,
        settings: ParallelConfig,
        *,
        device: torch.device,
        gather: torch.dtype = torch.float32,
        compiled: tuple[bool, str] = (False, ""),
    ) -> None:
        if settings.reproducible and (found := changing_buffers(objective.model)):
            raise ConfigError(
                f"parallel.reproducible gives the same bits on any number of processes, but {next(iter(found))!r} of "
                f"this {objective.model.backbone.model_type} model is a statistic over the rows of one process. Leave "
                "reproducible out, or use a norm without running statistics (GroupNorm, LayerNorm)."
            )
        self.sharded, self._gather = choice.strategy == "fsdp", gather
        self.gathered = gather if self.sharded else torch.float32
        self.tp: TensorParallel | None = None
        self._ddp: Any = None
        self._root = _Root(objective)
        super().__init__(objective, world, choice, settings, device=device, compiled=compiled)

    # ------------------------------------------------------------------ building

    def _divide(self, shapes: Mapping[str, tuple[int, ...]]) -> ShardLayout:
        sizes, world, objective = self.choice.sizes, self.world, self.objective
        if sizes.tp > 1:
            self.tp = shard_model(
                objective.model, Group(world.group("tp"), world.tp_rank, sizes.tp)
            )
        if objective.couples_examples and sizes.dp > 1:
            objective.batch_group = Group(world.batch_group(), world.dp_rank, sizes.dp)
        cuts = {} if self.tp is None else dict(self.tp.cuts)
        cuts |= {f"model.{name}": dim for name, dim in cuts.items()}
        shard = sizes.dp_shard if self.sharded else 1
        layout = ShardLayout(shapes, sizes.dp // shard, shard, sizes.tp, cuts, world.rank)
        self.cut = layout.dp_shard * layout.tp > 1
        return layout

    def _place(self) -> None:
        if self.sharded:
            self._shard()  # FSDP2 moves the weights unit by unit
        else:
            super()._place()

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

    def _allocate(self) -> None:
        offload = self.settings.cpu_offload
        self._root.to_empty(device="cpu" if offload else self.device)
        if offload:
            for module in self._root.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(self.device))

    def broadcast_initial_values(self) -> None:
        broadcast_initial_values(self.objective, self.layout, self.world)

    def wrap(self) -> None:
        if self.choice.strategy != "ddp" or self.settings.reproducible:
            return
        trained = self.trainable_parameters()
        if not trained:
            return
        if self._ddp is not None:
            self._ddp = None
            gc.collect()  # frees the buckets, because automatic garbage collection is off during training
        unused = self.uneven or bool(self.unused_parameters & trained.keys())
        self._ddp = _wrap_ddp(self._root, self.world.group("dp_replicate"), unused=unused)

    def matrix_collectives(self) -> MatrixCollectives | None:
        # The last bits of a matrix product may depend on its batch, which changes with the number of ranks.
        alone = self.world.size == 1 or self.settings.reproducible
        return None if alone else MatrixCollectives(self.layout, self.world)

    def used_parameters(self, batch: Batch) -> set[str]:
        """Return the parameters that the gradient of a batch reaches on this rank, under FSDP2; all ranks must call."""
        with torch.compiler.set_stance("force_eager"):
            names = find_used_parameters(
                self._root, self._units(), lambda: self.forward_no_sync(batch).total
            )
        self.reshard()
        return {name.removeprefix("objective.") for name in names}

    def set_unused_parameters(self, unused: set[str], *, uneven: bool) -> None:
        super().set_unused_parameters(unused, uneven=uneven)
        if self.sharded:
            fill_missing_gradients(self._units(), uneven=uneven)

    # ------------------------------------------------------------------ a step

    def forward(self, batch: Batch) -> Loss:
        found: Loss = (self._ddp if self._ddp is not None else self._root)(batch)[1]
        return found

    def forward_no_sync(self, batch: Batch) -> Loss:
        found: Loss = self._root(batch)[1]
        return found

    def backward_microbatches(self, run: Callable[[int], Tensor], count: int) -> list[Tensor]:
        self._keep_buffers()
        if self.settings.reproducible:
            totals = self._tree(run, count)
        else:
            totals = []
            for i in range(count):
                with self._synced(i == count - 1):
                    totals.append(run(i))
            if self.sharded and self.unused_parameters:
                never = {
                    n: p
                    for n, p in self.trainable_parameters().items()
                    if n in self.unused_parameters
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
        if self.world.size == 1:
            return super().reduce_loss_and_norm(totals, params)
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

    # ------------------------------------------------------------------ outside training steps

    @property
    def generates_samples(self) -> bool:
        if self.sharded and self.choice.sizes.tp > 1:
            return False
        return self.cut or self.sharded or self.world.is_rank_zero

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
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
        if not self.sharded:
            with super().without_gradient():
                yield
            return
        try:
            with torch.no_grad():
                yield
        finally:
            self.reshard()

    def reshard(self) -> None:
        for unit in self._units():
            unit.reshard()

    def release(self) -> None:
        self._ddp = None
        super().release()


def _wrap_ddp(root: nn.Module, group: Any, *, unused: bool) -> DistributedDataParallel:
    """Wrap a module that is replicated on every rank of a group; gradients of trainable parameters are summed.

    Args:
        root: called with None it returns a tuple whose first element is a loss that depends on every trainable
            parameter.
        group: process group of the replicas.
        unused: some parameters get no gradient in some passes.
    """
    options: dict[str, Any] = {_SYNC_BUFFERS: False}
    ddp = DistributedDataParallel(
        root,
        process_group=group,
        gradient_as_bucket_view=True,
        find_unused_parameters=unused,
        **options,
    )
    ddp.register_comm_hook(group, _sum_bucket)
    if not unused:
        _order_buckets(ddp)
    return ddp


def _order_buckets(ddp: DistributedDataParallel) -> None:
    """Run one backward pass, after which DDP rebuilds its buckets once, in the order in which gradients arrive.

    Otherwise a resumed run would have other buckets in its first step than an uninterrupted one. With more than two
    ranks, the position in a bucket determines the order of summation, and so the last bits of a sum.
    """
    torch.autograd.backward(ddp(None)[0])
    for p in ddp.parameters():
        p.grad = None


def _sum_bucket(group, bucket):  # type: ignore[no-untyped-def] # torch holds annotations against its own classes
    """Sum a bucket without averaging: the loss has been divided by the targets of the global batch already."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
