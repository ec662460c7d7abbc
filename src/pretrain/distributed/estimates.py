"""Memory that a run takes on one device of a mesh, by arithmetic.

No tensor is touched and no group is asked, so a plan for hundreds of devices can be made on a laptop. `auto` decides
by the same functions that the documentation's plan is printed from.

The bytes that a block keeps for its backward pass were counted on ours (saved tensors under autocast).

Letters: P parameters, D hidden, L layers, F intermediate, V vocabulary, T tokens of a micro-batch on one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = [
    "MATRICES_TOGETHER",
    "ROOMY",
    "Memory",
    "MeshShape",
    "Needs",
    "keeps_whole",
    "memory",
]

FP32 = 4
# Share of a device's memory that whole weights and gradients may take between the micro-batches of a step.
ROOMY = 0.2
# Elements of the matrices that Muon steps in one batch, and bytes for each, as measured for square ones: the averaged
# gradient, its copy in the batch, and the iteration, which a GPU makes in half precision.
MATRICES_TOGETHER = 1 << 26
_MATRIX_BYTES = {"cuda": 16}
_MATRIX_BYTES_FP32 = 24
# A chunk of logits: its elements on a device, and bytes for each: the product, fp32, log-probabilities, gradient, cast.
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26, "mps": 1 << 24}
_CHUNK_BYTES = 16


@dataclass(frozen=True)
class MeshShape:
    """The mesh: copies of the model, parts of a copy, parts of a matrix. rank = (r * dp_shard + s) * tp + t."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        """Processes that see different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """All processes."""
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"{self.dp_replicate} x {self.dp_shard} x {self.tp}"


@dataclass(frozen=True)
class Needs:
    """What a run needs, in counts; nothing here knows a tensor.

    Attributes:
        parameters: P, of everything that is held: model and what else the objective keeps.
        trainable: of these, the ones that learn; ``muon`` of them have one moment instead of two.
        hidden, layers, intermediate, vocabulary: D, L, F, V.
        query, key_value: width of all heads of queries, and of keys; 0 is D.
        gated: the feed-forward layer has two ways in.
        tied: the vocabulary projection is the embedding.
        row_length: tokens of the longest row.
        micro_tokens: the most tokens of a micro-batch where its rows are free; 0 is one row.
        ema, anchors: a second copy of the weights, a copy of those that learn (L2-SP).
        compute_bytes: of a number in the forward pass: 2 for bf16 and fp16, 4 for fp32.
        gather_bytes: of a weight that fsdp gathers; 0 is the same.
        checkpointing: off, selective or full.
        device: cpu, cuda or mps.
    """

    parameters: int
    trainable: int
    hidden: int
    layers: int
    intermediate: int
    vocabulary: int = 0
    row_length: int = 1
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
    checkpointing: str = "off"
    device: str = "cuda"

    @property
    def block(self) -> float:
        """Parameters of one block."""
        outside = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return max(0.0, self.parameters - outside) / max(1, self.layers)

    @property
    def moments(self) -> int:
        """Numbers that the optimizers keep."""
        return 2 * self.trainable - min(self.muon, self.trainable)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by part."""

    weights: float
    casts: float
    gradients: float
    moments: float
    copies: float
    gathered: float
    activations: float
    logits: float
    step: float = 0.0  # of the optimizer, beyond what the passes through the model gave back

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(vars(self).values()))


def kept_per_token(needs: Needs, tp: int = 1) -> float:
    """Bytes of one block that the backward pass needs, per token, on one of ``tp`` devices.

    The residual stream is fp32 and is not cut by tensor parallelism; the inside of attention and MLP is.
    """
    d, b = needs.hidden, needs.compute_bytes
    q, kv = needs.query or d, needs.key_value or d
    ways = 2 if needs.gated else 1
    if needs.checkpointing == "full":
        return float(FP32 * d)
    if needs.checkpointing == "selective":  # the input, and what matrix products and attention gave
        inside = 2 * q + 2 * kv + ways * needs.intermediate
        return FP32 * d + b * (2 * d + inside / tp)
    inside = 2 * q + 2 * kv + 2 * ways * needs.intermediate
    return 2 * FP32 * d + b * (2 * d + inside / tp)


def activation_bytes(needs: Needs, tokens: int, tp: int = 1) -> float:
    """Bytes that a micro-batch of ``tokens`` keeps on one device, with the block that is computed again."""
    kept = needs.layers * kept_per_token(needs, tp)
    if needs.checkpointing != "off":
        plain = Needs(**{**vars(needs), "checkpointing": "off"})
        kept += kept_per_token(plain, tp)
    return tokens * kept


def logits_bytes(needs: Needs, tokens: int, tp: int = 1) -> float:
    """Bytes of the loss over the vocabulary: one chunk, the projection's gradient and cast, the features' gradient."""
    if not needs.vocabulary:
        return 0.0
    mine = needs.vocabulary / tp
    budget = _CHUNK_ELEMENTS.get(needs.device, 1 << 24)
    chunk = min(tokens, max(32, budget // max(1, math.ceil(mine)))) * mine
    cast = needs.compute_bytes if needs.compute_bytes < FP32 else 0
    return chunk * _CHUNK_BYTES + mine * needs.hidden * (FP32 + cast) + tokens * needs.hidden * FP32


def keeps_whole(needs: Needs, tp: int, budget: float) -> bool:
    """Whether FSDP2 may hold whole weights and gradients between the micro-batches of a step, so that they travel once.

    Args:
        needs: of the run.
        tp: processes of a matrix.
        budget: bytes of a device.
    """
    return 2.0 * FP32 * needs.parameters / tp <= ROOMY * budget


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
    """Bytes on one device at the peak of a step.

    Args:
        needs: of the run.
        sizes: of the mesh.
        strategy: ``single``, ``ddp`` or ``fsdp``; under fsdp a block is gathered, used and given back.
        tokens: of a micro-batch on one device.
        whole: see `keeps_whole`.
        offload: the cut weights, gradients and moments lie in the memory of the host.
        trees: further copies of the gradients (sums in a fixed order).
    """
    fsdp = strategy == "fsdp"
    parts = sizes.tp * (sizes.dp_shard if fsdp else 1)
    held, trained = needs.parameters / parts, needs.trainable / parts
    low = needs.compute_bytes if needs.compute_bytes < FP32 else 0
    here = 0.0 if fsdp and offload else 1.0
    gathered, casts = 0.0, low * held
    if fsdp and (sizes.dp_shard > 1 or offload):
        # The block at work, the next one and a gradient before it is cut; what is in no block stays, in fp32.
        outside = needs.parameters - needs.layers * needs.block
        each = needs.gather_bytes or needs.compute_bytes
        passing = (2 * each + FP32) * needs.block
        if whole:
            passing = (each + FP32) * needs.layers * needs.block
        gathered = (passing + 2 * FP32 * outside) / sizes.tp
        # Of what comes in fp32, autocast keeps a copy in every block until the backward pass.
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
