"""A model's weights under their names on disk, and back.

Reading accepts names with and without the body's prefix, the spellings of old BERT files, and extra copies of tied
tensors. What is missing, left over or tied ends up in a ``LoadReport``: nothing stays random without being named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.errors import CheckpointError, ModelError
from pretrain.models.heads import LanguageHead
from pretrain.models.names import (
    ADAPTER_PREFIX,
    Entry,
    LoadReport,
    expand,
    modern_key,
    pack,
    unpack,
)
from pretrain.storage.tensors import LazyTensors

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["disk_state", "disk_view", "entries_of", "load_disk_state"]

_BUFFERS = (
    "position_ids",
    "attn.bias",
    "attn.masked_bias",
    "rotary_emb.inv_freq",
    "token_type_ids",
)


def entries_of(model: Model) -> list[Entry]:
    """Every tensor of the file and the parameters that it holds; those of an adapter lie in a file of their own.

    Raises:
        ModelError: the family's name table forgets a parameter.
    """
    parameters = {
        name: p
        for name, p in model.named_parameters()
        if not name.rpartition(".")[2].startswith(ADAPTER_PREFIX)
    }
    rules = [
        replace(rule, memory=tuple(f"backbone.{m}" for m in rule.memory))
        for rule in model.backbone.names()
    ]
    if model.head is not None and model.head_kind is not None:
        rules += model.backbone.head_names(model.head_kind, _tied(model))
    prefix = model.backbone.prefix_of(model.head_kind)
    entries = expand(rules, len(model.backbone.blocks()), parameters, prefix)
    covered = {name for entry in entries for name in entry.memory}
    if forgotten := sorted(set(parameters) - covered):
        raise ModelError(
            f"The name table of {model.backbone.model_type} has no line for {', '.join(forgotten[:5])}. "
            "Add one to names() or head_names()."
        )
    return entries


def disk_state(model: Model) -> dict[str, Tensor]:
    """All weights under their names on disk: fp32, contiguous, on the CPU; tied tensors once."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in disk_view(model).items()
    }


def disk_view(model: Model) -> LazyTensors:
    """What ``disk_state`` holds, each tensor made when it is asked for: saving needs no second copy of the model.

    A tensor may share memory with a parameter, and need not be contiguous.
    """
    parameters = dict(model.named_parameters())
    entries = {entry.disk: entry for entry in entries_of(model)}
    if not _tied(model) and model.head_kind is not None:
        for disk, memory in model.backbone.copies(model.head_kind, tied=False).items():
            if memory in parameters:
                entries[disk] = Entry(disk, disk, (memory,), transpose=False, body=False)
    layout = {name: pack(entry, parameters, "meta") for name, entry in entries.items()}
    return LazyTensors(layout, lambda name: pack(entries[name], parameters))


@torch.no_grad()
def load_disk_state(model: Model, tensors: Mapping[str, Tensor], *, seed: int = 0) -> LoadReport:
    """Fill the model from tensors under their names on disk; a model on the meta device becomes real.

    Accepted are names with and without the body's prefix, the spellings of old BERT files, and extra copies of
    tied tensors, which are compared. Whether the head is tied is decided by the tensors, not by the config.

    Args:
        model: real or on the meta device.
        tensors: read one at a time, so a lazy mapping costs no second copy of the model.
        seed: for head tensors that are not there and start afresh.

    Raises:
        CheckpointError: a tensor of the body is missing, or one has the wrong shape or type.
    """
    report = LoadReport()
    keys: dict[str, str] = {}
    for key in tensors:
        if modern_key(key) in keys:
            raise CheckpointError(
                f"The file holds {key!r} and {keys[modern_key(key)]!r}, which are one tensor."
            )
        keys[modern_key(key)] = key
    _settle_tying(model, keys, tensors, report)
    entries = entries_of(model)
    places = _places(model, entries)
    parameters = dict(model.named_parameters())
    copies = (
        {} if model.head_kind is None else model.backbone.copies(model.head_kind, tied=_tied(model))
    )
    done: dict[str, str] = {}
    spare: dict[str, str] = {}
    for key, original in keys.items():
        entry = places.get(key)
        if entry is None:
            if key in copies:
                spare[key] = original
            elif key.endswith(_BUFFERS):
                report.ignored.append(original)
            else:
                report.unexpected.append(original)
            continue
        if entry.disk in done:
            raise CheckpointError(
                f"The file holds {original!r} and {done[entry.disk]!r}, which are one tensor."
            )
        done[entry.disk] = original
        _fill(model, entry, tensors[original], parameters)
    for key, original in spare.items():
        for entry in entries:
            if entry.memory == (copies[key],) and entry.disk not in done:
                done[entry.disk] = original
                _fill(model, entry, tensors[original], parameters)
        report.tied.append(original)
    report.loaded = len(done)
    _finish(model, [entry for entry in entries if entry.disk not in done], report, seed)
    return report


def _settle_tying(
    model: Model, keys: Mapping[str, str], tensors: Mapping[str, Tensor], report: LoadReport
) -> None:
    """Untie the head if the file holds a head that differs from the embedding."""
    head = model.head
    if not isinstance(head, LanguageHead) or not head.tied or model.head_kind is None:
        return
    embedding = next(n for n, p in model.named_parameters() if p is head.weight())
    places = _places(model, entries_of(model))
    source = next(
        (k for name, k in keys.items() if name in places and places[name].memory == (embedding,)),
        None,
    )
    for disk, memory in model.backbone.copies(model.head_kind, tied=True).items():
        if memory != embedding or disk not in keys or source is None:
            continue
        if not torch.equal(tensors[keys[disk]], tensors[source]):
            head.untie()
            model.backbone.config = replace(model.backbone.config, tie_embeddings=False)
            report.untied.append(disk)


def _places(model: Model, entries: list[Entry]) -> dict[str, Entry]:
    """Every accepted spelling of a name on disk -> its entry; a tensor's own name wins over another's alias."""
    places = {}
    for entry in entries:
        for prefix in ("", *model.backbone.prefixes) if entry.body else ():
            places[prefix + entry.bare] = entry
    return places | {entry.disk: entry for entry in entries}


def _fill(model: Model, entry: Entry, tensor: Tensor, parameters: Mapping[str, Tensor]) -> None:
    for name, value in unpack(entry, tensor, parameters):
        owner, _, leaf = name.rpartition(".")
        if parameters[name].is_meta:
            grad = parameters[name].requires_grad
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=grad))
        else:
            parameters[name].copy_(value)


def _finish(model: Model, absent: list[Entry], report: LoadReport, seed: int) -> None:
    """Initialise head tensors that the file lacks; refuse if it lacks others."""
    body = [e.disk for e in absent if not e.memory[0].startswith("head.")]
    if body:
        more = f" (and {len(body) - 8} more)" if len(body) > 8 else ""
        raise CheckpointError(
            f"The weights lack {', '.join(body[:8])}{more}, which this {model.backbone.model_type} model needs. The "
            "file is incomplete, or belongs to another architecture than its config.json."
        )
    report.missing = [e.disk for e in absent]
    fresh = {name for e in absent for name in e.memory}
    for name, parameter in list(model.named_parameters()):
        if name in fresh and parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(owner),
                leaf,
                nn.Parameter(torch.empty(parameter.shape, device="cpu")),
            )
    model.init_weights(seed, fresh)
    model.fresh = frozenset(fresh)


def _tied(model: Model) -> bool:
    return not isinstance(model.head, LanguageHead) or model.head.tied
