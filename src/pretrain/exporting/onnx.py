"""ONNX: the forward pass as a graph for onnxruntime, with inputs and outputs as the library optimum names them.

A decoder is exported without a key-value cache: the graph gives the logits of whole rows. That of a model of images has
a batch of any number of them, of the size that its image processor returns.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.draft import model_texts, tokenizer_entries, write_processor
from pretrain.data.images import ImageProcessor
from pretrain.errors import ConfigError, ModelError
from pretrain.utils import files

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["NAME", "check", "write"]

NAME = "model.onnx"
_OPSET = 18
_TEXTS, _IMAGES = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size"}


def check(model: Model) -> None:
    """Raise unless a graph can hold the model and the packages of the export are installed.

    Raises:
        ModelError: the model reads neither texts nor images alone, has a head of pre-training on images, or positions
            that depend on the length of a row.
        ConfigError: a package is missing.
    """
    backbone, kind = model.backbone, model.head_kind
    if not _reads_images(model) and (backbone.vocab_size == 0 or backbone.processor_class):
        raise ModelError(
            "The export to ONNX is for models of texts or of images alone, and the input of a "
            f"{backbone.model_type} model is neither."
        )
    if _reads_images(model) and kind not in (None, "image-classification"):
        raise ModelError(
            f"The export to ONNX is for classifiers of images and bodies, and this {backbone.model_type} model has the "
            f'head {kind}. Export its body from Python: pretrain.load(PATH, head="none").export("onnx").'
        )
    ropes = getattr(model.backbone.config, "rope", None) or {}
    for rope in (ropes, *ropes.values()):
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
            raise ModelError(
                f"The rope scaling {rope['rope_type']} of this model depends on the length of a row, and a graph has "
                "one for all lengths, so the model is not exported to ONNX."
            )
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"The export to ONNX needs the packages of the extra `export` ({error}). Install them: pip install onnx "
            "onnxscript onnxruntime."
        ) from error


def _reads_images(model: Model) -> bool:
    return model.backbone.processor_class is ImageProcessor


class _ImageGraph(nn.Module):
    """A model of images as a function of one tensor."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model({"pixel_values": pixel_values})


class _Graph(nn.Module):
    """A model as a function of tensors, with the outputs of its kind of head."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Any:
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            batch["token_type_ids"] = token_type_ids
        scores = self.model(batch)
        if self.model.head_kind == "question-answering":
            return scores[..., 0], scores[..., 1]
        return scores


def _inputs(model: Model) -> list[str]:
    """Return the names of the inputs, those that the tokenizer's files name."""
    if _reads_images(model):
        return ["pixel_values"]
    config, tokenizer = model.backbone.config, model.tokenizer
    segments = getattr(config, "type_vocab_size", 1) > 1
    segments = segments and (tokenizer is None or tokenizer.segments)
    return ["input_ids", "attention_mask", *["token_type_ids"] * segments]


def _outputs(model: Model) -> list[str]:
    if model.head_kind == "question-answering":
        return ["start_logits", "end_logits"]
    return ["last_hidden_state" if model.head_kind is None else "logits"]


def _columns(model: Model) -> int:
    """Return a length of rows at which every window masks something, so that the graph contains the mask."""
    config = model.backbone.config
    windows = [getattr(config, name, None) or 0 for name in ("sliding_window", "local_attention")]
    return max(2, min(model.backbone.max_length, max(8, *windows) + 3))


def _example(model: Model, names: list[str]) -> dict[str, Tensor]:
    """Return inputs by which the graph is traced: two rows."""
    if _reads_images(model):
        config, size = model.backbone.config, getattr(model.processor, "size", None)
        height, width = size or (config.image_size,) * 2
        return {names[0]: torch.zeros(2, config.num_channels, height, width)}
    ids = torch.zeros(2, _columns(model), dtype=torch.long)
    arguments = dict.fromkeys(names, ids) | {"attention_mask": torch.ones_like(ids)}
    return {name: value.clone() for name, value in arguments.items()}


def write(model: Model, directory: Path) -> None:
    """Write the graph, config.json, the model card and the tokenizer or image processor.

    Batch and sequence may have any size; rows are at most as long as the positions of the model.

    The model is one that `check` accepts, and the directory is empty.
    """
    names = _inputs(model)
    axes, form = (_IMAGES, _ImageGraph) if _reads_images(model) else (_TEXTS, _Graph)
    # The copy keeps what is cached while the graph is traced away from the model.
    graph = form(copy.deepcopy(model).to("cpu", torch.float32)).eval()
    with _silence():
        program: Any = torch.onnx.export(
            graph,
            kwargs=_example(model, names),
            input_names=names,
            output_names=_outputs(model),
            dynamic_shapes={name: dict(axes) for name in names},
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
        program.save(directory / NAME)
    for path in sorted(directory.iterdir()):
        files.sync_file(path)
    count = model.num_parameters()
    for name, data in model_texts(model, dict(model.hf_config()), count).items():
        (directory / name).parent.mkdir(exist_ok=True)
        files.write_file(directory / name, data)
    if model.processor is not None:
        entries = tokenizer_entries(model, segments="token_type_ids" in names)
        for _ in write_processor(directory, model.processor, entries):
            pass


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the warnings of the exporter inside the block; errors are still raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
