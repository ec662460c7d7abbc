"""Writing of whole tensors that are sharded over several ranks.

The files are independent of the world size: each holds whole tensors and has one owner, a rank that writes it
sequentially. All ranks iterate over the same list in rounds. In each round every file gets its next tensor: the ranks
that hold shards of it send them to the owner of the file, which assembles and appends the tensor. At any time a rank
holds its own shards, one whole tensor, and the shards that it sends in this round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import manifest
from pretrain.checkpoint.peers import Peers, raise_on_all_ranks
from pretrain.errors import CheckpointError
from pretrain.nn.layout import ShardLayout, ShardSlice, whole
from pretrain.utils.files import Record
from pretrain.utils.tensors import TensorFile, write_order

__all__ = ["FilePlan", "Pieces", "given", "spread", "write_files"]

SMALLEST_SHARE = 64 << 20  # bytes; smallest average size of the files of a group of tensors


class Pieces:
    """The sharding of tensors over the ranks, looked up by their keys in a file.

    A key is the name of a parameter, or of a per-parameter state (``exp_avg/backbone.wte.weight``); the name may be
    that in the model or in the objective, where it begins with ``model.``. Tensors that belong to no parameter of the
    layout, and all 0-d tensors, are whole on every rank.

    Args:
        layout: sharding of the parameters; None if all of them are whole on every rank.
        peers: the ranks, as many as the layout has.

    Raises:
        CheckpointError: the layout is for another world size.
    """

    def __init__(self, layout: ShardLayout | None, peers: Peers) -> None:
        if layout is not None and layout.world != peers.size:
            raise CheckpointError(
                f"The layout is for {layout.world} processes, and there are {peers.size}."
            )
        self.layout, self.rank, self.size = layout, peers.rank, peers.size
        self._holders: dict[str, dict[ShardSlice, list[int]]] = {}

    def parameter(self, key: str) -> str | None:
        """Return the parameter that a key belongs to; None if it is not in the layout."""
        if self.layout is None:
            return None
        bare = key.partition("/")[2] or key
        names = (bare, bare.removeprefix("model."), f"model.{bare}")
        return next((name for name in names if name in self.layout.shapes), None)

    def region(self, key: str, shape: Sequence[int]) -> ShardSlice:
        """Return the region of a tensor, given its full shape, that this rank holds; it may be empty."""
        name = self.parameter(key) if shape else None
        if name is None or self.layout is None:
            return whole(tuple(shape))
        return self.layout.region(name, self.rank)

    def holders(self, key: str, shape: Sequence[int]) -> dict[ShardSlice, list[int]]:
        """Return the non-empty regions of a tensor and, for each, the ranks that hold it in ascending order."""
        name = self.parameter(key) if shape else None
        if name is None or self.layout is None:
            everyone = {whole(tuple(shape)): list(range(self.size))}
            return everyone if math.prod(shape) else {}
        if name not in self._holders:
            self._holders[name] = self.layout.holders(name)
        return self._holders[name]

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return key -> whole tensor on the meta device, given the shards of this rank.

        Raises:
            CheckpointError: a shard does not have the shape given by the layout.
        """
        found = {}
        for key, part in tensors.items():
            name = self.parameter(key) if part.ndim else None
            shape = tuple(part.shape)
            if name is not None and self.layout is not None:
                shape = tuple(self.layout.shapes[name])
                if (wanted := self.layout.region(name, self.rank).shape) != tuple(part.shape):
                    raise CheckpointError(
                        f"{key!r} has the shape {tuple(part.shape)} on process {self.rank}, and its part of "
                        f"{shape} should have {wanted}. It was not cut as the layout says."
                    )
            found[key] = torch.empty(shape, dtype=part.dtype, device="meta")
        return found


@dataclass(frozen=True)
class FilePlan:
    """Plan of one file of tensors, the same on all ranks.

    Attributes:
        name: path inside the directory.
        owner: the rank that writes the file.
        layout: name of a tensor in the file -> its shape and dtype, as a tensor on the meta device.
        sources: name of a tensor in the file -> keys of the whole tensors that it is made of.
        make: function that makes a tensor of the file from its name and those whole tensors.
        slashes: allow "/" in names.
    """

    name: str
    owner: int
    layout: Mapping[str, Tensor]
    sources: Mapping[str, tuple[str, ...]]
    make: Callable[[str, Mapping[str, Tensor]], Tensor]
    slashes: bool = False


def spread(layout: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Divide tensors into at most ``count`` groups of about equal size in bytes, preserving their order."""
    total = sum(tensor.nbytes for tensor in layout.values())
    groups: dict[int, dict[str, Tensor]] = {}
    before = 0
    for name, tensor in layout.items():
        middle = before + tensor.nbytes / 2
        index = min(count - 1, int(middle * count / total)) if total else 0
        groups.setdefault(index, {})[name] = tensor
        before += tensor.nbytes
    return [groups[index] for index in sorted(groups)] or [{}]


def given(plans: Collection[FilePlan], full: Mapping[str, Tensor], pieces: Pieces) -> set[str]:
    """Return the keys of the local shards that this rank sends or writes; the others need not be kept."""
    found = set()
    for plan in plans:
        for keys in plan.sources.values():
            for key in keys:
                holders = pieces.holders(key, full[key].shape)
                if any(_giver(plan, ranks) == pieces.rank for ranks in holders.values()):
                    found.add(key)
    return found


def _giver(plan: FilePlan, ranks: Sequence[int]) -> int:
    """Return which of the ranks that hold a shard provides it: the owner of the file if possible, else the lowest."""
    return plan.owner if plan.owner in ranks else ranks[0]


def write_files(
    directory: Path,
    plans: Sequence[FilePlan],
    parts: Mapping[str, Tensor],
    full: Mapping[str, Tensor],
    pieces: Pieces,
    peers: Peers,
    *,
    guard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Record]:
    """Write files collectively; each is made durable and read back by its owner.

    Args:
        directory: a directory on a file system that all ranks share.
        plans: the files, the same on all ranks.
        parts: key -> the shard of this rank; at least those returned by ``given``.
        full: key -> the whole tensor, on the meta device.
        pieces: the sharding of the tensors.
        peers: the ranks.
        guard: context manager entered around all disk operations, to turn an OSError into a CheckpointError.

    Returns:
        Path inside the directory -> record, of the files that this rank has written.

    Raises:
        CheckpointError: a file could not be written on some rank.
    """
    records: dict[str, Record] = {}
    for wave in _waves(plans):
        with ExitStack() as stack:
            own = next((plan for plan in wave if plan.owner == pieces.rank), None)
            writer = _Writer(directory, own, guard)
            stack.callback(writer.close)
            orders = [write_order(plan.layout) for plan in wave]
            for number in range(max(map(len, orders))):
                for plan, order in zip(wave, orders, strict=True):
                    if plan is not own and number < len(order):
                        _send(plan, order[number], parts, full, pieces, peers)
                if own is not None and number < len(writer.order):
                    name = writer.order[number]
                    sources = {
                        key: _assembled(own, key, parts, full, pieces, peers)
                        for key in own.sources[name]
                    }
                    writer.put(name, sources)
                    del sources
                peers.wait_until_sent()
            if own is not None:
                records |= writer.finish()
            raise_on_all_ranks(peers, writer.error)
    return records


def _waves(plans: Sequence[FilePlan]) -> Iterator[list[FilePlan]]:
    """Yield groups of files to be written at the same time, with at most one file per rank."""
    wave: list[FilePlan] = []
    for plan in plans:
        if any(plan.owner == other.owner for other in wave):
            yield wave
            wave = []
        wave.append(plan)
    if wave:
        yield wave


class _Writer:
    """The file that this rank writes in a wave, if any.

    After an error this rank keeps taking part in the sends and receives without writing, because the other ranks would
    wait forever. The error is raised on all ranks at the end of the wave.
    """

    def __init__(
        self,
        directory: Path,
        plan: FilePlan | None,
        guard: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.error: Exception | None = None
        self._plan, self._guard = plan, guard
        self._file: TensorFile | None = None
        self.order = [] if plan is None else write_order(plan.layout)
        self._path = directory if plan is None else directory / plan.name
        if plan is not None:
            self._guarded(self._open)

    def _guarded(self, action: Callable[[], object]) -> None:
        if self.error is None:
            try:
                with self._guard():
                    action()
            except Exception as error:  # raised by `raise_on_all_ranks` at the end of the wave
                self.error = error

    def _open(self) -> None:
        assert self._plan is not None
        self._file = TensorFile(self._path, self._plan.layout, slashes=self._plan.slashes)

    def put(self, name: str, sources: Mapping[str, Tensor]) -> None:
        def append() -> None:
            assert self._plan is not None and self._file is not None
            self._file.put(name, self._plan.make(name, sources))

        self._guarded(append)

    def finish(self) -> dict[str, Record]:
        found: dict[str, Record] = {}

        def end() -> None:
            assert self._plan is not None and self._file is not None
            record = self._file.finish()
            manifest.check_hash(self._path, record)
            found[self._plan.name] = record

        self._guarded(end)
        return found

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _send(
    plan: FilePlan,
    name: str,
    parts: Mapping[str, Tensor],
    full: Mapping[str, Tensor],
    pieces: Pieces,
    peers: Peers,
) -> None:
    """Send the shards of a tensor that this rank has to provide to the owner of the file."""
    for key in plan.sources[name]:
        for ranks in pieces.holders(key, full[key].shape).values():
            if _giver(plan, ranks) == pieces.rank:
                peers.send(parts[key].to("cpu").contiguous(), plan.owner)


def _assembled(
    plan: FilePlan,
    key: str,
    parts: Mapping[str, Tensor],
    full: Mapping[str, Tensor],
    pieces: Pieces,
    peers: Peers,
) -> Tensor:
    """Assemble a whole tensor from its shards; the local tensor itself is returned if it is whole here."""
    shape = tuple(full[key].shape)
    holders = pieces.holders(key, shape)
    if plan.owner in holders.get(whole(shape), ()):
        return parts[key]
    tensor = torch.empty(shape, dtype=full[key].dtype)
    for region, ranks in holders.items():
        box = tensor[region.slices()]
        if plan.owner in ranks:
            box.copy_(parts[key])
        elif box.is_contiguous():
            peers.recv(box, ranks[0])
        else:
            part = torch.empty(region.shape, dtype=tensor.dtype)
            peers.recv(part, ranks[0])
            box.copy_(part)
    return tensor
