"""Loading of a checkpoint by several ranks, each of which reads only its own shards.

Any directory with a whole model can be read, whatever wrote it and on however many ranks. Every file is verified before
its tensors are used, and hashed by only one of the ranks. Missing and unexpected tensors are reported as by ``load``,
through the same table of names.

A rank that reads only parts of a file cannot hash it in the same pass. Instead, the files are divided among the ranks,
which hash them and share the result. A file that changes between hashing and reading is detected by its size,
modification time, device and inode.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain import checkpoint
from pretrain.checkpoint import manifest
from pretrain.checkpoint.model_directory import ModelDirectory, check_index, refuse_non_finite
from pretrain.checkpoint.peers import SINGLE_PROCESS, Peers, TensorSharding, errors_on_all_ranks
from pretrain.checkpoint.training_state import (
    TrainingState,
    check_training_folder,
    open_training,
    read_state,
    tensor_files,
)
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.models.names import Entry, LoadReport, check_stored, slice_from_disk
from pretrain.models.state import heads_apart, match_disk_state, modern_keys, report_line
from pretrain.nn.buffers import stored_tensors
from pretrain.nn.device import local
from pretrain.nn.layout import ShardLayout, ShardSlice, whole
from pretrain.utils import files
from pretrain.utils.files import Record, note, open_regular
from pretrain.utils.memory_info import total_memory
from pretrain.utils.tensors import (
    TensorInfo,
    parse_header,
    read_header_bytes,
    read_tensor,
)

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = [
    "StoredTensors",
    "hash_by_ranks",
    "latest_on_all_ranks",
    "load_slices",
    "read_training",
    "read_training_slices",
    "stored_of",
    "verify_on_all_ranks",
]

_BLOCK = 64 << 20  # bytes; block size in which two tensors are compared

Put = Callable[[str, Tensor], None]


def latest_on_all_ranks(run_dir: str | Path, peers: Peers) -> Path | None:
    """Return the checkpoint with the highest step that a run can resume from; None if the run has no checkpoints.

    All ranks get the same checkpoint. Every byte is verified, and each file is hashed by one rank. Newer checkpoints
    that are broken, or whose training folder was deleted, are reported on stderr.

    Raises:
        CheckpointError: there are checkpoints but none is complete, or the directory cannot be read.
    """
    directory = Path(os.path.realpath(run_dir))
    names: list[str] = []
    with errors_on_all_ranks(peers), files.reading(run_dir):
        if peers.rank == 0 and directory.is_dir():
            names = [path.name for path in manifest.run_checkpoints(directory)]
    broken: list[tuple[Path, CheckpointError]] = []
    for name in peers.all_gather_object(names)[0]:
        path = directory / str(name)
        try:
            verify_on_all_ranks(path, peers)
        except CheckpointError as error:
            broken.append((path, error))
        else:
            for skipped in broken if peers.rank == 0 else ():
                manifest.report_skipped(*skipped)
            return path
    if broken:
        count = f"{len(broken)} checkpoint{'s' * (len(broken) > 1)}"
        raise CheckpointError(
            f"{run_dir} holds {count}, but none is complete and undamaged, so the run cannot be resumed. It is not "
            f"restarted automatically. The newest: {broken[0][1]} Restore the files from a backup; or start a new run "
            f"from the weights alone, with a new train.out and model.checkpoint={run_dir}; or, to start over, move "
            f"the directory away: mv {run_dir} {run_dir}.broken"
        )
    return None


def verify_on_all_ranks(path: Path, peers: Peers, *, training: bool = True) -> None:
    """Verify the files of a checkpoint, each on one rank; without ``training`` those of the model alone.

    Raises:
        CheckpointCorrupt: a file is missing or damaged. On all ranks.
    """
    with errors_on_all_ranks(peers), files.reading(path):
        listed = manifest.read_manifest(path)
        if training:
            check_training_folder(path, listed)
        is_rank_zero = peers.rank == 0
        manifest.check_files(
            path,
            listed,
            training=training,
            hashes=manifest.INESSENTIAL if is_rank_zero else (),
            on_damage=manifest.report_damage if is_rank_zero else lambda error: None,
        )
    records = dict(listed.needed)
    if training:
        records |= listed.training
    hash_by_ranks(path, records, peers)


# ------------------------------------------------------------------------------------------------ weights


def stored_of(directory: ModelDirectory, names: Iterable[str]) -> StoredTensors:
    """Return the tensors of files of a directory, to be read in parts."""
    return StoredTensors({name: directory.real(name) for name in names})


def load_slices(
    model: Model,
    path: str | Path,
    layout: ShardLayout | None,
    peers: Peers,
    put: Put | None = None,
    *,
    keep: AbstractSet[str] = frozenset(),
    base: bool = False,
    verified: bool = False,
    quiet: bool = True,
) -> LoadReport:
    """Fill this rank's shards of the parameters of a model from a checkpoint or Hugging Face directory.

    Args:
        model: a materialised model, sharded according to ``layout``, whose head is tied as in the directory
            (``open_on_meta`` ensures that).
        path: a checkpoint or a Hugging Face directory, not a run; of an adapted model, a checkpoint of that adapter.
        layout: sharding of the parameters; None if every rank holds them whole.
        peers: the ranks.
        put: called with the name of a parameter or persistent buffer and its shard on the CPU, and the model is not
            changed; None copies the shard into the parameter. Empty shards are left out.
        keep: parameters that keep their values, whatever the directory holds.
        base: the directory is that of the base of the model's adapter; the adapter is not changed.
        verified: the hashes have just been compared by ``latest_on_all_ranks``.
        quiet: do not print the report line.

    Returns:
        The report of loaded, missing and unexpected tensors. Newly initialised parameters are added to ``model.fresh``
        unless ``put`` is given.

    Raises:
        CheckpointCorrupt: a file is damaged.
        CheckpointError: a tensor of the body is missing, or one has the wrong shape or type. On all ranks.
    """
    with errors_on_all_ranks(peers), files.reading(path):
        filler = _ShardFiller(model, TensorSharding(layout, peers), put, keep)
        directory = ModelDirectory(manifest.checked_directory(path), verify=True)
        if model.adapter is not None and not base:
            values = checkpoint.adapter_files.adapted_values(directory, model, filler.full)
            for name, value in values.items():
                filler.put_whole(name, value)
    if model.adapter is not None and not base:
        return LoadReport(loaded=len(values))
    with ExitStack() as stack:
        with errors_on_all_ranks(peers), files.reading(path):
            names = directory.weight_files()
            stored = stack.enter_context(stored_of(directory, names))
            for name, expected in names.items():
                check_index(directory, name, expected, stored.holds[name])
        if directory.manifest is not None and not verified:
            hash_by_ranks(directory.path, directory.manifest.needed, peers)
        apart = heads_apart(
            model, modern_keys(model, stored), lambda a, b: stored.same(a, b, peers)
        )
        with errors_on_all_ranks(peers), files.reading(path):
            if apart:
                raise CheckpointError(
                    f"{path}: {apart[0]!r} differs from the embedding, but the head of the model is tied to it. Untie "
                    "the head before the model is sharded, as open_on_meta does."
                )
            report, fresh = match_disk_state(
                model, list(stored), lambda entry, key: filler.put_stored(entry, key, stored)
            )
            sample = filler.sample(model, stored) if base and peers.rank == 0 else ""
            stored.check_unchanged()
            if put is None:
                model.fresh |= fresh
                model.reset_buffers(fresh - keep)
            for name in sorted((fresh - keep) & {name for name, _ in model.named_parameters()}):
                value = torch.empty(filler.shapes[name], dtype=torch.float32, device="cpu")
                model.init_parameter(name, value, seed=0)
                filler.put_whole(name, value)
            if not quiet and peers.rank == 0:
                config = directory.json("config.json")
                note(report_line(model, config, len(stored), report))
    if base:
        model.adapter.base_sample = str(peers.all_gather_object(sample)[0])
    return report


class _ShardFiller:
    """The shards of a model's parameters on this rank, its persistent buffers, and the functions that fill them."""

    def __init__(
        self, model: Model, sharding: TensorSharding, put: Put | None, keep: AbstractSet[str]
    ) -> None:
        self._tensors = stored_tensors(model)
        self._sharding, self._put, self._keep = sharding, put or self._copy, keep
        self._keys: dict[str, str] = {}
        self.full = sharding.full({name: local(p) for name, p in self._tensors.items()})
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.full.items()}

    @torch.no_grad()
    def _copy(self, name: str, value: Tensor) -> None:
        local(self._tensors[name]).copy_(value)

    def put_whole(self, name: str, value: Tensor) -> None:
        """Store this rank's shard of a whole parameter."""
        region = self._sharding.region(name, self.shapes[name])
        if region.numel:
            self._put(name, value[region.slices()])

    def sample(self, model: Model, stored: StoredTensors) -> str:
        """Return the `base_sample` of the whole model on disk."""

        def first(entry: Entry, name: str, count: int) -> Tensor:
            key, shape = self._keys[entry.disk], self.shapes[name]
            if not shape:
                return stored.read(key)
            rows = min(shape[0], -(-count // max(1, math.prod(shape[1:]))))
            region = ShardSlice((0,) * len(shape), (rows, *shape[1:]))
            return slice_from_disk(
                entry, name, region, self.shapes, lambda part: stored.read_region(key, part)
            )

        return checkpoint.adapter_files.base_sample(model, first)

    def put_stored(self, entry: Entry, key: str, stored: StoredTensors) -> None:
        """Read this rank's shards of the parameters that a tensor on disk holds."""
        self._keys[entry.disk] = key
        if not self._keep.isdisjoint(entry.memory):
            return
        info = stored.info(key)
        check_stored(entry, info.dtype, info.shape, self.shapes)
        for name in entry.memory:
            region = self._sharding.region(name, self.shapes[name])
            if region.numel:
                value = slice_from_disk(
                    entry, name, region, self.shapes, lambda part: stored.read_region(key, part)
                )
                refuse_non_finite(stored.path(key), key, value)
                self._put(name, value)


# ------------------------------------------------------------------------------------------------ resuming


def read_training(path: str | Path, *, quiet: bool = False) -> TrainingState:
    """Read the whole training folder of a checkpoint; every byte is verified before it is used.

    Args:
        path: a checkpoint, or a run (its newest complete checkpoint).
        quiet: do not report differences in library versions and thread count, which can change the last bits.

    Raises:
        CheckpointError: the folder was deleted, so the run cannot be resumed from this checkpoint.
        CheckpointCorrupt: a file differs from the manifest.
    """
    directory = manifest.checked_directory(path)
    if not os.path.lexists(directory / manifest.NAME):
        directory = manifest.latest(directory) or directory
    return read_training_slices(directory, None, SINGLE_PROCESS, quiet=quiet)


def read_training_slices(
    path: str | Path,
    layout: ShardLayout | None,
    peers: Peers,
    *,
    verified: bool = False,
    quiet: bool = False,
    stems: Collection[str] | None = None,
) -> TrainingState:
    """Read this rank's shards of the training folder of a checkpoint; see ``pretrain.checkpoint.read_training``.

    Args:
        path: a checkpoint.
        layout: sharding of the parameters; None if every rank holds them whole.
        peers: the ranks.
        verified: the hashes have just been compared by ``latest_on_all_ranks``.
        quiet: do not report differences in library versions and thread count.
        stems: read only these groups of tensors.

    Returns:
        The training state. Tensors that belong to sharded parameters are this rank's shards; all other tensors, and
        the plain values, are whole.

    Raises:
        CheckpointCorrupt: a file differs from the manifest.
        CheckpointError: the folder was deleted, or a tensor has another shape than its parameter. On all ranks.
    """
    sharding = TensorSharding(layout, peers)
    state = TrainingState()
    with ExitStack() as stack:
        stores: dict[str, StoredTensors] = {}
        with errors_on_all_ranks(peers), files.reading(path):
            directory = manifest.checked_directory(path)
            listed = open_training(directory, quiet=quiet or peers.rank != 0)
            state.state = read_state(directory, listed)
            groups = tensor_files(directory, listed.training)
            if stems is not None:
                groups = {stem: names for stem, names in groups.items() if stem in stems}
            for stem, names in groups.items():
                paths = {name: directory / name for name in names}
                stores[stem] = stack.enter_context(StoredTensors(paths, slashes=True))
        if not verified:
            records = {name: listed.training[name] for names in groups.values() for name in names}
            hash_by_ranks(directory, records, peers)
        with errors_on_all_ranks(peers), files.reading(path):
            for stem, stored in stores.items():
                state.tensors[stem] = {key: _part(stored, key, sharding) for key in stored}
                stored.check_unchanged()
    return state


def _part(stored: StoredTensors, key: str, sharding: TensorSharding) -> Tensor:
    shape = stored.info(key).shape
    name = sharding.parameter(key, shape)
    if name is not None and shape != (expected := tuple(sharding.layout.shapes[name])):
        raise CheckpointError(
            f"{stored.path(key)} holds {key!r} with shape {shape}, but the parameter has {expected}. Use a new "
            "train.out for a changed model."
        )
    return stored.read_region(key, sharding.region(key, shape)).contiguous()


# ------------------------------------------------------------------------------------------------ files


def hash_by_ranks(directory: Path, records: Mapping[str, Record], peers: Peers) -> None:
    """Compare files with a manifest; every file is hashed by one rank, the largest files first.

    Raises:
        CheckpointCorrupt: a file differs. On all ranks, whichever rank found it.
    """
    load = [0] * peers.size
    mine = []
    for name, record in sorted(records.items(), key=lambda item: (-item[1].size, item[0])):
        rank = load.index(min(load))
        load[rank] += record.size
        if rank == peers.rank:
            mine.append(name)
    with errors_on_all_ranks(peers), files.reading(directory):
        for name in mine:
            manifest.check_hash(directory / name, records[name])


@dataclass(frozen=True)
class _TensorLocation:
    """Location of a tensor: its file, the offset of the data section in that file, and its entry in the header."""

    path: Path
    descriptor: int
    data: int
    info: TensorInfo


class StoredTensors:
    """The tensors of several files, open for reading; a context manager.

    Args:
        paths: name of a file, as used in `holds` -> its path.
        slashes: allow "/" in the names of tensors.

    Raises:
        CheckpointCorrupt: a file is not a valid safetensors file, or two files hold the same tensor.
    """

    def __init__(self, paths: Mapping[str, Path], *, slashes: bool = False) -> None:
        self.holds: dict[str, list[str]] = {}
        self._locations: dict[str, _TensorLocation] = {}
        self._opened: list[tuple[Path, int, tuple[int, ...]]] = []
        self._last: tuple[str, int, int, Tensor] | None = None
        try:
            for name, path in paths.items():
                self._open(name, path, slashes)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str, path: Path, slashes: bool) -> None:
        descriptor, size = open_regular(path)
        self._opened.append((path, descriptor, _identity(descriptor)))
        head = read_header_bytes(path, descriptor, size)
        infos = parse_header(path, size, head, slashes)
        self.holds[name] = list(infos)
        for key, info in infos.items():
            if key in self._locations:
                other = self._locations[key].path.name
                raise CheckpointCorrupt(path, f"tensor {key!r} in one file", f"it in {other} too")
            self._locations[key] = _TensorLocation(path, descriptor, len(head), info)

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    def info(self, key: str) -> TensorInfo:
        """Return the header entry (dtype, shape and offsets) of a tensor."""
        return self._locations[key].info

    def path(self, key: str) -> Path:
        """Return the path of the file that holds a tensor."""
        return self._locations[key].path

    def read(self, key: str) -> Tensor:
        """Read a whole tensor."""
        return self.read_region(key, whole(self.info(key).shape))

    def read_region(self, key: str, region: ShardSlice) -> Tensor:
        """Read a region of a tensor, by reading all of its rows.

        Returns:
            The region in the dtype of the file. The tensor may be a view of a buffer, of which the next call with the
            same rows returns a view, too.
        """
        info = self.info(key)
        if not info.shape:
            return self._rows(key, 0, 1).reshape(())
        if math.prod(region.shape) == 0:
            return torch.empty(region.shape, dtype=info.dtype)
        rows = self._rows(key, region.start[0], region.shape[0])
        return rows[(slice(None), *region.slices()[1:])]

    def _rows(self, key: str, start: int, count: int) -> Tensor:
        # If one matrix on disk holds several parameters, consecutive calls read different columns of the same rows.
        if self._last is not None and self._last[:3] == (key, start, count):
            return self._last[3]
        self._last = None
        location = self._locations[key]
        shape = (count, *location.info.shape[1:])
        size = math.prod(shape) * location.info.dtype.itemsize
        if size > (total := total_memory()):
            raise CheckpointError(
                f"{location.path}: {key!r} takes {size:,} bytes; this machine has {total:,.0f} bytes of memory."
            )
        row = math.prod(location.info.shape[1:]) * location.info.dtype.itemsize
        offset = location.data + location.info.start + start * row
        tensor = read_tensor(
            location.path, location.descriptor, offset, key, shape, location.info.dtype
        )
        self._last = (key, start, count, tensor)
        return tensor

    def same(self, one: str, two: str, peers: Peers) -> bool:
        """Whether two tensors are equal; a collective call, in which every rank compares a part of the rows."""
        first, second = self.info(one), self.info(two)
        if first.shape != second.shape:
            return False
        if not first.shape:
            return bool(torch.equal(self.read(one).float(), self.read(two).float()))
        count = first.shape[0]
        begin, end = (count * rank // peers.size for rank in (peers.rank, peers.rank + 1))
        width = max(math.prod(first.shape[1:]), 1) * first.dtype.itemsize
        step = max(_BLOCK // width, 1)
        equal = True
        with errors_on_all_ranks(peers), files.reading(self.path(one)):
            for start in range(begin, end, step):
                rows = min(step, end - start)
                block = self._rows(one, start, rows)
                equal = equal and torch.equal(block.float(), self._rows(two, start, rows).float())
            self._last = None
        return all(peers.all_gather_object(equal))

    def check_unchanged(self) -> None:
        """Raise CheckpointCorrupt if a file was modified or replaced since it was opened."""
        for path, descriptor, identity in self._opened:
            try:
                named = os.stat(path, follow_symlinks=False)
            except FileNotFoundError:
                raise CheckpointCorrupt(
                    path, "a file", "nothing: it was deleted while it was read"
                ) from None
            same_file = (named.st_dev, named.st_ino) == identity[:2]
            if not same_file or _identity(descriptor) != identity:
                raise CheckpointCorrupt(
                    path, "the file as it was opened", "a file that another process changed"
                )

    def close(self) -> None:
        """Close the files."""
        self._last = None
        while self._opened:
            os.close(self._opened.pop()[1])

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(descriptor: int) -> tuple[int, ...]:
    info = os.fstat(descriptor)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
