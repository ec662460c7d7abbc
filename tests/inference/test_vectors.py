"""Similarity, exact search and the vectors of files, against the plain computations."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from pretrain.cli.main import main
from pretrain.errors import ConfigError, DataError, ModelError
from pretrain.inference import vectors as module
from pretrain.inference.text_files import embed_file, search_file
from pretrain.models import build
from pretrain.models.base import Model

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "initializer_range": 0.4,
}


@cache
def encoder() -> Model:
    return build(
        "bert", None, tokenizer=tiny.tokenizer(), head=None, seed=4, max_positions=24, **SIZES
    )


def test_similarity_is_the_cosine_of_the_vectors():
    model, (a, b) = encoder(), (tiny.TEXTS[:3], tiny.TEXTS[10:12])
    x, y = model.embed(a).double().numpy(), model.embed(b).double().numpy()
    wanted = x @ y.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1))
    found = model.similarity(a, b)
    assert found.shape == (3, 2) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)
    assert torch.equal(model.similarity(model.embed(a), y), found)  # texts, tensors or arrays
    own = model.similarity(a)
    assert own.shape == (3, 3) and float(own.max()) <= 1.0
    np.testing.assert_allclose(own.diagonal().numpy(), 1.0, atol=1e-6)
    assert model.similarity(a[0], b[0]).shape == (1, 1)
    assert float(model.similarity(torch.zeros(16), torch.ones(16))) == 0.0
    with pytest.raises(DataError, match="16 and 8 values"):
        model.similarity(a, torch.ones(2, 8))
    with pytest.raises(DataError, match="not finite"):
        model.similarity(a, torch.full((2, 16), torch.nan))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_search_finds_what_sorting_all_scores_finds(data):
    """Few values make many ties, within one part of the texts and between parts."""
    count, queries = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4))
    top_k, part = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    corpus = rng.integers(-1, 2, (count, 3)).astype(np.float32)
    asked = rng.integers(-1, 2, (queries, 3)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TEXTS", part)
        patch.setattr(module, "_QUERIES", 2)
        found = encoder().search(asked, corpus, top_k)
    scores = encoder().similarity(asked, corpus)
    for hits, row in zip(found, scores, strict=True):
        order = row.sort(descending=True, stable=True).indices[:top_k].tolist()
        assert [round(hit.score, 5) for hit in hits] == [round(float(row[i]), 5) for i in order]
        # Scores that are equal but for rounding may change places; equal vectors never do.
        same = {tuple(corpus[hit.index]) for hit in hits}
        for vector in same:
            places = [hit.index for hit in hits if tuple(corpus[hit.index]) == vector]
            assert places == sorted(places)
            assert places == np.flatnonzero((corpus == vector).all(1))[: len(places)].tolist()


def test_search_among_texts(monkeypatch):
    model = encoder()
    whole = model.search(tiny.TEXTS[5], tiny.TEXTS, 3)
    assert whole[0].index == 5 and whole[0].text == tiny.TEXTS[5]
    monkeypatch.setattr(module, "_TEXTS", 7)
    parts = model.search([tiny.TEXTS[5]], iter(tiny.TEXTS), 3)  # any iterable, read once
    assert [(hit.index, hit.text) for hit in parts[0]] == [(hit.index, hit.text) for hit in whole]
    vectors = model.embed(tiny.TEXTS)
    for texts in (vectors, vectors.numpy()):
        hits = model.search(tiny.TEXTS[5], texts, 3)
        assert [(hit.index, hit.text) for hit in hits] == [(hit.index, None) for hit in whole]
    assert len(model.search("the cat", tiny.TEXTS[:2], 10)) == 2
    strings = np.array(tiny.TEXTS, dtype=object)  # as the column of a frame
    assert model.search(tiny.TEXTS[5], strings, 3) == whole
    with pytest.raises(DataError, match="no texts"):
        model.search("the cat", [])
    with pytest.raises(ModelError, match="must be several"):
        model.search("the cat", "the dog")
    with pytest.raises(ConfigError, match="top_k is 0"):
        model.search("the cat", tiny.TEXTS, 0)


def test_search_remarks_once_on_texts_that_are_cut(monkeypatch, capsys):
    monkeypatch.setattr(module, "_TEXTS", 2)
    long = " ".join(["the red cat"] * 20)
    encoder().search("the cat", [long, "the cat"] * 3)
    assert capsys.readouterr().err == "3 of 6 texts have more than 24 tokens and were cut.\n"


ROWS = [{"id": i, "body": text if i != 3 else ""} for i, text in enumerate(tiny.TEXTS[:9])]


def file_of(folder: Path, ending: str) -> Path:
    path = folder / f"rows{ending}"
    if ending == ".txt":
        path.write_text("".join(f"{row['body']}\n" for row in ROWS))
    elif ending == ".csv":
        path.write_text("id,body\n" + "".join(f"{r['id']},{r['body']}\n" for r in ROWS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl"])
def test_vectors_of_a_file_are_those_of_its_texts(tmp_path, monkeypatch, capsys, ending):
    """All three outputs in the order of the rows, whatever the parts; the row without a text keeps its place."""
    from pretrain.data.tables import read_table
    from pretrain.inference import text_files

    monkeypatch.setattr(text_files, "_CHUNK", 4)
    source = file_of(tmp_path, ending)
    wanted = encoder().embed([row["body"] or "x" for row in ROWS], normalize=True).numpy()
    wanted[3] = 0
    outs = {}
    for kind in (".npy", ".jsonl", ".parquet"):
        column = {} if ending == ".txt" else {"text": "body"}
        out = tmp_path / f"vectors{kind}"
        outs[kind] = embed_file(encoder(), source, out, normalize=True, progress=False, **column)
        assert "1 of 9 rows have no text" in capsys.readouterr().err
    array = np.load(outs[".npy"])
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, wanted, atol=1e-6)
    for kind in (".jsonl", ".parquet"):
        table = read_table(outs[kind])
        if ending == ".jsonl":
            assert table.columns["id"] == [row["id"] for row in ROWS]
        stored = table.columns["embedding"]
        assert stored[3] is None
        numbers = [v if v is not None else [0.0] * 16 for v in stored]
        assert np.array_equal(np.array(numbers, np.float32), array)  # to the last bit
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [source.name, *(out.name for out in outs.values())]
    )


def test_a_broken_row_leaves_no_output(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "the cat"}\n{"text": 7}\n')
    for kind in (".npy", ".jsonl", ".parquet"):
        with pytest.raises(DataError, match="rows.jsonl, line 2"):
            embed_file(encoder(), source, tmp_path / f"out{kind}", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    source.write_text('{"text": "the cat"}\n')
    with pytest.raises(DataError, match=r"text='no'"):
        embed_file(encoder(), source, tmp_path / "out.npy", text="no", progress=False)
    with pytest.raises(ConfigError, match=r"must end in .npy"):
        embed_file(encoder(), source, tmp_path / "out.csv")
    with pytest.raises(DataError, match="is the input"):
        embed_file(encoder(), source, source)
    source.write_text('{"text": "the cat", "embedding": 1}\n')
    for kind in (".jsonl", ".parquet"):
        with pytest.raises(DataError, match="already have a column 'embedding'"):
            embed_file(encoder(), source, tmp_path / f"out{kind}", progress=False)


def test_rows_of_other_types_do_not_fit_parquet(tmp_path, monkeypatch):
    from pretrain.inference import text_files

    monkeypatch.setattr(text_files, "_CHUNK", 1)
    for later in ('"id": "b"', '"id": 2, "more": 1'):
        source = tmp_path / "rows.jsonl"
        source.write_text('{"text": "the cat", "id": 1}\n{"text": "the dog", ' + later + "}\n")
        with pytest.raises(DataError, match=r"Write .jsonl"):
            embed_file(encoder(), source, tmp_path / "out.parquet", progress=False)
        embed_file(encoder(), source, tmp_path / "out.jsonl", progress=False)


def test_commands(tmp_path, capsys):
    model, source = tmp_path / "model", file_of(tmp_path, ".csv")
    encoder().save(model)
    out = tmp_path / "v.npy"
    words = ["embed", str(model), str(source), "--text", "body", "--out", str(out), "--quiet"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert np.load(out).shape == (9, 16)
    assert (
        main(["search", str(model), tiny.TEXTS[4], str(source), "--text", "body", "--top_k", "2"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=2) == ["1.0000", "5", tiny.TEXTS[4]] and len(lines) == 2
    assert main(["embed", str(model), str(source), "--text", "no", "--out", str(out)]) == 2
    assert "--text no" in capsys.readouterr().err
    assert [
        hit.index for hit in search_file(model, tiny.TEXTS[4], source, text="body", top_k=1)
    ] == [4]


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_vectors_and_scores_that_are_no_numbers_are_an_error(value):
    texts, mask = tiny.TEXTS[:2], "the red [MASK]"
    masked, causal = (
        build(family, None, tokenizer=tiny.tokenizer(), max_positions=24, **SIZES)
        for family in ("bert", "llama")
    )
    for model in (masked, causal):
        with torch.no_grad():
            next(p for n, p in model.backbone.named_parameters() if "norm" in n).fill_(value)
    asked = [
        lambda: masked.embed(texts),
        lambda: masked.similarity(texts),
        lambda: masked.search(texts[0], texts),
        lambda: masked.fill_mask(mask),
        lambda: masked.log_likelihood(texts),
        lambda: causal.embed(texts, pooling="last"),
        lambda: causal.log_likelihood(texts, per_token=True),
        lambda: causal.generate(texts[0]),
    ]
    for ask in asked:
        with pytest.raises(ModelError, match="not finite: its weights are damaged"):
            ask()
