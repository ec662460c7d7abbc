"""Names of splits, and folders of parquet files as the Hub holds data sets: shards of each split, also in ``data``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.data.paths import hidden
from pretrain.data.readers import table_kind

__all__ = [
    "HELD_OUT",
    "SPLITS",
    "TRAIN",
    "absent_shards",
    "parts_of_shards",
    "pattern_of",
    "shards_of",
    "split_for",
    "splits_among",
]

_SHARD = re.compile(r"(.+?)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")  # train-00000-of-00003
TRAIN = ("train", "training")
HELD_OUT = {
    "valid": ("validation", "valid", "val", "dev", "eval", "validation_matched", "dev_matched"),
    "test": ("test", "testing", "test_matched"),
}
_USES = {"train": TRAIN, **HELD_OUT}
SPLITS = tuple(split for splits in _USES.values() for split in splits)
_TABLES = ("csv", "tsv", "jsonl")


def split_for(splits: Mapping[str, Any], name: str) -> str | None:
    """Return the split for the rows ``name``, which are ``train``, ``validation``, ``test`` or others."""
    use = {"validation": "valid"}.get(name, name)
    return next((split for split in _USES.get(use, ()) if split in splits), None)


def shards_of(source: Any) -> dict[str, list[Path]]:
    """Return split -> its parquet files, in order, of a folder; empty for what is no such folder.

    The name of a file tells its split, as in the datasets library: ``train-00000-of-00003.parquet``,
    ``validation.parquet``, ``test/0000.parquet``. Files of which none names a split are those of ``train``.
    """
    folder = Path(os.path.expanduser(source)) if isinstance(source, str | Path) else None
    if folder is None or not os.path.isdir(folder):
        return {}
    for place in (folder, folder / "data"):
        files = _files(place)
        if any(table_kind(file) in _TABLES for file in files):
            return {}
        if held := [file for file in files if file.suffix.lower() == ".parquet" and file.is_file()]:
            return _by_split(held, place)
    return {}


def _files(place: Path) -> list[Path]:
    """Return the files of a folder and those of folders in it that are called like a split, sorted."""
    try:
        inside = sorted(p for p in place.iterdir() if not hidden(p.name))
        below = [p for p in inside if p.name.lower() in SPLITS and p.is_dir()]
        return [*inside, *(p for one in below for p in sorted(one.iterdir()) if not hidden(p.name))]
    except OSError:  # there is none, or it cannot be read, which is said where its files are named
        return []


def _by_split(files: Sequence[Path], place: Path) -> dict[str, list[Path]]:
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split(file, place), []).append(file)
    unnamed = by_split.pop("", [])
    if unnamed and (by_split or any(file.stem == "metadata" for file in unnamed)):
        return {}
    return by_split or {"train": unnamed}


def _split(file: Path, place: Path) -> str:
    """Return the split that the folder of a file in ``place``, or its own name, tells; "" if none does."""
    if file.parent != place:  # train/data-00000-of-00003.parquet
        return file.parent.name.lower()
    shard = _SHARD.fullmatch(file.stem)
    words = [shard[1]] if shard else [file.stem, re.split(r"[-_. ]", file.stem)[0]]
    named = next((word.lower() for word in words if word.lower() in SPLITS), "")
    return named or (shard[1] if shard else "")


def pattern_of(split: str, files: Sequence[Path]) -> str:
    """Return the spelling of a source that holds the files of one split of `shards_of`, or the first of them."""
    place, name = files[0].parent, files[0].stem[: len(split)]
    if name.lower() != split and place.name.lower() == split:
        return str(place)
    patterns = (f"{name}*.parquet", f"{name}-*.parquet")  # train* also fits train_sft
    exact = (str(place / p) for p in patterns if {*place.glob(p)} == {*files})
    return next(exact, str(files[0]))


def splits_among(files: Sequence[Path]) -> list[str]:
    """Return the splits that the names of files, or those of their folders, tell."""
    folders = (file.parent.name.lower() for file in files)
    found = (
        f if f in SPLITS else _split(file, file.parent)
        for f, file in zip(folders, files, strict=True)
    )
    return [*dict.fromkeys(filter(None, found))]


def absent_shards(files: Sequence[Path]) -> int:
    """Return how many shards of a split are not there, by the number of them that each name states."""
    shards = [shard for file in files if (shard := _SHARD.fullmatch(file.stem))]
    return max((int(shard[3]) for shard in shards), default=0) - len({shard[2] for shard in shards})


def parts_of_shards(source: Any) -> list[str]:
    """Return which of ``train``, ``valid`` and ``test`` a folder has shards of."""
    shards = shards_of(source)
    return [use for use in _USES if split_for(shards, use)]
