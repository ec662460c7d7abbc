"""Synchronous saving of models and checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.draft import check_numbers, draft_of, write_checkpoint, write_directory
from pretrain.checkpoint.model_files import MAX_SHARD_BYTES
from pretrain.checkpoint.peers import ALONE, Peers, errors_on_all_ranks
from pretrain.checkpoint.training_state import TrainingState
from pretrain.errors import CheckpointError
from pretrain.nn.layout import ShardLayout
from pretrain.utils import directories, files

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["estimated_size", "save_checkpoint", "save_model"]

_OVERWRITABLE = re.compile(
    r"(config|generation_config|manifest|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|"
    r"(vocab|merges)\.txt|chat_template\.jinja|README\.md|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"adapter_config\.json|adapter_model\.safetensors|pretrain\.json"
)


# ------------------------------------------------------------------------------------------------ saving


def save_model(
    model: Model,
    directory: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    layout: ShardLayout | None = None,
    peers: Peers = ALONE,
) -> Path:
    """Write a model in the format of `load` and transformers, or of `load` and peft if it has an adapter.

    An adapted model is written without its base, which `adapter_config.json` names by its absolute path or its name on
    the hub. Its config.json is called pretrain.json there (not inside a run), because transformers would take a
    directory with a config.json for a whole model.

    Args:
        model: the model, with its head, configuration and, if it has one, tokenizer.
        directory: a new or empty directory, or an older model directory, which is replaced as a whole unless it
            contains `training/`.
        max_shard_bytes: weights above this size are split into several files with an index.
        layout: which shards of the parameters each rank holds; None if every rank holds them whole.
        peers: the ranks that hold the model; all of them must call this function.

    Returns:
        The absolute path of the directory, which is durable on disk.

    Raises:
        CheckpointError: the directory cannot be written or contains other files, or a weight is not finite.
    """
    target = Path(os.path.abspath(directory))
    with errors_on_all_ranks(peers):
        if peers.rank == 0:
            _refuse_target(target, model)
            with files.writing(target):
                directories.make_directories(target.parent)
                directories.sweep(target.parent, name=target.name)
        draft = draft_of(model, max_shard_bytes=max_shard_bytes, layout=layout, peers=peers)
    write_directory(target, draft, peers)
    return target


def save_checkpoint(
    run_dir: str | Path,
    model: Model,
    *,
    step: int,
    tokens: int,
    pretrain_block: Mapping[str, Any],
    training: TrainingState | None = None,
    keep: int = 2,
    protect: Collection[int] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    layout: ShardLayout | None = None,
    peers: Peers = ALONE,
) -> Path:
    """Write `run_dir/checkpoint-<step>`, then delete old checkpoints that need not be kept.

    When this returns, the checkpoint is verified and durable: it survives a power failure.

    Args:
        run_dir: the run directory; created if absent.
        model: see `save_model`.
        step: optimizer steps so far.
        tokens: tokens seen so far.
        pretrain_block: objective, data fingerprint, sources, metrics, ...; stored in config.json.
        training: the state needed to resume, or None.
        keep: number of complete checkpoints to keep.
        protect: steps that are never deleted (the best one).
        max_shard_bytes: see `save_model`.
        layout: see `save_model`; the tensors of `training` are sharded like their parameters.
        peers: see `save_model`.

    Returns:
        Path of the checkpoint.

    Raises:
        CheckpointError: disk full, no permission, or a weight is not finite; earlier checkpoints are untouched.
    """
    check_numbers(keep, step)
    with errors_on_all_ranks(peers):
        draft = draft_of(
            model,
            step=step,
            block={**pretrain_block, "step": step, "tokens_seen": tokens},
            training=training,
            max_shard_bytes=max_shard_bytes,
            layout=layout,
            peers=peers,
        )
    run = Path(os.path.abspath(run_dir))
    return write_checkpoint(run, draft, peers, keep=keep, protect=protect)


def estimated_size(model: Model, *, copies: float = 3.0) -> int:
    """Return the estimated size of a checkpoint in bytes: `copies` of the weights in fp32, and the small files."""
    return int(4 * copies * sum(parameter.numel() for parameter in model.parameters())) + (16 << 20)


def _refuse_target(target: Path, model: Model) -> None:
    if not os.path.lexists(target):
        return
    base = model.adapter.base if model.adapter is not None else None
    if base is not None and os.path.realpath(base) == os.path.realpath(target):
        raise CheckpointError(
            f"{target} holds the base of this adapter, without which it is worth nothing. Choose another directory, "
            f"or merge the adapter before saving."
        )
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(
            f"{target} exists and is not a directory. Choose another name for the model."
        )
    with files.writing(target):
        names = sorted(os.listdir(target))
    for name in names:
        if not _OVERWRITABLE.fullmatch(name):
            raise CheckpointError(
                f"{target} holds {name!r}, which is no part of a saved model, and would be lost when the directory is "
                f"replaced. Choose a new directory, or move it away."
            )
