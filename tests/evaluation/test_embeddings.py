"""Similarity and retrieval against scipy, scikit-learn, sentence-transformers and sums by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import ndcg_score

import pretrain
import tiny
from pretrain import metrics
from pretrain.cli.main import main
from pretrain.data.tables import read_table
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import ConfigError, DataError
from pretrain.evaluation import embeddings
from pretrain.evaluation.embeddings import retrieval, sts
from pretrain.models import build
from pretrain.models.base import Model
from pretrain.models.sentences import SentenceSettings

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "initializer_range": 1.0,  # cosines that differ by far more than rounding
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model") / "bert"
    build("bert", None, tokenizer=tiny.tokenizer(), seed=4, max_positions=48, **SIZES).save(folder)
    return folder


@pytest.fixture(scope="module")
def model(directory) -> Model:
    return pretrain.load(directory, quiet=True)


def pairs() -> list[dict[str, Any]]:
    return [
        {"sentence1": a, "sentence2": b, "score": str(i % 4)}  # many ties
        for i, (a, b) in enumerate(zip(tiny.TEXTS, tiny.TEXTS[7:], strict=False))
    ]


def test_similarity_equals_scipy(directory, model):
    rows = pairs()
    found = pretrain.evaluate(directory, rows, task="sts")
    a, b = (
        model.embed([row[k] for row in rows]).double().numpy() for k in ("sentence1", "sentence2")
    )
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    scores = [float(row["score"]) for row in rows]
    assert found["spearman"] == pytest.approx(stats.spearmanr(scores, cosines).statistic, abs=1e-6)
    assert found["pearson"] == pytest.approx(stats.pearsonr(scores, cosines).statistic, abs=1e-5)
    assert found["targets"] == len(rows)
    few = pretrain.evaluate(directory, rows, task="sts", limit=5, precision="fp32", device="cpu")
    assert few["targets"] == 5


def test_similarity_of_unusual_rows(model, capsys):
    rows = pairs()
    rows[2]["sentence2"] = " "
    assert sts(model, rows, {}, 8, 0)["targets"] == len(rows) - 1
    assert f"1 of {len(rows)} rows are left out, which lack a text" in capsys.readouterr().err
    same = [{"sentence1": "the cat", "sentence2": "the dog", "score": i} for i in range(4)]
    found = sts(model, same, {}, 8, 0)  # one cosine for all scores
    assert math.isnan(found["spearman"]) and math.isnan(found["pearson"])
    constant = [row | {"score": 1} for row in pairs()]
    assert math.isnan(sts(model, constant, {}, 8, 0)["spearman"])
    with pytest.raises(DataError, match="1 scores are no finite numbers"):
        sts(model, [*pairs(), {"sentence1": "a", "sentence2": "a", "score": "x"}], {}, 8, 0)
    with pytest.raises(DataError, match="no row has a text"):
        sts(model, [{"sentence1": "", "sentence2": "", "score": 1}], {}, 8, 0)


def test_ranking_equals_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = int(rng.integers(2, 40))
        gains = rng.integers(0, 4, size).astype(float)
        gains[rng.integers(size)] = 2.0
        scores = rng.permutation(size).astype(float)
        names = [str(i) for i in range(size)]
        order = [names[i] for i in np.argsort(-scores)]
        relevance = {name: gain for name, gain in zip(names, gains, strict=True) if gain}
        found = metrics.ranking(order, relevance, 10, 20)
        assert found["ndcg@10"] == pytest.approx(ndcg_score([gains], [scores], k=10))
        assert found["recall@20"] == pytest.approx(
            sum(name in relevance for name in order[:20]) / len(relevance)
        )
    by_hand = metrics.ranking(["a", "b", "c"], {"b": 1.0, "x": 3.0})
    ideal = 3.0 + 1 / math.log2(3)
    assert by_hand == {
        "ndcg@10": pytest.approx((1 / math.log2(3)) / ideal),
        "mrr@10": 0.5,
        "recall@10": 0.5,
        "recall@100": 0.5,
    }
    assert metrics.ranking(["a"], {"b": 1.0})["mrr@10"] == 0.0


def beir(folder: Path) -> dict[str, Any]:
    """Queries that repeat their documents, a query without a relevant document, an unknown name."""
    parts = {
        "queries": [{"_id": f"q{i}", "text": tiny.TEXTS[i]} for i in range(5)],
        "corpus": [{"_id": i, "title": "", "text": text} for i, text in enumerate(tiny.TEXTS)],
        "relevance": [
            {"query-id": f"q{i}", "corpus-id": str(i + (i == 3)), "score": 1} for i in range(4)
        ]
        + [{"query-id": "q9", "corpus-id": "1", "score": 1}],
    }
    (folder / "qrels").mkdir(parents=True)
    for name in ("queries", "corpus"):
        lines = "".join(json.dumps(row) + "\n" for row in parts[name])
        (folder / f"{name}.jsonl").write_text(lines)
    lines = "".join(f"{r['query-id']}\t{r['corpus-id']}\t1\n" for r in parts["relevance"])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return parts


def test_retrieval(directory, model, tmp_path, capsys):
    parts = beir(tmp_path / "beir")
    found = retrieval(model, parts, {}, 8, 0)
    err = capsys.readouterr().err
    assert "1 of 5 queries are left out" in err and "1 of 5 relevances name" in err
    # The queries 0 to 2 find themselves; that of query 3 is the document at some other rank.
    place = 1 + [hit.index for hit in model.search(tiny.TEXTS[3], tiny.TEXTS, 100)].index(4)
    fourth = {"n": 1 / math.log2(place + 1), "m": 1 / place} if place <= 10 else {"n": 0, "m": 0}
    assert place > 1
    assert found == {
        "ndcg@10": pytest.approx((3 + fourth["n"]) / 4),
        "mrr@10": pytest.approx((3 + fourth["m"]) / 4),
        "recall@10": pytest.approx((3 + (place <= 10)) / 4),
        "recall@100": 1.0,
        "targets": 4.0,
        "documents": float(len(tiny.TEXTS)),
    }
    again = [{**row, "score": 0} for row in parts["relevance"]]
    assert retrieval(model, {**parts, "relevance": parts["relevance"] + again}, {}, 8, 0) == found
    floats = [{**row, "corpus-id": float(row["corpus-id"])} for row in parts["relevance"]]
    assert retrieval(model, {**parts, "relevance": floats}, {}, 8, 0) == found
    capsys.readouterr()
    words = ["evaluate", str(directory), "--task", "retrieval", "--data", str(tmp_path / "beir")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(found)
    (tmp_path / "beir" / "corpus.jsonl").unlink()
    assert main(words) == 2
    assert "has no corpus.jsonl" in capsys.readouterr().err


def test_retrieval_of_pairs(model, capsys):
    rows = [{"query": text, "document": text} for text in tiny.TEXTS[:6]]
    rows += [{"query": tiny.TEXTS[0], "document": tiny.TEXTS[9]}]
    found = retrieval(model, rows, {}, 8, 0)
    assert found["targets"] == 6 and found["documents"] == 7 and found["mrr@10"] == 1.0
    named = [{"ask": r["query"], "say": r["document"]} for r in rows]
    assert retrieval(model, named, {"query": "ask", "document": "say"}, 8, 0) == found
    assert retrieval(model, rows, {}, 8, 2)["targets"] == 2
    for name in ("relevance", "label"):  # those of 0 are searched, and answer nothing
        wrong = [{"query": r["query"], "document": tiny.TEXTS[8], name: 0} for r in rows[:6]]
        graded = [{**row, name: 1 + (i == 6)} for i, row in enumerate(rows)] + wrong
        gained = retrieval(model, graded, {"relevance": name}, 8, 0)
        assert {k: gained[k] for k in ("recall@10", "mrr@10", "targets")} == {
            k: found[k] for k in ("recall@10", "mrr@10", "targets")
        } and gained["ndcg@10"] < found["ndcg@10"] and gained["documents"] == 8  # fmt: skip
        with pytest.raises(DataError, match="all relevances of .* are 0 or less"):
            retrieval(model, wrong, {"relevance": name}, 8, 0)
        marked = [{**row, name: "true"} for row in rows] + [{**row, name: "false"} for row in wrong]
        assert retrieval(model, marked, {}, 8, 0)["ndcg@10"] == pytest.approx(found["ndcg@10"])
    for name, value in (("label", "animal"), ("Score", None), ("label", 0), ("score", 0.7)):
        capsys.readouterr()
        assert retrieval(model, [{**row, name: value} for row in rows], {}, 8, 0) == found
        assert f"columns not used: {name!r}" in capsys.readouterr().err
    again = [{**row, "relevance": n} for n in (0, 1, 0) for row in rows]
    assert retrieval(model, again, {}, 8, 0) == found
    twice = {"queries": [{"id": 1, "text": "a"}] * 2, "corpus": [], "relevance": []}
    with pytest.raises(DataError, match="occurs twice"):
        retrieval(model, twice, {}, 8, 0)


def test_a_model_that_says_the_same_of_all_texts(model, monkeypatch):
    """Collapsed vectors: no correlation, and a rank that the order of the documents decides."""

    def same(_: Any, texts: list[str], **options: Any) -> torch.Tensor:
        return torch.ones(len(texts), 4)

    monkeypatch.setattr(embeddings, "embed", same)
    assert math.isnan(sts(model, pairs(), {}, 8, 0)["spearman"])


def test_commands(directory, tmp_path, capsys):
    file = tmp_path / "pairs.tsv"
    lines = "".join(f"{r['sentence1']}\t{r['sentence2']}\t{r['score']}\n" for r in pairs())
    file.write_text("a\tb\tmark\n" + lines)
    words = ["evaluate", str(directory), "--task", "sts", "--data", str(file), "--json"]
    columns = [
        f"--columns.{r}={c}" for r, c in (("sentence1", "a"), ("sentence2", "b"), ("score", "mark"))
    ]
    assert main([*words, *columns]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spearman"] == pytest.approx(
        pretrain.evaluate(directory, pairs(), task="sts")["spearman"]
    )
    assert main(words) == 2
    assert "has no column for sentence1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="on rows of its own"):
        pretrain.evaluate(directory, task="sts")


def test_figures_equal_sentence_transformers(tmp_path, data_sets):
    """On pairs of the STS benchmark; its order of equal cosines is that of rounding errors, so none are equal here."""
    library = pytest.importorskip("sentence_transformers")
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    rows = list(
        read_table(data_sets / "stsb_open_subset" / "dev.tsv").take(range(0, 900, 5)).rows()
    )
    rows = [row for row in rows if row["sentence1"] != row["sentence2"]]
    a, b = ([row[k] for row in rows] for k in ("sentence1", "sentence2"))
    tokenizer = train_from_texts([*a, *b], "wordpiece", vocab_size=1000, lowercase=True)
    model = build("bert", None, tokenizer=tokenizer, seed=4, max_positions=128, **SIZES)
    folder = model.save(tmp_path / "bert")
    found = pretrain.evaluate(folder, rows, task="sts")
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    scores = [float(row["score"]) for row in rows]
    evaluator = evaluation.EmbeddingSimilarityEvaluator(a, b, scores, write_csv=False)
    wanted = evaluator(theirs)
    for key in ("spearman", "pearson"):
        assert found[key] == pytest.approx(wanted[f"{key}_cosine"], abs=1e-4)


def test_prompts_are_those_of_sentence_transformers(tmp_path, capsys):
    library = pytest.importorskip("sentence_transformers")
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    model = build("bert", None, tokenizer=tiny.tokenizer(), seed=4, max_positions=48, **SIZES)
    texts = {str(i): text for i, text in enumerate(tiny.TEXTS)}
    asked = {i: " ".join(text.split()[::-1]) for i, text in texts.items()}
    data = {
        "queries": [{"_id": i, "text": text} for i, text in asked.items()],
        "corpus": [{"_id": i, "text": text} for i, text in texts.items()],
        "relevance": [{"query-id": i, "corpus-id": i} for i in texts],
    }
    seen = set()
    for number, prompts in enumerate(
        (
            {"query": "the red fox ", "document": "a dog "},
            {"passage": "a dog on the mat ", "other": "the red fox "},
            {"other": "the old log "},
        )
    ):
        default = "other" if "other" in prompts else None
        model.sentences = SentenceSettings(
            config={"prompts": prompts, "default_prompt_name": default, "similarity_fn_name": "dot"}
        )
        folder = model.save(tmp_path / str(number))
        capsys.readouterr()
        found = pretrain.evaluate(folder, data, task="retrieval")
        said = capsys.readouterr().err
        named = [name for name in prompts if name != "other"]
        assert [name for name in prompts if f"the prompt {name!r}" in said] == named
        assert "asks for the similarity 'dot'" in said
        theirs = library.SentenceTransformer(str(folder), device="cpu", similarity_fn_name="cosine")
        wanted = evaluation.InformationRetrievalEvaluator(
            asked,
            texts,
            {i: {i} for i in texts},
            write_csv=False,
            main_score_function="cosine",
            corpus_prompt_name="passage" if "passage" in prompts else None,
        )(theirs)
        assert found["ndcg@10"] == pytest.approx(wanted["cosine_ndcg@10"], abs=1e-4)
        assert found["mrr@10"] == pytest.approx(wanted["cosine_mrr@10"], abs=1e-4)
        seen.add(round(found["mrr@10"], 4))
        pretrain.evaluate(folder, pairs(), task="sts")
        assert ("the prompt 'other'" in capsys.readouterr().err) is (default is not None)
    assert len(seen) == 3  # the prompts matter
