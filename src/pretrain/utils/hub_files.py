"""Files of repositories of the Hugging Face Hub, in the cache of ``huggingface_hub``, and errors in one sentence."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.errors import CheckpointError, PretrainError
from pretrain.utils.hub_names import HubName, hub_name

__all__ = ["hub_errors", "pinned", "snapshot"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Classes of errors of the connection in the libraries that versions of huggingface_hub are built on.
_UNREACHED = {"TransportError", "ConnectionError", "Timeout", "LocalEntryNotFoundError"}
_BUSY = 429


def pinned(path: str, before: str | None, patterns: Sequence[str]) -> str:
    """Return the name of a repository on the Hub with the commit that its revision is now; a path as it is.

    Args:
        path: a directory or file, or the name of a repository on the Hub.
        before: what this function returned when the run began. Its commit is kept unless ``path`` names another
            revision; if no revision is named, or a branch that the cache knows, no network is asked.
        patterns: files that are fetched, see ``snapshot``.
    """
    name, earlier = hub_name(path), None if before is None else hub_name(before)
    if name is None:
        return path
    if earlier is not None and earlier.repository == name.repository:
        if name.revision in (None, earlier.revision):
            return str(earlier)
        with contextlib.suppress(CheckpointError):
            if snapshot(name, patterns, offline=True).name == earlier.revision:
                return str(earlier)
    return str(replace(name, revision=snapshot(name, patterns).name))


def snapshot(name: HubName, patterns: Sequence[str], *, offline: bool = False) -> Path:
    """Return the snapshot of a repository in the cache, with the files that match a pattern of fnmatch.

    The name of the directory is that of the commit.

    Raises:
        CheckpointError: the files cannot be fetched.
    """
    import huggingface_hub

    with hub_errors(name):
        return Path(
            huggingface_hub.snapshot_download(
                name.repository,
                revision=name.revision,
                allow_patterns=list(patterns),
                local_files_only=offline,
                tqdm_class=_silent_bar(),
            )
        )


def _silent_bar() -> Any:
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **options | {"disable": True})

    return Silent


@contextlib.contextmanager
def hub_errors(name: HubName, *, writing: bool = False) -> Iterator[None]:
    """Turn every error of the Hub's library inside the block into a CheckpointError of one sentence with the remedy.

    Args:
        name: the repository.
        writing: the block writes to it, and does not read from it.
    """
    try:
        yield
    except PretrainError:
        raise
    except Exception as error:  # many types, of the library and of those below it
        raise CheckpointError(_explained(name, error, writing)) from error


def _explained(name: HubName, error: Exception, writing: bool) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{name.repository}"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    chain = {cls.__name__ for cls in type(error).__mro__}
    here = f" There is no directory {name.path} either." if name.path else ""
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: ask for access at {page}, and log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name} does not exist, or is private.{here} Check the name; for a private model log in with "
            "`hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name}: the model has no revision {name.revision!r}. Name a branch, a tag or a commit of {page}."
    if status in (401, 403):
        return f"{name}: the Hub denies access ({status}). Log in with `hf auth login`; your rights are at {page}."
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return (
            f"The disk is full: {name} does not fit into {constants.HF_HUB_CACHE}. Free some space, or set HF_HOME to "
            "a directory on another disk."
        )
    if chain & _UNREACHED or status == _BUSY or status >= 500:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _short(error)
        if writing:
            return (
                f"{name} is not written, because the Hub cannot be reached ({offline}). Run the same command again "
                "where it can."
            )
        revision = f" --revision {name.revision}" if name.revision else ""
        return (
            f"{name} is not in {constants.HF_HUB_CACHE}, and the Hub cannot be reached ({offline}).{here} On a machine "
            f"with a network, run `hf download {name.repository}{revision} --local-dir DIR`; then copy that directory "
            "and name it here."
        )
    return f"{name} cannot be transferred ({_short(error)}). Run the same command again: complete files are kept."


def _short(error: BaseException) -> str:
    """Return the type and the first line of the error at the root of a chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")
