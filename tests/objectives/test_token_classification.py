"""Classification of words: which tokens are targets, entities against seqeval, answers against transformers."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from contract import check_objective
from pretrain.data.columns import read_words
from pretrain.data.tables import Table, read_table
from pretrain.data.task_rows import blanks_before_words, word_windows
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import ConfigError, DataError
from pretrain.models import build
from pretrain.nn.loss import IGNORE
from pretrain.objectives.token_classification import TokenClassification
from tiny import trainer

NAMES = ("Anna", "Bertram", "Clementine")
CITIES = ("Oslo", "Turin", "Zurich")
TAGS = ("B-CITY", "B-PER", "I-CITY", "I-PER", "O")
FAMILIES = ("bert", "roberta", "modernbert", "gpt2", "llama", "qwen3")


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        first, last, city = rng.choice(NAMES), rng.choice(NAMES), rng.choice(CITIES)
        words = [str(first), str(last), "does", "not", "live", "in", "New", str(city), "."]
        tags = ["B-PER", "I-PER", "O", "O", "O", "O", "B-CITY", "I-CITY", "O"]
        skip = int(rng.integers(0, 3))  # sentences of unequal length
        rows.append({"tokens": words[skip:], "label": tags[skip:]})
    return rows


@functools.cache
def tokenizer(kind: str = "wordpiece") -> Tokenizer:
    texts = [" ".join(row["tokens"]) for row in sentences(40)]
    return train_from_texts(texts, kind, vocab_size={"wordpiece": 70, "bpe": 300}.get(kind, 0))


def task(
    family: str = "bert", kind: str = "", tags: Any = TAGS, **options: Any
) -> TokenClassification:
    kind = kind or ("wordpiece" if family in ("bert", "modernbert") else "bpe")
    model = build(
        family,
        None,
        tokenizer=tokenizer(kind),
        head="token-classification",
        labels=tags,
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        intermediate_size=32,
        max_positions=64,
        **({"num_kv_heads": 2} if family in ("llama", "qwen3") else {"dropout": 0.0}),
    )
    return TokenClassification(model, **({"word_blanks": True} | options))


def table(rows: Any) -> Table:
    return read_table(rows)


def rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(0)] * count


# ------------------------------------------------------------------ encoding


def hand_aligned(goal: TokenClassification, row: dict[str, Any]) -> list[int]:
    """Targets by encoding every word on its own."""
    goal.model.tokenizer.plain.encode_special_tokens = True  # type: ignore[union-attr]
    plain = goal.model.tokenizer.plain  # type: ignore[union-attr]
    wanted: list[int] = []
    for word, tag in zip(row["tokens"], row["label"], strict=True):
        ids = plain.encode([word], is_pretokenized=True, add_special_tokens=False).ids
        wanted += ([goal.labels.index(tag)] + [IGNORE] * (len(ids) - 1))[: len(ids)]
    return wanted


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_first_piece_of_every_word_is_the_target(family: str) -> None:
    goal = task(family)
    rows = sentences(10)
    encoded = goal.encode(table(rows))
    assert any((example["labels"] == IGNORE)[1:-1].any() for example in encoded)  # words of pieces
    for row, example in zip(rows, encoded, strict=True):
        framed = [
            i
            for i, token in enumerate(example["input_ids"])
            if token in goal.model.tokenizer.special_ids
        ]  # type: ignore[union-attr]
        assert framed and all(example["labels"][i] == IGNORE for i in framed)
        inner = np.delete(example["labels"], framed)
        assert inner.tolist() == hand_aligned(goal, row)


def test_all_pieces_are_targets_on_request() -> None:
    goal = task(all_pieces=True)
    row = sentences(1)[0]
    example = goal.encode(table([row]))[0]
    assert (example["labels"][1:-1] != IGNORE).all()
    assert example["labels"][0] == example["labels"][-1] == IGNORE
    assert (example["words"] >= 0).sum() == len(row["tokens"])
    assert [mark for _, mark in goal.show(example)] == (example["labels"] != IGNORE).tolist()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "char"])
def test_ids_are_those_of_transformers_for_lists_of_words(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    goal = task("bert" if kind == "wordpiece" else "gpt2", kind)
    goal.model.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    words = ["Anna", "doesn't", "live", "\u200b", "in", "Zürich", "", "…", "Oslo."]
    example = goal.encode(table([{"tokens": words}]), targets=False)[0]
    found = other(words, is_split_into_words=True)
    assert example["input_ids"].tolist() == found["input_ids"]
    wanted = [
        -1 if w is None or w == b else w
        for w, b in zip(found.word_ids(), [None, *found.word_ids()], strict=False)
    ]
    assert example["words"].tolist() == wanted


def byte_level(split_first: bool) -> Tokenizer:
    """Byte-level BPE as GPT-2 has it, or behind a rule of its own as Llama 3 and Qwen have it."""
    backend = Backend(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split_first)
    rule = pre_tokenizers.Split(Regex(r"'s|'t| ?\w+|\s+|[^\s\w]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([rule, level]) if split_first else level
    texts = [" ".join(row["tokens"]) for row in sentences(40)] + ["a the x7 Paris don't"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return Tokenizer(backend)


@pytest.mark.parametrize("split_first", [False, True])
def test_words_get_the_blank_that_byte_level_tokens_carry(
    tmp_path: Path, split_first: bool
) -> None:
    from transformers import AutoTokenizer

    before = byte_level(split_first)
    words = ["Anna", "don't", "live", "in", "Oslo"]
    glued = before.plain.encode(words, is_pretokenized=True).ids
    after = blanks_before_words(before)
    assert after.plain.encode(words, is_pretokenized=True).ids != glued
    assert (
        after.plain.encode(words, is_pretokenized=True).ids
        == before.plain.encode(" " + " ".join(words)).ids
    )
    after.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        other(words, is_split_into_words=True)["input_ids"]
        == after.plain.encode(words, is_pretokenized=True).ids
    )
    assert blanks_before_words(after) is after
    assert blanks_before_words(tokenizer()) is tokenizer()


def test_words_without_tokens_have_no_target_and_an_answer() -> None:
    goal = task()
    row = {"tokens": ["Anna", "\u200b", "", "Oslo"], "label": ["B-PER", "B-PER", "O", "B-CITY"]}
    encoded = goal.encode(table([row]))
    assert sorted(encoded[0]["words"][encoded[0]["words"] >= 0]) == [0, 3]
    answer = next(iter(goal.predict(table([row]))))
    assert len(answer["tags"]) == 4 and answer["tags"][1:3] == ["O", "O"]
    assert answer["scores"][1:3] == [0.0, 0.0]
    batch = goal.collate([encoded[0]], rngs(1), evaluation=True)
    goal.eval()
    sentence = goal(batch).metrics["sentences"][0]
    assert sentence[3].tolist() == [1, 1, 4, 0]  # they count in the figures


def test_sentences_without_words_are_dropped() -> None:
    goal = task()
    encoded = goal.encode(table([{"tokens": [], "label": []}, *sentences(2)]))
    assert encoded.dropped == {"no words": [0]} and encoded.owners == [1, 2]
    assert next(iter(goal.predict(table([{"tokens": []}])))) == {}


# ------------------------------------------------------------------ windows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(4, 20), st.integers(0, 6))
def test_windows_cover_every_word_and_fit(sizes: list[int], room: int, overlap: int) -> None:
    windows = word_windows(sizes, room, overlap)
    assert windows[0][0] == 0 and windows[-1][1] == len(sizes)
    for (a, b), (c, d) in zip(windows, windows[1:], strict=False):
        assert a < c <= b < d  # nothing is left out, and each window adds something
        assert sum(sizes[c:b]) <= overlap
    assert all(sum(sizes[a:b]) <= room or b == a + 1 for a, b in windows)


def test_long_sentences_are_read_in_windows_and_every_word_is_answered_once() -> None:
    goal = task(max_length=16)
    parts = sentences(12)
    row = {k: [x for part in parts for x in part[k]] for k in ("tokens", "label")}
    encoded = goal.encode(table([row, parts[0]]))
    assert len(encoded) > 5 and encoded.longest <= 16 and encoded.cut == []
    words = np.concatenate(
        [
            e["words"][e["words"] >= 0]
            for e, o in zip(encoded, encoded.owners, strict=True)
            if o == 0
        ]
    )
    assert words.tolist() == list(range(len(row["tokens"])))
    classes = np.concatenate(
        [
            e["labels"][e["words"] >= 0]
            for e, o in zip(encoded, encoded.owners, strict=True)
            if o == 0
        ]
    )
    assert [TAGS[k] for k in classes] == row["label"]
    answer = next(iter(goal.predict(table([row]))))
    assert len(answer["tags"]) == len(row["tokens"]) and min(answer["scores"]) > 0


def test_a_word_longer_than_a_window_is_noted() -> None:
    goal = task("gpt2", max_length=8)
    words = ["live", "Q" * 30, "in", "Oslo"]
    encoded = goal.encode(table([{"tokens": words, "label": ["O", "B-PER", "O", "B-CITY"]}]))
    assert encoded.cut == [0] and encoded.longest <= 8
    assert sorted(w for e in encoded for w in e["words"].tolist() if w >= 0) == [0, 1, 2, 3]


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family: str) -> None:
    goal = task(family)
    goal.eval()
    examples = list(goal.encode(table(sentences(9))))
    packed = goal.collate(examples, rngs(9), evaluation=True)
    assert packed["document_ids"].max() > 1
    together = goal(packed)
    said = goal.outputs(packed)
    total = 0.0
    goal.pack = False
    for i, example in enumerate(examples):
        alone = goal.collate([example], rngs(1), evaluation=True)
        total += float(goal(alone).total.detach())
        words, chances = goal.outputs(alone)[0]
        assert np.array_equal(words, said[i][0])
        np.testing.assert_allclose(chances, said[i][1], atol=1e-5)
    assert abs(total - float(together.total.detach())) < 1e-3
    assert int(together.count) == sum(len(e["tags"]) for e in examples)


def test_loss_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    goal = task()
    goal.eval()
    goal.model.save(tmp_path)
    other = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert other.config.id2label == dict(enumerate(TAGS))
    examples = list(goal.encode(table(sentences(6))))
    total, count = 0.0, 0
    for example in examples:
        keys = {
            k: torch.from_numpy(example[k])[None] for k in ("input_ids", "token_type_ids", "labels")
        }
        targets = int((keys["labels"] != IGNORE).sum())
        with torch.no_grad():
            total += float(other(**keys).loss) * targets
        count += targets
    ours = goal(goal.collate(examples, rngs(6)))
    assert int(ours.count) == count
    assert abs(float(ours.total.detach()) - total) < 1e-4 * count


def test_answers_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    for family in ("bert", "gpt2"):
        goal = task(family)
        with torch.no_grad():
            for parameter in goal.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        folder = tmp_path / family
        goal.model.save(folder)
        other, encode = (
            AutoModelForTokenClassification.from_pretrained(folder).eval(),
            AutoTokenizer.from_pretrained(folder),
        )
        rows = sentences(5)
        for row, answer in zip(rows, goal.predict(table(rows)), strict=True):
            found = encode(row["tokens"], is_split_into_words=True, return_tensors="pt")
            with torch.no_grad():
                chances = other(**found).logits[0].softmax(-1)
            for word in range(len(row["tokens"])):
                place = found.word_ids().index(word)
                assert answer["tags"][word] == other.config.id2label[int(chances[place].argmax())]
                assert abs(answer["scores"][word] - float(chances[place].max())) < 1e-5


def test_weights_and_smoothing() -> None:
    examples = list(task().encode(table(sentences(6))))
    plain, weighted = task(), task(class_weights={"O": 0.5, "B-PER": 3.0})
    batch = weighted.collate(examples, rngs(6))
    index = batch["labels"].flatten() != IGNORE
    labels = batch["labels"].flatten()[index]
    weights = torch.tensor([1.0, 3.0, 1.0, 1.0, 0.5])
    logits = plain.model(batch).reshape(-1, 5)[index]
    wanted = torch.nn.functional.cross_entropy(logits, labels, weight=weights, label_smoothing=0.0)
    loss = weighted.train()(batch)
    torch.testing.assert_close(loss.total / loss.count, wanted, rtol=1e-4, atol=1e-5)
    assert float(weighted.count(batch)) == float(weights[labels].sum())
    assert "weights" not in weighted.collate(examples, rngs(6), evaluation=True)
    smooth = task(label_smoothing=0.2)
    batch = smooth.collate(examples, rngs(6))
    wanted = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    loss = smooth.train()(batch)
    torch.testing.assert_close(loss.total / loss.count, wanted, rtol=1e-4, atol=1e-5)
    balanced = task(class_weights="balanced")
    balanced.encode(table(sentences(6)))
    counts = np.bincount(labels.numpy(), minlength=5)
    np.testing.assert_allclose(balanced._weights, counts.sum() / (5 * counts))


# ------------------------------------------------------------------ figures


def figures(goal: TokenClassification, encoded: Any, batch_rows: int = 3) -> dict[str, float]:
    from pretrain.training.evaluate import evaluate_rows
    from pretrain.training.precision import choose_precision

    precision = choose_precision("fp32", torch.device("cpu"))
    return evaluate_rows(goal, encoded, precision, batch_rows=batch_rows)


def half_trained(goal: TokenClassification, steps: int = 25) -> None:
    """So that some answers are right and some are wrong."""
    batch = goal.train().collate(list(goal.encode(table(sentences(12)))), rngs(12))
    optimizer = torch.optim.AdamW(goal.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        goal(batch).total.backward()
        optimizer.step()


@pytest.mark.parametrize("max_length", [None, 16])
def test_figures_are_those_of_seqeval_over_the_predictions(max_length: int | None) -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score

    goal = task(max_length=max_length)
    half_trained(goal)
    parts = sentences(20, seed=3)
    long = {k: [x for part in parts for x in part[k]] for k in ("tokens", "label")}
    rows = [
        *parts,
        long if max_length else parts[0],
        {"tokens": ["\u200b", "Oslo"], "label": ["B-PER", "O"]},
    ]
    found = figures(goal, goal.encode(table(rows)))
    said = [answer["tags"] for answer in goal.predict(table(rows))]
    true = goal.truth(table(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = f1_score(true, said), precision_score(true, said), recall_score(true, said)
    assert 0.05 < wanted[0] < 0.95
    np.testing.assert_allclose(
        (found["f1"], found["precision"], found["recall"]), wanted, atol=1e-9
    )
    pairs = [(a, b) for t, s in zip(true, said, strict=True) for a, b in zip(t, s, strict=True)]
    assert abs(found["accuracy"] - np.mean([a == b for a, b in pairs])) < 1e-9


def test_parts_of_speech_are_measured_by_accuracy() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    rows = [
        {
            "tokens": r["tokens"],
            "label": [
                "NOUN" if w[0].isupper() else "VERB" if len(w) > 2 else "X" for w in r["tokens"]
            ],
        }
        for r in sentences(8)
    ]
    goal = task(tags=("NOUN", "VERB", "X"))
    assert goal.metric == "accuracy" and task().metric == "f1"
    found = figures(goal, goal.encode(table(rows)))
    said = [tag for answer in goal.predict(table(rows)) for tag in answer["tags"]]
    true = [tag for row in rows for tag in row["label"]]
    assert abs(found["accuracy"] - accuracy_score(true, said)) < 1e-9
    assert abs(found["macro_f1"] - f1_score(true, said, average="macro")) < 1e-9
    assert next(iter(goal.predict(table(rows))))["entities"] == []


def test_entities_have_words_text_and_score() -> None:
    goal = task()
    chances = np.full((4, 5), 0.05)
    for word, (kind, chance) in enumerate([(1, 0.8), (3, 0.6), (4, 0.8), (2, 0.8)]):
        chances[word, kind] = chance
    answer = goal.decode([(np.arange(4), chances)], [["Anna", "Maria", "in", "Oslo"]])
    assert answer["tags"] == ["B-PER", "I-PER", "O", "I-CITY"]
    assert answer["entities"] == [
        {"type": "PER", "start": 0, "end": 2, "text": "Anna Maria", "score": pytest.approx(0.7)},
        {"type": "CITY", "start": 3, "end": 4, "text": "Oslo", "score": pytest.approx(0.8)},
    ]


# ------------------------------------------------------------------ learning


def test_learns(tmp_path: Path) -> None:
    goal = task()
    before = figures(goal, goal.encode(table(sentences(10, seed=5))))
    assert abs(before["loss"] - (goal.expected_first_loss() or 0)) < 0.1
    fit = trainer(
        tmp_path, goal, goal.encode(table(sentences(32))), limit="60 steps", batch_rows=8,
        eval_rows=goal.encode(table(sentences(10, seed=5))),
    )  # fmt: skip
    fit.fit()
    assert figures(goal, goal.encode(table(sentences(10, seed=5))))["f1"] > 0.9


def test_contract(tmp_path: Path) -> None:
    groups: dict[int, list[Any]] = {}
    for example in task().encode(table(sentences(60))):
        groups.setdefault(len(example["input_ids"]), []).append(example)
    alike = max(groups.values(), key=len)  # one row each, of one length: rows can then be compared
    assert len(alike) >= 4
    check_objective(lambda: task(pack=False), (alike * 4)[:16], tmp_path)


# ------------------------------------------------------------------ what the rows say


def test_labels_are_learned_from_names_and_numbers() -> None:
    rows = sentences(6)
    learned = TokenClassification.learn(table(rows), {})
    assert learned.labels == TAGS and learned.options["empty_tag"] == "O" and not learned.notes
    assert learned.strata is not None and len(learned.strata) == 6
    numbered = Table("x", {
        "tokens": [r["tokens"] for r in rows],
        "label": [[TAGS.index(t) for t in r["label"]] for r in rows],
    }, {"label": list(TAGS)})  # fmt: skip
    assert TokenClassification.learn(numbered, {}).labels == TAGS
    bare = Table("x", numbered.columns)
    assert TokenClassification.learn(bare, {"labels": TAGS}).labels == TAGS
    assert TokenClassification.learn(bare, {}).labels == ("0", "1", "2", "3", "4")
    for source in (table(rows), numbered, bare):
        found = [e["labels"].tolist() for e in task().encode(source)]
        assert found == [e["labels"].tolist() for e in task().encode(table(rows))]
    # Names in another order than the model's are mapped by name.
    turned = [TAGS[k] for k in (4, 3, 2, 1, 0)]
    other = Table("x", {
        "tokens": [r["tokens"] for r in rows],
        "label": [[turned.index(t) for t in r["label"]] for r in rows],
    }, {"label": turned})  # fmt: skip
    assert [e["labels"].tolist() for e in task().encode(other)] == found
    lower = Table("x", other.columns, {"label": [tag.lower() for tag in turned]})
    assert [e["labels"].tolist() for e in task().encode(lower)] == found
    unknown = Table("x", other.columns, {"label": ["O", "PER", "in PER", "CITY", "in CITY"]})
    with pytest.raises(
        DataError, match=r"item 1: tags .* is not among .* stand for the classes O, PER,"
    ):
        task().encode(unknown)
    with pytest.raises(ConfigError, match="codes maps '1' to 'B-ORG'"):
        task(codes={"1": "B-ORG"})


def test_words_and_tags_may_be_texts() -> None:
    row = {"tokens": "Anna in Oslo", "label": "B-PER O B-CITY"}
    assert TokenClassification.learn(table([row]), {}).labels == ("B-CITY", "B-PER", "O")
    assert task().truth(table([row])) == [["B-PER", "O", "B-CITY"]]
    words, tags = row["tokens"].split(), row["label"].split()
    arrays = (str, lambda items: repr(np.array(items, dtype=object)))
    for spell in (
        repr,
        json.dumps,
        lambda items: str(tuple(items)),
        *(lambda i, f=f: f(np.array(i)) for f in arrays),
    ):
        printed = {"tokens": spell(words), "label": spell([f" {t}" for t in tags])}
        assert task().truth(table([printed])) == [tags]
        assert [w for r in task().encode(table([printed])).info for w in r] == words
    for bare in ("[B-PER, O, B-CITY]", "{B-PER,O,B-CITY}"):
        assert task().truth(table([{"tokens": row["tokens"], "label": bare}])) == [tags]
    assert task().truth(table([{"tokens": "Anna", "label": "[B-PER]"}])) == [["B-PER"]]
    numbers = {"tokens": row["tokens"], "label": str([TAGS.index(t) for t in tags])}
    assert task().truth(table([numbers])) == [tags]


def test_words_in_lists_without_quotes_or_with_another_mark_between_are_refused() -> None:
    """Their brackets would be parts of words, and a sentence one word whose tag is a class of its own."""
    for words, tags in (
        ("[Anna, in]", "[B-PER, O]"),
        ("{Anna,in}", "{B-PER,O}"),
        ("[Anna]", "['O']"),
    ):
        with pytest.raises(DataError, match=r"row 1 .*stand in brackets.*without quotes"):
            TokenClassification.learn(table([{"tokens": words, "label": tags}]), {})
    for mark in ("|", ",", ";", "/"):
        rows = [("Anna", "B-PER"), (mark.join(("in", "Oslo")), mark.join(("O", "B-CITY")))]
        with pytest.raises(DataError, match=r"row 2 .*stands between the words of"):
            TokenClassification.learn(table([{"tokens": a, "label": b} for a, b in rows]), {})
    for words, tags, read in (
        ("[ Anna ]", "['O', 'B-PER', 'O']", ["[", "Anna", "]"]), ("(Anna in)", "O O", ["(Anna", "in)"]),
        (",", ",", [","]), ("1/2", "NUM", ["1/2"]),
    ):  # fmt: skip
        rows = table([{"tokens": words, "label": tags}, {"tokens": "Oslo", "label": "B-CITY"}])
        TokenClassification.learn(rows, {})
        assert read_words(rows)[0] == read


@pytest.mark.parametrize("text", ['( " the cat " )', '[ " the cat " ]', "( ' cat ' )", '("cat")'])
def test_words_of_a_text_in_brackets_are_no_list(text: str) -> None:
    words = text.split()
    assert read_words(Table("inputs", {"tokens": [text]})) == [words]
    assert read_words(table([{"tokens": text, "label": " ".join("O" for _ in words)}])) == [words]


@pytest.mark.parametrize(
    ("words", "tags"),
    [
        ("[ sic ]", "[ UH ]"), ("{ cat }", "{ NN }"), ("[ the cat ]", "[ NN UH ]"), ("[the cat]", "[NN UH]"),
        ("{ cat , the }", "{ NN , UH }"), ("( sic )", "( UH )"),
    ],
)  # fmt: skip
def test_tags_of_brackets_may_be_brackets(words: str, tags: str) -> None:
    rows = table([{"tokens": words, "label": tags}, {"tokens": "Oslo", "label": "B-CITY"}])
    labels = TokenClassification.learn(rows, {}).labels
    assert labels is not None and {*labels} == {*tags.split(), "B-CITY"}


def test_tags_of_a_checkpoint_are_kept() -> None:
    row = {"tokens": "Anna in Oslo", "label": [1, 0, 3]}
    known = ("O", "B-PER", "I-PER", "B-CITY", "I-CITY")
    learned = TokenClassification.learn(table([row]), {"checkpoint_labels": known})
    assert learned.labels == known
    with pytest.raises(DataError, match="'B-ORG' is not among the classes of the checkpoint"):
        TokenClassification.learn(
            table([{"tokens": "Acme in", "label": "B-ORG O"}]), {"checkpoint_labels": known}
        )


def test_other_schemes_than_bio_are_told() -> None:
    row = {"tokens": ["Anna", "Maria", "in"], "label": ["B-PER", "X-PER", "O"]}
    assert "accuracy" in TokenClassification.learn(table([row]), {}).notes[0]


@pytest.mark.parametrize("tags", [["b-per", "i-per", "o"], ["B-PER", "I-PER", "o"]])
def test_span_tags_in_small_letters_are_told(tags: list[str]) -> None:
    rows = table([{"tokens": ["Anna", "Lee", "sat"], "label": tags}])
    learned = TokenClassification.learn(rows, {})
    assert "begin with small letters" in learned.notes[0] and "'o': 'O'" in learned.notes[0]
    names = {tag: tag[:1].upper() + tag[1:] for tag in tags}
    named = TokenClassification.learn(rows, {"labels": names})
    assert named.labels == tuple(names.values()) and not named.notes


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a", "b"], "label": ["O"]}, "row 2 .*2 words, 1 tags"),
        ({"tokens": ["a", None], "label": ["O", "O"]}, "row 2 .*NoneType"),
        ({"tokens": 7, "label": ["O"]}, "row 2 .*the words are int"),
        ({"tokens": "['a', 'b']", "label": "['O']"}, "row 2 .*2 words, 1 tags"),
        ({"tokens": ["a"], "label": None}, "row 2 .*the tags are NoneType"),
        ({"tokens": ["a"], "label": [None]}, "no tags"),
        ({"tokens": ["a"], "label": ["B-ANIMAL"]}, "'B-ANIMAL' is not among"),
        ({"tokens": ["a"], "label": [9]}, "mixes kinds"),
        ({"tokens": ["a"], "label": [float("nan")]}, "no tags"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        task().encode(table([sentences(1)[0], row]))


def test_bad_tables_and_options_are_refused() -> None:
    with pytest.raises(DataError, match="at least two classes"):
        TokenClassification.learn(table([{"tokens": ["a", "b"], "label": ["O", "O"]}]), {})
    with pytest.raises(DataError, match="not among the labels given"):
        TokenClassification.learn(table(sentences(3)), {"labels": ["O", "B-PER"]})
    with pytest.raises(DataError, match="'9' is not among"):
        task().encode(table([{"tokens": ["a"], "label": [9]}]))
    with pytest.raises(ConfigError, match="label_smoothing"):
        task(label_smoothing=1.0)
    with pytest.raises(ConfigError, match="empty_tag"):
        task(empty_tag="Q")


def test_real_sentences_align_with_transformers(data_sets: Path, tmp_path: Path) -> None:
    """wnut17 with BERT's own vocabulary: the usual recipe (first piece, -100 elsewhere) on its encodings."""
    from transformers import AutoTokenizer

    rows = read_table(data_sets / "wnut17" / "dev.conll")
    source = Table("wnut", {"tokens": rows.columns["tokens"], "label": rows.columns["ner_tags"]})
    learned = TokenClassification.learn(source, {})
    words = Tokenizer.from_directory(data_sets / "tokenizer_vocabs" / "bert-base-uncased")
    model = build(
        "bert", None, tokenizer=words, head="token-classification", labels=learned.labels,
        num_layers=1, hidden_size=8, num_heads=1, intermediate_size=8, max_positions=128,
    )  # fmt: skip
    goal = TokenClassification(model, **learned.options)
    assert goal.bio
    encoded = goal.encode(source)
    words.save(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)(
        source.columns["tokens"], is_split_into_words=True, split_special_tokens=True
    )
    assert len(encoded) + sum(map(len, encoded.dropped.values())) == len(source)
    for example, row in zip(encoded, encoded.owners, strict=True):
        assert example["input_ids"].tolist() == found["input_ids"][row]
        wanted, before = [], None
        for word in found.word_ids(row):
            new = word is not None and word != before
            wanted.append(goal.labels.index(source.columns["label"][row][word]) if new else IGNORE)
            before = word
        assert example["labels"].tolist() == wanted


def test_the_trivial_answer_is_a_look_up_of_words() -> None:
    from seqeval.metrics import accuracy_score, f1_score

    train = read_table([
        {"tokens": ["Ann", "sat"], "label": ["B-PER", "O"]}, {"tokens": ["Bob", "sat"], "label": ["B-PER", "O"]},
        {"tokens": ["Ann", "ran", "off"], "label": ["O", "O", "O"]}, {"tokens": ["Ann"], "label": ["B-PER"]},
    ])  # fmt: skip
    held = read_table([
        {"tokens": ["Ann", "ran"], "label": ["B-PER", "O"]}, {"tokens": ["Eve", "sat"], "label": ["B-PER", "O"]},
    ])  # fmt: skip
    found = task(tags=("B-PER", "O")).trivial(train, held)
    true, said = [["B-PER", "O"]] * 2, [["B-PER", "O"], ["O", "O"]]
    assert found["f1"] == pytest.approx(f1_score(true, said))
    assert found["accuracy"] == pytest.approx(accuracy_score(true, said))


def test_a_mistake_is_as_bad_as_its_surest_wrong_tag() -> None:
    goal = task()
    said = {"tags": ["O", "B-PER", "O"], "scores": [0.9, 0.6, 0.7]}
    assert goal.mistake(["O", "B-PER", "O"], said) is None
    assert goal.mistake(["O", "O", "B-PER"], said) == 0.7
    assert goal.choices(said) == said["tags"] and goal.choices({}) == []


def test_rows_with_one_word_are_gathered_into_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    """By simpletransformers' column, and by one whose number stands in the first row of each sentence alone."""

    def gathered(rows: list[tuple[Any, str, str]], name: str = "sentence_id") -> Table:
        found = table([{name: k, "words": w, "labels": t} for k, w, t in rows])
        return TokenClassification.gathered(found, {"label": "labels"})

    ids = [(1, "Bob", "B-PER"), (1, "runs", "O"), (2, "[", "O"), (2, "EU", "B-LOC"), (3, "no", "O")]
    blank = [(f"Sentence: {k}" if k != before else "", w, t)
             for before, (k, w, t) in zip((0, 1, 1, 2, 2), ids, strict=True)]  # fmt: skip
    for rows, name in ((ids, "sentence_id"), (blank, "Sentence #")):
        found = gathered(rows, name)
        assert found.columns["words"] == [["Bob", "runs"], ["[", "EU"], ["no"]]
        assert found.columns["labels"] == [["B-PER", "O"], ["O", "B-LOC"], ["O"]]
        assert found.columns[name] == [rows[i][0] for i in (0, 2, 4)] and "row 5" in found.where(2)
        assert "5 rows with one word each are gathered into 3 sentences" in capsys.readouterr().err
    whole = [(1, "Bob runs", "B-PER O"), (1, "EU", "B-LOC")]
    assert gathered(whole).columns["words"] == ["Bob runs", "EU"]
    with pytest.raises(DataError, match=r"row 6 .*'sentence_id' holds 1 again, .*row 1 "):
        gathered([*ids, (1, "yes", "O")])
    two = table([{"sentence": k, "sent_id": 1, "word": "a", "tag": "O"} for k in "aab"])
    with pytest.raises(DataError, match="'sentence' and 'sent_id' may both .* differently"):
        TokenClassification.gathered(two, {})
    texts = [(t, k, w) for k, t in enumerate(("a b", "c d", "a b")) for w in t.split()]
    both = table([{"sentence": t, "sent_id": k, "word": w, "tag": "O"} for t, k, w in texts])
    found = TokenClassification.gathered(both, {})
    assert found.columns["word"] == [["a", "b"], ["c", "d"], ["a", "b"]]
    restart = [(1, 0, "a"), ("", 0, "b"), (2, 0, "c"), (2, 1, "d"), (2, 1, "e")]
    for name in ("doc", "Document ID"):
        of = table([{name: d, "sent_id": k, "word": w, "tag": "O"} for d, k, w in restart])
        found = TokenClassification.gathered(of, {})
        assert found.columns["word"] == [["a", "b"], ["c"], ["d", "e"]]
        assert f"by {name!r} and 'sent_id'" in capsys.readouterr().err
    words = table([{"sent_id": k, "word": w} for k, w, _ in ids])
    assert TokenClassification.gathered(words, {}).columns["word"][1] == ["[", "EU"]
    lone = table([{"tokens": w, "label": t} for _, w, t in ids])
    assert any(
        "every row has one word" in line for line in TokenClassification.learn(lone, {}).notes
    )
