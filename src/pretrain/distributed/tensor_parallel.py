"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): shard the parameters of a model as its blocks declare.

The result is ordinary modules with smaller parameters, which know their process group and call the collectives of
``nn.tensor_parallel``. The vocabulary, if there is one, is sharded by rows: the token embedding, the output projection
and its bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError, ModelError
from pretrain.models.backbone import Backbone
from pretrain.models.base import Model
from pretrain.models.heads import LanguageHead
from pretrain.nn.layout import piece
from pretrain.nn.tensor_parallel import Group, VocabShard, all_reduce

__all__ = [
    "TensorParallel",
    "cuts_of",
    "reduce_partial_gradients",
    "shard_model",
]

# Parameter of a linear layer -> the dimension that is cut. A bias that is added after an all-reduce is whole, and so
# is its gradient.
_LINEAR: Mapping[str, Mapping[str, int]] = {
    "column": {"weight": 0, "bias": 0},
    "row": {"weight": 1},
}


@dataclass(frozen=True)
class TensorParallel:
    """The sharding of a model by tensor parallelism; names are those of ``model.named_parameters()``.

    Attributes:
        group: the ranks that share each matrix.
        cuts: name of a cut parameter -> its dimension; the others are whole on every rank.
        partial: names of whole parameters of which each rank has a part of the gradient.
    """

    group: Group
    cuts: Mapping[str, int] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()

    def take(self, name: str, full: Tensor) -> Tensor:
        """Return this rank's slice of a full tensor: a view, or the tensor itself if it is not cut."""
        if name not in self.cuts:
            return full
        dim = self.cuts[name]
        return full.narrow(dim, *piece(full.shape[dim], self.group.size, self.group.rank))


def cuts_of(model: Model) -> tuple[dict[str, int], frozenset[str]]:
    """Return what tensor parallelism cuts in a model, independent of the size of the group.

    Returns:
        Cut parameter -> its dimension, and the whole parameters with partial gradients; see ``TensorParallel``.

    Raises:
        ConfigError: a block has no plan, or one that does not cover its parameters.
    """
    cuts: dict[str, int] = {}
    partial: set[str] = set()
    names = {id(module): name for name, module in model.named_modules()}
    for block in model.backbone.blocks():
        for name, dim in _block_cuts(model.backbone, block):
            name = f"{names[id(block)]}.{name}"
            if dim is None:
                partial.add(name)
            else:
                cuts[name] = dim
    if model.backbone.vocab_size:  # images have no vocabulary
        cuts[f"{names[id(_token_embedding(model.backbone))]}.weight"] = 0
    if isinstance(model.head, LanguageHead):
        for leaf in ("output_weight", "output_bias"):
            if getattr(model.head, leaf) is not None:
                cuts[f"{names[id(model.head)]}.{leaf}"] = 0
    return cuts, frozenset(partial)


def _token_embedding(backbone: Backbone) -> nn.Embedding:
    embedding = getattr(backbone, "token_embedding", None)
    if not isinstance(embedding, nn.Embedding):
        raise ConfigError(
            f"{type(backbone).__name__} has no nn.Embedding called token_embedding, which tensor parallelism cuts. "
            "Name it so, and look tokens up with self.look_up(self.token_embedding, ids); or leave parallel.tp at 1."
        )
    return embedding


def _planned(backbone: Backbone, block: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yield (path, kind, layer) for the layers that the plan of a block names and that the block has."""
    plan: Mapping[str, str] | None = getattr(block, "tensor_parallel", None)
    if plan is None:
        raise ConfigError(
            f"The blocks of {type(backbone).__name__} are {type(block).__name__}, which has no table "
            "tensor_parallel, so its layers cannot be sharded. Add one as in nn.block.Block, or leave parallel.tp at 1."
        )
    modules = dict(block.named_modules())
    for path, kind in plan.items():
        if path in modules:
            yield path, kind, modules[path]


def _block_cuts(backbone: Backbone, block: nn.Module) -> Iterator[tuple[str, int | None]]:
    """Yield (parameter inside the block, dimension or None for a partial gradient), without other whole parameters."""
    covered: set[str] = set()
    shared: set[str] = set()
    for path, kind, layer in _planned(backbone, block):
        owner = path.rpartition(".")[0]
        if not hasattr(block.get_submodule(owner), "parallel"):
            raise ConfigError(
                f"{owner} of the blocks of {type(backbone).__name__} is a {type(block.get_submodule(owner)).__name__}, "
                "which has no attribute parallel, so it cannot be sharded. Add one as in nn.mlp.MLP, or leave "
                "parallel.tp at 1."
            )
        shared.add(f"{owner}.")
        extra: Mapping[str, Mapping[str, int | None]] = getattr(layer, "tensor_parallel", {})
        table: dict[str, int | None] = {**_LINEAR.get(kind, {}), **extra.get(kind, {})}
        for leaf, _ in layer.named_parameters():
            name = f"{path}.{leaf}"
            covered.add(name)
            if kind == "partial" or leaf in table:
                yield name, None if kind == "partial" else table[leaf]
            elif leaf != "bias":
                covered.discard(name)
    inside = {n for n, _ in block.named_parameters() if n.startswith(tuple(shared))}
    if unknown := sorted(inside - covered):
        raise ConfigError(
            f"The table tensor_parallel has no entry for {unknown[0]} of a block of {type(backbone).__name__}: "
            "name its layer in that table of the block, or leave parallel.tp at 1."
        )


@torch.no_grad()
def shard_model(model: Model, group: Group) -> TensorParallel:
    """Reduce each cut parameter to this rank's slice, and set the process group of the modules.

    Parameters stay the same objects (tied ones stay tied, ``requires_grad`` stays) and may be on the meta device.
    Adapters must be attached before. A group of one changes nothing.

    Args:
        model: an unsharded model; changed in place, including ``model.tp``.
        group: the ranks that share it; all of them call this with equal models.

    Raises:
        ConfigError: its blocks have no plan. `choose_mesh` has refused sizes that the model cannot have.
        ModelError: the model is sharded already.
    """
    if model.tp is not None:
        raise ModelError(
            f"The model is already sharded over {model.tp.group.size} processes. Build it again to shard it over "
            "others."
        )
    if group.size == 1:
        return TensorParallel(group)
    tp = TensorParallel(group, *cuts_of(model))
    for name, parameter in model.named_parameters():
        if name in tp.cuts:
            parameter.data = tp.take(name, parameter.data).clone(
                memory_format=torch.contiguous_format
            )
            parameter.grad = None
    for block in model.backbone.blocks():
        for path, kind, layer in _planned(model.backbone, block):
            owner: Any = block.get_submodule(path.rpartition(".")[0])
            owner.parallel = group
            if isinstance(layer, nn.Linear):
                layer.out_features, layer.in_features = layer.weight.shape
            if kind == "row" and hasattr(layer, "parallel"):
                layer.parallel = group
    if model.backbone.vocab_size:
        vocab = VocabShard(group, model.backbone.vocab_size)
        model.backbone.vocab = vocab
        if isinstance(model.head, LanguageHead):
            model.head.vocab = vocab
    model.tp = tp
    return tp


@torch.no_grad()
def reduce_partial_gradients(gradients: Mapping[str, Tensor], tp: TensorParallel) -> None:
    """Sum the gradients of ``tp.partial`` over the group, in place and with one all-reduce per dtype and device.

    Args:
        gradients: by parameter name, with the same names on all ranks of the group; gradients of other parameters are
            not changed. The gradients may be equal slices, also after a reduction over other ranks: sums commute.
        tp: the sharding of the model.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for name in sorted(tp.partial & gradients.keys()):
        gradient = gradients[name]
        kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for parts in kinds.values():
        total = all_reduce(torch.cat([part.reshape(-1) for part in parts]), tp.group)
        pieces = torch.split(total, [part.numel() for part in parts])
        for part, summed in zip(parts, pieces, strict=True):
            part.copy_(summed.view_as(part))
