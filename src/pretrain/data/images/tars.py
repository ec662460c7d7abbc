"""Archives of samples as WebDataset writes them: the members of one name are one sample, their endings its columns."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.data.images.decode import SUFFIXES, Picture, Slice
from pretrain.errors import CheckpointCorrupt, DataError
from pretrain.utils.files import note
from pretrain.utils.strict_json import parse_json

__all__ = ["read_tars"]

_MOST_TEXT = 1 << 20  # bytes of a member that is no image


def read_tars(paths: Sequence[Path]) -> dict[str, list[Any]]:
    """Return the samples of archives as columns: ``image``, ``caption`` (.txt), ``label`` (.cls) and those of .json.

    Images stay in the archives, and are read from there when they are needed.

    Raises:
        DataError: a file is no archive, is compressed, damaged, or cut off.
    """
    rows, passed = list[dict[str, Any]](), Counter[str]()
    for path in paths:
        samples: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")
                    if member.isfile() and key:
                        sample = samples.setdefault(f"{folder}/{key}".lstrip("./"), {})
                        _add(sample, path, archive, member, ending.lower(), passed)
                _check_end(archive)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"{path} cannot be read as an archive: {error}. It must be one .tar that is not compressed; if it "
                "is damaged or cut off, copy it again."
            ) from error
        rows += samples.values()
    kept = [row for row in rows if "image" in row]
    if lost := len(rows) - len(kept):
        note(f"{lost:,} of {len(rows):,} samples have no image and are left out")
    if passed:
        named = ", ".join(f".{ending} ({count:,})" for ending, count in passed.most_common(4))
        note(f"members that are not read: {named}{', ...' * (len(passed) > 4)}")
    names = dict.fromkeys(name for row in kept for name in row)
    return {name: [row.get(name) for row in kept] for name in names}


def _check_end(archive: tarfile.TarFile) -> None:
    """Check that an archive that has been read ends as one: with a block of zeros, and nothing else behind it.

    ``tarfile`` also stops, without an error, at a header that is damaged or cut off.

    Raises:
        ReadError: it does not.
    """
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    found = file.read(tarfile.BLOCKSIZE)
    if len(found) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it ends without the block of zeros that closes an archive")
    while found:
        if found.strip(b"\0"):
            raise tarfile.ReadError(
                f"{archive.offset:,} bytes from its start the header of a member is damaged, or another archive follows"
            )
        found = file.read(1 << 20)


def _add(
    sample: dict[str, Any], path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str,
    passed: Counter[str],
) -> None:  # fmt: skip
    """Add one member to its sample; ``passed`` counts, by ending, those that are not read."""
    if f".{ending}" in SUFFIXES and "image" not in sample:
        place = Slice(path, member.offset_data, member.size)
        sample["image"] = Picture(place, f"{path.name}/{member.name}")
        return
    held = archive.extractfile(member) if ending in ("txt", "cls", "json") else None
    content = b"" if held is None or member.size > _MOST_TEXT else held.read()
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        passed[f"{ending} not in UTF-8"] += 1
        return
    if ending == "txt" and text:
        sample["caption"] = text.splitlines()
    elif ending == "cls" and text:
        sample["label"] = int(text) if re.fullmatch(r"\d{1,9}", text) else text
    elif ending == "json" and (found := _mapping(content)) is not None:
        # Members of their own take precedence, in whichever order they stand.
        sample |= {key: value for key, value in found.items() if key not in (*sample, "image")}
    else:
        passed[ending] += 1


def _mapping(content: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(content, "a member")
    except CheckpointCorrupt:
        return None
    return found if isinstance(found, dict) else None
