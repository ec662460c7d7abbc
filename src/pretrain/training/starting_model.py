"""Opening the checkpoint that a run starts from; with several ranks, each reads its own shards only."""

from __future__ import annotations

from pretrain.checkpoint import load
from pretrain.checkpoint.sharded_loading import load_slices, open_empty
from pretrain.distributed.world import World, current_world
from pretrain.errors import AdapterFound
from pretrain.models.base import Model
from pretrain.models.state import make_fresh

__all__ = ["open_source"]


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
    if world.size > 1 and not whole:
        try:
            return _opened(path, world, head, quiet)
        except AdapterFound:
            pass
    return load(path, head=head, quiet=quiet)


def _opened(path: str, world: World, head: str | None, quiet: bool) -> Model:
    model, directory = open_empty(path, world.callers(), head=head)
    make_fresh(model, 0)

    def start(cut: Model) -> None:
        load_slices(
            cut,
            directory,
            cut.layout,
            world.peers(),
            own=cut.fresh,
            base=cut.adapter is not None,
            quiet=quiet,
        )

    model.start = start
    return model
