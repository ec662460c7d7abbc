"""The ranks that write or read one directory collectively: their communication, and the shards that each of them holds.

Checkpointing does not depend on a communication library: distributed training passes a `Peers`, and a single process
needs none. An error on one rank is raised on all ranks, before anything is published or used.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import CheckpointCorrupt, CheckpointError, PretrainError, named_error
from pretrain.nn.layout import ShardLayout, ShardSlice, whole
from pretrain.utils.strict_json import to_json

__all__ = [
    "SINGLE_PROCESS",
    "Peers",
    "TensorSharding",
    "errors_on_all_ranks",
    "raise_on_all_ranks",
    "refuse_differences",
]


class Peers:
    """Ranks that call the same functions in the same order; as they are here, a single process.

    Only the main thread calls them. No call may use pickle. After an exception from any call, the ranks can no longer
    be synchronised.

    Attributes:
        rank: rank of this process, from 0.
        size: world size.
    """

    rank = 0
    size = 1

    def gather(
        self, shards: Sequence[Tensor], owners: Sequence[int], ranks: Sequence[int]
    ) -> list[list[Tensor]]:
        """Gather each of several tensors on one of the ranks that take part.

        Args:
            shards: tensors of bytes; the i-th has the same length and kind of device on all ranks that take part.
            owners: the rank that gets the i-th tensor of all ranks.
            ranks: the ranks that take part, all or those of one replica, in ascending order.

        Returns:
            For every tensor, those of all ``ranks`` in their order on its owner, and nothing on the others.
        """
        assert self.size == 1, "several processes exchange tensors through a process group only"
        return [[shard] for shard in shards]

    def heartbeat(self) -> None:
        """Report to the watchdog, if there is one, that this process makes progress; in the main thread only."""

    def all_gather_object(self, value: Any, *, progress: bool = True) -> list[Any]:
        """Gather the JSON values of all ranks on all ranks, in rank order; waits for all ranks.

        ``progress`` tells whether the call counts as a `heartbeat`.
        """
        return [value]


SINGLE_PROCESS = Peers()


class TensorSharding:
    """The sharding of tensors over the ranks, looked up by their keys in a file.

    A key ends with the name of a parameter, alone or behind a "/" (``optimizer/exp_avg/backbone.wte.weight``); the name
    may be that in the model or in the objective, where it begins with ``model.``. Tensors that belong to no parameter
    of the layout, and all 0-d tensors, are whole on every rank.

    Args:
        layout: sharding of the parameters; None if all of them are whole on every rank.
        peers: the ranks, as many as the layout has.

    Raises:
        CheckpointError: the layout is for another world size.
    """

    def __init__(self, layout: ShardLayout | None, peers: Peers) -> None:
        if layout is not None and layout.world != peers.size:
            raise CheckpointError(
                f"The shard layout is for {layout.world} processes, but {peers.size} are running."
            )
        self.layout = layout or ShardLayout({}, dp_replicate=peers.size, rank=peers.rank)
        self.rank, self.size = peers.rank, peers.size

    def parameter(self, key: str, shape: Sequence[int]) -> str | None:
        """Return the parameter whose shards a tensor of this key and number of dimensions has; None if it has none."""
        if not shape:
            return None
        words = key.split("/")
        for start in range(len(words)):
            bare = "/".join(words[start:])
            for name in (bare, bare.removeprefix("model."), f"model.{bare}"):
                if name in self.layout.shapes:
                    return name
        return None

    def region(self, key: str, shape: Sequence[int]) -> ShardSlice:
        """Return the region of a tensor, given its full shape, that this rank holds; it may be empty."""
        name = self.parameter(key, shape)
        return whole(tuple(shape)) if name is None else self.layout.region(name, self.rank)

    def regions(self, key: str, shape: Sequence[int]) -> list[ShardSlice]:
        """Return the regions of a tensor on the ranks of this replica, if one of them holds a part only; else none."""
        name = self.parameter(key, shape)
        if name is None or not math.prod(shape):
            return []
        regions = [self.layout.region(name, rank) for rank in self.layout.replica_ranks]
        return [] if all(region == whole(tuple(shape)) for region in regions) else regions

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return key -> whole tensor on the meta device, given the shards of this rank.

        Raises:
            CheckpointError: a shard does not have the shape given by the layout.
        """
        whole_tensors = {}
        for key, part in tensors.items():
            name, shape = self.parameter(key, part.shape), tuple(part.shape)
            if name is not None:
                shape = tuple(self.layout.shapes[name])
                if (shard_shape := self.layout.region(name, self.rank).shape) != tuple(part.shape):
                    raise CheckpointError(
                        f"{key!r} has the shape {tuple(part.shape)} on process {self.rank}, but its shard of "
                        f"{shape} must have the shape {shard_shape}: it was not sharded as in the layout."
                    )
            whole_tensors[key] = torch.empty(shape, dtype=part.dtype, device="meta")
        return whole_tensors


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
    failures = peers.all_gather_object(None if error is None else _described(error))
    rank = next((i for i, found in enumerate(failures) if found is not None), None)
    if rank is None:
        return
    if error is not None and not isinstance(error, PretrainError):
        raise error  # a bug or a broken device: the traceback is worth more than the same error on all ranks
    raise _rebuilt(failures[rank], f" (process {rank} of {peers.size})") from error


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
    first, differing = tables[0], tables[other]
    key = min(key for key in first | differing if first.get(key) != differing.get(key))
    raise CheckpointError(
        f"The processes do not agree on {what}: {key!r} is {first.get(key, 'absent')} on process 0 and "
        f"{differing.get(key, 'absent')} on process {other}. Were they started with other settings or another version?"
    )
