"""Open a checkpoint directory, ours or one that transformers saved, as files of unknown origin.

With a manifest every byte is verified in the pass that reads it; without one the directory is taken as a plain
Hugging Face model. The training folder is never read here, and a pickle is never opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.storage import manifest
from pretrain.storage.card import objective_name
from pretrain.storage.files import Record, note, read_bytes, reading
from pretrain.storage.manifest import Manifest
from pretrain.storage.strict_json import parse_json
from pretrain.storage.tensors import read_header, read_tensors

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["inspect", "load"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG_LIMIT = 16 << 20
TOKENIZER_LIMIT = 64 << 20
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp", ".npy", ".h5", ".msgpack")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
_SHOWN = 5  # names in the report line


class _Directory:
    """A model directory and, where there is one to trust, its manifest."""

    def __init__(self, path: Path, *, verify: bool) -> None:
        self.path = path
        self.manifest: Manifest | None = None
        if verify and os.path.lexists(path / manifest.NAME):
            self.manifest = manifest.read_manifest(path)
            manifest.check_files(path, self.manifest, training=False, hashes=False)

    def record(self, name: str) -> Record | None:
        return self.manifest.required.get(name) if self.manifest else None

    def real(self, name: str) -> Path:
        """Where a file lies; only the links inside a download cache of the Hugging Face hub are followed."""
        path = self.path / name
        if self.manifest is None and path.is_symlink() and self.path.parent.name == "snapshots":
            target = Path(os.path.realpath(path))
            if target.parent == self.path.parent.parent / "blobs":
                return target
        return path

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def json(self, name: str, limit: int) -> dict[str, Any]:
        path = self.real(name)
        value = parse_json(read_bytes(path, self.record(name), limit=limit), path, limit=limit)
        if not isinstance(value, dict):
            raise CheckpointCorrupt(path, "a JSON object", type(value).__name__)
        return value

    def weight_files(self) -> Mapping[str, set[str] | None]:
        """Names of the weight files and, from an index, the tensors that each must hold."""
        if self.has(SINGLE):
            return {SINGLE: None}
        if not self.has(INDEX):
            raise CheckpointError(self._no_weights())
        table = self.json(INDEX, TOKENIZER_LIMIT).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise CheckpointCorrupt(self.path / INDEX, "a weight_map", type(table).__name__)
        found: dict[str, set[str]] = {}
        for tensor, name in table.items():
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise CheckpointCorrupt(
                    self.path / INDEX, "names of safetensors files beside it", repr(name)[:80]
                )
            found.setdefault(name, set()).add(tensor)
        return dict(sorted(found.items()))

    def _no_weights(self) -> str:
        names = sorted(os.listdir(self.path))
        pickles = [name for name in names if name.endswith(_PICKLES)]
        if pickles:
            return (
                f"{self.path} has no {SINGLE}, only {pickles[0]}. Such files can run any code when they are opened, so "
                f"pretrain never opens them. If you trust its origin, convert it once with transformers, in a "
                f"sandbox: AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True) "
                f"(with the class of its task instead of AutoModel)."
            )
        if "adapter_config.json" in names:
            return f"{self.path} holds a PEFT adapter, not a model. Load the model it was trained on first."
        steps = [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
        if steps:
            return f"{self.path} has no complete checkpoint. Name one of its directories yourself: {', '.join(steps)}."
        return f"{self.path} has no {SINGLE}. Name the directory of a run, a checkpoint or a Hugging Face model."


def load(
    path: str | Path,
    *,
    head: str | None = None,
    verify: bool = True,
    tokenizer: bool = True,
    quiet: bool = False,
) -> Model:
    """Open a model: a run (its newest complete checkpoint), a checkpoint, or what transformers saved.

    Prints one line: how many tensors were read, which are missing (only a head's may be; they are fresh), and
    which were not used. Float tensors become float32.

    Args:
        path: a directory. A broken newest checkpoint of a run is named aloud and passed over; a broken
            checkpoint named itself is an error.
        head: kind of head to put on instead of the stored one (`"sequence-classification"`, ...).
        verify: compare every file with the manifest, where there is one.
        tokenizer: also open the tokenizer, where there is one.
        quiet: print no report.

    Returns:
        A `Model` on the CPU in evaluation mode.

    Raises:
        CheckpointCorrupt: a file is not what it should be; `file`, `expected` and `found` say what.
        CheckpointError: no model here, pickles only, a missing tensor outside the head, a tokenizer that does
            not fit.
        ConfigError: config.json asks for an impossible model.
    """
    directory = manifest.checked_directory(path)
    with reading(path):
        run = [] if os.path.lexists(directory / "config.json") else manifest.candidates(directory)
        for candidate in run:
            try:
                return _load(candidate, head=head, verify=verify, tokenizer=tokenizer, quiet=quiet)
            except CheckpointCorrupt as error:
                manifest.skipped(candidate, error)
        return _load(directory, head=head, verify=verify, tokenizer=tokenizer, quiet=quiet)


def _load(path: Path, *, head: str | None, verify: bool, tokenizer: bool, quiet: bool) -> Model:
    from pretrain.models.base import Model
    from pretrain.models.config import drop_code

    directory = _Directory(path, verify=verify)
    if not directory.has("config.json") and directory.manifest is None:
        _refuse_half(path, {}, verify)
        directory.weight_files()
        raise CheckpointError(
            f"{path} has no config.json, so it is no Hugging Face model directory."
        )
    config = directory.json("config.json", CONFIG_LIMIT)
    if directory.manifest is None:
        _refuse_half(path, config, verify)
    names = directory.weight_files()
    model = Model.from_hf_config(config, head=head)
    if directory.has("generation_config.json"):
        model.generation_config = drop_code(directory.json("generation_config.json", CONFIG_LIMIT))
    if tokenizer:
        _open_tokenizer(model, directory)
    tensors = _read_weights(directory, names)
    _verify_rest(directory, names)
    report = model.load_disk_state(tensors)
    if not quiet:
        note(_report_line(model, config, len(tensors), report))
    return model.eval()


def _refuse_half(path: Path, config: Mapping[str, Any], verify: bool) -> None:
    """A checkpoint of ours whose manifest is gone was never finished, or was tampered with."""
    block = config.get("pretrain")
    ours = (
        isinstance(block, dict) and "step" in block and path.name == f"checkpoint-{block['step']}"
    )
    if verify and (manifest.looks_cut(path) or ours):
        hint = "Without it the checkpoint is not complete. To use its weights all the same: load(..., verify=False)."
        raise CheckpointCorrupt(path / manifest.NAME, "a manifest", "no such file", hint)


def _read_weights(directory: _Directory, names: Mapping[str, set[str] | None]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, expected in names.items():
        part = read_tensors(directory.real(name), directory.record(name), floats_to_fp32=True)
        if expected is not None and expected != set(part):
            wrong = sorted(expected ^ set(part))[0]
            found = "missing" if wrong in expected else "not in the index"
            raise CheckpointCorrupt(
                directory.path / name, f"the tensors that {INDEX} names", f"{wrong!r} {found}"
            )
        for tensor_name, tensor in part.items():
            if not is_finite(tensor):
                raise CheckpointError(
                    f"{directory.path / name}: tensor {tensor_name!r} holds NaN or infinity. The model diverged before "
                    f"it was saved, or the file was converted badly; take an earlier checkpoint."
                )
        tensors.update(part)
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, without memory for a mask."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _verify_rest(directory: _Directory, weights: Mapping[str, Any]) -> None:
    """Hash what no verified read has covered: tokenizer, model card."""
    if directory.manifest is None:
        return
    done = {"config.json", "generation_config.json", INDEX, *weights}
    for name, record in directory.manifest.required.items():
        if name not in done:
            manifest.check_hash(directory.path / name, record)


def _open_tokenizer(model: Model, directory: _Directory) -> None:
    present = [name for name in _TOKENIZER if directory.has(name)]
    for name in present:
        record = directory.record(name)
        read_bytes(directory.real(name), record, limit=TOKENIZER_LIMIT)
    usable = (
        "tokenizer.json" in present
        or "vocab.txt" in present
        or {"vocab.json", "merges.txt"} <= set(present)
    )
    if not usable:
        return
    from pretrain.data.tokenizer import Tokenizer

    found = Tokenizer.from_directory(directory.path)
    rows = model.backbone.vocab_size
    if found.vocab_size > rows:
        raise CheckpointError(
            f"{directory.path}: the tokenizer has {found.vocab_size} ids and the model {rows} embedding rows, so some "
            f"texts could not be read. They come from different models; put the right tokenizer beside the weights, "
            f"or load(..., tokenizer=False)."
        )
    model.tokenizer = found


def _report_line(model: Model, config: Mapping[str, Any], count: int, report: Any) -> str:
    parts = [f"{config.get('model_type')}: {count} tensors"]
    for label, names in (("missing", report.missing), ("unexpected", report.unexpected)):
        shown = sorted(names)[:_SHOWN] + ["..."] * (len(names) > _SHOWN)
        fresh = "head, fresh: " if label == "missing" else "not used: "
        parts.append(f"{len(names)} {label}" + (f" ({fresh}{', '.join(shown)})" if names else ""))
    if report.untied:
        parts.append("head kept apart although the config ties it")
    elif getattr(model.head, "tied", False):
        parts.append("head tied")
    return ", ".join(parts)


def inspect(path: str | Path) -> dict[str, Any]:
    """Say what a checkpoint holds, from config, headers and manifest; weights are hashed but not loaded.

    Args:
        path: a checkpoint, a run (its highest step, even if broken), or a Hugging Face model directory.

    Returns:
        path, family, architecture, parameters, objective, tokens_seen, step, vocabulary, manifest ("holds",
        "absent" or "broken: ..."), resumable, files and bytes.

    Raises:
        CheckpointError: no such directory, one that cannot be read, or no model in it.
    """
    with reading(path):
        return _inspect(path, manifest.checked_directory(path))


def _inspect(path: str | Path, directory: Path) -> dict[str, Any]:
    if not os.path.lexists(directory / "config.json") and (run := manifest.candidates(directory)):
        directory = run[0]
    state, listed = "absent", None
    try:
        if os.path.lexists(directory / manifest.NAME) or manifest.looks_cut(directory):
            listed = manifest.read_manifest(directory)
            manifest.check_files(directory, listed)
            state = "holds"
    except CheckpointError as error:
        state = f"broken: {error}"
    plain = _Directory(directory, verify=False)
    found: dict[str, Any] = {"path": str(path), "checkpoint": directory.name}
    try:
        found.update(_contents(plain))
    except CheckpointError as error:
        if state == "absent":
            raise
        found["problem"] = str(error)
    if listed is not None and found.get("step") is None:
        found["step"] = listed.step
    sizes = [
        entry.stat().st_size
        for entry in directory.rglob("*")
        if entry.is_file() and not entry.is_symlink()
    ]
    resumable = (
        listed is not None and bool(listed.training) and (directory / manifest.TRAINING).is_dir()
    )
    return {
        **found,
        "manifest": state,
        "resumable": resumable,
        "files": len(sizes),
        "bytes": sum(sizes),
    }


def _contents(directory: _Directory) -> dict[str, Any]:
    config = directory.json("config.json", CONFIG_LIMIT)
    parameters = 0
    for name in directory.weight_files():
        infos = read_header(directory.real(name)).values()
        parameters += sum(info.numel for info in infos if info.dtype.is_floating_point)
    block = config.get("pretrain")
    block = block if isinstance(block, dict) else {}
    architectures = config.get("architectures") or [None]
    return {
        "family": config.get("model_type"),
        "architecture": architectures[0] if isinstance(architectures, list) else None,
        "parameters": parameters,
        "objective": objective_name(block),
        "tokens_seen": block.get("tokens_seen"),
        "step": block.get("step"),
        "vocabulary": config.get("vocab_size"),
    }
