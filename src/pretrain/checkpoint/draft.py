"""The planned contents of a model directory: which tensors go into which files, and the small files beside them.

A `Draft` holds no reference to the model, so that its tensors can be copied to a staging buffer and written while
training continues. Its files are independent of the world size: each holds whole tensors and has one owner, the rank
that writes it. Every rank makes the same plan, without communication.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain import __version__, checkpoint
from pretrain.checkpoint import manifest, model_directory
from pretrain.checkpoint.model_card import readme
from pretrain.checkpoint.peers import Peers, TensorSharding
from pretrain.checkpoint.training_state import TrainingState, encoded_state, shard_name
from pretrain.models.config import drop_code
from pretrain.models.names import DiskMapping
from pretrain.models.state import disk_mapping
from pretrain.nn.buffers import stored_tensors
from pretrain.nn.device import local
from pretrain.nn.layout import ShardLayout
from pretrain.utils import directories, files
from pretrain.utils.files import Record
from pretrain.utils.strict_json import names_only, parse_json, to_json

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "MAX_SHARD_BYTES",
    "Draft",
    "FilePlan",
    "draft_of",
    "split_evenly",
    "tokenizer_entries",
    "write_processor",
]

MAX_SHARD_BYTES = 5_000_000_000
SMALLEST_SHARE = 64 << 20  # bytes; smallest average size of the files of a group of tensors


@dataclass(frozen=True)
class FilePlan:
    """Plan of one file of tensors, the same on all ranks.

    Attributes:
        name: path inside the directory.
        owner: the rank that writes the file.
        layout: name of a tensor in the file -> its shape and dtype, as a tensor on the meta device.
        mapping: from the tensors of a draft to those of the file.
        training: the file is one of the training folder, where names may hold "/" and numbers need not be finite.
    """

    name: str
    owner: int
    layout: Mapping[str, Tensor]
    mapping: DiskMapping
    training: bool = False


@dataclass(frozen=True)
class Draft:
    """The contents of a model directory.

    Tensors are found by a key: the name in the model, and of the training folder ``group/name``.

    Attributes:
        step: step of the run; None for a model saved outside a run.
        texts: name -> content of the small files, with state.json if there is a training folder.
        files: the files of tensors.
        parts: key -> the shard of this rank, on any device.
        full: key -> the whole tensor on the meta device.
        processor: the tokenizer or other processor, and the keys of tokenizer_config.json that depend on the model.
        about: the environment that bit-identical resuming depends on, see ``manifest.environment``.
        sharding: which rank holds which shard of the tensors.
    """

    step: int | None
    texts: Mapping[str, bytes]
    files: tuple[FilePlan, ...]
    parts: Mapping[str, Tensor]
    full: Mapping[str, Tensor]
    processor: tuple[Any, dict[str, Any]] | None
    about: Mapping[str, Any]
    sharding: TensorSharding

    @property
    def num_bytes(self) -> int:
        """Upper bound of the size of the directory in bytes."""
        tensors = sum(total_bytes(plan.layout) for plan in self.files)
        return tensors + sum(map(len, self.texts.values())) + (1 << 20)


def draft_of(
    model: Model,
    *,
    step: int | None = None,
    block: Mapping[str, Any] | None = None,
    training: TrainingState | None = None,
    max_shard_bytes: int,
    layout: ShardLayout | None,
    peers: Peers,
    repository: str | None = None,
) -> Draft:
    """Plan a model directory. Every rank computes the same plan, without communication.

    Args:
        model: the model, whole or with this rank's shards of the parameters, as plain or distributed tensors.
        step: step of the run, or None.
        block: the "pretrain" block of config.json.
        training: the state needed to resume; its tensors are sharded as well, see ``TensorSharding``.
        max_shard_bytes: weights above this size are split into several files.
        layout: sharding of the parameters; None if they are whole.
        peers: the ranks; only ``rank`` and ``size`` are used.
        repository: see ``model_texts``.

    Raises:
        CheckpointError: a value cannot be stored, or a shard does not have the shape given by the layout.
    """
    sharding = TensorSharding(layout, peers)
    parts = {name: local(tensor).detach() for name, tensor in stored_tensors(model).items()}
    full = sharding.full(parts)
    config = _config(model, block, full)
    packing = (
        disk_mapping(model)
        if model.adapter is None
        else checkpoint.adapter_files.adapter_packing(model)
    )
    used = {key for keys in packing.sources.values() for key in keys}
    weights = packing.layout(full)
    adapted = model.adapter is not None
    shards = weight_files(weights, max_shard_bytes, sharding.size, adapter=adapted)
    plans = _plans(shards, packing, sharding.size)
    held = {key: parts[key] for key in sorted(used)}
    if training is not None:
        states = {key: local(tensor).detach() for key, tensor in training.by_key().items()}
        held, full = held | states, full | sharding.full(states)
        for stem, tensors in sorted(training.tensors.items()):
            plans += _training_plans(stem, tensors, full, sharding.size)
    count = sum(full[name].numel() for name, _ in model.named_parameters())
    texts = model_texts(model, config, count, in_run=step is not None, repository=repository)
    if len(shards) > 1:
        texts = {model_directory.INDEX: index_json(shards, weights), **texts}
    if training is not None:
        texts[manifest.STATE] = encoded_state(training.state)
    several = getattr(model.backbone.config, "type_vocab_size", 1) > 1
    segments = several and model.tokenizer is not None and model.tokenizer.segments
    return Draft(
        step=step,
        texts=texts,
        files=tuple(plans),
        parts=held,
        full=full,
        processor=None
        if model.processor is None
        else (model.processor, tokenizer_entries(model, segments=segments)),
        about=manifest.environment(torch.get_num_threads(), str(torch.__version__)),
        sharding=sharding,
    )


def _config(
    model: Model, block: Mapping[str, Any] | None, full: Mapping[str, Tensor]
) -> dict[str, Any]:
    config = dict(model.hf_config())
    if block is not None:
        versions = {"pretrain": __version__, "torch": str(torch.__version__)}
        config["pretrain"] = {"versions": versions, **block}
    if model.adapter is not None:
        facts = checkpoint.adapter_files.adapter_facts(model, full)
        config["pretrain"] = {**(config.get("pretrain") or {}), "adapter": facts}
    return dict(finite_json(names_only(config)))


def _training_plans(
    stem: str, names: Iterable[str], full: Mapping[str, Tensor], size: int
) -> list[FilePlan]:
    """Plan the files of a group of the training folder, whose tensors are stored as they are."""
    keys = {name: f"{stem}/{name}" for name in sorted(names)}
    mapping = DiskMapping(
        {name: (key,) for name, key in keys.items()}, lambda name, sources, _: sources[keys[name]]
    )
    layout = {name: full[key] for name, key in keys.items()}
    parts = split_evenly(layout, file_count(layout, size))
    files = _named(f"{manifest.TRAINING}/{stem}", parts)
    return _plans(files, mapping, size, training=True)


def _plans(
    files: Mapping[str, Mapping[str, Tensor]],
    mapping: DiskMapping,
    size: int,
    *,
    training: bool = False,
) -> list[FilePlan]:
    """Return the plans of files, given the tensors of each by its name; the ranks own them in turn."""
    return [
        FilePlan(name, number % size, layout, mapping, training)
        for number, (name, layout) in enumerate(files.items())
    ]


# ------------------------------------------------------------------------------------------------ files


def split_evenly(layout: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Divide tensors into at most ``count`` groups of about equal size in bytes, preserving their order."""
    total = total_bytes(layout)
    groups: dict[int, dict[str, Tensor]] = {}
    before = 0
    for name, tensor in layout.items():
        middle = before + tensor.nbytes / 2
        index = min(count - 1, int(middle * count / total)) if total else 0
        groups.setdefault(index, {})[name] = tensor
        before += tensor.nbytes
    return [groups[index] for index in sorted(groups)] or [{}]


def weight_files(
    layout: Mapping[str, Tensor], limit: int, size: int, *, adapter: bool
) -> dict[str, dict[str, Tensor]]:
    """Divide the weights into files: file name -> its tensors, on the meta device.

    Args:
        layout: all weights, on the meta device.
        limit: largest size of a file in bytes, unless a single tensor is larger; approximate if several ranks write.
        size: number of ranks that write; large weights are divided into about that many files or more.
        adapter: the weights are those of an adapter, which are stored in one file.
    """
    if adapter:
        return {model_directory.ADAPTER_WEIGHTS: dict(layout)}
    if size == 1:
        return _named("model", _groups(layout, limit))
    count = max(file_count(layout, size), math.ceil(total_bytes(layout) / limit))
    return _named("model", split_evenly(layout, count))


def file_count(layout: Mapping[str, Tensor], size: int) -> int:
    """Return the number of files into which a group of tensors is divided if ``size`` ranks write it."""
    return max(1, min(size, total_bytes(layout) // SMALLEST_SHARE))


def index_json(shards: Mapping[str, Mapping[str, Tensor]], layout: Mapping[str, Tensor]) -> bytes:
    """Return the content of model.safetensors.index.json."""
    parameters = sum(tensor.numel() for tensor in layout.values())
    weight_map = {tensor: name for name, part in shards.items() for tensor in part}
    return to_json(
        {
            "metadata": {"total_size": total_bytes(layout), "total_parameters": parameters},
            "weight_map": weight_map,
        }
    )


def model_texts(
    model: Model,
    config: dict[str, Any],
    count: int,
    *,
    in_run: bool = False,
    repository: str | None = None,
) -> dict[str, bytes]:
    """Return name -> content of the small files of a model directory: configurations and model card.

    Args:
        model: the model, for its kind of head, generation settings, sentence settings and adapter.
        config: content of config.json.
        count: number of parameters.
        in_run: the directory is a checkpoint of a run, which always has a config.json.
        repository: name on the hub that the examples of the model card open.
    """
    file = "config.json" if model.adapter is None or in_run else model_directory.ADAPTED_MODEL
    texts = {file: to_json(config)}
    if model.adapter is not None:
        texts[model_directory.ADAPTER_CONFIG] = to_json(
            checkpoint.adapter_files.adapter_config(model)
        )
    if model.head_kind == "causal-lm":
        texts["generation_config.json"] = to_json(_generation_config(model, config))
    if model.sentences is not None and model.head_kind in (None, "masked-lm", "causal-lm"):
        if model.sentences.missing:
            files.note(
                f"modules.json is left out of what is saved: it asks for {' and '.join(model.sentences.missing)}, "
                "which is not implemented. What is saved embeds with the mean over the tokens.",
                once=True,
            )
        contents = model.sentences.files(model.backbone.config.hidden_size)
        texts |= {name: to_json(content) for name, content in contents.items()}
    texts["README.md"] = readme(config, model.head_kind, count, model.card, repository)
    return texts


def _generation_config(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(key) is not None
    }
    return dict(finite_json(names_only({**ids, **drop_code(model.generation_config)})))


def tokenizer_entries(model: Model, *, segments: bool) -> dict[str, Any]:
    """Return the keys of tokenizer_config.json that depend on the model.

    Args:
        model: the model beside which the tokenizer is saved.
        segments: the model was trained with token type ids, which AutoTokenizer would otherwise leave out.
    """
    # Padding that the model was trained to read must not be masked.
    masked = [] if model.backbone.padded else ["attention_mask"]
    entries: dict[str, Any] = {
        "model_input_names": ["input_ids", *["token_type_ids"] * segments, *masked]
    }
    if model.backbone.default_task is not None:  # a processor of pairs pads or cuts to it
        entries["model_max_length"] = model.backbone.max_length
    return entries


def write_processor(
    directory: Path, processor: Any, entries: Mapping[str, Any]
) -> Iterator[tuple[str, Record]]:
    """Write the files of a processor durably, with absolute paths removed, and yield the name and record of each.

    The processor first saves them to a temporary subdirectory.

    Args:
        directory: directory of the model.
        processor: a tokenizer, an image processor or another one with ``save(directory)``.
        entries: keys of tokenizer_config.json that depend on the model.
    """
    aside = directory / "processor"
    processor.save(aside)
    for name in sorted(os.listdir(aside)):
        data = files.read_bytes(aside / name)
        if name == "tokenizer_config.json":
            data = to_json(names_only({**parse_json(data, name), **entries}))
        yield name, files.write_file(directory / name, data)
    directories.remove_tree(aside)


def _groups(weights: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Divide tensors into groups of at most `limit` bytes, in order; a larger tensor gets a group of its own."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def _named(stem: str, groups: Sequence[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return name of a file -> its group of tensors."""
    return {shard_name(stem, i, len(groups)): group for i, group in enumerate(groups)}


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the total size of tensors in bytes, also for tensors on the meta device."""
    return sum(tensor.nbytes for tensor in tensors.values())


def finite_json(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by strings; what else it does not have is left to fail."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    return [finite_json(item) for item in value] if isinstance(value, list) else value
