"""Rows of images from folders, arrays and tables, with every image that is not read counted or named."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zipfile
from datetime import date
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from pretrain.data.images import rows as rows_of_images
from pretrain.data.images.given import given_images
from pretrain.data.images.rows import (
    decoded,
    is_image_source,
    parts_of,
    pictures,
    pixel_vectors,
    read_images,
)
from pretrain.data.images.source import labelled_images
from pretrain.data.labelled import drop_duplicates, roles_table
from pretrain.data.row_source import open_rows
from pretrain.data.tables import in_chunks, stream_chunks
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.image_classification import ImageClassification

RNG = np.random.default_rng(0)


def png(path: Path, value: int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)
    array[0, 0] = value
    Image.fromarray(array).save(path)
    return path


def values(table, role: str = "image") -> list[np.ndarray]:
    return [np.asarray(p.read()[0]) for p in pictures(table, role)]


def test_a_folder_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat/img10.png", "cat/img2.png", "dog/deep/a.PNG", ".hidden/x.png"):
        png(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("x")
    (tmp_path / "cow").mkdir()
    table = read_images(tmp_path)
    assert table.columns["label"] == ["cat", "cat", "dog"]
    assert [Path(str(p)).name for p in table.columns["image"]] == ["img2.png", "img10.png", "a.PNG"]
    assert table.where(2).endswith("a.PNG")
    said = capsys.readouterr().err
    assert "1 files are no images by their names" in said and "notes.txt" in said
    assert "no images in 'cow'" in said
    with pytest.raises(DataError, match="holds no images"):
        read_images(tmp_path / "cow")
    with pytest.raises(DataError, match="delimiter is for files of rows"):
        read_images(tmp_path, delimiter=";")


def test_a_folder_without_classes_has_no_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png(tmp_path / "a.png"), png(tmp_path / "b.png")
    assert read_images(tmp_path).names == ["image"]
    png(tmp_path / "cat" / "c.png")
    assert read_images(tmp_path).names == ["image"]
    assert "2 images lie outside of folders" in capsys.readouterr().err
    assert read_images(tmp_path / "a.png").names == ["image"]


def test_parts_of_a_folder(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        for k in range(count):
            png(tmp_path / part / "cat" / f"{k}.png")
    assert parts_of(tmp_path) == ["test", "train", "valid"]
    sizes = [len(read_images(tmp_path, name=n)) for n in ("train", "validation", "test", "data")]
    assert sizes == [3, 2, 1, 1]


def test_a_cell_that_is_too_long_for_a_path_is_no_error(tmp_path: Path) -> None:
    """Such as an image in base64, which is then told as what cannot be opened."""
    (tmp_path / "a.json").write_text(json.dumps([{"image": "x" * 5000, "label": "a"}]))
    assert read_images(tmp_path / "a.json").columns["image"] == ["x" * 5000]


@pytest.mark.parametrize("place", ["", "data"])
def test_tables_beside_images_are_no_parts(place: str, tmp_path: Path) -> None:
    """The images are read, whichever rows are asked for, so they would be trained and held out."""
    for name in ("cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"):
        png(tmp_path / name)
    for split in ("train", "valid", "test"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / f"{split}.parquet").write_bytes(b"")
    assert parts_of(tmp_path) == [] and not ImageClassification.parts(str(tmp_path))
    assert len(read_images(tmp_path, name="train")) == 4
    rows = labelled_images(str(tmp_path), valid=0.5, seed=0)
    assert len(rows.train) == len(rows.valid) == 2


@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        ("train test masks __MACOSX", ["test", "train"]),
        ("train val __MACOSX", ["train", "valid"]),
        ("train masks", []),
        ("test masks", []),
        ("train training test", None),
        ("training_set test_set", ["test", "train"]),
        ("Train-Set valset masks", ["train", "valid"]),
        ("trainset dataset", []),
        # Folders of exact names come first, as if there were no others.
        ("train train_set test", ["test", "train"]),
        ("train test testset", ["test", "train"]),
        ("train test dev_set", ["test", "train"]),
        ("training trainset", []),
        ("train test_set", []),
    ],
)
def test_parts_beside_other_folders(
    folders: str, parts: list[str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in folders.split():
        png(tmp_path / name / "cat" / "1.png"), png(tmp_path / name / "dog" / "._2.png")
    if parts is None:
        with pytest.raises(DataError, match="two folders for one part, train and training"):
            read_images(tmp_path)
        return
    assert parts_of(tmp_path) == parts
    labels = read_images(tmp_path, name="train").columns["label"]
    assert labels == (["cat"] if parts else sorted(folders.split()))
    assert ("no parts: 'masks'" in capsys.readouterr().err) == ("masks" in folders and bool(parts))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("seg_train/cat/1 seg_test/cat/1", "'seg_test', 'seg_train' are taken for classes"),
        ("val2017/a/1 train2017/a/1 masks/a/1", None),
        ("val2017/a/1 train2017/a/1", "'train2017', 'val2017' are taken for classes"),
        ("express_train/1 bus/1", None),
        ("bullet_train/1 test_tube/1 bus/1", None),
        ("flat_test/1 hearing_test/1", None),
        ("photos/cat/1 photos/dog/1", "all images lie in 'photos'"),
        ("cat/1 cat/2", None),
    ],
)
def test_folders_that_may_not_be_classes_are_named(
    files: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts of other names were trained on as two classes; all of it was one class without a word of why."""
    for name in files.split():
        png(tmp_path / f"{name}.png")
    table = read_images(tmp_path)
    assert len(table) == len(files.split())
    roles_table(table, {"image": "image"})
    assert capsys.readouterr().err == ""  # no class is read
    roles_table(roles_table(table, {"label": "label"}), {"label": "label"})
    err = capsys.readouterr().err
    assert err.count("\n") == (said is not None)
    assert said in err if said else err == ""


def test_links_are_followed_once_and_pipes_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png(tmp_path / "elsewhere" / "1.png"), png(tmp_path / "data" / "b" / "2.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    os.mkfifo(tmp_path / "data" / "b" / "x.png")
    assert read_images(tmp_path / "data").columns["label"] == ["a", "b"]
    assert "1 entries are no regular files" in capsys.readouterr().err


def test_arrays_of_a_file(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)
    np.savez(
        tmp_path / "a.npz", images=images, labels=np.arange(6) % 2, class_names=["no", "yes"],
        patient=np.arange(6), unrelated=np.zeros(3),
    )  # fmt: skip
    table = read_images(tmp_path / "a.npz")
    assert table.names == ["image", "label", "patient"]
    assert table.columns["label"] == [0, 1] * 3 and table.label_names == {"label": ["no", "yes"]}
    assert np.array_equal(np.stack(values(table)), images)
    assert table.where(3) == "image 3 of a.npz"
    np.savez(tmp_path / "b.npz", x_train=images, y_train=np.arange(6)[:, None], x_test=images[:2])
    assert parts_of(tmp_path / "b.npz") == ["train", "test"]
    assert len(read_images(tmp_path / "b.npz", name="test")) == 2
    assert read_images(tmp_path / "b.npz", name="train").columns["label"] == list(range(6))
    with pytest.raises(DataError, match="none for the validation rows"):
        read_images(tmp_path / "b.npz", name="validation")
    several = np.array([[1, 0, 1], [0, 0, 0]])
    np.savez(tmp_path / "c.npz", images=images[:2], labels=several)
    assert read_images(tmp_path / "c.npz").columns["label"] == [[0, 2], []]


def test_bits_are_read_as_black_and_white(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", images=np.eye(4, dtype=np.uint8)[None])
    assert np.array_equal(values(read_images(tmp_path / "a.npz"))[0], np.eye(4) * 255)
    assert "black and white" in capsys.readouterr().err


def test_files_of_arrays_that_cannot_be_right(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "b.npz", other=np.zeros(3))
    np.savez(tmp_path / "c.npz", images=np.zeros((3, 4), np.uint8))
    np.savez(tmp_path / "d.npz", images=np.zeros((3, 4, 4), np.uint8), labels=np.zeros(2))
    np.savez(tmp_path / "e.npz", images=np.array([{}], dtype=object))
    for name, told in (
        ("a", "no .npz file"),
        ("b", "arrays 'other', and none called images"),
        ("c", r"shape \(3, 4\)"),
        ("d", "3 images and 2 labels"),
        ("e", "cannot be read"),
    ):
        with pytest.raises(DataError, match=told):
            read_images(tmp_path / f"{name}.npz")
    with pytest.raises(DataError, match="does not exist"):
        read_images(tmp_path / "none.npz")


def test_idx_files(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (4, 3, 2), dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", np.arange(4, dtype=np.uint8))):
        head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        with gzip.open(tmp_path / f"t10k-{name}-ubyte.gz", "wb") as file:
            file.write(head + array.tobytes())
    table = read_images(tmp_path / "t10k-images-idx3-ubyte.gz")
    assert np.array_equal(np.stack(values(table)), images) and table.columns["label"] == [
        0,
        1,
        2,
        3,
    ]
    with gzip.open(tmp_path / "cut-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + struct.pack(">3I", 4, 3, 2) + b"abc")
    with pytest.raises(DataError, match="cut off"):
        read_images(tmp_path / "cut-images-idx3-ubyte.gz")


def test_a_table_names_paths_relative_to_itself(tmp_path: Path) -> None:
    one, two = png(tmp_path / "img" / "1.png"), png(tmp_path / "img" / "2.png")
    (tmp_path / "rows.csv").write_text(f"image,label\nimg/1.png,a\n{two},b\n,a\n")
    table = read_images(tmp_path / "rows.csv")
    found = pictures(table)
    assert [p and p.digest for p in found] == [
        pictures(read_images(one))[0].digest, pictures(read_images(two))[0].digest, None
    ]  # fmt: skip
    rows = list(decoded(table, required=True))
    assert rows[2][1:] == (None, "no image")
    (tmp_path / "rows.csv").write_text("image,label\nimg/1.png,a\nimg/none.png,b\n")
    with pytest.raises(DataError, match=r"line 3: there is no file .*none\.png"):
        list(decoded(read_images(tmp_path / "rows.csv"), required=True))
    (tmp_path / "rows.csv").write_text("image,label\nhttp://a.b/c.png,a\n")
    with pytest.raises(DataError, match="line 2.*nothing is downloaded"):
        pictures(read_images(tmp_path / "rows.csv"))


def test_bytes_in_parquet_and_images_of_the_datasets_library(tmp_path: Path) -> None:
    import datasets

    content = png(tmp_path / "a.png").read_bytes()
    rows = {"image": [{"bytes": content, "path": None}], "label": [1]}
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["no", "yes"])
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    table = read_images(data)
    wanted = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(values(table)[0], wanted) and table.label_names["label"] == ["no", "yes"]
    data.to_parquet(tmp_path / "rows.parquet")
    stored = read_images(tmp_path / "rows.parquet")
    assert np.array_equal(values(stored)[0], wanted) and stored.label_names == table.label_names


def test_the_mode_of_a_feature_is_that_of_its_images(tmp_path: Path) -> None:
    """``datasets.Image(mode=...)`` converts as it does there, from the bytes and from a path."""
    datasets = pytest.importorskip("datasets")
    Image.fromarray(RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    cells = [{"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}]
    for mode in ("L", "RGB", "1"):
        features = datasets.Features(image=datasets.Image(mode=mode))
        data = datasets.Dataset.from_dict({"image": cells}, features=features)
        data.to_parquet(tmp_path / "rows.parquet")
        wanted = [
            np.asarray(image.convert("L" if mode == "1" else mode)) for image in data["image"]
        ]
        for source in (data, tmp_path / "rows.parquet"):
            found = values(read_images(source))
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_chunks_hold_what_a_file_can_hold(tmp_path: Path) -> None:
    """Images stand by their paths or sizes, whatever a column holds beside them."""
    datasets = pytest.importorskip("datasets")
    image = png(tmp_path / "a.png")
    content = image.read_bytes()
    size = f"{len(content):,} bytes"
    cells = [{"bytes": content, "path": None}, {"bytes": None, "path": str(image)}]
    day = date(2020, 1, 2)
    columns = {
        "image": cells,
        "raw": [content] * 2,
        "inside": [{"days": [day], "images": cells}] * 2,
    }
    form = {"image": datasets.Image(mode="L"), "raw": datasets.Value("binary")}
    form["inside"] = {"days": [datasets.Value("date32")], "images": [datasets.Image()]}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(form))
    data.to_parquet(tmp_path / "rows.parquet")
    (chunk,) = stream_chunks(tmp_path / "rows.parquet", 8)
    inside = {"days": ["2020-01-02"], "images": [size, str(image)]}
    assert [row["image"] for row in chunk.rows] == [size, str(image)]
    assert all(row["raw"] == size and row["inside"] == inside for row in chunk.rows)
    assert chunk.table.columns["raw"] == [content] * 2  # which the model reads


def test_objects_in_memory() -> None:
    images = RNG.integers(0, 256, (3, 5, 4), dtype=np.uint8)
    sources = (
        {"image": images, "label": np.arange(3)},
        {"image": list(images), "label": [0, 1, 2]},
        [{"image": image, "label": k} for k, image in enumerate(images)],
        [{"image": Image.fromarray(image), "label": k} for k, image in enumerate(images)],
    )
    for source in sources:
        table = read_images(source)
        assert np.array_equal(np.stack(values(table)), images)
        assert table.columns["label"] == [0, 1, 2]
    with pytest.raises(DataError, match="row 2 .*int 7 is no image|row 2 .*'7' is no image"):
        pictures(read_images([{"image": images[0]}, {"image": 7}]))
    for wrong in ([["a", "b"], ["c", "d"]], [[1, 2], [3]]):
        with pytest.raises(DataError, match="is no image"):
            pictures(read_images([{"image": wrong}]))


@pytest.mark.parametrize("how", ["jsonl", "parquet", "frame", "memory"])
def test_lists_of_other_values_than_bytes_are_refused(how: str, tmp_path: Path) -> None:
    import pandas

    good, path = [[[0, 1], [200, 255]]], tmp_path / f"rows.{how}"
    for image in (np.full((2, 2), 0.5).tolist(), [[0, 300], [0, 0]], [[0, -1], [0, 0]]):
        frame = pandas.DataFrame({"image": [*good, image], "label": [0, 1]})
        if how == "jsonl":
            frame.to_json(path, orient="records", lines=True)
        elif how == "parquet":
            frame.to_parquet(path)
        source = {"frame": frame, "memory": frame.to_dict("records")}.get(how, path)
        found = list(decoded(read_images(source), required=True))
        if how != "parquet" or "0.5" not in str(image):  # all values of its columns have one type
            assert np.asarray(found[0][1]).tolist() == good[0]
        assert found[1][1] is None and "array * 255" in str(found[1][2])


def test_broken_images_are_counted_by_cause_and_named(tmp_path: Path) -> None:
    png(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").write_bytes(b"")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    found = list(decoded(read_images(tmp_path), required=True))
    assert [image is None for _, image, _ in found] == [False, True, True]
    assert "empty" in str(found[1][2]) and "broken image" in str(found[2][2])


def test_equal_images_in_other_places_are_duplicates(tmp_path: Path) -> None:
    one = png(tmp_path / "train" / "a" / "1.png")
    png(tmp_path / "train" / "a" / "2.png")
    copy = tmp_path / "other" / "a" / "9.png"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(one.read_bytes())
    kept, count = drop_duplicates(
        read_images(tmp_path / "train"), read_images(tmp_path / "other"), ["image"], "test"
    )
    assert count == 1 and len(kept) == 1
    assert read_images(tmp_path / "train").fingerprint != kept.fingerprint


def test_pixels_for_classical_methods(tmp_path: Path) -> None:
    for name in ("a", "b"):
        png(tmp_path / "1" / f"{name}.png", size=40)
    (tmp_path / "1" / "c.png").write_bytes(b"")
    Image.new("L", (10, 50), 255).save(tmp_path / "1" / "d.png")
    ((vectors, rows),) = pixel_vectors(read_images(tmp_path / "1"))
    assert rows == [0, 1, 3] and {v.shape for v in vectors} == {(32 * 32 * 3,)}
    assert vectors[2].min() == 1.0
    np.savez(tmp_path / "g.npz", images=RNG.integers(0, 256, (2, 9, 9), dtype=np.uint8))
    assert pixel_vectors(read_images(tmp_path / "g.npz"))[0][0][0].shape == (81,)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("sizes", [[(40, 90)], [(9, 9)], [(50, 10), (10, 50), (28, 28)]])
def test_pixels_are_those_of_the_full_images(sizes: list[tuple[int, int]], mode: str) -> None:
    images = [Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    images = [image.convert(mode) for image in images]
    images[0] = images[0].convert("L")
    grey = all(image.mode == "L" for image in images)
    common = (min(32, sizes[0][0]), min(32, sizes[0][1])) if len(sizes) == 1 else (32, 32)
    ((vectors, _),) = pixel_vectors(read_images({"image": images}))
    for image, vector in zip(images, vectors, strict=True):
        wanted = image.convert("L" if grey else "RGB").resize(common, Image.Resampling.BILINEAR)
        assert np.array_equal(vector * np.float32(255), np.asarray(wanted, np.float32).ravel())


def test_many_files_are_decoded_in_order_under_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(60):
        png(tmp_path / f"{k}.png", value=k)
    (tmp_path / "30.png").write_bytes(b"")
    for most, told in ((100, False), (50, True)):
        monkeypatch.setattr(rows_of_images, "_MANY", most)
        found = list(decoded(read_images(tmp_path), required=True))
        corners = [None if image is None else np.asarray(image)[0, 0, 0] for _, image, _ in found]
        assert corners == [k if k != 30 else None for k in range(60)]
        assert ("0/60" in capsys.readouterr().err) == told


def write_member(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, content)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("images.npy", b"no array", "cannot be read"),
        ("images.txt", b"no array", "none called images"),
        ("images.npy", (99999, 999, 999), "announces the shape"),
        ("labels.npy", np.array(3), r"labels have the shape \(\)"),
        ("class_names.npy", np.array("cat"), r"names of the classes have the shape \(\)"),
    ],
)
def test_members_of_npz_files_that_cannot_be_right(
    name: str, content: object, told: str, tmp_path: Path
) -> None:
    path, file = tmp_path / "a.npz", io.BytesIO()
    if not name.startswith("images"):
        np.savez(path, images=np.zeros((2, 4, 4), np.uint8))
    if isinstance(content, tuple):
        head = {"descr": "|u1", "fortran_order": False, "shape": content}
        np.lib.format.write_array_header_1_0(file, head)
    elif isinstance(content, np.ndarray):
        np.save(file, content)
    write_member(path, name, content if isinstance(content, bytes) else file.getvalue())
    with pytest.raises(DataError, match=told):
        read_images(path)


def test_arrays_of_other_parts_are_no_columns(tmp_path: Path) -> None:
    images, ages = np.zeros((2, 4, 4), np.uint8), np.arange(2)
    names = ("train_images", "test_images", "train_labels", "test_labels")
    np.savez(
        tmp_path / "a.npz", age=ages, **dict(zip(names, (images, images, ages, ages), strict=True))
    )
    assert read_images(tmp_path / "a.npz", name="train").names == ["image", "label", "age"]


def test_a_missing_file_is_named_with_its_row_after_the_search_for_duplicates(
    tmp_path: Path,
) -> None:
    png(tmp_path / "1.png")
    (tmp_path / "rows.csv").write_text("image,label\n1.png,a\nnone.png,b\n")
    (tmp_path / "other.csv").write_text("image,label\nabsent.png,a\n")
    train, other = (read_images(tmp_path / name) for name in ("rows.csv", "other.csv"))
    train, other = (t.with_columns({**t.columns, "image": pictures(t)}, {}) for t in (train, other))
    assert drop_duplicates(train, other, ["image"], "test")[1] == 0
    with pytest.raises(DataError, match=r"line 3: there is no file .*Paths are relative"):
        list(decoded(train, required=True))


def test_a_path_with_a_null_character_is_no_file() -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_images("a\0.png")
    ((_, image, told),) = decoded(read_images({"image": ["a\0.png"]}), required=False)
    assert image is None and "null" in str(told)


def test_chunks_of_a_folder_keep_the_names(tmp_path: Path) -> None:
    for k in range(5):
        png(tmp_path / "a" / f"{k}.png")
    chunks = list(in_chunks(read_images(tmp_path), 2))
    assert [len(c.rows) for c in chunks] == [2, 2, 1]
    assert chunks[2].rows[0]["image"].endswith("4.png") and is_image_source(tmp_path)
    assert not is_image_source(tmp_path / "rows.csv")


def test_rows_of_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = RNG.integers(0, 256, (40, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(40) % 4)
    rows = labelled_images(str(tmp_path / "a.npz"), 0.25)
    assert (len(rows.train), len(rows.valid)) == (30, 10)
    assert {int(r["labels"]) for r in rows.train} == {int(r["labels"]) for r in rows.valid}
    assert rows.overrides["labels"] == ("0", "1", "2", "3")
    assert rows.overrides["image_size"] == 12 and 12 % rows.overrides["patch_size"] == 0
    assert rows.processor.size == (12, 12)
    again = labelled_images(str(tmp_path / "a.npz"), 0.25)
    assert again.fingerprint == rows.fingerprint
    images[:] = 255 - images
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(40) % 4)
    assert labelled_images(str(tmp_path / "a.npz"), 0.25).fingerprint != rows.fingerprint
    assert len(open_rows("images", {"train": str(tmp_path / "a.npz")}).valid) == 4
    with pytest.raises(ConfigError, match=r"data\.source_args\.trian.*'train'"):
        open_rows("images", {"trian": "x"})


def test_rows_of_pretraining_without_labels(tmp_path: Path) -> None:
    for k in range(8):
        png(tmp_path / f"{k}.png", value=k)
    with pytest.raises(DataError):
        labelled_images(str(tmp_path), 0.25)
    rows = labelled_images(str(tmp_path), 0.25, labels=False)
    assert (len(rows.train), len(rows.valid)) == (6, 2)
    assert set(rows.train[0]) == {"image"} and "labels" not in rows.overrides


REAL = [
    ("mnist/train_5k.npz", 5000, [], (28, 28), "L"),
    ("mnist/t10k-images-idx3-ubyte.gz", 10000, [], (28, 28), "L"),
    ("pneumoniamnist/pneumoniamnist.npz", 4708, ["train", "valid", "test"], (28, 28), "L"),
    ("sign_language_digits/sign_digits_64.npz", 800, ["train", "test"], (64, 64), "RGB"),
    ("omniglot_small1/omniglot_small1.npz", 2720, [], (105, 105), "L"),
]


@pytest.mark.parametrize(("file", "count", "parts", "size", "mode"), REAL)
def test_published_arrays(
    file: str, count: int, parts: list[str], size: tuple[int, int], mode: str, data_sets: Path
) -> None:
    table = read_images(data_sets / file, name="train")
    image = table.columns["image"][count // 2].read()[0]
    assert (len(table), parts_of(data_sets / file)) == (count, parts)
    assert (image.size, image.mode) == (size, mode)
    assert np.asarray(image).max() > 100 and len(set(table.columns["label"])) > 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("form", ["array", "list", "rows", "columns", "frame", "torch"])
def test_images_of_0_and_1_in_memory_are_black_and_white_as_in_files(
    form: str, dtype: type
) -> None:
    """Each by itself, so that an answer depends neither on other images nor on what holds them."""
    pandas, torch = pytest.importorskip("pandas"), pytest.importorskip("torch")
    bits = (np.indices((5, 5)).sum(0) % 2).astype(dtype)
    images = np.stack([bits, (np.indices((5, 5)).sum(0) % 3).astype(dtype)])
    if form in ("array", "list", "torch"):
        held = {"array": images, "list": list(images), "torch": torch.from_numpy(images)}[form]
        found = given_images(held, 1)
        assert found is not None
        table = found[0]
    else:
        rows = [{"image": image, "mask": image} for image in images]
        columns = {"image": list(images), "label": [0, 1]}
        table = read_images(
            {"rows": rows, "columns": columns, "frame": pandas.DataFrame(rows)}[form]
        )
    assert np.array_equal(np.stack(values(table)), np.stack([bits * 255, images[1]]))
    ((_, _, remark), (_, _, other)) = decoded(table, required=True)
    assert "black and white" in str(remark) and other is None
    if form == "rows":
        assert np.array_equal(table.columns["mask"][0].numbers(), images[0])


def test_an_undecoded_entry_is_one_image_and_its_bytes_are_read(tmp_path: Path) -> None:
    """The path of an entry is where the bytes came from: a file of that name here is another one."""
    data = png(tmp_path / "a.png", value=7).read_bytes()
    other = str(png(tmp_path / "b.png", value=9))
    entries = [{"bytes": data, "path": other}, {"bytes": data, "path": None}, {"bytes": data}]
    entries += [{"bytes": None, "path": str(tmp_path / "a.png")}]
    for given, one in (*((entry, True) for entry in entries), (entries, False)):
        found = given_images(given, 3)
        assert found is not None and found[1] is one
        assert {int(value[0, 0, 0]) for value in values(found[0])} == {7}
    for rows in ({"image": other, "path": "x"}, {"bytes": [data], "path": [other]}):
        assert given_images(rows, 3) is None


def test_tensors_of_any_type_and_history_are_told_what_is_wrong_with_their_values() -> None:
    torch = pytest.importorskip("torch")
    made = torch.linspace(0.1, 0.9, 32).reshape(4, 8)
    for given in (made.bfloat16(), made.half(), made.clone().requires_grad_()):
        for rows in (given_images(given, 1), (read_images([{"image": given}]), True)):
            assert rows is not None
            ((_, image, why),) = decoded(rows[0], required=True)
            assert image is None and "values from 0 to 1" in str(why)


def test_whole_numbers_of_other_types_are_read_and_the_advice_for_others_holds() -> None:
    image = np.arange(0, 256, 4).reshape(8, 8)
    for dtype in (np.int64, np.int32, np.int16, np.uint32):
        (found,) = values(read_images([{"image": image.astype(dtype)}]))
        assert np.array_equal(found, image)
    for wrong, advice in ((image / 255, "array * 255"), (image + 0.25, "array.round()")):
        ((_, found, remark),) = decoded(read_images([{"image": wrong}]), required=True)
        assert found is None and advice in str(remark)
        array = wrong
        fixed = (
            (array * 255).round().astype("uint8")
            if "255)" in str(remark).split("by ")[-1][:13]
            else array.round().clip(0, 255).astype("uint8")
        )
        assert np.abs(fixed.astype(int) - image).max() <= 1


def test_broken_files_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(b"")
        (tmp_path / f"page{k}.png").write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    table = read_images(tmp_path)
    assert len({picture.digest for picture in pictures(table)}) == 6
