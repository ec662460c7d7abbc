"""ONNX graphs compute what the model computes, for rows of any number and length."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tiny
from pretrain.data.images import ImageProcessor
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import ConfigError, ModelError
from pretrain.models import build
from pretrain.models.base import Model

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_positions": 40, "initializer_range": 0.3,
}  # fmt: skip
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "bert": ("bert", "masked-lm", {}),
    "bert-classifier": ("bert", "sequence-classification", {"labels": ("a", "b", "c")}),
    "bert-answers": ("bert", "question-answering", {}),
    "roberta-tokens": ("roberta", "token-classification", {"labels": ("a", "b", "c")}),
    "modernbert-body": ("modernbert", None, {"local_attention": 8}),
    "modernbert-classifier": ("modernbert", "sequence-classification", {"local_attention": 8}),
    "gpt2": ("gpt2", "causal-lm", {}),
    "gpt2-classifier": ("gpt2", "sequence-classification", {}),
    "mistral": ("mistral", "causal-lm", {"sliding_window": 6, "num_kv_heads": 1}),
    "qwen3": ("qwen3", "causal-lm", {"num_kv_heads": 1, "head_dim": 8}),
}


def made(family: str, head: str | None, options: dict[str, Any]) -> Model:
    bpe = family in ("gpt2", "mistral", "qwen3", "roberta")
    tokenizer = train_from_texts(tiny.TEXTS, "bpe", vocab_size=300) if bpe else tiny.tokenizer()
    return build(family, None, head=head, tokenizer=tokenizer, seed=2, **SIZES, **options).eval()


def rows(model: Model, count: int, columns: int, names: list[str]) -> dict[str, torch.Tensor]:
    """Random rows, the last of which is half as long."""
    draw = torch.Generator().manual_seed(columns)
    ids = torch.randint(5, len(model.tokenizer or ()), (count, columns), generator=draw)
    real = torch.ones_like(ids)
    if count > 1:
        real[-1, columns // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": real}
    if "token_type_ids" in names:
        batch["token_type_ids"] = torch.randint(2, ids.shape, generator=draw)
    return batch


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case != "bert-classifier")) for case in CASES],
)
def test_onnxruntime_computes_the_same(case: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    family, head, options = CASES[case]
    model = made(family, head, options)
    out = model.export("onnx", tmp_path / "out")
    session = runtime.InferenceSession(out / "model.onnx")
    names = [given.name for given in session.get_inputs()]
    assert names == ["input_ids", "attention_mask", *["token_type_ids"] * (family == "bert")]
    axes = ["batch_size", "sequence_length"]
    assert all(given.shape == axes for given in session.get_inputs())
    answers = {"question-answering": ["start_logits", "end_logits"], None: ["last_hidden_state"]}
    assert [found.name for found in session.get_outputs()] == answers.get(head, ["logits"])
    for count, columns in ((1, 1), (1, 5), (3, 20), (2, model.backbone.max_length)):
        batch = rows(model, count, columns, names)
        found = session.run(None, {name: value.numpy() for name, value in batch.items()})
        with torch.no_grad():
            wanted = model(batch).numpy()
        scores = np.stack(found, axis=-1) if len(found) == 2 else found[0]
        real = batch["attention_mask"].numpy() == 1 if wanted.ndim == 3 else slice(None)
        assert np.abs(scores - wanted)[real].max() < 1e-4, (count, columns)
    with torch.no_grad():  # nothing that was traced is kept in the model
        assert torch.isfinite(model(rows(model, 2, 7, names))).all()
    assert {"config.json", "tokenizer.json", "README.md"} <= set(os.listdir(out))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert set(theirs("the red cat")) == set(names)


IMAGES: dict[str, Any] = {"image_size": 12, "initializer_range": 0.3}
BLOCKS = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": BLOCKS,
    "dinov2_with_registers": BLOCKS,
    "siglip": BLOCKS,
    "resnet": {"embedding_size": 8, "hidden_sizes": (8, 16), "depths": (1, 1), "layer_type": "basic"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_image_classifiers(family: str, tmp_path: Path) -> None:
    """And a body, at a size that the positions of a ViT are interpolated to."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options = {**IMAGES, **FAMILIES[family]}
    for head in ("image-classification", None) if family == "vit" else ("image-classification",):
        labels = ("a", "b", "c") if head else None
        model = build(family, head=head, labels=labels, seed=2, **options).eval()
        side = 20 if head is None else 12
        model.processor = ImageProcessor(size=side)
        out = model.export("onnx", tmp_path / str(head))
        session = runtime.InferenceSession(out / "model.onnx")
        assert [given.name for given in session.get_inputs()] == ["pixel_values"]
        assert session.get_inputs()[0].shape == ["batch_size", 3, side, side]
        assert session.get_outputs()[0].name == ("logits" if head else "last_hidden_state")
        for count in (1, 5):
            pixels = torch.randn(count, 3, side, side)
            found = session.run(None, {"pixel_values": pixels.numpy()})[0]
            with torch.no_grad():
                wanted = model({"pixel_values": pixels}).numpy()
            assert np.abs(found - wanted).max() < 1e-4
        assert {"config.json", "preprocessor_config.json", "README.md"} <= set(os.listdir(out))
        assert transformers.AutoImageProcessor.from_pretrained(out).size["height"] == side


def test_heads_and_inputs_without_a_graph_are_refused(tmp_path: Path) -> None:
    options = {**BLOCKS, "image_size": 12}
    for family, message in (("vit_mae", "has the head masked-image"), ("clip", "is neither")):
        extra = {"eos_id": 4} if family == "clip" else {}
        with pytest.raises(ModelError, match=message):
            build(family, **options, **extra).export("onnx", tmp_path / "out")


def test_positions_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    model = made("qwen3", "causal-lm", {"rope": {"rope_type": "dynamic", "factor": 2.0}})
    with pytest.raises(ModelError, match="rope scaling dynamic"):
        model.export("onnx", tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="extra `export`"):
        made("bert", "masked-lm", {}).export("onnx", tmp_path / "out")
    assert not os.listdir(tmp_path)
