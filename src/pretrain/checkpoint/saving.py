"""Saving of models and checkpoints, at once or in the background.

Every tensor of the files has one owner among the ranks. The main thread gathers the whole tensors on their owners, one
at a time for each of them, so that a rank holds about its share of the model besides its own shards. What follows on a
rank only writes files: in the background a thread does it, which communicates with nobody. When all ranks have written
their files, rank zero adds the manifest and renames the directory.
"""

from __future__ import annotations

import contextvars
import errno
import math
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint import manifest
from pretrain.checkpoint.draft import (
    MAX_SHARD_BYTES,
    Draft,
    FilePlan,
    draft_of,
    total_bytes,
    write_processor,
)
from pretrain.checkpoint.model_directory import is_finite
from pretrain.checkpoint.peers import (
    SINGLE_PROCESS,
    Peers,
    errors_on_all_ranks,
    raise_on_all_ranks,
    refuse_differences,
)
from pretrain.checkpoint.training_state import TrainingState
from pretrain.errors import CheckpointError, PretrainError
from pretrain.nn.layout import ShardLayout, ShardSlice
from pretrain.utils import directories, files
from pretrain.utils.files import Record, note
from pretrain.utils.runlock import is_held
from pretrain.utils.tensors import LazyTensors, write_tensors

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["Saver", "Staging", "estimated_size", "save_checkpoint", "save_model"]

_ALIGNMENT = 64  # bytes; every staged copy starts at a multiple of this
# Bytes from which on a file is written by a thread of its own, where training waits for it.
_LARGE = 16 << 20
_AT_ONCE = 4  # files that a rank writes at the same time
OVERWRITABLE = re.compile(
    r"(config|generation_config|manifest|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|"
    r"(preprocessor_config|processor_config)\.json|"
    r"(modules|sentence_bert_config|config_sentence_transformers)\.json|1_Pooling(/config\.json)?|"
    r"(vocab|merges)\.txt|chat_template\.jinja|README\.md|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"adapter_config\.json|adapter_model\.safetensors|pretrain\.json"
)


def save_model(
    model: Model,
    directory: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    layout: ShardLayout | None = None,
    peers: Peers = SINGLE_PROCESS,
    repository: str | None = None,
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
        repository: name on the hub that the examples of the model card open.

    Returns:
        The absolute path of the directory, which is durable on disk.

    Raises:
        CheckpointError: the directory cannot be written or contains other files, or a weight is not finite.
    """
    target = Path(os.path.abspath(os.path.expanduser(directory)))
    with errors_on_all_ranks(peers):
        if peers.rank == 0:
            _refuse_target(target, model)
            with files.writing(target):
                directories.make_directories(target.parent)
                directories.sweep(target.parent, name=target.name)
        draft = draft_of(
            model,
            max_shard_bytes=max_shard_bytes,
            layout=layout,
            peers=peers,
            repository=repository,
        )
    unfinished = _Unfinished(target, peers)
    try:
        unfinished.begin(draft)
        unfinished.write()
        unfinished.agree()
        with errors_on_all_ranks(peers):
            unfinished.publish()
    finally:
        unfinished.discard()  # after an interrupt, too
    return target


def save_checkpoint(
    run_dir: str | Path,
    model: Model,
    *,
    layout: ShardLayout | None = None,
    peers: Peers = SINGLE_PROCESS,
    **arguments: Any,
) -> Path:
    """Write a checkpoint of a run at once, with the arguments and results of `Saver.save`."""
    return Saver(run_dir, layout=layout, peers=peers).save(model, **arguments)


def estimated_size(model: Model, *, copies: float = 3.0) -> int:
    """Return the estimated size of a checkpoint in bytes: `copies` of the weights in fp32, and the small files."""
    return int(4 * copies * sum(parameter.numel() for parameter in model.parameters())) + (16 << 20)


def _refuse_target(target: Path, model: Model) -> None:
    if not os.path.lexists(target):
        return
    base = model.adapter.base if model.adapter is not None else None
    if base is not None and os.path.realpath(base) == os.path.realpath(target):
        raise CheckpointError(
            f"{target} holds the base of this adapter, without which the adapter cannot be used. Choose another "
            f"directory, or merge the adapter before saving."
        )
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(
            f"{target} exists and is not a directory. Choose another name for the model."
        )
    with files.writing(target):
        names = sorted(os.listdir(target))
        if (target / manifest.POOLING).is_dir():
            names += [
                f"{manifest.POOLING}/{name}" for name in os.listdir(target / manifest.POOLING)
            ]
    for name in names:
        if not OVERWRITABLE.fullmatch(name):
            raise CheckpointError(
                f"{target} holds {name!r}, which is no part of a saved model, and would be lost when the directory is "
                f"replaced. Choose a new directory, or move it away."
            )


# ------------------------------------------------------------------------------------------------ gathering


class Staging:
    """A block of CPU memory for copies of tensors, pinned if the tensors come from a CUDA device."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._pinned: weakref.finalize[Any, Any] | None = None

    def allocate(self, layouts: Sequence[Tensor], *, pin: bool) -> list[Tensor]:
        """Return an uninitialised tensor for each layout (shape and dtype), all of them valid until the next call."""
        starts, end = [], 0
        for layout in layouts:
            starts.append(end)
            end += -(-layout.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._reserve(end, pin=pin)
        return [
            self._block[start : start + layout.nbytes].view(layout.dtype).view(layout.shape)
            for start, layout in zip(starts, layouts, strict=True)
        ]

    def _reserve(self, size: int, *, pin: bool) -> None:
        if self._block.numel() >= size and (self._pinned is not None or not pin):
            return
        self.free()
        # numpy requests huge pages from the system, so that the first copy is little slower than the later ones.
        self._block = torch.from_numpy(np.empty(max(size, 1), dtype=np.uint8))
        if pin:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # not annotated in torch
            pointer = self._block.data_ptr()
            if int(runtime.cudaHostRegister(pointer, self._block.numel(), 0)) == 0:
                self._pinned = weakref.finalize(self, runtime.cudaHostUnregister, pointer)

    def free(self) -> None:
        """Release the memory."""
        if self._pinned is not None:
            self._pinned()
            self._pinned = None
        self._block = torch.empty(0, dtype=torch.uint8)


@torch.no_grad()
def gathered(draft: Draft, peers: Peers, staging: Staging | None = None) -> Draft:
    """Return the draft with the whole tensors that the files of this rank are made of; a collective of all ranks.

    At any time a rank holds its own shards, the whole tensors of its files, and the shards of one tensor more.

    Args:
        draft: with the shards of this rank.
        peers: the ranks.
        staging: memory for copies; None keeps references to tensors that are whole here, which must not change.
    """
    keys_of_ranks = _keys_by_owner(draft.files, peers.size)
    own_keys = keys_of_ranks[peers.rank]
    devices = {draft.parts[key].device for key in own_keys}
    device = next((device for device in devices if device.type == "cuda"), None)
    buffers: dict[str, Tensor] = {}
    if staging is not None:
        layouts = [draft.full[key] for key in own_keys]
        copies = staging.allocate(layouts, pin=device is not None)
        buffers = dict(zip(own_keys, copies, strict=True))
    regions = {
        key: draft.sharding.regions(key, draft.full[key].shape)
        for keys in keys_of_ranks
        for key in keys
    }
    whole: dict[str, Tensor] = {}
    for key in own_keys:
        if not regions[key]:
            full = draft.full[key]
            part = draft.parts[key] if full.numel() else torch.empty_like(full, device="cpu")
            whole[key] = buffers[key].copy_(part, non_blocking=True) if buffers else part
    cut_keys = ([key for key in keys if regions[key]] for keys in keys_of_ranks)
    for keys in zip_longest(*cut_keys):  # at most one for each owner
        owned = [(owner, key) for owner, key in enumerate(keys) if key is not None]
        for key, shards in _send_to_owners(owned, regions, draft, peers):
            full = draft.full[key]
            whole[key] = buffers[key] if buffers else torch.empty_like(full, device="cpu")
            for region, shard in zip(regions[key], shards, strict=True):
                flat = shard[: region.numel * full.element_size()].view(full.dtype)
                whole[key][region.slices()] = flat.view(region.shape)
    if device is not None:
        torch.cuda.synchronize(device)
    return replace(draft, parts=whole)


def _keys_by_owner(plans: Sequence[FilePlan], size: int) -> list[list[str]]:
    """Return for each rank the keys of the tensors that its files are made of."""
    keys_of_ranks: list[dict[str, None]] = [{} for _ in range(size)]
    for plan in plans:
        for name in plan.layout:
            keys_of_ranks[plan.owner].update(dict.fromkeys(plan.mapping.sources[name]))
    return [list(keys) for keys in keys_of_ranks]


def _send_to_owners(
    owned: Sequence[tuple[int, str]],
    regions: Mapping[str, Sequence[ShardSlice]],
    draft: Draft,
    peers: Peers,
) -> Iterator[tuple[str, list[Tensor]]]:
    """Send the shards of tensors to their owners within this replica; yield the bytes of the own ones by rank."""
    ranks = draft.sharding.layout.replica_ranks
    owned = [(owner, key) for owner, key in owned if owner in ranks]
    if not owned:
        return
    shards = []
    for _, key in owned:
        part, longest = draft.parts[key], max(region.numel for region in regions[key])
        flat = part.new_zeros(longest * part.element_size(), dtype=torch.uint8)
        flat[: part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
        shards.append(flat)
    received = peers.gather(shards, [owner for owner, _ in owned], ranks)
    for (owner, key), found in zip(owned, received, strict=True):
        if owner == peers.rank:
            yield key, found


# ------------------------------------------------------------------------------------------------ writing


class _Unfinished:
    """A model directory that is being written under a temporary name, seen from one rank.

    All ranks must make the same calls: `begin`, `write`, `agree`, and then `publish` or `discard`. Only `write` does
    not communicate, so that a thread can do it.

    Args:
        target: the directory that it will be.
        peers: the ranks.
        staging: memory for copies of the tensors, so that the model may change before `write`; None copies nothing.

    Attributes:
        error: what went wrong on this rank; `agree` raises it on all ranks.
        progress: number of tensors and files that this rank has written.
        agreed: all ranks have written their files.
    """

    def __init__(self, target: Path, peers: Peers, staging: Staging | None = None) -> None:
        self.target, self.peers, self._staging = target, peers, staging
        self.error: Exception | None = None
        self.progress = 0
        self.agreed = False
        self._records: dict[str, Record] = {}
        self._created = ExitStack()

    def begin(self, draft: Draft) -> None:
        """Create the temporary directory and gather the tensors of the files of this rank.

        Raises:
            CheckpointError: on all ranks: they do not save the same, or the directory cannot be created.
        """
        self._needed = draft.num_bytes
        _refuse_other_plans(draft, self.peers)
        try:
            self._directory = self._create(draft)
            self.draft = gathered(draft, self.peers, self._staging)
        except BaseException:
            self.discard()
            raise

    def _create(self, draft: Draft) -> Path:
        """Create the temporary directory on rank zero, for all ranks to write to."""
        name, target = "", self.target
        with errors_on_all_ranks(self.peers), files.writing(target, self._needed):
            if self.peers.rank == 0:
                if files.free_bytes(target.parent) < self._needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
                directory = self._created.enter_context(directories.temporary_directory(target))
                for folder in sorted({os.path.dirname(name) for name in draft.texts} - {""}):
                    files.IO.mkdir(directory / folder)
                name = directory.name
        path = target.parent / str(self.peers.all_gather_object(name)[0])
        with errors_on_all_ranks(self.peers):
            if not directories.appears(path):
                raise CheckpointError(
                    f"Process {self.peers.rank} does not see the directory that process 0 created in {target.parent}. "
                    f"The output directory must lie on a file system that all hosts share."
                )
        return path

    def write(self) -> None:
        """Write the files of this rank durably; an error is kept in ``error``, for `agree`."""
        # A save in the background writes with one thread and leaves the other cores to the training.
        large = math.inf if self._staging is not None else _LARGE
        own = [plan for plan in self.draft.files if plan.owner == self.peers.rank]
        sizes = {plan.name: total_bytes(plan.layout) for plan in own}
        try:
            with files.writing(self.target, self._needed), ThreadPoolExecutor(_AT_ONCE) as threads:
                rest = [plan for plan in own if sizes[plan.name] >= large]
                written = threads.map(self._write_tensors, rest)
                try:
                    # Each small file waits for the disk while the threads hash the large ones.
                    if self.peers.rank == 0:
                        self._write_small_files()
                    for plan in own:
                        if sizes[plan.name] < large:
                            self._write_tensors(plan)
                except BaseException:
                    threads.shutdown(wait=False, cancel_futures=True)  # no other file is begun
                    raise
                list(written)  # raises the error of any
        except Exception as error:
            self.error = error

    def _make_tensor(self, plan: FilePlan, name: str) -> Tensor:
        """Return a tensor of a file, made of the gathered ones; it is made only when it is written."""
        self.progress += 1
        sources = {key: self.draft.parts[key] for key in plan.mapping.sources[name]}
        if not plan.training:
            _refuse_non_finite(sources)
        return plan.mapping.make(name, sources, "cpu")

    def _write_tensors(self, plan: FilePlan) -> None:
        tensors = LazyTensors(plan.layout, partial(self._make_tensor, plan))
        path = self._directory / plan.name
        self._records[plan.name] = write_tensors(path, tensors, slashes=plan.training)
        self.progress += 1

    def _write_small_files(self) -> None:
        for name, data in self.draft.texts.items():
            self._records[name] = files.write_file(self._directory / name, data)
        if self.draft.processor is not None:
            self._records |= write_processor(self._directory, *self.draft.processor)

    def agree(self) -> None:
        """Tell all ranks what each of them has written, once all of them have.

        Raises:
            CheckpointError: on all ranks, if any of them failed; the temporary directory is removed.
        """
        try:
            raise_on_all_ranks(self.peers, self.error)
            written_here = {name: [r.size, r.sha256] for name, r in self._records.items()}
            for records in self.peers.all_gather_object(written_here):
                self._records |= {name: Record(*record) for name, record in records.items()}
        except BaseException:
            self.discard()
            raise
        self.agreed = True

    def publish(self) -> None:
        """Write the manifest and rename the directory, on rank zero; an existing target is kept until then.

        Every file is flushed by then, and its hash was taken of the bytes that were written.
        """
        if self.peers.rank != 0:
            return
        with self._created, files.writing(self.target, self._needed):
            about = dict(self.draft.about)
            manifest.write_manifest(self._directory, self.draft.step, self._records, about)
            if manifest.step_of(self.target.name) is not None:
                _keep_foreign(self.target)
            directories.publish(self._directory, self.target)

    def discard(self) -> None:
        """Remove the temporary directory, unless it is published."""
        self._created.close()


def _keep_foreign(target: Path) -> None:
    """Rename a directory in the place of a checkpoint that holds files and no manifest: no save has written it."""
    if not target.is_dir() or os.path.lexists(target / manifest.NAME) or not os.listdir(target):
        return
    aside = directories.name_aside(target)
    files.IO.rename(target, aside)
    files.note(
        f"{target} holds files but no {manifest.NAME}, so it was not written as a checkpoint of this run. It is now "
        f"{aside}; the checkpoint takes its name."
    )


def _refuse_non_finite(weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"The weight {name!r} holds NaN or infinity, so the model is not saved. The last checkpoint is "
                f"untouched; lower the learning rate or look for the step where the loss became non-finite."
            )


def _refuse_other_plans(draft: Draft, peers: Peers) -> None:
    """Raise CheckpointError unless all ranks save the same tensors; otherwise gathering them would deadlock."""
    if peers.size == 1:
        return
    table = {key: f"{tensor.dtype} {list(tensor.shape)}" for key, tensor in draft.full.items()}
    refuse_differences(peers, "what to save", {"step": str(draft.step), **table})


# ------------------------------------------------------------------------------------------------ saving a run


class Saver:
    """Writer of the checkpoints of a run, in the foreground or in the background.

    In the background the tensors are copied to a staging buffer, and a thread writes the copies: training is blocked
    only during the copy, and later changes to the weights never reach the files. All saves use the same buffer, so a
    save waits for the previous one. With several ranks, `publish` completes a save once ``written`` is true on all of
    them; otherwise the next `save` or `wait` does it.

    A context manager: when it exits, all saves are complete. If a single process ends without it, a save in the
    background is still completed, unless the process is killed. If an exception that only this one of several ranks has
    leaves the context, the save in the background is given up. Leftovers are removed by the next save.

    Args:
        run_dir: the run.
        background: return as soon as the tensors are copied.
        layout: which shards of the parameters each rank holds; None if every rank holds them whole.
        peers: the ranks; all of them must make the same calls.

    Attributes:
        stall: seconds for which the last ``save`` blocked training.
        seconds: seconds from the call of the last completed ``save`` until its checkpoint was durable; None before.
        durable: the newest checkpoint that this saver has completed, or None.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        background: bool = False,
        layout: ShardLayout | None = None,
        peers: Peers = SINGLE_PROCESS,
    ) -> None:
        self.run_dir = Path(os.path.abspath(run_dir))
        self.background, self.layout, self.peers = background, layout, peers
        self.stall = 0.0
        self.seconds: float | None = None
        self.durable: Path | None = None
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._unfinished: _Unfinished | None = None
        # Of the last save: when it was called for, and the deletion of the checkpoints that it need not keep.
        self._began = 0.0
        self._rotate: Callable[[], object]

    def save(
        self,
        model: Model,
        *,
        step: int,
        tokens: int,
        pretrain_block: Mapping[str, Any],
        training: TrainingState | None = None,
        keep: int = 2,
        protect: Collection[int] = (),
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> Path:
        """Write `run_dir/checkpoint-<step>`, then delete old checkpoints that need not be kept.

        When this returns in the foreground, the checkpoint is durable: it survives a power failure. The previous save
        in the background is completed first.

        Args:
            model: see `save_model`.
            step: optimizer steps so far.
            tokens: tokens seen so far.
            pretrain_block: objective, data fingerprint, sources, metrics, ...; stored in config.json.
            training: the state needed to resume, or None; its tensors are sharded like their parameters.
            keep: number of complete checkpoints to keep.
            protect: steps that are never deleted (the best one).
            max_shard_bytes: see `save_model`.

        Returns:
            Path of the checkpoint; in the background it exists once ``wait`` has returned.

        Raises:
            CheckpointError: on all ranks: disk full, no permission, or a weight is not finite; earlier checkpoints are
                untouched. In the background, what fails after the copy is raised by the next call.
        """
        began = time.monotonic()
        if keep < 1 or step < 0:
            raise CheckpointError(
                f"keep is {keep} and step is {step}; keep must be at least 1, and step at least 0."
            )
        self.wait()
        self._began = began
        self._rotate = partial(
            manifest.rotate, self.run_dir, keep=keep, protect={*protect, step}, newest=step
        )
        target = self.run_dir / f"checkpoint-{step}"
        save = _Unfinished(target, self.peers, self._staging if self.background else None)
        try:
            with errors_on_all_ranks(self.peers):
                draft = draft_of(
                    model,
                    step=step,
                    block={**pretrain_block, "step": step, "tokens_seen": tokens},
                    training=training,
                    max_shard_bytes=max_shard_bytes,
                    layout=self.layout,
                    peers=self.peers,
                )
                if self.peers.rank == 0:
                    self._prepare(target)
            save.begin(draft)
        except Exception as error:
            if not self.background or self.peers.size > 1:
                raise
            save.error = error
        self._unfinished = save
        if save.error is None:
            self._run(self._write, save)
        if not self.background:
            self.wait()
        self.stall = time.monotonic() - began if self.background else self.seconds or 0.0
        return target

    def _prepare(self, target: Path) -> None:
        """Create the run directory, and remove the leftovers of earlier saves."""
        with files.writing(self.run_dir):
            directories.make_directories(self.run_dir)
            directories.sweep(self.run_dir, exclusive=is_held(self.run_dir))
            if os.path.islink(target):
                raise CheckpointError(
                    f"{target} is a link. Remove it; a checkpoint is written to its own directory."
                )

    # What follows `_Unfinished.begin`: `_write`, then, on all ranks, `_Unfinished.agree`, then `_publish` on rank zero.

    def _write(self, save: _Unfinished) -> None:
        """Write the files of this rank; a single process completes the save as well."""
        save.write()
        if self.peers.size == 1:
            save.agree()
            self._publish(save)

    def _publish(self, save: _Unfinished) -> None:
        save.publish()
        self._rotate()
        self._completed(save)

    def _completed(self, save: _Unfinished) -> None:
        self.durable, self.seconds = save.target, time.monotonic() - self._began

    def _run(self, part: Callable[[_Unfinished], None], save: _Unfinished) -> None:
        """Run a part of a save, in a thread if the saver works in the background; an error is kept in the save."""
        if not self.background:
            self._run_and_keep_error(part, save)
            return
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._run_and_keep_error, part, save),
            name="pretrain-saver",
        )
        self._thread.start()

    def _run_and_keep_error(self, part: Callable[[_Unfinished], None], save: _Unfinished) -> None:
        try:
            part(save)
        except Exception as error:
            save.error = error
        except BaseException as error:  # an interrupt: what is half written must never be published
            if not self.background:
                self._drop()
                raise
            kind = type(error).__name__  # in a thread, of a library that panicked
            save.error = CheckpointError(f"Writing {save.target} was ended by {kind}: {error}")
            save.error.__cause__ = error

    @property
    def busy(self) -> bool:
        """Whether a save is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def written(self) -> bool:
        """Whether this rank has written its files of a background save that all ranks must still `publish`."""
        save = self._unfinished
        if save is None or self.peers.size == 1:
            return False
        return not save.agreed and save.error is None and not self.busy

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed and the error was not raised yet.

        The ranks must agree on the step at which they act on it; then all of them call ``wait``.
        """
        return self._unfinished is not None and self._unfinished.error is not None

    def publish(self) -> None:
        """Publish the save that all ranks have written; all of them must call it. Rank zero does it in its thread.

        Raises:
            CheckpointError: on all ranks, if any of them failed to write; earlier checkpoints are untouched.
        """
        save = self._unfinished
        if save is None or save.agreed:
            return
        self._join()
        try:
            save.agree()
        except BaseException:
            self._drop()
            raise
        if self.peers.rank == 0:
            self._run(self._publish, save)

    def poll(self) -> None:
        """Raise the error of a save in the background, if it failed on this rank; does not wait.

        Raises:
            CheckpointError: the save failed; earlier checkpoints are untouched.
        """
        save = self._unfinished
        # What one of several ranks could not write is raised by `publish`, on all of them.
        if save is None or self.busy or not (self.peers.size == 1 or save.agreed):
            return
        if save.error is not None:
            self._unfinished = None
            raise self._as_saving_error(save.error)

    def _as_saving_error(self, failure: Exception) -> Exception:
        if isinstance(failure, PretrainError) or not self.background:
            return failure
        error = CheckpointError(
            f"Saving to {self.run_dir} in the background failed with {type(failure).__name__}: {failure}. "
            f"Earlier checkpoints are untouched."
        )
        error.__cause__ = failure
        return error

    def wait(self) -> None:
        """Wait until the save in the background, if any, is complete; with several ranks, all of them must call it.

        Raises:
            CheckpointError: on all ranks: the save failed; earlier checkpoints are untouched.
        """
        save = self._unfinished
        if save is None:
            return
        if self.peers.size > 1:
            self.publish()
        self._join()
        self._unfinished = None
        failure = None if save.error is None else self._as_saving_error(save.error)
        raise_on_all_ranks(self.peers, failure)
        if self.peers.rank:
            self._completed(save)

    def _join(self) -> None:
        """Wait for the threads of all ranks.

        What they write is reported, so that the watchdog does not take a slow disk for a hang. The ranks meet every
        second, so that none of them waits in a collective for longer than its timeout.
        """
        seen = -1
        while True:
            if self._thread is not None:
                self._thread.join(1.0)
            if self._unfinished is not None and seen != self._unfinished.progress:
                seen = self._unfinished.progress
                self.peers.heartbeat()
            try:
                busy = any(self.peers.all_gather_object(self.busy, progress=False))
            except Exception:  # a rank is lost
                self._drop()
                raise
            if not busy:
                self._thread = None
                return

    def _drop(self) -> None:
        """Give up a save that is not published."""
        save, self._unfinished = self._unfinished, None
        if save is not None:
            save.discard()

    def close(self) -> None:
        """Wait for the save in the background and release the staging buffer."""
        try:
            self.wait()
        finally:
            self._staging.free()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: object, *_: object) -> None:
        if kind is not None and self.peers.size > 1 and not getattr(error, "everywhere", False):
            if self._thread is not None:
                self._thread.join()  # without the other ranks, which may be in another collective
            self._drop()
            self._staging.free()
            return
        try:
            self.close()
        except CheckpointError as failure:
            if kind is None:
                raise
            # The exception already being raised is the cause of this one, or more important.
            note(str(failure))
