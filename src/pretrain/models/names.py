"""Mapping between parameters in memory and tensors on disk: renaming, fusing and transposing.

A family lists its ``Name`` rules once; reading and writing use the same table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.nn.layout import ShardSlice
from pretrain.utils.tensors import LazyTensors

__all__ = [
    "ADAPTER_PREFIX",
    "DiskMapping",
    "Entry",
    "LoadReport",
    "Name",
    "Shapes",
    "check_stored",
    "expand",
    "from_disk",
    "modern_key",
    "renamed",
    "slice_from_disk",
    "stored_dtype",
    "to_disk",
]

# Parameter name -> its full shape.
Shapes = Mapping[str, tuple[int, ...]]

# Prefix of the names of a low-rank adapter's parameters inside the layers that it adapts.
ADAPTER_PREFIX = "lora_"


@dataclass(frozen=True)
class Name:
    """One rule, for a tensor or for a module with all of its own parameters and persistent buffers.

    ``{n}`` stands for the layer index. What a module holds (``.weight``, ``.bias``, ``.running_mean``) keeps its name.

    Attributes:
        disk: name on disk, without the body's prefix.
        memory: names in memory; several are concatenated along their first dimension on disk.
        transpose: matrices are stored transposed (GPT-2's Conv1D).
        body: the body's prefix (``bert.``, ``model.``) precedes the name.
        scalar: a tensor of one element in memory, which can be sharded, has no dimension on disk.
    """

    disk: str
    memory: tuple[str, ...]
    transpose: bool = False
    body: bool = True
    scalar: bool = False


def renamed(
    pairs: Mapping[str, str], disk: str = "", memory: str = "", *, body: bool = True
) -> list[Name]:
    """Return one rule for each pair of names on disk and in memory, each behind its prefix."""
    return [Name(disk + there, (memory + here,), body=body) for there, here in pairs.items()]


@dataclass(frozen=True)
class Entry:
    """A rule applied to one tensor: its name on disk with and without prefix, and the parameters that it holds.

    ``dtype`` is the one on disk: fp32, or that of a buffer of integers. The tensor on disk is that in memory times
    ``unit``, a power of two.
    """

    disk: str
    bare: str
    memory: tuple[str, ...]
    transpose: bool
    body: bool
    dtype: torch.dtype = torch.float32
    scalar: bool = False
    unit: float = 1.0


@dataclass
class LoadReport:
    """Result of loading a file, by tensor.

    Attributes:
        loaded: number of tensors that were read into the model.
        missing: head tensors that the file lacks; they were newly initialised.
        unexpected: tensors of the file that have no parameter in the model.
        tied: additional copies of a shared tensor; those of the embedding were compared and are equal.
        untied: heads that differ from the embedding in the file although its config ties them.
        ignored: buffers of the file that this package computes itself.
    """

    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors loaded"]
        if self.missing:
            parts.append(f"new and untrained: {_some(self.missing)}")
        if self.unexpected:
            parts.append(f"not used: {_some(self.unexpected)}")
        if self.untied:
            parts.append(f"untied, because it differs from the embedding: {_some(self.untied)}")
        if self.tied:
            parts.append(f"{len(self.tied)} tied copies equal")
        return "; ".join(parts)


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def expand(
    names: Iterable[Name], layers: int, tensors: Mapping[str, Tensor], prefix: str
) -> list[Entry]:
    """Apply the rules to the parameters and buffers that exist."""
    leaves: dict[str, list[str]] = {}
    for name in tensors:
        owner, _, leaf = name.rpartition(".")
        leaves.setdefault(owner, []).append(f".{leaf}")
    entries = []
    for rule in names:
        for n in range(layers) if "{n}" in rule.disk else (0,):
            memory = tuple(m.replace("{n}", str(n)) for m in rule.memory)
            disk = rule.disk.replace("{n}", str(n))
            own = [""] if memory[0] in tensors else leaves.get(memory[0], [])
            for suffix in own:
                bare = disk + suffix
                full = prefix + bare if rule.body else bare
                dtype = stored_dtype(tensors[memory[0] + suffix])
                held = tuple(m + suffix for m in memory)
                entries.append(
                    Entry(full, bare, held, rule.transpose, rule.body, dtype, rule.scalar)
                )
    return entries


def stored_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor on disk: fp32, or its own if it is not floating-point."""
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


@dataclass(frozen=True)
class DiskMapping:
    """Mapping from parameters to the tensors of a file, without the parameters themselves.

    Attributes:
        sources: name on disk -> the parameters that it is built from.
        make: name on disk, full parameters by name, device -> the tensor in its dtype on disk.
    """

    sources: Mapping[str, tuple[str, ...]]
    make: Callable[[str, Mapping[str, Tensor], str], Tensor]

    def layout(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return name on disk -> a tensor of its shape and dtype on the meta device."""
        return {name: self.make(name, parameters, "meta") for name in self.sources}

    def view(self, parameters: Mapping[str, Tensor]) -> LazyTensors:
        """Return the tensors of the file, each created on access; it may share memory with a parameter."""
        return LazyTensors(self.layout(parameters), lambda name: self.make(name, parameters, "cpu"))


def to_disk(entry: Entry, parameters: Mapping[str, Tensor], device: str = "cpu") -> Tensor:
    """Return the tensor of a file that an entry describes; a view of the parameter if nothing is converted or fused."""
    parts = [parameters[name].detach().to(device, entry.dtype) for name in entry.memory]
    if entry.unit != 1.0:
        parts = [part * entry.unit for part in parts]
    tensor = parts[0]
    if len(parts) > 1 and tensor.is_meta:
        # torch would load its compiler to join them, which takes a second.
        tensor = tensor.new_empty((sum(map(len, parts)), *tensor.shape[1:]))
    elif len(parts) > 1:
        tensor = torch.cat(parts)
    if entry.scalar:
        return tensor.reshape(())
    return tensor.T if entry.transpose and tensor.ndim == 2 else tensor


def from_disk(entry: Entry, tensor: Tensor, shapes: Shapes) -> list[tuple[str, Tensor]]:
    """Return the parameters or buffers that a tensor of the file holds, in their dtype on disk.

    They may share memory with the tensor, and need not be contiguous.

    Raises:
        CheckpointError: the shape or the dtype does not match the model.
    """
    flip = check_stored(entry, tensor.dtype, tuple(tensor.shape), shapes)
    rows = [shapes[name][0] for name in entry.memory if shapes[name]]
    tensor = tensor.reshape(1) if entry.scalar else tensor.T if flip else tensor
    if entry.unit != 1.0:
        tensor = tensor.to(entry.dtype) / entry.unit
    parts = torch.split(tensor, rows) if len(entry.memory) > 1 else (tensor,)
    return [(name, part.to(entry.dtype)) for name, part in zip(entry.memory, parts, strict=True)]


def slice_from_disk(
    entry: Entry,
    name: str,
    region: ShardSlice,
    shapes: Shapes,
    read: Callable[[ShardSlice], Tensor],
) -> Tensor:
    """Return one slice of one parameter from a tensor of the file that `check_stored` has accepted.

    Args:
        entry: entry of the tensor.
        name: the parameter, one of ``entry.memory``.
        region: slice of the full parameter.
        shapes: shapes of all parameters.
        read: reads a slice of the tensor as it is stored.

    Returns:
        The slice in its dtype on disk, contiguous.
    """
    start, shape = region.start, region.shape
    if entry.unit != 1.0:
        part = slice_from_disk(replace(entry, unit=1.0), name, region, shapes, read)
        return part / entry.unit
    if entry.scalar:
        whole = read(ShardSlice((), ())).reshape(1).to(entry.dtype)
        return whole[start[0] : start[0] + shape[0]].contiguous()
    if start:
        before = entry.memory[: entry.memory.index(name)]
        start = (start[0] + sum(shapes[other][0] for other in before), *start[1:])
    if entry.transpose and len(shape) == 2:
        return read(ShardSlice(start[::-1], shape[::-1])).T.to(entry.dtype).contiguous()
    return read(ShardSlice(start, shape)).to(entry.dtype).contiguous()


def check_stored(entry: Entry, dtype: torch.dtype, shape: tuple[int, ...], shapes: Shapes) -> bool:
    """Return whether a tensor is stored transposed, and check its shape and dtype.

    Raises:
        CheckpointError: the shape or the dtype does not match the model.
    """
    fits = dtype.is_floating_point if entry.dtype.is_floating_point else dtype == entry.dtype
    if not fits:
        wanted = "floating-point" if entry.dtype.is_floating_point else str(entry.dtype)
        raise CheckpointError(f"Tensor {entry.disk!r} has the type {dtype}; it must be {wanted}.")
    flip = entry.transpose and len(shape) == 2
    parts = [tuple(shapes[name]) for name in entry.memory]
    expected = parts[0]
    if len(parts) > 1:
        expected = (sum(part[0] for part in parts), *parts[0][1:])
    if flip:
        expected = expected[::-1]
    if entry.scalar:
        expected = ()
    if shape != expected:
        raise CheckpointError(
            f"Tensor {entry.disk!r} has the shape {shape}, but the model needs {expected}. The config "
            "and the weights do not belong together."
        )
    return flip


def modern_key(key: str) -> str:
    """Return the usual spelling of a tensor name.

    Old BERT files use ``LayerNorm.gamma`` and ``LayerNorm.beta``. transformers 5 saves the decoder of ViT-MAE as
    ``decoder_encoder.layer``, which no other version reads. Modules that torch has compiled, sharded or wrapped for
    recomputation have a name of the wrapper in theirs.
    """
    for pattern, usual in _SPELLINGS:
        key = re.sub(pattern, usual, key)
    return key


_SPELLINGS = (
    (r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)", ""),
    (r"^\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
)
