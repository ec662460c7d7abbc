"""Models written to the Hugging Face Hub: what `save_model` writes, in one commit, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.checkpoint.download import fetch_model
from pretrain.checkpoint.loading import load
from pretrain.checkpoint.resolve import model_candidates
from pretrain.checkpoint.saving import OVERWRITABLE, save_model
from pretrain.errors import CheckpointError
from pretrain.utils.files import note, read_bytes
from pretrain.utils.hub_files import hub_errors
from pretrain.utils.hub_names import HubName, hub_name

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["push", "push_to_hub"]


def push_to_hub(
    model: Model, name: str, *, private: bool | None = None, message: str | None = None
) -> str:
    """Save a model and write its files to a repository on the Hub, which is created if it does not exist.

    The files are those of ``save``: weights, configuration, tokenizer, model card and manifest. The upload replaces
    the model in the repository, whose files stay in its history; other files stay as they are.

    Args:
        model: the model; an adapter must have a base that is on the Hub.
        name: ``org/name`` or ``hub:org/name``.
        private: whether a new repository is private; None leaves it to the settings of the account.
        message: message of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the name is none of a repository, the base of the adapter is a local directory, a weight is not
            finite, or the Hub refuses the model or cannot be reached.
    """
    target = _target(name)
    _refuse_local_base(model)
    with tempfile.TemporaryDirectory(prefix="pretrain-") as folder:
        files = save_model(model, Path(folder) / "model", repository=target.repository)
        return _upload(files, target, private, message or "Write a model with pretrain")


def push(
    directory: str | Path, name: str, *, private: bool | None = None, message: str | None = None
) -> str:
    """Load a model and write it to the Hub with the model card beside it; see `push_to_hub`.

    Args:
        directory: a run, whose best checkpoint is taken, a checkpoint, or a model directory.
        name: see `push_to_hub`.
        private: see `push_to_hub`.
        message: see `push_to_hub`.
    """
    _target(name)
    model = load(directory, quiet=True)
    fetched, _ = fetch_model(directory)
    for path in (fetched, *model_candidates(fetched)):
        if (card := path / "README.md").is_file():
            model.card = read_bytes(card).decode("utf-8", "replace")
            break
    return push_to_hub(model, name, private=private, message=message)


def _target(name: str) -> HubName:
    repository = hub_name(f"hub:{name.removeprefix('hub:')}")
    if repository is None or repository.revision is not None or "/" not in repository.repository:
        raise CheckpointError(
            f"{name!r} is no name of a repository on the Hub that can be written, which is org/name, without a "
            "revision; org is an organisation, or your own account."
        )
    return repository


def _refuse_local_base(model: Model) -> None:
    if model.adapter is None:
        return
    base = model.adapter.base
    if base is None or hub_name(base) is None:
        raise CheckpointError(
            f"The adapter is of no use to others: its base, {base or 'a model in memory'}, is not on the Hub. Merge it "
            "first (`pretrain merge`, merge_adapter()), or push the base and train the adapter on it by its name."
        )


def _upload(files: Path, target: HubName, private: bool | None, message: str) -> str:
    from huggingface_hub import HfApi

    new = {p.relative_to(files).as_posix(): p for p in files.rglob("*") if p.is_file()}
    with hub_errors(target, writing=True):
        api = HfApi()
        api.create_repo(target.repository, private=private, exist_ok=True)
        old = api.list_repo_files(target.repository)
        # Left where they are, the weights of an earlier model would be part of this one.
        stale = [file for file in old if OVERWRITABLE.fullmatch(file) and file not in new]
        commit = api.upload_folder(
            repo_id=target.repository,
            folder_path=files,
            delete_patterns=stale,
            commit_message=message,
        )
    size = sum(path.stat().st_size for path in new.values())
    note(f"{target}: {len(new)} files, {size / 1e6:,.1f} MB, written in one commit")
    return str(commit.commit_url)
