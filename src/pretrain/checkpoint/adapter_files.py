"""Files of adapters, written by this package or by peft: what only models with an adapter need of `pretrain.lora`.

What is read is untrusted input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.download import fetch_config, fetch_model, terms
from pretrain.checkpoint.model_directory import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ModelDirectory,
    read_weights,
    verify_rest,
)
from pretrain.checkpoint.resolve import enclosing_run, models_of_run, resolve_model_directory
from pretrain.config.spelling import either
from pretrain.errors import CheckpointError, ConfigError, ModelError, PretrainError
from pretrain.lora.attach import base_sample, body_shapes, fingerprint
from pretrain.lora.peft_format import (
    PeftSettings,
    adapter_config,
    adapter_packing,
    attach_stored,
    fill,
    from_peft,
    head_of,
    stored_names,
)
from pretrain.models.base import Model
from pretrain.models.heads import LABELLED
from pretrain.models.sentences import SentenceSettings
from pretrain.utils.files import note, reading
from pretrain.utils.hub_names import hub_name
from pretrain.utils.tensors import read_header

__all__ = [
    "adapted_values",
    "adapter_config",
    "adapter_facts",
    "adapter_packing",
    "adapter_sizes",
    "base_sample",
    "from_peft",
    "open_adapter",
]

_PARENTS = 3  # number of parents of the adapter directory in which a base named by a relative path is searched


def adapter_facts(model: Model, full: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return what config.json records of the base: a hash of names and shapes, and a hash of a few values.

    ``full`` holds the whole parameters (the meta device suffices) if the parameters of the model are sharded.
    """
    return {"base_fingerprint": fingerprint(model, full), "base_sample": model.adapter.base_sample}


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    block = config.get("pretrain")
    facts = block.get("adapter") if isinstance(block, dict) else None
    return facts if isinstance(facts, dict) else {}


def open_adapter(
    directory: ModelDirectory,
    *,
    head: str | None,
    base: Model | str | Path | None,
    verify: bool,
    quiet: bool,
) -> tuple[Model, ModelDirectory | None]:
    """Load the base and attach the adapter; see ``pretrain.checkpoint.load``.

    Returns:
        The model, and the directory of its base, from which comes what the directory of the adapter lacks; None if the
        base is a model in memory, whose settings and tokenizer it has.
    """
    path = directory.path
    settings = from_peft(directory.json(ADAPTER_CONFIG), path / ADAPTER_CONFIG)
    with read_weights(directory, {ADAPTER_WEIGHTS: None}) as tensors:
        config = directory.model_config()
        facts = _facts(config)
    base_path = base if base is not None else _find(settings, path)
    try:
        source = _Base(base_path, verify=verify)
    except CheckpointError as error:
        if base is not None or not isinstance(base_path, str):
            raise
        raise CheckpointError(
            f"{error} This model is the base of the adapter {path}; its directory can also be given: "
            f"{_with_base(path)}."
        ) from error
    kind = head
    if not facts:  # written by peft, without a model configuration: that of the base is used
        config = dict(source.config)
        if kind is None:
            kind, config = _peft_head(config, settings, tensors, path / ADAPTER_CONFIG)
    try:
        model = Model.from_hf_config(config, head=kind)
    except ModelError as error:
        if head is not None:
            raise
        raise CheckpointError(f"{path} is an adapter for another base. {error}") from None
    _refuse_other_base(model, source, facts, path)
    report = model.load_disk_state(source.tensors())
    changed = bool(facts) and facts.get("base_sample") != base_sample(model)
    if changed and base is None and not isinstance(base_path, Model):
        earlier = _trained_on(base_path, facts.get("base_sample"), model, verify)
        source, report = earlier or (source, report)
        changed = earlier is None
    model.source = source.name
    if source.directory is None:
        model.generation_config = dict(source.generation_config)
        model.tokenizer = source.tokenizer
    model.sentences = source.sentences
    block = model.extra_config.get("pretrain") or {}
    model.extra_config["pretrain"] = {**terms(source.name or ""), **block}
    if changed:
        text = f"The base {source.name or 'given'} has other weights than the base that {path} was trained on"
        if base is None:
            step = model.extra_config["pretrain"].get("parent_step")
            which = f" It was trained on step {step} of its base." * isinstance(step, int)
            raise CheckpointError(
                f"{text}: it was changed, replaced or trained on since then.{which} Give the right base, or this one "
                f"to use it anyway: {_with_base(path)}."
            )
        note(f"{text}; the adapter is attached anyway, because base= names this base.")
    unused = attach_stored(model, settings, tensors, path / ADAPTER_WEIGHTS, strict=head is None)
    if not quiet:
        note(_line(model, source, len(tensors), report, unused))
    return model, source.directory


def _trained_on(
    base: str | Path, sample: Any, model: Model, verify: bool
) -> tuple[_Base, Any] | None:
    """Load the checkpoint of a base with the given `base_sample`, if the base is a run that has trained on since.

    Returns:
        The checkpoint, and what ``load_disk_state`` reports; None if the base is no run, or has none.
    """
    run = enclosing_run(Path(base))
    for other in [] if run is None else models_of_run(run):
        try:
            source = _Base(other, verify=verify)
            report = model.load_disk_state(source.tensors())
        except PretrainError:  # damaged, or an adapter
            continue
        if base_sample(model) == sample:
            note(f"the adapter is attached to {other}: {base} was trained on since")
            return source, report
    return None


class _Base:
    """The base of an adapter: a model in memory, or a directory."""

    def __init__(self, base: Model | str | Path, *, verify: bool) -> None:
        self._model: Any = None
        self.directory: ModelDirectory | None = None
        self.generation_config: dict[str, Any] = {}
        self.tokenizer: Any = None
        if not isinstance(base, str | Path):
            if base.adapter is not None:
                raise CheckpointError(
                    "The base given for the adapter has an adapter itself. Merge it first, or give the plain model."
                )
            self._model, self.name = base, base.source
            self.config: dict[str, Any] = base.hf_config()
            self.generation_config, self.tokenizer = base.generation_config, base.processor
            self.sentences = base.sentences
            return
        path, self.name = fetch_model(base)
        with reading(base):
            if (best := resolve_model_directory(path)) != path:
                path, self.name = best, str(Path(base) / best.name)
            self.directory = ModelDirectory(path, verify=verify)
            if self.directory.is_adapter:
                raise CheckpointError(
                    f"{base}, named as the base of an adapter, is an adapter itself. Merge it and save the model first."
                )
            if not self.directory.has("config.json"):
                raise CheckpointError(
                    f"{base}, the base of the adapter, has no config.json, so it is no Hugging Face model directory."
                )
            self.config = self.directory.json("config.json")
            self.sentences = SentenceSettings.read(self.directory)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the weights by their names on disk."""
        if self.directory is None:
            found: Mapping[str, Tensor] = self._model.disk_view()
            return found
        with reading(self.directory.path):
            names = self.directory.weight_files()
            with read_weights(self.directory, names) as tensors:
                verify_rest(self.directory, names)
        return tensors


def _with_base(adapter: Path) -> str:
    """Return how an adapter is opened on a base that it does not name."""
    merge = f"pretrain merge {adapter} --base DIR --out NEW_DIR"
    return either(merge, f"load({adapter.name!r}, base=DIR)")


def _find(settings: PeftSettings, adapter: Path) -> str | Path:
    """Find the base named in adapter_config.json.

    The name is tried relative to the working directory, to the adapter and to its parents; a name on the Hub is
    returned as such.
    """
    name = settings.base
    if not name:
        raise CheckpointError(
            f"{adapter} does not name the base that it was trained on, which may have been a model in memory. Give its "
            f"directory: {_with_base(adapter)}."
        )
    parts = Path(name).parts
    # If the adapter was moved together with its base, the base is found by the last components of its old path.
    ends = [Path(*parts[k:]) for k in range(1, len(parts))] if Path(name).is_absolute() else []
    try:
        for end in (Path(name), *ends):
            for start in (Path(), adapter, *adapter.parents[:_PARENTS]):
                if (start / end).is_dir():
                    return start / end
                # A checkpoint that its run has removed since; another one or the result may have its weights.
                if len(end.parts) > 1 and (run := enclosing_run(start / end)) is not None:
                    return run
    except (ValueError, OSError):  # a null byte in the name, or a name that is too long
        pass
    if (hub_base := hub_name(name)) is not None:
        return str(replace(hub_base, revision=settings.revision or hub_base.revision))
    raise CheckpointError(
        f"{adapter} is an adapter for the base {name[:200]!r}, but that directory was not found. Download or move the "
        f"base, and give its path: {_with_base(adapter)}."
    )


def adapter_sizes(directory: ModelDirectory) -> dict[str, int | None]:
    """Return the number of trainable parameters of an adapter and the total including its base; reads no weights.

    The total is None if the model configuration is that of the base and the base is not found or does not fit.
    """
    path = directory.path
    header = read_header(directory.real(ADAPTER_WEIGHTS))
    tensors = {name: header[key] for key, name in stored_names(header).items()}  # each one once
    trained = sum(info.numel for info in tensors.values() if info.dtype.is_floating_point)
    added = sum(info.numel for name, info in tensors.items() if ".lora_" in name)
    settings = from_peft(directory.json(ADAPTER_CONFIG), path / ADAPTER_CONFIG)
    config, kind = directory.model_config(), None
    try:
        if not _facts(config):
            base = fetch_config(_find(settings, path)).path
            config = dict(_Base(base, verify=False).config)
            heads = {name: torch.empty(info.shape, device="meta") for name, info in tensors.items()}
            kind, config = _peft_head(config, settings, heads, path / ADAPTER_CONFIG)
        whole = Model.from_hf_config(config, head=kind).num_parameters() + added
    except (CheckpointError, ConfigError, ModelError):
        return {"trainable_parameters": trained, "total_parameters": None}
    return {"trainable_parameters": trained, "total_parameters": whole}


def _peft_head(
    config: dict[str, Any], settings: PeftSettings, tensors: Mapping[str, Tensor], where: Path
) -> tuple[str | None, dict[str, Any]]:
    """Return the head that peft trained, and the configuration of the base with as many labels as that has rows."""
    kind, classes = head_of(settings, tensors, where)
    labels = config.get("id2label")
    known = isinstance(labels, dict) and len(labels) == classes
    if kind in LABELLED and classes and not known:
        config = {key: value for key, value in config.items() if key != "num_labels"}
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
    return kind, config


def _refuse_other_base(model: Model, source: _Base, facts: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError unless the names and shapes of the base are those that the adapter was trained on."""
    other = Model.from_hf_config(source.config, head="none")
    expected, shapes = body_shapes(model), body_shapes(other)
    same_family = model.backbone.model_type == other.backbone.model_type
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{path} is an adapter for another base than {source.name or 'the one given'}: {name!r} is "
                f"{expected.get(name, 'absent')} in the base of the adapter and {shapes.get(name, 'absent')} in this "
                "base."
            )
    if not same_family or (facts and facts.get("base_fingerprint") != fingerprint(model)):
        raise CheckpointError(
            f"{path} is an adapter for another base than {source.name or 'the one given'}, which is a "
            f"{other.backbone.model_type} model."
        )


def _line(model: Model, source: _Base, count: int, report: Any, unused: list[str]) -> str:
    parameters = {name for entry in model.entries() for name in entry.memory}
    parts = [
        f"{model.backbone.model_type}: {report.loaded} tensors of the base {source.name or 'given'}",
        f"{count} of the adapter ({model.adapter})",
    ]
    missing = sorted(model.fresh & parameters)
    parts.append(
        f"{len(missing)} missing"
        + (f" (newly initialised: {', '.join(missing[:5])})" * bool(missing))
    )
    parts.append(f"{len(report.unexpected) + len(unused)} not used")
    if model.remarks:
        parts.append(f"without effect in config.json: {', '.join(model.remarks)}")
    return ", ".join(parts)


def adapted_values(
    directory: ModelDirectory, model: Model, full: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return parameter name -> whole value from a checkpoint of an adapted model; ``full`` as in `adapter_facts`.

    Raises:
        CheckpointError: the checkpoint holds no adapter, a different one, or one for a different base.
    """
    path, adapter = directory.path, model.adapter
    if not directory.is_adapter:
        raise CheckpointError(
            f"{path} holds no adapter, but the model that is restored from it has one. Use the settings of the "
            "checkpoint, or a new output directory."
        )
    settings: PeftSettings = from_peft(directory.json(ADAPTER_CONFIG), path / ADAPTER_CONFIG)
    for name in ("full_alpha", "dora", "rslora"):
        then, now = getattr(settings.lora, name), getattr(adapter.config, name)
        if then != now:
            raise CheckpointError(
                f"{path} holds an adapter with {name.removeprefix('full_')} {then}, but the adapter of the model has "
                f"{now}. Use the settings of the checkpoint, or a new output directory."
            )
    facts = _facts(directory.model_config())
    if facts and facts != adapter_facts(model, full):
        raise CheckpointError(
            f"{path} holds an adapter for another base than that of the model that is restored from it. Use the base "
            "of the checkpoint, or a new output directory."
        )
    with read_weights(directory, {ADAPTER_WEIGHTS: None}) as tensors:
        verify_rest(directory, {ADAPTER_WEIGHTS: None})
    shapes = None if full is None else {name: tuple(p.shape) for name, p in full.items()}
    return fill(model, tensors, path / ADAPTER_WEIGHTS, shapes)
