"""`prepare`: what it writes, what it counts, when it works again, and that a kill changes nothing."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain
from data.documents import documents
from pretrain.data.loader import Loader
from pretrain.data.packing import pack
from pretrain.data.paths import FileHashes
from pretrain.data.prepare import Prepared
from pretrain.data.sources import PythonSource, resolve_sources, sized_pieces
from pretrain.errors import DataError, TokenizerError

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "was",
    "his",
    "it",
    "he",
    "for",
    "as",
    "with",
    "but",
]


def paragraph(seed: int, words: int = 60) -> str:
    rng = random.Random(seed)
    return (
        " ".join(rng.choice(WORDS) + str(rng.randrange(30)) for _ in range(words))
        + f" – end {seed}."
    )


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"id": k, "text": t}) + "\n" for k, t in enumerate(texts)),
        encoding="utf-8",
    )
    return path


def everything(rows) -> list[list[int]]:
    """Return all documents that stand in rows, in any order."""
    found = []
    for k in range(len(rows)):
        row = rows[k]
        for number in range(1, int(row["document_ids"].max()) + 1):
            found.append(row["input_ids"][row["document_ids"] == number].tolist())
    return found


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_documents_come_back_whole_and_counts_hold(tmp_path: Path) -> None:
    texts = [paragraph(k, 5 + k % 60) for k in range(150)]
    source = write_jsonl(tmp_path / "a.jsonl", texts + texts[:7] + ["", "  \n"])
    data = pretrain.prepare(
        source, tmp_path / "out", vocab_size=400, row_length=512, valid=0.2, quiet=True
    )
    manifest = data.manifest
    assert (manifest["documents"], manifest["duplicates"], manifest["empty"]) == (159, 7, 2)
    train = [data.tokenizer.decode(ids) for ids in everything(data.train)]
    valid = [data.tokenizer.decode(ids) for ids in everything(data.valid)]
    assert sorted(train + valid) == sorted(texts)
    assert not set(train) & set(valid) and 10 <= len(valid) <= 60
    for rows, found in ((data.train, train), (data.valid, valid)):
        assert rows.num_documents == len(found)
        assert rows.num_bytes == sum(len(text.encode()) for text in found)
        assert rows.num_characters == sum(map(len, found))
        assert rows.num_targets == rows.num_tokens - len(found)
        framed = everything(rows)
        assert all(
            ids[0] == data.tokenizer.bos_id and ids[-1] == data.tokenizer.eos_id for ids in framed
        )
        assert rows.stats["longest"] == max(map(len, framed))
    for word in ("documents", "duplicates", "bytes per token", "longest", "rows", "padding"):
        assert word in data.table()
    assert "Prepared(" in repr(data) and "<pre>" in data._repr_html_()


@pytest.mark.parametrize("valid", [0, 0.5, "again"])
def test_documents_that_occur_again_are_kept_if_asked(tmp_path: Path, valid: Any) -> None:
    texts = [paragraph(k) for k in range(6)] * 3 + [" "]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    held = write_jsonl(tmp_path / "b.jsonl", ["b", "b"]) if valid == "again" else valid
    options: dict[str, Any] = {"tokenizer": "char", "valid": held, "quiet": True}
    data = pretrain.prepare(source, tmp_path / "out", keep_duplicates=True, **options)
    assert (data.manifest["duplicates"], data.manifest["empty"]) == (0, 1)
    counts = data.train.num_documents, data.valid.num_documents
    assert sum(counts) == 18 + 2 * (valid == "again")
    assert not any(count % (2 if valid == "again" else 3) for count in counts)
    fewer = pretrain.prepare(source, tmp_path / "out", **options)
    assert fewer.manifest["duplicates"] > 0 and fewer.fingerprint != data.fingerprint


def test_split_belongs_to_the_content_and_the_seed(tmp_path: Path) -> None:
    texts = [paragraph(k) for k in range(60)]

    def held(name: str, order: list[str], seed: int) -> set[str]:
        source = write_jsonl(tmp_path / f"{name}.jsonl", order)
        data = pretrain.prepare(
            source, tmp_path / name, tokenizer="char", valid=0.3, seed=seed, quiet=True
        )
        return {
            data.tokenizer.decode(ids)
            for ids in everything(data.valid)
            if ids[0] == data.tokenizer.bos_id
        }

    same = held("a", texts, 0)
    assert same == held("b", texts[::-1], 0)
    assert same != held("c", texts, 1)


def test_last_tenth_of_one_text(tmp_path: Path) -> None:
    text = "\n".join(paragraph(k) for k in range(300))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for valid in ("last:0.1", 0.1):
        data = pretrain.prepare(
            tmp_path / "a.txt", tokenizer="char", valid=valid, row_length=128, quiet=True
        )
        cut = int(len(text) * (1 - 0.1))
        assert data.train.num_characters == cut and data.valid.num_characters == len(text) - cut
        ids = np.fromfile(data.path / "valid.tokens.bin", dtype=np.uint16)
        assert data.tokenizer.decode(ids) == text[cut:]
    assert "one document only" in " ".join(data.manifest["notes"])


def test_special_tokens_that_are_typed_are_told(tmp_path: Path) -> None:
    stories, mark = [f"the red cat sat on mat {i}\n" * 9 for i in range(20)], "<|endoftext|>"
    (tmp_path / "a.txt").write_text(mark.join(stories))
    data = pretrain.prepare(tmp_path / "a.txt", tmp_path / "1", vocab_size=300, row_length=32)
    found = [note for note in data.manifest["notes"] if "typed" in note]
    assert len(found) == 1 and "1 of 1 documents" in found[0] and f"separator='{mark}'" in found[0]
    options = {"vocab_size": 300, "row_length": 32, "separator": mark}
    data = pretrain.prepare(tmp_path / "a.txt", tmp_path / "2", **options)
    assert "typed" not in " ".join(data.manifest["notes"])
    rows = [{"text": story + "<eos>" * (i < 3)} for i, story in enumerate(stories)]
    data = pretrain.prepare(rows, tmp_path / "3", tokenizer=data.tokenizer, row_length=32)
    assert any("'<eos>' is typed into 3 of 20 documents" in note for note in data.manifest["notes"])
    assert "separator" not in " ".join(data.manifest["notes"])


def test_last_part_of_many_documents(tmp_path: Path) -> None:
    texts = [paragraph(k) for k in range(40)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    data = pretrain.prepare(
        source, tokenizer="char", valid="last:0.25", row_length=2048, quiet=True
    )
    parts = [
        "".join(data.tokenizer.decode(ids) for ids in everything(rows))
        for rows in (data.train, data.valid)
    ]
    assert sorted("".join(parts)) == sorted("".join(texts))
    assert len(parts[1]) == len("".join(texts)) - int(len("".join(texts)) * 0.75)


def test_validation_source_and_contamination(tmp_path: Path) -> None:
    texts = [paragraph(k) for k in range(30)]
    train, valid = (
        write_jsonl(tmp_path / "t.jsonl", texts[:25]),
        write_jsonl(tmp_path / "v.jsonl", texts[20:]),
    )
    data = pretrain.prepare(train, valid=valid, tokenizer="char", quiet=True)
    assert data.manifest["contaminated"] == 5
    assert (data.train.num_documents, data.valid.num_documents) == (20, 10)
    assert "also occur in validation" in data.table()


def test_all_formats_give_the_same_documents(tmp_path: Path) -> None:
    texts = [paragraph(k) + '\nsecond line, "quoted"' for k in range(20)]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as out:
        out.write(plain.read_bytes())
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([["id", "text"], *enumerate(texts)])
    (tmp_path / "d.txt").write_text("<sep>".join(texts) + "<sep>", encoding="utf-8")
    folder = tmp_path / "folder" / "deep"
    folder.mkdir(parents=True)
    for k, text in enumerate(texts):
        (folder / f"{k:02}.md").write_text(text, encoding="utf-8")
    sources: list[object] = [
        plain,
        tmp_path / "b.jsonl.gz",
        tmp_path / "c.csv",
        tmp_path / "d.txt",
        tmp_path / "folder",
    ]
    sources.append(str(tmp_path / "folder" / "**" / "*.md"))
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"text": texts}), tmp_path / "f.parquet")
    datasets = pytest.importorskip("datasets")
    sources += [
        tmp_path / "e.jsonl.zst",
        tmp_path / "f.parquet",
        datasets.Dataset.from_dict({"text": texts}),
    ]
    for source in sources:
        (found,), _ = resolve_sources(source, separator="<sep>")
        assert list(documents(found)) == texts, source
        assert found.fingerprint(FileHashes()) == found.fingerprint(FileHashes())


def test_pieces_join_to_the_document_and_give_its_tokens(tmp_path: Path) -> None:
    text = "\n\n".join(paragraph(k) for k in range(900)) + "x" * 90_000 + " " * 50_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (source,), _ = resolve_sources(tmp_path / "a.txt")
    pieces = list(sized_pieces(source.pieces()))
    assert "".join(piece for piece, _ in pieces) == text
    assert [end for _, end in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece) for piece, _ in pieces) <= 32_768
    normal = "\n\n".join(paragraph(k) for k in range(900))
    tokenizer = pretrain.train_tokenizer(tmp_path / "a.txt", vocab_size=300)
    cut = [
        i for piece, _ in sized_pieces(iter([(normal, True)]), 500) for i in tokenizer.encode(piece)
    ]
    assert cut == tokenizer.encode(normal)


def test_mixture_is_realised_and_told(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [paragraph(k) for k in range(300)])
    b = write_jsonl(tmp_path / "b.jsonl", [paragraph(k) for k in range(1000, 1100)])
    data = pretrain.prepare({a: 1, b: 3}, tokenizer="char", row_length=64, quiet=True)
    assert [source["share"] for source in data.sources] == [0.25, 0.75]
    loader = Loader(data.train, 0)
    rows = loader.indices(0, loader.epoch_length)
    first = data.train.source_rows[0]
    assert (rows < first).mean() == pytest.approx(0.25, abs=0.001)
    assert "mixture: 25.0 %" in data.table()


def test_second_call_is_free_and_changes_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [paragraph(k) for k in range(40)])
    out = tmp_path / "out"

    def go(**options: object) -> tuple[Prepared, str]:
        data = pretrain.prepare(source, out, vocab_size=300, row_length=64, **options)  # type: ignore[arg-type]
        return data, capsys.readouterr().err

    first, _ = go()
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again, said = go()
    assert "nothing to do" in said and again.fingerprint == first.fingerprint
    same = {"vocab_size": 300, "row_length": 64, "seed": 0, "workers": 1}
    numpy: Any = {name: np.int64(value) for name, value in same.items()}
    assert pretrain.prepare(source, out, **numpy).fingerprint == first.fingerprint
    assert "nothing to do" in capsys.readouterr().err
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    os.utime(source, ns=(1, 1))
    _, said = go()
    assert "nothing to do" in said, "a new time with the same content is no change"
    third, said = go(seed=5)
    assert "seed 0 -> 5" in said and third.fingerprint != first.fingerprint
    write_jsonl(source, [paragraph(k) for k in range(41)])
    _, said = go(seed=5)
    assert "content of a source" in said
    cached = pretrain.prepare(source, vocab_size=300, quiet=True)
    assert str(cached.path).startswith(os.environ["PRETRAIN_CACHE"])
    assert pretrain.prepare(source, vocab_size=300, quiet=True).path == cached.path
    assert not list(tmp_path.glob(".out*")), "nothing is left behind"


def test_python_corpus(tmp_path: Path) -> None:
    source = PythonSource()
    files = source.files()
    names = {file.relative_to(source.root).as_posix() for file in files}
    assert "json/__init__.py" in names and not any(
        name.startswith(("test/", "site-packages/")) for name in names
    )
    texts = list(documents(source))
    assert sum(map(len, texts)) > 3_000_000 and len(texts) > len(files)


@pytest.mark.slow
def test_padding_on_real_text(data_sets: Path) -> None:
    sources = [data_sets / "books", data_sets / "python_peps"]
    tokenizer = pretrain.train_tokenizer(sources, vocab_size=2048, sample_bytes=1_000_000)
    data = pretrain.prepare(
        sources, tokenizer=tokenizer, row_length=512, valid="last:0.01", quiet=True, workers=1
    )
    assert data.train.padding <= 0.02
    offsets = np.fromfile(data.path / "train.documents.bin", dtype=np.int64)
    packing = pack(offsets, 256)
    assert packing.segments[:, 1].sum() >= 0.98 * 256 * (len(packing.rows) - 1)
    entropy = data.unigram_entropy
    assert entropy is not None and 4 < entropy < np.log(2048)
    assert 0 < data.manifest["unigram"]["most_frequent"] < 0.2


def test_unigram_baseline_by_hand(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [paragraph(k) for k in range(50)])
    data = pretrain.prepare(source, tokenizer="char", valid=0.3, quiet=True)
    vocab, bos = data.tokenizer.vocab_size, data.tokenizer.bos_id
    counts = []
    for split in ("train", "valid"):
        ids = np.fromfile(data.path / f"{split}.tokens.bin", dtype=np.uint16)
        counts.append(np.bincount(ids[ids != bos], minlength=vocab))
    p = (counts[0] + 1) / (counts[0].sum() + vocab)
    assert data.unigram_entropy == pytest.approx(-(counts[1] * np.log(p)).sum() / counts[1].sum())


def test_child_processes_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [paragraph(k, 300) for k in range(60)])
    one = pretrain.prepare(source, tmp_path / "one", vocab_size=300, quiet=True, workers=1)
    monkeypatch.setattr("pretrain.data.pipeline._SMALL_BYTES", 0)
    monkeypatch.setattr("pretrain.data.pipeline._BATCH_CHARS", 5000)
    two = pretrain.prepare(source, tmp_path / "two", vocab_size=300, quiet=True, workers=3)
    assert contents(one.path) == contents(two.path)


_CHILD = """
import sys, time
import pretrain.data.pipeline as pipeline
from pretrain import prepare
pipeline._JOURNAL_SECONDS = 0
pipeline._BATCH_CHARS = 2000
whole = pipeline._Writer.write
def write(self, *arguments):
    whole(self, *arguments)
    time.sleep(0.01)
pipeline._Writer.write = write
prepare(sys.argv[1], sys.argv[2], vocab_size=400, row_length=64, valid=0.1, quiet=True)
"""


def test_kill_9_then_restart_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [paragraph(k, 20 + k % 700) for k in range(80)])
    whole = tmp_path / "whole"
    pretrain.prepare(source, whole, vocab_size=400, row_length=64, valid=0.1, quiet=True)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    rng = random.Random(0)
    kills = 0
    for attempt in range(40):
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(source), str(out)], env=environment
        )
        if attempt < 5:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and child.poll() is None:
                if list(tmp_path.glob(".out.preparing-*/journal.json")):
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.12))
            child.send_signal(signal.SIGKILL)
            kills += child.wait() == -signal.SIGKILL
            if not out.exists():
                with pytest.raises(DataError, match="no prepared data"):
                    Prepared.open(out)
        else:
            assert child.wait() == 0
            break
    assert kills >= 2
    assert contents(out) == contents(whole)
    assert not list(tmp_path.glob(".out*"))


def test_two_processes_prepare_the_same_data(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [paragraph(k, 200) for k in range(40)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(source), str(tmp_path / "out")], env=environment
        )
        for _ in range(2)
    ]
    assert [child.wait() for child in children] == [0, 0]
    assert len(Prepared.open(tmp_path / "out", verify=True).train)
    assert not list(tmp_path.glob(".out*"))


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a b c"])
    for wrong in ({"row_length": 1}, {"valid": 1.5}, {"valid": "last:x"}, {"separator": ""}):
        with pytest.raises(DataError):
            pretrain.prepare(source, tmp_path / "out", quiet=True, **wrong)  # type: ignore[arg-type]
    for sources in ([], {source: -1}, {source: "much"}, [3]):
        with pytest.raises(DataError):
            pretrain.prepare(sources, tmp_path / "out", quiet=True)
    with pytest.raises(TokenizerError):
        pretrain.prepare(source, tokenizer=3, quiet=True)  # type: ignore[arg-type]


def test_entries_made_and_unknown_tokens_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rare = "".join(chr(0x4E00 + k) for k in range(300))
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 50 + rare * 2, encoding="utf-8")
    options = {"row_length": 32, "valid": 0}
    pretrain.prepare(
        tmp_path / "a.txt", tmp_path / "a", tokenizer="wordpiece", vocab_size=2000, **options
    )
    said = capsys.readouterr().err
    made = Prepared.open(tmp_path / "a")
    assert (
        f"{len(made.tokenizer):,} tokens (2,000 asked for)" in said
        and "0.00 % of the tokens are [UNK]" in said
    )
    assert f"note: the vocabulary has {len(made.tokenizer)} of the 2,000 entries" in said
    pretrain.prepare(
        tmp_path / "a.txt", tmp_path / "b", tokenizer="wordpiece", vocab_size=64, **options
    )
    tokens = np.concatenate(
        [row["input_ids"][row["document_ids"] > 0] for row in Prepared.open(tmp_path / "b").train]
    )
    share = float((tokens == Prepared.open(tmp_path / "b").tokenizer.unk_id).mean())
    said = capsys.readouterr().err
    assert share > 0.2 and f"{100 * share:.2f} % of the tokens are [UNK]" in said
    assert f"note: {100 * share:.1f} % of the tokens are [UNK]" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_tokenizer_is_trained_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    """The library does not return before it has finished, which on this text takes several seconds."""
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(4, 14)))
        for _ in range(400_000)
    ]
    (tmp_path / "a.txt").write_text(" ".join(words))
    command = [
        sys.executable,
        "-m",
        "pretrain",
        "prepare",
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "b" / "out"),
    ]
    source = str(Path(pretrain.__file__).parents[1])
    environment = {**os.environ, "PRETRAIN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": source}
    process = subprocess.Popen(
        [*command, "--vocab_size", "30000"], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    assert any("training a bpe tokenizer" in line for line in process.stderr)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"a.txt"}
    process.stderr.close()


def test_a_tokenizer_trained_apart_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import pretrain.data.workers as apart

    texts = [paragraph(k) for k in range(30)]
    for kind in ("bpe", "wordpiece"):
        here = apart.train_apart(texts, kind, vocab_size=300, lowercase=False)
        monkeypatch.setattr(apart, "_SMALL_CHARS", 0)
        there = apart.train_apart(texts, kind, vocab_size=300, lowercase=False)
        assert here.fingerprint == there.fingerprint and here.roles == there.roles
        with pytest.raises(TokenizerError, match="vocab_size 3 is too small"):
            apart.train_apart(texts, kind, vocab_size=3, lowercase=False)
        monkeypatch.undo()
