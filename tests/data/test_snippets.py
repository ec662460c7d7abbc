"""Labelled pieces of the standard library: balanced, split by file, without what gives the answer away."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import documents
from pretrain.data.snippets import PACKAGES, PythonWithout, Snippets, snippets
from pretrain.data.sources import PythonSource
from pretrain.errors import DataError

COUNTS = (16, 8, 20)


@pytest.fixture(scope="module")
def rows() -> Snippets:
    return snippets(COUNTS, seed=3)


def library(folder, packages, files=8, lines=60):
    """A library of a few packages whose modules say where they are from."""
    for package in packages:
        (folder / package).mkdir(parents=True)
        for k in range(files):
            text = "\n\n".join(f"{package}_{k} = line({n})" for n in range(lines))
            (folder / package / f"m{k}.py").write_text(f"import os, {package}\n{text}\n")
    (folder / "alone.py").write_text("x = 1\n" * 100)
    source = PythonSource()
    source.root = folder
    return source


def test_every_part_is_balanced_and_no_file_is_in_two(rows):
    assert 4 <= len(rows.packages) <= 8 and set(rows.packages) <= set(PACKAGES)
    files = []
    for part, count in zip((rows.train, rows.valid, rows.test), COUNTS, strict=True):
        assert Counter(row["label"] for row in part) == dict.fromkeys(rows.packages, count)
        files.append({row["file"] for row in part})
        assert all(row["file"].startswith(row["label"] + "/") for row in part)
        labels = [row["label"] for row in part]
        assert labels != sorted(labels), "rows are shuffled"
    assert not files[0] & files[1] and not files[0] & files[2] and not files[1] & files[2]
    assert set(rows.held_out) == files[1] | files[2]


def test_nothing_gives_the_answer_away(rows):
    for row in rows.train + rows.valid + rows.test:
        assert not any(name in row["text"].casefold() for name in PACKAGES), row
        lines = row["text"].splitlines()
        assert len(lines) == 6 and all(line.strip() for line in lines)
        assert not any(re.match(r"\s*(import\s+\w|from\s+\S+\s+import\b)", line) for line in lines)


def test_same_seed_same_rows(rows):
    assert snippets(COUNTS, seed=3) == rows
    other = snippets(COUNTS, seed=4)
    assert other.test != rows.test and other.held_out != rows.held_out


def test_held_out_modules_are_not_read(rows):
    everything, rest = PythonSource(), PythonWithout(rows.held_out)
    root = rest.root
    left = {path.relative_to(root).as_posix() for path in rest.files()}
    assert left == {path.relative_to(root).as_posix() for path in everything.files()} - set(
        rows.held_out
    )
    assert rest.fingerprint(None) != everything.fingerprint(None)
    assert rest.fingerprint(None) == PythonWithout(rows.held_out).fingerprint(None)
    text = (root / rows.held_out[0]).read_text(encoding="utf-8")
    assert len(text) > 200 and all(text != document for document in documents(rest))


def test_a_library_without_some_packages(tmp_path):
    source = library(tmp_path, ["http", "xml", "sqlite3"], files=8)
    found = snippets((8, 3, 8), packages=8, source=source)
    assert sorted(found.packages) == ["http", "sqlite3", "xml"]
    assert {row["text"].split("_")[0] for row in found.train} == {"package"}
    assert len(snippets((8, 3, 8), packages=2, source=source).packages) == 2


def test_too_little_is_a_sentence(tmp_path):
    source = library(tmp_path, ["http", "xml"], files=2, lines=12)
    with pytest.raises(DataError, match="fewer than two packages with 100 pieces"):
        snippets((50, 20, 30), source=source)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return library(tmp_path_factory.mktemp("library"), ["http", "xml", "email"], files=9)


@given(seed=st.integers(0, 10_000), counts=st.tuples(*[st.integers(1, 12)] * 3))
@settings(max_examples=25, deadline=None)
def test_any_counts_and_seed_keep_the_rules(three, seed, counts):
    found = snippets(counts, seed=seed, source=three)
    parts = (found.train, found.valid, found.test)
    for part, count in zip(parts, counts, strict=True):
        assert Counter(row["label"] for row in part) == dict.fromkeys(found.packages, count)
    kept = {row["file"] for row in found.train}
    assert not kept & set(found.held_out)
    texts = [row["text"] + row["file"] for part in parts for row in part]
    assert len(texts) == len(set(texts)), "pieces do not overlap"
