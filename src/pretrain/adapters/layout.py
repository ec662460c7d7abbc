"""Conversion of adapters to and from PEFT's files: tensor names and adapter_config.json.

``base_model.model.<module>.lora_A.weight`` is (r, I), ``.lora_B.weight`` (O, r), ``.lora_magnitude_vector`` (O,);
a fully trained module is stored under its own name after the same prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.adapters.attach import (
    Adapter,
    Site,
    attach,
    matches,
    sites_of,
)
from pretrain.adapters.config import PeftSettings, pattern_value, plain
from pretrain.errors import CheckpointError
from pretrain.models.names import Entry, Packing, Shapes, pack, unpack

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["TASKS", "adapter_config", "adapter_packing", "attach_stored", "fill", "head_of"]

PREFIX = "base_model.model."
_A, _B, _M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# transformers also uses these names for poolers and transforms, even where this package's model has none.
_TOO_GENERAL = {"dense"}
# Kind of head -> PEFT's task type; PEFT has none for masked language models.
TASKS = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    None: "FEATURE_EXTRACTION",
}


# ------------------------------------------------------------------------------------------------ writing


def adapter_packing(model: Model) -> Packing:
    """Return the tensors of adapter_model.safetensors and the parameters that each is made of."""
    adapter: Adapter = model.adapter
    parts: dict[str, tuple[str, ...]] = {}
    for module, (site, _, _) in adapter.sites.items():
        parts[PREFIX + module + _A] = (f"{site.layers[0]}.lora_A",)
        parts[PREFIX + module + _B] = tuple(f"{layer}.lora_B" for layer in site.layers)
        if adapter.config.dora:
            parts[PREFIX + module + _M] = tuple(f"{layer}.lora_magnitude" for layer in site.layers)
    whole = {PREFIX + entry.disk: entry for entry in _full_entries(model)}

    def make(name: str, full: Mapping[str, Tensor], device: str) -> Tensor:
        if name in whole:
            return pack(whole[name], full, device)
        return _cat((full[part] for part in parts[name]), device)

    return Packing({**parts, **{name: entry.memory for name, entry in whole.items()}}, make)


def _cat(parts: Iterable[Tensor], device: str) -> Tensor:
    tensors = [part.detach().to(device, torch.float32) for part in parts]
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _full_entries(model: Model) -> list[Entry]:
    wanted = set(model.adapter.full)
    return [entry for entry in model.entries() if entry.disk in wanted]


def adapter_config(model: Model) -> dict[str, Any]:
    """Return the content of adapter_config.json. The base is named so that peft finds it from any working directory."""
    adapter: Adapter = model.adapter
    config = adapter.config
    ranks, alphas = {}, {}
    for module, (_, r, alpha) in adapter.sites.items():
        if r != config.r:
            ranks[module] = r
        if alpha != config.full_alpha:
            alphas[module] = plain(alpha)
    return config.to_peft() | {
        "base_model_name_or_path": adapter.base,
        "task_type": TASKS.get(model.head_kind),
        "auto_mapping": _class_of(model) if model.head_kind not in TASKS else None,
        "target_modules": target_names(set(adapter.sites), model),
        "modules_to_save": saved_names(model) or None,
        "fan_in_fan_out": any(site.transpose for site, _, _ in adapter.sites.values()),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _class_of(model: Model) -> dict[str, str]:
    """Return the transformers class of the base, by which peft opens an adapter without a PEFT task type."""
    family = model.backbone.model_type
    return {
        "base_model_class": str(model.backbone.architectures[model.head_kind]),
        "parent_library": f"transformers.models.{family}.modeling_{family}",
    }


def target_names(chosen: set[str], model: Model) -> list[str]:
    """Return the shortest suffixes of module names that match the chosen modules and no others of the model."""
    others = {entry.disk.rpartition(".")[0] for entry in model.entries()} - chosen
    others = {name for name in others if name not in _inside_saved(model)}
    names: list[str] = []
    for module in sorted(chosen):
        if matches(module, names):
            continue
        parts = module.split(".")
        for count in range(2 if parts[-1] in _TOO_GENERAL else 1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if not any(matches(other, [ending]) for other in others):
                names.append(ending)
                break
    return sorted(names)


def _inside_saved(model: Model) -> set[str]:
    """Return the names of the fully trained modules, which PEFT never adapts."""
    return {name.rpartition(".")[0] for name in model.adapter.full}


def saved_names(model: Model) -> list[str]:
    """Return the names of the fully trained modules; a top-level module of the head counts as one if all of it is."""
    full = set(model.adapter.full)
    names: dict[str, None] = {}
    for entry in _full_entries(model):
        module, top = entry.disk.rpartition(".")[0], entry.disk.split(".")[0]
        whole = not entry.body and all(
            other.disk in full for other in model.entries() if other.disk.startswith(top + ".")
        )
        names[top if whole else module] = None
    return list(names)


# ------------------------------------------------------------------------------------------------ reading


def head_of(
    settings: PeftSettings, tensors: Mapping[str, Tensor], where: object
) -> tuple[str | None, int]:
    """Return the kind of head that an adapter written by peft was trained with, and its number of classes.

    Returns:
        ``"none"`` as the kind for a body without a head; (None, 0) if the file has no task type, so that the base
        decides.

    Raises:
        CheckpointError: the task type is not supported.
    """
    if settings.task is None:
        return None, 0
    kind = next((kind for kind, task in TASKS.items() if task == settings.task), "?")
    if kind == "?":
        raise CheckpointError(
            f"{where}: 'task_type' is {settings.task[:40]!r}, which no model of this package has."
        )
    classes = 0
    for name in ("score", "classifier", "classifier.out_proj"):
        found = tensors.get(f"{PREFIX}{name}.weight")
        if found is not None and found.ndim == 2:
            classes = found.shape[0]
    return ("none" if kind is None else kind), classes


def attach_stored(
    model: Model,
    settings: PeftSettings,
    tensors: Mapping[str, Tensor],
    where: object,
    *,
    strict: bool = True,
) -> list[str]:
    """Attach a stored adapter to a model that has its base weights.

    Args:
        model: a materialised model without an adapter.
        settings: from adapter_config.json.
        tensors: from adapter_model.safetensors.
        where: file name for error messages.
        strict: raise an error for unexpected tensors; otherwise fully trained modules of another head are left out.

    Returns:
        Names of the unexpected tensors.

    Raises:
        CheckpointError: a tensor is unexpected, has the wrong shape, or lacks its counterpart; the first one is named.
    """
    names = _spellings(model)
    sites = _stored_sites(model, settings, tensors, where)
    entries = {entry.disk: entry for entry in _entries_after_untying(model, tensors)}
    full = {}
    unused = []
    for key in tensors:
        bare = _bare_key(key, where)
        if ".lora_" in bare:
            continue
        module, _, leaf = bare.rpartition(".")
        disk = f"{names.get(module, module)}.{leaf}"
        if disk in entries:
            full[disk] = entries[disk]
        else:
            unused.append(key)
    if unused and strict:
        raise CheckpointError(
            f"{where} holds {unused[0]!r}, for which this {model.backbone.model_type} model with "
            f"{'no' if model.head_kind is None else model.head_kind} head has no place."
        )
    attach(model, settings.lora, sites, full.values())
    known_keys = {key: tensor for key, tensor in tensors.items() if key not in unused}
    values = fill(model, known_keys, where)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    model.fresh = model.fresh - set(values)
    for entry in model.entries():  # newly initialised tensors must be trained
        if model.fresh.intersection(entry.memory):
            model.adapter.full += (entry.disk,)
            for name in entry.memory:
                parameters[name].requires_grad_(True)
    return unused


def _stored_sites(
    model: Model, settings: PeftSettings, tensors: Mapping[str, Tensor], where: object
) -> dict[str, tuple[Site, int, float]]:
    """Return the adapted modules of a file with rank and alpha, determined from its lora_A tensors."""
    names, known = _spellings(model), sites_of(model)
    sites = {}
    for key, tensor in tensors.items():
        if not key.endswith(_A):
            continue
        given = _bare_key(key, where).removesuffix(_A)
        module = names.get(given, "")
        if module not in known:
            raise CheckpointError(
                f"{where} adapts {given!r}, which is no linear layer of this {model.backbone.model_type} model. The "
                "adapter was trained on another base, or on a part that this model lacks."
            )
        wanted = pattern_value(settings.ranks, given, settings.lora.r)
        r = tensor.shape[0] if tensor.ndim == 2 else 0
        if r != wanted or r < 1:
            raise CheckpointError(
                f"{where}: {key!r} has the shape {tuple(tensor.shape)}, so rank {r}, and adapter_config.json says "
                f"{wanted:g}."
            )
        alpha = pattern_value(settings.alphas, given, settings.lora.full_alpha)
        sites[module] = (known[module], r, alpha)
    if not sites:
        raise CheckpointError(f"{where} holds no lora_A tensor: it adapts nothing.")
    return sites


def _entries_after_untying(model: Model, tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Return the entries of the model, after untying a head that the adapter stores separately from the embedding."""
    head: Any = model.head
    if model.head_kind == "causal-lm" and head.tied and f"{PREFIX}lm_head.weight" in tensors:
        head.untie()
    return model.entries()


def _bare_key(key: str, where: object) -> str:
    if not key.startswith(PREFIX):
        raise CheckpointError(
            f"{where}: the tensor {key[:80]!r} does not begin with {PREFIX!r}; it is no PEFT adapter of a whole model."
        )
    return key.removeprefix(PREFIX)


def _spellings(model: Model) -> dict[str, str]:
    """Return module name with any accepted prefix -> its name in this model.

    The prefixes differ if the body was trained with another head.
    """
    found: dict[str, str] = {}
    for entry in model.entries():
        own, bare = entry.disk.rpartition(".")[0], entry.bare.rpartition(".")[0]
        if entry.body:
            for prefix in ("", *model.backbone.prefixes):
                found.setdefault(prefix + bare, own)
    return found | {
        name: name for name in (entry.disk.rpartition(".")[0] for entry in model.entries())
    }


def fill(
    model: Model, tensors: Mapping[str, Tensor], where: object, shapes: Shapes | None = None
) -> dict[str, Tensor]:
    """Return parameter name -> value for an adapted model, given the tensors of its file.

    Args:
        model: a model with an adapter.
        tensors: tensors by their names in the file.
        where: file name for error messages.
        shapes: full shapes of the parameters, if the parameters of the model are sharded.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or has the wrong shape or type.
    """
    adapter: Adapter = model.adapter
    names = _spellings(model)
    given: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _bare_key(key, where)
        ending = next((e for e in (_A, _B, _M + ".weight", _M) if name.endswith(e)), None)
        if ending is None:
            module, _, leaf = name.rpartition(".")
            name = f"{names.get(module, module)}.{leaf}"
        else:
            module = name.removesuffix(ending)
            name = names.get(module, module) + ending.removesuffix(
                ".weight" if "vec" in ending else ""
            )
        if name in given:
            raise CheckpointError(f"{where}: {key!r} and another tensor are one and the same.")
        given[name] = tensor
    values: dict[str, Tensor] = {}
    shapes = shapes or {name: tuple(p.shape) for name, p in model.named_parameters()}
    for module, (site, r, _) in adapter.sites.items():
        rows = [shapes[f"{layer}.lora_B"][0] for layer in site.layers]
        a = _take(given, module + _A, (r, shapes[f"{site.layers[0]}.lora_A"][1]), where)
        values[f"{site.layers[0]}.lora_A"] = a
        b = _take(given, module + _B, (sum(rows), r), where)
        parts = {"lora_B": torch.split(b, rows)}
        if adapter.config.dora:
            magnitude = _take(given, module + _M, (sum(rows),), where)
            parts["lora_magnitude"] = torch.split(magnitude, rows)
        for leaf, pieces in parts.items():
            for name, piece in zip(site.layers, pieces, strict=True):
                values[f"{name}.{leaf}"] = piece
    for entry in _full_entries(model):
        if entry.disk not in given:
            raise CheckpointError(f"{where} lacks {PREFIX + entry.disk!r}; the file is incomplete.")
        values.update(unpack(entry, given.pop(entry.disk), shapes))
    if given:
        raise CheckpointError(
            f"{where} holds {PREFIX + min(given)!r}, for which the model's adapter has no place."
        )
    return values


def _take(given: dict[str, Tensor], name: str, shape: tuple[int, ...], where: object) -> Tensor:
    tensor = given.pop(name, None)
    if tensor is None:
        raise CheckpointError(f"{where} lacks {PREFIX + name!r}; the file is incomplete.")
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise CheckpointError(
            f"{where}: {PREFIX + name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, and this model needs floats "
            f"of shape {shape}. The adapter was trained on another base."
        )
    return tensor.to(torch.float32)
