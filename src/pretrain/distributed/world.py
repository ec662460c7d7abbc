"""The processes of a run: rank and world size, process groups, the device mesh and collectives on Python values.

`torchrun` (or SLURM through it) starts the processes and sets their environment; nothing is launched here. A process
without a launcher has world size 1 and no overhead. Python values are exchanged as JSON in byte tensors, never pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pretrain.checkpoint.peers import errors_on_all_ranks, raise_on_all_ranks
from pretrain.distributed.comm import Callers, Peers, connect, gather_json
from pretrain.distributed.estimates import MeshShape
from pretrain.distributed.handshake import check_links, handshake, introduce
from pretrain.distributed.launched import launched
from pretrain.distributed.store import all_here, put, store_of_this_start, wait
from pretrain.distributed.watchdog import SLOW, Watchdog
from pretrain.errors import DistributedError, PretrainError
from pretrain.utils.directories import make_directories
from pretrain.utils.files import note, writing

__all__ = ["World", "current_world", "found"]

T = TypeVar("T")
_ALL_FAIL = 2.0  # seconds within which all processes raise an error that has the same cause on all


class World:
    """All processes of a run, seen from one of them.

    Attributes:
        rank, size: rank of this process, and the world size.
        local_rank, local_size: the same on this host.
        host: name of this host.
        store: key-value store of the rendezvous; None if the world size is 1.
        device: device for which ``init_process_group`` set up the communication.
        sizes: sizes of the mesh, set by ``build_mesh``.
        replica: process group of the ranks that hold one copy of the weights between them.
        turns: number of exchanges through the store so far, which makes their keys unique.
        links: bandwidth and latency of the all-reduce, measured at the start of the run.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, timeout: float = 300.0
    ) -> None:
        self.rank, self.size, self.store, self.timeout = rank, size, store, timeout
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size))) if size > 1 else 1
        self.host = socket.gethostname()
        self.device = torch.device("cpu")
        self.sizes = MeshShape(1, 1, 1)
        self.joined = False
        self.replica: Any = None
        self._mesh: Any = None
        self._control: Any = None  # process group for Python values; None is the default group
        self._place = ("start", 0)
        self.turns = self._entries = 0
        self._watchdog: Watchdog | None = None
        self.on_mark: Callable[[str, int], None] | None = None  # also called by ``mark``
        self.links: dict[str, float] = {}

    # ------------------------------------------------------------------ before the process group exists

    @classmethod
    def find(cls, patience: float = 300.0) -> World:
        """Return the world that the environment describes, connected to its store and without a process group.

        If the user's script has initialised a process group already, that group is used.

        Args:
            patience: seconds to wait for rank 0; its store must answer within the same time, at most one minute.

        Raises:
            DistributedError: the other processes or their store cannot be reached.
        """
        if dist.is_available() and dist.is_initialized():  # by the user's own script
            store = dist.distributed_c10d._get_default_store()
            world = cls(dist.get_rank(), dist.get_world_size(), store)
            world.joined = world.size > 1
            if world.joined:  # the user's group may not support CPU tensors
                world._control = dist.new_group(backend="gloo")
            return world
        if not launched():
            return cls()
        limit = datetime.timedelta(seconds=min(60.0, patience))
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
        except Exception as error:
            raise DistributedError(
                f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot reach the others at {address}: "
                f"{error}. Start all of them with torchrun and the same rendezvous address; check that a firewall "
                "lets the hosts talk."
            ) from error
        return cls(rank, size, store_of_this_start(store, rank, size, patience))

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank zero, which writes the log, the settings and the manifest."""
        return self.rank == 0

    def callers(self) -> Peers:
        """Return the peers to use before the process group exists: JSON values go through the store, no tensors."""
        if self.size == 1:
            return Peers(0, 1, None)
        self.turns += 1
        return Callers(self.rank, self.size, PrefixStore(f"pretrain/call/{self.turns}", self.store))

    # ------------------------------------------------------------------ the process group

    def init_process_group(self, device: torch.device, within: float = 60.0) -> torch.device:
        """Set up the process group for a device, once, and return the device of this process.

        Raises:
            DistributedError: the processes did not connect ``within`` so many seconds.
        """
        if self.size == 1:
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)  # FSDP2 uses the current device
            self.device = device
            return device
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

    def init_process_group_alone(self, device: torch.device) -> None:
        """Create a process group of this one process, which FSDP2 needs for CPU offload or on a single device."""
        if self.size == 1 and not self.joined:
            if not dist.is_initialized():
                store = dist.HashStore()  # type: ignore[attr-defined]
                connect(store, 0, 1, device, self._limit)
            self.joined = True

    def build_mesh(self, sizes: MeshShape) -> None:
        """Build the device mesh (dp_replicate, dp_shard, tp) and the group of the ranks of one replica."""
        if self.joined and (self._mesh is None or sizes != self.sizes):
            self._mesh = init_device_mesh(
                self.device.type,
                (sizes.dp_replicate, sizes.dp_shard, sizes.tp),
                mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
            )
            each = sizes.dp_shard * sizes.tp
            for first in range(0, self.size, each):  # all ranks must call every new_group()
                ranks = list(range(first, first + each))
                some = each < self.size
                group = dist.new_group(ranks, self._limit) if some else dist.group.WORLD
                if self.rank in ranks:
                    self.replica = group
        self.sizes = sizes

    def mesh(self, *names: str) -> Any:
        """Return the submesh of one or more dimensions of the mesh."""
        return self._mesh[names if len(names) > 1 else names[0]]

    def group(self, name: str) -> Any:
        """Return the process group along one dimension of the mesh that contains this rank."""
        return self._mesh.get_group(name)

    def batch_group(self) -> Any:
        """Return the group of ranks with different rows of a batch, in order of ``dp_rank``; all ranks must call it."""
        if self.sizes.tp == 1 or self.sizes.dp_replicate == 1:
            return dist.group.WORLD if self.sizes.tp == 1 else self.group("dp_shard")
        ranks = [list(range(t, self.size, self.sizes.tp)) for t in range(self.sizes.tp)]
        return [dist.new_group(some, self._limit) for some in ranks][self.tp_rank]

    @property
    def replica_ranks(self) -> list[int]:
        """Ranks in the group ``replica``."""
        each = self.sizes.dp_shard * self.sizes.tp
        first = self.rank // each * each
        return list(range(first, first + each))

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: which share of a global batch this process computes."""
        return self.rank // self.sizes.tp

    @property
    def tp_rank(self) -> int:
        """Tensor-parallel rank: which slice of the matrices this process holds."""
        return self.rank % self.sizes.tp

    def destroy_process_group(self) -> None:
        """Destroy the process group and drop all references to it."""
        joined, self.joined = self.joined, False
        self._mesh = self._control = self.replica = None
        gc.collect()  # a group that is still referenced when Python exits crashes the process
        if joined and dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()

    @contextlib.contextmanager
    def entered(
        self, device: torch.device, out: Path, timeout: float, about: Mapping[str, Any]
    ) -> Iterator[torch.device]:
        """Connect all ranks under the watchdog: inside, one that dies, hangs or fails ends all within seconds.

        Args:
            device: kind of device that each rank computes on.
            out: run directory, which all ranks must see.
            timeout: seconds without progress after which a process counts as hung.
            about: ``settings``, ``data`` and ``model``, JSON values that must be the same on all ranks.

        Yields:
            The device of this process.

        Raises:
            DistributedError: a rank is missing, differs from rank 0 or cannot be reached; the message names the rank
                and the remedy.
        """
        if self.size == 1 or self.store is None:
            yield self.init_process_group(device)
            return
        self.timeout = timeout
        self._entries += 1
        store = PrefixStore(f"pretrain/{self._entries}", self.store)
        all_here(store, self.rank, self.size, say=note)
        with errors_on_all_ranks(self.callers()), writing(out):
            if self.is_rank_zero:
                make_directories(Path(os.path.abspath(out)))
        said = introduce(self._own(device), **about)
        try:
            met = PrefixStore("handshake", store)
            handshake(met, self.rank, self.size, said, run_dir=out)
        except DistributedError as error:
            error.everywhere = True
            raise
        watched = PrefixStore("watchdog", store)
        with Watchdog(watched, self.rank, self.size, run_dir=out, timeout=timeout) as watchdog:
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
                error.everywhere |= self._all_failed(store)
                if not error.everywhere:
                    # The caller may catch the error and continue, so this process must not be ended.
                    watchdog.fail(error, end_within=None)
                watchdog.close()
                raise
            finally:
                self._watchdog = None

    def _all_failed(self, store: Any) -> bool:
        """Return whether all other ranks fail as well, as they do for a setting that is wrong on all ranks."""
        put(store, f"failed/{self.rank}", True)
        return wait(store, [f"failed/{rank}" for rank in range(self.size)], _ALL_FAIL)

    def mark(self, phase: str, step: int) -> None:
        """Report the phase and step of this process to the watchdog, which needs them to find a hung process."""
        self._place = phase, step
        if self._watchdog is not None:
            self._watchdog.mark(phase, step)
        if self.on_mark is not None:
            self.on_mark(phase, step)

    def heartbeat(self) -> None:
        """Report progress within the phase and step that were marked last."""
        self.mark(*self._place)

    # ------------------------------------------------------------------ collectives on Python values

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over all ranks in fp64; the sum of one number and zeros is exact."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(tensor, group=self._control)
        return list(tensor.tolist())

    def broadcast_int(self, value: float) -> int:
        """Return rank zero's integer on all ranks."""
        return int(self.all_reduce_sum([value if self.is_rank_zero else 0])[0])

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks, in rank order."""
        if self.size == 1:
            return [value]
        return gather_json(value, self.size, self._control)

    def broadcast_object(self, value: Any) -> Any:
        """Return rank zero's JSON value on all ranks."""
        return (
            value
            if self.size == 1
            else self.all_gather_object(value if self.is_rank_zero else None)[0]
        )

    def on_rank_zero(self, make: Callable[[], T]) -> T | None:
        """Call ``make`` on rank zero only; if it fails there, the same error is raised on all ranks.

        Returns:
            The result of ``make`` on rank zero, None on the other ranks.
        """
        if self.size == 1:
            return make()
        made, failure = None, None
        if self.is_rank_zero:
            try:
                made = make()
            except Exception as error:  # raised on all ranks below
                failure = error
        self.raise_on_all_ranks(failure)
        return made

    def broadcast_result(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank zero and return its JSON value on all ranks.

        It may take any time: the other ranks wait on the store, where no timeout of a process group applies.

        Raises:
            PretrainError: on all ranks, the error that ``make`` raised.
        """
        made, failure, callers = None, None, self.callers()
        if self.is_rank_zero:
            try:
                made = make()
            except Exception as error:
                failure = error
        raise_on_all_ranks(callers, failure)
        found: T = callers.all_gather_object(made)[0]
        return found

    def raise_on_all_ranks(self, failure: Exception | None) -> None:
        """Raise the failure of one rank on all ranks; a collective, which all ranks must call.

        Raises:
            PretrainError: the failure of the lowest rank that has one, with its rank. An error of this process that is
                no PretrainError is raised unchanged.
        """
        try:
            raise_on_all_ranks(self.peers() if self.joined else self.callers(), failure)
        except PretrainError as error:
            error.everywhere = True
            raise

    def peers(self) -> Peers:
        """Return the peers for writing and reading checkpoints."""
        if self.size == 1:
            return Peers(0, 1, None)
        group = self._control or dist.group.WORLD
        return Peers(self.rank, self.size, group, self.replica, self.heartbeat)


_world: World | None = None


def found() -> bool:
    """Return whether the world of this process has been found already."""
    return _world is not None and not (_world.size == 1 and launched())


def current_world(patience: float = 300.0) -> World:
    """Return the world of this process, which is found once; see `World.find`."""
    global _world
    if _world is None or not found():
        _world = World.find(patience)
    return _world


@contextlib.contextmanager
def world_left_behind() -> Iterator[None]:
    """Destroy the process group and forget the world at the end; for tests that create several worlds in turn."""
    global _world
    try:
        yield
    finally:
        if _world is not None:
            _world.destroy_process_group()
        _world = None
