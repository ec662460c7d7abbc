"""Damaged, misleading and strangely named files: told with their place, never read as something shorter."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain
from pretrain.data.paths import FileHashes, find_files
from pretrain.data.pipeline import sample_filter, scan_sources
from pretrain.data.prepare import Prepared
from pretrain.data.readers import Reading, read_file
from pretrain.data.sources import FileSource, HubSource, PythonSource, Sample, resolve_sources
from pretrain.errors import DataError, PretrainError

LONG = "A long text. " * 30
GOOD = [f"document number {k} says hello, to the other {k * k} documents" for k in range(30)]


def prepare(source: object, out: Path | None = None, **options: Any) -> Prepared:
    return pretrain.prepare(
        source, out, **{"tokenizer": "char", "row_length": 64, "quiet": True} | options
    )


def texts(path: Path, separator: str | None = None) -> list[str]:
    found, parts = [], []
    for text, end in read_file(path, Reading(separator=separator)):
        parts.append(text)
        if end:
            found.append("".join(parts))
            parts.clear()
    return found


def test_cut_zstandard_file_is_told(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    rng = np.random.default_rng(0)
    text = " ".join(map(str, rng.integers(0, 10**9, 30_000))).encode()
    whole = zstandard.ZstdCompressor().compress(text)
    file = tmp_path / "a.txt.zst"
    for size in (len(whole) - 1, len(whole) // 2, 4096, 100, 5, 1):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match="damaged or cut zstandard") as told:
            texts(file)
        assert "gzip" not in str(told.value)
    file.write_bytes(whole + whole[:-3])
    with pytest.raises(DataError, match="damaged or cut zstandard"):
        texts(file)
    file.write_bytes(whole)
    assert texts(file) == [text.decode()]


def test_zstandard_file_of_many_frames(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in GOOD]
    body = (
        b"".join(pack(row) for row in rows[:20]) + skipped + pack(b"") + pack(b"".join(rows[20:]))
    )
    (tmp_path / "a.jsonl.zst").write_bytes(body)
    assert texts(tmp_path / "a.jsonl.zst") == GOOD
    stream = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as writer:  # no size in it
        writer.write(b"".join(rows))
    (tmp_path / "b.jsonl.zst").write_bytes(stream.getvalue())
    assert texts(tmp_path / "b.jsonl.zst") == GOOD


def test_csv_text_with_an_unquoted_comma(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('id,text\n0,"fine, really"\n1,Hello, world\n')
    with pytest.raises(DataError, match=r"a\.csv:3 has 3 columns, but the header has 2"):
        texts(file)


def test_csv_quote_that_is_not_closed(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    for row in ('1,"never closed', '1,"a" b', '1,"a"b"c"'):
        file.write_text(f"id,text\n0,fine\n{row}\n2,swallowed\n3,swallowed\n")
        with pytest.raises(DataError, match=r"a\.csv:3 begins a row that is not valid CSV"):
            texts(file)
    file.write_text('id,text\n0,"two\nlines"\n1,"say ""hi"""\n')
    assert texts(file) == ["two\nlines", 'say "hi"']


def test_json_that_means_two_things(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for line, fault in {
        '{"text": "a", "text": "b"}': "the key 'text' stands twice",
        '{"text": "a", "x": {"y": 1, "y": 2}}': "the key 'y' stands twice",
        '{"text": "a", "score": NaN}': "NaN is not JSON",
        '{"text": "a", "score": -Infinity}': "-Infinity is not JSON",
    }.items():
        for end in ("\n", ""):  # an unfinished last line is torn, a finished one is wrong
            file.write_text('{"text": "fine"}\n' + line + end)
            with pytest.raises(DataError, match=rf"a\.jsonl:2: {fault}"):
                texts(file)


def test_parquet_string_that_is_not_utf8(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    raw = arrow.array([b"fine", b"caf\xe9"], arrow.binary())
    column = arrow.Array.from_buffers(arrow.string(), 2, raw.buffers())
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column 'text' is not UTF-8"):
        prepare(tmp_path / "a.parquet")


def test_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    try:
        file.write_text("\n".join(json.dumps({"text": text}) for text in GOOD) + '\n{"te')
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    data = prepare(file, tmp_path / "out")
    assert data.manifest["options"]["sources"] == [str(file)]
    data.table().encode("utf-8")
    assert prepare([file], tmp_path / "out").fingerprint == data.fingerprint
    with pytest.raises(DataError):
        prepare(file, tmp_path / "other", text="body")


def test_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "locked").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("text")
    real_scan, real_list = os.scandir, os.listdir

    def refusing(real: Any) -> Any:
        def call(place: Any = ".") -> Any:
            if "locked" in str(place):
                raise PermissionError(errno.EACCES, "Permission denied", str(place))
            return real(place)

        return call

    monkeypatch.setattr(os, "scandir", refusing(real_scan))
    monkeypatch.setattr(os, "listdir", refusing(real_list))
    for name in (tmp_path / "data", tmp_path / "data" / "locked" / "x.txt"):
        with pytest.raises(DataError, match=r"locked' cannot be read: Permission denied"):
            find_files(str(name))


@pytest.mark.parametrize("text", [LONG, "Or this?\n", "and/or " * 1000])
def test_a_text_in_the_place_of_a_path_is_told(tmp_path: Path, text: str) -> None:
    for call in (
        lambda: prepare(text),
        lambda: prepare([text, text]),
        lambda: pretrain.prepare(text, source="images"),
        lambda: pretrain.train(data=text, train={"out": str(tmp_path / "run")}),
        lambda: pretrain.finetune("model", text, task="classification", out=tmp_path / "run"),
        lambda: pretrain.data(text, task="classification"),
        lambda: pretrain.data(text, task="image-classification"),
        lambda: pretrain.data(text, task="object-detection"),
        lambda: pretrain.data(text, task="segmentation"),
    ):
        with pytest.raises(
            DataError, match=f"no such file, but a text of {len(text):,} characters"
        ):
            call()
    for call in (
        lambda: pretrain.load(text),
        lambda: pretrain.Tokenizer.open(text),
        lambda: pretrain.train(data=text, model=text),
    ):
        with pytest.raises(
            PretrainError, match="too long|no such directory|no model family|no file"
        ):
            call()


def test_broken_link_in_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").symlink_to("gone.py")
    source = PythonSource()
    source.root = tmp_path
    assert [file.name for file in source.files()] == ["a.py"]
    assert source.fingerprint(FileHashes()).startswith("python:")


def test_hub_copy_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: iter({"text": text} for text in GOOD)
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be created"):
        HubSource("some/set", "text", tmp_path / "file" / "hub").fingerprint(FileHashes())
    source = HubSource("some/set@en:test", "text", tmp_path / "hub")
    assert (source.repository, source.config, source.split) == ("some/set", "en", "test")
    other = source.file.with_suffix(".part")  # what another process is writing
    other.parent.mkdir()
    other.write_text("half")
    try:
        raise KeyError  # inside a handler, as when a caller falls back to the hub
    except KeyError:
        source.fingerprint(FileHashes())
    assert len(list(source.pieces())) == 30 and other.read_text() == "half"
    assert len(list(source.file.parent.iterdir())) == 2


def test_source_changed_with_size_and_time_kept(tmp_path: Path) -> None:
    file, memory = tmp_path / "a.txt", tmp_path / "files.json"
    file.write_text("one")
    hashes = FileHashes(memory)
    first = hashes.of(file)
    status = file.stat()
    key = str(file.resolve())
    hashes._known[key] = [3, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, first]
    assert hashes.of(file) == first
    fresh = tmp_path / "b.txt"
    fresh.write_text("two")
    fresh.replace(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hashes.of(file) != first
    hashes._known[key] = [3, status.st_mtime_ns, "an entry of an older release"]
    assert hashes.of(file) != first


def test_the_word_python_is_always_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    kinds = [
        type(resolve_sources(name)[0][0])
        for name in ("python", "./python", Path("python"), "python/a.txt")
    ]
    assert kinds == [PythonSource, FileSource, FileSource, FileSource]


def test_json_settings_in_a_folder_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "settings.json").write_text('{\n "a": 1\n}')
    (tmp_path / "settings.json.gz").write_bytes(b"")
    assert [file.name for file in find_files(str(tmp_path))] == ["a.txt"]
    assert find_files(str(tmp_path / "settings.json"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"name a \.json file"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("valid", [0.1, 0.35, 0.5, 0.9])
def test_tokenizer_never_sees_the_text_held_out_at_the_end(tmp_path: Path, valid: float) -> None:
    bodies = [chr(0x4E00 + k) * 50 for k in range(8)] + ["z" * 90_000]
    file = tmp_path / "a.txt"
    file.write_text("|".join([*bodies, bodies[0]]), encoding="utf-8")  # the last one is a duplicate
    sources, _ = resolve_sources(file, separator="|")
    sample = Sample(1 << 20)
    scan = scan_sources(
        sources, 1, valid=valid, last=True, seed=0, sample=sample, progress=lambda n: None
    )
    kept = "".join(sample.texts(sample_filter(scan)))
    assert kept == "".join(bodies)[: scan.cut]


def test_no_bars_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text to learn from")
    prepare(tmp_path / "a.txt", quiet=False)
    told = capsys.readouterr().err
    assert "prepared" in told and "B/s" not in told and "\r" not in told
    assert not sys.stderr.isatty()


def samples() -> dict[str, bytes]:
    rows = [json.dumps({"id": k, "text": text}) for k, text in enumerate(GOOD)]
    table = ["id,text", *(f'{k},"{text}"' for k, text in enumerate(GOOD))]
    return {
        "a.jsonl": "\n".join(rows).encode() + b"\n",
        "a.csv": "\n".join(table).encode() + b"\n",
        "a.txt": "\n".join(GOOD).encode(),
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.parquet", "a.jsonl.zst"])
def test_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    """Files that were valid, with some bytes changed, cut out or doubled: DataError or text, nothing else."""
    rng = np.random.default_rng(2)
    file = tmp_path / name
    if name == "a.parquet":
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(arrow.table({"text": GOOD}), file)
        whole = file.read_bytes()
    elif name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        whole = zstandard.ZstdCompressor(write_checksum=True).compress(samples()["a.jsonl"])
    else:
        whole = samples()[name]
    marks = b'",{}[]\\\n\r\0\xff\xe2N1'
    refused = 0
    for _ in range(60 if name == "a.parquet" else 200):
        damaged = bytearray(whole)
        place, kind = int(rng.integers(len(damaged))), int(rng.integers(4))
        if kind == 0:
            damaged[place] = marks[int(rng.integers(len(marks)))]
        elif kind == 1:
            del damaged[place : place + int(rng.integers(1, 40))]
        elif kind == 2:
            damaged[place:place] = damaged[place : place + int(rng.integers(1, 40))]
        else:
            damaged[place] = int(rng.integers(256))
        file.write_bytes(damaged)
        told = None
        try:
            texts(file)
        except PretrainError as error:
            told = str(error)
        assert told is None or str(file) in told
        refused += told is not None
    assert refused > (5 if name == "a.txt" else 20)
