"""Print the paper plan of docs/distributed.md: an 8 B model on 64 GPUs, out of the functions that `auto` decides by.

Nothing here is measured. What is taken from elsewhere stands below with its source; the rest is arithmetic. The volumes
of the collectives are those of ring algorithms; the best interval between checkpoints is Young's and Daly's
(doi 10.1016/j.future.2004.11.016).

    python docs/cluster_plan.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pretrain.config import ParallelConfig
from pretrain.distributed.estimates import FP32, Needs, memory
from pretrain.distributed.mesh import MeshShape, ParallelPlan, choose_mesh

GIB, GB = float(1 << 30), 1e9
HOSTS, LOCAL = 8, 8
WORLD = HOSTS * LOCAL
BATCH_ROWS = 512
# NVLink of an H100 or H200, one way; InfiniBand NDR, one card for each GPU; the host's memory over PCIe 5, pinned.
LINK, NETWORK, HOST_COPY = 450 * GB, 50 * GB, 50 * GB
# What a shared file system takes from all hosts together: an assumption, put your own in.
STORAGE = 20 * GB
PEAK = 989e12
# torchtitan, Llama-3.1-8B at 8,192 tokens on 8 H100, FSDP2, bf16: 5,762 tokens/s/GPU eager, 6,667 compiled
# (benchmarks/llama3_h100_202412); at 128 GPUs 97.7 % of the pace at 8. In PaLM's operations:
EAGER, COMPILED, SCALING = 0.337, 0.390, 0.977
# Llama 3 (arXiv 2407.21783, 3.3.4): 419 unexpected interruptions in 54 days on 16,384 H100.
FAILURES_PER_GPU_DAY = 419 / 54 / 16384
RESTART = 600.0  # seconds from a failure to the first new step: queue, start-up, reading

LLAMA = Needs(
    parameters=8_030_261_248,
    trainable=8_030_261_248,
    hidden=4096,
    layers=32,
    intermediate=14336,
    vocabulary=128_256,
    row_length=8192,
    query=4096,
    key_value=1024,
    gated=True,
    tied=False,
)

GPT2 = Needs(
    parameters=124_475_904,
    trainable=124_475_904,
    hidden=768,
    layers=12,
    intermediate=3072,
    vocabulary=50_304,
    row_length=1024,
)


@dataclass(frozen=True)
class Machine:
    """A kind of GPU: bytes of memory, and what is computed again there."""

    name: str
    memory: float
    checkpointing: str
    micro_rows: int


H100 = Machine("H100 80 GB", 79 * GIB, "selective", 1)
H200 = Machine("H200 141 GB", 139 * GIB, "off", 1)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in one optimizer step, one way, by collective; ``spans`` says over how many hosts.

    Attributes:
        gather: parts of the weights (fsdp).
        reduce: parts of the gradients (fsdp).
        average: gradients over copies of the model (ddp, hybrid fsdp).
        matrices: activations (tensor parallelism).
        members: processes of one host in a group of each of the three: shard, replicate, tp.
        hosts: hosts of a group of each.
    """

    gather: float
    reduce: float
    average: float
    matrices: float
    members: tuple[int, int, int]
    hosts: tuple[int, int, int]

    @property
    def total(self) -> float:
        """All of it."""
        return self.gather + self.reduce + self.average + self.matrices

    def seconds(self, link: float, network: float) -> tuple[float, float]:
        """Seconds of the collectives that a step can hide behind its work, and of those that it waits for.

        Args:
            link: bytes per second between the devices of a host, one way.
            network: bytes per second between hosts, one way, for each device.
        """

        def one(bytes_: float, group: int) -> float:
            # A ring over several hosts leaves each of them once: its members there share the way out.
            across = bytes_ / self.members[group] / network if self.hosts[group] > 1 else 0.0
            inside = bytes_ / link if self.members[group] > 1 else 0.0
            return max(across, inside)

        hidden = one(self.gather + self.reduce, 0) + one(self.average, 1)
        return hidden, one(self.matrices, 2)


def _layout(sizes: MeshShape, local: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Members of a group on one host, and hosts of a group: for shard, replicate and tp."""
    members, hosts = [], []
    part = sizes.tp * sizes.dp_shard
    spans = ((sizes.tp, sizes.dp_shard), (part, sizes.dp_replicate), (1, sizes.tp))
    for stride, size in spans:
        inside = max(1, min(size, local // stride)) if stride < local else 1
        members.append(inside)
        hosts.append(math.ceil(size / inside))
    return (members[0], members[1], members[2]), (hosts[0], hosts[1], hosts[2])


def traffic(
    needs: Needs,
    sizes: MeshShape,
    strategy: str,
    tokens: int,
    accumulation: int = 1,
    *,
    local: int = 8,
    reshard: bool = True,
    whole: bool = False,
) -> Traffic:
    """Bytes that one device sends in one optimizer step.

    Args:
        needs: of the run.
        sizes: of the mesh.
        strategy: ``single``, ``ddp`` or ``fsdp``.
        tokens: of a micro-batch on one device.
        accumulation: micro-batches of one device in a step.
        local: processes of one host.
        reshard: fsdp gives a block back after the forward pass and gathers it again for the backward pass.
        whole: fsdp keeps whole weights and gradients between the micro-batches.
    """

    def ring(size: int) -> float:
        return (size - 1) / size

    held, trained = needs.parameters / sizes.tp, needs.trainable / sizes.tp
    fsdp = strategy == "fsdp"
    shard = ring(sizes.dp_shard) if fsdp else 0.0
    gathers = 1 if whole else accumulation * (2 if reshard else 1)
    reduces = 1 if whole else accumulation
    averaged = trained / sizes.dp_shard if fsdp else trained
    copies = sizes.dp_replicate if fsdp else sizes.dp
    # Two sums over the group in the forward pass of a block and two in its backward pass, again where it is computed
    # again; one for the embedding, one for the gradient of the features before the head.
    sums = needs.layers * (6 if needs.checkpointing == "full" else 4) + 2
    members, hosts = _layout(sizes, local)
    sent = 2 * ring(sizes.tp) * tokens * needs.hidden * needs.compute_bytes
    return Traffic(
        gather=gathers * shard * (needs.gather_bytes or needs.compute_bytes) * held,
        reduce=reduces * shard * FP32 * trained,
        average=2 * ring(copies) * FP32 * averaged,
        matrices=accumulation * sums * sent,
        members=members,
        hosts=hosts,
    )


def flops_per_token(needs: Needs) -> float:
    """Operations of a token's forward and backward pass: 6 per weight of a matrix, 12 L D T for attention (PaLM)."""
    outside = needs.vocabulary * needs.hidden * (1 if needs.tied else 2)
    matrices = needs.parameters - outside + needs.vocabulary * needs.hidden
    width = needs.query or needs.hidden
    return 6.0 * matrices + 12.0 * needs.layers * width * needs.row_length


def step_seconds(
    work: float, moved: Traffic, *, peak: float, efficiency: float, link: float, network: float
) -> float:
    """Seconds of one optimizer step.

    Args:
        work: operations of one device in the step.
        moved: what it sends meanwhile.
        peak: operations per second of the device by its data sheet.
        efficiency: the share of it that one device alone reaches.
        link: see `Traffic.seconds`.
        network: see `Traffic.seconds`.
    """
    hidden, waited = moved.seconds(link, network)
    return max(work / (peak * efficiency), hidden) + waited


def checkpoint_bytes(needs: Needs) -> float:
    """Bytes of one checkpoint in fp32: weights, moments, and what else a run remembers."""
    copies = needs.ema * needs.parameters + needs.anchors * needs.trainable
    return float(FP32 * (needs.parameters + needs.moments + copies))


def save_interval(stall: float, between_failures: float) -> float:
    """Seconds between two checkpoints that lose the least time (Young's first-order formula, as in Daly).

    Args:
        stall: seconds that training stands still for one save.
        between_failures: mean seconds between two failures of the whole machine.
    """
    return math.sqrt(2 * stall * between_failures)


def lost_share(stall: float, interval: float, restart: float, between_failures: float) -> float:
    """Share of the time that is lost: to saving, to work done twice after a failure, and to starting again."""
    return stall / interval + (interval / 2 + restart) / between_failures


def plan(machine: Machine) -> tuple[Needs, ParallelPlan]:
    """What `parallel.strategy=auto` makes of the model on 64 of these."""
    needs = replace(LLAMA, checkpointing=machine.checkpointing)
    choice = choose_mesh(
        ParallelConfig(),
        WORLD,
        batch_rows=BATCH_ROWS,
        micro_rows=machine.micro_rows,
        needs=needs,
        possible_tp=(1, 2, 4, 8),
        device_memory=machine.memory,
        local=LOCAL,
    )
    return needs, choice


def rows_of(machine: Machine) -> dict[str, str]:
    """One column of the table."""
    needs, choice = plan(machine)
    sizes, part = choice.sizes, choice.memory
    assert part is not None
    tokens = machine.micro_rows * needs.row_length
    steps = BATCH_ROWS // sizes.dp // machine.micro_rows
    moved = traffic(needs, sizes, choice.strategy, tokens, steps, local=LOCAL, whole=choice.whole)
    work = flops_per_token(needs) * tokens * steps
    seconds = {
        name: step_seconds(work, moved, peak=PEAK, efficiency=share, link=LINK, network=NETWORK)
        for name, share in (("eager", EAGER), ("compiled", COMPILED))
    }
    mfu = {name: work / PEAK / value * SCALING for name, value in seconds.items()}
    pace = BATCH_ROWS * needs.row_length / seconds["compiled"] * SCALING
    hidden, _ = moved.seconds(LINK, NETWORK)
    saved = checkpoint_bytes(needs)
    # Of the copies of a part, one process gives it: with several copies of the model most come from the first.
    given = saved / (sizes.dp_shard * sizes.tp)
    stall = given / HOST_COPY
    between = 86400 / (FAILURES_PER_GPU_DAY * WORLD)
    write = saved / STORAGE
    every = {"async": save_interval(stall, between), "sync": save_interval(write, between)}
    chosen = max(every["async"], 2 * write, 600.0)
    lost = lost_share(stall, chosen, RESTART, between)
    lost_sync = lost_share(write, every["sync"], RESTART, between)
    sharding = part.weights + part.gradients + part.moments
    return {
        "strategy chosen by auto": f"{choice.strategy}, {sizes} (dp_replicate x dp_shard x tp)",
        "activation_checkpointing": machine.checkpointing,
        "batch": f"{BATCH_ROWS} rows = {machine.micro_rows} micro x {steps} accumulated x {sizes.dp} ranks, "
        f"{BATCH_ROWS * needs.row_length / 1e6:.1f} M tokens",
        "memory: weights, gradients, moments": f"{sharding / GIB:.1f} GiB",
        "memory: gathered blocks and embeddings": f"{part.gathered / GIB:.1f} GiB",
        "memory: activations": f"{part.activations / GIB:.1f} GiB",
        "memory: loss over the vocabulary": f"{part.logits / GIB:.1f} GiB",
        "memory: sum, of what there is": f"{part.total / GIB:.1f} of {machine.memory / GIB:.0f} GiB "
        f"({part.total / machine.memory:.0%})",
        "sent per GPU and step: weights (NVLink)": f"{moved.gather / GB:.0f} GB",
        "sent per GPU and step: gradients (NVLink)": f"{moved.reduce / GB:.0f} GB",
        "sent per GPU and step: sums over copies (InfiniBand)": f"{moved.average / moved.members[1] / GB:.1f} GB",
        "all that, seconds": f"{hidden:.2f}, of a step of {seconds['compiled']:.1f}: hidden behind the work",
        "operations per token (PaLM)": f"{flops_per_token(needs) / 1e9:.1f} GFLOP",
        "step: compiled, eager": f"{seconds['compiled']:.1f} s, {seconds['eager']:.1f} s",
        "MFU expected: compiled, eager": f"{mfu['compiled']:.1%}, {mfu['eager']:.1%}",
        "pace, compiled": f"{pace / WORLD:,.0f} tokens/s/GPU, {pace * 86400 / 1e9:.0f} G tokens a day",
        "checkpoint": f"{saved / GB:.1f} GB, {saved / WORLD / GB:.2f} GB written by each process",
        "time to write it": f"{write:.1f} s at {STORAGE / GB:.0f} GB/s",
        "stall with async_save": f"{stall:.2f} s ({given / GB:.0f} GB to the host at {HOST_COPY / GB:.0f} GB/s)",
        "failures a day": f"{86400 / between:.3f}, one in {between / 86400:.0f} days",
        "best interval (Young/Daly): sync, async": f"{every['sync'] / 60:.0f} min, {every['async'] / 60:.0f} min",
        "save_every": f"{10 * math.ceil(chosen / seconds['compiled'] / 10)} steps ({chosen / 60:.0f} min)",
        "time lost to saving and failures: sync, async": f"{lost_sync:.2%}, {lost:.2%}",
    }


def table() -> str:
    """The plan as Markdown."""
    columns = [(machine.name, rows_of(machine)) for machine in (H100, H200)]
    lines = ["| | " + " | ".join(f"64 x {name}" for name, _ in columns) + " |", "|---|---|---|"]
    for key in columns[0][1]:
        lines.append(f"| {key} | " + " | ".join(rows[key] for _, rows in columns) + " |")
    return "\n".join(lines)


def alternatives() -> str:
    """What other meshes would cost on the first machine, as Markdown."""
    lines = [
        "| strategy, mesh | memory per GPU | seconds of traffic hidden | seconds waited for | step |",
        "|---|---|---|---|---|",
    ]
    meshes = [
        ("ddp", MeshShape(64, 1, 1)),
        ("fsdp", MeshShape(8, 8, 1)),
        ("fsdp", MeshShape(1, 64, 1)),
        ("fsdp", MeshShape(8, 4, 2)),
        ("fsdp", MeshShape(8, 1, 8)),
    ]
    needs, _ = plan(H100)
    for strategy, sizes in meshes:
        steps = BATCH_ROWS // sizes.dp // H100.micro_rows
        tokens = H100.micro_rows * needs.row_length
        moved = traffic(needs, sizes, strategy, tokens, steps, local=LOCAL)
        hidden, waited = moved.seconds(LINK, NETWORK)
        work = flops_per_token(needs) * tokens * steps / sizes.tp
        seconds = step_seconds(
            work, moved, peak=PEAK, efficiency=COMPILED, link=LINK, network=NETWORK
        )
        total = memory(needs, sizes, strategy, tokens).total
        fits = "" if total <= 0.8 * H100.memory else ", does not fit"
        lines.append(
            f"| {strategy}, {sizes} | {total / GIB:.0f} GiB{fits} | {hidden:.2f} | {waited:.2f} | {seconds:.1f} s |"
        )
    return "\n".join(lines)


def reasons() -> str:
    """What a run says of its choice: GPT-2 on one host of H100, and the plan's model on all hosts."""
    small = choose_mesh(
        ParallelConfig(),
        LOCAL,
        batch_rows=480,
        micro_rows=30,
        needs=GPT2,
        device_memory=H100.memory,
    )
    return f"{small.reason}\n{plan(H100)[1].reason}"


if __name__ == "__main__":
    print(table(), end="\n\n")
    print(alternatives(), end="\n\n")
    print(reasons())
