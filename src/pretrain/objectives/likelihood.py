"""Per-target log-probabilities, for losses that need more than their sum.

Letters: B rows, T tokens, D hidden, V vocabulary, M targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.nn.tensor_parallel import copy_to_tensor_parallel
from pretrain.objectives.base import Batch, at_targets

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["target_log_probs"]

_LOGITS = 1 << 22  # most logits in memory at a time


def target_log_probs(model: Model, batch: Batch) -> Tensor:
    """Log-probability of every target, (M,) in fp32 with a gradient, in the order of ``target_index``.

    The projection runs in chunks whose logits are recomputed in the backward pass, so that no (M, V) buffer exists.

    Args:
        model: a model with a vocabulary head.
        batch: ``input_ids`` and the other inputs (B, T), ``labels`` (B, T), and optionally ``target_index`` (M,).
    """
    hidden, targets, _ = at_targets(model, batch)
    head: Any = model.head
    features = head.features(hidden)  # (M, D)
    weight, bias, vocab = head.weight(), head.bias(), head.vocab
    # Ranks that shard the vocabulary must use the same chunks, although the shard of the last may be smaller.
    size = max(32, _LOGITS // (weight.shape[0] if vocab is None else vocab.rows))
    if vocab is not None:
        features = copy_to_tensor_parallel(features, vocab.group)

    def piece(part: Tensor, wanted: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(part, weight, bias).float()
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        if vocab is not None:
            found: Tensor = vocab.log_probs(logits, wanted)
            return found
        return -F.cross_entropy(logits, wanted, reduction="none")

    pieces = [
        checkpoint(
            piece,
            features[at : at + size],
            targets[at : at + size],
            weight,
            bias,
            use_reentrant=False,
        )
        for at in range(0, len(targets), size)
    ]
    return (
        torch.cat(pieces) if pieces else hidden.float().sum() * torch.zeros(0, device=hidden.device)
    )
