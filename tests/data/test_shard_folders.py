"""Folders of parquet shards are read by split, as the datasets library reads them, by every task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.paths import find_files
from pretrain.data.shard_folders import parts_of_shards, pattern_of, shards_of
from pretrain.data.sources import resolve_sources
from pretrain.data.tables import read_table
from pretrain.errors import DataError
from pretrain.finetuning.rows import open_data
from pretrain.finetuning.settings import TuneConfig
from pretrain.objectives.classification import Classification


def write(folder: Path, files: Mapping[str, list[Any]]) -> Path:
    for name, labels in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        texts = [f"{name} {k}" for k in range(len(labels))]
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / name)
    return folder


HUB = {
    "data/train-00000-of-00002.parquet": [0, 1, 0],
    "data/train-00001-of-00002.parquet": [1, 0, 1],
    "data/validation-00000-of-00001.parquet": [0, 1],
    "data/test-00000-of-00001-0a1b.parquet": [-1, -1],
}


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ([*HUB], {"train": 2, "validation": 1, "test": 1}),
        (["train-00000-of-00001.parquet", "unsupervised-00000-of-00001.parquet"], {"train": 1, "unsupervised": 1}),
        (["train.parquet", "dev.parquet"], {"train": 1, "dev": 1}),
        (["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"], {"train": 2, "test": 1}),
        (["part-0.parquet", "part-1.parquet"], {"train": 2}),
        (["validation_matched-00000-of-00001.parquet"], {"validation_matched": 1}),
        (["train.parquet", "other.parquet"], {}),
        (["metadata.parquet"], {}),
        (["sst2/train.parquet"], {}),
        (["train/data-00000-of-00002.parquet", "train/data-00001-of-00002.parquet", "test/data-00000-of-00001.parquet"],
         {"train": 2, "test": 1}),
        (["Train-00000-of-00001.parquet", "Test-00000-of-00001.parquet"], {"train": 1, "test": 1}),
        (["train/0000.parquet", "train/._0000.parquet"], {"train": 1}),
        (["train.parquet/part-0.parquet"], {}),
    ],
)  # fmt: skip
def test_splits_are_told_by_names(names: list[str], splits: dict[str, int], tmp_path: Path) -> None:
    write(tmp_path, {name: [0] for name in names})
    (tmp_path / "README.md").write_text("x")
    assert {split: len(files) for split, files in shards_of(tmp_path).items()} == splits
    (tmp_path / "more.csv").write_text("text\n")
    assert shards_of(tmp_path) == {}  # which of them are the rows is not known


def test_the_splits_are_what_the_datasets_library_finds(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    patterns = datasets.data_files.get_data_patterns(str(write(tmp_path, HUB)))
    assert {str(split) for split in patterns} == set(shards_of(tmp_path))


def test_rows_name_their_file_and_the_split_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, HUB)
    train = read_table(str(tmp_path), name="train")
    assert train.columns["label"] == [0, 1, 0, 1, 0, 1] and capsys.readouterr().err == ""
    assert train.take([4]).where(0) == f"row 2 of {tmp_path / 'data/train-00001-of-00002.parquet'}"
    assert len(read_table(tmp_path, name="validation")) == 2
    assert read_table(tmp_path, name="data").columns["label"] == [-1, -1]
    assert "the split 'test' is used of 3" in capsys.readouterr().err
    assert len(read_table(str(tmp_path / "data" / "train-*.parquet"))) == 6
    assert parts_of_shards(tmp_path) == ["train", "valid", "test"]
    write(tmp_path / "two", {"train.parquet": [0], "test.parquet": [1, 1]})
    assert len(read_table(tmp_path / "two", name="test")) == 2 and capsys.readouterr().err == ""
    assert len(read_table(tmp_path / "two", name="validation")) == 1
    assert "the split 'train' is used of 2 splits (not used: test)" in capsys.readouterr().err
    (tmp_path / "data/train-00000-of-00002.parquet").unlink()
    read_table(tmp_path, name="train")
    assert "1 files of the split 'train' are not there" in capsys.readouterr().err


def test_the_pattern_of_a_split_fits_no_other(tmp_path: Path) -> None:
    names = [f"{split}-00000-of-00001.parquet" for split in ("train", "train_sft", "Test")]
    found = shards_of(write(tmp_path / "a", {name: [0] for name in names}))
    for split, files in found.items():
        assert [Path(file) for file in find_files(pattern_of(split, files))] == files
    odd = shards_of(
        write(
            tmp_path / "b", {"train.parquet": [0], "train-x.parquet": [0], "training.parquet": [0]}
        )
    )
    assert pattern_of("train", odd["train"]) == str(odd["train"][0])


def test_a_pattern_that_fits_several_splits_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, HUB)
    assert len(read_table(str(tmp_path / "data" / "*.parquet"))) == 10
    assert (
        "the files of the splits test, train, validation are read as one" in capsys.readouterr().err
    )
    read_table(str(tmp_path / "data" / "train*.parquet"))
    assert capsys.readouterr().err == ""


def test_shards_that_are_there_twice_are_not_counted_as_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {f"train-00000-of-00001-{digest}.parquet": [0] for digest in ("0a", "0b")})
    assert len(read_table(tmp_path)) == 2 and "not there" not in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path) -> None:
    names = [f"{split}-00000-of-00001.parquet" for split in ("train_gen", "train_sft")]
    write(tmp_path / "a", {name: [0] for name in names})
    with pytest.raises(DataError, match=r"train_gen, train_sft, and none .*train_gen\*\.parquet"):
        read_table(tmp_path / "a", name="train")
    write(tmp_path / "b", {"train-00000-of-00002.parquet": [0]})
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b" / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match="differ in their columns"):
        read_table(tmp_path / "b")
    write(tmp_path / "c", {"x/0.parquet": [0], "y/0.parquet": [0]})
    with pytest.raises(DataError, match="different folders"):  # paths of images would be those of x
        read_table(str(tmp_path / "c" / "*" / "0.parquet"))


def test_held_out_rows_are_taken_and_a_test_split_without_labels_is_left(tmp_path: Path) -> None:
    folder = str(write(tmp_path, HUB))
    settings = TuneConfig.load({"data": {"train": folder, "valid": folder, "test": folder}})
    data = open_data(settings, {}, Classification)
    assert data.counts == {"train": 6, "valid": 2}
    assert any("the test split is not used" in line for line in data.notes)


def test_pretraining_says_that_all_splits_are_read(tmp_path: Path) -> None:
    write(tmp_path, HUB)
    (source,), _ = resolve_sources(str(tmp_path))
    assert len(list(source.pieces())) == 10
    assert any("all are read; " in line and "train*.parquet" in line for line in source.notes)
