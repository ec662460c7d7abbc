"""Adapters in PEFT's files: adapter_config.json, and the names of the tensors of adapter_model.safetensors.

The files are untrusted input: types and bounds are checked, unsupported settings are refused by name, and no string in
them is used as a regular expression.

Modules have the names that they have in the memory of transformers, where peft finds them. For almost all families
these are the names in the files of the base; where transformers 5 has others, both are read.

``base_model.model.<module>.lora_A.weight`` is (r, I), ``.lora_B.weight`` (O, r), ``.lora_magnitude_vector`` (O,);
a fully trained module is stored under its own name after the same prefix.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.config.spelling import either
from pretrain.errors import CheckpointError, ConfigError
from pretrain.lora.attach import (
    Adapter,
    Site,
    attach,
    matches,
    sites_of,
    within,
)
from pretrain.lora.config import MODULE, LoraConfig, is_number
from pretrain.models.names import DiskMapping, Entry, Shapes, from_disk, modern_key, to_disk
from pretrain.models.state import copies_of, tied_embedding, untie
from pretrain.utils.files import note
from pretrain.utils.hub_names import hub_name

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "TASKS",
    "PeftSettings",
    "adapter_config",
    "adapter_packing",
    "attach_stored",
    "fill",
    "from_peft",
    "head_of",
    "stored_names",
]

PREFIX = "base_model.model."
_TEXT_LIMIT = 4096
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


# ------------------------------------------------------------------------------------------------ names


def peft_names(model: Model) -> dict[str, str]:
    """Return the name in peft's files of every module that has another one in the files of the base."""
    found = {}
    table = model.backbone.modules_of_peft
    for entry in model.entries() if table else ():
        bare, module = entry.bare.rpartition(".")[0], entry.disk.rpartition(".")[0]
        number = re.search(r"\.(\d+)\.", bare)
        if number is None or not entry.body:
            continue
        rule = table.get(f"{bare[: number.start()]}.{{n}}.{bare[number.end() :]}")
        if rule is not None:
            found[module] = module.removesuffix(bare) + rule.replace("{n}", number[1])
    return found


# ------------------------------------------------------------------------------------------------ writing


def adapter_packing(model: Model) -> DiskMapping:
    """Return the tensors of adapter_model.safetensors and the parameters that each is made of."""
    adapter: Adapter = model.adapter
    parts: dict[str, tuple[str, ...]] = {}
    names = peft_names(model)
    for module, (site, _, _) in adapter.sites.items():
        module = names.get(module, module)
        parts[PREFIX + module + _A] = (f"{site.layers[0]}.lora_A",)
        parts[PREFIX + module + _B] = tuple(f"{layer}.lora_B" for layer in site.layers)
        if adapter.config.dora:
            parts[PREFIX + module + _M] = tuple(f"{layer}.lora_magnitude" for layer in site.layers)
    whole = {}
    for entry in _full_entries(model):
        module, _, leaf = entry.disk.rpartition(".")
        whole[f"{PREFIX}{names.get(module, module)}.{leaf}"] = entry

    def make(name: str, full: Mapping[str, Tensor], device: str) -> Tensor:
        if name in whole:
            return to_disk(whole[name], full, device)
        tensors = [full[part].detach().to(device, torch.float32) for part in parts[name]]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    return DiskMapping({**parts, **{name: entry.memory for name, entry in whole.items()}}, make)


def _full_entries(model: Model) -> list[Entry]:
    wanted = set(model.adapter.full)
    return [entry for entry in model.entries() if entry.disk in wanted]


def adapter_config(model: Model) -> dict[str, Any]:
    """Return the content of adapter_config.json. The base is named so that peft finds it from any working directory."""
    adapter: Adapter = model.adapter
    config = adapter.config
    ranks, alphas, names = {}, {}, peft_names(model)
    for module, (_, r, alpha) in adapter.sites.items():
        module = names.get(module, module)
        if r != config.r:
            ranks[module] = r
        if alpha != config.full_alpha:
            alphas[module] = _plain(alpha)
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": _plain(config.full_alpha),
        "lora_dropout": float(config.dropout),
        "use_dora": config.dora,
        "use_rslora": config.rslora,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        **_named_base(adapter.base),
        "task_type": TASKS.get(model.head_kind),
        "auto_mapping": _class_of(model) if model.head_kind not in TASKS else None,
        "target_modules": target_names(set(adapter.sites), model),
        "modules_to_save": saved_names(model) or None,
        "fan_in_fan_out": any(site.transpose for site, _, _ in adapter.sites.values()),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _named_base(base: str | None) -> dict[str, str | None]:
    """Return the entries that name the base: a path, or a model on the Hub and its commit."""
    name = None if base is None else hub_name(base)
    if name is None:
        return {"base_model_name_or_path": base}
    return {"base_model_name_or_path": name.repository, "revision": name.revision}


def _plain(value: float) -> int | float:
    """Return a whole number as an int, which other readers of adapter_config.json expect for alpha."""
    return int(value) if float(value).is_integer() else value


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
    others -= {name.rpartition(".")[0] for name in model.adapter.full}  # which PEFT never adapts
    spelled = peft_names(model)
    others = {spelled.get(module, module) for module in others}
    names: list[str] = []
    for module in sorted(spelled.get(module, module) for module in chosen):
        if matches(module, names):
            continue
        parts = module.split(".")
        for count in range(2 if parts[-1] in _TOO_GENERAL else 1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if not any(matches(other, [ending]) for other in others):
                names.append(ending)
                break
    return sorted(names)


def saved_names(model: Model) -> list[str]:
    """Return the names of the fully trained modules; a top-level module of the head counts as one if all of it is.

    One with tied tensors does not, of which peft would want the second names, too.
    """
    full = set(model.adapter.full)
    names: dict[str, None] = {}
    spelled = peft_names(model)
    for entry in _full_entries(model):
        module, top = entry.disk.rpartition(".")[0], entry.disk.split(".")[0]
        inside = [e.disk for e in model.entries() if e.disk.startswith(top + ".")]
        inside += [name for name in _aliases(model) if name.startswith(top + ".")]
        whole = not entry.body and full.issuperset(inside)
        names[top if whole else spelled.get(module, module)] = None
    return list(names)


# ------------------------------------------------------------------------------------------------ reading

# Keys that do not affect the result of a trained adapter, or are read elsewhere. The adapted modules are determined
# from the tensors, so the settings that selected them are ignored.
_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
_FREE = frozenset(
    {
        *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"),
        *("target_modules", *_NARROWING),
        *("fan_in_fan_out", "task_type", "lora_dropout"),
    }
)
# Other keys -> the values that have no effect; a key that is not listed may only be null, false or empty.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "megatron_core": ("megatron.core", None),
    "qalora_group_size": (16, None),
}
_MERGE = "Merge the adapter into its base with peft and load the merged model instead."
# Kinds that change the input, not the weights.
_UNMERGEABLE = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "CARTRIDGE",
    }
)
_READ = frozenset({"r", "lora_alpha", "use_dora", "use_rslora", "modules_to_save"})
_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class PeftSettings:
    """Content of adapter_config.json.

    Attributes:
        lora: the settings.
        base: path or name of the base model.
        revision: revision of the base model on the Hub.
        task: PEFT's task type.
        ranks: module name or its end, in full after ``^`` -> rank, where it differs from ``lora.r``.
        alphas: the same -> alpha, where it differs from ``lora.alpha``.
        targets: names of the adapted modules or their ends, if nothing else in the file chooses among the modules.
    """

    lora: LoraConfig
    base: str | None
    revision: str | None
    task: str | None
    ranks: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = ()


def from_peft(content: Mapping[str, Any], where: object) -> PeftSettings:
    """Read adapter_config.json.

    Args:
        content: the parsed file.
        where: file name for error messages.

    Raises:
        CheckpointError: a key has the wrong type, or a value that this package does not implement.
    """
    # The kind comes first: the other keys of another kind are no cause.
    for key, value in sorted(content.items(), key=lambda item: item[0] != "peft_type"):
        if key in _FREE or key in _READ or key in _PATTERNS:
            continue
        neutral = _NEUTRAL.get(key)
        # Compared one by one and by type too, because a list is not hashable and 1 == True.
        known = neutral is not None and any(type(value) is type(n) and value == n for n in neutral)
        if not known and (neutral is not None or value not in (None, False, "", [], {})):
            allowed = f"; supported: {', '.join(map(repr, neutral))}" if neutral else ""
            fix = (
                _MERGE
                if str(value) not in _UNMERGEABLE
                else "Such an adapter has no merged form: use it with peft."
            )
            raise CheckpointError(
                f"{where}: {key!r} is {str(value)[:80]!r}, which this package does not implement{allowed}. {fix}"
            )
    if "peft_type" not in content:
        raise CheckpointError(f"{where} has no 'peft_type'. Is it the file of a PEFT adapter?")
    keys = ("base_model_name_or_path", "revision", "task_type")
    base, revision, task = map(content.get, keys)
    for key, text in zip(keys, (base, revision, task), strict=True):
        if text is not None and (not isinstance(text, str) or len(text) > _TEXT_LIMIT):
            raise CheckpointError(f"{where}: {key!r} is {str(text)[:80]!r}; it must be a text.")
    saved = content.get("modules_to_save") or ()
    if not isinstance(saved, list | tuple):
        raise CheckpointError(
            f"{where}: 'modules_to_save' is {str(saved)[:80]!r}; it must be a list."
        )
    try:
        lora = LoraConfig(
            r=content.get("r", 8),
            alpha=content.get("lora_alpha", 8),
            dropout=content.get("lora_dropout") or 0.0,
            dora=content.get("use_dora") or False,
            rslora=content.get("use_rslora") or False,
            modules_to_save=tuple(saved),
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    ranks, alphas = (_pattern(content.get(key), key, where) for key in _PATTERNS)
    return PeftSettings(lora, base, revision, task, ranks, alphas, _target_names(content))


def _target_names(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names in ``target_modules``; none where these are a pattern, or other keys narrow the choice."""
    named = content.get("target_modules")
    narrowed = any(content.get(key) not in (None, [], "") for key in _NARROWING)
    listed = isinstance(named, list) and all(isinstance(name, str) for name in named)
    return tuple(named) if named and listed and not narrowed else ()


def _pattern(value: Any, key: str, where: object) -> dict[str, float]:
    """Parse a mapping of module names to numbers. They are regular expressions in PEFT; here ``^`` alone is special."""
    if value in (None, {}):
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key!r} is {str(value)[:80]!r}; it must be a mapping.")
    found = {}
    for name, number in value.items():
        if not MODULE.fullmatch(name.removeprefix("^")):
            raise CheckpointError(
                f"{where}: {key!r} names its modules by the pattern {name[:80]!r}; only plain module names are "
                f"read, and full ones after '^'. {_MERGE}"
            )
        if not is_number(number) or number <= 0:
            raise CheckpointError(
                f"{where}: {key!r} gives {name[:80]!r} the value {str(number)[:40]!r}; it must be a positive number."
            )
        found[name] = float(number)
    return found


def _pattern_value(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first name in ``pattern`` that fits, else ``default``.

    A name fits a module that ends with it, and after ``^`` only the module of that full name.
    """
    for name, value in pattern.items():
        if module == name[1:] if name.startswith("^") else matches(module, [name]):
            return value
    return default


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
            f"{where}: 'task_type' is {settings.task[:40]!r}, which this package does not support."
        )
    classes = 0
    keys = {name: key for key, name in stored_names(tensors).items()}
    for name in ("score", "classifier", "classifier.out_proj"):
        found = tensors.get(keys.get(f"{PREFIX}{name}.weight", ""))
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
    tensors = _untied(model, tensors, where)
    sites = _stored_sites(model, settings, tensors, where)
    entries = {entry.disk: entry for entry in model.entries()}
    full, unused = {}, []
    for key, _, name in _own_names(model, tensors, where):
        if name in entries:
            full[name] = entries[name]
            _refuse_other_vocabulary(model, entries[name], key, tensors[key], where)
        elif ".lora_" not in name:
            unused.append(key)
    if unused and strict:
        raise CheckpointError(
            f"{where} holds {unused[0]!r}, which does not exist in this {model.backbone.model_type} model with "
            f"{'no' if model.head_kind is None else model.head_kind} head. The adapter was trained on another model or "
            "head."
        )
    attach(model, settings.lora, sites, full.values())
    model.adapter.named_base = settings.base
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


def _refuse_other_vocabulary(
    model: Model, entry: Entry, key: str, tensor: Tensor, where: object
) -> None:
    """Raise if an embedding or a head of an adapter has other rows than the base: tokens were added to its base."""
    parameters = dict(model.named_parameters())
    if not all(name in parameters for name in entry.memory):
        return
    wanted, given = tuple(to_disk(entry, parameters, "meta").shape), tuple(tensor.shape)
    if wanted[:1] == (model.backbone.vocab_size,) and wanted[1:] == given[1:] and wanted != given:
        raise CheckpointError(
            f"{where}: {key!r} has {given[0]:,} rows, and the vocabulary of the base {wanted[0]:,}: the base was "
            "resized before the adapter was trained, as for added tokens. Do the same with transformers, "
            f"model.resize_token_embeddings({given[0]}) and model.save_pretrained(NEW_DIR), and give that base: "
            f"{either('pretrain merge ADAPTER --base NEW_DIR --out DIR', 'load(ADAPTER, base=NEW_DIR)')}."
        )


def _untied(model: Model, tensors: Mapping[str, Tensor], where: object) -> Mapping[str, Tensor]:
    """Untie the head if a file holds the matrix that it shares with the token embedding, of which peft trains a copy.

    Returns:
        The tensors, and those of the base for what the file lacks of the projection, which peft stores whole.
    """
    if (embedding := tied_embedding(model)) is None:
        return tensors
    shared = next(entry.disk for entry in model.entries() if entry.memory == (embedding,))
    if all(name != shared for _, _, name in _own_names(model, tensors, where)):
        return tensors
    projection = next(name for name, disk in _aliases(model).items() if disk == shared)
    module = projection.removesuffix("weight")
    untie(model)
    stored = {name for _, _, name in _own_names(model, tensors, where)}
    base = model.disk_view()
    lacking = {entry.disk for entry in model.entries() if entry.disk.startswith(module)} - stored
    return {PREFIX + name: base[name] for name in lacking} | dict(tensors)


def _stored_sites(
    model: Model, settings: PeftSettings, tensors: Mapping[str, Tensor], where: object
) -> dict[str, tuple[Site, int, float]]:
    """Return the adapted modules of a file with rank and alpha, determined from its lora_A tensors."""
    known = sites_of(model)
    names = {entry.disk for entry in model.entries()} | _aliases(model).keys()
    others = {name.rpartition(".")[0] for name in names} - known.keys()
    sites = {}
    for key, given, name in _own_names(model, tensors, where):
        tensor, (module, _, leaf) = tensors[key], name.partition(".lora_")
        if module in others and leaf:
            raise CheckpointError(
                f"{where} adapts {given!r}, which is no linear layer here: adapters of the vocabulary head, of "
                "embeddings and of convolutions are not implemented. Merge the adapter into its base with peft and "
                "load the merged model instead."
            )
        if not name.endswith(_A):
            continue
        if module not in known:
            raise CheckpointError(
                f"{where} adapts {given!r}, but this {model.backbone.model_type} model has no linear layer of that "
                "name. The adapter was trained on another base, or on a part that this model lacks."
            )
        wanted = _pattern_value(settings.ranks, given, settings.lora.r)
        r = tensor.shape[0] if tensor.ndim == 2 else 0
        if r != wanted or r < 1:
            raise CheckpointError(
                f"{where}: {key!r} has the shape {tuple(tensor.shape)}, so rank {r}, but adapter_config.json sets rank "
                f"{wanted:g}. The two files do not belong together."
            )
        alpha = _pattern_value(settings.alphas, given, settings.lora.full_alpha)
        sites[module] = (known[module], r, alpha)
    if not sites:
        raise CheckpointError(
            f"{where} holds no lora_A tensor. It is incomplete, or not the weights of a LoRA adapter."
        )
    if absent := _absent_sites(model, settings, known.values(), sites):
        note(
            f"{where} holds no tensors for {len(absent)} matrices that adapter_config.json names "
            f"({', '.join(absent[:3])}{', ...' * (len(absent) > 3)}): they stay as in the base. Has a part of the file "
            "been lost, or was it saved by one process of several?"
        )
    return sites


def _absent_sites(
    model: Model, settings: PeftSettings, known: Iterable[Site], stored: Collection[str]
) -> list[str]:
    """Return the matrices of the blocks that the settings name and the file does not hold."""
    spelled = peft_names(model)
    absent = [site.module for site in known if site.in_blocks and site.module not in stored]
    saved = settings.lora.modules_to_save
    return [
        module
        for module in absent
        if matches(spelled.get(module, module), settings.targets)
        and not any(within(f"{name}.weight", saved) for name in (module, spelled.get(module, "")))
    ]


def _aliases(model: Model) -> dict[str, str]:
    """Return the second name of every tied tensor of the head -> its own name on disk."""
    disk = {entry.memory: entry.disk for entry in model.entries()}
    copies = copies_of(model)
    return {name: disk[memory,] for name, memory in copies.items() if (memory,) in disk}


def _own_names(
    model: Model, tensors: Mapping[str, Tensor], where: object
) -> Iterator[tuple[str, str, str]]:
    """Yield every name in a file, its module as spelled there, and the name that this model has for the tensor.

    The prefixes of the modules differ if the body was trained with another head, and a tied tensor may have two names.
    """
    own: dict[str, str] = {}
    entries, spelled = model.entries(), peft_names(model)
    for entry in entries:
        bare, disk = (name.rpartition(".")[0] for name in (entry.bare, entry.disk))
        other = spelled.get(disk, disk).removeprefix(disk.removesuffix(bare))
        for prefix in ("", model.backbone.prefix, *model.backbone.prefixes) if entry.body else ():
            own.setdefault(prefix + bare, disk)
            own.setdefault(prefix + other, disk)
    own |= {name: name for name in (entry.disk.rpartition(".")[0] for entry in entries)}
    aliases = _aliases(model)
    if len(adapters := _adapters_in(tensors)) > 1:
        several = ", ".join(name or "one without a name" for name in adapters)
        raise CheckpointError(
            f"{where} holds tensors of several adapters: {several}. "
            "Save one of them with peft: model.save_pretrained(DIR, selected_adapters=[NAME])."
        )
    for key, usual in stored_names(tensors).items():
        if not usual.startswith(PREFIX):
            raise CheckpointError(
                f"{where}: the name of the tensor {key[:80]!r} does not begin with {PREFIX!r}, so the file is not a "
                "PEFT adapter of a complete model."
            )
        module, leaf = _split(key.removeprefix(PREFIX))
        if module not in own:  # own names may hold that of a wrapper, too
            module, leaf = _split(usual.removeprefix(PREFIX))
        found = own.get(module, module) + leaf
        yield key, module, aliases.get(found, found)


def _split(name: str) -> tuple[str, str]:
    leaf = next((e for e in (_A, _B, _M) if name.endswith(e)), f".{name.rpartition('.')[2]}")
    return name.removesuffix(leaf), leaf


def _adapters_in(names: Iterable[str]) -> list[str]:
    """Return the names of the adapters in a state dict of peft's model; ``""`` stands for none."""
    found = (re.search(r"\.lora_[AB]\.(?:([^.]+)\.)?weight$", modern_key(name)) for name in names)
    return sorted({match[1] or "" for match in found if match})


def stored_names(names: Collection[str]) -> dict[str, str]:
    """Return the names in a file -> those without what stands in a state dict of peft's model: adapter and wrappers.

    Names of the base beside a trained copy are left out. Peft saves embeddings under several names where it takes the
    vocabulary for changed.
    """
    found = {}
    adapters = "|".join(map(re.escape, filter(None, _adapters_in(names)))) or "default"
    for key in names:
        name = modern_key(key).removeprefix("module.")
        if ".original_module." in name:
            continue
        name = re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", name)
        name = re.sub(rf"\.modules_to_save(\.({adapters}))?(?=\.)", "", name)
        found[key] = re.sub(rf"{re.escape(_M)}(\.[^.]+)?(\.weight)?$", _M, name)
    return found


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
    given: dict[str, Tensor] = {}
    for key, _, name in _own_names(model, tensors, where):
        if name in given and not torch.equal(given[name], tensors[key]):
            raise CheckpointError(
                f"{where}: {key!r} and another name in the file mean the same tensor, with other "
                "values. Keep only one of them."
            )
        given[name] = tensors[key]
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
        values.update(from_disk(entry, given.pop(entry.disk), shapes))
    if given:
        raise CheckpointError(
            f"{where} holds {PREFIX + min(given)!r}, which has no counterpart in the adapter of this "
            "model. The file is incomplete, or belongs to another adapter."
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
