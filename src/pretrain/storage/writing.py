"""The files of a model directory, each written durably: weights, configurations, card, tokenizer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pretrain.adapters.layout import adapter_config
from pretrain.models.config import drop_code
from pretrain.storage import directories, files, opened
from pretrain.storage.card import readme
from pretrain.storage.files import Record
from pretrain.storage.strict_json import names_only, parse_json, to_json
from pretrain.storage.tensors import LazyTensors, write_tensors

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["finite_json", "total_bytes", "write_model"]


def write_model(
    directory: Path,
    model: Model,
    config: dict[str, Any],
    weights: LazyTensors,
    max_shard_bytes: int,
    *,
    in_run: bool = False,
) -> Iterator[tuple[str, Record]]:
    """Write everything but the training folder; yields (name, record).

    Args:
        directory: empty.
        model: its kind, tokenizer, generation settings and, where it has one, adapter.
        config: content of config.json.
        weights: of the model, or of its adapter alone.
        max_shard_bytes: larger weights of a whole model are split.
        in_run: it is a checkpoint of a run, which always has a config.json.
    """
    if model.adapter is None:
        shards = _shards(weights.layout, max_shard_bytes)
    else:
        shards = {opened.ADAPTER_WEIGHTS: dict(weights.layout)}
    for name, part in shards.items():
        yield name, write_tensors(directory / name, weights.part(part))
    if len(shards) > 1:
        parameters = sum(tensor.numel() for tensor in weights.layout.values())
        index = {
            "metadata": {"total_size": total_bytes(weights.layout), "total_parameters": parameters},
            "weight_map": {tensor: name for name, part in shards.items() for tensor in part},
        }
        yield opened.INDEX, files.write_file(directory / opened.INDEX, to_json(index))
    own = "config.json" if model.adapter is None or in_run else opened.ADAPTED_MODEL
    texts = {own: to_json(config)}
    if model.adapter is not None:
        texts[opened.ADAPTER_CONFIG] = to_json(adapter_config(model))
    if model.head_kind == "causal-lm":
        texts["generation_config.json"] = to_json(_generation_config(model, config))
    count = sum(parameter.numel() for parameter in model.parameters())
    texts["README.md"] = readme(config, model.head_kind, count, model.card)
    for name, data in texts.items():
        yield name, files.write_file(directory / name, data)
    if model.tokenizer is not None:
        yield from _write_tokenizer(directory, model)


def _generation_config(model: Model, config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(key) is not None
    }
    return dict(finite_json(names_only({**ids, **drop_code(model.generation_config)})))


def _write_tokenizer(directory: Path, model: Model) -> Iterator[tuple[str, Record]]:
    """Let the tokenizer write its files aside, then write them durably and without absolute paths."""
    aside = directory / "tokenizer"
    assert model.tokenizer is not None
    model.tokenizer.save(aside)
    # Without this AutoTokenizer leaves out the segments of a pair, which the model was trained with.
    segments = getattr(model.backbone.config, "type_vocab_size", 1) > 1
    inputs = ["input_ids", *["token_type_ids"] * segments, "attention_mask"]
    for name in sorted(os.listdir(aside)):
        data = files.read_bytes(aside / name)
        if name == "tokenizer_config.json":
            data = to_json(names_only({**parse_json(data, name), "model_input_names": inputs}))
        yield name, files.write_file(directory / name, data)
    directories.remove_tree(aside)


def _shards(weights: Mapping[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """Split tensors over files of at most `limit` bytes, in their order; a larger tensor has its own file."""
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if groups[-1] and total_bytes(groups[-1]) + total_bytes({name: tensor}) > limit:
            groups.append({})
        groups[-1][name] = tensor
    if len(groups) == 1:
        return {opened.SINGLE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that tensors take, on the meta device too."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def finite_json(value: Any) -> Any:
    """JSON has no NaN: a metric that is none becomes a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    return [finite_json(item) for item in value] if isinstance(value, list) else value
