"""Conversion between a model's parameters and persistent buffers and the tensors of its files.

Reading accepts names with and without the body's prefix, the spellings of old BERT files, and additional copies of tied
tensors. Missing, unexpected and tied tensors are listed in a ``LoadReport``: no parameter stays random unreported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.errors import CheckpointError, ModelError
from pretrain.models.heads import LanguageHead
from pretrain.models.names import (
    ADAPTER_PREFIX,
    DiskMapping,
    Entry,
    LoadReport,
    expand,
    from_disk,
    modern_key,
    to_disk,
)
from pretrain.nn.buffers import stored_tensors
from pretrain.utils.tensors import LazyTensors, in_huge_pages

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "copies_of",
    "disk_mapping",
    "disk_state",
    "disk_view",
    "entries_of",
    "heads_apart",
    "init_missing",
    "load_disk_state",
    "match_disk_state",
    "match_tying",
    "modern_keys",
    "report_line",
    "tied_embedding",
    "untie",
]

_PARALLEL = "module."
_BUFFERS = (
    "position_ids",
    "attn.bias",
    "attn.masked_bias",
    "rotary_emb.inv_freq",
    "token_type_ids",
)
_SHOWN = 5  # tensor names listed in the report line


def entries_of(model: Model) -> list[Entry]:
    """Return every tensor of the file and the parameters that it holds, without those of an adapter (a separate file).

    Raises:
        ModelError: the family's name table lacks a parameter or a persistent buffer.
    """
    tensors = {
        name: tensor
        for name, tensor in stored_tensors(model).items()
        if not name.rpartition(".")[2].startswith(ADAPTER_PREFIX)
    }
    rules = [
        replace(rule, memory=tuple(f"backbone.{m}" for m in rule.memory))
        for rule in model.backbone.names()
    ]
    if model.head is not None and model.head_kind is not None:
        rules += model.backbone.head_names(model.head_kind, _tied(model))
    prefix = model.backbone.prefix_of(model.head_kind)
    entries = expand(rules, len(model.backbone.blocks()), tensors, prefix)
    covered = {name for entry in entries for name in entry.memory}
    unit = getattr(model.head, "unit", 1.0)
    if unit != 1.0:
        entries = [
            replace(entry, unit=unit) if entry.memory[0].startswith("head.classifier.") else entry
            for entry in entries
        ]
    if forgotten := sorted(set(tensors) - covered):
        raise ModelError(
            f"The family {model.backbone.model_type} has no name on disk for {', '.join(forgotten[:5])}. "
            "Add a rule for it to names() or head_names()."
        )
    return entries


def disk_state(model: Model) -> dict[str, Tensor]:
    """Return all weights under their names on disk: fp32, contiguous, on the CPU; tied tensors once."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in disk_view(model).items()
    }


def disk_view(model: Model) -> LazyTensors:
    """Return ``disk_state`` as a lazy mapping: saving needs no second copy of the model.

    A tensor may share memory with a parameter, and need not be contiguous.
    """
    return disk_mapping(model).view(stored_tensors(model))


def disk_mapping(model: Model) -> DiskMapping:
    """Return the tensors of the files and the parameters or buffers that each is built from."""
    parameters = {name for name, _ in model.named_parameters()}
    entries = {entry.disk: entry for entry in entries_of(model)}
    if not _tied(model):
        for disk, memory in copies_of(model).items():
            if memory in parameters:
                entries[disk] = Entry(disk, disk, (memory,), transpose=False, body=False)
    return DiskMapping(
        {name: entry.memory for name, entry in entries.items()},
        lambda name, full, device: to_disk(entries[name], full, device),
    )


@torch.no_grad()
def load_disk_state(
    model: Model, tensors: Mapping[str, Tensor], *, seed: int = 0, adopt: bool = False
) -> LoadReport:
    """Fill the model from tensors under their names on disk; parameters on the meta device are allocated.

    Names with and without the body's prefix, the spellings of old BERT files, and additional copies of tied tensors are
    accepted. The tensors, not the config, decide whether the head is tied: a head that differs from the embedding is
    untied.

    Args:
        model: materialised or on the meta device.
        tensors: read one at a time, so a lazy mapping costs no second copy of the model.
        seed: seed of head tensors that the file lacks.
        adopt: let a tensor itself become the parameter where nothing has to be converted or split; the caller has no
            other use for it.

    Raises:
        CheckpointError: a tensor of the body is missing, or one has the wrong shape or dtype.
    """

    def same(one: str, two: str) -> bool:
        return torch.equal(tensors[one], tensors[two])

    untied = match_tying(model, modern_keys(model, tensors), same)
    there = stored_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in there.items()}

    def fill(entry: Entry, key: str) -> None:
        for name, value in from_disk(entry, tensors[key], shapes):
            if not there[name].is_meta:
                there[name].copy_(value)
            elif adopt and value.is_contiguous() and len(entry.memory) == 1:
                _make_real(model, name, value)
            else:
                copy = torch.empty_like(value, memory_format=torch.contiguous_format)
                _make_real(model, name, in_huge_pages(copy).copy_(value))

    report, fresh = match_disk_state(model, tensors, fill)
    report.untied = untied
    model.fresh = fresh
    init_missing(model, seed)
    return report


def init_missing(model: Model, seed: int) -> None:
    """Initialise what is in ``model.fresh``, which no file holds; parameters on the meta device are allocated."""
    for name, parameter in list(model.named_parameters()):
        if name in model.fresh and parameter.is_meta:
            _make_real(model, name, torch.empty(parameter.shape, device="cpu"))
    model.init_weights(seed, model.fresh)


def modern_keys(model: Model, names: Iterable[str]) -> dict[str, str]:
    """Return the current spelling of every tensor name of a file -> its spelling in the file.

    DistributedDataParallel and DataParallel put ``module.`` before all names; it is left out. A name that the model has
    itself stays as it is, also with that of a wrapper in it.

    Raises:
        CheckpointError: two names mean the same tensor.
    """
    usual = {key: modern_key(key) for key in names}
    parallel = bool(usual) and all(key.startswith(_PARALLEL) for key in usual.values())
    if parallel or any(key != new for key, new in usual.items()):
        own = _places(model, entries_of(model)).keys() | copies_of(model).keys()
        usual = {key: key if key in own else new for key, new in usual.items()}
        if parallel and own.isdisjoint(usual.values()):
            usual = {key: modern_key(new.removeprefix(_PARALLEL)) for key, new in usual.items()}
    keys: dict[str, str] = {}
    for key, new in usual.items():
        if new in keys:
            raise CheckpointError(
                f"The weights hold both {key!r} and {keys[new]!r}, which are two names of one tensor. Keep only one of "
                "them."
            )
        keys[new] = key
    return keys


def match_disk_state(
    model: Model, names: Collection[str], fill: Callable[[Entry, str], None]
) -> tuple[LoadReport, frozenset[str]]:
    """Match the tensors of a file, in any accepted spelling, to the entries of the model.

    Args:
        model: its head is already tied or untied as in the file, see ``match_tying``. Its parameters are not changed.
        names: names of the tensors in the file.
        fill: called once for each matched tensor, with the entry and the name in the file.

    Returns:
        The report, and the parameters that the file lacks (only those of a head may be missing).

    Raises:
        CheckpointError: a tensor of the body is missing, or any tensor occurs twice.
    """
    report = LoadReport()
    entries = entries_of(model)
    places = _places(model, entries)
    copies = copies_of(model)
    done: dict[str, str] = {}
    spare: dict[str, str] = {}
    for key, original in modern_keys(model, names).items():
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
                f"The weights hold both {original!r} and {done[entry.disk]!r}, which are two names of one tensor. "
                "Keep only one of them."
            )
        done[entry.disk] = original
    for key, original in spare.items():
        for entry in entries:
            # The second name of a tensor of a tied head is the one that transformers computes with.
            if entry.memory == (copies[key],) and (entry.disk not in done or _tied(model)):
                done[entry.disk] = original
        report.tied.append(original)
    for entry in entries:
        if entry.disk in done:
            fill(entry, done[entry.disk])
    report.loaded = len(done)
    absent = [entry for entry in entries if entry.disk not in done]
    _refuse_incomplete(model, absent, report.unexpected)
    report.missing = [entry.disk for entry in absent]
    return report, frozenset(name for entry in absent for name in entry.memory)


def match_tying(
    model: Model, keys: Mapping[str, str], same: Callable[[str, str], bool]
) -> list[str]:
    """Untie the head if the file holds a head that differs from the embedding.

    Args:
        model: may gain a parameter, so call this before it is sharded or wrapped.
        keys: see ``modern_keys``.
        same: whether two tensors of the file are equal.

    Returns:
        The names of the head on disk; empty if nothing was changed.
    """
    apart = heads_apart(model, keys, same)
    if apart:
        untie(model)
    return apart


def untie(model: Model) -> None:
    """Give a language head its own matrix, a copy of the embedding's; the config says so, too."""
    head: Any = model.head
    head.untie()
    model.backbone.config = replace(model.backbone.config, tie_embeddings=False)


def heads_apart(
    model: Model, keys: Mapping[str, str], same: Callable[[str, str], bool]
) -> list[str]:
    """Return the names on disk of a head that the model ties and the file does not; see ``match_tying``."""
    if (embedding := tied_embedding(model)) is None:
        return []
    places = _places(model, entries_of(model))
    named = (
        key for name, key in keys.items() if name in places and places[name].memory == (embedding,)
    )
    if (source := next(named, None)) is None:
        return []
    second = [disk for disk, memory in copies_of(model).items() if memory == embedding]
    return [disk for disk in second if disk in keys and not same(keys[disk], source)]


def tied_embedding(model: Model) -> str | None:
    """Return the token embedding that a language head shares, by its name in memory; None if it shares none."""
    head = model.head
    if not isinstance(head, LanguageHead) or not head.tied or model.head_kind is None:
        return None
    return next(name for name, value in model.named_parameters() if value is head.weight())


def copies_of(model: Model) -> dict[str, str]:
    """Return the further names on disk of tensors of the head -> the parameter, see ``Backbone.copies``."""
    kind = model.head_kind
    return {} if kind is None else model.backbone.copies(kind, tied=_tied(model))


def _places(model: Model, entries: list[Entry]) -> dict[str, Entry]:
    """Return every accepted spelling of a name on disk -> its entry; a tensor's own name precedes another's alias."""
    places = {}
    for entry in entries:
        for prefix in ("", model.backbone.prefix, *model.backbone.prefixes) if entry.body else ():
            places[prefix + entry.bare] = entry
    return places | {entry.disk: entry for entry in entries}


def _make_real(model: Model, name: str, value: Tensor) -> None:
    """Replace a parameter on the meta device by one with the given value."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    grad = getattr(module, leaf).requires_grad
    setattr(module, leaf, nn.Parameter(value, requires_grad=grad))


def _refuse_incomplete(model: Model, absent: list[Entry], unexpected: list[str]) -> None:
    """Raise if a tensor of the body is absent; those of a head may be. What the file holds instead is named."""
    body = [e.disk for e in absent if not e.memory[0].startswith("head.")]
    if body:
        more = f" (and {len(body) - 8} more)" if len(body) > 8 else ""
        raise CheckpointError(
            f"The weights lack {', '.join(body[:8])}{more}, which this {model.backbone.model_type} model needs"
            + f", and hold {', '.join(unexpected[:3])}, which it has no place for"
            * bool(unexpected)
            + ". The file is incomplete, has other names than transformers writes, or belongs to another architecture "
            "than its config.json."
        )


def _tied(model: Model) -> bool:
    return not isinstance(model.head, LanguageHead) or model.head.tied


def report_line(model: Model, config: Mapping[str, Any], count: int, report: Any) -> str:
    """Return the report line: tensors read, missing (newly initialised) and not used."""
    parts = [f"{config.get('model_type')}: {count} tensors"]
    for label, names in (("missing", report.missing), ("unexpected", report.unexpected)):
        shown = sorted(names)[:_SHOWN] + ["..."] * (len(names) > _SHOWN)
        fresh = "newly initialised: " if label == "missing" else "not used: "
        parts.append(f"{len(names)} {label}" + (f" ({fresh}{', '.join(shown)})" if names else ""))
    if report.untied:
        parts.append("head untied, because its weights differ from the embedding")
    elif getattr(model.head, "tied", False):
        parts.append("head tied")
    if model.remarks:
        parts.append(f"without effect in config.json: {', '.join(model.remarks)}")
    return ", ".join(parts)
