"""Names of models on the Hugging Face Hub: ``org/name`` or ``hub:org/name``, with ``@revision`` if one is chosen."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

__all__ = ["HubName", "hub_hint", "hub_name"]

_PART = r"[a-z0-9_](?:[a-z0-9_.-]{0,94}[a-z0-9_])?"
_NAME = re.compile(rf"(hub:)?((?:{_PART}/)?{_PART})(?:@([a-z0-9][a-z0-9_./-]*))?", re.ASCII | re.I)


@dataclass(frozen=True)
class HubName:
    """A model on the Hub.

    Attributes:
        repository: ``org/name``.
        revision: a branch, a tag or a commit; None is the default branch.
        path: what the user wrote if it could have been a path, to be named in errors; else empty.
    """

    repository: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        return f"hub:{self.repository}" + (f"@{self.revision}" if self.revision else "")


def hub_name(path: str | os.PathLike[str]) -> HubName | None:
    """Return the model on the Hub that ``path`` names, or None if it is the path of a directory or file.

    Without ``hub:`` a name is a path if it exists, or if there is a directory ``org``: a mistyped ``runs/x`` asks
    nobody.
    """
    text = os.fspath(path)
    found = _NAME.fullmatch(text)
    if found is None or ".." in text:
        return None
    prefix, repository, revision = found.groups()
    if prefix:
        return HubName(repository, revision)
    owner, slash, _ = repository.partition("/")
    if not slash or os.path.lexists(text) or os.path.isdir(owner):
        return None
    return HubName(repository, revision, path=text)


def hub_hint(path: str | os.PathLike[str]) -> str:
    """Return a sentence for the error that a path does not exist, if it may have been meant for a name on the Hub."""
    text = os.fspath(path)
    found = _NAME.fullmatch(text)
    meant = found is not None and not found[1] and ".." not in text
    return f" A model of the Hugging Face Hub is named hub:{text}." if meant else ""
