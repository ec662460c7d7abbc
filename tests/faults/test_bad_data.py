"""Bad data: each fault gives one clear error or one counted line, and nothing is lost."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pretrain
from pretrain.data import readers
from pretrain.data.prepare import Prepared
from pretrain.data.shards import token_dtype
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import DataError, PretrainError, TokenizerError

GOOD = [f"document number {k} says hello to the other {k * k} documents" for k in range(30)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(source: object, out: Path | None = None, **options: object) -> Prepared:
    chosen = {"tokenizer": "char", "row_length": 64, "quiet": True, **options}
    return pretrain.prepare(source, out, **chosen)  # type: ignore[arg-type]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "good.jsonl", GOOD)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz"])
def test_empty_source(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(DataError, match="no text to train on"):
        prepare(tmp_path / name)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file that can be read"):
        prepare(tmp_path)


def test_no_such_file(good: Path) -> None:
    with pytest.raises(DataError, match=r"Did you mean .*good\.jsonl"):
        prepare(good.with_name("god.jsonl"))
    with pytest.raises(DataError, match="no file matches"):
        prepare(str(good.parent / "*.txt"))
    with pytest.raises(DataError, match="there is no folder"):
        prepare("no/such/folder/a.txt")


def test_wrong_column(good: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"good\.jsonl:1 has no column 'body'; columns present: 'text'"
    ):
        prepare(good, text="body")
    (tmp_path / "a.csv").write_text("title,review\nx,y\n")
    with pytest.raises(DataError, match=r"'title', 'review'.*Did you mean 'review'"):
        prepare(tmp_path / "a.csv", text="reviews")
    datasets = pytest.importorskip("datasets")
    with pytest.raises(DataError, match="columns present: 'body'"):
        prepare(datasets.Dataset.from_dict({"body": ["a"]}))
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="columns present: 'body'"):
        prepare(tmp_path / "a.parquet")


@pytest.mark.parametrize("block", [1 << 20, 7])
def test_bad_utf8_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(readers, "_BLOCK", block)
    (tmp_path / "a.txt").write_bytes("première\nü line\nab".encode() + b"cd\xff rest\n")
    with pytest.raises(DataError, match=r"a\.txt:3:5 is not UTF-8: byte 0xff.*offset 22 of"):
        prepare(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xe2\x82")
    with pytest.raises(DataError, match=r"b\.txt:2:5 is not UTF-8: byte 0xe2"):
        prepare(tmp_path / "b.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9t\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2:11 is not UTF-8: byte 0xe9"):
        prepare(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_bytes(b"text\n\xe9t\xe9\n")
    with pytest.raises(DataError, match=r"a\.csv:2:1 is not UTF-8"):
        prepare(tmp_path / "a.csv")


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ELF\0\1\2\3" * 100)
    with pytest.raises(DataError, match=r"a\.txt is a binary file: byte 3 is NUL"):
        prepare(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(DataError, match=r"gzip data \(name it \.gz\)"):
        prepare(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_bytes("hello".encode("utf-16-le"))  # no byte order mark says so
    with pytest.raises(DataError, match="byte 1 is NUL"):
        prepare(tmp_path / "c.txt")


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        body = "hello world " * 9 if name == "a.txt" else json.dumps({"text": "hello world " * 9})
        (tmp_path / name).write_text(body, encoding="utf-8-sig")
        assert "\ufeff" not in prepare(tmp_path / name).tokenizer.vocab


def test_damaged_archives(tmp_path: Path, good: Path) -> None:
    whole = gzip.compress(good.read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is a damaged or cut gzip file"):
        prepare(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="damaged or cut gzip"):
        prepare(tmp_path / "b.jsonl.gz")
    pytest.importorskip("zstandard")
    (tmp_path / "c.jsonl.zst").write_bytes(b"not zstandard at all")
    with pytest.raises(DataError, match="damaged or cut zstandard"):
        prepare(tmp_path / "c.jsonl.zst")
    pytest.importorskip("pyarrow")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        prepare(tmp_path / "d.parquet")


def test_long_line_is_cut_into_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 300_000 + "x" * 300_000)
    data = prepare(tmp_path / "a.txt", row_length=512)
    assert data.train.num_characters + data.valid.num_characters == 1_800_000
    assert data.train.num_documents == 1


def test_too_long_a_table_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_LINE", 1000)
    source = jsonl(tmp_path / "a.jsonl", ["short", "x" * 2000])
    with pytest.raises(DataError, match=r"a\.jsonl:2 is longer than"):
        prepare(source)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_line_of_100_megabytes(tmp_path: Path, name: str) -> None:
    line = "ten bytes " * 10_000_000
    (tmp_path / name).write_text(line if name == "a.txt" else json.dumps({"text": line}))
    code = (
        "import pathlib, sys, pretrain\n"
        "data = pretrain.prepare(sys.argv[1], sys.argv[2], vocab_size=300, quiet=True, workers=2)\n"
        "peak = pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]\n"
        "print(data.train.num_bytes + data.valid.num_bytes, peak)"
    )
    # Not getrusage: its peak starts at that of the process which forked, here a whole test run.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / "out")]
    output = subprocess.run(
        arguments, env=environment, check=True, capture_output=True, text=True
    ).stdout
    size, peak = map(int, output.split())
    assert size == len(line) and peak < (400_000 if name == "a.txt" else 1_200_000)


def test_zero_length_documents_are_counted(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["", *GOOD, " \n", ""])
    with source.open("a") as out:
        out.write('{"text": null}\n\n')
    data = prepare(source)
    assert data.manifest["empty"] == 4 and data.train.num_documents + data.valid.num_documents == 30
    assert "4 empty documents left out" in data.table()


def test_only_empty_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 documents, 3 of them empty"):
        prepare(jsonl(tmp_path / "a.jsonl", ["", " ", "\n"]))


def test_duplicates_are_counted(tmp_path: Path) -> None:
    data = prepare(jsonl(tmp_path / "a.jsonl", GOOD * 3))
    assert data.manifest["duplicates"] == 60 and "60 duplicates" in data.table()


def test_data_smaller_than_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hi")
    data = prepare(tmp_path / "a.txt", row_length=512, valid=0)
    assert len(data.train) == 1 and len(data.valid) == 0 and data.unigram_entropy is None
    assert "the train text fills less than one row" in data.table()


def test_no_validation_rows_is_told(tmp_path: Path, good: Path) -> None:
    data = prepare(good, valid=0)
    assert len(data.valid) == 0 and data.valid.num_documents == 0 and data.train.num_documents == 30
    assert data.unigram_entropy is None and "no validation rows" in data.table()
    assert data.bytes_per_token > 0
    empty = prepare(good, valid=jsonl(tmp_path / "empty.jsonl", ["", " "]))
    assert len(empty.valid) == 0 and "no validation rows" in empty.table()
    assert "no validation rows" not in prepare(good).table()


def test_validation_of_one_document_at_least(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("some text to learn from")
    data = prepare(tmp_path / "b.txt", valid="last:0.001")
    assert data.valid.num_documents == 1
    two = prepare(jsonl(tmp_path / "two.jsonl", GOOD[:2]), valid=0.0001)
    assert two.valid.num_documents == 1 and "too few" in two.table()
    most = prepare(jsonl(tmp_path / "two.jsonl", GOOD[:2]), valid=0.99999)
    assert most.train.num_documents == 1


def test_torn_jsonl_tail_is_counted(tmp_path: Path, good: Path) -> None:
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(good.read_bytes() + b'{"text": "half a li\xe2\x82')
    data = prepare(torn)
    assert data.train.num_documents + data.valid.num_documents == 30
    assert "torn.jsonl:31: the last line is torn" in data.table()


def test_json_error_is_located(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n{"text": "b",}\n{"text": "c"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2:\d+ is not valid JSON"):
        prepare(source)
    source.write_text('{"text": "a"}\n["text"]\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2 holds list, not an object"):
        prepare(source)
    source.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'text' holds int, not text"):
        prepare(source)
    source.write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl is not valid JSON: it is nested too deeply"):
        prepare(source)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "broken \\ud83d emoji, and some more text"}\n')
    assert prepare(source, valid=0).train.num_documents == 1


def test_csv_row_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,fine\n2\n")
    with pytest.raises(DataError, match=r"a\.csv:3 has 1 columns, but the header has 2"):
        prepare(tmp_path / "a.csv")


def test_broken_tokenizer_file(good: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\x80\x04pickle?")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        prepare(good, tokenizer=tmp_path / "tokenizer.json")


def test_token_id_beyond_the_vocabulary(good: Path, tmp_path: Path) -> None:
    tokenizer = train_from_texts(GOOD, "char")
    tokenizer.vocab_size = 100
    with pytest.raises(DataError, match=r"gave id \d+, but its vocabulary has 100 tokens"):
        prepare(good, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_token_id_fits_store() -> None:
    assert token_dtype(2**16) == np.uint16 and token_dtype(2**16 + 1) == np.uint32
    with pytest.raises(DataError):
        token_dtype(2**33)


def test_large_vocabulary_is_stored_whole(tmp_path: Path, good: Path) -> None:
    import tokenizers

    vocab = {f"<t{k}>": k for k in range(70_000)} | {"hello": 70_000, "[UNK]": 70_001}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    data = prepare(good, tokenizer=Tokenizer(backend))
    assert (
        data.train[0]["input_ids"].max() == 70_001
        and data.manifest["tokenizer"]["max_id"] == 70_001
    )


@pytest.mark.parametrize(
    "name",
    [
        "train.tokens.bin",
        "train.segments.bin",
        "train.rows.bin",
        "valid.documents.bin",
        "tokenizer/tokenizer.json",
    ],
)
def test_damaged_shards_are_named(good: Path, tmp_path: Path, name: str) -> None:
    data = prepare(good, tmp_path / "out")
    whole = (data.path / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[:-3], bytes(flipped), b""):
        (data.path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            Prepared.open(data.path)
    (data.path / name).unlink()
    with pytest.raises(DataError, match="is missing"):
        Prepared.open(data.path)
    assert len(prepare(good, tmp_path / "out").train) == len(data.train), (
        "prepare makes it whole again"
    )


def test_disk_full_keeps_what_was_there(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare(good, tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "train.tokens.bin"))

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.data.pipeline._Writer.write", full)
        with pytest.raises(
            DataError, match=r"the disk is full while writing .*train\.tokens\.bin: .*MB are free"
        ):
            prepare(good, tmp_path / "out", row_length=32)
    assert Prepared.open(tmp_path / "out", verify=True).fingerprint == before.fingerprint
    assert prepare(good, tmp_path / "out", row_length=32).row_length == 32


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no such limit here")
def test_file_size_limit_is_one_clear_error(good: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, pretrain\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try:\n    pretrain.prepare(sys.argv[1], sys.argv[2], tokenizer='char', quiet=True)\n"
        "except pretrain.PretrainError as error:\n    print('told:', error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", code, str(good), str(tmp_path / "out")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert "told:" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()


def test_read_only_directory(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    if os.access(
        locked, os.W_OK
    ):  # the superuser may write anywhere, so the system's refusal is played
        whole = Path.mkdir

        def refuse(self: Path, *arguments: object, **options: object) -> None:
            if locked in self.parents:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
            whole(self, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied\)"):
        prepare(good, locked / "out")


def test_dead_encoding_process_is_told(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.pipeline._SMALL_BYTES", 0)
    monkeypatch.setattr("pretrain.data.workers.sys.executable", "/bin/false")
    with pytest.raises(DataError, match="the process for encoding ended unexpectedly"):
        prepare(good, tmp_path / "out", workers=2)
    monkeypatch.undo()
    assert len(prepare(good, tmp_path / "out").train)


def test_every_error_is_one_of_ours(tmp_path: Path) -> None:
    """Valid files with a few bytes changed get past the first check; see also tests/data/test_hostile_files.py."""
    rng = np.random.default_rng(0)
    table = ["id,text", *(f'{k},"{text}"' for k, text in enumerate(GOOD))]
    rows = [json.dumps({"text": text}) for text in GOOD]
    whole = {"a.csv": "\n".join(table), "a.jsonl": "\n".join(rows) + "\n", "a.txt": "\n".join(GOOD)}
    outcomes = set()
    for name, text in whole.items():
        for _ in range(12):
            damaged = bytearray(text.encode())
            for _ in range(2):
                damaged[int(rng.integers(len(damaged)))] = int(
                    rng.choice([34, 44, 92, 125, 195, 255])
                )
            (tmp_path / name).write_bytes(damaged)
            told = None
            try:
                prepare(tmp_path / name, tmp_path / "out")
            except PretrainError as error:
                told = str(error)
            assert told is None or name in told
            outcomes.add((name, told is None))
    assert {(name, False) for name in whole} < outcomes
