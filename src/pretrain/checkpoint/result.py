"""The stable result of a run: ``RUN/model``, a whole model directory that is replaced each time the run ends.

Its weights are second names (hard links) of the checkpoint's files, so it costs almost no room; where a file system has
no hard links they are copied. The small files are always copied, so that an edit of one does not damage the
checkpoint. A weight file with two names is made read-only for the same reason: a program that writes into an existing
file is refused, one that writes a new file and renames it, as this package does, is not. There is no optimizer state.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pretrain.checkpoint import manifest
from pretrain.checkpoint.model_directory import ADAPTED_MODEL, ADAPTER_CONFIG
from pretrain.checkpoint.resolve import RESULT
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.utils import directories, files
from pretrain.utils.files import Record

__all__ = ["check_result", "restore_best", "write_result"]

_WEIGHTS = ".safetensors"


def write_result(run_dir: Path, checkpoint: Path, texts: Mapping[str, bytes] | None = None) -> Path:
    """Make a checkpoint the result of its run, atomically; the checkpoint itself is not changed.

    A result that holds the same weights already is kept, unless ``texts`` are given. If the process is killed, the
    previous result stays, and the next call removes what was left behind.

    Args:
        run_dir: the run.
        checkpoint: a complete checkpoint of the run.
        texts: new content of small files of the checkpoint, such as README.md.

    Returns:
        ``run_dir/model``. Of an adapter it holds a PEFT directory, as `save_model` writes it outside of a run.

    Raises:
        CheckpointError: the checkpoint is damaged, or the directory cannot be written or holds files of others.
    """
    target = run_dir / RESULT
    with files.writing(target):
        directories.sweep(run_dir, name=RESULT)
        source = manifest.read_manifest(checkpoint)
        if texts is None and _holds(target, source):
            return target
        check_result(run_dir)
        _keep_changes(run_dir)
        adapter = ADAPTER_CONFIG in source.required
        names = {"config.json": ADAPTED_MODEL} if adapter else {}
        _copy_model(checkpoint, source, target, names, texts or {})
    return target


def restore_best(run_dir: Path, step: int) -> str:
    """Make the best checkpoint of a run again, if it was deleted, from the result that was made from it.

    A result stays whole when checkpoints are deleted, but the next end of the run would replace it by a worse one.

    Args:
        run_dir: the run.
        step: of its best checkpoint.

    Returns:
        ``there`` if the checkpoint was not deleted, ``restored``, or ``lost`` if the result is gone, damaged, edited or
        of another checkpoint. A restored one has no training folder.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    target, result = run_dir / f"checkpoint-{step}", run_dir / RESULT
    if os.path.lexists(target):
        return "there"
    try:
        source = manifest.read_manifest(result)
        if source.step != step:
            return "lost"
        # Damaged weights must not become the best of the run. Files that somebody added do no harm.
        for name, record in source.needed.items():
            manifest.check_hash(result / name, record)
    except (CheckpointError, OSError):
        return "lost"
    with files.writing(target):
        _copy_model(result, source, target, {ADAPTED_MODEL: "config.json"}, {})
    return "restored"


def _copy_model(
    directory: Path,
    source: manifest.Manifest,
    target: Path,
    names: Mapping[str, str],
    texts: Mapping[str, bytes],
) -> None:
    """Give a model directory a second place, atomically: weights are linked, small files are copied.

    Args:
        directory: the model.
        source: its manifest.
        target: the new directory, which is replaced if it exists.
        names: file -> its name in the new directory, where that is another.
        texts: new content of small files.
    """
    with directories.temporary_directory(target) as temporary:
        records = {}
        for name, record in source.required.items():
            new = names.get(name, name)
            (temporary / new).parent.mkdir(exist_ok=True)
            if name in manifest.INESSENTIAL and not (directory / name).exists():
                continue
            if name.endswith(_WEIGHTS):
                records[new] = _link(directory / name, temporary / new, record)
            else:
                data = texts.get(name) or _read(directory / name, record)
                records[new] = files.write_file(temporary / new, data)
        manifest.write_manifest(temporary, source.step, records, source.environment)
        directories.replace(temporary, target)


def _holds(target: Path, source: manifest.Manifest) -> bool:
    """Whether the result is whole and has the step and the weights of a checkpoint."""
    try:
        result = manifest.read_manifest(target)
    except (CheckpointError, OSError):
        return False
    same = result.step == source.step and _weights(result) == _weights(source)
    return same and manifest.complete(target)


def _keep_changes(run_dir: Path) -> None:
    """Keep beside the result of a run what somebody added to it or changed in it since it was written, and say where.

    The result is replaced as a whole: an edited card, a licence or an exported model in it would be lost. Weights that
    are read-only, as they are left here, are told by their size. Links and hidden files are not kept.
    """
    target = run_dir / RESULT
    try:
        listed = manifest.read_manifest(target).required
    except (CheckpointError, OSError):  # nothing is there, or nobody knows what it was
        return
    changed = []
    for path in sorted(target.rglob("*")):
        name, record = path.relative_to(target), listed.get(path.relative_to(target).as_posix())
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or str(name) == manifest.NAME or path.is_symlink() or not path.is_file():
            continue
        about = path.stat()
        linked = name.suffix == _WEIGHTS and not about.st_mode & 0o222  # read-only since `_link`
        same = record is not None and about.st_size == record.size
        if not same or not (linked or files.hash_file(path) == record):
            changed.append(name)
    if not changed:
        return
    aside = directories.name_aside(target)
    for name in changed:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(target / name, aside / name)
    files.note(
        f"{target} is written again. What was added or changed there since the run wrote it is kept in {aside}: "
        f"{', '.join(map(str, changed[:5]))}{', ...' * (len(changed) > 5)}."
    )


def _weights(listed: manifest.Manifest) -> dict[str, Record]:
    return {name: record for name, record in listed.required.items() if name.endswith(_WEIGHTS)}


def check_result(run_dir: Path) -> None:
    """Raise CheckpointError if something stands in the place of the result that was not written as one."""
    target = run_dir / RESULT
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(
            f"{target} exists and is not a directory, so the result of the run cannot be written there. Move it away."
        )
    if os.listdir(target) and not os.path.lexists(target / manifest.NAME):
        raise CheckpointError(
            f"{target} has no {manifest.NAME}, so it was not written as the result of the run, and is not replaced. "
            f"Move it away, or choose another output directory."
        )


def _read(path: Path, record: Record) -> bytes:
    return files.read_bytes(path, record if path.name not in manifest.INESSENTIAL else None)


def _link(source: Path, target: Path, record: Record) -> Record:
    """Give a weight file a second name, or copy it; return its record."""
    try:
        files.IO.link(source, target)
    except OSError:  # the file system has no hard links, or does not allow this one
        return _copy(source, target, record)
    with contextlib.suppress(OSError):  # the file belongs to another user
        target.chmod(target.stat().st_mode & 0o555)
    record.check(target, target.stat().st_size)
    return record


def _copy(source: Path, target: Path, record: Record) -> Record:
    descriptor, size = files.open_regular(source)
    record.check(source, size)
    with open(descriptor, "rb", buffering=0) as old, files.HashingFile(target) as new:
        while data := old.read(files.CHUNK):
            new.write(data)
        copied = new.finish()
    if copied != record:
        raise CheckpointCorrupt(source, f"SHA-256 {record.sha256[:16]}...", copied.sha256[:16])
    return copied
