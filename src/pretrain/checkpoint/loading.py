"""Loading of model directories, written by this package, transformers or peft, as untrusted input.

With a manifest, every byte is verified in the same pass that reads it; a directory without one is treated as a plain
Hugging Face model. Of the training folder only state.json is read, to find the best checkpoint of a run; a pickle is
never opened.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain import checkpoint
from pretrain.checkpoint import manifest
from pretrain.checkpoint.download import fetch_config, fetch_model
from pretrain.checkpoint.model_card import objective_name
from pretrain.checkpoint.model_directory import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    TOKENIZER_LIMIT,
    ModelDirectory,
    is_finite,
    read_weights,
    verify_rest,
)
from pretrain.checkpoint.resolve import model_candidates, resolve_model_directory
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import CheckpointCorrupt, CheckpointError, PretrainError
from pretrain.models import own_family
from pretrain.models.base import Model
from pretrain.models.config import drop_code
from pretrain.models.sentences import SentenceSettings
from pretrain.models.state import report_line
from pretrain.utils.files import note, read_bytes, reading
from pretrain.utils.tensors import read_header

if TYPE_CHECKING:
    from pretrain.models.backbone import Backbone

__all__ = [
    "INDEX",
    "SINGLE",
    "configuration",
    "inspect",
    "is_finite",
    "load",
    "open_described",
]

_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"


def load(
    path: str | Path,
    *,
    head: str | None = None,
    verify: bool = True,
    tokenizer: bool = True,
    quiet: bool = False,
    base: Model | str | Path | None = None,
    family: str | type[Backbone] | None = None,
) -> Model:
    """Load a model from a run, from a checkpoint, or from a directory that transformers or peft saved.

    Print one line: how many tensors were read, which are missing (only those of a head may be; they are newly
    initialised), and which were not used. Floating-point tensors are converted to float32.

    Args:
        path: a directory, or a model of the Hugging Face Hub, which is fetched if it is not in the cache:
            ``"org/name"`` or ``"hub:org/name"``, with ``@revision`` for a branch, tag or commit. Of a run
            the best checkpoint is loaded, which is its directory ``model``; name ``RUN/checkpoint-N`` for another one.
            A broken checkpoint of a run is reported on stderr and skipped; one named directly is an error.
        head: kind of head to use instead of the stored one (`"sequence-classification"`, ...).
        verify: compare every file with the manifest, if there is one.
        tokenizer: also load the tokenizer, if there is one.
        quiet: do not print the report line.
        base: base of an adapter: a model (which is copied) or a directory; None uses the one named in its
            adapter_config.json.
        family: class of the model if it is a family of your own, or ``"package.module:Class"``. Once it is named, all
            functions of this process open its directories.

    Returns:
        A `Model` on the CPU in evaluation mode, with `model.adapter` set if the directory holds an adapter.

    Raises:
        CheckpointCorrupt: a file is damaged; see the attributes `file`, `expected` and `found`.
        CheckpointError: the directory holds no model or only pickles, a tensor outside the head is missing, the
            tokenizer does not fit the model, or the base of an adapter is missing or a different one.
        ConfigError: config.json describes an invalid model.
    """
    if family is not None:
        own_family(family)
    directory, name = fetch_model(path)
    options: dict[str, Any] = {"head": head, "verify": verify, "tokenizer": tokenizer}
    options |= {"quiet": quiet, "base": base}
    with reading(path):
        for candidate in model_candidates(directory):
            try:
                return _load(candidate, str(Path(path) / candidate.name), **options)
            except CheckpointCorrupt as error:
                manifest.report_skipped(candidate, error)
        return _load(directory, name, **options)


def _load(
    path: Path,
    named: str,
    *,
    head: str | None,
    verify: bool,
    tokenizer: bool,
    quiet: bool,
    base: Model | str | Path | None,
) -> Model:
    directory = ModelDirectory(path, verify=verify)
    if directory.is_adapter:
        _refuse_incomplete(directory, directory.model_config())
        model, beneath = checkpoint.adapter_files.open_adapter(
            directory, head=head, base=base, verify=verify, quiet=quiet
        )
        if beneath is not None and not directory.intact(_GENERATION):
            _open_of_base(model, directory, beneath, _open_generation, "generation settings")
        _open_rest(model, directory, tokenizer=tokenizer)
        if beneath is not None and tokenizer and model.processor is None:  # peft writes none
            _open_of_base(model, directory, beneath, _open_processor, "a tokenizer")
        verify_rest(directory, {ADAPTER_WEIGHTS: None})
        model.files_hash = directory.weights_hash([ADAPTER_WEIGHTS])
        return model.eval()
    if base is not None:
        raise CheckpointError(
            f"{path} holds no adapter, so base= has no meaning here. Leave it out."
        )
    model, config, names = open_described(directory, head=head, tokenizer=tokenizer)
    with read_weights(directory, names) as tensors:
        verify_rest(directory, names)
        report = model.load_disk_state(tensors, adopt=True)
    if model.fresh and model.card is not None:
        model.extra_config["pretrain"] = {}  # the card describes a model without these parts
    model.source, model.files_hash = named, directory.weights_hash(names)
    if not quiet:
        note(report_line(model, config, len(tensors), report))
    return model.eval()


def open_described(
    directory: ModelDirectory, *, head: str | None, tokenizer: bool
) -> tuple[Model, dict[str, Any], Mapping[str, set[str] | None]]:
    """Open a directory with a whole model without reading its weights.

    Returns:
        The model on the meta device with its tokenizer, the content of config.json, and the weight files as
        returned by ``ModelDirectory.weight_files``.
    """
    listed = directory.manifest is not None or directory.has("config.json")
    config = directory.json("config.json") if listed else {}
    _refuse_incomplete(directory, config)
    names = directory.weight_files()
    if not listed:
        raise CheckpointError(
            f"{directory.path} has no config.json, so it is no Hugging Face model directory."
        )
    if directory.has(ADAPTER_CONFIG):
        note(
            f"{directory.path} holds a whole model and an adapter; the whole model is opened, without the adapter."
        )
    model = Model.from_hf_config(config, head=head)
    _open_rest(model, directory, tokenizer=tokenizer)
    return model, config, names


def _open_rest(model: Model, directory: ModelDirectory, *, tokenizer: bool) -> None:
    """Read the generation and sentence-embedding settings, the tokenizer, and the card of another's model."""
    if not directory.model_config().get("pretrain"):
        model.card = directory.card()
    try:
        _open_generation(model, directory)
    except CheckpointCorrupt as error:
        directory.report_damage(error, _GENERATION)
    model.sentences = SentenceSettings.read(directory) or model.sentences
    if tokenizer:
        _open_processor(model, directory)


def _open_generation(model: Model, directory: ModelDirectory) -> None:
    """Read generation_config.json, which replaces all settings of config.json but ends that it does not name."""
    if directory.intact(_GENERATION):
        found = drop_code(directory.json(_GENERATION))
        ends = model.generation_config.get("eos_token_id")
        if ends is not None and found.get("eos_token_id") is None:
            found["eos_token_id"] = ends
        model.generation_config = found


def _open_processor(model: Model, directory: ModelDirectory) -> None:
    if model.backbone.processor_class is None:
        _open_tokenizer(model, directory)
        return
    processor = model.backbone.processor_class.from_directory(directory.path)
    model.processor = model.processor if processor is None else processor


def _open_of_base(
    model: Model,
    adapter: ModelDirectory,
    base: ModelDirectory,
    read: Callable[[Model, ModelDirectory], None],
    missing: str,
) -> None:
    """Read what an adapter lacks from its base; where it cannot be used, open the adapter without it, and say so."""
    try:
        with reading(base.path):
            read(model, base)
    except PretrainError as error:
        note(
            f"{adapter.path} is opened without {missing}: it has none of its own, and what its base has cannot be "
            f"used. {error}"
        )


def _refuse_incomplete(directory: ModelDirectory, config: Mapping[str, Any]) -> None:
    """Raise CheckpointCorrupt for a checkpoint without a manifest: it was never finished, or was tampered with."""
    path, block = directory.path, config.get("pretrain")
    ours = (
        isinstance(block, dict) and "step" in block and path.name == f"checkpoint-{block['step']}"
    )
    if directory.verify and directory.manifest is None and (manifest.looks_cut(path) or ours):
        hint = "Without it the checkpoint is not complete. To use its weights all the same: load(..., verify=False)."
        raise CheckpointCorrupt(path / manifest.NAME, "a manifest", "no such file", hint)


def _open_tokenizer(model: Model, directory: ModelDirectory) -> None:
    present = [name for name in TOKENIZER_FILES if directory.has(name)]
    if _TEMPLATE in present and not directory.intact(_TEMPLATE):
        present.remove(_TEMPLATE)
    for name in present:
        record = directory.record(name)
        read_bytes(directory.real(name), record, limit=TOKENIZER_LIMIT, hint=manifest.ON_PURPOSE)
    usable = (
        "tokenizer.json" in present
        or "vocab.txt" in present
        or {"vocab.json", "merges.txt"} <= set(present)
    )
    if not usable:
        return
    if directory.has(_TEMPLATE) and _TEMPLATE not in present:
        # Tokenizer.from_directory reads the template if it exists, so a damaged one is left out of a copy.
        with tempfile.TemporaryDirectory(prefix="pretrain-") as copy:
            for name in present:
                shutil.copyfile(directory.real(name), Path(copy) / name)
            tokenizer = Tokenizer.from_directory(copy)
    else:
        tokenizer = Tokenizer.from_directory(directory.path)
    rows = model.backbone.vocab_size
    if tokenizer.vocab_size > rows:
        first = min((i, token) for token, i in tokenizer.vocab.items() if i >= rows)[1]
        raise CheckpointError(
            f"{directory.path}: the tokenizer has {tokenizer.vocab_size} ids and the model {rows} embedding rows, so "
            f"{first!r:.80} and what follows it would have no embedding. If tokens were added, give them rows, with "
            f"transformers: model.resize_token_embeddings({tokenizer.vocab_size}) and model.save_pretrained(DIR). If "
            "the two come from different models, put the right tokenizer beside the weights, or load(..., "
            "tokenizer=False)."
        )
    model.processor = tokenizer  # as published, whatever id it pads with


def configuration(path: str | Path) -> Mapping[str, Any]:
    """Return config.json of a checkpoint, of the best one of a run, or of the base of an adapter.

    It is empty if the files cannot be read, of which `load` will raise the error.
    """
    try:
        directory = fetch_config(path)
        return directory.model_config() if directory.is_adapter else directory.json("config.json")
    except (PretrainError, OSError, ValueError, TypeError, LookupError):
        return {}


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint from its configuration, headers and manifest; weights are hashed but not loaded.

    Args:
        path: a checkpoint, a run (what ``load`` opens, even if broken), a Hugging Face model directory, or the name of
            a model on the Hub.

    Returns:
        path, checkpoint, family, architecture, parameters, objective, tokens_seen, step, vocabulary, manifest
        ("holds", "absent" or "broken: ..."), resumable, files and bytes; for an adapter also its kind and base, the
        number of trainable parameters (its own, like ``parameters``) and the total including the base. ``problem``
        holds the error text if the manifest holds or is broken, but the model cannot be read. Of a run, ``manifest``
        and ``resumable`` also speak of its newest checkpoint, from which training goes on.

    Raises:
        CheckpointError: the directory does not exist, cannot be read, or holds no model.
    """
    with reading(path):
        return _inspect(path, fetch_model(path)[0])


def _inspect(path: str | Path, given: Path) -> dict[str, Any]:
    directory = resolve_model_directory(given)
    newest = (
        directory if directory == given else next(iter(manifest.run_checkpoints(given)), directory)
    )
    state, listed = _manifest_state(directory)
    plain = ModelDirectory(directory, verify=False)
    description: dict[str, Any] = {"path": str(path), "checkpoint": directory.name}
    try:
        description.update(_contents(plain))
    except CheckpointError as error:
        if state == "absent":
            raise
        description["problem"] = str(error)
    if listed is not None and description.get("step") is None:
        description["step"] = listed.step
    if newest != directory:
        newest_state, listed = _manifest_state(newest)
        state = newest_state if state == "holds" else state
    entries = [plain.real(str(entry.relative_to(directory))) for entry in directory.rglob("*")]
    sizes = [e.stat().st_size for e in entries if e.is_file() and not e.is_symlink()]
    resumable = (
        listed is not None and bool(listed.training) and (newest / manifest.TRAINING).is_dir()
    )
    return {
        **description,
        "manifest": state,
        "resumable": resumable,
        "files": len(sizes),
        "bytes": sum(sizes),
    }


def _manifest_state(directory: Path) -> tuple[str, manifest.Manifest | None]:
    """Return "holds", "absent" or "broken: ..." for the manifest of a directory, and the manifest if it was read."""
    listed = None
    try:
        if os.path.lexists(directory / manifest.NAME) or manifest.looks_cut(directory):
            listed = manifest.read_manifest(directory)
            manifest.check_files(directory, listed)
            return "holds", listed
    except CheckpointError as error:
        return f"broken: {error}", listed
    return "absent", None


def _contents(directory: ModelDirectory) -> dict[str, Any]:
    if directory.is_adapter:
        config = directory.model_config()
        names: list[str] = [ADAPTER_WEIGHTS]
    else:
        names = list(directory.weight_files())
        config = directory.json("config.json")
    parameters = 0
    for name in names:
        infos = read_header(directory.real(name)).values()
        parameters += sum(info.numel for info in infos if info.dtype.is_floating_point)
    block = config.get("pretrain")
    block = block if isinstance(block, dict) else {}
    architectures = config.get("architectures") or [None]
    about = {}
    if directory.is_adapter:
        settings = directory.json(ADAPTER_CONFIG)
        kind = "DoRA" if settings.get("use_dora") else str(settings.get("peft_type"))
        about = {
            "adapter": f"{kind}, rank {settings.get('r')}",
            "base": settings.get("base_model_name_or_path"),
            **checkpoint.adapter_files.adapter_sizes(directory),
        }
    size = config.get("vocab_size")
    vocabulary = {} if size == 0 else {"vocabulary": size}  # 0 in a model whose input is not text
    return {
        "family": config.get("model_type"),
        "architecture": architectures[0] if isinstance(architectures, list) else None,
        "parameters": parameters,
        "objective": objective_name(block),
        "tokens_seen": block.get("tokens_seen"),
        "step": block.get("step"),
        **vocabulary,
    } | about
