"""Estimates of the memory that a run needs on one device of a mesh, by arithmetic.

They need no tensors and no process group, so a plan for hundreds of devices can be made on a laptop. `auto` decides
by the same functions that print the plan in the documentation.

The bytes that a block keeps for its backward pass were counted on this library's blocks (saved tensors under autocast).

Letters: P parameters, D hidden, L layers, F intermediate, V vocabulary, T tokens of a micro-batch on one device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain import nn

__all__ = [
    "FP32",
    "MATRICES_TOGETHER",
    "ROOMY",
    "Memory",
    "MeshShape",
    "Needs",
    "memory",
]

FP32 = 4
# Share of a device's memory that whole weights and gradients may take between the micro-batches of a step.
ROOMY = 0.2
# Elements of the matrices that Muon updates in one batch, and bytes per element, as measured for square matrices: the
# averaged gradient, its copy in the batch, and the iteration, which runs in half precision on a GPU.
MATRICES_TOGETHER = 1 << 26
_MATRIX_BYTES = {"cuda": 16}
_MATRIX_BYTES_FP32 = 24
# Bytes of each logit of the vocabulary loss that is in fp32: the copy, the log-probabilities, the gradient.
_WIDE_BYTES = 12


@dataclass(frozen=True)
class MeshShape:
    """Mesh sizes: replicas, shards of a replica, slices of a matrix. rank = (r * dp_shard + s) * tp + t."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        """Number of processes that see different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """World size."""
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"{self.dp_replicate} x {self.dp_shard} x {self.tp}"


@dataclass(frozen=True)
class Needs:
    """The counts that determine the memory of a run, without tensors.

    Attributes:
        parameters: P, all that are held: of the model and whatever else the objective keeps.
        trainable: number of trainable parameters; ``muon`` of them have one moment instead of two.
        hidden, layers, intermediate, vocabulary: D, L, F, V.
        kept: bytes per token that one block keeps for the backward pass, if the widths do not tell it.
        heads: query heads.
        query, key_value: total width of the query heads, and of the key heads; 0 means D.
        gated: the feed-forward layer has two input projections.
        tied: the vocabulary projection is the embedding.
        row_length: tokens of the longest row.
        micro_tokens: maximum of tokens in a micro-batch if its rows are not fixed; 0 means one row.
        ema, anchors: whether there is a second copy of the weights, and a copy of the trainable ones (L2-SP).
        compute_bytes: bytes of a number in the forward pass: 2 for bf16 and fp16, 4 for fp32.
        keeps_weights: whether a block keeps its attention weights for the backward pass, in full rows.
        gather_bytes: bytes of a weight that fsdp gathers; 0 means ``compute_bytes``.
        checkpointing: activation checkpointing: off, selective or full.
        device: cpu, cuda or mps.
    """

    parameters: int
    trainable: int
    hidden: int
    layers: int
    intermediate: int
    vocabulary: int = 0
    kept: float | None = None
    row_length: int = 1
    heads: int = 0
    query: int = 0
    key_value: int = 0
    gated: bool = False
    tied: bool = True
    muon: int = 0
    micro_tokens: int = 0
    ema: bool = False
    anchors: bool = False
    compute_bytes: int = 2
    gather_bytes: int = 0
    keeps_weights: bool = False
    checkpointing: str = "off"
    device: str = "cuda"

    @property
    def block(self) -> float:
        """Number of parameters of one block."""
        outside = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return max(0.0, self.parameters - outside) / max(1, self.layers)

    @property
    def moments(self) -> int:
        """Number of optimizer moments."""
        return 2 * self.trainable - min(self.muon, self.trainable)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by category."""

    weights: float
    casts: float
    gradients: float
    moments: float
    copies: float
    gathered: float
    activations: float
    logits: float
    step: float = 0.0  # of the optimizer, beyond what the forward and backward passes have freed

    @property
    def total(self) -> float:
        """Sum of all categories."""
        return float(sum(vars(self).values()))


def kept_per_token(needs: Needs, tp: int = 1) -> float:
    """Return the bytes per token that one block keeps for the backward pass, on one of ``tp`` devices.

    The residual stream is fp32 and is not sharded by tensor parallelism; the inside of attention and MLP is.
    """
    if needs.kept is not None:
        return needs.kept
    d, b = needs.hidden, needs.compute_bytes
    q, kv = needs.query or d, needs.key_value or d
    ways = 2 if needs.gated else 1
    weights = needs.heads * needs.row_length if needs.keeps_weights else 0
    if needs.checkpointing == "full":
        return float(FP32 * d)
    # With selective checkpointing the input and the results of matmuls and attention, else also those between them.
    each = 1 if needs.checkpointing == "selective" else 2
    inside = 2 * q + 2 * kv + each * ways * needs.intermediate + weights
    return each * FP32 * d + b * (2 * d + inside / tp)


def activation_bytes(needs: Needs, tokens: int, tp: int = 1) -> float:
    """Return the activation bytes of a micro-batch of ``tokens`` on one device, with one recomputed block."""
    kept = needs.layers * kept_per_token(needs, tp)
    if needs.checkpointing != "off":
        kept += kept_per_token(replace(needs, checkpointing="off"), tp)
    return tokens * kept


def logits_bytes(needs: Needs, tokens: int, tp: int = 1) -> float:
    """Return the bytes of the vocabulary loss: a chunk, the projection's gradient and cast, the features' gradient."""
    if not needs.vocabulary:
        return 0.0
    mine = needs.vocabulary / tp
    loss = nn.loss  # imported here, because what reads sizes of meshes alone starts without torch
    budget = loss.CHUNK_BYTES.get(needs.device, 1 << 26) / needs.compute_bytes
    # The loss makes a chunk up to half as large again where the last one would be short.
    chunk = min(tokens * mine, 1.5 * max(loss.CHUNK_ROWS * mine, budget))
    wide = min(chunk, loss.WIDE.get(needs.device, 1 << 26))
    logits = chunk * needs.compute_bytes + wide * _WIDE_BYTES
    cast = needs.compute_bytes if needs.compute_bytes < FP32 else 0
    return logits + mine * needs.hidden * (FP32 + cast) + tokens * needs.hidden * FP32


def memory(
    needs: Needs,
    sizes: MeshShape,
    strategy: str,
    tokens: int,
    *,
    whole: bool = False,
    offload: bool = False,
    trees: int = 0,
) -> Memory:
    """Return the bytes on one device at the peak of a step.

    Args:
        needs: of the run.
        sizes: of the mesh.
        strategy: ``single``, ``ddp`` or ``fsdp``; under fsdp a block is gathered, used and resharded.
        tokens: tokens of a micro-batch on one device.
        whole: fsdp keeps whole weights and gradients between the micro-batches.
        offload: the sharded weights, gradients and moments lie in host memory.
        trees: further copies of the gradients (sums in a fixed order).
    """
    fsdp = strategy == "fsdp"
    parts = sizes.tp * (sizes.dp_shard if fsdp else 1)
    held, trained = needs.parameters / parts, needs.trainable / parts
    low = needs.compute_bytes if needs.compute_bytes < FP32 else 0
    here = 0.0 if fsdp and offload else 1.0
    gathered, casts = 0.0, low * held
    if fsdp and (sizes.dp_shard > 1 or offload):
        # The current block, the next one and a gradient before its reduce-scatter. Parameters outside of the blocks
        # stay gathered, in fp32.
        outside = needs.parameters - needs.layers * needs.block
        each = needs.gather_bytes or needs.compute_bytes
        passing = (2 * each + FP32) * needs.block
        if whole:
            passing = (each + FP32) * needs.layers * needs.block
        gathered = (passing + 2 * FP32 * outside) / sizes.tp
        # Of weights that are gathered in fp32, autocast keeps a copy in every block until the backward pass.
        casts = low * (each == FP32) * needs.layers * needs.block / sizes.tp
    activations = activation_bytes(needs, tokens, sizes.tp)
    logits = logits_bytes(needs, tokens, sizes.tp)
    room = _MATRIX_BYTES.get(needs.device, _MATRIX_BYTES_FP32) + FP32 * (parts > 1)  # gathered
    matrices = room * min(MATRICES_TOGETHER, needs.muon, needs.trainable)
    return Memory(
        weights=here * FP32 * held,
        casts=casts,
        gradients=here * FP32 * trained + FP32 * trees * trained,
        moments=here * FP32 * needs.moments / parts,
        copies=here * FP32 * (needs.ema * held + needs.anchors * trained),
        gathered=gathered,
        activations=activations,
        logits=logits,
        step=max(0.0, matrices - activations - logits),
    )
