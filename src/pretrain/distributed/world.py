"""The processes of a run as one of them sees them: its rank, the world size, and collectives on Python values.

A process that no launcher started is a `World` of its own: rank 0 of 1, which communicates with nobody. `torchrun` (or
SLURM through it) starts several and sets their environment; each is then a `pretrain.distributed.processes.Processes`,
which is imported only there.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain import distributed
from pretrain.checkpoint.peers import Peers
from pretrain.distributed.estimates import MeshShape
from pretrain.distributed.launched import launched, launcher_number

__all__ = ["World", "current_world", "world_is_known"]

T = TypeVar("T")


class World(Peers):
    """One process, seen from itself; the base class of several. They are also the peers that share a checkpoint.

    Attributes:
        rank, size: rank of this process, and the world size.
        local_rank, local_size: the same on this host.
        host: name of this host.
        device: device for which ``init_process_group`` set up the communication.
        sizes: sizes of the mesh, set by ``build_mesh``.
        links: bandwidth and latency of the all-reduce, measured at the start of a run of several processes.
        on_mark: also called by ``mark``.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.local_rank = (launcher_number("LOCAL_RANK") or 0) if size > 1 else 0
        self.local_size = (launcher_number("LOCAL_WORLD_SIZE") or size) if size > 1 else 1
        self.host = socket.gethostname()
        self.device = torch.device("cpu")
        self.sizes = MeshShape(1, 1, 1)
        self.links: dict[str, float] = {}
        self.on_mark: Callable[[str, int], None] | None = None
        self._place = ("start", 0)
        self._group_of_one: distributed.Processes | None = None

    @staticmethod
    def find(patience: float = 300.0) -> World:
        """Return the world that the environment, or a process group of the user's script, describes.

        Args:
            patience: seconds to wait for rank 0; its store must answer within the same time, at most one minute.

        Raises:
            DistributedError: the other processes or their store cannot be reached.
        """
        if launched() or (dist.is_available() and dist.is_initialized()):
            return distributed.Processes.find(patience)
        return World()

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank zero, which writes the log, the settings and the manifest."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: which share of a global batch this process computes."""
        return self.rank // self.sizes.tp

    @property
    def tp_rank(self) -> int:
        """Tensor-parallel rank: which slice of the matrices this process holds."""
        return self.rank % self.sizes.tp

    # ------------------------------------------------------------------ setting up and leaving

    def init_process_group(self, device: torch.device, within: float = 60.0) -> torch.device:
        """Set up the communication for a device, once, and return the device of this process.

        Raises:
            DistributedError: the processes did not connect ``within`` so many seconds.
        """
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # FSDP2 uses the current device
        self.device = device
        return device

    def with_process_group(self) -> distributed.Processes:
        """Return this world, or one of this process alone with a process group: FSDP2 needs one on a single device."""
        if self._group_of_one is None:
            self._group_of_one = distributed.Processes.single_process(self.device)
        return self._group_of_one

    def build_mesh(self, sizes: MeshShape) -> None:
        """Build the device mesh (dp_replicate, dp_shard, tp) and the group of the ranks of one replica."""
        self.sizes = sizes

    def destroy_process_group(self) -> None:
        """Destroy the process group and drop all references to it."""
        if self._group_of_one is not None:
            self._group_of_one.destroy_process_group()
            self._group_of_one = None

    @contextlib.contextmanager
    def connected(
        self,
        device: torch.device,
        out: Path,
        timeout: float,
        about: Callable[[], Mapping[str, Any]],
    ) -> Iterator[torch.device]:
        """Connect all ranks under the watchdog: inside, one that dies, hangs or fails ends all within seconds.

        Args:
            device: kind of device that each rank computes on.
            out: run directory, which all ranks must see.
            timeout: seconds without progress after which a process counts as hung.
            about: returns ``settings``, ``data`` and ``model``, JSON values that must be the same on all ranks.

        Yields:
            The device of this process.

        Raises:
            DistributedError: a rank is missing, differs from rank 0 or cannot be reached; the message names the rank
                and the remedy.
        """
        yield self.init_process_group(device)

    def mark(self, phase: str, step: int) -> None:
        """Report the phase and step of this process to the watchdog, which needs them to find a hung process."""
        self._place = phase, step
        if self.on_mark is not None:
            self.on_mark(phase, step)

    def heartbeat(self) -> None:
        """Report progress within the phase and step that were marked last."""
        self.mark(*self._place)

    # ------------------------------------------------------------------ collectives on Python values

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over all ranks in fp64; the sum of one number and zeros is exact."""
        return list(values)

    def broadcast_int(self, value: float) -> int:
        """Return rank zero's integer on all ranks."""
        return int(self.all_reduce_sum([value if self.is_rank_zero else 0])[0])

    def broadcast_object(self, value: Any) -> Any:
        """Return rank zero's value on all ranks, see `all_gather_object`."""
        return self.all_gather_object(value if self.is_rank_zero else None)[0]

    def on_rank_zero(self, make: Callable[[], T]) -> T | None:
        """Call ``make`` on rank zero only; if it fails there, the same error is raised on all ranks.

        Returns:
            The result of ``make`` on rank zero, None on the other ranks.
        """
        return make()

    def main_process_first(self, make: Callable[[], T], what: str) -> T:
        """Call ``make``, which caches its result, on rank 0, then on one process of every other host, then on the rest.

        Ranks wait on the store, without a process group, so that a long preparation of data meets no timeout.

        Args:
            make: called on every rank.
            what: what it does, for the error of the ranks that wait: "prepare the data".

        Raises:
            DistributedError: on the waiting ranks, if the rank that they wait for failed.
        """
        return make()

    def broadcast_result(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank zero and return its JSON value on all ranks.

        The call may take any time: the other ranks wait on the store, where no timeout of a process group applies.

        Raises:
            PretrainError: on all ranks, the error that ``make`` raised.
        """
        return make()

    def raise_on_all_ranks(self, failure: Exception | None) -> None:
        """Raise the failure of one rank on all ranks; a collective, which all ranks must call.

        Raises:
            PretrainError: the failure of the lowest rank that has one, with its rank. An error of this process that is
                no PretrainError is raised unchanged.
        """
        if failure is not None:
            raise failure

    def store_peers(self) -> Peers:
        """Return the peers to use before the process group exists: JSON values go through the store, no tensors."""
        return self


_world: World | None = None


def world_is_known() -> bool:
    """Return whether the world of this process has been found already."""
    return _world is not None and not (_world.size == 1 and launched())


def current_world(patience: float = 300.0) -> World:
    """Return the world of this process, which is found once; see `World.find`."""
    global _world
    if _world is None or not world_is_known():
        _world = World.find(patience)
    return _world
