"""Choice of the mesh sizes and the strategy: as configured, or by `auto` from the model, the batch and the machine.

The global batch is that of the settings on any number of processes; a world size that cannot share it is refused, with
a list of those that can. Nothing here needs `torch.distributed`. Memory is estimated by
`pretrain.distributed.estimates`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.config import ParallelConfig
from pretrain.distributed.estimates import FP32, ROOMY, Memory, MeshShape, Needs, memory
from pretrain.errors import ConfigError

__all__ = [
    "MeshShape",
    "Needs",
    "ParallelPlan",
    "check_batch",
    "choose_mesh",
    "possible_worlds",
]

# Share of a device's memory that an estimate may fill: the allocator, the kernels and the collectives need the rest.
USABLE = 0.8
_GIB = float(1 << 30)
_SHOWN = 12


@dataclass(frozen=True)
class ParallelPlan:
    """The chosen mesh and strategy, with the reason in one line.

    Attributes:
        sizes: of the mesh.
        strategy: ``single``, ``ddp`` or ``fsdp``.
        reason: the memory arithmetic, or the setting that decided.
        whole: fsdp keeps whole weights and gradients between the micro-batches of a step.
        memory: estimate for one device.
        micro_rows: rows of a forward pass in that estimate.
        advice: what would make the run fit, if it may not; ``reason`` ends with it.
    """

    sizes: MeshShape
    strategy: str
    reason: str
    whole: bool = False
    memory: Memory | None = None
    micro_rows: int = 0
    advice: str = ""


def choose_mesh(
    settings: ParallelConfig,
    world: int,
    *,
    batch_rows: int,
    micro_rows: int,
    needs: Needs,
    coupled: bool = False,
    possible_tp: Sequence[int] = (1,),
    device_memory: float | None = None,
    host_share: float | None = None,
    local: int = 0,
) -> ParallelPlan:
    """Choose the mesh sizes and the strategy for ``world`` processes; all ranks must pass the same arguments.

    Args:
        settings: the ``parallel`` section.
        world: number of processes.
        batch_rows: rows of a global batch.
        micro_rows: rows of a forward pass; 0 chooses as many as fit. With ``reproducible``, the rows that a single
            process would take.
        needs: of the model and its batch, with the final ``checkpointing`` and ``device``.
        coupled: the rows of a process are one micro-batch, whatever memory that needs.
        possible_tp: the numbers of pieces that the model's matrices can be cut into, including 1.
        device_memory: bytes that one process may use; None if not known.
        host_share: bytes of host memory that one process may use; None if not known.
        local: processes of one host; 0 means all of them.

    Raises:
        ConfigError: the sizes do not multiply to ``world``, the batch cannot be shared, the model cannot be cut that
            way, or two settings exclude each other. The message lists what is possible.
    """
    local = min(local or world, world)
    _check_tp(settings, world, possible_tp)
    sizes = _configured(settings, world)
    check_batch(world, settings.tp, batch_rows, micro_rows)
    if settings.reproducible:
        _check_reproducible(settings, world, batch_rows, micro_rows)
    _check_offload(settings, needs)
    share = batch_rows // (world // settings.tp)
    micro = share if coupled else micro_rows
    plan = _Plan(settings, world, local, needs, device_memory, host_share, share, micro, coupled)
    choice = plan.choose(sizes)
    advice = plan.advice(choice)
    return replace(choice, reason=choice.reason + advice, advice=advice)


@dataclass
class _Plan:
    """The memory arithmetic behind a choice, for one run on one machine; ``micro`` is 0 if the rows are not fixed."""

    settings: ParallelConfig
    world: int
    local: int
    needs: Needs
    budget: float | None
    host: float | None
    share: int
    micro: int
    coupled: bool = False

    def made(
        self, sizes: MeshShape, strategy: str, before: str = "", after: str = ""
    ) -> ParallelPlan:
        """Return a plan; its reason is the memory needed and available, with text before and after it."""
        whole = strategy == "fsdp" and self.keeps_whole(sizes.tp)
        needed, rows = self.memory(sizes, strategy), self.rows(sizes, strategy)
        of = "" if self.budget is None else f" of {_gib(self.budget)}"
        reason = f"{before}{_gib(needed.total)}{of} GiB needed per process{after}"
        return ParallelPlan(sizes, strategy, reason, whole, needed, rows)

    def keeps_whole(self, tp: int) -> bool:
        """Return whether FSDP2 keeps whole weights and gradients between micro-batches, to communicate once a step."""
        room = 0.0 if self.settings.cpu_offload else ROOMY * (self.budget or 0.0)
        return 2.0 * FP32 * self.needs.parameters / tp <= room

    @property
    def room(self) -> float:
        """Bytes that an estimate may fill; infinite if the device memory is not known."""
        return math.inf if self.budget is None else USABLE * self.budget

    def rows(self, sizes: MeshShape, strategy: str, needs: Needs | None = None) -> int:
        """Return the rows of a micro-batch: the fixed number, else as many up to ``micro_tokens`` as fit, minimum 1."""
        if self.micro:
            return self.micro
        most = self.needs.micro_tokens // self.needs.row_length
        for rows in reversed(_divisors(self.share)):
            if rows <= most and self.memory(sizes, strategy, needs, rows).total <= self.room:
                return rows
        return 1

    def memory(
        self, sizes: MeshShape, strategy: str, needs: Needs | None = None, rows: int = 0
    ) -> Memory:
        """Return the memory estimate, for as many rows as fit unless they are given."""
        rows = rows or self.rows(sizes, strategy, needs)
        return memory(
            needs or self.needs,
            sizes,
            strategy,
            rows * self.needs.row_length,
            whole=self.keeps_whole(sizes.tp),
            offload=self.settings.cpu_offload,
            trees=(self.share // rows).bit_length() if self.settings.reproducible else 0,
        )

    def fits(self, sizes: MeshShape, strategy: str, needs: Needs | None = None) -> bool:
        return self.memory(sizes, strategy, needs).total <= self.room

    def choose(self, fixed: MeshShape | None) -> ParallelPlan:
        """Return the configured strategy, or the first of single, ddp, hybrid and plain fsdp that fits."""
        settings, tp = self.settings, self.settings.tp
        dp = self.world // tp
        strategy = settings.strategy
        if strategy == "auto" and (settings.cpu_offload or (fixed and fixed.dp_shard > 1)):
            strategy = "fsdp"
        if strategy == "fsdp":
            return self.made(fixed or self.sharded(dp, tp), "fsdp", "fsdp as configured: ")
        copies = MeshShape(dp, 1, tp)
        name = "ddp" if dp > 1 else "single"
        if dp == 1:
            return self.made(copies, name)
        if strategy == "ddp" or settings.reproducible or (fixed and fixed.dp_replicate == dp):
            why = "for reproducible sums" if settings.reproducible else "as configured"
            return self.made(copies, name, f"ddp {why}: ")
        needed = self.memory(copies, name).total
        if needed <= self.room:
            rows = self.rows(copies, name)
            saved = needed - self.memory(MeshShape(1, dp, tp), "fsdp", rows=rows).total
            much = saved > 0.05 * needed
            return self.made(
                copies, name, "ddp: ", f"; fsdp would save {_gib(saved)}" if much else ""
            )
        sizes = self.sharded(dp, tp)
        copied = f"; {sizes.dp_replicate} copies" if sizes.dp_replicate > 1 else ""
        return self.made(
            sizes, "fsdp", f"fsdp over {sizes.dp_shard}: ", f", ddp {_gib(needed)}{copied}"
        )

    def sharded(self, dp: int, tp: int) -> MeshShape:
        """Return the mesh with the fewest shards that fit and lie inside a host, else sharded over all processes."""
        inside = max(1, self.local // tp)
        fewest = [s for s in range(2, min(inside, dp) + 1) if dp % s == 0 and inside % s == 0]
        for shard in fewest if self.budget is not None else fewest[-1:]:
            if self.fits(MeshShape(dp // shard, shard, tp), "fsdp"):
                return MeshShape(dp // shard, shard, tp)
        return MeshShape(1, dp, tp)

    def advice(self, choice: ParallelPlan) -> str:
        """Return what would make the run fit, as the end of a sentence; "" if it fits."""
        if self.settings.cpu_offload and self.host is not None:
            without_offload = replace(self, settings=replace(self.settings, cpu_offload=False))
            on_device = without_offload.memory(choice.sizes, "fsdp", rows=choice.micro_rows)
            moved = on_device.weights + on_device.gradients + on_device.moments + on_device.copies
            if moved > USABLE * self.host:
                return (
                    f"; parallel.cpu_offload needs {_gib(moved)} of {_gib(self.host)} GiB of host memory per process: "
                    "that may not fit, try more hosts"
                )
        if self.fits(choice.sizes, choice.strategy):
            return ""
        remedies = []
        for mode in ("selective", "full"):
            other = replace(self.needs, checkpointing=mode)
            if other != self.needs and self.fits(choice.sizes, choice.strategy, other):
                remedies.append(f"parallel.activation_checkpointing={mode}")
                break
        free = not self.coupled and self.micro > 1
        if free and replace(self, micro=1).fits(choice.sizes, choice.strategy):
            remedies.append("train.micro_rows=1")
        parts, exact = MeshShape(1, choice.sizes.dp, choice.sizes.tp), self.settings.reproducible
        if choice.strategy == "ddp" and not exact and self.fits(parts, "fsdp"):
            remedies.append("parallel.strategy=fsdp")
        if remedies:
            return f"; that may not fit, try {' or '.join(remedies)}"
        tips = [] if exact else ["more processes with fsdp", "parallel.tp"]
        if self.needs.checkpointing != "full":
            tips.append("parallel.activation_checkpointing=full")
        if self.needs.device == "cuda" and not exact and not self.settings.cpu_offload:
            tips.append("parallel.cpu_offload")
        return f"; that may not fit, try {', '.join([*tips, 'a smaller model'])}"


# --------------------------------------------------------------------------------------------- validation


def _check_tp(settings: ParallelConfig, world: int, possible: Sequence[int]) -> None:
    tp = settings.tp
    fitting = sorted({n for n in possible if world % n == 0} | {1})
    if tp not in possible and tp != 1:
        raise ConfigError(
            f"parallel.tp is {tp}, but with this model and objective it may be {_listed(sorted({1, *possible}))}: it "
            "must divide the heads, the key-value heads and the width of the feed-forward layer, and leave each "
            "process rows of the vocabulary. Take one of these, or share the work by dp_shard instead."
        )
    if world % tp:
        raise ConfigError(
            f"parallel.tp is {tp}, which does not divide the {world} processes. With {world} it may be "
            f"{_listed(fitting)}."
        )


def _configured(settings: ParallelConfig, world: int) -> MeshShape | None:
    """Return the sizes that the settings fix; None if they do not fix the data-parallel sizes."""
    replicate, shard, tp = settings.dp_replicate, settings.dp_shard, settings.tp
    dp = world // tp
    if settings.strategy == "ddp" and shard > 1:
        raise ConfigError(
            f"parallel.strategy is ddp, where each process holds the whole model, but parallel.dp_shard is {shard}. "
            "Set the strategy to fsdp, or leave dp_shard out."
        )
    if not replicate and not shard:
        return None
    product = replicate * (1 if settings.strategy == "ddp" else shard)
    uneven = dp % (replicate or 1) or dp % (shard or 1)
    if uneven or (product and product != dp):
        names = {"dp_replicate": replicate, "dp_shard": shard, "tp": tp}
        product_shown = " x ".join(f"{key} {value}" for key, value in names.items() if value)
        raise ConfigError(
            f"parallel: {product_shown} does not make {world} processes: dp_replicate x dp_shard x tp must be {world}. "
            f"With tp {tp}, (dp_replicate, dp_shard) may be {_pairs(dp)}; 0 stands for what is left."
        )
    return MeshShape(replicate or dp // shard, shard or dp // replicate, tp)


def check_batch(world: int, tp: int, batch: int, micro: int) -> None:
    """Refuse a global batch that ``world`` processes cannot share equally.

    Args:
        world: number of processes.
        tp: number of processes that see the same rows (tensor parallelism).
        batch: rows of the global batch.
        micro: rows of a forward pass; 0 if they are not fixed.

    Raises:
        ConfigError: the message lists the possible numbers of processes and the nearest possible batches.
    """
    dp = world // tp
    if batch % dp == 0 and (not micro or batch // dp % micro == 0):
        return
    unit = dp * (micro or 1)
    near = sorted({max(unit, batch // unit * unit), -(-batch // unit) * unit})
    each = f" in micro-batches of {micro}" if micro else ""
    also = f", each {tp} times for parallel.tp" if tp > 1 else ""
    worlds = [n * tp for n in possible_worlds(batch, micro)]
    raise ConfigError(
        f"A global batch of {batch} rows{each} cannot be split equally over {dp} processes. Possible numbers of "
        f"processes{also} are {_listed(worlds, around=world)}; with {world}, train.batch_rows may be {_listed(near)}."
        + (" Or set train.micro_rows to 0." if micro and batch % dp == 0 else "")
    )


def possible_worlds(batch_rows: int, micro_rows: int = 0) -> list[int]:
    """Return the numbers of processes that can share a global batch in equal numbers of whole micro-batches."""
    micro = micro_rows or 1
    if batch_rows % micro:
        return []
    return _divisors(batch_rows // micro)


def _check_reproducible(settings: ParallelConfig, world: int, batch: int, micro: int) -> None:
    if settings.strategy == "fsdp" or settings.tp > 1 or settings.dp_shard > 1:
        other = f"tp {settings.tp}" if settings.tp > 1 else "fsdp"
        raise ConfigError(
            f"parallel.reproducible adds gradients in one fixed order, which {other} cannot do: it needs ddp. Leave "
            "parallel.strategy, dp_shard and tp as they are by default, or leave reproducible out."
        )
    count = batch // micro if micro else batch
    if world & (world - 1) or count % world:
        fitting = [n for n in possible_worlds(batch, micro) if n & (n - 1) == 0]
        raise ConfigError(
            f"parallel.reproducible needs a number of processes that is a power of two and divides the {count} "
            f"micro-batches of a global batch; {world} is not. It may be {_listed(fitting)}."
        )


def _check_offload(settings: ParallelConfig, needs: Needs) -> None:
    if not settings.cpu_offload:
        return
    if settings.strategy == "ddp" or settings.reproducible:
        raise ConfigError(
            "parallel.cpu_offload moves the shards of fsdp to the host; ddp and reproducible runs have no shards. "
            "Set parallel.strategy to fsdp, or leave cpu_offload out."
        )
    if needs.device != "cuda":
        raise ConfigError(
            f"parallel.cpu_offload spares the memory of a GPU, and this run is on {needs.device}. Leave it out."
        )


# ----------------------------------------------------------------------------------------------------- helpers


def _gib(count: float) -> str:
    return f"{count / _GIB:.1f}" if count >= _GIB else f"{count / _GIB:.2g}"


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _pairs(dp: int) -> str:
    pairs = [f"({dp // s}, {s})" for s in _divisors(dp)]
    return ", ".join(pairs[:_SHOWN]) + ", ..." * (len(pairs) > _SHOWN)


def _listed(numbers: Sequence[int], around: int = 0) -> str:
    """Return the numbers as text, at most a few: those nearest to ``around``, else the first ones."""
    if not numbers:
        return "none"
    shown = sorted(
        sorted(numbers, key=lambda n: abs(n - around))[:_SHOWN] if around else numbers[:_SHOWN]
    )
    return ", ".join(f"{n:,}" for n in shown) + ", ..." * (len(shown) < len(numbers))
