"""Object detection from every form of rows: training, average precision, answers, files, and what is refused."""

from __future__ import annotations

import codecs
import csv
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
from pretrain.config.spelling import EVALUATE, FINETUNE, using
from pretrain.data.images import ImageProcessor
from pretrain.data.images.boxes import BoxTable
from pretrain.data.images.decode import FileItem
from pretrain.data.loader import row_rngs
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.finetuning.measure import labelled
from pretrain.inference.predict import predict_file, task_of
from pretrain.metrics import box_iou, detection_precision, without_overlap
from pretrain.objectives.object_detection import ObjectDetection

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "image_size": 32, "patch_size": 8}
SHORT = {"limit": "120 steps", "lr": 6e-3, "batch_rows": 16, "device": "cpu", "crop": 1.0}
NAMES = ("bright", "dark")


def squares(count: int, seed: int = 0, side: int = 32) -> list[dict[str, Any]]:
    """Grey images of noise with one or two squares, bright or dark, of a quarter to half of a side."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        image = rng.integers(100, 156, (side, side), dtype=np.uint8)
        boxes, labels = [], []
        for part in rng.permutation(2)[: rng.integers(1, 3)]:  # one in each half at most
            size = int(rng.integers(side // 4, side // 2))
            left = int(rng.integers(0, side // 2 - size + 1)) + int(part) * side // 2
            top, k = int(rng.integers(0, side - size + 1)), int(rng.integers(2))
            image[top : top + size, left : left + size] = (230, 20)[k]
            boxes.append([left, top, left + size, top + size])
            labels.append(NAMES[k])
        rows.append({"image": image, "boxes": boxes, "label": labels})
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as a table with one box in a row, a file of COCO and a folder of Pascal VOC; a random model."""
    home = tmp_path_factory.mktemp("boxes")
    lines = ["image,label,xmin,ymin,xmax,ymax"]
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 7, "name": "bright"}, {"id": 3, "name": "dark"}],
    }
    for folder in ("images", "voc/JPEGImages", "voc/Annotations"):
        (home / folder).mkdir(parents=True)
    for i, row in enumerate(squares(6)):
        for folder in ("images", "voc/JPEGImages"):
            Image.fromarray(row["image"]).save(home / folder / f"{i}.png")
        coco["images"].append({"id": 100 + i, "file_name": f"{i}.png"})
        objects = ""
        for box, label in zip(row["boxes"], row["label"], strict=True):
            left, top, right, bottom = box
            lines.append(f"{i}.png,{label},{left},{top},{right},{bottom}")
            coco["annotations"].append(
                {
                    "image_id": 100 + i,
                    "category_id": {"bright": 7, "dark": 3}[label],
                    "bbox": [left, top, right - left, bottom - top],
                }
            )
            sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            inside = "".join(f"<{side}>{x}</{side}>" for side, x in sides)
            objects += f"<object><name>{label}</name><bndbox>{inside}</bndbox></object>"
        text = f"<annotation><filename>{i}.png</filename>{objects}</annotation>"
        (home / "voc" / "Annotations" / f"{i}.xml").write_text(text)
    (home / "linked").mkdir()
    for folder in ("JPEGImages", "Annotations"):
        (home / "linked" / folder).symlink_to(home / "voc" / folder)
    (home / "rows.csv").write_text("\n".join(lines))
    (home / "coco.json").write_text(json.dumps(coco))
    pretrain.build("vit", **TINY).save(home / "model")
    return home


@pytest.fixture(scope="module")
def tuned(place: Path) -> Any:
    return pretrain.finetune(
        place / "model", squares(96), task="object-detection", valid=0.1, quiet=True,
        test=squares(24, seed=1), out=place / "tuned", **SHORT,
    )  # fmt: skip


def task(**options: Any) -> ObjectDetection:
    model = pretrain.build("vit", head="object-detection", labels=NAMES, **TINY)
    return ObjectDetection(model, **options)


def rows_of(goal: ObjectDetection, source: Any, **options: Any) -> Any:
    table = goal.gathered(goal.read(source, name="train"), {})
    learned = goal.learn(table, options)
    return goal.encode(goal.tidy(table, learned, options))


def test_average_precision_of_a_case_that_is_computed_by_hand() -> None:
    truth = [[0, 0, 10, 10, 0], [20, 20, 30, 30, 0]]
    found = [
        [0, 0, 10, 8, 0.9, 0],  # overlap 0.8 with the first
        [50, 50, 60, 60, 0.8, 0],  # nothing there
        [0, 0, 10, 10, 0.7, 0],  # the first again
        [20, 20, 30, 26, 0.6, 0],  # overlap 0.6 with the second
    ]
    # At 0.5: right, wrong, wrong, right. Precision 1 up to recall 0.5 (51 of 101 values), then 2 / 4 (50 values).
    # At 0.7: right, wrong, wrong, wrong: 51 values of 1. At 0.9: wrong, wrong, right, wrong: 51 values of 1 / 3.
    precision = detection_precision([(truth, found)], 2, (0.5, 0.7, 0.9))
    assert precision[:, 0] == pytest.approx([(51 + 50 * 0.5) / 101, 51 / 101, 51 / 3 / 101])
    assert np.isnan(precision[:, 1]).all()  # there is no box of that class
    # Two images count together: a wrong box in the second one comes before the last one of the first.
    both = detection_precision([(truth, found), ([], [[0, 0, 9, 9, 0.65, 0]])], 1, (0.5,))
    assert both[0, 0] == pytest.approx((51 + 50 * 2 / 5) / 101)
    assert detection_precision([(truth, np.zeros((0, 6)))], 1, (0.5,))[0, 0] == 0
    assert box_iou([[0, 0, 2, 2]], [[1, 1, 3, 3], [4, 4, 5, 5]]).tolist() == [[1 / 7, 0]]


def test_boxes_that_overlap_a_better_one_are_left_out() -> None:
    found = np.asarray(
        [
            [0, 0, 10, 10, 0.9, 0],
            [1, 1, 11, 11, 0.8, 0],  # overlap 81 / 119 with the first
            [1, 1, 11, 11, 0.7, 1],  # another class
            [8, 8, 18, 18, 0.6, 0],
        ]
    )
    assert without_overlap(found)[:, 4].tolist() == [0.9, 0.7, 0.6]
    assert without_overlap(found[:0]).shape == (0, 6)


def test_the_contract_of_objectives(tmp_path: Path) -> None:
    rows = rows_of(task(), squares(16))
    check_objective(lambda: task(crop=0.5, flip=True), rows, tmp_path)


def test_a_model_learns_and_answers_in_pixels_of_the_image(tuned: Any, place: Path) -> None:
    assert tuned.test_metrics["ap50"] > 0.6 > 0.3 > tuned.trivial_test["ap50"]
    assert set(tuned.test_metrics) >= {"loss", "ap", "ap50_bright", "ap50_dark"}
    row = squares(1, seed=1)[0]
    large = Image.fromarray(row["image"]).resize((96, 64), 0)
    answer = tuned.predict(large, threshold=0.2)
    overlap = box_iou(np.asarray(row["boxes"]) * [3, 2, 3, 2], answer["box"])
    assert overlap.max(1).min() > 0.5
    assert answer["label"][int(overlap[0].argmax())] == row["label"][0]
    assert answer["score"] == sorted(answer["score"], reverse=True)
    assert tuned.predict(large, threshold=1.0) == {"label": [], "score": [], "box": []}
    with pytest.raises(ConfigError, match="threshold"):
        tuned.predict(large, threshold=2)
    tuned.save(place / "saved")
    opened = pretrain.load(place / "saved", quiet=True)
    assert opened.predict(large, threshold=0.2) == answer


def test_the_report_shows_boxes(tuned: Any) -> None:
    page = tuned.report().read_text()
    assert "a score of at least 0.3." in page
    assert page.count("<img ") == 24 and "bright" in page and "object-detection" in tuned.model.card


def test_the_command_line(tuned: Any, place: Path) -> None:
    out = place / "answers.csv"
    assert main(["predict", str(place / "tuned"), str(place / "images"), "--out", str(out)]) == 0
    assert "predicted_label,score,box" in out.read_text()
    words = ["predict", str(place / "tuned"), str(place / "images"), "--out", str(out)]
    lengths = list[int]()
    for threshold in ("0.1", "1.0"):
        assert main([*words, "--threshold", threshold]) == 0
        lengths.append(len(out.read_text()))
    assert lengths[0] > lengths[1]
    assert main([*words, "--threshold", "2"]) != 0
    assert main(["evaluate", str(place / "tuned"), "--data", str(place / "rows.csv")]) == 0
    assert main(["evaluate", str(place / "tuned"), "--data", str(place / "coco.json")]) == 0


@pytest.mark.parametrize("form", ["xyxy", "xywh"])
def test_files_of_boxes_are_predicted_by_image_and_read_again(
    place: Path, tmp_path: Path, form: str
) -> None:
    goal = task(box_format=form)
    model = goal.model
    model.extra_config["pretrain"] = {"objective": goal.describe()}
    for source in ("coco.json", "voc", "rows.csv"):
        out = predict_file(model, place / source, tmp_path / f"{source}.jsonl", progress=False)
        table = goal.gathered(goal.read(out, name="data"), {})
        assert len(table) == 6 and "predicted_label" in table.names
        examples = goal.encode(goal.tidy(table, goal.learn(table, {}), {"box_format": form}))
        for example, row in zip(examples, squares(6), strict=True):
            assert example["boxes"].tolist() == row["boxes"]


def test_every_form_of_rows_gives_the_same_examples(place: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows, goal = squares(6), task()
    objects = [
        {
            "bbox": [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in row["boxes"]],
            "category": [NAMES.index(label) for label in row["label"]],
        }
        for row in rows
    ]
    box, listed = datasets.Sequence(datasets.Value("float32"), 4), datasets.List

    def frame(kind: Any, other: bool) -> Any:
        """A data set, whose classes may have other numbers."""
        names = datasets.ClassLabel(names=NAMES[::-1] if other else NAMES)
        cells = [{**o, "category": [k ^ other for k in o["category"]]} for o in objects]
        one_each = {"bbox": box, "category": names}
        inner = {"bbox": listed(box), "category": listed(names)} if kind is dict else kind(one_each)
        if kind is listed:
            cells = [
                [{"bbox": b, "category": k} for b, k in zip(c["bbox"], c["category"], strict=True)]
                for c in cells
            ]
        return datasets.Dataset.from_dict(
            {"image": [Image.fromarray(row["image"]) for row in rows], "objects": cells},
            features=datasets.Features({"image": datasets.Image(), "objects": inner}),
        )  # fmt: skip

    frame(dict, True).to_parquet(tmp_path / "rows.parquet")
    wide = [
        {**row, "boxes": [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in row["boxes"]]}
        for row in rows
    ]
    sources: list[tuple[Any, dict[str, Any]]] = [
        (rows, {}), (wide, {"box_format": "xywh"}), (place / "rows.csv", {}),
        (place / "coco.json", {}), (place / "voc", {}), (place / "linked", {}),
        *((frame(k, k is not dict), {"labels": list(NAMES)}) for k in (dict, datasets.Sequence, listed)),
        (tmp_path / "rows.parquet", {"labels": list(NAMES)}),
        # Where the file says what its numbers are, they are not converted a second time.
        *((place / name, {"box_format": "xywh"}) for name in ("rows.csv", "coco.json", "voc")),
    ]  # fmt: skip
    for source, options in sources:
        found = rows_of(goal, source, **options)
        assert len(found) == 6
        for example, row in zip(found, rows, strict=True):
            assert np.array_equal(np.asarray(example["image"]), row["image"])
            assert example["boxes"].tolist() == row["boxes"]
            assert [NAMES[k] for k in example["labels"]] == row["label"]


def test_boxes_of_the_datasets_library_may_be_corners(capsys: pytest.CaptureFixture[str]) -> None:
    """As in fashionpedia; they were read as left, top, width and height whatever box_format said."""
    rows = squares(6)
    listed = [
        {
            "image": row["image"],
            "objects": {
                "bbox": row["boxes"],
                "category": [NAMES.index(label) for label in row["label"]],
            },
        }
        for row in rows
    ]
    goal = task(box_format="xyxy")
    assert goal.describe()["box_format"] == "xyxy" and "box_format" not in task().describe()
    # Earlier versions recorded no box_format for corners, and their runs go on.
    assert goal.same_argument("box_format", None, "xyxy", ())
    assert not goal.same_argument("box_format", None, "xywh", ())
    table = goal.gathered(goal.read(listed), {})
    assert goal.written(table).columns["boxes"] == [row["boxes"] for row in rows]
    told = {"labels": list(NAMES), "box_format": "xyxy"}
    tidied = goal.tidy(table, goal.learn(table, told), told)
    for source in (table, tidied):  # the first as rows that are evaluated later
        found = [example["boxes"].tolist() for example in goal.encode(source)]
        assert found == [row["boxes"] for row in rows]
    swapped = [{**listed[0], "objects": {"bbox": [[9, 9, 3, 3]], "category": [0]}}]
    with (
        pytest.raises(DataError, match="ends before it begins. By the box_format 'xyxy'"),
        using(EVALUATE),
    ):
        goal.encode(goal.gathered(goal.read(swapped), {}))
    # A run of an earlier version read the column as if no format was given, and goes on so.
    record = {"name": "ObjectDetection"}
    begun = {**told, "begun_labels": NAMES, "begun_objective": record}
    extents = [[[x, y, x + r, y + b] for x, y, r, b in row["boxes"]] for row in rows]
    for given, boxes in (
        (begun, extents),
        ({**told, "begun_objective": record}, tidied.columns["boxes"]),
        (begun | {"begun_objective": goal.describe()}, tidied.columns["boxes"]),
    ):
        assert goal.tidy(table, goal.learn(table, given), given).columns["boxes"] == boxes
    earlier = task(box_format="xyxy")
    earlier.continue_from(record)
    assert "box_format" not in earlier.describe()
    coco = BoxTable("a.json", {"image": [rows[0]["image"]]}, categories=NAMES)
    goal.tidy(coco, goal.learn(table, told), told)
    assert "box_format='xyxy' is not used, because COCO" in capsys.readouterr().err


@pytest.mark.parametrize("most", [1, 1.02, 1.9])
def test_shares_that_exceed_one_are_no_pixels(most: float) -> None:
    rows = squares(2)
    shares = [{**r, "boxes": (np.array(r["boxes"]) / 32).tolist()} for r in rows]
    shares[1]["boxes"][0][2:] = [most, most]
    with pytest.raises(DataError, match="shares of the image"):
        rows_of(task(), shares, labels=list(NAMES))
    whole = [{**r, "boxes": [[0, 0, 2, 2]], "label": [r["label"][0]]} for r in rows]
    assert len(rows_of(task(), whole, labels=list(NAMES))) == 2


def test_one_class_in_different_places_is_not_the_same_answer() -> None:
    goal = task()
    places = [
        {"label": ["dark"], "score": [0.9], "box": [[k, 0.0, k + 9.0, 9.0]]} for k in (0.0, 5.0)
    ]
    first, second = map(goal.choices, places)
    assert len(first) == 1 and first != second
    nothing = goal.choices({"label": [], "score": [], "box": []})
    assert nothing == [[]] and goal.choices({}) == []


def test_the_targets_of_the_map(place: Path) -> None:
    goal = task(crop=1.0, flip=True)
    row = {"image": np.full((32, 32), 9, np.uint8), "boxes": [[4, 8, 20, 24]], "label": ["dark"]}
    row["label"], more = ["dark"], {**row, "boxes": [], "label": []}
    rows = rows_of(goal, [row, more, squares(1)[0], {**row, "label": ["bright"]}])
    rngs = row_rngs(0, "x", 0, 1)
    batch = goal.collate([rows[0]], rngs, evaluation=True)
    cell = goal.model.head.cell
    at = [int(16 / cell), int(12 / cell)]
    assert batch["bumps"][0, 1, at[0], at[1]] == 1 and batch["bumps"][0, 0].max() == 0
    assert batch["sides"][0, :, at[0], at[1]].tolist() == [4, 8, 20, 24]
    assert float(batch["weights"].sum()) == pytest.approx(1) and int(goal.count(batch)) == 1
    empty = goal.collate([rows[1]], rngs, evaluation=True)
    assert empty["bumps"].max() == 0 and int(goal.count(empty)) == 1
    goal.eval()
    assert torch.isfinite(goal(empty).total)
    # A perfect map gives the box back, whatever the size of the image.
    scores = torch.full((1, 6, *batch["bumps"].shape[2:]), -9.0)
    scores[0, 1, at[0], at[1]] = 3.0
    middle = [(at[1] + 0.5) * cell, (at[0] + 0.5) * cell]
    scores[0, 2:, at[0], at[1]] = torch.tensor(
        [middle[0] - 4, middle[1] - 8, 20 - middle[0], 24 - middle[1]]
    )
    (found,) = goal._found(scores, {**batch, "sizes": torch.tensor([[64, 96]])})
    assert found[0, :4].tolist() == pytest.approx([12, 16, 60, 48]) and found[0, 5] == 1


def test_the_weights_of_overlapping_objects_sum_to_one() -> None:
    goal = task(crop=1.0)
    boxes = [[0, 0, 32, 32], [12, 12, 20, 20], [10, 8, 30, 26]]
    row = {
        "image": np.zeros((32, 32), np.uint8),
        "boxes": boxes,
        "label": ["dark", "bright", "dark"],
    }
    example = rows_of(goal, [row], labels=list(NAMES))[0]
    batch = goal.collate([example], row_rngs(0, "x", 0, 1), evaluation=True)
    for box in boxes:
        own = (batch["sides"][0] == torch.tensor(box)[:, None, None]).all(0)
        assert float(batch["weights"][0][own].sum()) == pytest.approx(1)


def test_what_cannot_be_boxes_is_named(place: Path, tmp_path: Path) -> None:
    goal, (row, other) = task(), squares(2)
    wrong = [
        ([[5, 5, 3, 9]], ["dark"], "ends before it begins"),
        ([[5, 5, 9]], ["dark"], "four numbers"),
        ([[1, 2, 3, 4]], [], "1 boxes and 0 labels"),
        ("no", ["dark"], "not a list"),
    ]
    for boxes, labels, message in wrong:
        with pytest.raises(DataError, match=f"row 2.*{message}"):
            rows_of(goal, [row, {**other, "boxes": boxes, "label": labels}], labels=list(NAMES))
    shares = [{**r, "boxes": (np.array(r["boxes"]) / 32).tolist()} for r in (row, other)]
    for form in ("xyxy", "xywh"):
        with pytest.raises(DataError, match="shares of the image.*Multiply"):
            rows_of(goal, shares, labels=list(NAMES), box_format=form)
    outside = {**other, "boxes": [[20, 20, 40, 30], [7, 7, 7, 9]], "label": ["dark", "dark"]}
    found = rows_of(goal, [row, outside], labels=list(NAMES))
    assert found[1]["boxes"].tolist() == [[20, 20, 32, 30]]
    assert len(found.remarks) == 2
    xml = place / "voc" / "Annotations" / "0.xml"
    (tmp_path / "0.xml").write_text("<!DOCTYPE a>" + xml.read_text())
    with pytest.raises(DataError, match="document type"):
        goal.read(tmp_path)
    coco = json.loads((place / "coco.json").read_text())
    coco["annotations"][0]["category_id"] = 99
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match="99 is missing"):
        goal.read(tmp_path / "coco.json")
    whole = json.dumps(coco)
    for length in (
        200,
        len(whole) // 2,
        len(whole) - 1,
    ):  # also in a folder, where other files might do
        (tmp_path / "coco.json").write_text(whole[:length])
        for source in (tmp_path, tmp_path / "coco.json"):
            with pytest.raises(DataError, match="coco.json.*damaged or cut off"):
                goal.read(source)


def test_an_answer_that_is_not_a_number_is_an_error() -> None:
    goal = task()
    table = goal.read(squares(2), name="data")
    with torch.no_grad():
        next(goal.model.head.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match=r"row 1.*not a number"):
        list(goal.predict(goal.tidy(table, goal.learn(table, {}), {})))


def test_the_only_class_is_the_one_that_is_named() -> None:
    def table_of(*labels: Any) -> Any:
        rows = squares(len(labels))
        return ObjectDetection.read(
            [{**r, "label": [k] * len(r["boxes"])} for r, k in zip(rows, labels, strict=True)]
        )

    def learned(labels: Any, *found: Any) -> list[str]:
        table = table_of(*found)
        known = ObjectDetection.learn(table, {"labels": labels})
        tidied = ObjectDetection.tidy(table, known, {})
        assert known.labels is not None and len(known.labels) == 1
        assert {name for row in tidied.columns["label"] for name in row} == set(known.labels)
        return list(known.labels)

    assert learned(None, "dog") == ["dog"]
    assert learned(["cat"], "cat") == ["cat"]
    assert learned(["cat"], 0) == learned(["cat"], 1) == ["cat"]
    assert learned({"1": "cat"}, 1) == ["cat"]
    for found in (("dog",), ("cat", "dog"), (0, 1)):
        with pytest.raises(DataError, match="is not among .* cat"):
            learned(["cat"], *found)


def test_an_annotation_of_pascal_voc_belongs_to_the_image_beside_it(tmp_path: Path) -> None:
    def put(folder: str, name: str = "001.png", label: str = "") -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / folder / name)
        if label:
            box = "".join(f"<{s}>{k}</{s}>" for k, s in enumerate(("xmin", "ymin", "xmax", "ymax")))
            (tmp_path / folder / "001.xml").write_text(
                f"<annotation><filename>001.png</filename><object><name>{label}</name>"
                f"<bndbox>{box}</bndbox></object></annotation>"
            )

    put("voc/a", label="cat")
    put("voc/b", label="dog")
    put("voc/c", "001.jpg", label="fox")  # of another ending than the annotation says
    found = ObjectDetection.read(tmp_path / "voc", name="train").columns
    pairs = [
        (str(image).removeprefix(f"{tmp_path}/voc/"), labels)
        for image, labels in zip(found["image"], found["label"], strict=True)
    ]
    assert pairs == [("a/001.png", ["cat"]), ("b/001.png", ["dog"]), ("c/001.jpg", ["fox"])]
    put("far/x")
    put("far/y")
    put("far/notes", "other.png", label="cat")
    with pytest.raises(DataError, match=r"notes/001\.xml: its image may be .*x/001\.png or .*y/"):
        ObjectDetection.read(tmp_path / "far", name="train")


def test_a_wrong_box_of_coco_is_named_in_the_numbers_of_its_file(
    place: Path, tmp_path: Path
) -> None:
    coco = json.loads((place / "coco.json").read_text())
    coco["annotations"][0]["bbox"] = [10, 12, -4, 5]
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    table = ObjectDetection.read(tmp_path / "coco.json")
    said = r"the box \[10\.0, 12\.0, -4\.0, 5\.0\] ends .*left, top, width, height; correct the box"
    with pytest.raises(DataError, match=said):
        ObjectDetection.tidy(table, ObjectDetection.learn(table, {}), {})


def test_ids_of_coco_stand_for_one_image_and_one_class(place: Path, tmp_path: Path) -> None:
    for part, key in (("images", "file_name"), ("categories", "name")):
        coco = json.loads((place / "coco.json").read_text())
        coco[part].append({**coco[part][0], key: "another"})
        (file := tmp_path / "coco.json").write_text(json.dumps(coco))
        with pytest.raises(DataError, match=f"stands for two {part}, .*'another'"):
            ObjectDetection.read(file)


def test_a_file_of_coco_may_begin_with_a_byte_order_mark(place: Path, tmp_path: Path) -> None:
    content = (place / "coco.json").read_bytes()
    (file := tmp_path / "coco.json").write_bytes(codecs.BOM_UTF8 + content)
    found, wanted = ObjectDetection.read(file), ObjectDetection.read(place / "coco.json")
    assert found.columns["boxes"] == wanted.columns["boxes"] and len(found) == len(wanted)


@pytest.mark.parametrize("first", [False, True])
def test_the_boxes_of_one_file_of_coco_under_several_ids_stand_together(
    first: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each id was a row, in which the boxes of the others were background."""
    content = json.loads((place / "coco.json").read_text())
    rows = len(content["images"])
    image, box = content["images"][0], content["annotations"][0]
    assert box["image_id"] == image["id"]
    content["images"].append({**image, "id": "again"})
    at = 0 if first else len(content["annotations"])
    content["annotations"][at:at] = [
        {**box, "image_id": "again"},
        {**box, "image_id": "again", "bbox": [1, 2, 3, 4]},
    ]
    shutil.copytree(place, tmp_path / "copy")
    (tmp_path / "copy" / "coco.json").write_text(json.dumps(content))
    before, table = (
        ObjectDetection.read(folder / "coco.json") for folder in (place, tmp_path / "copy")
    )
    assert len(table) == rows and table.columns["image"] == before.columns["image"]
    assert sorted(table.columns["boxes"][0]) == sorted([*before.columns["boxes"][0], [1, 2, 4, 6]])
    assert table.columns["boxes"][1:] == before.columns["boxes"][1:]
    assert "1 images are listed again under another id" in capsys.readouterr().err


def test_a_category_of_coco_without_a_box_is_a_class(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "images", tmp_path / "images")
    content = json.loads((place / "coco.json").read_text())
    content["categories"].append({"id": 1, "name": "cat"})
    (tmp_path / "coco.json").write_text(json.dumps(content))
    table = ObjectDetection.gathered(ObjectDetection.read(tmp_path / "coco.json"), {}).take([1, 0])
    known = ObjectDetection.learn(table, {})
    assert known.labels == ("bright", "cat", "dark") and known.strata is not None
    assert len(known.strata) == 2
    # They may be many, beside which the boxes are few.
    content["categories"] += [{"id": 100 + k, "name": f"class {k}"} for k in range(1200)]
    (tmp_path / "many.json").write_text(json.dumps(content))
    many = ObjectDetection.gathered(ObjectDetection.read(tmp_path / "many.json"), {})
    assert len(ObjectDetection.learn(many, {}).labels or ()) == 1203
    # A run that an earlier version began without it keeps its classes.
    for chosen in ({"labels": list(NAMES)}, {"begun_labels": NAMES}):
        assert ObjectDetection.learn(table, chosen).labels == NAMES


def test_boxes_may_be_arrays_and_json(tmp_path: Path) -> None:
    goal, rows = task(), squares(4)
    Image.fromarray(rows[0]["image"]).save(tmp_path / "a.png")
    arrays = [{**r, "boxes": np.array(r["boxes"]), "label": np.array(r["label"])} for r in rows]
    tensors = [{**r, "boxes": torch.tensor(r["boxes"])} for r in rows]
    for source in (arrays, tensors):
        found = rows_of(goal, source)
        assert [one["boxes"].tolist() for one in found] == [r["boxes"] for r in rows]
    (tmp_path / "lines.json").write_text(
        "".join(
            json.dumps({"image": "a.png", "boxes": r["boxes"], "label": r["label"]}) + "\n"
            for r in rows
        )
    )
    found = rows_of(goal, tmp_path / "lines.json")
    assert [one["boxes"].tolist() for one in found] == [r["boxes"] for r in rows]
    with open(tmp_path / "objects.csv", "w", newline="") as file:
        objects = {"bbox": [[1, 2, 3, 4]], "category": ["dark"]}
        cells = [json.dumps(objects), json.dumps([{"bbox": [1, 2, 3, 4], "category": "dark"}]), ""]
        csv.writer(file).writerows([["image", "objects"], *(["a.png", cell] for cell in cells)])
    found = rows_of(goal, tmp_path / "objects.csv", labels=list(NAMES))
    assert [one["boxes"].tolist() for one in found] == [[[1, 2, 4, 6]], [[1, 2, 4, 6]], []]
    for write in (str, json.dumps):
        with open(tmp_path / "printed.csv", "w", newline="") as file:
            lines = [["a.png", write(r["boxes"]), write(r["label"])] for r in rows]
            csv.writer(file).writerows([["image", "boxes", "label"], *lines, ["a.png", "[]", ""]])
        found = rows_of(goal, tmp_path / "printed.csv", labels=list(NAMES))
        assert [one["boxes"].tolist() for one in found] == [*(r["boxes"] for r in rows), []]


@pytest.mark.parametrize(
    "cell",
    [
        str, Path, Path.read_bytes, lambda path: {"bytes": path.read_bytes(), "path": None},
        lambda path: {"bytes": None, "path": str(path)}, lambda path: np.asarray(Image.open(path)), Image.open,
    ],
)  # fmt: skip
def test_rows_with_one_box_each_are_gathered_by_image_in_every_form(place: Path, cell: Any) -> None:
    with open(place / "rows.csv", newline="") as file:
        lines = [*csv.DictReader(file)]
    rows = [{**line, "image": cell(place / "images" / line["image"])} for line in lines]
    found = rows_of(task(), rows)
    assert [one["boxes"].tolist() for one in found] == [row["boxes"] for row in squares(6)]


@pytest.mark.parametrize("cell", [bytes, np.array, Image.fromarray])
def test_one_object_in_many_rows_is_read_once(cell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    array, read = np.arange(1024, dtype=np.uint8).reshape(32, 32), []
    cells = [cell(array), cell(array), cell(array[::-1])]  # two that are equal, and another one
    digest = FileItem.digest.func
    monkeypatch.setattr(
        FileItem, "digest", property(lambda item: read.append(item) or digest(item))
    )
    sides = dict(zip(("xmin", "ymin", "xmax", "ymax"), (1, 2, 3, 4), strict=True))
    rows = [{"image": cells[k % 3], "label": "dark", **sides} for k in range(12)]
    table = ObjectDetection.gathered(ObjectDetection.read(rows), {})
    assert [len(boxes) for boxes in table.columns["boxes"]] == [8, 4] and len(read) == 3


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [None], "category": ["dark"]}, "four numbers"),
        ({"bbox": ["1234"], "category": ["dark"]}, "four numbers"),
        ({"bbox": [[9, 9, -3, 3]], "category": ["dark"]}, "source says .* height; correct the box"),
        ({"bbox": 3, "category": ["dark"]}, "objects is .*Expected is a mapping"),
        ({"other": []}, "objects is .*Expected is a mapping"),
        (["dark"], "objects is .*Expected is a mapping"),
        ("{'bbox': []}", "objects is .*Expected is a mapping"),
        ({"bbox": None, "category": None}, ""),
        ({}, ""),
    ],
)
def test_objects_that_are_none_are_named(objects: Any, message: str) -> None:
    image = np.zeros((32, 32), np.uint8)
    good = {"image": image, "objects": {"bbox": [[1, 2, 3, 4]], "category": ["dark"]}}
    source = [good, {"image": image, "objects": objects}]
    if message:
        with pytest.raises(DataError, match=f"row 2.*{message}"):
            rows_of(task(), source, labels=list(NAMES))
    else:
        assert rows_of(task(), source, labels=list(NAMES))[1]["boxes"].tolist() == []


def test_adapters_one_class_and_other_families(place: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": ["thing"] * len(row["label"])} for row in squares(12)]
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    resnet = pretrain.build("resnet", image_size=32, **sizes)
    resnet.processor = ImageProcessor("ConvNextImageProcessor", size={"shortest_edge": 32})
    for model, options in ((resnet, {}), (place / "model", {"lora": 2})):
        found = pretrain.finetune(
            model, rows, task="object-detection", quiet=True, out=tmp_path / f"run{len(options)}",
            **SHORT | {"limit": "2 steps"}, **options,
        )  # fmt: skip
        assert found.labels == ("thing",) and "ap50_thing" in found.metrics
        answer = found.predict(rows[0]["image"], threshold=0.01)
        found.save(tmp_path / f"saved{len(options)}")
        base = {"base": pretrain.load(place / "model")} if options else {}
        opened = pretrain.load(tmp_path / f"saved{len(options)}", quiet=True, **base)
        assert opened.predict(rows[0]["image"], threshold=0.01) == answer


def test_boxes_in_images_of_other_sizes_lie_where_the_objects_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    goal = task()
    cell = goal.model.head.cell

    def by_brightness(batch: Any) -> torch.Tensor:
        pixels = batch["pixel_values"].mean(1)
        maps = torch.full((len(pixels), 6, *goal.model.head.places(*pixels.shape[1:])), -9.0)
        for scores, image in zip(maps, pixels, strict=True):
            y, x = (image > 0).nonzero(as_tuple=True)
            left, top, right, bottom = (
                int(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)
            )
            at = int((top + bottom) / 2 / cell), int((left + right) / 2 / cell)
            middle = (at[0] + 0.5) * cell, (at[1] + 0.5) * cell
            sides = middle[1] - left, middle[0] - top, right - middle[1], bottom - middle[0]
            scores[0, at[0], at[1]] = 3.0
            scores[2:, at[0], at[1]] = torch.tensor(sides)
        return maps

    monkeypatch.setattr(goal.model, "forward", by_brightness)
    rows = []
    for (height, width), box in (
        ((64, 96), [24, 16, 60, 48]), ((96, 64), [2, 60, 30, 96]), ((16, 8), [0, 2, 4, 10]),
        ((32, 32), [3, 8, 20, 27]),
    ):  # fmt: skip
        image = np.zeros((height, width), np.uint8)
        image[box[1] : box[3], box[0] : box[2]] = 255
        rows.append({"image": image, "boxes": [box], "label": ["bright"]})
    encoded = rows_of(goal, rows, labels=list(NAMES))
    batch = goal.collate([encoded[i] for i in range(4)], row_rngs(0, "x", 0, 4), evaluation=True)
    goal.eval()
    for row, found in zip(rows, goal.outputs(batch), strict=True):
        answer = goal.decode([found], [None])
        assert answer["label"] == ["bright"] and answer["box"][0] == pytest.approx(row["boxes"][0])
    figures = goal.summarize(1.0, 1.0, goal(batch).metrics, {})
    assert figures["ap50_bright"] == figures["ap"] == pytest.approx(1)


@pytest.mark.parametrize("form", ["coco", "csv"])
def test_images_in_a_folder_beside_a_relative_file(
    form: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.parent)
    name = {"coco": "coco.json", "csv": "rows.csv"}[form]
    rows = rows_of(task(), f"{place.name}/{name}")
    assert len(rows) == 6 and not rows.dropped


@pytest.mark.parametrize("form", ["coco", "voc", "csv"])
@pytest.mark.parametrize("size", [(32, 32), (16, 32), (0, 0)])
def test_a_size_that_an_annotation_states_must_be_that_of_the_image(
    form: str, size: tuple[int, int], place: Path, tmp_path: Path
) -> None:
    """Boxes of another size or orientation lie elsewhere, and nothing else would show it."""
    width, height = size
    shutil.copytree(place / "images", tmp_path / "images")
    if form == "coco":
        content = json.loads((place / "coco.json").read_text())
        for one in content["images"]:
            one |= {"width": width, "height": height}
        source = tmp_path / "coco.json"
        source.write_text(json.dumps(content))
    elif form == "csv":
        lines = (place / "rows.csv").read_text().split("\n")
        source = tmp_path / "rows.csv"
        source.write_text(
            "\n".join([f"{lines[0]},width,height", *(f"{x},{width},{height}" for x in lines[1:])])
        )
    else:
        source = tmp_path / "voc"
        shutil.copytree(place / "voc", source)
        stated = f"<size><width>{width}</width><height>{height}</height></size></annotation>"
        for file in (source / "Annotations").iterdir():
            file.write_text(file.read_text().replace("</annotation>", stated))

    def tune() -> Any:
        return pretrain.finetune(
            pretrain.build("vit", **TINY), source, task="object-detection", valid=0.3, quiet=True,
            limit="1 steps", device="cpu", out=tmp_path / "run",
        )  # fmt: skip

    if size == (16, 32) and form != "csv":
        with pytest.raises(DataError, match=r"an image of 16 x 32 pixels"):
            tune()
    else:  # columns of a table that do not hold the boxes are not those of the image
        assert tune().data.counts["train"] >= 4


def test_row_options_are_keywords_as_the_messages_say(tmp_path: Path) -> None:
    rows = [
        {
            **row,
            "boxes": [[a, b, c - a, d - b] for a, b, c, d in row["boxes"]],
            "corners": row["boxes"],
        }
        for row in squares(12)
    ]
    options = {
        "task": "object-detection",
        "valid": 0.25,
        "limit": "1 steps",
        "device": "cpu",
        "quiet": True,
    }
    model = pretrain.build("vit", **TINY)
    result = pretrain.finetune(model, rows, box_format="xywh", out=tmp_path / "run", **options)
    whole = np.concatenate([example["boxes"] for example in result.task.encode(result.data.train)])
    assert (whole[:, 2:] > whole[:, :2]).all() and whole.max() > 20
    reopened = task_of(pretrain.load(tmp_path / "run", quiet=True))
    told, swapped = (
        ObjectDetection(reopened.model),
        {**rows[0], "boxes": [[9, 9, 3, 3]], "label": ["dark"]},
    )
    with (
        using(EVALUATE),
        pytest.raises(DataError, match="records no box_format, so left, top, right, bottom"),
    ):
        told.encode(labelled([swapped], told, {}))  # evaluate has no such option
    for asked in (EVALUATE, FINETUNE):
        swapped["boxes"] = [[9, 9, -3, 3]]
        with (
            using(asked),
            pytest.raises(DataError, match="'xywh' boxes are left, top, width, height"),
        ):
            reopened.encode(labelled([swapped], reopened, {}))
    for task in (result.task, reopened):  # further rows are read in the same way
        found = [example["boxes"] for example in task.encode(labelled(rows, task, {}))]
        assert all((a == row["corners"]).all() for a, row in zip(found, rows, strict=True))
