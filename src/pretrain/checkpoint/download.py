"""Models of the Hugging Face Hub as local directories: which files are fetched, and what is checked before.

The files are kept in the cache of ``huggingface_hub``, where other programs find them. A revision is resolved to a
commit once; the small files come first, and the weights only after the configuration has been read and the names,
sizes and free space checked. Pickles and code are never fetched. What is complete in the cache asks no network.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain import checkpoint
from pretrain.checkpoint.licences import card_terms
from pretrain.checkpoint.manifest import checked_directory
from pretrain.checkpoint.model_directory import (
    ADAPTED_MODEL,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    PICKLES,
    SINGLE,
    TOKENIZER_FILES,
    ModelDirectory,
)
from pretrain.checkpoint.resolve import resolve_model_directory
from pretrain.errors import (
    CheckpointCorrupt,
    CheckpointError,
    ConfigError,
    ModelError,
)
from pretrain.models.base import Model
from pretrain.utils.files import free_bytes, hash_file, note, read_bytes
from pretrain.utils.hub_files import hub_errors, snapshot
from pretrain.utils.hub_files import pinned as pinned_name
from pretrain.utils.hub_names import HubName, hub_name

__all__ = ["fetch_config", "fetch_model", "pinned", "terms"]

# Read before the weights are fetched. Patterns of fnmatch, of paths inside the repository.
_SMALL = (
    "README.md",  # names licence and languages
    ".gitattributes",  # which every repository has: the library warns at length if nothing matches
    *("config.json", "generation_config.json", INDEX, ADAPTER_CONFIG, ADAPTED_MODEL),
    *(*TOKENIZER_FILES, "added_tokens.json", "preprocessor_config.json"),
    "additional_chat_templates/*.jinja",
    *("modules.json", "sentence_*_config.json"),
    *("config_sentence_transformers.json", "*_Pooling/config.json", "*_Normalize/config.json"),
)


def fetch_model(path: str | Path) -> tuple[Path, str]:
    """Return the directory of a model or run; a model of the Hub that is not complete in the cache is fetched.

    Args:
        path: a directory, or the name of a model on the Hub; see ``pretrain.utils.hub_names``.

    Returns:
        The real path of the directory, not yet resolved to the best model of a run, and its name: of a model on the Hub
        that with its commit, else ``path``.

    Raises:
        CheckpointError: there is no such directory or model, it cannot be fetched, or it has no safetensors.
        CheckpointCorrupt: a fetched file is not the one that the Hub lists.
        ConfigError: the model is of an unknown family, or its configuration is not valid.
    """
    name = hub_name(path)
    if name is None:
        return checked_directory(path), str(Path(path))
    directory = snapshot(name, _SMALL)
    commit = replace(name, revision=directory.name)
    model = ModelDirectory(directory, verify=False)
    weights = _weights(model, os.listdir(directory))
    if not weights or not all(map(model.has, weights)):
        _fetch_weights(commit, model)
    elif name.revision != commit.revision:
        note(f"{commit} is used, which is in {_home(directory)}")
    return directory, str(commit)


def fetch_config(path: str | Path) -> ModelDirectory:
    """Return what opening ``path`` opens, for its small files: weights are neither verified nor fetched."""
    name = hub_name(path)
    directory = checked_directory(path) if name is None else snapshot(name, _SMALL)
    return ModelDirectory(resolve_model_directory(directory), verify=False)


def terms(path: str | Path) -> dict[str, Any]:
    """Return licence and languages of a model by its model card; nothing is known without a directory or a card.

    A link to a file of a repository on the Hub becomes its address; of a local directory it is left out.
    """
    if not path:
        return {}
    name = hub_name(path)
    try:
        stated = card_terms(
            read_bytes(fetch_config(path).real("README.md")).decode("utf-8", "replace")
        )
    except CheckpointError:
        return {}
    link = stated.get("license_link")
    if link and "://" not in link:
        stated["license_link"] = name and (
            f"https://huggingface.co/{name.repository}/blob/{name.revision or 'main'}/{link}"
        )
    return {key: value for key, value in stated.items() if value}


def pinned(path: str, before: str | None = None) -> str:
    """Return the name of a model on the Hub with its commit; see ``pretrain.utils.hub_files.pinned``."""
    return pinned_name(path, before, _SMALL)


def _weights(model: ModelDirectory, names: Collection[str]) -> list[str]:
    """Return the weight files of a model with files of these names; none if it has no safetensors."""
    if SINGLE in names:
        return [SINGLE]
    if INDEX in names:
        return list(model.weight_files())
    return [ADAPTER_WEIGHTS] if {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= set(names) else []


def _fetch_weights(name: HubName, model: ModelDirectory) -> None:
    """Check the small files of a model, print what is fetched, and fetch its weights."""
    import huggingface_hub

    with hub_errors(name):
        info = huggingface_hub.HfApi().model_info(
            name.repository, revision=name.revision, files_metadata=True
        )
    listed = {file.rfilename: file for file in info.siblings or ()}
    small = [file for file in listed if model.has(file)]
    _refuse_damaged(model, {file: listed[file] for file in small})
    weights = _weights(model, listed)
    _refuse_unusable(name, model, weights, listed)
    sizes = {file: listed[file].size or 0 for file in (*small, *weights)}
    home = _home(model.path)
    note(
        f"{name}: {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, licence: {_licence(info)}, kept in {home}"
    )
    needed = sum(sizes[file] for file in weights if not model.has(file))
    if (free := free_bytes(model.path)) < needed:
        raise CheckpointError(
            f"The disk is too full for {name}: its weights need {needed:,} bytes, and {free:,} bytes are free in "
            f"{home}. Free some space, or set HF_HOME to a directory on another disk."
        )
    with hub_errors(name):
        huggingface_hub.snapshot_download(
            name.repository, revision=name.revision, allow_patterns=weights
        )
    _refuse_damaged(model, {file: listed[file] for file in weights})


def _refuse_unusable(
    name: HubName, model: ModelDirectory, weights: list[str], listed: Mapping[str, Any]
) -> None:
    """Raise the error that loading the model would end with, as far as its small files show it."""
    if not weights:
        pickles = sorted(file for file in listed if file.endswith(PICKLES))
        if pickles:
            raise CheckpointError(
                f"{name} has no {SINGLE}, only {pickles[0]}. Such files can run any code when they are opened, so "
                "pretrain never fetches them. Choose a revision or another repository with safetensors, or, if you "
                "trust its origin, convert it once with transformers, in a sandbox."
            )
        raise CheckpointError(
            f"{name} has no {SINGLE}, so it is no model that pretrain opens. Its files: "
            f"{', '.join(sorted(listed)[:8]) or 'none'}."
        )
    if missing := [file for file in weights if file not in listed]:
        raise CheckpointError(
            f"{name} lacks {missing[0]}, which its {INDEX} names. Choose another revision."
        )
    try:
        if weights == [ADAPTER_WEIGHTS]:
            checkpoint.adapter_files.from_peft(
                model.json(ADAPTER_CONFIG), f"{name}, {ADAPTER_CONFIG}"
            )
        elif not model.has("config.json"):
            raise CheckpointError(f"{name} has no config.json, so it is no Hugging Face model.")
        else:
            Model.from_hf_config(model.json("config.json"))
    except (ConfigError, ModelError) as error:
        raise type(error)(
            f"{name} cannot be opened, so its weights are not fetched. {error}"
        ) from error


def _refuse_damaged(model: ModelDirectory, listed: Mapping[str, Any]) -> None:
    """Compare files with what the Hub lists; one that differs is removed from the cache.

    Raises:
        CheckpointCorrupt: a file has another hash.
    """
    for file, entry in listed.items():
        path = model.real(file)
        if entry.lfs is not None:
            expected, digest = entry.lfs.sha256, hash_file(path).sha256
        elif entry.blob_id is not None:
            data = path.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
            expected, digest = entry.blob_id, blob.hexdigest()
        else:
            continue
        if digest != expected:
            path.unlink()
            (model.path / file).unlink(missing_ok=True)
            raise CheckpointCorrupt(
                model.path / file,
                f"the hash {expected[:16]}...",
                f"{digest[:16]}...",
                "It was damaged on its way from the Hub and has been removed; run the same command again.",
            )


def _home(snapshot: Path) -> Path:
    """Return the directory of a repository in the cache, above ``snapshots``."""
    return snapshot.parent.parent


def _licence(info: Any) -> str:
    named = getattr(info.card_data, "license", None)
    if isinstance(named, list):
        named = ", ".join(map(str, named))
    tags = [tag for tag in info.tags or () if tag.startswith("license:")]
    return str(named or (tags[0].partition(":")[2] if tags else "not stated"))
