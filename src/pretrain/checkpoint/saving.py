"""Saving a model or a checkpoint at once: checks of the target, then the draft written under its name."""

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
    """Write a model so that `load` and transformers open it; one with an adapter so that `load` and peft do.

    An adapted model is written without its base, which `adapter_config.json` names as it was named to `load`; its
    config.json is called pretrain.json there (not inside a run), or transformers would take the directory for whole.

    Args:
        model: weights, head, configuration, and a tokenizer if it has one.
        directory: new, empty, or an older model directory, which is replaced as a whole unless it has `training/`.
        max_shard_bytes: larger weights are split over several files with an index.
        layout: which parts of the parameters the processes hold; None if each has them whole.
        peers: the processes that hold them; all of them call this.

    Returns:
        The directory, durable on the disk.

    Raises:
        CheckpointError: the place cannot be written, holds other files, or a weight is not finite.
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
    """Write `run_dir/checkpoint-<step>`, then delete the old ones that are no longer wanted.

    When this returns, the checkpoint is on the disk, verified, and survives a power cut.

    Args:
        run_dir: the run; made if absent.
        model: see `save_model`.
        step: optimizer steps so far.
        tokens: tokens seen so far.
        pretrain_block: objective, data fingerprint, sources, metrics, ...; goes into config.json.
        training: what resuming needs, or None.
        keep: how many complete checkpoints stay.
        protect: steps that are never deleted (the best one).
        max_shard_bytes: see `save_model`.
        layout: see `save_model`; the tensors of `training` are cut as their parameters are.
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
    """Bytes that a checkpoint of this model will take: `copies` of its weights in fp32 and the small files."""
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
