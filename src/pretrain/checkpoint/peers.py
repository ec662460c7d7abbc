"""The communication interface of checkpointing: ranks that write or read one directory collectively.

Checkpointing does not depend on a communication library: distributed training passes a `Peers`, and a single process
needs none. An error on one rank is raised on all ranks, before anything is published or used.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from pretrain.errors import CheckpointCorrupt, CheckpointError, PretrainError, named_error
from pretrain.utils.strict_json import to_json

__all__ = [
    "ALONE",
    "Alone",
    "Peers",
    "errors_on_all_ranks",
    "raise_on_all_ranks",
    "refuse_differences",
]


class Peers(Protocol):
    """Ranks that call the same functions in the same order.

    A background thread needs peers of its own, so that its messages do not mix with those of training. No call may use
    pickle. After an exception from any call, the ranks can no longer be synchronised.

    Attributes:
        rank: rank of this process, from 0.
        size: world size.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, tensor: Tensor, to: int) -> None:
        """Start to send a contiguous CPU tensor, of any dtype; returns without waiting for the receiver.

        Tensors sent to one rank arrive there in order. The tensor is kept alive until `wait_until_sent`.
        """

    def recv(self, tensor: Tensor, source: int) -> None:
        """Receive the next tensor from ``source`` into a contiguous CPU tensor; returns when it is filled."""

    def wait_until_sent(self) -> None:
        """Wait until all sent tensors have been received."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather the JSON values of all ranks on all ranks, in rank order; waits for all ranks."""


class Alone:
    """A single process, without communication."""

    rank = 0
    size = 1

    def send(self, tensor: Tensor, to: int) -> None:
        """Raise CheckpointError: there is no other rank."""
        raise CheckpointError(f"One process alone cannot send to process {to}.")

    def recv(self, tensor: Tensor, source: int) -> None:
        """Raise CheckpointError: there is no other rank."""
        raise CheckpointError(f"One process alone cannot receive from process {source}.")

    def wait_until_sent(self) -> None:
        """Return at once: nothing was sent."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return a list with the value of this process only."""
        return [value]


ALONE = Alone()


@contextlib.contextmanager
def errors_on_all_ranks(peers: Peers) -> Iterator[None]:
    """Raise an error that occurs inside the block on any rank on all ranks; the block must not communicate.

    Raises:
        PretrainError: the error of the lowest rank that failed; its text names the rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # sent to all ranks below, then raised
        error = caught
    raise_on_all_ranks(peers, error)


def raise_on_all_ranks(peers: Peers, error: Exception | None) -> None:
    """Raise the same error on all ranks if any rank has one.

    Raises:
        PretrainError: the error of the lowest rank that failed; its text names the rank. A single process raises its
            own error unchanged, and so does a rank whose own error is not a PretrainError.
    """
    if peers.size == 1:
        if error is not None:
            raise error
        return
    told = peers.all_gather_object(None if error is None else _described(error))
    rank = next((i for i, found in enumerate(told) if found is not None), None)
    if rank is None:
        return
    if error is not None and not isinstance(error, PretrainError):
        raise error  # a bug or a broken device: the traceback is worth more than the same error on all ranks
    raise _rebuilt(told[rank], f" (process {rank} of {peers.size})") from error


def _described(error: Exception) -> dict[str, str]:
    about = {"kind": type(error).__name__, "text": str(error)}
    if isinstance(error, CheckpointCorrupt):
        about |= {"file": error.file, "expected": error.expected, "found": error.found}
    return about


def _rebuilt(about: dict[str, str], where: str) -> PretrainError:
    if about["kind"] == CheckpointCorrupt.__name__:
        plain = CheckpointCorrupt(about["file"], about["expected"], about["found"])
        hint = about["text"].removeprefix(str(plain)).strip()
        return CheckpointCorrupt(
            about["file"], about["expected"], about["found"], f"{hint}{where}".strip()
        )
    return named_error(about["kind"], about["text"] + where)


def refuse_differences(peers: Peers, what: str, value: dict[str, Any]) -> None:
    """Raise an error unless all ranks have the same JSON table.

    Raises:
        CheckpointError: the tables differ; the text names the first key that differs.
    """
    digests = peers.all_gather_object(hashlib.sha256(to_json(value)).hexdigest())
    other = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    tables = peers.all_gather_object(value)
    here, there = tables[0], tables[other]
    key = next(key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key))
    raise CheckpointError(
        f"The processes do not agree on {what}: {key!r} is {here.get(key, 'absent')} on process 0 and "
        f"{there.get(key, 'absent')} on process {other}. Were they started with other settings or another version?"
    )
