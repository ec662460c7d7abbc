"""Saving while training goes on: the tensors are copied aside, and a thread writes the copy.

Training stands still for the copy alone. The copies live in one block of memory that every save uses again, so a save
waits for the one before it; a change of the weights after `Saver.save` has returned never reaches the files.
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

_ALIGNMENT = 64  # bytes; every copy starts at a multiple


@runtime_checkable
class Watched(Protocol):
    """Peers of a run that a watchdog ends when it seems to hang: that must know of the thread that writes."""

    def moved(self) -> None:
        """Say that the calling thread has come further."""

    def awaiting(self, writer: threading.Thread) -> AbstractContextManager[None]:
        """Inside, training waits for that thread."""


class Staging:
    """One block of CPU memory for copies of tensors, pinned where they come from a CUDA device."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._pinned: weakref.finalize[Any, Any] | None = None

    def copy(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Contiguous copies on the CPU, valid until the next call; returns when they are made."""
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
        # numpy asks the system for large pages: the first copy then costs little more than the later ones.
        self._block = torch.from_numpy(np.empty(max(size, 1), dtype=np.uint8))
        if pin:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch says nothing about it
            pointer = self._block.data_ptr()
            if int(runtime.cudaHostRegister(pointer, self._block.numel(), 0)) == 0:
                self._pinned = weakref.finalize(self, runtime.cudaHostUnregister, pointer)

    def free(self) -> None:
        """Give the memory back."""
        if self._pinned is not None:
            self._pinned()
            self._pinned = None
        self._block = torch.empty(0, dtype=torch.uint8)


def _awaited(writer: threading.Thread, peers: Peers) -> AbstractContextManager[None]:
    return peers.awaiting(writer) if isinstance(peers, Watched) else nullcontext()


class Saver:
    """Writes the checkpoints of a run, at once or in the background.

    A context manager: at its end nothing is being written any more. A process that ends without it finishes a save
    in the background, unless it is killed; then the next one sweeps what is left.

    Args:
        run_dir: the run.
        background: return as soon as the tensors are copied.
        layout: which parts of the parameters the processes hold; None if each has them whole.
        peers: the processes. In the background they must be the saver's own.

    Attributes:
        stall: seconds that the last ``save`` took of the training's time.
        seconds: from the last ``save`` that came to its end until its checkpoint was durable; None before.
        durable: the newest checkpoint that this saver has finished, or None.
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
        """Save as ``pretrain.checkpoint.save_checkpoint`` does; waits for the save before it.

        Returns:
            Where the checkpoint lies, or will lie once ``wait`` has returned.

        Raises:
            CheckpointError: this save could not be made or, in the background, the one before it.
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
        except Exception as error:  # the others are told in the background, or they would wait
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
            except BaseException as error:  # raised where training looks for it
                self._failure = error

        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(work,), name="pretrain-saver"
        )
        self._thread.start()
        self.stall = time.monotonic() - began
        return self.run_dir / f"checkpoint-{step}"

    def _staged(self, draft: Draft) -> Draft:
        """The draft with copies in the place of those tensors that this process gives."""
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
        """Whether a save in the background has failed, and nobody was told yet.

        All processes must act on it at the same step, which they have to agree on; then each calls ``poll``.
        """
        return self._failure is not None

    def poll(self) -> None:
        """Raise what a save in the background failed with, if it did; does not wait.

        Raises:
            CheckpointError: that save could not be made; earlier checkpoints are untouched.
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
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: see ``poll``.
        """
        if self._thread is not None:
            # A slow disk must not look as if training hung, nor a stuck one as if others were to blame.
            with _awaited(self._thread, self.peers):
                self._thread.join()
            self._thread = None
        self.poll()

    def close(self) -> None:
        """Wait, and give the memory of the copies back."""
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
            note(str(error))  # what is already on its way is the cause, or matters more
