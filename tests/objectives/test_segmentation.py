"""Segmentation from every form of rows: training, figures, answers, files, the report, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("PIL")

from PIL import Image

import pretrain
from contract import check_objective
from pretrain.cli.main import main
from pretrain.data.images import ImageProcessor
from pretrain.data.images.masks import Mask, pixel_features
from pretrain.data.labels import LabelMap
from pretrain.data.loader import row_rngs
from pretrain.data.row_writer import RowWriter
from pretrain.data.tables import Table
from pretrain.errors import DataError, ModelError
from pretrain.metrics import confusion_matrix, iou, mean_iou
from pretrain.objectives import segmentation
from pretrain.objectives.segmentation import Segmentation

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "image_size": 16, "patch_size": 4}
SHORT = {"limit": "60 steps", "lr": 5e-3, "batch_rows": 16, "device": "cpu", "crop": 1.0}
NAMES = ("ground", "square")


def squares(count: int, seed: int = 0, size: tuple[int, int] = (16, 16)) -> tuple[Any, Any]:
    """Noisy images with a bright square, and masks of 0 and 1."""
    rng = np.random.default_rng(seed)
    images = rng.integers(90, 160, (count, *size), dtype=np.uint8)
    masks = np.zeros((count, *size), np.uint8)
    for image, mask in zip(images, masks, strict=True):
        top, left = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
        place = np.s_[top : top + 8, left : left + 8]
        image[place] = rng.integers(170, 255, (8, 8))
        mask[place] = 1
    return images, masks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as folders, a table and arrays, other rows for tests, and a random model."""
    home = tmp_path_factory.mktemp("masks")
    images, masks = squares(48)
    lines = ["file,mask"]
    for k, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for name, array in (("images", image), ("masks", mask)):
            file = home / "folder" / name / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
        lines.append(f"folder/images/{k}.png,folder/masks/{k}.png")
    (home / "rows.csv").write_text("\n".join(lines))
    more, wanted = squares(20, seed=1, size=(24, 20))
    np.savez(home / "rows.npz", images=images, masks=masks, class_names=NAMES)
    np.savez(home / "test.npz", images=more, masks=wanted, class_names=NAMES)
    pretrain.build("vit", **TINY).save(home / "model")
    return home


@pytest.fixture(scope="module")
def tuned(place: Path) -> Any:
    return pretrain.finetune(
        place / "model", place / "folder", task="segmentation", valid=0.25, test=place / "test.npz",
        labels=list(NAMES), out=place / "tuned", quiet=True, **SHORT,
    )  # fmt: skip


def task(**options: Any) -> Segmentation:
    return Segmentation(pretrain.build("vit", head="segmentation", labels=NAMES, **TINY), **options)


def rows_of(goal: Segmentation, source: Any, **options: Any) -> Any:
    table = goal.read(source, name="train")
    learned = goal.learn(table, options)
    return goal.encode(goal.tidy(table, learned, options))


def test_the_contract_of_objectives(place: Path, tmp_path: Path) -> None:
    rows = rows_of(task(), place / "rows.npz")
    check_objective(lambda: task(crop=0.5, flip=True, class_weights="balanced"), rows, tmp_path)


def test_a_model_learns_and_its_figures_are_those_of_scikit_learn(tuned: Any, place: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    assert tuned.test_metrics["miou"] > 0.75 > 0.5 > tuned.trivial_test["miou"]
    file = np.load(place / "test.npz")
    said = np.stack([answer["mask"] for answer in tuned.predict(place / "test.npz")])
    assert said.shape == (20, 24, 20) and said.dtype == np.uint8
    true, found = file["masks"].reshape(-1), said.reshape(-1)
    wanted = metrics.jaccard_score(true, found, average=None)
    assert tuned.test_metrics["miou"] == pytest.approx(wanted.mean(), abs=1e-9)
    assert tuned.test_metrics["iou_square"] == pytest.approx(wanted[1], abs=1e-9)
    matrix = metrics.confusion_matrix(true, found)
    assert iou(matrix) == pytest.approx(wanted) and mean_iou(matrix) == pytest.approx(wanted.mean())
    assert tuned.test_metrics["accuracy"] == pytest.approx((true == found).mean(), abs=1e-9)
    answer = tuned.predict(file["images"][0])
    assert answer["share"]["square"] == pytest.approx((answer["mask"] == 1).mean())


def test_an_answer_that_is_not_a_number_is_an_error(place: Path) -> None:
    goal = task()
    table = goal.read(place / "rows.npz", name="data")
    with torch.no_grad():
        goal.model.head.classifier.bias[1] = torch.nan
    with pytest.raises(ModelError, match=r"not a number"):
        list(goal.predict(goal.tidy(table, goal.learn(table, {}), {})))


def test_a_class_that_is_nowhere_does_not_count() -> None:
    matrix = np.asarray([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert np.isnan(iou(matrix)[2]) and mean_iou(matrix) == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert np.isnan(mean_iou(np.zeros((2, 2))))


def test_the_report_shows_masks(tuned: Any) -> None:
    page = tuned.report().read_text()
    assert page.count("<img ") == 24 and "From the worst to the best" in page and "square" in page
    assert "image-segmentation" in tuned.model.card and 'predict("photo.jpg")' in tuned.model.card
    assert [len(tuned.pictures(count)) for count in (0, 1, 2)] == [0, 1, 2]
    assert tuned.pictures(1)[0]["score"] == tuned.pictures(12)[0]["score"]  # the worst


def test_a_saved_model_answers_alike_and_its_encoder_opens_in_transformers(
    tuned: Any, place: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    image = np.load(place / "test.npz")["images"][3]
    tuned.save(tmp_path / "saved")
    opened = pretrain.load(tmp_path / "saved", quiet=True)
    assert np.array_equal(opened.predict(image)["mask"], tuned.predict(image)["mask"])
    model, info = transformers.AutoModel.from_pretrained(
        tmp_path / "saved", output_loading_info=True, add_pooling_layer=False
    )
    assert not info["missing_keys"] and all("decode_head" in k for k in info["unexpected_keys"])
    pixels = opened.processor([image])["pixel_values"]
    with torch.inference_mode():
        theirs = model.eval()(pixels).last_hidden_state
        assert torch.allclose(theirs, opened.backbone({"pixel_values": pixels}), atol=1e-5)
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "saved")


def test_every_form_of_rows_gives_the_same_examples(place: Path) -> None:
    datasets = pytest.importorskip("datasets")
    goal = task()
    images, masks = squares(48)
    frame = datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(x) for x in images],
            "label": [Image.fromarray(x) for x in masks],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Image()}),
    )
    csv = goal.read(place / "rows.csv", name="train")
    csv = csv.with_columns({"image": csv.columns["file"], "mask": csv.columns["mask"]}, {})
    frame_table = goal.read(frame, name="train")
    frame_table = frame_table.with_columns(
        {"image": frame_table.columns["image"], "mask": frame_table.columns["label"]}, {}
    )
    dicts = [{"image": x, "mask": y} for x, y in zip(images, masks, strict=True)]
    for source in (place / "rows.npz", place / "folder", csv, frame_table, dicts):
        rows = rows_of(goal, source)
        assert len(rows) == 48
        for k in range(48):
            assert np.array_equal(np.asarray(rows[k]["image"]), images[k])
            assert np.array_equal(rows[k]["mask"].values, masks[k])


def test_forms_of_masks(tmp_path: Path) -> None:
    goal = task()
    image, mask = squares(1)[0][0], squares(1)[1][0]
    palette = Image.fromarray(mask, "P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    unlabelled = np.where(np.arange(16) < 3, np.uint8(255), mask)
    forms = {
        "palette": palette,
        "bits": mask.astype(bool),
        "binary": mask * np.uint8(255),
        "wide": mask.astype(np.uint16),
        "colours alike": np.repeat(mask[..., None], 3, 2),
    }
    for name, form in forms.items():
        held: Any = form
        if name in ("palette", "colours alike"):  # of files
            saved = tmp_path / f"{name}.png"
            (form if name == "palette" else Image.fromarray(form)).save(saved)
            held = str(saved)
        rows = rows_of(goal, [{"image": image, "mask": held}])
        assert np.array_equal(rows[0]["mask"].values, mask), name
    rows = rows_of(goal, [{"image": image, "mask": unlabelled}])
    batch = goal.collate([rows[0]], [np.random.default_rng(0)], evaluation=True)
    assert int(goal.count(batch)) == (unlabelled != 255).sum()
    learned = goal.learn(goal.read([{"image": image, "mask": mask * np.uint8(255)}]), {})
    assert learned.labels == ("background", "foreground") and "255" in learned.notes[0]
    signed = [{"image": image, "mask": mask.astype(int) - k} for k in (0, 1, 1)]
    for options in ({}, {"labels": ["a", "b", "c"]}):
        with pytest.raises(DataError, match=r"number -1, as 2 of 3 masks.*without a class are 255"):
            goal.learn(goal.read(signed), options)
    named = goal.learn(goal.read(signed), {"labels": {"-1": "a", "0": "b", "1": "c", "2": "d"}})
    assert named.labels[0] == "a"
    learned = goal.learn(goal.read([{"image": image, "mask": mask * np.uint8(7)}]), {})
    assert learned.labels == ("0", "7") and learned.options["codes"] == {"0": 0, "7": 1}


def test_a_class_of_a_mask_is_its_name_and_not_its_number(tmp_path: Path) -> None:
    images, masks = squares(3)
    goal, made = task(), {}
    for name, held, names in (
        ("first", masks, NAMES), ("turned", 1 - masks, [n.upper() for n in NAMES[::-1]]),
        ("binary", (1 - masks) * np.uint8(255), NAMES[::-1]), ("other", masks, ("land", "box")),
        ("black", masks * np.uint8(255), ("land", "box")),
    ):  # fmt: skip
        np.savez(tmp_path / f"{name}.npz", images=images, masks=held, class_names=names)
        made[name] = goal.read(tmp_path / f"{name}.npz", name="data")
    learned = goal.learn(made["first"], {})
    of_model = goal.learn(made["turned"], {"checkpoint_labels": NAMES})
    renamed = goal.learn(made["other"], {"labels": list(NAMES)})
    foreground = goal.learn(made["binary"], {"labels": list(NAMES)})
    black = goal.learn(made["black"], {"labels": list(NAMES)})
    for found, names in (
        (learned, ("first", "turned")), (of_model, ("first", "turned")),
        (renamed, ("first", "turned", "other")), (foreground, ("binary",)), (black, ("black",)),
    ):  # fmt: skip
        for name in names:
            tidied = goal.tidy(made[name], found, {}).columns["mask"]
            assert all(np.array_equal(m.values, o) for m, o in zip(tidied, masks, strict=True)), (
                name
            )
    assert np.array_equal(goal.encode(made["turned"])[0]["mask"].values, masks[0])
    with pytest.raises(DataError, match=r"image 0 .*mask 'land' is not among.*classes land, box"):
        goal.tidy(made["other"], learned, {})
    # Earlier versions recorded the numbers alone; who named the classes is known from the settings.
    for name, codes in (("other", {"0": 0, "1": 1}), ("black", {"0": 0, "255": 1})):
        old = Segmentation(goal.model, codes=codes)
        with pytest.raises(DataError, match="is not among"):
            old.encode(made[name])
        old.labels_given = True
        assert np.array_equal(old.encode(made[name])[0]["mask"].values, masks[0]), name


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        (None, [0, 1]), ({"0": 0, "255": 1}, [0, 255]), ({"0": 1, "300": 0}, [300, 0]),
        ({"7": 0, "9": 1, "8": 1, "x": 0}, [7, 8]), ({"0": 0}, [0, 1]), ({"1": 1}, [0, 1]),
        ({"-1": 0, "0": 1}, [0, 1]), ({"0": 0, "70000": 1}, [0, 1]),
    ],
)  # fmt: skip
def test_answers_hold_the_numbers_of_the_masks(
    codes: Any, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = task(codes=codes)
    kind = np.uint16 if max(wanted) > 255 else np.uint8
    assert goal.numbers.tolist() == wanted and goal.numbers.dtype == kind
    images, masks = squares(2)
    answers = [goal.decode([(mask, 0.0)], [None]) for mask in masks]
    answer, share = answers[0]["mask"], answers[0]["share"]
    assert np.array_equal(answer, np.asarray(wanted)[masks[0]])
    assert share == pytest.approx({"ground": 1 - masks[0].mean(), "square": masks[0].mean()})
    monkeypatch.setattr(goal, "predict", lambda table: answers)
    rows = Table("rows", {"image": list(images), "mask": [Mask(mask) for mask in masks]})
    assert [row["score"] for row in goal.pictures(rows, 2)] == [1, 1]
    with RowWriter(tmp_path / "o.jsonl", []) as output:
        output.write({}, answers[0])
    file = tmp_path / "o.jsonl.masks" / "000000.png"
    assert np.array_equal(np.asarray(Image.open(file)), answer)
    if codes and all(str(n) in codes for n in wanted):
        again = goal.encode(goal.read([{"image": images[0], "mask": str(file)}]))
        assert np.array_equal(again[0]["mask"].values, masks[0])


def test_held_out_masks_of_0_and_255_are_remarked_on(place: Path) -> None:
    """255 was the second class in the masks of another source, and all of its pixels were left out in silence."""
    goal = task()
    rows = [
        {"image": np.zeros((16, 16, 3), np.uint8), "mask": np.eye(16, dtype=np.uint8) * n}
        for n in (1, 255)
    ]
    table, read = Table("rows", {key: [row[key] for row in rows] for key in rows[0]}), goal.encode
    assert not read(table).remarks  # another mask has the second class
    (found,) = read(table.take([1])).remarks
    assert "255 have no class" in found and not read(table.take([0])).remarks


def test_a_number_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, masks = squares(6)
    np.savez(tmp_path / "some.npz", images=images, masks=masks, class_names=NAMES)
    goal, asked = task(), list[int]()
    ids = LabelMap.ids
    monkeypatch.setattr(LabelMap, "ids", lambda *a, **b: asked.extend(a[1]) or ids(*a, **b))
    goal.encode(goal.read(tmp_path / "some.npz", name="data"))
    assert sorted(asked) == [0, 1]


def test_what_cannot_be_a_mask_is_named(place: Path, tmp_path: Path) -> None:
    images, masks = squares(3)
    goal = task()
    rows = [{"image": x, "mask": y} for x, y in zip(images, masks, strict=True)]
    with pytest.raises(DataError, match=r"row 2.*16 x 16 .* mask 8 x 16"):
        rows_of(goal, [rows[0], {"image": images[1], "mask": masks[1][:8]}])
    learned = goal.learn(goal.read(rows), {})
    with pytest.raises(DataError, match=r"row 1.* number 9, which stands for no class"):
        goal.tidy(goal.read([{"image": images[0], "mask": masks[0] * np.uint8(9)}]), learned, {})
    with pytest.raises(DataError, match="no file"):
        rows_of(goal, [{"image": images[0], "mask": "nowhere.png"}])
    Image.fromarray(masks[0] * np.uint8(255)).save(tmp_path / "a.jpg")
    coloured = np.zeros((16, 16, 3), np.uint8)
    coloured[4:, :, 1] = 200
    Image.fromarray(coloured).save(tmp_path / "b.png")
    for file, cause in (("a.jpg", "a mask in a lossy format"), ("b.png", "a mask in colours")):
        found = rows_of(goal, [*rows, {"image": images[0], "mask": str(tmp_path / file)}])
        assert found.dropped == {f"broken mask ({cause})": [3]} and len(found) == 3
    with pytest.raises(DataError, match="none of the 1 rows .*JPEG"):
        rows_of(goal, [{"image": images[0], "mask": str(tmp_path / "a.jpg")}])
    assert rows_of(goal, [*rows, {"image": images[0], "mask": None}]).dropped == {"no mask": [3]}
    with pytest.raises(ModelError, match="no segmentation head"):
        pretrain.build("bert", head="segmentation", labels=NAMES)


def test_folders_are_paired_by_name(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, numbers in (("train", (0, 1, 2)), ("val", (3, 4))):
        for kind in ("images", "masks"):
            (tmp_path / part / kind).mkdir(parents=True)
            for k in numbers:
                content = (place / "folder" / kind / f"{k}.png").read_bytes()
                (tmp_path / part / kind / f"{k}.png").write_bytes(content)
    (tmp_path / "train" / "masks" / "2.png").unlink()
    assert Segmentation.parts(tmp_path) == ["train", "valid"]
    assert len(Segmentation.read(tmp_path, name="train")) == 2
    assert "1 images without a mask are left out" in capsys.readouterr().err
    assert len(Segmentation.read(tmp_path, name="validation")) == 2
    nested = tmp_path / "nested"
    for kind in ("images", "masks"):
        (nested / kind / "train").mkdir(parents=True)
        (nested / kind / "train" / "0.png").write_bytes(
            (place / "folder" / kind / "0.png").read_bytes()
        )
    with pytest.raises(DataError, match="train/images and train/masks"):
        Segmentation.read(nested)
    for k in (0, 1):
        (tmp_path / "train" / "masks" / f"{k}.png").rename(
            tmp_path / "train" / "masks" / f"x{k}.png"
        )
    with pytest.raises(DataError, match="no two files of one name"):
        Segmentation.read(tmp_path, name="train")


def test_adapters_and_layer_decay(place: Path, tmp_path: Path) -> None:
    found = pretrain.finetune(
        place / "model", place / "rows.npz", task="segmentation", lora=2, quiet=True,
        out=tmp_path / "run", **SHORT | {"limit": "2 steps"},
    )  # fmt: skip
    image = squares(1)[0][0]
    found.save(tmp_path / "saved")
    opened = pretrain.load(tmp_path / "saved", quiet=True, base=pretrain.load(place / "model"))
    assert np.array_equal(opened.predict(image)["mask"], found.predict(image)["mask"])
    depths = found.model.depths()
    assert {d for name, d in depths.items() if name.startswith("head.")} == {2}
    pretrain.finetune(
        place / "model", place / "rows.npz", task="segmentation", layer_decay=0.5, quiet=True,
        out=tmp_path / "decayed", **SHORT | {"limit": "1 steps"},
    )  # fmt: skip


def test_the_encoder_of_a_masked_autoencoder_gets_the_head(place: Path, tmp_path: Path) -> None:
    sizes = {**TINY, "decoder_hidden_size": 16, "decoder_num_layers": 1, "decoder_num_heads": 2}
    model = pretrain.build("vit_mae", **sizes)
    model.save(tmp_path / "mae")
    for source in (tmp_path / "mae", model):
        found = pretrain.finetune(
            source, place / "rows.npz", task="segmentation", quiet=True,
            out=tmp_path / type(source).__name__, **SHORT | {"limit": "1 steps", "lr": 1e-9},
        )  # fmt: skip
        assert found.model.backbone.model_type == "vit"
        kept = found.model.backbone.layers[0].mlp.up.weight
        assert torch.allclose(kept, model.backbone.layers[0].mlp.up.weight, atol=1e-6)


def test_the_command_line_writes_masks_as_files(tuned: Any, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    words = ["predict", str(place / "tuned"), str(place / "folder" / "images"), "--out", str(out)]
    assert main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 48 and rows[0]["mask"] == "answers.jsonl.masks/000000.png"
    mask = np.asarray(Image.open(tmp_path / rows[5]["mask"]))
    wanted = tuned.predict(place / "folder" / "images")[5]["mask"]
    assert np.array_equal(mask, wanted)
    assert len(tuned.predict(place / "folder")) == 48  # not the masks
    whole = tmp_path / "whole.jsonl"
    assert main(["predict", str(place / "tuned"), str(place / "folder"), "--out", str(whole)]) == 0
    row = json.loads(whole.read_text().splitlines()[5])
    assert row["mask"].endswith("5.png") and row["predicted_mask"] == "whole.jsonl.masks/000005.png"
    assert main(["evaluate", str(place / "tuned"), "--data", str(place / "test.npz")]) == 0


def test_comparison_and_preview(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = pretrain.finetune(
        place / "model", place / "rows.npz", task="segmentation", compare="scratch", seeds=2,
        valid=0.5, quiet=True, out=tmp_path / "run", lrs=[1e-3], **SHORT | {"limit": "2 steps"},
    )  # fmt: skip
    assert set(found.comparison.arms) == {"pretrained", "scratch", "colours"}
    assert any("colours with logistic regression" in line for line in found.remarks)
    shown = str(pretrain.data(place / "rows.npz", "segmentation", place / "model"))
    assert "3 x 16 x 16 values" in shown and "43 train" in shown
    goal = task()
    table = goal.read(place / "rows.npz", name="train")
    table = goal.tidy(table, goal.learn(table, {}), {})
    ((features, classes),) = pixel_features(table, pixels=480)
    assert features.shape == (480, 9) and set(classes) == {0, 1}


def test_the_pixels_of_a_baseline_come_from_all_images() -> None:
    masks = [Mask(np.full((4, 4), int(i >= 20), np.uint8)) for i in range(39)]  # sorted by class
    table = Table("rows", {"image": [np.zeros((4, 4, 3), np.uint8)] * 39, "mask": masks})
    ((_, classes),) = pixel_features(table, images=20)
    assert 0.4 < classes.mean() < 0.6


@pytest.mark.parametrize(("height", "width"), [(16, 16), (19, 22), (17, 33)])
def test_scores_lie_where_their_pixels_are(height: int, width: int) -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    resnet = pretrain.build("resnet", head="segmentation", labels=3, image_size=16, **sizes)
    vit = pretrain.build("vit", head="segmentation", labels=3, **TINY)
    pixels = torch.randn(2, 3, height, width)
    for model in (resnet.eval(), vit.eval()):
        scores = model({"pixel_values": pixels})
        head = model.head
        assert scores.shape[1] == 3
        full = head.to_pixels(scores, height, width)
        assert full.shape == (2, 3, height, width)
        ramp = torch.arange(scores.shape[3]).float().expand(1, 1, *scores.shape[2:])
        middle = head.to_pixels(ramp, height, width)[0, 0, 0]
        inside = slice(4, scores.shape[3] * int(head.cell) - 4)
        places = (torch.arange(width) + 0.5) / head.cell - 0.5
        assert torch.allclose(middle[inside], places[inside][: len(middle[inside])], atol=1e-5)


def test_a_processor_that_crops_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    model = pretrain.build("vit", head="segmentation", labels=NAMES, **TINY)
    model.processor = ImageProcessor("BitImageProcessor", size=20, crop_size=16)
    goal = Segmentation(model)
    assert goal.processor.size == (16, 16) and not goal.processor.settings["do_center_crop"]
    assert "reads whole images" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(9, 7), (31, 26), (4, 40), (9, 20), (500, 7), (1, 1)])
def test_scores_in_bands_of_rows_are_those_of_the_whole(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, 9, 7)
    wanted = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    for limit in (1, 5 * max(7, size[1]) * 3, 1 << 23):  # bands of one row, of three, of all
        monkeypatch.setattr(segmentation, "_BAND", limit)
        bands = list(segmentation.row_bands(scores, *size))
        assert [r for rows, _ in bands for r in range(rows.start, rows.stop)] == [*range(size[0])]
        assert all(band.numel() <= max(limit, 5 * size[1]) for _, band in bands)
        found = torch.cat([band for _, band in bands], 1)
        assert torch.allclose(found, wanted, atol=1e-6, rtol=0)
        assert torch.equal(found.argmax(0), wanted.argmax(0))
    assert size != (9, 7) or torch.equal(found, scores)


class Largest(TorchDispatchMode):
    """Records the most bytes of a tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return found


def test_an_evaluation_of_large_images_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    classes, sizes, limit = 40, ((150, 90), (70, 200), (16, 16)), 1 << 14
    labels = [str(k) for k in range(classes)]
    goal = Segmentation(pretrain.build("vit", head="segmentation", labels=labels, **TINY)).eval()
    rng, rows = np.random.default_rng(0), []
    for size in sizes:
        mask = rng.integers(0, classes, size).astype(np.uint8)
        mask[:3] = 255
        rows.append({"image": rng.integers(0, 255, size, dtype=np.uint8), "mask": mask})
    encoded = rows_of(goal, rows, labels=labels)
    batch = goal.collate([encoded[i] for i in range(3)], [rng] * 3, evaluation=True)
    assert batch["labels"].shape == (3, 150, 200) and batch["labels"].dtype == torch.uint8
    monkeypatch.setattr(segmentation, "_BAND", limit)
    with torch.inference_mode(), Largest() as largest:
        found, answers = goal(batch), goal.outputs(batch)
    pixels = sum(height * width for height, width in sizes)
    assert largest.bytes <= max(4 * limit, batch["labels"].numel()) < 4 * classes * 150 * 90 / 20

    total, matrix = 0.0, np.zeros((classes, classes), np.int64)
    with torch.inference_mode():
        whole = goal.model.head.to_pixels(goal.model(batch).float(), 16, 16)
        for scores, row, (answer, _) in zip(whole, rows, answers, strict=True):
            at = F.interpolate(scores[None], row["mask"].shape, mode="bilinear")[0]
            truth = torch.from_numpy(row["mask"]).long()
            total += float(
                F.cross_entropy(at[None], truth[None], ignore_index=255, reduction="sum")
            )
            said, known = at.argmax(0).numpy(), row["mask"] != 255
            assert np.array_equal(answer, said) and answer.dtype == np.uint8
            matrix += confusion_matrix(row["mask"][known], said[known], classes)
    assert int(found.count) == matrix.sum() == pixels - 3 * (90 + 200 + 16)
    assert float(found.total) == pytest.approx(total, rel=1e-5)
    assert np.array_equal(found.metrics["confusion"].numpy(), matrix)


def test_masks_of_images_of_other_sizes_lie_where_the_classes_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    goal = task()
    cell = int(goal.model.head.cell)

    def by_brightness(batch: Any) -> torch.Tensor:
        bright = F.avg_pool2d(batch["pixel_values"].mean(1, keepdim=True), cell)
        return torch.cat((-bright, bright), 1)

    monkeypatch.setattr(goal.model, "forward", by_brightness)
    rows = []
    # Borders between two places of the map, at a quarter or three of height or width, of tall and wide images.
    for (height, width), part in (
        ((48, 80), np.s_[12:]), ((80, 48), np.s_[:, :12]), ((8, 16), np.s_[:6]),
        ((16, 64), np.s_[:, 48:]), ((16, 16), np.s_[4:]),
    ):  # fmt: skip
        mask = np.zeros((height, width), np.uint8)
        mask[part] = 1
        rows.append({"image": mask * np.uint8(255), "mask": mask})
    encoded = rows_of(goal, rows, labels=list(NAMES))
    batch = goal.collate(
        [encoded[i] for i in range(5)], [np.random.default_rng(0)] * 5, evaluation=True
    )
    for row, (answer, _) in zip(rows, goal.eval().outputs(batch), strict=True):
        assert np.array_equal(answer, row["mask"])
    confusion = goal(batch).metrics["confusion"].numpy()
    assert confusion.trace() == confusion.sum() == sum(row["mask"].size for row in rows)


def test_a_rare_class_is_learnt_within_few_steps(tmp_path: Path) -> None:
    """Scores near zero would take over a hundred steps at this rate to tell anything but the commonest class."""
    for head, wanted in (("segmentation", 32**-0.5), ("object-detection", 0.02)):
        model = pretrain.build("vit", head=head, labels=40, **TINY)
        weight = model.disk_state()["decode_head.classifier.weight"]
        assert weight.shape == (40, 32) and float(weight.std()) == pytest.approx(wanted, rel=0.05)
    images, masks = squares(64, size=(32, 32))  # 6 % of the pixels
    rows = [{"image": x, "mask": m} for x, m in zip(images, masks, strict=True)]
    model = pretrain.build("vit", **TINY | {"image_size": 32})
    result = pretrain.finetune(
        model, rows[16:], "segmentation", valid=rows[:16], labels=list(NAMES), lr=1e-3, crop=1.0,
        limit="15 steps", batch_rows=16, device="cpu", quiet=True, out=tmp_path / "run",
    )  # fmt: skip
    assert result.metrics["loss"] < 0.3


def test_masks_of_one_number_are_counted_by_rows() -> None:
    images, _ = squares(10)
    rows = [{"image": image, "mask": np.zeros((16, 16), np.uint8)} for image in images]
    table = Segmentation.read(rows)
    with pytest.raises(DataError, match="the masks hold the number 0 only"):
        Segmentation.learn(table, {})


@pytest.mark.parametrize("weights", [None, [1.0, 5.0]])
def test_steps_of_masks_and_crops_without_a_class_are_trained_over(
    weights: Any, place: Path, tmp_path: Path
) -> None:
    """With few images in a step, such as large ones, a whole step may have none."""
    images, masks = squares(12)
    masks[:4] = 255
    masks[4:, :, 4:] = 255
    options = {**SHORT, "limit": "12 steps", "batch_rows": 1, "crop": 0.3}
    rows = [{"image": a, "mask": b} for a, b in zip(images, masks, strict=True)]
    found = pretrain.finetune(
        place / "model", rows, task="segmentation", labels=list(NAMES), valid=place / "test.npz",
        class_weights=weights, out=tmp_path / "run", quiet=True, **options,
    )  # fmt: skip
    assert found.run.step == 12 and np.isfinite(found.metrics["loss"])
    goal = task(class_weights=weights)
    encoded = rows_of(goal, rows, labels=list(NAMES))
    goal.augmentation = segmentation.Augmentation(1.0)
    batch = goal.collate([encoded[0], encoded[5]], row_rngs(0, "x", 0, 2))
    known = batch["labels"] != -100
    assert not known[0].any() and known[1].any()
    wanted = batch["weights"].sum() if weights else known.sum()
    assert goal.count(batch) == wanted + 1
    with pytest.raises(DataError, match="all pixels of the masks are 255"):
        rows_of(goal, rows[:4], labels=list(NAMES))


def test_masks_of_classes_that_share_a_name_keep_their_numbers() -> None:
    image, mask = np.zeros((2, 2, 3), np.uint8), np.array([[0, 1], [2, 3]], np.uint8)
    names = ("sky", "door", "door", "sea")
    table = Segmentation.read([{"image": image, "mask": mask}] * 2)
    table.label_names["mask"] = list(names)
    learned = Segmentation.learn(table, {"checkpoint_labels": names})
    assert learned.options["codes"] == {"0": 0, "1": 1, "2": 2, "3": 3}
    tidied = Segmentation.tidy(table, learned, {})
    assert np.array_equal(tidied.columns["mask"][0].values, mask)
    model = pretrain.build("vit", head="segmentation", labels=names, num_channels=3, **TINY)
    answer = Segmentation(model, **learned.options).decode([(mask, 0.5)], [None])
    assert answer["share"] == {"sky": 0.25, "door": 0.5, "sea": 0.25}


@pytest.mark.parametrize("numbers", [[255], [0, 255], [0, 255, 9]])
def test_255_is_a_class_where_the_caller_names_it(numbers: list[int]) -> None:
    mask = np.resize(np.asarray(numbers, np.uint8), (2, 3))
    table = Segmentation.read([{"image": np.zeros((2, 3, 3), np.uint8), "mask": mask}] * 2)
    options = {"labels": {0: "road", 255: "sky", 9: "sea"}}
    learned = Segmentation.learn(table, options)
    assert learned.options["codes"] == {"0": 0, "255": 1, "9": 2} and not learned.notes
    tidied = Segmentation.tidy(table, learned, options).columns["mask"][0].values
    assert np.array_equal(tidied, np.vectorize({0: 0, 255: 1, 9: 2}.get)(mask))
