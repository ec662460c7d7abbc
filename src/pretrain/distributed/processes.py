"""Several processes of a run, or one with a process group: groups, device mesh, watchdog and collectives.

Nothing is launched here. Python values are exchanged as JSON in byte tensors, never pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pretrain.checkpoint.peers import Peers, errors_on_all_ranks
from pretrain.distributed.estimates import MeshShape
from pretrain.distributed.handshake import (
    check_links,
    fingerprint,
    handshake,
    introduce,
    with_time_limit,
)
from pretrain.distributed.json_values import from_plain, to_plain
from pretrain.distributed.store import (
    absent,
    get,
    put,
    store_of_this_start,
    wait,
    wait_for_all_ranks,
)
from pretrain.distributed.watchdog import SLOW, Watchdog
from pretrain.distributed.world import World
from pretrain.errors import DistributedError, PretrainError
from pretrain.utils.directories import make_directories
from pretrain.utils.files import note, writing

__all__ = ["Processes"]

T = TypeVar("T")
_ALL_FAIL = 2.0  # seconds within which all processes raise an error that has the same cause on all


class Processes(World):
    """All processes of a run, seen from one of them; also one process alone, if it has a process group.

    Attributes:
        store: key-value store of the rendezvous; None for a single process with a group of its own.
        replica: process group of the ranks that hold one copy of the weights between them.
        exchanges: number of exchanges through the store so far, which makes their keys unique.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, timeout: float = 300.0
    ) -> None:
        super().__init__(rank, size)
        self.store, self.timeout = store, timeout
        self.joined = False
        self.replica: Any = None
        self._mesh: Any = None
        self._control: Any = None  # process group for Python values; None is the default group
        self.exchanges = self._connections = 0
        self._watchdog: Watchdog | None = None

    # ------------------------------------------------------------------ before the process group exists

    @staticmethod
    def find(patience: float = 300.0) -> World:
        """Return the world of the environment, connected to its store, without a process group; see `World.find`.

        If the user's script has initialised a process group already, that group is used.
        """
        if dist.is_initialized():  # by the user's own script
            rank, size = dist.get_rank(), dist.get_world_size()
            if size == 1:
                return World()
            world = Processes(rank, size, dist.distributed_c10d._get_default_store())
            world.joined = True
            # The user's group may not support CPU tensors.
            world._control = dist.new_group(backend="gloo")
            return world
        limit = datetime.timedelta(seconds=min(60.0, patience))
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
        except Exception as error:
            raise DistributedError(
                f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others at {address}: "
                f"{error}. Start all of them with torchrun and the same rendezvous address; check that a firewall "
                "lets the hosts talk. If this process is to run alone, its environment holds the RANK and WORLD_SIZE "
                "of another start: unset RANK WORLD_SIZE"
            ) from error
        return Processes(rank, size, store_of_this_start(store, rank, size, patience))

    @classmethod
    def single_process(cls, device: torch.device) -> Processes:
        """Return a world of this one process that has a process group, for FSDP2 on a single device."""
        world = cls()
        if not dist.is_initialized():
            store = dist.HashStore()  # type: ignore[attr-defined]
            connect(store, 0, 1, device, world._limit)
        world.device, world.joined = device, True
        return world

    def store_peers(self) -> StorePeers:
        self.exchanges += 1
        return StorePeers(
            self.rank, self.size, PrefixStore(f"pretrain/call/{self.exchanges}", self.store)
        )

    def main_process_first(self, make: Callable[[], T], what: str) -> T:
        self.exchanges += 1
        turn, host = f"pretrain/turn/{self.exchanges}", self.rank - self.local_rank
        before = None if self.rank == 0 else host if self.local_rank else 0
        try:
            if before is not None:
                wait(self.store, [f"{turn}/{before}"], math.inf)
                answer = self.store.get(f"{turn}/{before}").decode("utf-8", "replace")
                if answer != "done":
                    failure = DistributedError(f"Rank {before} could not {what}. {answer}")
                    failure.everywhere = True  # that rank prints its own error
                    raise failure
            made = make()
        except BaseException as error:
            self.store.set(f"{turn}/{self.rank}", f"{type(error).__name__}: {error}"[:4000])
            raise
        self.store.set(f"{turn}/{self.rank}", "done")
        return made

    # ------------------------------------------------------------------ the process group

    def init_process_group(self, device: torch.device, within: float = 60.0) -> torch.device:
        device = self._own(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.device = device
        if not dist.is_initialized():
            connect(self.store, self.rank, self.size, device, self._limit, within)
        self.joined = True
        return device

    @property
    def _limit(self) -> datetime.timedelta:
        """Timeout of a collective: a last resort, because the watchdog ends a hung run long before it."""
        return datetime.timedelta(seconds=2 * max(SLOW.values()) * self.timeout)

    def _own(self, device: torch.device) -> torch.device:
        """Return the device of this process among those of its host."""
        if device.type != "cuda":
            return device
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def with_process_group(self) -> Processes:
        return self

    def build_mesh(self, sizes: MeshShape) -> None:
        if self.joined and (self._mesh is None or sizes != self.sizes):
            self._mesh = init_device_mesh(
                self.device.type,
                (sizes.dp_replicate, sizes.dp_shard, sizes.tp),
                mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
            )
            each = sizes.dp_shard * sizes.tp
            self.replica = dist.group.WORLD
            if each < self.size:
                subgroups: Any = dist.new_subgroups  # not annotated in torch
                self.replica, _ = subgroups(each, timeout=self._limit)
        self.sizes = sizes

    def mesh(self, *names: str) -> Any:
        """Return the submesh of one or more dimensions of the mesh."""
        return self._mesh[names]

    def group(self, name: str) -> Any:
        """Return the process group along one dimension of the mesh that contains this rank."""
        return self._mesh.get_group(name)

    def batch_group(self) -> Any:
        """Return the group of ranks with different rows of a batch, in order of ``dp_rank``; all ranks must call it."""
        if self.sizes.tp == 1 or self.sizes.dp_replicate == 1:
            return dist.group.WORLD if self.sizes.tp == 1 else self.group("dp_shard")
        ranks = [list(range(t, self.size, self.sizes.tp)) for t in range(self.sizes.tp)]
        return [dist.new_group(some, self._limit) for some in ranks][self.tp_rank]

    def destroy_process_group(self) -> None:
        joined, self.joined = self.joined, False
        self._mesh = self._control = self.replica = None
        gc.collect()  # a group that is still referenced when Python exits crashes the process
        if joined and dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()

    @contextlib.contextmanager
    def connected(
        self,
        device: torch.device,
        out: Path,
        timeout: float,
        about: Callable[[], Mapping[str, Any]],
    ) -> Iterator[torch.device]:
        self.timeout = timeout
        self._connections += 1
        store = PrefixStore(f"pretrain/{self._connections}", self.store)
        wait_for_all_ranks(store, self.rank, self.size, say=note)
        with errors_on_all_ranks(self.store_peers()), writing(out):
            if self.is_rank_zero:
                make_directories(Path(os.path.abspath(out)))
        same = dict(about())
        same["model"] = fingerprint(same["model"])
        introduction = introduce(self._own(device), **same)
        try:
            handshake_store = PrefixStore("handshake", store)
            handshake(handshake_store, self.rank, self.size, introduction, run_dir=out)
        except DistributedError as error:
            error.everywhere = True
            raise
        watchdog_store = PrefixStore("watchdog", store)
        with Watchdog(
            watchdog_store, self.rank, self.size, run_dir=out, timeout=timeout
        ) as watchdog:
            self._watchdog = watchdog
            try:
                new = not self.joined
                device = self.init_process_group(device)
                if new:
                    self.links = check_links(dist.all_reduce, device, self.rank, self.size)
                yield device
                # A launcher may send SIGTERM to the other processes when the first one exits: all wait for each other.
                self.all_reduce_sum([0.0])
            except PretrainError as error:
                # All other ranks fail as well for a setting that is wrong on all of them.
                put(store, f"failed/{self.rank}", True)
                error.everywhere |= not absent(store, "failed", range(self.size), _ALL_FAIL)
                if not error.everywhere:
                    # The caller may catch the error and continue, so this process must not be ended.
                    watchdog.fail(error, end_within=None)
                watchdog.close()
                raise
            finally:
                self._watchdog = None

    def mark(self, phase: str, step: int) -> None:
        super().mark(phase, step)
        if self._watchdog is not None:
            self._watchdog.mark(phase, step)

    # ------------------------------------------------------------------ collectives on Python values

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        if self.size == 1:  # the group may be one of the user's, which supports no CPU tensors
            return super().all_reduce_sum(values)
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(tensor, group=self._control)
        return list(tensor.tolist())

    def all_gather_object(self, value: Any, *, progress: bool = True) -> list[Any]:
        """Return the values of all ranks, in rank order: JSON values, which may hold tensors and tuples."""
        if progress:
            self.heartbeat()
        if self.size == 1:
            return super().all_gather_object(value)
        return list(map(from_plain, gather_json(to_plain(value), self.size, self._control)))

    def gather(
        self, shards: Sequence[Tensor], owners: Sequence[int], ranks: Sequence[int]
    ) -> list[list[Tensor]]:
        received, works = [], []
        for shard, owner in zip(shards, owners, strict=True):
            group = self._control if shard.device.type == "cpu" else None
            group = group if len(ranks) == self.size else self.replica
            room = [torch.empty_like(shard) for _ in ranks] if owner == self.rank else []
            works.append(dist.gather(shard, room or None, owner, group=group, async_op=True))
            received.append(room)
        for work in works:
            if work is not None:
                work.wait()
        self.heartbeat()
        return received

    def on_rank_zero(self, make: Callable[[], T]) -> T | None:
        with self._errors_everywhere():
            return make() if self.is_rank_zero else None

    def broadcast_result(self, make: Callable[[], T]) -> T:
        peers = self.store_peers()
        with errors_on_all_ranks(peers):
            result_of_zero = make() if self.is_rank_zero else None
        result: T = peers.all_gather_object(result_of_zero)[0]
        return result

    def raise_on_all_ranks(self, failure: Exception | None) -> None:
        with self._errors_everywhere():
            if failure is not None:
                raise failure

    @contextlib.contextmanager
    def _errors_everywhere(self) -> Iterator[None]:
        """Raise an error inside the block on all ranks, marked as one that all of them raise."""
        try:
            with errors_on_all_ranks(self if self.joined else self.store_peers()):
                yield
        except PretrainError as error:
            error.everywhere = True
            raise


def connect(
    store: Any,
    rank: int,
    size: int,
    device: torch.device,
    limit: datetime.timedelta,
    within: float = 60.0,
) -> None:
    """Initialise the default process group, with gloo for CPU tensors and JSON values, and NCCL for CUDA tensors.

    Args:
        store: key-value store for the rendezvous.
        rank: of this process.
        size: world size.
        device: device that this process computes on.
        limit: timeout of every collective.
        within: seconds within which all processes must connect.

    Raises:
        DistributedError: they did not connect; the message says what to check.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with_time_limit(
        lambda: dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=limit
        ),
        f"The connection of rank {rank} of {size} to the others",
        device,
        within,
    )


class StorePeers(Peers):
    """The processes before they have a process group: they exchange JSON values through a store, and no tensors.

    Args:
        rank: of this process.
        size: world size.
        store: a key-value store, or the part of one that is used by these peers only.
    """

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self.rank, self.size = rank, size
        self._store, self._calls = store, 0

    def all_gather_object(self, value: Any, *, progress: bool = True) -> list[Any]:
        """Return the JSON values of all ranks, in rank order; waits without a time limit."""
        self._calls += 1
        keys = [f"{self._calls}/{rank}" for rank in range(self.size)]
        put(self._store, keys[self.rank], value)
        wait(self._store, keys, math.inf)
        return [get(self._store, key) for key in keys]


def gather_json(value: Any, size: int, group: Any) -> list[Any]:
    """All-gather a JSON value, sent as bytes."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = data
    received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(received, padded, group=group)
    return [
        json.loads(part[: int(length)].numpy().tobytes())
        for part, length in zip(received, lengths, strict=True)
    ]
