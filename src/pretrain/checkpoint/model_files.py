"""Layout and contents of the files of a model directory: weights, configurations, model card, tokenizer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pretrain.checkpoint import model_directory
from pretrain.checkpoint.model_card import readme
from pretrain.checkpoint.sharded_saving import SMALLEST_SHARE, spread
from pretrain.lora.peft_format import adapter_config
from pretrain.models.config import drop_code
from pretrain.utils import directories, files
from pretrain.utils.files import Record
from pretrain.utils.strict_json import names_only, parse_json, to_json

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.models.base import Model

__all__ = [
    "MAX_SHARD_BYTES",
    "finite_json",
    "index_json",
    "model_texts",
    "shares",
    "total_bytes",
    "weight_files",
    "write_tokenizer",
]

MAX_SHARD_BYTES = 5_000_000_000


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
        return _named(_groups(layout, limit))
    return _named(spread(layout, max(shares(layout, size), math.ceil(total_bytes(layout) / limit))))


def shares(layout: Mapping[str, Tensor], size: int) -> int:
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
    model: Model, config: dict[str, Any], count: int, *, in_run: bool = False
) -> dict[str, bytes]:
    """Return name -> content of the small files of a model directory: configurations and model card.

    Args:
        model: the model, for its kind of head, generation settings, sentence settings and adapter.
        config: content of config.json.
        count: number of parameters.
        in_run: the directory is a checkpoint of a run, which always has a config.json.
    """
    own = "config.json" if model.adapter is None or in_run else model_directory.ADAPTED_MODEL
    texts = {own: to_json(config)}
    if model.adapter is not None:
        texts[model_directory.ADAPTER_CONFIG] = to_json(adapter_config(model))
    if model.head_kind == "causal-lm":
        texts["generation_config.json"] = to_json(_generation_config(model, config))
    if model.sentences is not None and model.head_kind in (None, "masked-lm", "causal-lm"):
        contents = model.sentences.files(model.backbone.config.hidden_size)
        texts |= {name: to_json(content) for name, content in contents.items()}
    texts["README.md"] = readme(config, model.head_kind, count, model.card)
    return texts


def _generation_config(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(key) is not None
    }
    return dict(finite_json(names_only({**ids, **drop_code(model.generation_config)})))


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, *, segments: bool
) -> Iterator[tuple[str, Record]]:
    """Write the files of a tokenizer durably, with absolute paths removed, and yield the name and record of each.

    The tokenizer first saves them to a temporary subdirectory.

    Args:
        directory: directory of the model.
        tokenizer: the tokenizer.
        segments: the model was trained with token type ids, which AutoTokenizer would otherwise leave out.
    """
    aside = directory / "tokenizer"
    tokenizer.save(aside)
    inputs = ["input_ids", *["token_type_ids"] * segments, "attention_mask"]
    for name in sorted(os.listdir(aside)):
        data = files.read_bytes(aside / name)
        if name == "tokenizer_config.json":
            data = to_json(names_only({**parse_json(data, name), "model_input_names": inputs}))
        yield name, files.write_file(directory / name, data)
    directories.remove_tree(aside)


def _groups(weights: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Divide tensors into groups of at most `limit` bytes, in order; a larger tensor gets a group of its own."""
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if groups[-1] and total_bytes(groups[-1]) + total_bytes({name: tensor}) > limit:
            groups.append({})
        groups[-1][name] = tensor
    return groups


def _named(groups: list[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    if len(groups) == 1:
        return {model_directory.SINGLE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the total size of tensors in bytes, also for tensors on the meta device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def finite_json(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    return [finite_json(item) for item in value] if isinstance(value, list) else value
