"""Retrieval and zero-shot classification: vectors and answers of transformers, fine-tuning, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

import pretrain
from pretrain.cli.main import main
from pretrain.data.images import ImageProcessor
from pretrain.data.images.pairs import PairProcessor
from pretrain.data.tables import Table
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.models import build
from pretrain.objectives.image_text_retrieval import ImageTextRetrieval

COLOURS = {"red": 0, "green": 1, "blue": 2}
PLACES = {"top": 0, "bottom": 1}
TEXTS = [f"a {colour} stripe at the {place}" for colour in COLOURS for place in PLACES]
LABELS = ["red stripe", "blue stripe", "green"]
FAMILIES = ["clip", "siglip"]
ONE_QUICK = [
    "clip",
    pytest.param("siglip", marks=pytest.mark.slow),
]  # the same code but for the loss


def picture(text: str, seed: int = 0) -> np.ndarray:
    words = text.split()
    pixels = np.random.default_rng(seed).integers(0, 60, (8, 8, 3), dtype=np.uint8)
    at = 4 * PLACES[words[-1]]
    pixels[at : at + 4, :, COLOURS[words[1]]] += 190
    return pixels


def model(family: str, seed: int = 0) -> Any:
    words = train_from_texts([*TEXTS, *LABELS, "This is a photo of"], "bpe", vocab_size=300, captions=True)  # fmt: skip
    found = build(
        family, None, seed=seed, vocab_size=len(words), pad_id=words.pad_id, bos_id=words.bos_id, eos_id=words.eos_id,
        hidden_size=16, num_layers=1, num_heads=2, image_size=8, patch_size=4, max_positions=64,
    )  # fmt: skip
    half = (0.5, 0.5, 0.5)
    images = ImageProcessor(size=8, image_mean=half, image_std=half)
    found.processor = PairProcessor(words, images)
    return found


def folder(path: Path, copies: int = 6) -> Path:
    path.mkdir()
    lines, first = [], 1000 * ord(path.name[0])
    for i, text in enumerate(TEXTS * copies):
        Image.fromarray(picture(text, first + i)).save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": text}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_and_zero_shot_classes_are_those_of_transformers(
    family: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    source = folder(tmp_path / "a", copies=1)
    ours = model(family)
    ours.save(tmp_path / "model")
    name = {"clip": "CLIPModel", "siglip": "SiglipModel"}[family]
    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info.values())
    files = [source / f"{i}.png" for i in range(3)]
    opened = [Image.open(file) for file in files]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    padding: Any = {"clip": True, "siglip": "max_length"}[family]
    batch = processor(text=TEXTS[:4], images=opened, return_tensors="pt", padding=padding)
    with torch.no_grad():
        wanted = theirs(**batch)
    torch.testing.assert_close(ours.embed(files), wanted.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.embed(TEXTS[:4]), wanted.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.similarity(files, TEXTS[:4]),
        wanted.image_embeds @ wanted.text_embeds.T,
        rtol=1e-4,
        atol=1e-5,
    )
    pipe = transformers.pipeline("zero-shot-image-classification", str(tmp_path / "model"))
    loaded = pretrain.load(tmp_path / "model", quiet=True)
    for file, image in zip(files, opened, strict=True):
        found = loaded.predict(file, labels=LABELS, top_k=None)
        assert found["label"] == [row["label"] for row in pipe(image, candidate_labels=LABELS)]
        scores = [row["score"] for row in pipe(image, candidate_labels=LABELS)]
        assert found["score"] == pytest.approx(scores, rel=1e-4)


def test_images_and_texts_are_embedded_in_any_form(tmp_path: Path) -> None:
    source, ours = folder(tmp_path / "a", copies=1), model("clip")
    files = [source / f"{i}.png" for i in range(6)]
    wanted = ours.embed(files)
    arrays = [np.asarray(Image.open(file)) for file in files]
    for given in (source, arrays, np.stack(arrays), [Image.open(f) for f in files]):
        torch.testing.assert_close(ours.embed(given), wanted)
    torch.testing.assert_close(ours.embed(files, batch_size=4), wanted)
    torch.testing.assert_close(ours.embed(files[0]), wanted[:1])
    raw = ours.embed(files, normalize=False)
    torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=-1), wanted)
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(6))
    assert ours.embed("a red stripe").shape == (1, 16)
    assert ours.search("a red stripe", files, top_k=2)[0].text in files
    # Several prompts are averaged.
    one, two = (ours.embed([t.format(x) for x in LABELS]) for t in ("a {}", "the {}"))
    mean = torch.nn.functional.normalize(one + two, dim=-1)
    scores = (ours.backbone.logit_scale.exp() * (wanted[:1] @ mean.T)).softmax(-1)[0]
    found = ours.predict(files[0], labels=LABELS, template=["a {}", "the {}"])
    assert found["label"] == LABELS[int(scores.argmax())]
    assert found["score"] == pytest.approx(float(scores.detach().max()), rel=1e-4)
    assert ours.predict(files[0])["embedding"] == pytest.approx(wanted[0].tolist(), abs=1e-5)


def test_the_name_of_an_image_that_is_read_as_a_text_is_said(capsys: Any) -> None:
    ours = model("clip")
    ours.embed(["a red stripe", "is it cat.png or dog?", "A stripe.JPG in red"])
    assert "is read as a text" not in capsys.readouterr().err
    assert ours.embed(["a", "photos/cat.JPG"]).shape == (2, 16)
    said = capsys.readouterr().err
    assert "'photos/cat.JPG' is read as a text; for the image, give pathlib.Path(" in said
    ours.similarity("cat.png", ["a cat"])
    assert "'cat.png' is read as a text" in capsys.readouterr().err


def test_what_cannot_be_embedded_or_chosen_among_is_refused(tmp_path: Path) -> None:
    ours, image = model("clip"), picture(TEXTS[0])
    with pytest.raises(ConfigError, match="leave 'pooling' out"):
        ours.embed("a text", pooling="mean")
    with pytest.raises(DataError, match="no file"):
        ours.embed([tmp_path / "none.png"])
    with pytest.raises(ModelError, match="neither a text nor an image"):
        ours.embed({"text": ["a"]})
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken image .* every image needs a vector"):
        ours.embed([tmp_path / "a.png"])
    with pytest.raises(ConfigError, match="at least one"):
        ours.predict(image, labels=[])
    with pytest.raises(ConfigError, match="labels names the class 'cat' twice"):
        ours.predict(image, labels=["cat", "cat", "dog"])
    with pytest.raises(
        ConfigError, match=r"template is an empty list.*template=\['a photo of a {}\.'\]"
    ):
        ours.predict(image, labels=LABELS, template=[])
    for labels in ({"cat", "dog"}, "cat", {"cat": 1}, iter(["cat"]), 3):
        with pytest.raises(ConfigError, match=r"labels is \w+ .*; give a list: labels=\['cat'"):
            ours.predict(image, labels=labels)
    with pytest.raises(ConfigError, match="template is set .*; give a list"):
        ours.predict(image, labels=LABELS, template={"a {}"})
    assert ours.predict(image, labels=np.array(LABELS)) == ours.predict(image, labels=LABELS)
    with pytest.raises(ConfigError, match="must hold {}"):
        ours.predict(image, labels=LABELS, template="a photo")
    with pytest.raises(ConfigError, match="top_k is 0"):
        ours.predict(image, labels=LABELS, top_k=0)
    images_only = model("clip")
    images_only.processor = PairProcessor(None, images_only.processor.images)
    with pytest.raises(ModelError, match="no tokenizer"):
        images_only.embed("a text")
    with pytest.raises(ConfigError, match="label_smoothing is for models of the family clip"):
        pretrain.finetune(
            model("siglip"),
            [{"image": picture(text), "caption": text} for text in TEXTS],
            task="image-text-retrieval",
            label_smoothing=0.1,
            valid=0.2,
            out=str(tmp_path / "run"),
        )


def test_guessing_draws_among_different_captions_and_images() -> None:
    """Five draws were taken for five times one, and captions that differ in white space for two."""
    texts = ["a dog", "a  dog", *"bcdef"]
    images = [Image.fromarray(picture(TEXTS[0], seed)) for seed in range(7)]
    found = ImageTextRetrieval.trivial(None, None, Table("t", {"image": images, "caption": texts}))
    assert found == pytest.approx(
        {
            "image_to_text": 1 / 6,
            "image_to_text@5": 5 / 6,
            "text_to_image": (2 * 2 / 7 + 5 * 1 / 7) / 7,
            "text_to_image@5": (2 * 20 / 21 + 5 * 5 / 7) / 7,
        }
    )


@pytest.mark.parametrize("family", ONE_QUICK)
def test_fine_tuning_finds_the_texts_of_images(family: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    result = pretrain.finetune(
        model(family), source, task="image-text-retrieval", valid=1 / 6, limit="100 steps", lr=5e-3,
        batch_rows=15, out=str(tmp_path / "run"),
    )  # fmt: skip
    # Of six images four share a caption with another one, and five of them always hold one of two.
    assert result.trivial["image_to_text@5"] == 1
    assert result.trivial["text_to_image@5"] == pytest.approx((2 * 5 / 6 + 4) / 6)
    found = pretrain.evaluate(tmp_path / "run")
    assert found["image_to_text"] == pytest.approx(result.metrics["image_to_text"])
    again = pretrain.evaluate(tmp_path / "run", folder(tmp_path / "b", copies=1))
    assert again["targets"] == 6 and again["image_to_text"] >= 0.5
    # The classes are named on the command line.
    out, prompt = tmp_path / "answers.jsonl", "a {} stripe at the top"
    words = ["--labels", "[red,green,blue]", "--template", prompt, "--out", str(out), "--quiet"]
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "b"), *words]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    right = [
        row["predicted_label"] == text.split()[1] for row, text in zip(answers, TEXTS, strict=True)
    ]
    assert np.mean(right) >= 0.8


@pytest.mark.parametrize(
    ("family", "goal"), [("clip", "Contrastive"), ("siglip", "SigmoidContrastive")]
)
def test_pre_training_from_files_alone(family: str, goal: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "a")
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "patch_size": 4}
    settings: dict[str, Any] = {
        "data": {
            "source": "image_text",
            "source_args": {"train": str(source), "tokenizer": "wordpiece", "vocab_size": 60},
        },
        "model": {"family": family, "overrides": sizes},
        "objective": {"class_path": goal, "init_args": {"crop": 0.8}},
        "optim": {"lr": 1e-3},  # the last evaluation is the best
        "train": {"out": str(tmp_path / "run"), "limit": "4 steps", "batch_rows": 16},
        "parallel": {"device": "cpu"},
    }
    run = pretrain.train(settings)
    assert np.isfinite(run.metrics["image_to_text@5"])
    trained = pretrain.load(tmp_path / "run", quiet=True)
    assert trained.tokenizer.config["model_max_length"] == trained.backbone.max_length
    assert trained.backbone.max_length == {"clip": 32, "siglip": 64}[family]
    found = pretrain.evaluate(tmp_path / "run")
    assert found["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)
    assert pretrain.evaluate(tmp_path / "run", str(source))["targets"] == 36
    # A checkpoint is trained on with its own tokenizer only.
    data = settings["data"]["source_args"] | {"tokenizer": "char"}
    start = {"checkpoint": str(tmp_path / "run")}
    other: dict[str, Any] = {
        "model": start,
        "data": {"source": "image_text", "source_args": data},
        "train": settings["train"] | {"out": str(tmp_path / "other")},
    }
    with pytest.raises(pretrain.PretrainError, match=r"data\.source_args\.tokenizer="):
        pretrain.train(settings | other)
    data["tokenizer"] = str(tmp_path / "run" / "model")
    pretrain.train(settings | other)


def test_a_resumed_run_draws_the_same_captions_and_changes(tmp_path: Path) -> None:
    source = folder(tmp_path / "a", copies=2)
    lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    several = [row | {"caption": [row["caption"], "a picture", "stripes"]} for row in lines]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, several)))
    words = {"tokenizer": "wordpiece", "vocab_size": 60}
    settings: dict[str, Any] = {
        "data": {"source": "image_text", "source_args": {"train": str(source), **words}},
        "model": {
            "family": "clip",
            "overrides": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "patch_size": 4},
        },
        "objective": {
            "class_path": "Contrastive",
            "init_args": {"crop": 0.5, "randaugment": 9, "label_smoothing": 0.1},
        },
        "optim": {"schedule": "constant", "warmup": 0},
        "parallel": {"device": "cpu"},
    }
    losses = []
    for limits in (["6 steps"], ["3 steps", "6 steps"]):
        out = str(tmp_path / f"run-{len(limits)}")
        for limit in limits:
            train = {"out": out, "limit": limit, "batch_rows": 4, "log_every": 1}
            run = pretrain.train(settings | {"train": train | {"eval_every": "0 steps"}})
        losses.append([row["loss"] for row in run.history if "grad_norm" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_jitter_reaches_the_images() -> None:
    assert ImageTextRetrieval(model("clip"), jitter=0.25).augmentation.jitter == 0.25
