"""Distribution of a run over ranks: process group, mesh, strategy and run lock."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pretrain import distributed
from pretrain.checkpoint import RunLock
from pretrain.distributed.estimates import Needs
from pretrain.distributed.mesh import choose_mesh
from pretrain.distributed.strategy import Strategy
from pretrain.distributed.world import World
from pretrain.nn.kernels import multiplies_rows
from pretrain.training.optim import muon_weights
from pretrain.training.plan import choose_micro_rows, row_length
from pretrain.training.precision import choose_device
from pretrain.utils.memory_info import total_memory

if TYPE_CHECKING:
    from pretrain.objectives.base import Objective
    from pretrain.training.precision import Precision
    from pretrain.training.trainer import Trainer

__all__ = ["enter_world", "parallelize", "run_lock"]


def enter_world(trainer: Trainer) -> contextlib.AbstractContextManager[torch.device]:
    """Return a context that joins the ranks of the run, checks that they agree, and yields the device of this rank."""
    settings = trainer.parallel
    return trainer.world.connected(
        choose_device(settings.device),
        trainer.out,
        settings.timeout,
        lambda: _same_for_all(trainer),
    )


def _same_for_all(trainer: Trainer) -> dict[str, Any]:
    """Return what must be equal on all ranks; a difference is reported before anything starts."""
    sections = {name: asdict(getattr(trainer, name)) for name in ("train", "optim", "parallel")}
    shapes = {name: list(p.shape) for name, p in trainer.objective.named_parameters()}
    return {
        # A round trip through JSON, as on the other ranks: tuples become lists.
        "settings": json.loads(json.dumps(flat(sections))),
        "data": {
            "fingerprint": trainer.fingerprint,
            "rows": len(trainer.train_data),
            "held-out rows": 0 if trainer.eval_data is None else len(trainer.eval_data),
        },
        "model": [trainer.objective.describe(), shapes, trainer.origin.get("base weights")],
    }


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings of all sections by their dotted names."""
    return {
        f"{section}.{key}": value
        for section, part in sections.items()
        for key, value in part.items()
    }


def parallelize(trainer: Trainer, precision: Precision, compiled: tuple[bool, str]) -> Strategy:
    """Choose the sizes of the mesh, print why, and distribute the objective over it.

    Args:
        trainer: in its world, on its device.
        precision: of training.
        compiled: whether to compile the blocks, and why.

    Raises:
        ConfigError: the sizes do not fit the ranks, the batch or the model; the message lists the possible ones.
    """
    world, train, settings = trainer.world, trainer.train, trainer.parallel
    objective, device = trainer.objective, trainer.device
    guess = train.micro_rows
    if not guess or world.size == 1:  # with one rank this also checks the divisibility of the batch
        guess = choose_micro_rows(
            train, trainer.train_data, objective, device, even=settings.reproducible
        )
    memory, host, local = common_resources(device, world)
    # Broadcast, because choices that depend on the hardware may differ between hosts, and the mesh must not.
    needs = Needs(**world.broadcast_object(asdict(needs_of(trainer, precision, guess))))
    config = objective.model.backbone.config
    choice = choose_mesh(
        settings,
        world.size,
        batch_rows=train.batch_rows,
        # In a reproducible run the choice must not depend on the hardware.
        micro_rows=guess if settings.reproducible else train.micro_rows,
        coupled=objective.couples_examples,
        needs=needs,
        possible_tp=[1] if objective.copies_model else config.possible_tp(),
        device_memory=memory,
        host_share=host,
        local=local,
    )
    if choice.strategy == "fsdp":
        world = world.with_process_group()
    world.build_mesh(choice.sizes)
    strategy: Strategy
    if world.size == 1 and choice.strategy == "single" and not settings.reproducible:
        strategy = Strategy(objective, world, choice, settings, device=device, compiled=compiled)
    else:
        strategy = distributed.ParallelStrategy(
            objective,
            world,
            choice,
            settings,
            device=device,
            gather=gather_type(objective, precision),
            compiled=compiled,
        )
    if world.size > 1:
        speed = f"all-reduce {world.links['bus_gb_s']:.2g} GB/s, " if world.links else ""
        trainer.say(f"{world.size} processes, {speed}{choice.sizes}: {choice.reason}")
    return strategy


def gather_type(objective: Objective, precision: Precision) -> torch.dtype:
    """Return the type in which FSDP2 all-gathers the weights of the blocks."""
    adapter = objective.model.adapter
    # DoRA computes norms in fp32, also under autocast, so it needs fp32 weights.
    exact = adapter is not None and adapter.config.dora
    return torch.bfloat16 if precision.dtype is torch.bfloat16 and not exact else torch.float32


def needs_of(trainer: Trainer, precision: Precision, micro_rows: int) -> Needs:
    """Return the sizes from which the memory of the run is estimated."""
    objective, optim = trainer.objective, trainer.optim
    model = objective.model
    trained = [p for p in objective.parameters() if p.requires_grad]
    inside = muon_weights(objective, model.backbone.blocks()) if optim.name == "muon" else set()
    head: Any = model.head
    length = row_length(trainer.train_data, objective)
    return Needs(
        **vars(model.backbone.stats()),
        parameters=sum(p.numel() for p in objective.parameters()),
        trainable=sum(p.numel() for p in trained),
        row_length=length,
        tied=bool(getattr(head, "tied", True)),
        muon=sum(p.numel() for p in trained if p in inside),
        micro_tokens=micro_rows * length,
        ema=bool(optim.ema),
        anchors=bool(optim.l2_sp),
        compute_bytes=precision.dtype.itemsize,
        gather_bytes=gather_type(objective, precision).itemsize,
        keeps_weights=multiplies_rows(trainer.device, precision.dtype, length),
        checkpointing=trainer.parallel.activation_checkpointing,
        device=trainer.device.type,
    )


def common_resources(device: torch.device, world: World) -> tuple[float | None, float | None, int]:
    """Return the resources that every rank has, so that different hosts choose the same mesh.

    Returns:
        The least device memory and the least share of host memory per rank, in bytes, and the greatest common divisor
        of the ranks per host: so many consecutive ranks, from a multiple of it, are on one host.
    """
    mine = [device_memory(device, world), host_share(world), world.local_size]
    devices, hosts, locals_ = zip(*world.all_gather_object(mine), strict=True)
    return _least(devices), _least(hosts), math.gcd(*locals_)


def _least(found: Sequence[float | None]) -> float | None:
    return min((value for value in found if value is not None), default=None)


def device_memory(device: torch.device, world: World) -> float | None:
    """Return the bytes available to one rank: of its GPU, or its share of the host; None if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return host_share(world)


def host_share(world: World) -> float | None:
    """Return the bytes of host (or container) memory per local rank; None if unknown."""
    found = total_memory()
    return None if math.isinf(found) else found / world.local_size


@contextlib.contextmanager
def run_lock(out: Path, world: World) -> Iterator[None]:
    """Hold the lock of the run directory, by rank zero for all ranks.

    Raises:
        RunLocked: on all ranks, if another run holds it.
    """
    lock = RunLock(out)
    world.on_rank_zero(lock.acquire)
    try:
        yield
    finally:
        lock.release()
