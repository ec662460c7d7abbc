"""Durable writing of files, and JSON read with suspicion."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import CheckpointCorrupt, CheckpointError, PretrainError
from pretrain.utils import files
from pretrain.utils.files import HashingFile, Record, hash_file, read_bytes, write_file
from pretrain.utils.strict_json import names_only, parse_json, to_json
from pretrain.utils.tensors import read_header


@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [10, 20], [files.CHUNK + 1], [5, 3 * files.CHUNK, 7]]
)
def test_hash_is_taken_while_writing(tmp_path, sizes):
    pieces = [os.urandom(size) for size in sizes]
    with HashingFile(tmp_path / "f") as file:
        for piece in pieces:
            file.write(piece)
        record = file.finish()
    data = b"".join(pieces)
    assert (tmp_path / "f").read_bytes() == data
    assert (
        record == Record(len(data), hashlib.sha256(data).hexdigest()) == hash_file(tmp_path / "f")
    )
    assert read_bytes(tmp_path / "f", record) == data


def test_a_write_of_part_of_the_bytes_goes_on(tmp_path, monkeypatch):
    class Slow(files.FileIO):
        def write(self, descriptor, data):
            return super().write(descriptor, data[:3])

    monkeypatch.setattr(files, "IO", Slow())
    record = write_file(tmp_path / "f", b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"
    assert record == hash_file(tmp_path / "f")


def test_small_files_are_read_only_if_they_are_what_was_promised(tmp_path):
    record = write_file(tmp_path / "f", b"content")
    (tmp_path / "f").write_bytes(b"kontent")
    with pytest.raises(CheckpointCorrupt, match="SHA-256"):
        read_bytes(tmp_path / "f", record)
    (tmp_path / "f").write_bytes(b"content and more")
    with pytest.raises(CheckpointCorrupt, match="7 bytes, found 16 bytes"):
        read_bytes(tmp_path / "f", record)
    with pytest.raises(CheckpointCorrupt, match="at most 5 bytes"):
        read_bytes(tmp_path / "f", limit=5)
    os.symlink("f", tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", ".", "absent", "f/inside"):
        with pytest.raises(CheckpointError):
            read_bytes(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"b": {"a": 1, "a": 1}}',
        b'{"a": 1,}',
        b"{'a': 1}",
        b"",
        b"\xff\xfe",
        b'"\xed\xa0\x80"',
        b"[" * 65 + b"]" * 65,
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"{} {}",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_json_that_python_might_take_is_refused(text):
    with pytest.raises(CheckpointCorrupt) as caught:
        parse_json(text, "x.json")
    assert caught.value.file == "x.json"


def test_json_size_is_capped():
    with pytest.raises(CheckpointCorrupt, match="at most 10 bytes"):
        parse_json(b'"0123456789"', "x", limit=10)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(values)
def test_json_round_trips_bit_for_bit(value):
    found = parse_json(to_json(value), "x")
    assert repr(found) == repr(value) or found == value


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60) | st.text('{}[]",:0129.eE-+ truefalsn\\u', max_size=60).map(str.encode)
)
def test_any_bytes_as_json_give_only_our_errors(data):
    with contextlib.suppress(PretrainError):
        parse_json(data, "x")


def test_absolute_paths_are_cut_to_names():
    given = [
        "/home/me/books",
        "C:\\Users\\me\\b.txt",
        "~/c",
        "hub:org/name",
        "books/*.txt",
        "/",
        "\\\\",
    ]
    found = names_only({"a": given, "/x/k": 1.5})
    assert found == {
        "a": ["books", "b.txt", "c", "hub:org/name", "books/*.txt", "/", "\\\\"],
        "k": 1.5,
    }


def test_a_note_is_one_clean_line(capfd):
    files.note("bad \x1b[31m name\n\u202e.safetensors")
    said = capfd.readouterr().err
    assert said == "bad \\x1b[31m name \\u202e.safetensors\n"


def test_a_key_twice_is_found_in_linear_time():
    """Many keys and the repeated one last: counting each of them anew took minutes."""
    text = ",".join(f'"{i}":0' for i in range(100_000))
    start = time.process_time()
    with pytest.raises(CheckpointCorrupt, match="key '99999' twice"):
        parse_json(f'{{{text},"99999":0}}'.encode(), "f")
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "git lfs pull",
        ),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"PK\x03\x04" + bytes(400), "a zip archive"),
        (b"\x80\x02}q\x00." + bytes(400), "a pickle"),
    ],
)
def test_what_stands_in_place_of_a_file_is_named(tmp_path, content, cause):
    """Clones without Git LFS and failed downloads leave such files under the names of weights and settings."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointCorrupt, match=cause):
        read_header(path)
    with pytest.raises(CheckpointCorrupt, match=cause):
        parse_json(content, "config.json")
    path.write_bytes(bytes(8) + content)
    with pytest.raises(CheckpointCorrupt) as caught:
        read_header(path)
    assert cause not in str(caught.value)


def test_a_link_in_place_of_a_file_is_said_not_to_be_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointCorrupt, match="a link or device.*copy the file"):
        read_bytes(tmp_path / "link")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=40), st.booleans()), max_size=30), st.integers(1, 60))
def test_pieces_of_any_size_are_hashed_in_their_order(pieces, threaded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "THREADED", threaded)
        digest = files.BackgroundDigest(b"start")
        for piece, wait in pieces:
            digest.update(piece)
            if wait:
                digest.wait()
        whole = b"start" + b"".join(piece for piece, _ in pieces)
        assert digest.hexdigest() == hashlib.sha256(whole).hexdigest()


def test_a_digest_that_is_closed_hashes_no_more(monkeypatch):
    monkeypatch.setattr(files, "THREADED", 1)
    digest, free, hashed = files.BackgroundDigest(), threading.Event(), []

    class Slow:
        def update(self, piece):
            hashed.append(piece)
            assert free.wait(30)

    digest._digest = Slow()
    for _ in range(9):
        digest.update(b"piece")
    digest.close()
    free.set()
    digest.wait()
    assert len(hashed) <= 2  # one by the thread, and one that it may have taken before


def test_an_error_of_the_thread_is_raised_with_the_hash(monkeypatch):
    monkeypatch.setattr(files, "THREADED", 1)
    digest = files.BackgroundDigest()

    class Broken:
        def update(self, piece):
            raise MemoryError

    digest._digest = Broken()
    digest.update(b"piece")
    with pytest.raises(MemoryError):
        digest.hexdigest()


def test_hashing_a_small_file_takes_little_memory(tmp_path):
    write_file(tmp_path / "f", b"text")
    tracemalloc.start()
    try:
        hash_file(tmp_path / "f")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
