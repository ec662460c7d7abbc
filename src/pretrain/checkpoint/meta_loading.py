"""Opening of a checkpoint by several ranks without its weights, which they read once the model has been sharded."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from pretrain.checkpoint import manifest
from pretrain.checkpoint.download import fetch_model
from pretrain.checkpoint.loading import open_described
from pretrain.checkpoint.model_directory import ModelDirectory
from pretrain.checkpoint.peers import Peers, errors_on_all_ranks
from pretrain.checkpoint.resolve import model_candidates
from pretrain.checkpoint.sharded_loading import stored_of, verify_on_all_ranks
from pretrain.errors import AdapterFound, CheckpointCorrupt
from pretrain.models.base import Model
from pretrain.models.state import match_disk_state, match_tying, modern_keys
from pretrain.utils import files
from pretrain.utils.files import note

__all__ = ["open_on_meta"]


def open_on_meta(path: str | Path, peers: Peers, *, head: str | None = None) -> tuple[Model, Path]:
    """Open a model without its weights: from a run, a checkpoint, or a Hugging Face directory with a whole model.

    All ranks must call it, with the same arguments. The head is untied if the stored weights of the head differ from
    the embedding, as in ``load``.

    Args:
        path: a directory; of a run, the checkpoint that ``load`` would choose.
        peers: the ranks.
        head: kind of head to use instead of the stored one.

    Returns:
        The model on the meta device, with the names of the missing parameters in ``fresh``, and the directory to pass
        to ``load_slices`` once the model is sharded.

    Raises:
        CheckpointError: see ``pretrain.checkpoint.load``.
        AdapterFound: the directory holds an adapter.
    """
    with errors_on_all_ranks(peers), files.reading(path):
        directory, named = fetch_model(path)
        candidates = [candidate.name for candidate in model_candidates(directory)]
    for name in peers.all_gather_object(candidates)[0]:
        try:
            if os.path.lexists(directory / name / manifest.NAME):
                verify_on_all_ranks(directory / name, peers, training=False)
            return _open_on_meta(directory / name, str(Path(path) / name), peers, head)
        except CheckpointCorrupt as error:
            if peers.rank == 0:
                manifest.report_skipped(directory / name, error)
    return _open_on_meta(directory, named, peers, head)


def _open_on_meta(path: Path, named: str, peers: Peers, head: str | None) -> tuple[Model, Path]:
    with ExitStack() as stack:
        with errors_on_all_ranks(peers), files.reading(path), files.muted(peers.rank != 0):
            directory = ModelDirectory(path, verify=True)
            if directory.is_adapter:
                raise AdapterFound(
                    f"{named} holds an adapter, which cannot be loaded in shards. Use load(), which opens it on its "
                    "base."
                )
            model, _, names = open_described(directory, head=head, tokenizer=True)
            model.source, model.files_hash = named, directory.weights_hash(names)
            stored = stack.enter_context(stored_of(directory, names))
        untied = match_tying(
            model, modern_keys(model, stored), lambda a, b: stored.same(a, b, peers)
        )
        if untied and peers.rank == 0:
            note(f"{named}: head untied, because its weights differ from the embedding")
        with errors_on_all_ranks(peers):
            _, model.fresh = match_disk_state(model, list(stored), lambda entry, key: None)
    return model.eval(), path
