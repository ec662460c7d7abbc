"""Classification of images by the mechanism of texts: training, resuming, answers, files, and transformers' answers."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

import pretrain
from contract import check_objective
from pretrain.cli.main import main
from pretrain.data.images import ImageProcessor, Picture
from pretrain.data.images.rows import read_images
from pretrain.data.images.source import labelled_images
from pretrain.data.loader import row_rngs
from pretrain.data.tables import Table
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.finetuning.job import Job
from pretrain.finetuning.keywords import from_keywords
from pretrain.models.backbone import Backbone
from pretrain.models.vit import ViT
from pretrain.objectives.image_classification import ImageClassification
from pretrain.objectives.object_detection import ObjectDetection
from pretrain.objectives.segmentation import Segmentation

TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "image_size": 8, "patch_size": 4}
SHORT = {"limit": "40 steps", "lr": 3e-3, "batch_rows": 16, "device": "cpu", "crop": 0.8}


def bars(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images with a bright bar at the top, at the bottom, at the left or at the right."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 90, (count, 8, 8), dtype=np.uint8)
    labels = np.arange(count) % 4
    for image, label in zip(images, labels, strict=True):
        place = [np.s_[:3], np.s_[5:], np.s_[:, :3], np.s_[:, 5:]][label]
        image[place] = rng.integers(150, 255)
    return images, labels


NAMES = ("top", "bottom", "left", "right")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder by class, the same rows in .npz and a table, other rows for tests, and a random model."""
    home = tmp_path_factory.mktemp("images")
    images, labels = bars(80)
    lines = ["file,kind"]
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = home / "folder" / NAMES[label] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        lines.append(f"{file.relative_to(home)},{NAMES[label]}")
    (home / "rows.csv").write_text("\n".join(lines))
    more, wanted = bars(24, seed=1)
    np.savez(
        home / "rows.npz", train_images=images, train_labels=labels, test_images=more,
        test_labels=wanted, val_images=more[:12], val_labels=wanted[:12], class_names=NAMES,
    )  # fmt: skip
    pretrain.build("vit", **TINY).save(home / "model")
    return home


@pytest.fixture(scope="module")
def tuned(place: Path) -> Any:
    return pretrain.finetune(
        place / "model", place / "folder", task="image-classification", valid=0.2,
        test=place / "rows.npz", out=place / "tuned", quiet=True, **SHORT,
    )  # fmt: skip


def task(**options: Any) -> ImageClassification:
    model = pretrain.build("vit", head="image-classification", labels=NAMES, **TINY)
    return ImageClassification(model, **options)


def test_the_contract_of_objectives(tmp_path: Path) -> None:
    images, labels = bars(16)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    rows = labelled_images(str(tmp_path / "a.npz"), 0.1).train
    check_objective(lambda: task(crop=0.9, flip=True, randaugment=3), rows, tmp_path / "out")


def test_a_model_learns_and_is_measured_beside_baselines(tuned: Any) -> None:
    assert tuned.test_metrics["accuracy"] > 0.85 and tuned.metrics["accuracy"] > 0.85
    assert tuned.trivial["accuracy"] == pytest.approx(0.25)
    assert tuned.confusion().matrix.sum() == 24
    assert tuned.counts == {"train": 64, "valid": 16, "test": 24}
    page = tuned.report().read_text()
    assert "Confusion" in page and "tokens/s" not in page
    card = tuned.model.card
    assert "pipeline_tag: image-classification" in card and 'answer("photo.jpg")' in card
    assert "scaled to 8 x 8 pixels" in card and "text" not in card.split("## Limits")[1]


def test_mistakes_are_shown_as_images(place: Path, tmp_path: Path) -> None:
    found = pretrain.finetune(
        place / "model", place / "folder", task="image-classification", valid=0.2, quiet=True,
        out=tmp_path / "run", **SHORT | {"limit": "1 steps"},
    )  # fmt: skip
    mistakes = found.errors(3)
    assert mistakes[0]["text"].endswith(".png") and mistakes[0]["text"] in repr(mistakes)
    page = found.report().read_text()
    assert page.count('<img src="data:image/png;base64,') == len(found.errors(20)) > 0
    assert page.count('<img src="data:image/jpeg;base64,') == len(found.errors(20))  # attention


def attended(model: Any, image: np.ndarray) -> str | None:
    objective = ImageClassification(model)
    columns = {"image": [Picture(image, "a photo")], "label": ["top"]}
    return objective.attended(Table("rows", columns))[0]


def test_pictures_of_attention_are_light_where_it_goes() -> None:
    model = pretrain.build("vit", head="image-classification", labels=NAMES, **TINY)
    model.backbone.attention_map = lambda pixels: torch.tensor([[[0.8, 0.0], [0.0, 0.0]]])
    address = attended(model, np.full((8, 8, 3), 200, np.uint8))
    with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as shown:
        pixels = np.asarray(shown.convert("L"), np.float32)
    assert abs(pixels[0, 0] - 200) < 10
    assert abs(pixels[-1, -1] - 40) < 10


def test_models_without_attention_have_no_pictures_of_it() -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": (8, 16), "depths": (1, 1), "image_size": 16}
    model = pretrain.build("resnet", head="image-classification", labels=NAMES, **sizes)
    assert attended(model, np.zeros((16, 16, 3), np.uint8)) is None


def test_an_adapter_carries_the_processor(place: Path, tmp_path: Path) -> None:
    found = pretrain.finetune(
        place / "model", place / "folder", task="image-classification", lora=2, quiet=True,
        out=tmp_path / "run", **SHORT | {"limit": "3 steps"},
    )  # fmt: skip
    file = place / "folder" / "top" / "0.png"
    wanted = found.predict(file)
    found.save(tmp_path / "saved")
    opened = pretrain.load(tmp_path / "saved", quiet=True, base=pretrain.load(place / "model"))
    assert opened.predict(file) == wanted
    merged = opened.merge_adapter().predict(file)
    assert merged["score"] == pytest.approx(wanted["score"], abs=1e-5)


def test_blanks_in_names_of_folders_part_no_labels(tmp_path: Path) -> None:
    for name in ("green", "red", "red green"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    rows = ImageClassification.read(tmp_path, name="data")
    assert ImageClassification.learn(rows, {}).labels == ("green", "red", "red green")


def test_the_preview_counts_classes(place: Path) -> None:
    for model in (None, place / "model"):
        shown = str(pretrain.data(place / "folder", "image-classification", model))
        assert "left" in shown and "tokens" not in shown and "words" not in shown
    assert "3 x 8 x 8 values" in shown


def test_large_images_are_decoded_by_several_threads_alike(place: Path) -> None:
    model = pretrain.build("vit", head="image-classification", labels=NAMES, **TINY)
    model.processor = ImageProcessor(size=128)
    goal = ImageClassification(model, crop=0.5)
    rows = goal.encode(read_images(place / "folder").take(range(6)), targets=False)
    batch = goal.collate([rows[i] for i in range(6)], row_rngs(0, "x", 0, 6))
    for i in range(6):
        alone = goal.augmentation.values(
            [rows[i]["image"].image()], goal.processor, row_rngs(0, "x", i, 1), evaluation=False
        )
        assert torch.equal(batch["pixel_values"][i], torch.from_numpy(alone[0]))


def test_every_form_of_input_has_one_answer(tuned: Any, place: Path) -> None:
    file = place / "folder" / "left" / "2.png"
    image = Image.open(file)
    answer = tuned.predict(file)
    assert answer["label"] in NAMES and 0 < answer["score"] <= 1
    nested = np.asarray(image).tolist()
    for form in (str(file), image, np.asarray(image), file.read_bytes(), nested, {"image": nested}):
        assert tuned.predict(form) == answer, type(form)
    several = tuned.predict(place / "folder")
    assert len(several) == 80
    files = sorted((place / "folder" / "left").iterdir(), key=lambda p: int(p.stem))
    mine = tuned.predict(files)
    assert mine == tuned.predict([np.asarray(Image.open(f)) for f in files])
    assert mine == tuned.predict(np.stack([np.asarray(Image.open(f)) for f in files]))
    assert mine == tuned.predict([{"image": str(f)} for f in files])
    colours = np.repeat(np.asarray(image.convert("L"))[None], 3, axis=0)  # (3, H, W)
    grey = len(tuned.predict(colours)) == 3 if tuned.model.processor.channels == 1 else None
    assert grey or tuned.predict(colours) == tuned.predict(np.moveaxis(colours, 0, -1))
    for wrong in ("nowhere", ["nowhere.png"], [str(file), "nowhere.png"]):
        with pytest.raises(DataError, match=r"image \d: there is no file 'nowhere"):
            tuned.predict(wrong)
    assert tuned.predict([nested, nested]) == tuned.predict([image, image])
    for address in ("http://x/y.png", ["s3://x/y.png"], Path("https://x/rows.csv")):
        with pytest.raises(DataError, match="is an address, and nothing is downloaded"):
            tuned.predict(address)
    with pytest.raises(DataError, match="rows.csv"):
        tuned.predict("nowhere/rows.csv")
    top = tuned.predict(file, top_k=None)
    assert set(top["label"]) == set(NAMES) and sum(top["score"]) == pytest.approx(1.0)
    for table in (place / "rows.csv", str(place / "rows.csv")):
        assert len(tuned.predict(table, columns={"image": "file"})) == 80


def test_broken_inputs_have_no_answer_and_are_counted(
    tuned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    Image.new("L", (5, 9)).save(tmp_path / "b.png")
    found = tuned.predict(tmp_path)
    assert found[0] == {} and found[1]["label"] in NAMES
    assert (
        "1 of 2 inputs get no answer: broken image (the file is empty)" in capsys.readouterr().err
    )
    with pytest.raises(DataError, match="no image"):
        tuned.predict([3])


def test_the_command_line_writes_answers_and_figures(
    tuned: Any, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(place / "tuned"), str(place / "answers.jsonl")
    assert main(["predict", run, str(place / "folder"), "--out", out]) == 0
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    right = sum(row["predicted_label"] == row["label"] for row in rows)
    assert len(rows) == 80 and right > 68 and rows[0]["image"].endswith(".png")
    assert main(["predict", run, str(place / "rows.csv"), "--out", str(place / "a.csv")]) == 0
    assert main(["predict", run, str(place / "rows.npz"), "--out", str(place / "b.csv")]) == 0
    assert "the part 'test' is used" in capsys.readouterr().err
    for words in (["evaluate", run], ["evaluate", run, "--data", str(place / "rows.npz")]):
        assert main(words) == 0
        assert "accuracy" in capsys.readouterr().out
    assert main(["inspect", run]) == 0
    assert "ViTForImageClassification" in capsys.readouterr().out
    figures = pretrain.evaluate(run, place / "rows.npz")
    assert figures["accuracy"] == tuned.test_metrics["accuracy"]
    assert pretrain.evaluate(run)["accuracy"] == tuned.metrics["accuracy"]


def test_transformers_opens_the_directory_and_answers_alike(tuned: Any, place: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    tuned.model.save(place / "saved")
    files = [str(p) for p in sorted((place / "folder" / "top").iterdir())]
    answers = tuned.predict(files, top_k=None)
    pipe = pipeline("image-classification", model=str(place / "saved"))
    for mine, theirs in zip(answers, pipe(files, top_k=4), strict=True):
        assert mine["label"] == [t["label"] for t in theirs]
        np.testing.assert_allclose(mine["score"], [t["score"] for t in theirs], atol=1e-6)
    theirs = AutoModelForImageClassification.from_pretrained(place / "saved").eval()
    processor = AutoImageProcessor.from_pretrained(place / "saved")
    images = [Image.open(f).convert("RGB") for f in files]
    pixels = processor(images, return_tensors="pt")
    torch.testing.assert_close(
        theirs(**pixels).logits,
        tuned.model({"pixel_values": tuned.model.processor(images)["pixel_values"]}),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_a_file_with_parts_gives_the_held_out_rows(place: Path) -> None:
    settings, objects = from_keywords(
        None, place / "model", "image-classification", {"train": str(place / "rows.npz")}
    )
    data = Job.open(place / "model", settings, objects, quiet=True).data
    assert (len(data.train), len(data.valid), len(data.test or ())) == (80, 12, 24)
    assert data.learned.labels == NAMES
    chosen, _ = from_keywords(
        None, place / "model", "image-classification",
        {"train": str(place / "rows.npz"), "valid": 0.3},
    )  # fmt: skip
    assert chosen.data.valid == 0.3 and chosen.data.test == str(place / "rows.npz")


def test_resuming_is_bit_exact_and_evaluation_is_never_changed(place: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {**SHORT, "flip": True, "randaugment": 5, "save_every": "2 steps"}
    runs = []
    for name, limits in (("whole", ["8 steps"]), ("cut", ["4 steps", "8 steps"])):
        for limit in limits:
            options = {k: v for k, v in common.items() if k not in ("limit", "save_every")}
            found = pretrain.finetune(
                place / "model", place / "rows.csv", task="image-classification", image="file",
                label="kind", out=tmp_path / name, limit=limit, schedule="constant", warmup=0,
                quiet=True, **options,
            )  # fmt: skip
        runs.append((found.run.checkpoint / "model.safetensors").read_bytes())
    assert runs[0] == runs[1]
    goal = task(crop=0.3, flip=True, randaugment=20)
    rows = goal.encode(read_images(place / "folder").take(range(6)), targets=False)
    batches = [
        goal.collate([rows[i] for i in range(6)], row_rngs(0, "x", at, 6), evaluation=True)
        for at in (0, 50)
    ]
    assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])
    plain = goal.processor([str(p) for p in read_images(place / "folder").columns["image"][:6]])
    assert torch.equal(batches[0]["pixel_values"], plain["pixel_values"])
    together = goal.collate([rows[i] for i in range(6)], row_rngs(0, "x", 0, 6))
    alone = goal.collate([rows[4]], row_rngs(0, "x", 4, 1))
    assert torch.equal(together["pixel_values"][4], alone["pixel_values"][0])
    assert not torch.equal(together["pixel_values"], plain["pixel_values"])


def test_broken_training_images_are_counted_and_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "folder", tmp_path / "folder")
    (tmp_path / "folder" / "left" / "2.png").write_bytes(b"")
    (tmp_path / "folder" / "left" / "6.png").write_bytes(b"rubbish")
    found = pretrain.finetune(
        place / "model", tmp_path / "folder", task="image-classification", valid=0.0, quiet=True,
        out=tmp_path / "run", **SHORT | {"limit": "2 steps"},
    )  # fmt: skip
    told = [note for note in found.notes if "left out" in note]
    assert any("1 training rows left out, broken image (the file is empty)" in n for n in told)
    assert any("no image of a known format" in n and "6.png" in n for n in told)


def test_several_labels(place: Path, tmp_path: Path) -> None:
    images, labels = bars(48)
    rows = [
        {"image": image, "labels": ["bright", NAMES[label]] if k % 3 else [NAMES[label]]}
        for k, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    found = pretrain.finetune(
        place / "model", rows, task="image-classification", out=tmp_path / "run", quiet=True,
        **SHORT | {"limit": "6 steps"},
    )  # fmt: skip
    assert "micro_f1" in found.metrics and set(found.labels) == {"bright", *NAMES}
    assert isinstance(found.predict(images[0])["label"], list)
    again = pretrain.load(tmp_path / "run", quiet=True)
    assert again.predict(images[0]) == found.predict(images[0])
    assert again.hf_config()["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize("problem", ["single_label", "multi_label"])
@pytest.mark.parametrize("form", ["numbers", "vectors"])
def test_numbers_and_vectors_of_classes_that_share_a_name_are_read(form: str, problem: str) -> None:
    """As of checkpoints of ImageNet, in which two classes are called crane."""
    names, eye = ("tench", "crane", "crane", "dog"), np.eye(4, dtype=int)
    labels = [[k] if form == "numbers" else eye[k].tolist() for k in range(4)]
    rows = [{"image": np.zeros((8, 8, 3), np.uint8), "label": label} for label in labels]
    table = ImageClassification.read(rows)
    learned = ImageClassification.learn(table, {"checkpoint_labels": names, "problem": problem})
    tidied = ImageClassification.tidy(table, learned, {})
    model = pretrain.build("vit", head="image-classification", labels=names, num_channels=3, **TINY)
    targets = np.stack(ImageClassification(model, **learned.options).targets(tidied))
    assert np.array_equal(targets, range(4) if problem == "single_label" else eye)


def test_models_that_do_not_fit_are_refused(place: Path) -> None:
    model = pretrain.build("vit", head="image-classification", labels=NAMES, **TINY)
    model.processor = None
    assert ImageClassification(model).processor.size == (8, 8)
    model.processor = ImageProcessor(size=8, image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ModelError, match="reads 3 channels.* returns 1"):
        ImageClassification(model)
    model.processor = ImageProcessor("CLIPImageProcessor", do_center_crop=False)
    with pytest.raises(ModelError, match="different sizes"):
        ImageClassification(model)
    model.processor = object()
    with pytest.raises(ModelError, match="no image processor"):
        ImageClassification(model)
    with pytest.raises(ConfigError, match="max_length"):
        task(max_length=5)
    with pytest.raises(ModelError, match="no image-classification head"):
        pretrain.build("bert", head="image-classification", labels=NAMES)
    with pytest.raises(ModelError, match="no sequence-classification head"):
        pretrain.load(place / "model", head="sequence-classification")


def test_pre_training_from_the_command_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "--data.source",
        "images",
        "--data.source_args.train",
        str(place / "rows.npz"),
    ]
    words += ["--model.family", "vit", "--objective.class_path", "ImageClassification"]
    words += ["--model.overrides.hidden_size", "32", "--model.overrides.num_layers", "1"]
    words += ["--model.overrides.patch_size", "4"]
    words += ["--train.out", str(tmp_path / "run"), "--train.batch_rows", "8", "--optim.lr", "3e-3"]
    words += ["--parallel.device", "cpu", "--train.eval_every", "10 steps"]
    assert main([*words, "--train.limit", "10 steps"]) == 0
    assert main([*words, "--train.limit", "60 steps"]) == 0
    assert "resuming checkpoint-10" in capsys.readouterr().err
    figures = pretrain.evaluate(tmp_path / "run")
    assert figures["targets"] == 12 and figures["accuracy"] > 0.5
    model = pretrain.load(tmp_path / "run", quiet=True)
    assert model.labels == NAMES and model.processor.size == (8, 8)
    assert model.predict(place / "folder" / "top" / "0.png")["label"] in NAMES
    tuned = pretrain.finetune(
        tmp_path / "run", place / "folder", task="image-classification", out=tmp_path / "tuned",
        limit="2 steps", quiet=True, device="cpu",
    )  # fmt: skip
    assert not tuned.model.fresh  # the labels are those of the checkpoint, so its head is kept


def test_comparison_with_scratch_and_pixels(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = pretrain.finetune(
        place / "model", place / "rows.npz", task="image-classification", compare="scratch",
        seeds=2, label_counts=[40], lrs=[3e-3], out=tmp_path / "run", quiet=True,
        **{k: v for k, v in SHORT.items() if k != "lr"} | {"limit": "4 steps"},
    )  # fmt: skip
    assert set(found.comparison.arms) == {"pretrained", "scratch", "pixels"}
    assert found.comparison.arms["pixels"][40][0] > 0.9
    assert "pixels + logistic regression" in found.comparison.verdict(40)
    assert found.comparison.notes.unit == "patches"
    assert ">40<" in found.comparison.svg()  # the only count of labels, without decimals


def test_a_masked_autoencoder_is_tuned_as_a_vit_that_reads_the_mean(
    place: Path, tmp_path: Path
) -> None:
    masked = pretrain.build("vit_mae", **TINY | {"num_channels": 3})
    masked.save(tmp_path / "mae")
    found = pretrain.finetune(
        tmp_path / "mae", place / "rows.npz", task="image-classification", pooling="mean", quiet=True,
        out=tmp_path / "run", **SHORT | {"limit": "2 steps"},
    )  # fmt: skip
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (saved["model_type"], saved["pooling"]) == ("vit", "mean")
    model = pretrain.load(tmp_path / "run", quiet=True)
    images = model.processor(list(bars(5)[0]))
    hidden = model.backbone(images)
    wanted = model.head.classifier(hidden[:, 1:].mean(1))
    assert torch.equal(model(images), wanted) and found.model.head.pool == "patches"
    narrow = {"hidden_sizes": (4, 8), "depths": (1, 1), "layer_type": "basic"}
    convolutions = pretrain.build("resnet", head="image-classification", image_size=32, **narrow)
    with pytest.raises(ConfigError, match="pooling='mean': the classifier of a resnet"):
        ImageClassification(convolutions, pooling="mean")


class OwnBlock(torch.nn.Module):
    """A block that knows nothing of tokens to keep."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(size, size)

    def forward(self, x: torch.Tensor, *, mask: Any, rope: Any = None) -> torch.Tensor:
        return x + self.mix(x.mean(1, keepdim=True))


class OwnViT(ViT):
    def build_block(self) -> Any:
        return OwnBlock(self.config.hidden_size)

    def names(self) -> list[Any]:
        return Backbone.names(self)


def test_a_family_with_blocks_of_its_own_is_classified_too() -> None:
    model = pretrain.build(OwnViT, head="image-classification", labels=NAMES, **TINY)
    goal, rows = ImageClassification(model, crop=1.0), bars(4)
    examples = [
        {"image": image, "labels": np.asarray(label)} for image, label in zip(*rows, strict=True)
    ]
    batch = goal.eval().collate(examples, row_rngs(0, "collate", 0, 4), evaluation=True)
    assert batch["keep_index"].shape == (4, 1)
    whole = {key: value for key, value in batch.items() if key != "keep_index"}
    torch.testing.assert_close(model(batch), model(whole))
    assert torch.isfinite(goal(batch).total)


@pytest.mark.parametrize("form", ["array", "list", "pillow"])
def test_a_mapping_with_one_image_is_one_row(form: str, place: Path) -> None:
    model = pretrain.build("vit", head="image-classification", labels=NAMES, num_channels=3, **TINY)
    image = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    given = {"array": image, "list": image.tolist(), "pillow": Image.fromarray(image)}[form]
    answer = model.predict(image)
    assert model.predict({"image": given}) == answer and model.predict([{"image": given}]) == [
        answer
    ]
    assert model.predict({"image": np.stack([image, image])}) == [answer, answer]
    assert model.predict({"image": [image, image]}) == [answer, answer]
    assert model.predict({"image": list(image), "id": 3}) == answer  # the rows of one image
    for two in ([image, image], [torch.tensor(image)] * 2):
        with pytest.raises(DataError, match="'id' holds int 3"):
            model.predict({"image": two, "id": 3})


def test_baselines_and_classes_are_those_of_the_rows_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = bars(48)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = tmp_path / "rows" / ("train" if k < 24 else "val") / NAMES[label] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    for k in range(40):
        (tmp_path / "rows" / "val" / NAMES[0] / f"empty{k}.png").write_bytes(b"")
    for file in (tmp_path / "rows" / "train" / NAMES[3]).iterdir():
        file.write_bytes(b"rubbish")
    result = pretrain.finetune(
        pretrain.build("vit", **TINY), tmp_path / "rows", "image-classification", out=tmp_path / "run",
        **{**SHORT, "limit": "1 steps"},
    )  # fmt: skip
    assert result.metrics["targets"] == 24 and result.trivial["accuracy"] == pytest.approx(0.25)
    assert f"no training row of the class {NAMES[3]!r} is left" in capsys.readouterr().err


def test_pixels_that_fill_no_patch_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = bars(16)
    rows = [{"image": image, "label": NAMES[k]} for image, k in zip(images, labels, strict=True)]
    for patch, told in ((4, False), (3, True)):
        model = pretrain.build("vit", **{**TINY, "patch_size": patch})
        options = {**SHORT, "limit": "1 steps", "out": tmp_path / f"{patch}", "valid": 0.25}
        pretrain.finetune(model, rows, "image-classification", **options)
        line = "the last 2 rows and 2 columns of pixels fill no patch"
        assert (line in capsys.readouterr().err) is told


def test_images_smaller_than_a_patch_are_refused(tmp_path: Path) -> None:
    model = pretrain.build("vit", **TINY)
    model.processor = ImageProcessor(size={"height": 2, "width": 2})
    rows = [{"image": image, "label": NAMES[k]} for image, k in zip(*bars(8), strict=True)]
    with pytest.raises(ModelError, match="2 x 2 values, which is less than one"):
        pretrain.finetune(model, rows, "image-classification", out=tmp_path / "run", **SHORT)


@pytest.mark.parametrize("kind", [ImageClassification, Segmentation, ObjectDetection])
def test_jitter_reaches_the_images(kind: Any) -> None:
    head = kind.head_kind
    model = pretrain.build("vit", head=head, labels=NAMES, **TINY)
    assert kind(model, jitter=0.25).augmentation.jitter == 0.25
