"""Frozen features against scikit-learn: linear probe, nearest neighbours, nearest class means, draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

pytest.importorskip("PIL")

import pretrain
import tiny
from pretrain import metrics
from pretrain.cli.main import main
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.evaluation.probe import METHODS, image_vectors
from pretrain.models import build
from pretrain.models.base import Model

SIZES: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "initializer_range": 0.3,
}


NARROW: dict[str, Any] = {"hidden_sizes": (4, 8), "depths": (1, 1), "layer_type": "basic"}


def pictures(count: int, seed: int, classes: int = 3) -> dict[str, Any]:
    """Noise, with one brighter row of pixels by class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.integers(0, 160, (count, 8, 8)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label] += 60
    return {"image": list(images), "label": [f"c{label}" for label in labels]}


@pytest.fixture(scope="module")
def model() -> Model:
    return build("vit", None, seed=1, **SIZES)


@pytest.fixture(scope="module")
def parts(model: Model) -> list[tuple[Any, Any]]:
    """Features and labels of training, validation and test rows."""
    tables = [pictures(count, seed) for seed, count in enumerate((60, 30, 45))]
    return [(image_vectors(model, t["image"]).numpy(), np.array(t["label"])) for t in tables]


def asked(model: Any, **options: Any) -> dict[str, float]:
    train, valid, test = (pictures(count, seed) for seed, count in enumerate((60, 30, 45)))
    return pretrain.probe(model, train, valid=valid, test=test, **options)


def test_columns_are_keywords_as_in_finetune(model: Model) -> None:
    rows = {"photo" if k == "image" else "kind": v for k, v in pictures(45, 0).items()}
    given = {"image": "photo", "label": "kind"}
    found = pretrain.probe(model, rows, method="knn", **given)
    assert found == pretrain.probe(model, rows, method="knn", columns=given)
    for wrong, right in (("lable", "label"), ("shot", "shots"), ("epochs", "")):
        with pytest.raises(ConfigError, match=f"{wrong} is no column .*{right}"):
            pretrain.probe(model, rows, **{wrong: "kind"})


@pytest.mark.parametrize("in_columns", [True, False])
def test_options_that_say_how_rows_are_read(model: Model, in_columns: bool) -> None:
    def ask(cells: list[str] | None = None, **options: Any) -> dict[str, float]:
        rows = pictures(45, 0)
        if cells is not None:
            rows["label"] = [cells[int(k[1:]) % len(cells)] for k in rows["label"]]
        rows["person"] = [i // 3 for i in range(45)]
        given: Any = {"columns": options} if in_columns else options
        return pretrain.probe(model, rows, method="knn", **given)

    pairs = ask(["a", "b"])
    assert ask(["1 0", "0 1"]) == pairs
    for told in ({"label_separator": ""}, {"problem": "single_label"}):
        for cells in (["1 0", "0 1"], ["1,0", "0,1"], ["1,5", "2,5"]):
            assert ask(cells, **told)["majority"] == pairs["majority"]
    assert ask(labels=["c0", "c1", "c2"]) == ask() and ask(group="person")["targets"] == 8
    for cells in (["1,0", "0,1"], ["1,5", "2,5"], ["1.5", "2.5"]):
        with pytest.raises(DataError) as error:
            ask(cells)
        assert "task" not in str(error.value)
        assert ("label_separator=''" in str(error.value)) == ("," in cells[0])


def test_vectors_are_what_the_classifier_reads(model: Model) -> None:
    images = pictures(5, 0)["image"]
    hidden = model.backbone(model.processor(images))
    first, mean = hidden[:, 0], hidden[:, 1:].mean(1)
    assert np.allclose(image_vectors(model, images, batch_rows=2), first.detach(), atol=1e-6)
    assert np.allclose(image_vectors(model, images, pooling="mean"), mean.detach(), atol=1e-6)
    averaged = build("vit", None, seed=1, pooling="mean", **SIZES)
    assert np.allclose(image_vectors(averaged, images), mean.detach(), atol=1e-6)
    convolutions = build("resnet", image_size=32, num_channels=1, **NARROW).eval()
    hidden = convolutions.backbone(convolutions.processor(images))
    assert np.allclose(image_vectors(convolutions, images), hidden.mean(1).detach(), atol=1e-5)
    with pytest.raises(ModelError, match="no class token"):
        image_vectors(convolutions, images, pooling="first")
    towers = build("clip", vocab_size=9, eos_id=3, **(SIZES | {"num_channels": 3})).eval()
    wanted = towers.backbone.image_vectors(towers.processor.images(images)["pixel_values"])
    assert np.allclose(image_vectors(towers, images), wanted.detach(), atol=1e-5)
    with pytest.raises(ModelError, match="vectors of its own.*pooling"):
        image_vectors(towers, images, pooling="mean")


def test_a_linear_probe_is_that_of_scikit_learn(model: Model, parts: Any) -> None:
    (x, y), (x_valid, y_valid), (x_test, y_test) = parts
    scaler = StandardScaler().fit(x)
    tried = []
    for strength in (0.001, 0.01, 0.1, 1.0, 10.0):
        regression = LogisticRegression(C=strength, max_iter=1000).fit(scaler.transform(x), y)
        tried.append((regression.score(scaler.transform(x_valid), y_valid), -strength, regression))
    score, strength, best = max(tried, key=lambda one: one[:2])
    assert asked(model) == {
        "accuracy": pytest.approx(best.score(scaler.transform(x_test), y_test)),
        "valid": pytest.approx(score),
        "C": -strength,
        "majority": pytest.approx(1 / 3),
        "rows": 60,
        "targets": 45,
    }


def test_a_linear_probe_of_few_shots_reads_no_other_labels(model: Model, parts: Any) -> None:
    (x, y), _, (x_test, y_test) = parts
    scaler = StandardScaler().fit(x)
    regression = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(x), y)
    found = asked(model, shots=20, draws=2)  # all rows of every class
    assert found["accuracy"] == pytest.approx(regression.score(scaler.transform(x_test), y_test))
    assert found["C"] == 1 and found["std"] == 0 and "valid" not in found
    other = pictures(30, 1)
    train, test = pictures(60, 0), pictures(45, 2)
    for valid in (0, {**other, "label": other["label"][1:] + other["label"][:1]}):
        assert pretrain.probe(model, train, valid=valid, test=test, shots=20, draws=2) == found


def test_rows_to_choose_on_are_needed_for_c_alone(model: Model) -> None:
    train, test = pictures(60, 0), pictures(45, 2)
    for method in ("knn", "means"):
        found = pretrain.probe(model, train, valid=0, test=test, method=method)
        assert found == asked(model, method=method)
    with pytest.raises(DataError, match=r"choose C.*valid.*ways"):
        pretrain.probe(model, train, valid=0, test=test)
    labels = [f"c{i % 20}" for i in range(60)]
    many, test = ({**pictures(60, i), "label": labels} for i in (0, 2))
    with pytest.raises(DataError, match=r"choose C.*valid.*ways"):
        pretrain.probe(model, many, test=test, ways=2)
    assert pretrain.probe(model, many, test=test, ways=2, shots=1)["rows"] == 2


def test_several_labels_of_a_row_are_refused_before_the_features(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.evaluation.probe.image_vectors", None)
    rows = pictures(60, 0)
    several = {**rows, "label": [["a", "b"] if i % 2 else ["a"] for i in range(60)]}
    labels = (np.random.default_rng(0).random((60, 3)) < 0.5).astype(int)
    np.savez(tmp_path / "a.npz", images=np.stack(rows["image"]), labels=labels)
    for source in (several, str(tmp_path / "a.npz")):
        with pytest.raises(DataError, match="several at once.*one class"):
            pretrain.probe(model, source)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["names", "numbers", "digits"])
def test_rows_of_several_sources_are_compared_by_the_names_of_their_classes(
    model: Model, tmp_path: Path, method: str, form: str
) -> None:
    """Whatever numbers a source gives the classes, and in whatever type it holds them."""
    parts = [pictures(count, seed) for seed, count in enumerate((60, 30, 45))]
    sources: list[Any] = []
    for k, (rows, names) in enumerate(
        zip(parts, ("c0 c1 c2", "c2 c0 c1", "c1 c2 c0"), strict=True)
    ):
        numbers = [int(label[1]) for label in rows["label"]]
        order = names.split() if form == "names" else [str(n) for n in range(3)]
        at = [order.index(f"c{n}") if form == "names" else n for n in numbers]
        held = {"class_names": np.array(order)} if form == "names" else {}
        np.savez(tmp_path / f"{k}.npz", images=np.stack(rows["image"]), labels=np.array(at), **held)
        written = {**rows, "label": list(map(str, numbers))}
        sources.append(written if form == "digits" and k else str(tmp_path / f"{k}.npz"))
    train, valid, test = sources
    found = pretrain.probe(model, train, valid=valid, test=test, method=method)
    assert found == asked(model, method=method)


@pytest.mark.parametrize("k", [1, 7])
def test_neighbours_are_those_of_scikit_learn(model: Model, parts: Any, k: int) -> None:
    (x, y), _, (x_test, y_test) = parts
    neighbours = KNeighborsClassifier(k, metric="cosine").fit(x, y)
    assert asked(model, method="knn", k=k)["accuracy"] == neighbours.score(x_test, y_test)


def test_means_are_the_nearest_by_cosine(model: Model, parts: Any) -> None:
    (x, y), _, (x_test, y_test) = parts
    means = np.stack([normalize(x)[y == c].mean(0) for c in ("c0", "c1", "c2")])
    answers = (normalize(x_test) @ normalize(means).T).argmax(1)
    right = float(np.mean([f"c{a}" for a in answers] == y_test))
    assert asked(model, method="means")["accuracy"] == pytest.approx(right)


def test_draws_of_shots_and_ways(model: Model) -> None:
    found = asked(model, method="means", shots=2, ways=2, draws=4)
    assert (found["rows"], found["targets"], found["draws"]) == (4, 30, 4)
    assert found["low"] <= found["accuracy"] <= found["high"] and found["majority"] == 0.5
    assert found == asked(model, method="means", shots=2, ways=2, draws=4)
    assert found != asked(model, method="means", shots=2, ways=2, draws=4, seed=1)
    every = asked(model, method="means", shots=20, draws=2)  # all rows of every class
    assert every["std"] == 0 and every["accuracy"] == asked(model, method="means")["accuracy"]
    ones = [asked(model, method="knn", k=1, shots=3, draws=n)["accuracy"] for n in (1, 2, 3)]
    three = [
        ones[0],
        2 * ones[1] - ones[0],
        3 * ones[2] - 2 * ones[1],
    ]  # draws go on where they were
    mean, low, high = metrics.mean_interval(three)
    found = asked(model, method="knn", k=1, shots=3, draws=3)
    assert [found[key] for key in ("accuracy", "low", "high")] == pytest.approx([mean, low, high])


def test_rows_of_one_source_are_divided(model: Model, tmp_path: Path, capsys: Any) -> None:
    found = pretrain.probe(model, pictures(60, 3), method="knn")
    assert (found["rows"], found["targets"]) == (
        43,
        11,
    )  # a tenth to choose on, a fifth of the rest
    rows = pictures(60, 3)
    rows["image"][4] = rows["image"][7] = np.zeros((8, 8, 7), np.uint8)
    assert pretrain.probe(model, rows, method="knn")["rows"] <= 43
    assert "rows are left out: broken image" in capsys.readouterr().err
    model.save(tmp_path / "vit")
    kinds = {"train": pictures(30, 0), "test": pictures(12, 1)}
    arrays = {f"{part}_images": np.stack(rows["image"]) for part, rows in kinds.items()}
    arrays |= {f"{part}_labels": np.array(rows["label"]) for part, rows in kinds.items()}
    np.savez(tmp_path / "rows.npz", **arrays)
    words = [str(tmp_path / "vit"), str(tmp_path / "rows.npz"), "--method", "means", "--json"]
    assert main(["probe", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == pretrain.probe(tmp_path / "vit", str(tmp_path / "rows.npz"), method="means")
    assert (shown["rows"], shown["targets"]) == (27, 12)
    assert main(["probe", *words, "--columns.labels", "[c2, c1, c0]"]) == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_texts_and_pairs_of_texts() -> None:
    bert = tiny.objective("MaskedLM").model
    rows = [{"text": text, "label": str(" cat " in text)} for text in tiny.TEXTS]
    assert 0 <= pretrain.probe(bert, rows, method="knn", k=1)["accuracy"] <= 1
    twice = [{**row, "pair": row["text"][::-1]} for row in rows]
    assert pretrain.probe(bert, twice, method="means", shots=1)["rows"] == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "lineer"}, ConfigError, "method is 'lineer'.*linear"),
        ({"shots": 0}, ConfigError, "shots is 0"),
        ({"ways": 9}, ConfigError, "ways is 9, and the rows have 3 classes"),
        ({"shots": 21}, DataError, "has 20 rows with labels, fewer than shots=21"),
        ({"method": "knn", "k": 61}, ConfigError, "k is 61, more than the 60 rows"),
        ({"pooling": "max"}, ModelError, "it must be mean or first"),
    ],
)
def test_what_cannot_be_probed(model: Model, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        asked(model, **options)


def test_a_model_of_recordings_is_not_asked_for_images() -> None:
    sizes = {"num_mel_bins": 16, "max_length": 16, "patch_size": 8, "num_layers": 1}
    model = build("audio-spectrogram-transformer", "tiny", **sizes)
    with pytest.raises(ModelError, match="reads recordings.*task='audio-classification'"):
        pretrain.probe(model, [{"audio": np.zeros(8000, np.float32), "label": "a"}] * 4)
    with pytest.raises(ModelError, match=r"see predict\.$"):
        model.embed("a text")
