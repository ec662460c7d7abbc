"""The task "embedding": the loss by hand, equal texts are no negatives, vectors as embed and transformers give them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pretrain
import tiny
from contract import check_objective_learns, check_objective_resumes
from pretrain.data.tables import Table, read_table
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import ConfigError, DataError
from pretrain.objectives.embedding import Embedding
from pretrain.training.evaluate import evaluate_rows
from pretrain.training.precision import choose_precision

BPE = train_from_texts(tiny.TEXTS, "bpe", vocab_size=330)
WORDS = ["red cat", "old dog", "big fox", "sly cat", "old fox", "red dog", "big cat", "sly fox"]


def model(family: str = "bert", **options: Any) -> Any:
    tok = tiny.tokenizer() if family == "bert" else BPE
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 64,
    }
    if family in ("gpt2", "bert"):
        sizes |= {"dropout": 0.0, "attention_dropout": 0.0}
    return pretrain.build(
        family, None, tokenizer=copy.copy(tok), max_positions=48, **(sizes | options)
    )


def table(**extra: list[Any]) -> Table:
    rows = {
        "anchor": [f"the {w} sat on the mat" for w in WORDS],
        "positive": [f"and looked at the {w}" for w in WORDS],
    }
    return read_table(rows | extra)


def batch_of(task: Embedding, rows: Any) -> Any:
    return task.collate([rows[i] for i in range(len(rows))], [np.random.default_rng(0)] * len(rows))


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_by_hand(pooling: str, symmetric: bool) -> None:
    made = model(initializer_range=0.5)  # fresh vectors would be nearly one
    task = Embedding(made, pooling=pooling, symmetric=symmetric, scale=7.0).eval()
    source = table(negative=[f"a {w}" for w in reversed(WORDS)])
    rows = task.encode(source)
    batch = batch_of(task, rows)
    vectors = {}
    for part in ("anchor", "positive", "negative"):
        found = []
        for text in source.columns[part]:
            ids = torch.tensor([task.encoder.texts([text])[0].ids])
            with torch.no_grad():
                hidden = task.model.backbone({"input_ids": ids})[0]
            found.append({"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling])
        vectors[part] = F.normalize(torch.stack(found), dim=-1)
    others = torch.cat((vectors["positive"], vectors["negative"]))
    scores = 7.0 * vectors["anchor"] @ others.T
    wanted = torch.arange(8)
    total = F.cross_entropy(scores, wanted, reduction="sum")
    if symmetric:
        total = total + F.cross_entropy(scores[:, :8].T, wanted, reduction="sum")
    with torch.no_grad():
        loss = task(batch)
    torch.testing.assert_close(loss.total, total, rtol=1e-5, atol=1e-5)
    assert float(loss.count) == float(task.count(batch)) == 8 * (1 + symmetric)
    figures = task.summarize(float(loss.total), float(loss.count), loss.metrics, {})
    ranks = 1 + (scores > scores.gather(1, wanted[:, None])).sum(1)
    assert figures["accuracy"] == pytest.approx(float((ranks == 1).float().mean()))
    assert figures["mrr"] == pytest.approx(float((1 / ranks).mean()))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_packed_equals_unpacked(family: str) -> None:
    made = model(family).eval()
    losses = []
    for pack in (True, False):
        task = Embedding(made, pack=pack).eval()
        with torch.no_grad():
            losses.append(task(batch_of(task, task.encode(table()))).total)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


def test_equal_texts_are_no_negatives() -> None:
    task = Embedding(model()).eval()
    one, two = (
        {"anchor": "the red cat", "positive": "the mat"},
        {"anchor": "a dog", "positive": "the log"},
    )
    twin = {"anchor": "the old fox", "positive": "the  mat"}  # blanks aside the same text
    with torch.no_grad():
        pair = task(batch_of(task, task.encode(read_table([one, two])))).total
        again = task(batch_of(task, task.encode(read_table([one, two, one])))).total
        batch = batch_of(task, task.encode(read_table([one, twin])))
        alone = task(batch)
    rows = task.encode(read_table([one]))
    with torch.no_grad():
        first = task(batch_of(task, task.encode(read_table([one, two]))))
    assert float(alone.total) == pytest.approx(0.0, abs=1e-6)  # no negative is left
    assert float(first.total) == pytest.approx(float(pair)) and len(rows) == 1
    # the copy adds its own loss, which is that of the first, and is a negative of `two` a second time
    assert float(again) > float(pair)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_vectors_equal_embed_and_transformers(family: str, tmp_path: Path) -> None:
    made = model(family)
    task = Embedding(made)
    tiny.trainer(tmp_path / "run", task, task.encode(table()), limit="4 steps", batch_rows=8).fit()
    texts = table().columns["anchor"]
    found = np.asarray([a["embedding"] for a in task.predict(table(), batch_rows=3)])
    np.testing.assert_allclose(found, made.embed(texts).numpy(), atol=1e-5)
    made.save(tmp_path / "m")
    from transformers import AutoModel, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(tmp_path / "m")
    theirs = AutoModel.from_pretrained(tmp_path / "m").eval()
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = theirs(**tok(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(vector, hidden.mean(0).numpy(), atol=2e-5)


def test_learns_and_leaves_the_head_alone(tmp_path: Path) -> None:
    made = model()
    head = {n: p.clone() for n, p in made.head.named_parameters()}
    task = Embedding(made)
    rows = task.encode(table())
    precision = choose_precision("fp32", torch.device("cpu"))
    tiny.trainer(
        tmp_path / "run", task, rows, limit="60 steps", batch_rows=8, optim={"lr": 1e-3}
    ).fit()
    after = evaluate_rows(task, rows, precision, batch_rows=8)
    assert after["accuracy"] == 1.0 and after["mrr"] == 1.0 and after["loss"] < 0.1
    assert all(torch.equal(head[n], p) for n, p in made.head.named_parameters())


def test_figures_do_not_depend_on_the_batches() -> None:
    task = Embedding(model(initializer_range=0.5))
    rows = task.encode(table(negative=[f"a {w}" for w in reversed(WORDS)]))
    precision = choose_precision("fp32", torch.device("cpu"))
    found = [evaluate_rows(task, rows, precision, batch_rows=n) for n in (1, 3, 8)]
    assert found[0]["loss"] < found[1]["loss"] < found[2]["loss"]
    for key in ("accuracy", "mrr"):
        assert found[0][key] == found[1][key] == found[2][key] < 1


def test_vectors_that_are_all_one_have_found_nothing() -> None:
    task = Embedding(model()).eval()
    task.vectors = lambda batch: torch.ones(16, 4)  # type: ignore[method-assign]
    loss = task(batch_of(task, task.encode(table())))
    figures = task.summarize(float(loss.total), float(loss.count), loss.metrics, {})
    assert figures["accuracy"] == 0 and figures["mrr"] == pytest.approx(1 / 8)


def test_contract(tmp_path: Path) -> None:
    rows = Embedding(model()).encode(table())
    check_objective_learns(lambda: Embedding(model()), rows, tmp_path / "learns")
    check_objective_resumes(lambda: Embedding(model()), rows, tmp_path)


def test_scores_choose_pairs_and_give_a_correlation() -> None:
    from scipy.stats import spearmanr

    scores = [5.0, 4.8, 0.0, 1.0, 4.0, 2.0, 3.9, 5.0]
    source = table(label=[str(s) for s in scores])
    learned = Embedding.learn(source, {})
    assert learned.options == {"min_score": 4.0} and "4 of 8" in learned.notes[0]
    task = Embedding(model(), **learned.options)
    rows = task.encode(source)
    assert int(task.count(batch_of(task, rows))) == 4
    precision = choose_precision("fp32", torch.device("cpu"))
    figures = evaluate_rows(task, rows, precision, batch_rows=4)
    units = [
        F.normalize(task.model.embed(source.columns[p]), dim=-1) for p in ("anchor", "positive")
    ]
    cosines = (units[0] * units[1]).sum(-1).numpy()
    assert figures["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-6)
    assert figures["targets"] == 4
    with pytest.raises(DataError, match=r"row 2 .*'high'"):
        Embedding.learn(table(label=["1", "high", *"123456"]), {})
    with pytest.raises(DataError, match="none is a pair"):
        Embedding.learn(source, {"min_score": 6.0})


def test_published_pairs(data_sets: Path) -> None:
    from pretrain.data.labelled import choose_columns, roles_table

    source = read_table(data_sets / "stsb_open_subset" / "dev.tsv").take(range(20))
    named = roles_table(source, choose_columns(source, Embedding.roles, {}))
    assert named.names == ["anchor", "positive", "label"]
    task = Embedding(model(), **Embedding.learn(named, {}).options)
    figures = evaluate_rows(
        task, task.encode(named), choose_precision("fp32", torch.device("cpu")), batch_rows=10
    )
    assert -1 <= figures["spearman"] <= 1 and 0 <= figures["accuracy"] <= 1


def test_what_is_refused() -> None:
    task = Embedding(model())
    bad = read_table([{"anchor": "a", "positive": ""}, {"anchor": "a", "positive": "b"}])
    assert task.encode(bad).dropped == {"empty text": [0]}
    with pytest.raises(DataError, match=r"row 1 .*positive is int"):
        task.encode(read_table([{"anchor": "a", "positive": 3}]))
    with pytest.raises(ConfigError, match="pooling"):
        Embedding(model(), pooling="mex")
    with pytest.raises(ConfigError, match="causal model the first token"):
        Embedding(model("gpt2"), pooling="first")
    with pytest.raises(ConfigError, match="scale"):
        Embedding(model(), scale=0.0)
    long = Embedding(model(), max_length=4).encode(table())
    assert long.cut == list(range(8))


def test_lists_of_texts_as_published() -> None:
    """FlagEmbedding lists positives and negatives; sentence-transformers makes a triplet of each negative."""
    from pretrain.data.labelled import choose_columns, roles_table

    task = Embedding(model())
    listed: list[dict[str, Any]] = [
        {"query": "red cat", "pos": ["old dog", " "], "neg": ["big fox", "sly cat", "old fox"]},
        {"query": "red dog", "pos": ["big cat", "sly fox"], "neg": ["old dog"]},
        {"query": "big cat", "pos": ["old cat"], "neg": []},
    ]
    single = [
        {"query": one["query"], "document": one["pos"][p], "hard_neg": one["neg"][n]}
        for one, p, n in [
            (listed[0], 0, 0), (listed[0], 0, 1), (listed[0], 0, 2), (listed[1], 0, 0), (listed[1], 1, 0),
        ]
    ]  # fmt: skip
    made = []
    cells = [{key: str(cell) for key, cell in row.items()} for row in listed]
    for given in (
        listed,
        single,
        cells,
        [{k: c.replace("'", '"') for k, c in r.items()} for r in cells],
    ):
        source = read_table(given)
        source = roles_table(source, choose_columns(source, Embedding.roles, {}))
        options = Embedding.learn(source, {}).options
        assert options == ({} if given in (listed, single) else {"printed_lists": True})
        made.append(Embedding(task.model, **options).encode(source))
    for others in made[1:]:
        for one, other in zip(made[0], others, strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[key], other[key]) for key in one)
    assert made[2].owners == made[0].owners
    assert made[0].owners == [0, 0, 0, 1, 1] and made[0].dropped == {"empty text": [2]}
    assert [*made[0].remarks.values()] == [[0, 1]]
    begun = {"begun_objective": {}, "begun_columns": {}}  # of a run of an earlier version
    assert Embedding.learn(source, begun).options == {} and len(task.encode(source)) == 3
    begun["begun_objective"] = {"printed_lists": True}
    assert Embedding.learn(source, begun).options == {"printed_lists": True}
    short = Embedding(model(), max_length=3)
    source = read_table([{"anchor": "red cat", "positive": ["old dog", "big fox"]}])
    assert short.encode(source).cut == [0]


@pytest.mark.parametrize(
    "cell",
    [[3, 7], 0.25, [], None, [{"docid": 3}], "0.25", "[3, 7]", "[]", '[{"docid": 3}]', "['0.5']"],
)
def test_negatives_without_texts_are_not_read(cell: Any) -> None:
    """Ids and scores of negatives stand beside published pairs, which are trained as before."""
    from pretrain.data.labelled import choose_columns

    for name in ("neg", "Negatives"):
        source = read_table([{"query": "red cat", "positive": "old dog", name: cell}])
        assert choose_columns(source, Embedding.roles, {}) == {
            "anchor": "query", "positive": "positive",
        }  # fmt: skip
        source = read_table([{"query": "red cat", "positive": "old dog", name: ["fox"]}])
        assert choose_columns(source, Embedding.roles, {})["negative"] == name


def test_graded_pairs_are_refused() -> None:
    rows = [{"query": text, "passage": text, "relevance": k % 3} for k, text in enumerate(WORDS)]
    with pytest.raises(DataError, match="the column 'relevance' says which texts match"):
        pretrain.data(rows, "embedding", model())


@pytest.mark.parametrize("name", ["label", "gold_label", "is_duplicate"])
@pytest.mark.parametrize("values", [("entailment", "contradiction", "neutral"), (0, 1), (1.0, 0.0)])
def test_pairs_that_do_not_match_are_no_examples(
    name: str, values: tuple[Any, ...], tmp_path: Path
) -> None:
    """A column that says so must be obeyed, or all pairs would be trained as matching ones."""
    rows = [
        {"sentence1": f"{text} {k}", "sentence2": f"{k} {text}", name: values[k % len(values)]}
        for k, text in enumerate(WORDS * 3)
    ]
    options: dict[str, Any] = {"valid": 0.25, "limit": "1 steps", "device": "cpu", "quiet": True}
    with pytest.raises(DataError, match=f"the column '{name}' says which texts match"):
        pretrain.finetune(model(), rows, "embedding", out=tmp_path / "a", **options)
    matching = [{**row, name: values[0]} for row in rows]
    pretrain.finetune(model(), matching, "embedding", out=tmp_path / "b", **options)
    if not isinstance(values[0], str):
        pretrain.finetune(model(), rows, "embedding", out=tmp_path / "c", label=name, **options)
