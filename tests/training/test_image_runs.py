"""Runs and evaluations on rows of images whose classes, sizes or files do not fit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

import pretrain
from pretrain import RowSource
from pretrain.config.spelling import Interface, using
from pretrain.data.images.source import labelled_images
from pretrain.data.loader import row_rngs
from pretrain.errors import ConfigError, DataError
from pretrain.evaluation.language import evaluate
from pretrain.objectives.image_classification import ImageClassification

RNG = np.random.default_rng(0)
NAMES = ["top", "bottom", "left", "right"]
MODEL = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "patch_size": 4}


def stored(path: Path, names: list[str], count: int = 40) -> str:
    images = RNG.integers(0, 256, (count, 8, 8), dtype=np.uint8)
    labels = np.arange(count) % len(names)
    np.savez(path, images=images, labels=labels, class_names=names)
    return str(path)


def sections(source: str, out: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "data": {"source": "images", "source_args": {"train": source}},
        "model": {"family": "vit", "overrides": MODEL},
        "objective": {"class_path": "ImageClassification"},
        "train": {"out": str(out), "limit": "1 steps", "batch_rows": 4},
        "parallel": {"device": "cpu"},
    }
    return found | changes


def test_classes_in_another_order_or_number_are_refused(tmp_path: Path) -> None:
    source = stored(tmp_path / "a.npz", NAMES)
    for k, labels in enumerate((NAMES[::-1], NAMES[:2], [*NAMES, "middle"])):
        model = pretrain.build("vit", head="image-classification", labels=labels, image_size=8, **MODEL)  # fmt: skip
        model.save(tmp_path / f"model-{k}")
        start = {"checkpoint": str(tmp_path / f"model-{k}")}
        with pytest.raises(DataError, match=f"top, bottom, left, right, .*{', '.join(labels)}"):
            pretrain.train(sections(source, tmp_path / f"run-{k}", model=start))
        with pytest.raises(DataError, match=f"top, bottom, left, right, .*{', '.join(labels)}"):
            evaluate(tmp_path / f"model-{k}", labelled_images(source))
    turned = {"source": "images", "source_args": {"train": source, "labels": NAMES[::-1]}}
    start = {"checkpoint": str(tmp_path / "model-0")}
    run = pretrain.train(sections(source, tmp_path / "run", model=start, data=turned))
    assert pretrain.load(run.checkpoint, quiet=True).labels == tuple(NAMES[::-1])
    assert pretrain.evaluate(tmp_path / "run")["targets"] == 4


def test_changed_rows_of_a_run_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = stored(tmp_path / "a.npz", NAMES)
    pretrain.train(sections(source, tmp_path / "run"))
    for count, said in ((None, False), (44, True)):
        if count:
            stored(tmp_path / "a.npz", NAMES, count)
        capsys.readouterr()
        pretrain.evaluate(tmp_path / "run")
        assert ("have changed since the model was trained" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 64}, r"image_size is 64, .* returns 8\. .*data\.source_args\.size=64"),
        ({"num_channels": 1}, r"num_channels is 1, .* returns 3\. .*data\.source_args\.channels=1"),
    ],
)
def test_sizes_that_the_rows_do_not_have_are_refused(
    change: dict[str, int], message: str, tmp_path: Path
) -> None:
    model = {"family": "vit", "overrides": {**MODEL, **change}}
    with pytest.raises(ConfigError, match=message):
        pretrain.train(sections(stored(tmp_path / "a.npz", NAMES), tmp_path / "run", model=model))


def own_rows(**row: Any) -> RowSource:
    """Rows of the user's own, with the processor of a model of 8 x 8 pixels."""
    pixels = (
        {} if "image" in row else {"pixel_values": RNG.normal(0, 1, (3, 8, 8)).astype(np.float32)}
    )
    return RowSource([pixels | row] * 8, overrides={"labels": NAMES, "image_size": 8})


def train_own(out: Path, rows: RowSource, **options: Any) -> pretrain.Run:
    changes = sections(
        "",
        out,
        objective={"class_path": "ImageClassification", "init_args": {"crop": 1.0, **options}},
    )
    return pretrain.train(changes | {"data": {}}, rows=rows)


def test_own_rows_of_pixel_values_are_classified(tmp_path: Path) -> None:
    train_own(tmp_path / "one", own_rows(labels=np.array(3)))
    several = np.array([0.0, 1.0, 1.0, 0.0], np.float32)
    train_own(tmp_path / "many", own_rows(labels=several), problem="multi_label")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({}, {}, "The rows have no labels"),
        ({"labels": np.array(4)}, {}, "must be a whole number from 0 to 3"),
        ({"labels": np.array(1)}, {"problem": "multi_label"}, "must be 4 numbers, 0 or 1"),
        ({"labels": np.array(1)}, {"crop": 0.5}, "Set crop to 1"),
        ({"labels": np.array(1), "pixel_values": np.zeros((3, 8, 8), np.uint8)}, {}, "are uint8"),
    ],
    ids=["none", "beyond", "kind", "crop", "bytes"],
)
def test_own_rows_that_cannot_be_classified_are_refused(
    row: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        train_own(tmp_path / "run", own_rows(**row), **options)


def test_balanced_weights_are_counted_on_the_rows_of_pretraining() -> None:
    model = pretrain.build("vit", head="image-classification", labels=NAMES, image_size=8, **MODEL)
    goal = ImageClassification(model, crop=1.0, class_weights="balanced")
    labels = [0, 0, 0, 1, 2, 3, 3, 1]
    rows = [{**own_rows().train[0], "labels": np.array(k)} for k in labels]
    goal.survey(rows)
    weights = goal.collate(rows, row_rngs(0, "collate", 0, 8))["weights"]
    wanted = [8 / (4 * labels.count(k)) for k in labels]
    assert weights.tolist() == pytest.approx(wanted)


def test_the_next_commands_exist_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pretrain.cli import main as cli

    monkeypatch.chdir(tmp_path)
    stored(tmp_path / "a.npz", NAMES)
    small = {f"decoder_{key}": value for key, value in {**MODEL, "intermediate_size": 32}.items()}
    small = MODEL | {key: value for key, value in small.items() if "patch" not in key}
    mae = {"family": "vit_mae", "overrides": small}
    masked = {"model": mae, "objective": {"class_path": "MaskedImage"}}
    commands: dict[str, list[str]] = {}
    for name, changes in (("vit", {}), ("mae", masked)):
        with using(Interface(command=True)):
            pretrain.train(sections("a.npz", Path(name), **changes))
        said = capfd.readouterr().err.partition("next:\n")[2]
        commands[name] = [line.strip() for line in said.splitlines()]
    assert [line.split()[:3] for line in commands["vit"]] == [
        ["pretrain", "predict", "vit"],
        ["pretrain", "finetune", "--model"],
        ["pretrain", "probe", "vit"],
    ]
    assert [line.split()[1] for line in commands["mae"]] == ["finetune", "probe"]
    for line in [*commands["vit"], *commands["mae"]]:
        words = line.replace("photos", "a.npz").split()[1:]
        if words[0] == "finetune":
            words += ["--train.limit", "1 steps", "--parallel.device", "cpu"]
        assert cli.main(words) == 0, capfd.readouterr().err
