"""The processes that write or read one directory together, as storage sees them.

Storage names no way of talking: who has processes gives it a `Peers`; one process alone needs none. What fails on one
of them fails on all, with the same error, before anything is published or used.
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
    """Processes that call the same functions here in the same order.

    A background thread needs peers of its own: what it says must not mix with what training says. No call may use
    pickle. An exception from any call means that the processes can no longer be brought together.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, tensor: Tensor, to: int) -> None:
        """Start to send a contiguous CPU tensor, of any dtype; returns without waiting for the receiver.

        What is sent to one process arrives there in order. The tensor is kept until `settle`.
        """

    def recv(self, tensor: Tensor, source: int) -> None:
        """Fill a contiguous CPU tensor with the next one from ``source``; returns when it is filled."""

    def wait_until_sent(self) -> None:
        """Return when everything sent has been received."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every process gets everyone's JSON value, by rank; waits for all."""


class Alone:
    """One process."""

    rank = 0
    size = 1

    def send(self, tensor: Tensor, to: int) -> None:
        """Nobody is there."""
        raise CheckpointError(f"One process alone cannot send to process {to}.")

    def recv(self, tensor: Tensor, source: int) -> None:
        """Nobody is there."""
        raise CheckpointError(f"One process alone cannot receive from process {source}.")

    def wait_until_sent(self) -> None:
        """Nothing is on its way."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Its own value."""
        return [value]


ALONE = Alone()


@contextlib.contextmanager
def errors_on_all_ranks(peers: Peers) -> Iterator[None]:
    """What fails inside on one process is raised by all of them; inside nothing may be asked of the peers.

    Raises:
        PretrainError: of the lowest process that failed, which it names.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # told to all below, then raised
        error = caught
    raise_on_all_ranks(peers, error)


def raise_on_all_ranks(peers: Peers, error: Exception | None) -> None:
    """Raise the same error everywhere if any process has one.

    Raises:
        PretrainError: of the lowest process that failed, which it names. A process alone raises its own, unchanged.
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
        raise error  # a bug or a broken device: its own trace is worth more than agreement
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
    """Refuse to go on unless all processes have the same JSON table.

    Raises:
        CheckpointError: naming the first key that differs.
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
