"""Opening the checkpoint that a run starts from; with several ranks, each reads its own shards only."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pretrain.checkpoint import load
from pretrain.checkpoint.best import state_of
from pretrain.checkpoint.download import fetch_config, fetch_model, pinned, terms
from pretrain.checkpoint.manifest import read_manifest, run_checkpoints
from pretrain.checkpoint.meta_loading import open_on_meta
from pretrain.checkpoint.model_directory import ADAPTER_CONFIG, ModelDirectory
from pretrain.checkpoint.resolve import (
    RESULT,
    enclosing_run,
    models_of_run,
    resolve_model_directory,
)
from pretrain.checkpoint.sharded_loading import load_slices
from pretrain.distributed.world import current_world
from pretrain.errors import AdapterFound, CheckpointError, PretrainError
from pretrain.models.base import Model
from pretrain.models.state import init_missing
from pretrain.nn.buffers import stored_tensors
from pretrain.utils.files import muted, note
from pretrain.utils.hub_names import hub_name
from pretrain.utils.tensors import hash_tensors

__all__ = [
    "began_with",
    "hash_weights",
    "local_directory",
    "open_source",
    "origin",
    "outline",
    "parent_step",
    "recorded_origin",
    "resolve_source",
]


def resolve_source(name: str, before: str | None) -> str:
    """Fetch a model of the Hub for all ranks, and return its name with its commit.

    Args:
        name: name of the model.
        before: the checkpoint in the settings of the run that is resumed, or None; its commit is kept.

    Raises:
        CheckpointError: see ``pretrain.checkpoint.download.fetch_model``. On all ranks.
    """
    world = current_world()
    resolved = world.broadcast_result(lambda: pinned(name, before))
    world.main_process_first(lambda: fetch_model(resolved), f"fetch {resolved}")
    return resolved


def began_with(checkpoint: str, out: Path) -> str:
    """Return the directory with the weights that the run in ``out`` began with, for a run that is resumed.

    As a rule the directory is ``checkpoint`` itself. If ``checkpoint`` is a run that has been trained on since, one of
    the checkpoints of that run may still have the weights.

    Raises:
        CheckpointError: no checkpoint has the weights, and ``out`` trains an adapter on them. On all ranks.
    """
    return current_world().broadcast_result(lambda: _began_with(checkpoint, out))


def _began_with(checkpoint: str, out: Path) -> str:
    newest = next(iter(run_checkpoints(out)), None) if out.is_dir() else None
    run = None if hub_name(checkpoint) is not None else enclosing_run(Path(checkpoint))
    expected = None if newest is None else state_of(newest).get("identity", {}).get("base weights")
    if newest is None or run is None or expected is None:
        return checkpoint
    for path in (Path(checkpoint), *models_of_run(run)):
        with contextlib.suppress(CheckpointError, OSError):
            directory = ModelDirectory(resolve_model_directory(path), verify=True)
            digest = directory.weights_hash(directory.weight_files())
            # Without a manifest its weights are hashed when they are read.
            if digest is None and path == Path(checkpoint):
                return checkpoint
            if digest == expected:
                if path != Path(checkpoint):
                    note(f"{out} began with the weights of {path}, before {run} was trained on")
                return str(path)
    # Of whole models `check_same` refuses to go on, but the page of the run needs none of these weights.
    if not (newest / ADAPTER_CONFIG).exists():
        return checkpoint
    block = ModelDirectory(newest, verify=False).model_config().get("pretrain", {})
    step = block.get("parent_step")
    which = f" (step {step})" * isinstance(step, int)
    raise CheckpointError(
        f"{out} trains an adapter, and the weights of {checkpoint} that it belongs to{which} are no longer there: "
        f"{run} was trained on or changed since, and none of its checkpoints has them. Put a copy of that checkpoint "
        f"back into {run}, or use a new train.out. If a base is to be trained on, copy {run / RESULT} before and "
        "fine-tune the copy."
    )


def parent_step(checkpoint: str) -> dict[str, int]:
    """Return the step of what opening ``checkpoint`` opens, as ``parent_step``; nothing if that is not of a run."""
    with contextlib.suppress(CheckpointError, OSError):
        if hub_name(checkpoint) is None and enclosing_run(Path(checkpoint)) is not None:
            step = read_manifest(resolve_model_directory(Path(checkpoint))).step
            return {} if step is None else {"parent_step": step}
    return {}


def origin(checkpoint: str | None) -> str | None:
    """Return the name that a new checkpoint records for its starting checkpoint: of the Hub, or of a directory."""
    if not checkpoint:
        return None
    name = hub_name(checkpoint)
    return Path(checkpoint).name if name is None else str(name)


def local_directory(checkpoint: str | Path) -> Path:
    """Return the path of a checkpoint; of a model of the Hub that of its directory in the cache."""
    return Path(checkpoint) if hub_name(checkpoint) is None else fetch_model(checkpoint)[0]


def recorded_origin(checkpoint: str | None) -> dict[str, Any]:
    """Return what a new checkpoint records of the one that it starts from: its name, licence and languages."""
    return {"parent": origin(checkpoint), **terms(checkpoint or "")}


def outline(path: str) -> Model | None:
    """Return the model of a checkpoint without its weights, from config.json alone; None if it has none or is damaged.

    ``open_source`` raises what is wrong with it. An adapter has no config.json of its own.
    """
    with contextlib.suppress(PretrainError, OSError), muted():
        directory = fetch_config(path)
        if not directory.is_adapter:
            return Model.from_hf_config(directory.json("config.json"))
    return None


def open_source(
    path: str, *, head: str | None = None, whole: bool = False, quiet: bool = False
) -> Model:
    """Return the model of a checkpoint; with several ranks its weights are read after it has been sharded.

    Until then it is on the meta device, except for weights that the checkpoint lacks; ``model.start`` reads the rest.

    Args:
        path: a run, a checkpoint or a Hugging Face directory.
        head: kind of head to use instead of the stored one.
        whole: read all weights now, as is always done for adapters.
        quiet: print no report.

    Raises:
        CheckpointError: see ``pretrain.checkpoint.load``.
    """
    world = current_world()
    if world.size == 1 or whole:
        return load(path, head=head, quiet=quiet)
    try:
        model, directory = open_on_meta(path, world.store_peers(), head=head)
    except AdapterFound:
        return load(path, head=head, quiet=quiet)
    init_missing(model, 0)

    def start(cut: Model) -> None:
        load_slices(
            cut,
            directory,
            cut.layout,
            world,
            keep=cut.fresh,
            base=cut.adapter is not None,
            quiet=quiet,
        )

    model.start = start
    return model


def hash_weights(model: Model, *, opened: bool) -> str | None:
    """Return a hash by which a resumed run notices that the weights that it starts from have changed.

    Args:
        model: as it was opened or given.
        opened: it was opened from files just now. What their manifest records is taken, and what no file held does not
            count.

    Returns:
        The same on all ranks; None if the weights are left on disk and have no manifest, so that they would have to be
        read for this alone.
    """
    if opened and model.files_hash is not None:
        return model.files_hash
    left_out = model.fresh if opened else ()
    weights = {name: t for name, t in stored_tensors(model).items() if name not in left_out}
    return None if any(t.is_meta for t in weights.values()) else hash_tensors(weights)
