"""The strict reader and the durable writer of safetensors files, against the library and against hostile files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import struct
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import CheckpointCorrupt, CheckpointError, PretrainError
from pretrain.utils.files import BackgroundDigest, Record
from pretrain.utils.tensors import (
    DTYPES,
    LazyTensors,
    checked_tensors,
    in_huge_pages,
    read_header,
    read_tensors,
    tensor_bytes,
    write_tensors,
)


def sample() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5),
        "b": torch.randn(4).to(torch.bfloat16),
        "half": torch.randn(2, 2, 2).half(),
        "step": torch.tensor(7.0),
        "count": torch.tensor(2**60 + 1),
        "small": torch.arange(-5, 5, dtype=torch.int8),
        "short": torch.arange(3, dtype=torch.int16),
        "word": torch.arange(3, dtype=torch.int32),
        "byte": torch.arange(7, dtype=torch.uint8),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }


def equal(one, two):
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert tensor.shape == two[name].shape
        assert torch.equal(tensor, two[name])


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_round_trip_with_every_dtype_and_with_the_library(tmp_path):
    path = tmp_path / "m.safetensors"
    record = write_tensors(path, sample())
    equal(read_tensors(path, record), sample())
    equal(safetensors.torch.load_file(path), sample())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert record == Record(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    safetensors.torch.save_file(
        sample(), tmp_path / "theirs.safetensors", metadata={"format": "pt"}
    )
    equal(read_tensors(tmp_path / "theirs.safetensors"), sample())
    infos = read_header(path)
    assert infos["a.weight"].shape == (3, 5)
    assert infos["a.weight"].numel == 15
    assert all(info.start % info.dtype.itemsize == 0 for info in infos.values())


def test_views_become_contiguous_and_floats_become_fp32(tmp_path):
    path = tmp_path / "m.safetensors"
    base = torch.randn(4, 6)
    write_tensors(path, {"t": base.T, "s": base[:, ::2], "p": torch.nn.Parameter(base)})
    found = read_tensors(path)
    equal(found, {"t": base.T.contiguous(), "s": base[:, ::2].contiguous(), "p": base})
    write_tensors(tmp_path / "h", {"h": base.half(), "i": torch.arange(3)})
    found = read_tensors(tmp_path / "h", floats_to_fp32=True)
    equal(found, {"h": base.half().float(), "i": torch.arange(3)})


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_mode_comes_from_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "m", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o666 & ~mask


def test_writer_refuses_what_it_cannot_write(tmp_path):
    for number, tensors in enumerate(
        [
            {"a/b": torch.zeros(1)},
            {"a b": torch.zeros(1)},
            {"": torch.zeros(1)},
            {"x" * 257: torch.zeros(1)},
            {"d": torch.zeros(1, dtype=torch.float64)},
            {"c": torch.zeros(1, dtype=torch.complex64)},
            {"meta": torch.zeros(1, device="meta")},
            {"deep": torch.zeros([1] * 9)},
        ]
    ):
        with pytest.raises(CheckpointError):
            write_tensors(tmp_path / str(number), tensors)
        assert not (tmp_path / str(number)).exists()
    write_tensors(tmp_path / "state", {"exp_avg/a.b": torch.zeros(1)}, slashes=True)
    assert set(read_tensors(tmp_path / "state", slashes=True)) == {"exp_avg/a.b"}
    with pytest.raises(CheckpointCorrupt):
        read_tensors(tmp_path / "state")


def test_lazy_tensors_are_made_once_and_written_alike(tmp_path):
    tensors, made = sample(), []

    def make(name):
        made.append(name)
        return tensors[name]

    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    lazy = LazyTensors(layout, make)
    assert set(lazy) == set(tensors) and len(lazy) == len(tensors) and made == []
    record = write_tensors(tmp_path / "lazy", lazy)
    assert record == write_tensors(tmp_path / "plain", tensors)
    assert sorted(made) == sorted(name for name in tensors if tensors[name].numel())
    with pytest.raises(KeyError):
        lazy["other"]


def test_writer_never_replaces_a_file(tmp_path):
    (tmp_path / "m").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "m", {"a": torch.zeros(1)})
    assert (tmp_path / "m").read_bytes() == b"mine"


F = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BOMBS = {
    "nothing": b"",
    "four bytes": b"abcd",
    "pickle": b"\x80\x04\x95" + b"x" * 100,
    "zip": b"PK\x03\x04" + b"x" * 100,
    "header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": struct.pack("<Q", 2) + b"{]",
    "a list": struct.pack("<Q", 2) + b"[]",
    "not UTF-8": struct.pack("<Q", 4) + b'{"\xff',
    "deep": struct.pack("<Q", 60000) + b"[" * 60000,
}
TWICE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    "key twice": (
        b"{%s,%s}" % (TWICE, TWICE),
        4,
    ),
    "name with a slash": ({"a/b": F}, 4),
    "name going up": ({"../a": F}, 4),
    "name with NUL": ({"a\0": F}, 4),
    "name too long": ({"a" * 257: F}, 4),
    "empty name": ({"": F}, 4),
    "name in Cyrillic": ({"\u0430": F}, 4),
    "unknown dtype": ({"a": F | {"dtype": "F128"}}, 4),
    "float64 of four bytes": ({"a": F | {"dtype": "F64"}}, 4),
    "dtype is a list": ({"a": F | {"dtype": ["F32"]}}, 4),
    "nine dims": ({"a": F | {"shape": [1] * 9}}, 4),
    "negative size": ({"a": F | {"shape": [-1]}}, 4),
    "size true": ({"a": F | {"shape": [True]}}, 4),
    "size 1.0": ({"a": F | {"shape": [1.0]}}, 4),
    "size NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4),
    "product overflows": ({"a": F | {"shape": [2**40, 2**40]}}, 4),
    "empty but huge": ({"a": {"dtype": "F32", "shape": [0, 2**61], "data_offsets": [0, 0]}}, 0),
    "shape larger than the data": ({"a": F | {"shape": [2]}}, 4),
    "offsets swapped": ({"a": F | {"data_offsets": [4, 0]}}, 4),
    "offsets behind the end": ({"a": F | {"data_offsets": [4, 8]}}, 4),
    "three offsets": ({"a": F | {"data_offsets": [0, 4, 4]}}, 4),
    "overlap": ({"a": F, "b": F}, 4),
    "gap": ({"a": F, "b": F | {"data_offsets": [8, 12]}}, 12),
    "bytes at the end": ({"a": F}, 5),
    "a byte short": ({"a": F}, 3),
    "extra field": ({"a": F | {"code": "x"}}, 4),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "tensor is a number": ({"a": 3}, 4),
    "bool of 2": ({"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\x02"),
}


@pytest.mark.parametrize("name", [*BOMBS, *HEADERS])
def test_bombs_are_refused_at_once(tmp_path, name):
    path = tmp_path / "m.safetensors"
    if name in BOMBS:
        path.write_bytes(BOMBS[name])
    else:
        header, data = HEADERS[name]
        raw(path, header, data if isinstance(data, bytes) else bytes(data))
    began = time.perf_counter()
    with pytest.raises(CheckpointCorrupt) as caught:
        read_tensors(path)
    assert caught.value.file == str(path)
    assert caught.value.expected
    assert caught.value.found
    if name != "bool of 2":
        with pytest.raises(CheckpointCorrupt):
            read_header(path)
    assert time.perf_counter() - began < 1


def test_other_types_of_the_format_are_not_called_damage(tmp_path):
    doubles = {"a": torch.tensor([[1.5, -1 / 3]], dtype=torch.float64), "b": torch.ones(3)}
    safetensors.torch.save_file(doubles, tmp_path / "f64.safetensors")
    found = read_tensors(tmp_path / "f64.safetensors", floats_to_fp32=True)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert torch.equal(found["a"], doubles["a"].float()) and torch.equal(found["b"], doubles["b"])
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.complex64):
        safetensors.torch.save_file({"a": torch.ones(4).to(dtype)}, tmp_path / "m.safetensors")
        for read in (read_tensors, read_header):
            with pytest.raises(CheckpointError, match="is not read here") as caught:
                read(tmp_path / "m.safetensors")
            assert not isinstance(caught.value, CheckpointCorrupt)


def test_huge_headers_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "m.safetensors"
    header = {
        f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(160_000)
    }
    raw(path, header)
    assert path.stat().st_size > 9 << 20
    with pytest.raises(CheckpointCorrupt, match="header"):
        read_tensors(path)
    short = {f"{i}": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    text = json.dumps(short, separators=(",", ":")).encode()
    raw(path, text, bytes(20 * len(text)))
    with pytest.raises(CheckpointCorrupt, match=r"100,000 tensors|header"):
        read_tensors(path)


def test_only_regular_files_are_opened(tmp_path):
    real = tmp_path / "real"
    write_tensors(real, {"a": torch.zeros(1)})
    (tmp_path / "link").symlink_to(real)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("link", "fifo", "folder", "absent"):
        with pytest.raises(CheckpointCorrupt):
            read_tensors(tmp_path / name)
    with pytest.raises(PretrainError):
        read_tensors("/dev/zero")


def test_every_bit_flip_is_noticed_with_a_record(tmp_path):
    path = tmp_path / "m.safetensors"
    record = write_tensors(path, sample())
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(
            good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :]
        )
        with pytest.raises(CheckpointCorrupt):
            read_tensors(path, record)
    for length in range(0, len(good), 13):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointCorrupt):
            read_tensors(path, record)
        with pytest.raises(CheckpointCorrupt):
            read_tensors(path)  # a cut is noticed without a record too


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    record = write_tensors(path, sample())
    found = read_tensors(path, record)
    path.write_bytes(b"")
    equal(found, sample())


def test_a_file_larger_than_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    text = json.dumps({"a": {"dtype": "U8", "shape": [2**46], "data_offsets": [0, 2**46]}}).encode()
    try:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + 2**46)
    except OSError:
        monkeypatch.setattr("pretrain.utils.tensors.total_memory", lambda: 10)
        write_tensors(tmp_path / "small", {"a": torch.zeros(100)})
        path = tmp_path / "small"
    with pytest.raises(CheckpointError, match="memory"):
        read_tensors(path)


names = st.text("abcXYZ019._-", min_size=1, max_size=20)
shapes = st.lists(st.integers(0, 4), max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6))
def test_any_tensors_round_trip(tmp_path_factory, wanted):
    path = tmp_path_factory.mktemp("t") / "m"
    tensors = {
        name: torch.randint(0, 2, shape).to(DTYPES[code]) for name, (code, shape) in wanted.items()
    }
    record = write_tensors(path, tensors)
    equal(read_tensors(path, record), tensors)
    equal(safetensors.torch.load_file(path), tensors)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_only_our_errors(tmp_path_factory, data, framed):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes((struct.pack("<Q", max(len(data) - 3, 0)) if framed else b"") + data)
    with contextlib.suppress(PretrainError):
        read_tensors(path)


def test_writing_takes_no_copy_of_a_tensor_on_the_cpu():
    tensor = torch.zeros(3, 4)
    view = tensor_bytes(tensor)
    tensor += 1
    assert bytes(view) == tensor.numpy().tobytes()


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(["changed", "missing", "added"]))
def test_any_byte_that_differs_is_found_whatever_the_pieces(tmp_path_factory, data, damage):
    path = tmp_path_factory.getbasetemp() / "pieces.safetensors"
    path.unlink(missing_ok=True)
    tensors = {"a": torch.arange(50.0), "b": torch.ones(3, 7), "c": torch.arange(40)}
    record = write_tensors(path, tensors)
    good = path.read_bytes()
    start = len(good) - sum(tensor.nbytes for tensor in tensors.values())
    borders = st.integers(0, 9).map(lambda i: start + 64 * i)  # of the pieces that are read
    place = data.draw(st.integers(0, len(good) - 1) | borders)
    middle = {"changed": bytes([good[place] ^ data.draw(st.integers(1, 255))]), "missing": b""}
    path.write_bytes(good[:place] + middle.get(damage, good[place:][:1] * 2) + good[place + 1 :])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.utils.tensors.CHUNK", 64)
        patch.setattr("pretrain.utils.files.THREADED", 100)
        with pytest.raises(CheckpointCorrupt):
            read_tensors(path, record)
        path.write_bytes(good)
        equal(read_tensors(path, record), tensors)


def test_a_type_that_damage_made_is_damage(tmp_path):
    path = tmp_path / "m.safetensors"
    record = write_tensors(path, {"a": torch.arange(3)})
    path.write_bytes(path.read_bytes().replace(b"I64", b"U64"))
    with pytest.raises(CheckpointCorrupt):
        read_tensors(path, record)
    with pytest.raises(CheckpointError, match="type U64"):
        read_tensors(path)


@pytest.mark.parametrize("kind", [None, ValueError, KeyboardInterrupt])
def test_damage_is_told_before_what_it_led_to(tmp_path, kind):
    path = tmp_path / "m.safetensors"
    record = write_tensors(path, sample())
    wrong = Record(record.size, "0" * 64)

    def use():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:  # a run that is stopped opens models while it ends
            with checked_tensors(path, wrong):
                if kind is not None:
                    raise kind from None

    with pytest.raises(KeyboardInterrupt if kind is KeyboardInterrupt else CheckpointCorrupt):
        use()


def test_what_was_converted_is_freed_before_the_next_tensor_is_read(tmp_path, monkeypatch):
    path, held, most = tmp_path / "m.safetensors", [0], [0]
    record = write_tensors(path, {f"t{i}": torch.ones(100).bfloat16() for i in range(5)})

    class Counting(BackgroundDigest):
        def update(self, piece):
            super().update(piece)
            held[0] += len(piece)
            most[0] = max(most[0], held[0] - size)

        def wait(self):
            super().wait()
            held[0] = size

    size = path.stat().st_size - 1000
    monkeypatch.setattr("pretrain.utils.tensors.BackgroundDigest", Counting)
    read_tensors(path, record, floats_to_fp32=True)
    assert most[0] == 200


def test_large_tensors_lie_in_huge_pages():
    tensor = in_huge_pages(torch.empty(9 << 20, dtype=torch.uint8).fill_(1))
    assert torch.equal(tensor, torch.ones_like(tensor))
    assert in_huge_pages(torch.empty(9 << 20, device="meta")).is_meta
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"):
        pytest.skip("the system has no huge pages")
    middle, inside, flags = tensor.data_ptr() + (4 << 20), False, []
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(match[1], 16) <= middle < int(match[2], 16)
            elif inside and line.startswith("VmFlags:"):
                flags = line.split()
    assert "hg" in flags
