"""Writing a model in the format of another program: Hugging Face, GGUF, ONNX, sentence-transformers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pretrain.checkpoint import load, save_model
from pretrain.config.spelling import option
from pretrain.errors import CheckpointError, ConfigError, ModelError, suggestion
from pretrain.exporting import gguf, onnx
from pretrain.lora.attach import merge
from pretrain.models.base import Model
from pretrain.models.sentences import SentenceSettings
from pretrain.utils import directories, files

__all__ = ["TARGETS", "export"]

TARGETS = ("hf", "gguf", "onnx", "sentence-transformers")


def export(
    source: Model | str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
) -> Path:
    """Write a model in the format of another program, atomically.

    Args:
        source: a run, a model directory, or a model. The adapter of a directory is merged into its base.
        to: ``hf``, a Hugging Face directory; ``gguf``, a file for llama.cpp; ``onnx``, a graph for onnxruntime with
            configuration and tokenizer beside it; ``sentence-transformers``, the body with its pooling.
        out: a new or empty directory; by default the name of the source with ``-TO``.
        dtype: of the matrices in a GGUF file: ``f32``, ``f16`` (the default), ``bf16`` or ``q8_0``.

    Returns:
        What the other program opens: the directory, or the GGUF file in it.

    Raises:
        ConfigError: an unknown format or type of numbers.
        ModelError, TokenizerError: the format cannot hold this model.
        CheckpointError: the source cannot be read, or ``out`` cannot be written or holds files.
    """
    if to not in TARGETS:
        raise ConfigError(
            f"There is no export to {to!r}; there is {', '.join(TARGETS)}."
            + suggestion(to, TARGETS)
        )
    if dtype is not None and to != "gguf":
        raise ConfigError(
            f"{option('dtype', dtype)} is for the export to gguf; {to} keeps the fp32 of the weights. Leave it out."
        )
    if dtype is not None and dtype not in gguf.DTYPES:
        raise ConfigError(
            f"There is no dtype {dtype!r}; there is {', '.join(gguf.DTYPES)}."
            + suggestion(dtype, gguf.DTYPES)
        )
    target = _target(source, to, out)
    model = _opened(source)
    if to == "hf":
        return save_model(model, target)
    if to == "sentence-transformers":
        return save_model(_sentence_model(model), target)
    if to == "onnx":
        return _write_onnx(model, target)
    return _write_gguf(model, target, dtype or "f16")


def _target(source: object, to: str, out: str | os.PathLike[str] | None) -> Path:
    """Return the absolute path of the directory to write, which must be absent or empty."""
    if out is None:
        if not isinstance(source, str | os.PathLike):
            raise ConfigError(f"Name the directory to write: export({to!r}, out=DIR).")
        out = f"{os.path.normpath(os.fspath(source))}-{to}"
    target = Path(os.path.abspath(os.path.expanduser(out)))
    if os.path.islink(target) or (os.path.exists(target) and not target.is_dir()):
        raise CheckpointError(f"{target} exists and is not a directory. Choose another name.")
    if os.path.exists(target) and os.listdir(target):
        raise CheckpointError(
            f"{target} is not empty. Choose a new directory: {option('out', 'DIR')}."
        )
    return target


def _opened(source: Model | str | os.PathLike[str]) -> Model:
    if isinstance(source, Model):
        if source.adapter is not None:
            raise ModelError(
                "This model has an adapter, which an export would merge. Merge it first: model.merge_adapter()."
            )
        return source
    model = load(os.fspath(source))
    return model if model.adapter is None else merge(model)


def _sentence_model(model: Model) -> Model:
    """Return the body of a model with the settings by which it embeds texts.

    Raises:
        ModelError: its directory asks for modules that are not implemented, or it reads no text.
    """
    if model.tokenizer is None:
        raise ModelError("sentence-transformers embeds texts, and this model has no tokenizer.")
    settings = model.sentences or SentenceSettings()
    if settings.missing:
        raise ModelError(
            f"The directory of this model asks for {' and '.join(settings.missing)}, which is not implemented, so it "
            "cannot be exported with its pooling."
        )
    body = Model(model.backbone, head_kind=None)
    body.processor, body.card = model.processor, model.card
    if body.processor is body.tokenizer:
        body.tokenizer = body.tokenizer.padded(model.backbone.config.pad_id, body.tokenizer.eos_id)
    body.extra_config = dict(model.extra_config)
    body.sentences = replace(settings, max_length=settings.max_length or model.backbone.max_length)
    return body


def _write_gguf(model: Model, target: Path, dtype: str) -> Path:
    title = target.name.removesuffix("-gguf") or target.name
    fields, name = gguf.metadata(model, title), f"{title}-{dtype}.gguf"
    with _new_directory(target) as made:
        gguf.write(model, fields, made / name, dtype)
    return target / name


def _write_onnx(model: Model, target: Path) -> Path:
    onnx.check(model)
    with _new_directory(target) as made:
        onnx.write(model, made)
    return target


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Give a temporary directory beside the target, which gets its name when the block ends without an error."""
    with files.writing(target):
        directories.make_directories(target.parent)
        directories.sweep(target.parent, name=target.name)
        with directories.temporary_directory(target) as made:
            yield made
            files.fsync_directory(made)
            directories.replace(made, target)
