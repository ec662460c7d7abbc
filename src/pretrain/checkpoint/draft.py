"""Collective writing of a model directory by all ranks, in the foreground or in the background.

A `Draft` holds the contents of the directory and no reference to the model, so that its tensors can be copied to a
staging buffer and written while training continues.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain import __version__
from pretrain.checkpoint import manifest, model_directory
from pretrain.checkpoint.adapter_files import adapter_facts
from pretrain.checkpoint.model_directory import is_finite
from pretrain.checkpoint.model_files import (
    finite_json,
    index_json,
    model_texts,
    shares,
    total_bytes,
    weight_files,
    write_tokenizer,
)
from pretrain.checkpoint.peers import Peers, errors_on_all_ranks, refuse_differences
from pretrain.checkpoint.sharded_saving import FilePlan, Pieces, given, spread, write_files
from pretrain.checkpoint.training_state import (
    STATE,
    TrainingState,
    check_stem,
    encoded_state,
    shard_name,
)
from pretrain.errors import CheckpointError
from pretrain.lora.peft_format import adapter_packing
from pretrain.models.state import disk_packing
from pretrain.nn.buffers import stored_tensors
from pretrain.nn.layout import ShardLayout, local
from pretrain.utils import directories, files
from pretrain.utils.files import Record
from pretrain.utils.runlock import is_held
from pretrain.utils.strict_json import names_only

if TYPE_CHECKING:
    from pretrain.data.tokenizer import Tokenizer
    from pretrain.models.base import Model

__all__ = [
    "Draft",
    "Group",
    "check_numbers",
    "draft_of",
    "kept",
    "write_checkpoint",
    "write_directory",
]


@dataclass(frozen=True)
class Group:
    """Tensors that are stored together: the weights, or one group of the training folder.

    Attributes:
        stem: stem of the file names; ``""`` for the weights.
        plans: the files.
        parts: key -> the shard of this rank, on any device.
        full: key -> the whole tensor on the meta device.
    """

    stem: str
    plans: tuple[FilePlan, ...]
    parts: Mapping[str, Tensor]
    full: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Total bytes of all files, without their headers."""
        return sum(total_bytes(plan.layout) for plan in self.plans)


@dataclass(frozen=True)
class Draft:
    """The contents of a model directory.

    Attributes:
        step: step of the run; None for a model saved outside a run.
        texts: name -> content of the small files.
        groups: groups of tensors, the weights first.
        state: content of state.json; None without a training folder.
        tokenizer: the tokenizer, and whether the model was trained with token type ids (sentence pairs).
        about: the environment that bit-identical resuming depends on, see ``manifest.environment``.
        pieces: which rank holds which shard of the tensors.
    """

    step: int | None
    texts: Mapping[str, bytes]
    groups: tuple[Group, ...]
    state: bytes | None
    tokenizer: tuple[Tokenizer, bool] | None
    about: Mapping[str, Any]
    pieces: Pieces

    @property
    def num_bytes(self) -> int:
        """Upper bound of the size of the directory in bytes."""
        return sum(group.num_bytes for group in self.groups) + len(self.state or b"") + (1 << 20)


def check_numbers(keep: int, step: int) -> None:
    """Raise CheckpointError if ``keep`` is below 1 or ``step`` is negative."""
    if keep < 1 or step < 0:
        raise CheckpointError(
            f"keep is {keep} and step is {step}; at least 1 checkpoint stays, steps count from 0."
        )


def draft_of(
    model: Model,
    *,
    step: int | None = None,
    block: Mapping[str, Any] | None = None,
    training: TrainingState | None = None,
    max_shard_bytes: int,
    layout: ShardLayout | None,
    peers: Peers,
) -> Draft:
    """Plan a model directory. Every rank computes the same plan, without communication.

    Args:
        model: the model, whole or with this rank's shards of the parameters, as plain or distributed tensors.
        step: step of the run, or None.
        block: the "pretrain" block of config.json.
        training: the state needed to resume; its tensors are sharded as well, see ``Pieces``.
        max_shard_bytes: weights above this size are split into several files.
        layout: sharding of the parameters; None if they are whole.
        peers: the ranks; only ``rank`` and ``size`` are used.

    Raises:
        CheckpointError: a value cannot be stored, or a shard does not have the shape given by the layout.
    """
    pieces = Pieces(layout, peers)
    parts = {name: local(tensor).detach() for name, tensor in stored_tensors(model).items()}
    full = pieces.full(parts)
    config = _config(model, block, full)
    packing = disk_packing(model) if model.adapter is None else adapter_packing(model)
    used = {key for keys in packing.sources.values() for key in keys}
    weights = packing.layout(full)
    adapted = model.adapter is not None
    shards = weight_files(weights, max_shard_bytes, pieces.size, adapter=adapted)
    plans = [
        FilePlan(
            name,
            owner % pieces.size,
            part,
            {tensor: packing.sources[tensor] for tensor in part},
            lambda tensor, sources: packing.make(tensor, sources, "cpu"),
        )
        for owner, (name, part) in enumerate(shards.items())
    ]
    groups = [Group("", tuple(plans), {key: parts[key] for key in sorted(used)}, full)]
    if training is not None:
        for stem, tensors in sorted(training.tensors.items()):
            check_stem(stem)
            groups.append(_training_group(stem, tensors, pieces))
    count = sum(full[name].numel() for name, _ in model.named_parameters())
    texts = model_texts(model, config, count, in_run=step is not None)
    if len(shards) > 1:
        texts = {model_directory.INDEX: index_json(shards, weights), **texts}
    several = getattr(model.backbone.config, "type_vocab_size", 1) > 1
    segments = several and model.tokenizer is not None and model.tokenizer.segments
    return Draft(
        step=step,
        texts=texts,
        groups=tuple(groups),
        state=encoded_state(training.state) if training is not None else None,
        tokenizer=None if model.processor is None else (model.processor, segments),
        about=manifest.environment(torch.get_num_threads(), str(torch.__version__)),
        pieces=pieces,
    )


def _config(
    model: Model, block: Mapping[str, Any] | None, full: Mapping[str, Tensor]
) -> dict[str, Any]:
    config = dict(model.hf_config())
    if block is not None:
        versions = {"pretrain": __version__, "torch": str(torch.__version__)}
        config["pretrain"] = {"versions": versions, **block}
    if model.adapter is not None:
        facts = adapter_facts(model, full)
        config["pretrain"] = {**(config.get("pretrain") or {}), "adapter": facts}
    return dict(finite_json(names_only(config)))


def _training_group(stem: str, tensors: Mapping[str, Tensor], pieces: Pieces) -> Group:
    parts = {key: local(tensors[key]).detach() for key in sorted(tensors)}
    full = pieces.full(parts)
    shards = spread(full, shares(full, pieces.size))
    plans = [
        FilePlan(
            f"{manifest.TRAINING}/{shard_name(stem, i, len(shards))}",
            i % pieces.size,
            part,
            {key: (key,) for key in part},
            lambda key, sources: sources[key],
            slashes=True,
        )
        for i, part in enumerate(shards)
    ]
    return Group(stem, tuple(plans), parts, full)


def kept(draft: Draft) -> Draft:
    """Return the draft with only those shards that this rank sends or writes."""
    groups = []
    for group in draft.groups:
        needed = given(group.plans, group.full, draft.pieces)
        parts = {key: part for key, part in group.parts.items() if key in needed}
        groups.append(replace(group, parts=parts))
    return replace(draft, groups=tuple(groups))


# ------------------------------------------------------------------------------------------------ writing


def write_checkpoint(
    run: Path,
    draft: Draft,
    peers: Peers,
    *,
    keep: int,
    protect: Collection[int] = (),
    moved: Callable[[], None] = lambda: None,
) -> Path:
    """Write ``run/checkpoint-<step>``, durable and verified, then delete old checkpoints that need not be kept.

    Args:
        run: the run directory.
        draft: the contents of the checkpoint.
        peers: the ranks.
        keep: number of complete checkpoints to keep.
        protect: steps that are never deleted.
        moved: called to report progress, after each tensor and each file that this rank has written.

    Raises:
        CheckpointError: on all ranks, if any of them failed; earlier checkpoints are untouched.
    """
    assert draft.step is not None
    target = run / f"checkpoint-{draft.step}"
    with errors_on_all_ranks(peers), files.writing(run):
        if peers.rank == 0:
            directories.make_directories(run)
            directories.sweep(run, exclusive=is_held(run))
            if os.path.islink(target):
                raise CheckpointError(
                    f"{target} is a link. Remove it; a checkpoint is written to its own directory."
                )
    write_directory(target, draft, peers, moved)
    with errors_on_all_ranks(peers), files.writing(run):
        if peers.rank == 0:
            protected = {*protect, draft.step}
            manifest.rotate(run, keep=keep, protect=protected, newest=draft.step)
    return target


def write_directory(
    target: Path, draft: Draft, peers: Peers, moved: Callable[[], None] = lambda: None
) -> None:
    """Write a temporary directory collectively, verify it and rename it; ``moved`` as in `write_checkpoint`.

    Raises:
        CheckpointError: on all ranks, if any of them failed; the temporary directory is removed, and an existing
            target is untouched.
    """
    needed = draft.num_bytes
    with errors_on_all_ranks(peers):
        _refuse_non_finite(draft.groups[0])
    _same_plan(draft, peers)
    with _shared_directory(target, draft, peers) as temporary:
        records: dict[str, Record] = {}
        for group in draft.groups:
            records |= write_files(
                temporary,
                group.plans,
                group.parts,
                group.full,
                draft.pieces,
                peers,
                guard=lambda: _guarded(target, needed, moved),
            )
        for told in peers.all_gather_object(
            {name: [r.size, r.sha256] for name, r in records.items()}
        ):
            records |= {name: Record(*record) for name, record in told.items()}
        with errors_on_all_ranks(peers), files.writing(target, needed):
            if peers.rank == 0:
                _finish(temporary, draft, records)
                directories.publish(temporary, target)


@contextmanager
def _guarded(target: Path, needed: int, moved: Callable[[], None]) -> Iterator[None]:
    with files.writing(target, needed):
        yield
    moved()


def _refuse_non_finite(weights: Group) -> None:
    for name, tensor in weights.parts.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"The weight {name!r} holds NaN or infinity, so the model is not saved. The last checkpoint is "
                f"untouched; lower the learning rate or look for the step where the loss became non-finite."
            )


def _same_plan(draft: Draft, peers: Peers) -> None:
    """Raise CheckpointError unless all ranks save the same tensors; otherwise sends and receives would deadlock."""
    if peers.size == 1:
        return
    table: dict[str, Any] = {"step": str(draft.step)}
    for group in draft.groups:
        for key, tensor in group.full.items():
            table[f"{group.stem}:{key}"] = f"{tensor.dtype} {list(tensor.shape)}"
    refuse_differences(peers, "what to save", table)


@contextmanager
def _shared_directory(target: Path, draft: Draft, peers: Peers) -> Iterator[Path]:
    """Create a temporary directory on rank zero for all ranks to write to; it is removed unless published."""
    with ExitStack() as stack:
        name = ""
        with errors_on_all_ranks(peers), files.writing(target, draft.num_bytes):
            if peers.rank == 0:
                if files.free_bytes(target.parent) < draft.num_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
                made = stack.enter_context(directories.temporary_directory(target))
                if draft.state is not None:
                    files.IO.mkdir(made / manifest.TRAINING)
                name = made.name
        path = target.parent / str(peers.all_gather_object(name)[0])
        with errors_on_all_ranks(peers):
            if not directories.appears(path):
                raise CheckpointError(
                    f"{target.parent} is not the directory that process 0 writes to: what that made there is not seen "
                    f"here. The output directory must lie on a file system that all hosts share."
                )
        yield path


def _finish(temporary: Path, draft: Draft, records: dict[str, Record]) -> None:
    """Write the files that only rank zero writes: the small files and, last, the manifest."""
    small = []
    for folder in {os.path.dirname(name) for name in draft.texts} - {""}:
        files.IO.mkdir(temporary / folder)
    for name, data in draft.texts.items():
        records[name] = files.write_file(temporary / name, data)
        small.append(name)
    if draft.tokenizer is not None:
        tokenizer, segments = draft.tokenizer
        for name, record in write_tokenizer(temporary, tokenizer, segments=segments):
            records[name] = record
            small.append(name)
    if draft.state is not None:
        records[STATE] = files.write_file(temporary / STATE, draft.state)
        small.append(STATE)
        files.fsync_directory(temporary / manifest.TRAINING)
    for folder in {os.path.dirname(name) for name in draft.texts} - {""}:
        files.fsync_directory(temporary / folder)
    manifest.write_manifest(temporary, draft.step, records, dict(draft.about))
    files.fsync_directory(temporary)
    listed = manifest.read_manifest(temporary)
    # Files of tensors have already been read back and hashed by the ranks that wrote them.
    manifest.check_files(temporary, listed, hashes=())
    for name in small:
        manifest.check_hash(temporary / name, listed.files[name])
