"""Asynchronous checkpointing: the tensors are copied to a staging buffer, and a background thread writes the copies.

Training is blocked only during the copy. All saves use the same staging buffer, so a save waits for the previous one.
Changes to the weights after `Saver.save` has returned never reach the files.
"""

from __future__ import annotations

import contextvars
import os
import threading
import time
import weakref
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint.draft import Draft, check_numbers, draft_of, kept, write_checkpoint
from pretrain.checkpoint.model_files import MAX_SHARD_BYTES
from pretrain.checkpoint.peers import ALONE, Peers, errors_on_all_ranks
from pretrain.checkpoint.training_state import TrainingState
from pretrain.errors import CheckpointError, PretrainError
from pretrain.nn.layout import ShardLayout
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["Saver", "Staging", "Watched"]

_ALIGNMENT = 64  # bytes; every copy starts at a multiple of this


@runtime_checkable
class Watched(Protocol):
    """Peers with a watchdog, which ends a run that seems to hang and therefore must know of the writing thread."""

    def moved(self) -> None:
        """Report progress of the calling thread to the watchdog."""

    def awaiting(self, writer: threading.Thread) -> AbstractContextManager[None]:
        """Return a context manager inside which the main thread waits for the thread ``writer``."""


class Staging:
    """A block of CPU memory for copies of tensors, pinned if the tensors are on a CUDA device."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._pinned: weakref.finalize[Any, Any] | None = None

    def copy(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return contiguous copies on the CPU, valid until the next call; blocks until the copies are complete."""
        wanted = list(tensors)
        starts, end = [], 0
        for tensor in wanted:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        device = next((t.device for t in wanted if t.device.type == "cuda"), None)
        self._reserve(end, pin=device is not None)
        copies = []
        for start, tensor in zip(starts, wanted, strict=True):
            place = self._block[start : start + tensor.nbytes]
            copies.append(place.view(tensor.dtype).view(tensor.shape))
        with torch.no_grad():
            for copy, tensor in zip(copies, wanted, strict=True):
                copy.copy_(tensor, non_blocking=True)
        if device is not None:
            torch.cuda.synchronize(device)
        return copies

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


def _awaited(writer: threading.Thread, peers: Peers) -> AbstractContextManager[None]:
    return peers.awaiting(writer) if isinstance(peers, Watched) else nullcontext()


class Saver:
    """Writer of the checkpoints of a run, in the foreground or in the background.

    A context manager: when it exits, all saves are complete. If a process ends without it, a save in the background is
    still completed, unless the process is killed; then the next save removes the leftovers.

    Args:
        run_dir: the run.
        background: return as soon as the tensors are copied.
        layout: which shards of the parameters each rank holds; None if every rank holds them whole.
        peers: the ranks. For saving in the background, they must be used by this saver only.

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
        peers: Peers = ALONE,
    ) -> None:
        self.run_dir = Path(os.path.abspath(run_dir))
        self.background, self.layout, self.peers = background, layout, peers
        self.stall = 0.0
        self.seconds: float | None = None
        self.durable: Path | None = None
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

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
        """Save like ``pretrain.checkpoint.save_checkpoint``, after waiting for the previous save.

        Returns:
            Path of the checkpoint; in the background it exists once ``wait`` has returned.

        Raises:
            CheckpointError: this save failed or, in the background, the previous one.
        """
        began = time.monotonic()
        check_numbers(keep, step)
        self.wait()
        block = {**pretrain_block, "step": step, "tokens_seen": tokens}

        def drafted() -> Draft:
            return draft_of(
                model,
                step=step,
                block=block,
                training=training,
                max_shard_bytes=max_shard_bytes,
                layout=self.layout,
                peers=self.peers,
            )

        if not self.background:
            with errors_on_all_ranks(self.peers):
                draft = drafted()
            self.durable = write_checkpoint(
                self.run_dir, draft, self.peers, keep=keep, protect=protect
            )
            self.stall = self.seconds = time.monotonic() - began
            return self.durable
        moved = self.peers.moved if isinstance(self.peers, Watched) else lambda: None
        failure: Exception | None = None
        staged: Draft | None = None
        try:
            staged = self._staged(drafted())
        except Exception as error:
            # The thread reports it to the other ranks, which would otherwise wait for this one.
            failure = error

        def work() -> None:
            try:
                with errors_on_all_ranks(self.peers):
                    if failure is not None:
                        raise failure
                assert staged is not None
                self.durable = write_checkpoint(
                    self.run_dir, staged, self.peers, keep=keep, protect=protect, moved=moved
                )
                self.seconds = time.monotonic() - began
            except BaseException as error:  # raised in the main thread, by `poll`
                self._failure = error

        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(work,), name="pretrain-saver"
        )
        self._thread.start()
        self.stall = time.monotonic() - began
        return self.run_dir / f"checkpoint-{step}"

    def _staged(self, draft: Draft) -> Draft:
        """Return the draft with staged copies of the tensors that this rank sends or writes."""
        draft = kept(draft)
        copies = iter(
            self._staging.copy(part for group in draft.groups for part in group.parts.values())
        )
        groups = [
            replace(group, parts={key: next(copies) for key in group.parts})
            for group in draft.groups
        ]
        return replace(draft, groups=tuple(groups))

    @property
    def busy(self) -> bool:
        """Whether a save is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed and the error was not raised yet.

        The ranks must agree on the step at which they act on it; then all of them call ``poll``.
        """
        return self._failure is not None

    def poll(self) -> None:
        """Raise the error of a save in the background, if it failed; does not wait.

        Raises:
            CheckpointError: the save failed; earlier checkpoints are untouched.
        """
        failure, self._failure = self._failure, None
        if isinstance(failure, PretrainError) or (
            failure is not None and not isinstance(failure, Exception)
        ):
            raise failure
        if failure is not None:
            raise CheckpointError(
                f"Saving to {self.run_dir} in the background failed with {type(failure).__name__}: {failure}. "
                f"Earlier checkpoints are untouched."
            ) from failure

    def wait(self) -> None:
        """Wait until the save in the background, if any, is complete.

        Raises:
            CheckpointError: see ``poll``.
        """
        if self._thread is not None:
            # The watchdog must neither mistake a slow disk for a hang, nor blame other ranks for a stuck disk.
            with _awaited(self._thread, self.peers):
                self._thread.join()
            self._thread = None
        self.poll()

    def close(self) -> None:
        """Wait for the save in the background and release the staging buffer."""
        try:
            self.wait()
        finally:
            self._staging.free()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            # The exception already being raised is the cause of this one, or more important.
            note(str(error))
