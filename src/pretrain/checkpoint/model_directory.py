"""Reading of the JSON files and weights of an untrusted model directory, verified if it has a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import manifest
from pretrain.checkpoint.manifest import Manifest
from pretrain.errors import CheckpointCorrupt, CheckpointError
from pretrain.utils.files import Record, note, read_bytes
from pretrain.utils.strict_json import parse_json
from pretrain.utils.tensors import checked_tensors

__all__ = [
    "ModelDirectory",
    "check_index",
    "is_finite",
    "read_weights",
    "refuse_non_finite",
    "verify_rest",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = manifest.ADAPTER_CONFIG
ADAPTER_WEIGHTS, _ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# The name of config.json for an adapted model: with a config.json beside adapter_config.json, transformers would expect
# a whole model in the directory and not look for the base.
ADAPTED_MODEL = "pretrain.json"
_WITHOUT = {
    "README.md": "The model does not need it and is opened without it.",
    "generation_config.json": "The model is opened without these generation settings.",
    "chat_template.jinja": "The model is opened with the template in tokenizer_config.json, if there is one.",
}
# Files of a tokenizer that are read.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
CONFIG_LIMIT = 16 << 20
TOKENIZER_LIMIT = 64 << 20
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp", ".npy", ".h5", ".msgpack")


class ModelDirectory:
    """A model directory and, if it has one and ``verify`` is set, its manifest."""

    def __init__(self, path: Path, *, verify: bool) -> None:
        self.path, self.verify = path, verify
        self.damaged: set[str] = (
            set()
        )  # damaged or missing ones of the `manifest.INESSENTIAL` files
        self.manifest: Manifest | None = None
        if verify and os.path.lexists(path / manifest.NAME):
            self.manifest = manifest.read_manifest(path)
            manifest.check_files(
                path, self.manifest, training=False, hashes=(), on_damage=self.report_damage
            )

    def report_damage(self, error: CheckpointCorrupt, name: str | None = None) -> None:
        """Report, once for each file, that one of the `INESSENTIAL` files is damaged.

        ``name`` is its name in the directory; None if it is that of the file in the error, which is no link then.
        """
        name = name or Path(error.file).name
        if name not in self.damaged:
            self.damaged.add(name)
            note(f"{error} {_WITHOUT[name]}")

    def intact(self, name: str) -> bool:
        """Whether one of the `manifest.INESSENTIAL` files exists and agrees with the manifest, if there is one."""
        if self.has(name) and name not in self.damaged and (record := self.record(name)):
            try:
                manifest.check_hash(self.path / name, record)
            except CheckpointCorrupt as error:
                self.report_damage(error)
        return self.has(name) and name not in self.damaged

    def record(self, name: str) -> Record | None:
        """Return the record of a file in the manifest; None without a manifest."""
        return self.manifest.required.get(name) if self.manifest else None

    def real(self, name: str) -> Path:
        """Return the path of a file; only links inside a download cache of the Hugging Face hub are followed."""
        path = self.path / name
        if self.manifest is None and path.is_symlink() and self.path.parent.name == "snapshots":
            target, repository = Path(os.path.realpath(path)), self.path.parent.parent
            # Newer versions of the library keep large files in folders that all repositories of the cache share.
            if (
                repository / "blobs" == target.parent
                or repository.parent / "blobs" in target.parents
            ):
                return target
        return path

    def has(self, name: str) -> bool:
        """Whether there is a file (or link or directory) of that name."""
        return os.path.lexists(self.path / name)

    def json(self, name: str, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
        """Return the object in a JSON file of at most ``limit`` bytes."""
        found: dict[str, Any] = self._parsed(name, limit, dict, "a JSON object")
        return found

    def json_list(self, name: str) -> list[Any]:
        """Return the list in a JSON file."""
        found: list[Any] = self._parsed(name, CONFIG_LIMIT, list, "a JSON list")
        return found

    def _parsed(self, name: str, limit: int, kind: type, wanted: str) -> Any:
        path = self.real(name)
        data = read_bytes(path, self.record(name), limit=limit, hint=manifest.ON_PURPOSE)
        value = parse_json(data, path, limit=limit)
        if not isinstance(value, kind):
            raise CheckpointCorrupt(path, wanted, type(value).__name__)
        return value

    def card(self) -> str | None:
        """Return the model card; None if there is none, or it is damaged or no regular file."""
        with contextlib.suppress(CheckpointError):
            if self.intact("README.md"):
                return read_bytes(self.real("README.md")).decode("utf-8", "replace")
        return None

    def model_config(self) -> dict[str, Any]:
        """Return the configuration of the adapted model; empty if peft wrote the directory."""
        for name in ("config.json", ADAPTED_MODEL):
            if self.has(name):
                return self.json(name)
        return {}

    @property
    def is_adapter(self) -> bool:
        """Whether the directory holds an adapter and no whole model."""
        whole = self.has(SINGLE) or self.has(INDEX)
        return self.has(ADAPTER_CONFIG) and self.has(ADAPTER_WEIGHTS) and not whole

    def weight_files(self) -> Mapping[str, set[str] | None]:
        """Return the names of the weight files and, if there is an index, the tensors that each must hold."""
        if self.has(SINGLE):
            return {SINGLE: None}
        if not self.has(INDEX):
            raise CheckpointError(self._no_weights())
        table = self.json(INDEX, TOKENIZER_LIMIT).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise CheckpointCorrupt(self.path / INDEX, "a weight_map", type(table).__name__)
        tensors_of: dict[str, set[str]] = {}
        for tensor, name in table.items():
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise CheckpointCorrupt(
                    self.path / INDEX, "names of safetensors files beside it", repr(name)[:80]
                )
            tensors_of.setdefault(name, set()).add(tensor)
        return dict(sorted(tensors_of.items()))

    def weights_hash(self, names: Collection[str]) -> str | None:
        """Return a hash of the named files by their records in the manifest, so without reading them; None without one.

        Two directories with the same tensors may have different hashes, as those of other shards or types.
        """
        digest = hashlib.sha256()
        for name in sorted(names):
            record = self.record(name)
            if record is None:
                return None
            digest.update(record.sha256.encode())
        return digest.hexdigest()

    def _no_weights(self) -> str:
        names = sorted(os.listdir(self.path))
        if other := self._other_places(names):
            return other
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            return (
                f"{self.path} has no {SINGLE}, only {pickles[0]}. Such files can run any code when they are opened, so "
                f"pretrain never opens them. If you trust its origin, convert it once with transformers, in a "
                f"sandbox: AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR, safe_serialization=True) "
                f"(with the class of its task instead of AutoModel)."
            )
        if ADAPTER_CONFIG in names:
            return (
                f"{self.path} holds a PEFT adapter, not a complete model. Its {ADAPTER_WEIGHTS} is missing, or the "
                "adapter was given where its base, a complete model, is needed."
            )
        if "modules.json" in names:
            return (
                f"{self.path} is a directory of sentence-transformers in its older layout, with the model in a folder "
                f"of its own, such as 0_Transformer; this layout is not read. Write it anew with that library: "
                f"SentenceTransformer(DIR).save_pretrained(NEW_DIR)."
            )
        steps = [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
        if steps:
            return (
                f"{self.path} has no complete checkpoint. To see why, load one of its directories by name: "
                f"{', '.join(steps)}."
            )
        runs = [name for name in names if os.path.lexists(self.path / name / "run.yaml")]
        if runs:
            some = ", ".join(runs[:8]) + ", ..." * (len(runs) > 8)
            return f"{self.path} holds no model but runs: {some}. Name one of them."
        if "run.yaml" in names:
            return f"{self.path} is a run without a checkpoint: it has not saved one yet. Wait, or start it again."
        return f"{self.path} has no {SINGLE}. Name the directory of a run, a checkpoint or a Hugging Face model."

    def _other_places(self, names: Sequence[str]) -> str:
        """Return a sentence on weights that are there under another name or in a folder; empty if there are none."""
        if _ADAPTER_PICKLE in names:
            return (
                f"{self.path} holds an adapter as a pickle, {_ADAPTER_PICKLE}. Such files can run any code when they "
                "are opened, so pretrain never opens them. If you trust its origin, convert it once with peft, in a "
                "sandbox: "
                f"safetensors.torch.save_file(peft.load_peft_weights(DIR, device='cpu'), 'DIR/{ADAPTER_WEIGHTS}')."
            )
        files = [
            name for name in names if name.endswith(".safetensors") and name != ADAPTER_WEIGHTS
        ]
        shards = [name for name in files if re.search(r"-\d+-of-\d+\.safetensors$", name)]
        if shards:
            return (
                f"{self.path} holds {shards[0]} but no {INDEX}, which names the file of every tensor. Copy it, too: "
                "it is published beside the weights."
            )
        if files and not any(name.startswith("pytorch_model") for name in names):
            return (
                f"{self.path} has no {SINGLE}, but {files[0]}. If that is the whole model under the names of "
                f"transformers, rename it {SINGLE}."
            )
        if self.path.name.startswith("models--") and "snapshots" in names:
            return (
                f"{self.path} is the folder of a model in the cache of the Hub. Name the model, "
                f"hub:{self.path.name.removeprefix('models--').replace('--', '/')}, or a folder in "
                f"{self.path / 'snapshots'}."
            )
        adapters = [name for name in names if os.path.lexists(self.path / name / ADAPTER_CONFIG)]
        runs = any(os.path.lexists(self.path / name / "run.yaml") for name in names)
        if adapters and not runs and not {ADAPTER_CONFIG, "run.yaml"}.intersection(names):
            return (
                f"{self.path} holds no model but adapters in folders of their own: {', '.join(adapters[:8])}. Name one "
                "of them."
            )
        return ""


@contextlib.contextmanager
def read_weights(
    directory: ModelDirectory, names: Mapping[str, set[str] | None]
) -> Iterator[dict[str, Tensor]]:
    """Read all tensors of the given files, with bf16, fp16 and fp64 converted to fp32.

    Hashes are compared when the block ends; see `checked_tensors`.

    Raises:
        CheckpointCorrupt: a file is damaged, or does not hold exactly the tensors that the index names.
        CheckpointError: a tensor holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name, expected in names.items():
            file, record = directory.real(name), directory.record(name)
            part = stack.enter_context(checked_tensors(file, record, floats_to_fp32=True))
            check_index(directory, name, expected, part)
            for tensor_name, tensor in part.items():
                refuse_non_finite(directory.path / name, tensor_name, tensor)
            tensors.update(part)
        yield tensors


def check_index(
    directory: ModelDirectory, name: str, expected: set[str] | None, found: Collection[str]
) -> None:
    """Raise CheckpointCorrupt unless a weight file holds exactly the tensors that the index names."""
    if expected is not None and expected != set(found):
        wrong = sorted(expected ^ set(found))[0]
        what = "missing" if wrong in expected else "not in the index"
        raise CheckpointCorrupt(
            directory.path / name, f"the tensors that {INDEX} names", f"{wrong!r} {what}"
        )


def refuse_non_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a tensor of a file holds NaN or infinity."""
    if not is_finite(tensor):
        raise CheckpointError(
            f"{path}: tensor {name!r} holds NaN or infinity. The model diverged before "
            f"it was saved, or the file was converted badly; take an earlier checkpoint."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, computed without allocating a mask."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def verify_rest(directory: ModelDirectory, weights: Mapping[str, Any]) -> None:
    """Hash the files that have not been verified while they were read: tokenizer, model card."""
    if directory.manifest is None:
        return
    done = {"config.json", INDEX, ADAPTER_CONFIG, ADAPTED_MODEL, *weights}
    for name, record in directory.manifest.required.items():
        if name in manifest.INESSENTIAL:
            directory.intact(name)
        elif name not in done:
            manifest.check_hash(directory.path / name, record)
