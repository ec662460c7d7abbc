"""Images that are decoded once into checksummed files: the same rows and values as of the files, damage, safety."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image

import pretrain
from pretrain.cli.main import main
from pretrain.data import flat_files
from pretrain.data.images.augment import Augmentation
from pretrain.data.images.captions import captioned_images
from pretrain.data.images.decode import Picture
from pretrain.data.images.prepare import holds_images
from pretrain.data.images.rows import parts_of, pictures, read_images
from pretrain.data.images.source import labelled_images
from pretrain.data.images.stored import Pixels, PreparedImages
from pretrain.data.loader import row_rngs
from pretrain.data.manifests import file_record, write_sealed
from pretrain.errors import ConfigError, DataError


def picture(seed: int, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, several sizes and formats, one grey, one turned by its camera, one twice."""
    for k in range(24):
        folder = tmp_path / "photos" / ("cat" if k % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        image = picture(k % 23, 40 + k, 30, "L" if k == 5 else "RGB")
        kinds: dict[str, Any] = {"quality": 80} if k % 3 else {}
        exif = Image.Exif()
        exif[0x0112] = 6 if k == 7 else 1
        image.save(folder / f"{k}.{'jpg' if k % 3 else 'png'}", exif=exif, **kinds)
    return tmp_path / "photos"


def values(source: Path, **options: Any) -> list[Any]:
    """Labels and values of all rows as training changes them at random, then as they are evaluated."""
    rows = labelled_images(str(source), **options)
    found = []
    for part in (rows.train, rows.valid):
        images = [row["image"] for row in part]
        for evaluation in (False, True):
            rngs = row_rngs(0, "collate", 0, len(images))
            pixels, _ = Augmentation(0.5, True, 9).seen(
                images, rows.processor, rngs, evaluation=evaluation
            )
            found.append((pixels, [int(row["labels"]) for row in part]))
    return [rows.fingerprint, dict(rows.overrides), *found]


def check_equal(one: list[Any], two: list[Any]) -> None:
    assert one[:2] == two[:2]
    for (pixels, labels), (others, their_labels) in zip(one[2:], two[2:], strict=True):
        assert labels == their_labels and pixels.dtype == others.dtype
        assert np.array_equal(pixels, others)


def test_the_rows_and_values_are_those_of_the_files(photos: Path, tmp_path: Path) -> None:
    kept = pretrain.prepare(str(photos), tmp_path / "kept", quiet=True)
    assert isinstance(kept, PreparedImages) and "24 images" in kept.table()
    check_equal(values(photos, size=24), values(kept.path, size=24))
    check_equal(values(photos, valid=0.3, seed=3), values(kept.path, valid=0.3, seed=3))
    row = labelled_images(str(kept.path)).train[0]["image"]
    assert isinstance(row.picture.source, Pixels) and row.nbytes == 0  # not held in memory
    assert str(row.picture).startswith(str(photos))


def test_scaled_images_are_those_that_a_run_reads(photos: Path, tmp_path: Path) -> None:
    """Without random crops, which are taken before scaling."""
    for channels in (3, 1):
        kept = pretrain.prepare(
            photos, tmp_path / "k", size=np.int64(16), channels=channels, quiet=True
        )
        runs = [labelled_images(str(p), size=16, channels=channels) for p in (photos, kept.path)]
        for part in ("train", "valid"):
            one, two = ([row["image"] for row in getattr(run, part)] for run in runs)
            seen = [
                run.processor([image.image() for image in part])
                for run, part in zip(runs, (one, two), strict=True)
            ]
            assert np.array_equal(seen[0]["pixel_values"], seen[1]["pixel_values"])
            assert {image.size for image in two} == {(16, 16)}


def test_other_pixels_have_another_digest(photos: Path, tmp_path: Path) -> None:
    """By which a run that is resumed notices them, and a second ``prepare`` of prepared images."""

    def kept(source: Path, name: str, **options: Any) -> tuple[list[str], list[Any], str]:
        prepared = pretrain.prepare(source, tmp_path / name, source="images", quiet=True, **options)
        held = pictures(read_images(prepared.path))
        pixels = [np.asarray(one.read()[0]) for one in held]
        return [one.digest for one in held], pixels, labelled_images(str(prepared.path)).fingerprint

    plain, small = kept(photos, "plain"), kept(photos, "small", size=4)
    assert plain[0] == [one.digest for one in pictures(read_images(photos))]
    assert set(plain[0]).isdisjoint(small[0]) and len({*small[0]}) == 24
    others = [kept(photos, "small", size=5), kept(photos, "grey", channels=1)]
    assert len({plain[2], small[2], *(other[2] for other in others)}) == 4
    first = kept(tmp_path / "small", "again")
    assert first[0] == others[0][0] and {pixels.shape[:2] for pixels in first[1]} == {(5, 5)}
    second = kept(photos, "again")
    assert second[0] == plain[0]
    assert all(np.array_equal(a, b) for a, b in zip(second[1], plain[1], strict=True))


def test_parts_arrays_and_captions(photos: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{part}_{name}": value
        for part, rows in (("train", 20), ("val", 6), ("test", 5))
        for name, value in (
            ("images", rng.integers(0, 256, (rows, 8, 8), np.uint8)),
            ("labels", rng.integers(0, 3, rows)),
        )
    }
    np.savez(tmp_path / "a.npz", class_names=["a", "b", "c"], **arrays)
    kept = pretrain.prepare(tmp_path / "a.npz", tmp_path / "a", quiet=True)
    assert parts_of(kept.path) == parts_of(tmp_path / "a.npz") == ["train", "valid", "test"]
    check_equal(values(tmp_path / "a.npz", channels=1), values(kept.path, channels=1))
    for name in ("train", "validation", "test", "data"):
        one, two = (read_images(path, name=name) for path in (tmp_path / "a.npz", kept.path))
        assert one.columns["label"] == two.columns["label"] and one.label_names == two.label_names
        assert [p.digest for p in one.columns["image"]] == [p.digest for p in two.columns["image"]]

    with tarfile.open(tmp_path / "pairs.tar", "w") as archive:
        for k in range(12):
            file = io.BytesIO()
            picture(k).save(file, "PNG")
            for ending, content in (("png", file.getvalue()), ("txt", f"number {k}\n".encode())):
                member = tarfile.TarInfo(f"{k}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    kept = pretrain.prepare(tmp_path / "pairs.tar", tmp_path / "pairs", quiet=True)
    one, two = (captioned_images(str(p), size=8) for p in (tmp_path / "pairs.tar", kept.path))
    assert one.fingerprint == two.fingerprint and len(one.train) == len(two.train)

    words = [{"image": picture(k), "label": "ab"[k % 2], "share": 0.5} for k in range(6)]
    kept = pretrain.prepare(words, tmp_path / "list", source="images", quiet=True)
    table = read_images(kept.path)
    assert table.columns["label"] == ["a", "b"] * 3 and table.columns["share"] == [0.5] * 6
    assert np.array_equal(np.asarray(table.columns["image"][2].read()[0]), np.asarray(picture(2)))


def test_fine_tuning_reads_them(photos: Path, tmp_path: Path) -> None:
    kept = pretrain.prepare(photos, tmp_path / "kept", quiet=True)
    runs = [
        pretrain.finetune(
            pretrain.build(
                "vit", num_layers=1, hidden_size=16, num_heads=2, image_size=16, patch_size=8
            ),
            source,
            task="image-classification",
            valid=0.25,
            limit="3 steps",
            batch_rows=4,
            device="cpu",
            quiet=True,
            out=tmp_path / name,
        )
        for name, source in (("files", str(photos)), ("tuned", str(kept.path)))
    ]
    one, two = (run.model.disk_state() for run in runs)
    assert all(np.array_equal(value, two[name]) for name, value in one.items())
    assert runs[0].metrics == runs[1].metrics
    answers = [
        list(run.predict(source)) for run, source in zip(runs, (photos, kept.path), strict=True)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 24
    figures = [pretrain.evaluate(tmp_path / "tuned", str(source)) for source in (photos, kept.path)]
    assert figures[0] == figures[1]
    assert runs[0].predict(str(photos / "cat" / "1.jpg")) == runs[1].predict(
        str(photos / "cat" / "1.jpg")
    )


def test_broken_images_are_counted_once(photos: Path, tmp_path: Path, capsys: Any) -> None:
    (photos / "cat" / "x.png").write_bytes(b"\x89PNG nothing")
    (photos / "dog" / "y.jpg").write_bytes(b"")
    kept = pretrain.prepare(photos, tmp_path / "kept")
    told = capsys.readouterr().err
    assert "1 rows left out, broken image (it is no image of a known format)" in told
    assert "24 images, 2 left out" in told and "x.png" in told and "y.jpg" in told
    assert "photos: the other rows are numbered anew" in told
    labelled_images(str(kept.path))
    assert "broken" not in capsys.readouterr().err
    (tmp_path / "rows.csv").write_text("file_name,label\nphotos/cat/1.jpg,a\nphotos/none.jpg,b\n")
    with pytest.raises(DataError, match=r"there is no file .*none.jpg"):
        pretrain.prepare(tmp_path / "rows.csv", tmp_path / "rows", source="images", quiet=True)
    assert not (tmp_path / "rows").exists() and not list(tmp_path.glob(".rows*"))


def test_a_second_call_finds_them_and_a_change_is_noticed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cache = {"cache_dir": tmp_path / "cache"}
    first = pretrain.prepare(photos, **cache)
    before = (first.path / "all.pixels.bin").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(Picture, "read", lambda self: pytest.fail("decoded again"))
        assert pretrain.prepare(photos, **cache).fingerprint == first.fingerprint
    assert "nothing to do" in capsys.readouterr().err
    assert (first.path / "all.pixels.bin").stat().st_mtime_ns == before
    picture(99).save(photos / "cat" / "1.jpg")
    second = pretrain.prepare(photos, **cache)
    assert second.path == first.path and second.fingerprint != first.fingerprint
    assert "prepared from other sources or options" in capsys.readouterr().err


@pytest.mark.parametrize("large", [False, True])
def test_damage_is_named(
    large: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(flat_files, "IN_MEMORY", 64)
        monkeypatch.setattr(flat_files, "BLOCK", 128)
    kept = pretrain.prepare(photos, tmp_path / "kept", quiet=True)
    pixels, table = (kept.path / f"all.{kind}" for kind in ("pixels.bin", "rows.jsonl"))
    content = pixels.read_bytes()
    pixels.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    with pytest.raises(DataError, match=r"all.pixels.bin (is damaged: its bytes|does not have)"):
        [np.asarray(row["image"]) for row in labelled_images(str(kept.path)).train]
    pixels.write_bytes(content[:-1])
    with pytest.raises(DataError, match="it was truncated or changed"):
        labelled_images(str(kept.path))
    pixels.write_bytes(content)
    rows = table.read_bytes()
    table.write_bytes(rows.replace(b'"cat"', b'"dog"'))
    with pytest.raises(DataError, match=r"rows.jsonl .*SHA-256"):
        labelled_images(str(kept.path))
    table.write_bytes(rows)
    manifest = json.loads((kept.path / "manifest.json").read_text())
    manifest["parts"]["all"] = manifest["parts"].pop("")
    (kept.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        labelled_images(str(kept.path))
    again = pretrain.prepare(photos, kept.path, quiet=True)
    assert PreparedImages.find(again.path) is not None


def test_other_data_are_not_replaced(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not prepared data: 'cat'"):
        pretrain.prepare(photos, photos, quiet=True)
    kept = pretrain.prepare(photos, tmp_path / "kept", quiet=True)
    text = tmp_path / "a.txt"
    text.write_text("some words\n" * 50)
    with pytest.raises(DataError, match="is not prepared data of text, but of images"):
        pretrain.prepare(text, kept.path, tokenizer="char", quiet=True)
    pretrain.prepare(text, tmp_path / "text", tokenizer="char", quiet=True)
    with pytest.raises(DataError, match="holds prepared text"):
        pretrain.prepare(photos, tmp_path / "text", quiet=True)


@pytest.mark.parametrize(
    "files",
    [
        {"manifest.json": '{"name": "my app"}'},
        {"manifest.json": '{"kind": "images"}'},
        {"manifest.json": "no JSON"},
        {"tokenizer/tokenizer.json": "{}"},
        {"all.rows.jsonl": "{}"},
        {"manifest.json": '{"name": "my app"}', "all.pixels.bin": ""},
        {"all.pixels.bin": "", "tokenizer/tokenizer.json": "{}"},
        {"manifest.json/all.pixels.bin": ""},
    ],
)
def test_files_of_other_programs_are_kept(
    files: dict[str, str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Picture, "read", lambda self: pytest.fail("decoded"))
    for name, content in files.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_text(content)
    with pytest.raises(DataError, match=r"site exists and is not prepared data: '"):
        pretrain.prepare(photos, tmp_path / "site", quiet=True)
    assert all((tmp_path / "site" / n).read_text() == text for n, text in files.items())
    (tmp_path / "file").write_text("words")
    with pytest.raises(DataError, match="is a file; `out` must be a directory"):
        pretrain.prepare(photos, tmp_path / "file", quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "site", "file"}


@pytest.mark.parametrize("row", ['{"shape": [1e999, 3]}', "[" * 100_000])
def test_rows_that_json_cannot_hold_are_damage(row: str, photos: Path, tmp_path: Path) -> None:
    kept = pretrain.prepare(photos, tmp_path / "kept", quiet=True)
    (kept.path / "all.rows.jsonl").write_text(row + "\n")
    files = {name: file_record(kept.path / name) for name in kept.manifest["files"]}
    write_sealed(kept.path / "manifest.json", {**kept.manifest, "files": files})
    with pytest.raises(DataError, match=r"all.rows.jsonl is damaged"):
        read_images(kept.path)
    (kept.path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        read_images(kept.path)


def test_a_damaged_directory_is_replaced_and_a_source_is_not(photos: Path, tmp_path: Path) -> None:
    kept = pretrain.prepare(photos, tmp_path / "kept", quiet=True)
    for content in (None, "[" * 100_000, "{"):
        (kept.path / "manifest.json").unlink()
        if content is not None:
            (kept.path / "manifest.json").write_text(content)
        assert pretrain.prepare(photos, kept.path, quiet=True).fingerprint == kept.fingerprint
    (kept.path / "all.pixels.bin").unlink()
    assert pretrain.prepare(photos, kept.path, quiet=True).fingerprint == kept.fingerprint
    with pytest.raises(DataError, match="is the source itself"):
        pretrain.prepare(kept.path, kept.path, source="images", size=8, quiet=True)


@pytest.mark.parametrize("name", ["bbox", "Box", "objects", "x_min", "x1", "left", "bottom"])
def test_places_in_pixels_are_not_scaled(name: str, tmp_path: Path) -> None:
    rows = [{"image": picture(k), name: [[1, 2, 3, 4]]} for k in range(2)]
    with pytest.raises(DataError, match=f"the column '{name}' holds places in pixels"):
        pretrain.prepare(rows, tmp_path / "kept", source="images", size=8, quiet=True)
    kept = pretrain.prepare(rows, tmp_path / "kept", source="images", channels=1, quiet=True)
    assert read_images(kept.path).columns[name] == [[[1, 2, 3, 4]]] * 2


@pytest.mark.parametrize(
    "folders",
    [("images", "annotations"), ("imgs", "labels"), ("JPEGImages", "SegmentationClass"), ("val/image", "val/mask")],
)  # fmt: skip
def test_folders_of_masks_are_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    for folder in (*folders, *(("train/images",) if "/" in folders[0] else ())):
        (tmp_path / "cells" / folder).mkdir(parents=True)
        picture(1, mode="L").save(tmp_path / "cells" / folder / "1.png")
    with pytest.raises(
        DataError,
        match=r"cells holds masks or other annotations beside the images, .* source itself",
    ):
        pretrain.prepare(tmp_path / "cells", tmp_path / "kept", source="images", quiet=True)
    assert not (tmp_path / "kept").exists()


def test_masks_and_boxes_in_other_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for k in range(2):
        picture(k).save(folder / f"{k}.png")
        picture(k, mode="L").save(folder / f"m{k}.png")
    table = folder.with_suffix(".csv")
    for column, value, kept in (
        ("mask", "rows/m{}.png", False),
        ("annotation", "rows/m{}.png", False),
        ("label", "cat {}", True),
    ):
        lines = [f"rows/{k}.png,{value.format(k)}" for k in range(2)]
        table.write_text("\n".join([f"image,{column}", *lines]))
        with nullcontext() if kept else pytest.raises(DataError, match="rows.csv holds masks"):
            pretrain.prepare(table, tmp_path / "kept", source="images", quiet=True)
    (folder / "of_a_camera.xml").write_text("<clip><name>1</name></clip>")
    pretrain.prepare(folder, tmp_path / "kept", quiet=True)
    box = "<object><name>a</name><bndbox><xmin>1</xmin></bndbox></object>"
    (folder / "0.xml").write_text(f"<annotation>{box}</annotation>")
    with pytest.raises(DataError, match=r"rows holds boxes beside the images, .* source itself"):
        pretrain.prepare(folder, tmp_path / "kept", quiet=True)
    (folder / "0.xml").unlink()
    held = {"images": [{"id": 0, "file_name": "0.png"}], "annotations": [], "categories": []}
    (folder / "some.json").write_text(json.dumps(held))
    for source in (folder, folder / "some.json"):
        with pytest.raises(DataError, match="holds boxes beside the images"):
            pretrain.prepare(source, tmp_path / "kept", source="images", quiet=True)


def test_what_a_source_holds_and_options_of_the_other_kind(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holds_images(photos) and not holds_images(photos / "cat" / "none.csv")
    assert not holds_images(tmp_path / "nothing.txt")
    (photos / "cat" / "1.txt").write_text("a cat")
    assert holds_images(photos)
    for hidden in (".git/a.md", "__MACOSX/._a.txt", ".b.md", "metadata.csv", "of_a_program.json"):
        (photos / hidden).parent.mkdir(exist_ok=True)
        (photos / hidden).write_text("words\nmore\n")
    assert holds_images(photos)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cat").symlink_to(photos / "cat")
    assert holds_images(tmp_path / "links")
    for name in ("a.ndjson", "a.tab", "a.jsonl.gz", "a.txt.zst", "A.HTML", "cat/2.txt.gz", "a.md"):
        (photos / name).write_text("words")
        assert not holds_images(photos), name
        (photos / name).unlink()
    kept = pretrain.prepare(photos, tmp_path / "kept", quiet=True)
    (kept.path / "notes.txt").write_text("words")
    assert holds_images(kept.path)
    monkeypatch.setenv("HOME", str(tmp_path))
    again = pretrain.prepare("~/photos", cache_dir=tmp_path / "cache", quiet=True)
    assert again.path == pretrain.prepare(photos, cache_dir=tmp_path / "cache", quiet=True).path
    (photos / "readme.md").write_text("words")
    with pytest.raises(ConfigError, match=r"vocab_size=50 is for text, .* source='text'"):
        pretrain.prepare(photos, source="images", vocab_size=50)
    with pytest.raises(ConfigError, match=r"size=8 is for images, .* source='images'"):
        pretrain.prepare(photos, size=8)
    with pytest.raises(ConfigError, match="source='sounds'"):
        pretrain.prepare(photos, source="sounds")
    with pytest.raises(ConfigError, match="channels 1 or 3"):
        pretrain.prepare(photos, source="images", channels=2)
    with pytest.raises(ConfigError, match="size must be a whole number from 1 to 8,192"):
        pretrain.prepare(photos, source="images", size=8193)


def test_on_the_command_line(photos: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["prepare", str(photos), "--out", str(tmp_path / "kept"), "--size", "16"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "kept")
    words = ["train", "--data.source", "images", "--data.source_args.train", str(tmp_path / "kept")]
    words += ["--model.family", "vit", "--objective.class_path", "ImageClassification"]
    words += ["--model.overrides.num_layers", "1", "--model.overrides.hidden_size", "16"]
    words += ["--train.limit", "2 steps", "--train.batch_rows", "4"]
    assert main([*words, "--train.out", str(tmp_path / "run"), "--parallel.device", "cpu"]) == 0
    assert pretrain.load(tmp_path / "run", quiet=True).processor.size == (16, 16)


def test_folders_that_may_not_be_classes_are_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    photos.rename(tmp_path / "a" / "photos")
    pretrain.prepare(str(tmp_path / "a"), tmp_path / "kept")
    assert capsys.readouterr().err.count("all images lie in 'photos'") == 1
