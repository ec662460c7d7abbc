"""Images with captions: every form of a source gives the same pairs, and what is left out is said."""

from __future__ import annotations

import codecs
import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from pretrain.data.images.captions import captioned_images, read_pairs
from pretrain.data.images.rows import read_images
from pretrain.data.images.source import labelled_images
from pretrain.data.tables import read_table
from pretrain.errors import DataError, TokenizerError
from pretrain.models import build

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
TEXTS = [f"a {c} {s}" for c in ("red", "green", "blue") for s in ("ball", "cube", "cone", "ring")]


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[i]).save(file, "PNG")
    return file.getvalue()


def images_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i in range(12):
        (folder / f"{i}.png").write_bytes(png(i))
    return folder


def texts_beside(folder: Path) -> Path:
    for i, text in enumerate(TEXTS):
        (images_in(folder) if i == 0 else folder).joinpath(f"{i}.txt").write_text(f"{text}\n")
    return folder


def metadata(folder: Path) -> Path:
    lines = [json.dumps({"file_name": f"{i}.png", "text": t}) for i, t in enumerate(TEXTS)]
    (images_in(folder) / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def table(folder: Path) -> Path:
    images_in(folder / "pictures")
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [("image", "caption"), *((f"pictures/{i}.png", t) for i, t in enumerate(TEXTS))]
        )
    return folder / "pairs.csv"


def rows_of_bytes(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir()
    held = [{"bytes": png(i), "path": None} for i in range(12)]
    parquet.write_table(
        pyarrow.table({"image": held, "sentences": [[t] for t in TEXTS]}), folder / "a.parquet"
    )
    return folder / "a.parquet"


def member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def shard(path: Path, rows: Any, **others: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for i in rows:
            member(archive, f"part/{i:04}.json", json.dumps({"caption": "none", "n": i}).encode())
            member(archive, f"part/{i:04}.png", png(i))
            member(archive, f"part/{i:04}.txt", TEXTS[i].encode())
            member(archive, f"part/{i:04}.cls", str(i % 4).encode())
        for name, content in others.items():
            member(archive, name.replace("_", "."), content)
    return path


def tars(folder: Path) -> Path:
    folder.mkdir()
    shard(folder / "a-000.tar", range(7))
    shard(folder / "a-001.tar", range(7, 12))
    return folder / "a-{000..001}.tar"


SOURCES: list[Callable[[Path], Path]] = [texts_beside, metadata, table, rows_of_bytes, tars]


@pytest.mark.parametrize("make", SOURCES)
def test_every_form_of_a_source_gives_the_same_pairs(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    rows = captioned_images(str(make(tmp_path / "a")), 0.25, tokenizer="char")
    words = rows.processor.tokenizer
    found = {}
    for row in (*rows.train, *rows.valid):
        text = words.decode(row["input_ids"])
        found[text] = np.asarray(row["image"])
        assert row["input_ids"][0] == words.bos_id and row["input_ids"][-1] == words.eos_id
    assert len(rows.valid) == 3 and sorted(found) == sorted(TEXTS)
    assert all((found[text] == PIXELS[i]).all() for i, text in enumerate(TEXTS))
    assert rows.overrides == {
        "image_size": 8,
        "patch_size": 1,
        "num_channels": 3,
        "max_positions": 32,
    }


def test_a_folder_of_archives_and_a_pattern_are_read_too(tmp_path: Path) -> None:
    tars(tmp_path / "a")
    (tmp_path / "a" / "a-000.parquet").write_bytes(
        b""
    )  # what img2dataset writes beside each archive
    for source in (tmp_path / "a", tmp_path / "a" / "a-*.tar"):
        table = read_images(str(source))
        assert table.columns["caption"] == [[text] for text in TEXTS]
        assert table.columns["label"] == [i % 4 for i in range(12)]
        assert table.columns["n"] == list(range(12))
    found = labelled_images(str(tmp_path / "a"), 0.25)
    assert found.overrides["labels"] == ("0", "1", "2", "3")
    with pytest.raises(DataError, match=r"1 of 3 archives do not exist, such as .*a-002\.tar"):
        read_images(str(tmp_path / "a" / "a-{000..002}.tar"))
    with pytest.raises(DataError, match="names no file"):
        read_images(str(tmp_path / "none.tar"))


def test_captions_of_coco(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for i in range(3):
        (tmp_path / "val2017" / f"{i}.png").write_bytes(png(i))
    content: dict[str, Any] = {
        "info": {}, "images": [{"id": 7 + i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [{"image_id": 8, "id": k, "caption": f"text {k}"} for k in range(2)]
        + [{"image_id": 7, "id": 9, "caption": "other"}],
    }  # fmt: skip
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(content))
    found = read_pairs(path, {})
    assert found.columns["caption"] == [["other"], ["text 0", "text 1"]]
    assert [Path(one.source).resolve().name for one in found.columns["image"]] == ["0.png", "1.png"]
    assert found.columns["image"][0].read()[0].size
    content["annotations"][0]["image_id"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"captions, but 1 is missing or no image has it"):
        read_pairs(path, {})
    content["annotations"][0]["image_id"] = content["images"][0]["id"] = 8
    del content["annotations"][2]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="two images have one id"):
        read_pairs(path, {})
    content["annotations"].append(3)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"but has a wrong entry \('int'"):
        read_pairs(path, {})
    columns = {"images": ["0.png"], "annotations": [{"caption": "x"}], "text": ["y"]}
    path.write_text(json.dumps(columns))
    assert read_table(path).columns == columns


def test_byte_order_marks_and_dots_in_names_of_archives(tmp_path: Path, capsys: Any) -> None:
    mark = codecs.BOM_UTF8
    members = {
        "a.cls": mark + b"3", "a.txt": mark + b"one\ntwo", "a.json": mark + b'{"n": 5}',
        "a.png": png(0), "22.05.png": png(1),
    }  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    table = read_images(str(tmp_path / "a.tar"))
    found = {name: table.columns[name][0] for name in ("label", "caption", "n")}
    assert found == {"label": 3, "caption": ["one", "two"], "n": 5} and len(table) == 1
    said = capsys.readouterr().err
    assert "not read: .05.png (1); the name of a sample ends at its first dot" in said


def test_damaged_archives_and_samples_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shard(
        tmp_path / "a.tar", range(12), x_txt=b"alone", y_npy=b"1", z_json=b"[1]", w_txt=b"caf\xe9"
    )
    rows = captioned_images(str(whole), 0.25)
    said = capsys.readouterr().err
    assert len(rows.train) + len(rows.valid) == 12
    assert "4 of 16 samples have no image" in said
    assert "members that are not read: .npy (1), .json (1), .txt not in UTF-8 (1)" in said
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:7000])
    with pytest.raises(DataError, match=r"cut\.tar cannot be read as an archive"):
        captioned_images(str(tmp_path / "cut.tar"))
    good = whole.read_bytes()
    with tarfile.open(whole) as archive:
        places = [entry.offset for entry in archive]
        end = archive.offset
    flipped = bytearray(good)
    flipped[places[5] + 10] ^= 1
    damaged = {
        "flipped": bytes(flipped),
        "at": good[: places[5]],
        "inside": good[: places[5] + 100],
        "unclosed": good[:end],
        "joined": good + good,
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.tar cannot be read as an archive"):
            read_images(str(tmp_path / f"{name}.tar"))
    (tmp_path / "gz.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match="not compressed"):
        captioned_images(str(tmp_path / "gz.tar"))


def test_texts_that_are_not_read_cost_their_captions_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = texts_beside(tmp_path / "a")
    folder.joinpath("4.txt").write_bytes("caf\xe9".encode("latin-1"))
    folder.joinpath("5.txt").write_text("x " * 40_000)
    captions = read_images(folder).columns["caption"]  # which a task without captions ignores
    said = capsys.readouterr().err
    assert captions[4] is None and len(captions[5][0]) == 1 << 16 and None not in captions[:4]
    assert "1 texts beside a file cannot be read as UTF-8" in said and "'4.txt'" in said
    assert "1 texts beside a file are longer than 65,536 characters" in said and "'5.txt'" in said
    assert len(read_pairs(folder, {})) == len(TEXTS) - 1
    assert "1 of 12 rows have no caption" in capsys.readouterr().err


def test_only_ends_of_lines_divide_captions(tmp_path: Path) -> None:
    odd = "a\u2028red\u2029ball\x85on\x0ba\x0ctable\x1c"
    folder = texts_beside(tmp_path / "a")
    folder.joinpath("0.txt").write_text(f"{odd}b\r\n\rsecond\n", encoding="utf-8", newline="")
    lines = [f"{odd}b", "", "second"]
    assert read_images(folder).columns["caption"][:2] == [lines, [TEXTS[1]]]
    archive = shard(
        tmp_path / "a.tar", [], **{"0.png": png(0), "0.txt": "\r\n".join(lines).encode()}
    )
    assert read_images(str(archive)).columns["caption"] == [lines]


def test_several_captions_of_an_image_stand_in_one_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images_in(tmp_path / "a")
    lines = [("image", "caption")]
    lines += [(f"a/{i}.png", f"{text} {k}") for i, text in enumerate(TEXTS) for k in (1, 2)]
    lines += [("a/0.png", '["a red ball 1", "a third"]'), ("a/1.png", " "), ("none.png", "")]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    found = read_pairs(tmp_path / "pairs.csv", {})
    assert found.columns["caption"][0] == ["a red ball 1", "a red ball 2", "a third"]
    assert [len(texts) for texts in found.columns["caption"]] == [3] + [2] * 11
    said = capsys.readouterr().err
    assert "2 of 27 rows have no caption and are left out" in said
    assert "12 images in 25 rows" in said
    rows = captioned_images(str(tmp_path / "pairs.csv"), 0.25)
    row = next(r for r in (*rows.train, *rows.valid) if len(r["lengths"]) == 3)
    assert row["lengths"].sum() == len(row["input_ids"])


def test_broken_images_and_long_captions_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = texts_beside(tmp_path / "a")
    (folder / "3.png").write_bytes(b"no image")
    (folder / "4.txt").unlink()
    (folder / "notes.txt").write_text("belongs to no image")
    rows = captioned_images(str(folder), 0.25, max_length=4, tokenizer="char")
    said = capsys.readouterr().err
    assert len(rows.train) + len(rows.valid) == 10
    assert "rows left out, broken image (it is no image of a known format)" in said
    assert "1 of 12 rows have no caption" in said
    assert "1 files are no images by their names and are left out: 'notes.txt'" in said
    assert "have a caption of more than 4 tokens, which is cut" in said
    assert all(len(row["input_ids"]) == 4 for row in rows.train)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "char"])
def test_a_trained_tokenizer_fits_clip(kind: str, tmp_path: Path) -> None:
    """Both ends stand around every text, and the end token has not the id that transformers reads in another way."""
    rows = captioned_images(str(texts_beside(tmp_path / "a")), 0.25, tokenizer=kind)
    words = rows.processor.tokenizer
    build("clip", "tiny", vocab_size=len(words), eos_id=words.eos_id, pad_id=words.pad_id)
    words.save(tmp_path / "words")
    again = type(words).from_directory(tmp_path / "words")
    assert again.fingerprint == words.fingerprint
    ids = again.frame_texts(["a red ball"])[0].ids
    assert ids[0] == words.bos_id and ids[-1] == words.eos_id != 2 and ids.count(words.eos_id) == 1
    # A tokenizer that is given is used as it is.
    same = captioned_images(str(tmp_path / "a"), 0.25, tokenizer=str(tmp_path / "words"))
    assert same.processor.tokenizer.fingerprint == words.fingerprint


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    source = table(tmp_path / "a")
    with pytest.raises(DataError, match="no column 'body'"):
        captioned_images(str(source), caption="body")
    with pytest.raises(TokenizerError, match="tokenizer=wordpiece"):
        captioned_images(str(source), lowercase=True)
    with pytest.raises(DataError, match="the caption is int"):
        read_pairs([{"image": PIXELS[0], "caption": 3}], {})
    with pytest.raises(DataError, match="no column for caption"):
        read_pairs(images_in(tmp_path / "b"), {})


def test_a_folder_takes_time_in_proportion_to_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, plain = [0], PurePath.__hash__

    def counted(path: PurePath) -> int:
        seen[0] += 1
        return plain(path)

    monkeypatch.setattr(PurePath, "__hash__", counted)
    calls = []
    for count in (20, 80):
        (folder := tmp_path / str(count)).mkdir()
        for i in range(count):
            (folder / f"{i}.png").write_bytes(b"")
            (folder / f"{i}.txt").write_text("a cat")
        seen[0] = 0
        assert len(read_images(folder).columns["caption"]) == count
        calls.append(seen[0])
    assert calls[1] < 5 * calls[0]
