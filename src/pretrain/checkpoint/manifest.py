"""The manifest of a checkpoint, verification of checkpoints, and rotation of the checkpoints of a run.

`manifest.json` holds the size and SHA-256 of every file and a hash of itself, and is written last: a directory without
it is not a complete checkpoint. Unlike the common formats, this detects flipped bits. Files below `training/` are
marked optional: the folder may be deleted as a whole. Checkpoints are ordered by step, never by file time.
This module does not import torch.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import __version__
from pretrain.config.spelling import either
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.utils.directories import discard, moved_aside
from pretrain.utils.files import (
    Record,
    fsync_directory,
    hash_file,
    note,
    read_bytes,
    reading,
    write_file,
)
from pretrain.utils.hub_names import hub_hint
from pretrain.utils.strict_json import parse_json, sealed, unsealed

__all__ = [
    "Manifest",
    "complete",
    "latest",
    "read_manifest",
    "rotate",
    "run_checkpoints",
    "step_of",
    "verify",
    "write_manifest",
]

NAME = "manifest.json"
ADAPTER_CONFIG = "adapter_config.json"
TRAINING = "training"
STATE = f"{TRAINING}/state.json"
SCHEMA = 1
LIMIT = 16 << 20
# Files that are needed neither to resume nor to read the weights: damage to them is reported and otherwise ignored.
INESSENTIAL = frozenset({"README.md", "generation_config.json", "chat_template.jinja"})
POOLING = "1_Pooling"  # folder of sentence-transformers
_FILE = re.compile(r"(?:(?:training|1_Pooling)/)?[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")
_ASIDE = re.compile(r"^\.pretrain-old-\d+-[0-9a-f]{8}-(.+)$")
ON_PURPOSE = "If you changed it on purpose, open the directory with load(..., verify=False) and save it anew."


@dataclass(frozen=True)
class Manifest:
    """Parsed `manifest.json`: `files` by path inside the checkpoint; `step` is None for a model saved outside a run."""

    step: int | None
    files: dict[str, Record]
    environment: dict[str, Any]

    @property
    def training(self) -> dict[str, Record]:
        """The optional files, in the training folder, which only resuming needs."""
        return {
            name: record for name, record in self.files.items() if name.startswith(f"{TRAINING}/")
        }

    @property
    def required(self) -> dict[str, Record]:
        """All files outside the training folder."""
        optional = self.training
        return {name: record for name, record in self.files.items() if name not in optional}

    @property
    def needed(self) -> dict[str, Record]:
        """The required files without the `INESSENTIAL` ones."""
        return {name: record for name, record in self.required.items() if name not in INESSENTIAL}


def environment(threads: int, torch_version: str) -> dict[str, Any]:
    """Return the versions and settings that bit-identical resuming depends on besides the files."""
    versions = {
        "pretrain": __version__,
        "python": platform.python_version(),
        "torch": torch_version,
    }
    return {**versions, "threads": threads, "machine": platform.machine()}


def write_manifest(
    directory: Path, step: int | None, files: dict[str, Record], about: dict[str, Any]
) -> None:
    """Write the manifest as the last file of a checkpoint, flush its folders, and compare it with the files.

    Raises:
        CheckpointCorrupt: the directory does not hold just these files, with their sizes.
    """
    entries = {}
    for name, record in files.items():
        entries[name] = {
            "size": record.size,
            "sha256": record.sha256,
            "optional": name.startswith(f"{TRAINING}/"),
        }
    body = {"schema": SCHEMA, "step": step, "files": entries, "environment": about}
    write_file(directory / NAME, sealed(body))
    for folder in {directory, *((directory / name).parent for name in files)}:
        fsync_directory(folder)
    check_files(directory, read_manifest(directory), hashes=())


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest itself, but not the files that it lists.

    Raises:
        CheckpointCorrupt: the manifest is missing or damaged, or its schema or step is not the expected one (the step
            must be that of the directory name).
    """
    path = directory / NAME
    data = read_bytes(path, limit=LIMIT)
    body = unsealed(data, path, limit=LIMIT, hint=ON_PURPOSE)
    if body.get("schema") != SCHEMA:
        hint = "It was written by another version of pretrain; install that one."
        raise CheckpointCorrupt(path, f"schema {SCHEMA}", body.get("schema"), hint)
    step = body.get("step")
    if step is not None and type(step) is not int:
        raise CheckpointCorrupt(path, "a step", repr(step)[:40])
    named = step_of(directory.name)
    if named is not None and step is not None and named != step:
        hint = "The directory was renamed, or the manifest belongs to another checkpoint."
        raise CheckpointCorrupt(path, f"step {named}", f"step {step}", hint)
    about = body.get("environment")
    if not isinstance(about, dict):
        raise CheckpointCorrupt(path, "a table of versions", type(about).__name__)
    return Manifest(step, _records(path, body.get("files")), about)


def _records(path: Path, entries: Any) -> dict[str, Record]:
    if not isinstance(entries, dict) or not entries:
        raise CheckpointCorrupt(path, "a table of files", type(entries).__name__)
    records = {}
    for name, entry in entries.items():
        if not _FILE.fullmatch(name):
            raise CheckpointCorrupt(path, "plain file names", repr(name[:80]))
        size, sha256 = (
            (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        )
        if type(size) is not int or size < 0 or not isinstance(sha256, str):
            raise CheckpointCorrupt(path, f"size and sha256 of {name!r}", str(entry)[:80])
        records[name] = Record(size, sha256)
    return records


def step_of(name: str) -> int | None:
    """Return the step in `checkpoint-<step>`, also if the directory has been moved aside; None for other names."""
    aside = _ASIDE.match(name)
    match = _CHECKPOINT.fullmatch(aside[1] if aside else name)
    return int(match[1]) if match else None


def looks_cut(directory: Path) -> bool:
    """Whether a directory is an incomplete checkpoint (it has a training folder but no manifest)."""
    return (directory / TRAINING).is_dir() and not os.path.lexists(directory / NAME)


OnDamage = Callable[[CheckpointCorrupt], None]


def check_files(
    directory: Path,
    manifest: Manifest,
    *,
    training: bool = True,
    hashes: Collection[str] | None = None,
    on_damage: OnDamage | None = None,
) -> None:
    """Compare a directory with its manifest: no missing and no extra files, matching sizes and hashes.

    Names that begin with a dot are ignored (downloads and file managers create them).

    Args:
        directory: a checkpoint.
        manifest: the manifest read from it.
        training: also compare `training/`, which may be absent as a whole.
        hashes: names of the files to hash; of the others only the size is checked. None hashes all files.
        on_damage: called with the error if one of the `INESSENTIAL` files is damaged, instead of raising it.

    Raises:
        CheckpointCorrupt: the directory differs from its manifest.
    """
    present = _listing(directory)
    expected = dict(manifest.required)
    folder = directory / TRAINING
    if not training:
        present = {name for name in present if not name.startswith(f"{TRAINING}/")}
    elif os.path.lexists(folder):
        expected |= manifest.training
    damaged = set[str]()

    def report(name: str, error: CheckpointCorrupt) -> None:
        if on_damage is None or name not in INESSENTIAL:
            raise error
        damaged.add(name)
        on_damage(error)

    for name in sorted(set(expected) - present):
        size = f"{expected[name].size:,} bytes"
        report(name, CheckpointCorrupt(directory / name, size, "no such file"))
    if extra := sorted(present - set(expected)):
        raise CheckpointCorrupt(
            directory / extra[0],
            "no such file",
            "one",
            "The manifest does not list it. Move it away.",
        )
    hashed = expected.keys() if hashes is None else expected.keys() & hashes
    for check, names in ((_check_size, expected.keys()), (check_hash, hashed)):
        for name in sorted(names - damaged):
            try:
                check(directory / name, expected[name])
            except CheckpointCorrupt as error:
                report(name, error)


def _check_size(path: Path, record: Record) -> None:
    info = os.lstat(path)
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointCorrupt(path, "a regular file", "a link, directory, pipe or device")
    record.check(path, info.st_size, hint=_hint(path))


def _hint(path: Path) -> str:
    """Return what to do with a file that people edit."""
    return ON_PURPOSE if path.suffix in (".json", ".md", ".jinja") else ""


def check_hash(path: Path, record: Record) -> None:
    """Hash a file and raise CheckpointCorrupt unless its size and hash agree with ``record``."""
    actual = hash_file(path)
    if actual != record:
        record.check(path, actual.size, actual.sha256, _hint(path))


def _listing(directory: Path) -> set[str]:
    names = set()
    for entry in os.scandir(directory):
        if entry.name == NAME or entry.name.startswith("."):
            continue
        if entry.name in (TRAINING, POOLING) and entry.is_dir(follow_symlinks=False):
            names |= {f"{entry.name}/{inner}" for inner in os.listdir(entry.path)}
        else:
            names.add(entry.name)
    return names


def verify(path: str | Path, *, on_damage: OnDamage | None = None) -> None:
    """Verify a whole checkpoint: the manifest, the size and SHA-256 of every file, no missing and no extra files.

    A `training/` folder that is absent as a whole is accepted. ``on_damage`` is passed to `check_files`.

    Raises:
        CheckpointCorrupt: with `file`, `expected` and `found`.
    """
    directory = checked_directory(path)
    with reading(directory):
        check_files(directory, read_manifest(directory), on_damage=on_damage)


def checked_directory(path: str | Path) -> Path:
    """Return the real path of a directory given by the user; symbolic links are followed.

    Raises:
        CheckpointError: the directory does not exist, is a file, cannot be read, or holds prepared data.
    """
    directory = _real(path)
    with reading(path):
        # The process may have been killed between the two renames of `publish`.
        if not directory.exists() and directory.parent.is_dir():
            directory = moved_aside(directory.parent).get(directory.name, directory)
        if not directory.exists():
            raise CheckpointError(f"{path}: no such directory.{hub_hint(path)}")
        if not directory.is_dir():
            raise CheckpointError(
                f"{path} is a file; a checkpoint is a directory. Name the directory that holds it."
            )
        _refuse_prepared(path, directory / NAME)
        return directory


def _refuse_prepared(path: str | Path, file: Path) -> None:
    """Raise CheckpointError if the manifest of a directory, given as ``path``, is that of prepared data."""
    try:
        body = parse_json(read_bytes(file), file)
    except (OSError, CheckpointCorrupt):  # none, or its reader says how it is damaged
        return
    if not isinstance(body, dict) or "schema" in body or not {"digest", "format"} <= set(body):
        return
    kind, name = str(body.get("kind", "text")), str(path)  # that of text names no kind
    command, python = f"--data {shlex.quote(name)}", repr(name)
    if kind != "text":
        command = f"--data.source {shlex.quote(kind)} --data.source_args.train {shlex.quote(name)}"
        python = repr({"source": kind, "source_args": {"train": name}})
    use = either(f"pretrain train {command}", f"pretrain.train(data={python}, ...)")
    raise CheckpointError(
        f"{path} holds prepared {kind} and no model. Train a model on it, {use}, or name the directory of a model or a "
        "run here."
    )


def _real(path: str | Path) -> Path:
    try:
        return Path(os.path.realpath(os.path.expanduser(path)))
    except ValueError:  # a null byte in the path
        raise CheckpointError(f"{str(path)!r} cannot be the name of a directory.") from None


def run_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run, highest step first, including broken ones."""
    directories = {
        name: run_dir / name
        for name in os.listdir(run_dir)
        if not name.startswith(".") and not os.path.islink(run_dir / name)
    }
    directories |= moved_aside(run_dir)
    steps = {name: step for name in directories if (step := step_of(name)) is not None}
    return [directories[name] for name in sorted(steps, key=steps.__getitem__, reverse=True)]


def latest(run_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step; None if there is none.

    Every byte is verified. Newer checkpoints that are broken, and damaged `INESSENTIAL` files, are reported on stderr.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    directory = _real(run_dir)
    with reading(run_dir):
        if not directory.is_dir():
            return None
        checkpoints = run_checkpoints(directory)
    for path in checkpoints:
        try:
            verify(path, on_damage=report_damage)
        except CheckpointError as error:
            report_skipped(path, error)
        else:
            return path
    return None


def report_skipped(path: Path, error: CheckpointError) -> None:
    """Report on stderr that a broken or incomplete checkpoint is skipped."""
    note(
        f"{path.name} is broken or incomplete and is skipped; another checkpoint of the run is used if there is one. "
        f"{error}"
    )


def report_damage(error: CheckpointCorrupt) -> None:
    """Report on stderr that one of the `INESSENTIAL` files is damaged."""
    note(
        f"{error} The weights and the state of training do not need it, so the checkpoint is used."
    )


def complete(directory: Path) -> bool:
    """Whether the manifest, file names and file sizes agree: the checks of `verify` without the hashing."""
    try:
        check_files(directory, read_manifest(directory), hashes=(), on_damage=lambda error: None)
    except (CheckpointError, OSError):
        return False
    return True


def rotate(
    run_dir: str | Path, *, keep: int = 2, protect: Collection[int] = (), newest: int | None = None
) -> list[Path]:
    """Delete old checkpoints of a run; call it only when the newest is durable and verified.

    Incomplete checkpoints older than the kept ones are deleted too, but nothing without a manifest, which no run has
    written. A checkpoint that cannot be deleted is reported on stderr and stays until the next save tries again.

    Args:
        run_dir: the run.
        keep: number of complete checkpoints to keep, counted from the highest step; at least 1.
        protect: steps that are never deleted (the best one).
        newest: the step just saved; higher steps are left alone.

    Returns:
        The deleted paths.

    Raises:
        CheckpointError: ``keep`` is below 1.
    """
    if keep < 1:
        raise CheckpointError(f"keep is {keep}; it must be at least 1.")
    directory = Path(os.path.realpath(run_dir))
    whole, deleted = 0, list[Path]()
    try:
        checkpoints = run_checkpoints(directory)
    except OSError as error:
        note(f"{run_dir} cannot be listed, so old checkpoints stay: {error.strerror or error}.")
        return deleted
    for path in checkpoints:
        step = step_of(path.name)
        if step is None or path.name.startswith(".") or (newest is not None and step > newest):
            continue
        if not os.path.lexists(path / NAME):
            continue
        if whole >= keep and step not in protect:
            discard(path)
            if not os.path.lexists(path):
                deleted.append(path)
        elif whole < keep and complete(path):
            whole += 1
    return deleted
