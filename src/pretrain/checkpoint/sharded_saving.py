"""Writing whole tensors when every process holds a part of them.

Files do not show how many processes wrote them: each holds whole tensors, and belongs to one process, which writes it
from front to back. All processes walk through the same list in rounds. In a round every file gets its next tensor: who
holds a part of it sends that part to the file's owner, and the owner puts the parts together and appends the tensor.
At any time a process holds its own parts, one whole tensor, and what it is sending in this round.
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

SMALLEST_SHARE = 64 << 20  # bytes; a file is not divided into smaller ones


class Pieces:
    """Where the parts of tensors lie, by the key that they have in a file.

    A key is a parameter's name, or a field of it (``exp_avg/backbone.wte.weight``); it may be the name in the model or
    in its objective, where it begins with ``model.``. What belongs to no parameter of the layout, and every 0-d
    tensor, is whole on every process.

    Args:
        layout: of the parameters; None where all of them are whole everywhere.
        peers: as many as the layout has.
    """

    def __init__(self, layout: ShardLayout | None, peers: Peers) -> None:
        if layout is not None and layout.world != peers.size:
            raise CheckpointError(
                f"The layout is for {layout.world} processes, and there are {peers.size}."
            )
        self.layout, self.rank, self.size = layout, peers.rank, peers.size
        self._holders: dict[str, dict[ShardSlice, list[int]]] = {}

    def parameter(self, key: str) -> str | None:
        """The parameter that a key belongs to; None if the layout does not know it."""
        if self.layout is None:
            return None
        bare = key.partition("/")[2] or key
        names = (bare, bare.removeprefix("model."), f"model.{bare}")
        return next((name for name in names if name in self.layout.shapes), None)

    def region(self, key: str, shape: Sequence[int]) -> ShardSlice:
        """The part that this process holds of a tensor with that full shape; it may be empty."""
        name = self.parameter(key) if shape else None
        if name is None or self.layout is None:
            return whole(tuple(shape))
        return self.layout.region(name, self.rank)

    def holders(self, key: str, shape: Sequence[int]) -> dict[ShardSlice, list[int]]:
        """The parts of a tensor that are not empty, and the processes that hold each, lowest first."""
        name = self.parameter(key) if shape else None
        if name is None or self.layout is None:
            everyone = {whole(tuple(shape)): list(range(self.size))}
            return everyone if math.prod(shape) else {}
        if name not in self._holders:
            self._holders[name] = self.layout.holders(name)
        return self._holders[name]

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Key -> the whole tensor on the meta device, for the parts that this process holds.

        Raises:
            CheckpointError: a part has another shape than the layout says.
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
    """One file of tensors, the same on all processes.

    Attributes:
        name: path inside the directory.
        owner: the process that writes it.
        layout: tensor in the file -> its shape and dtype, on the meta device.
        sources: tensor in the file -> keys of the whole tensors that it is made of.
        make: tensor in the file, those whole tensors -> the tensor.
        slashes: allow "/" in names.
    """

    name: str
    owner: int
    layout: Mapping[str, Tensor]
    sources: Mapping[str, tuple[str, ...]]
    make: Callable[[str, Mapping[str, Tensor]], Tensor]
    slashes: bool = False


def spread(layout: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Divide tensors into at most ``count`` groups of about the same number of bytes, in their order."""
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
    """Keys of the local parts that this process sends or writes; the others need not be kept."""
    found = set()
    for plan in plans:
        for keys in plan.sources.values():
            for key in keys:
                holders = pieces.holders(key, full[key].shape)
                if any(_giver(plan, ranks) == pieces.rank for ranks in holders.values()):
                    found.add(key)
    return found


def _giver(plan: FilePlan, ranks: Sequence[int]) -> int:
    """Of those that hold a part, the one that gives it: the owner of the file if it can."""
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
    """Write files together, each durable and read back by its owner.

    Args:
        directory: seen by all processes.
        plans: the same on all processes.
        parts: key -> this process's part; at least those that ``given`` names.
        full: key -> the whole tensor, on the meta device.
        pieces: where the parts lie.
        peers: the processes.
        guard: entered around all that touches the disk, to say in one sentence what the system refuses.

    Returns:
        Path inside the directory -> record, of the files that this process has written.

    Raises:
        CheckpointError: a file could not be written, on any process.
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
    """Groups of files that are written at the same time: no process has two."""
    wave: list[FilePlan] = []
    for plan in plans:
        if any(plan.owner == other.owner for other in wave):
            yield wave
            wave = []
        wave.append(plan)
    if wave:
        yield wave


class _Writer:
    """The file that this process writes in a wave.

    When it fails, it goes on taking part without writing, until all can be told: the others would wait for ever.
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
            except (
                Exception
            ) as error:  # raised by `raise_on_all_ranks` once all have come to the end of the wave
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
    """Send this process's part of a tensor to the owner of its file, if it is the one to do so."""
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
    """A whole tensor; the local one itself where nothing of it lies elsewhere."""
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
