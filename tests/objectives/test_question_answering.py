"""Extractive question answering: windows, loss and answers against transformers, figures against SQuAD's rules."""

from __future__ import annotations

import functools
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

from contract import check_objective
from pretrain import metrics
from pretrain.data.columns import find_answers
from pretrain.data.labelled import choose_columns, roles_table
from pretrain.data.tables import Table, read_table
from pretrain.data.tokenizer import Tokenizer, train_from_texts
from pretrain.errors import ConfigError, DataError
from pretrain.models import build
from pretrain.objectives.question_answering import QuestionAnswering, best_spans
from tiny import trainer

PEOPLE = ("Anna", "Bert", "Carla", "Dirk", "Emma")
CITIES = ("Oslo", "Turin", "Zürich", "Paris")
FAMILIES = ("bert", "roberta", "modernbert", "gpt2", "llama", "qwen3")


def rows_of(
    count: int, seed: int = 0, *, sentences: int = 2, unanswerable: bool = False
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        people = list(rng.permutation(PEOPLE)[:sentences])
        cities = list(rng.permutation(CITIES)[:sentences])
        context = " ".join(f"{p} lives in {c}." for p, c in zip(people, cities, strict=True))
        which = int(rng.integers(0, sentences))
        person, city = str(people[which]), str(cities[which])
        answers = {"text": [city], "answer_start": [context.index(city)]}
        if unanswerable and rng.random() < 0.5:
            person = next(p for p in PEOPLE if p not in people)
            answers = {"text": [], "answer_start": []}
        rows.append(
            {"question": f"Where does {person} live?", "context": context, "answers": answers}
        )
    return rows


@functools.cache
def tokenizer(kind: str = "wordpiece") -> Tokenizer:
    texts = [row[key] for row in rows_of(40) for key in ("question", "context")]
    return train_from_texts(texts, kind, vocab_size={"wordpiece": 80, "bpe": 320}.get(kind, 0))


def task(family: str = "bert", kind: str = "", **options: Any) -> QuestionAnswering:
    kind = kind or ("wordpiece" if family in ("bert", "modernbert") else "bpe")
    model = build(
        family,
        None,
        tokenizer=tokenizer(kind),
        head="question-answering",
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        intermediate_size=32,
        max_positions=64,
        **(
            {"num_kv_heads": 2}
            if family in ("llama", "qwen3")
            else {"dropout": 0.0, "attention_dropout": 0.0}
        ),
    )
    return QuestionAnswering(model, **options)


def shaken(goal: QuestionAnswering, seed: int = 1) -> QuestionAnswering:
    """With weights that give answers which differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in goal.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return goal


def table(rows: Any) -> Table:
    return read_table(rows)


def rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(0)] * count


def figures(goal: QuestionAnswering, encoded: Any, batch_rows: int = 3) -> dict[str, float]:
    from pretrain.training.evaluate import evaluate_rows
    from pretrain.training.precision import choose_precision

    precision = choose_precision("fp32", torch.device("cpu"))
    return evaluate_rows(goal, encoded, precision, batch_rows=batch_rows)


# ------------------------------------------------------------------ encoding


def recipe_targets(found: Any, k: int, span: tuple[int, int] | None) -> list[int]:
    """Start and end token of a window by the usual recipe for SQuAD with the encodings of transformers."""
    ids, offsets = found.sequence_ids(k), found["offset_mapping"][k]
    inside = [t for t, s in enumerate(ids) if s == 1]
    first, last = inside[0], inside[-1]
    if span is None or offsets[first][0] > span[0] or offsets[last][1] < span[1]:
        return [0, 0]
    while first < len(offsets) and ids[first] == 1 and offsets[first][0] <= span[0]:
        first += 1
    while offsets[last][1] >= span[1]:
        last -= 1
    return [first - 1, last + 1]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_windows_and_targets_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    from transformers import AutoTokenizer

    goal = task(family, max_length=20 if family == "gpt2" else 32, stride=7)
    goal.model.save(tmp_path)
    rows = rows_of(12, sentences=4, unanswerable=True)
    encoded = goal.encode(table(rows))
    found = AutoTokenizer.from_pretrained(tmp_path)(
        [row["question"] for row in rows], [row["context"] for row in rows],
        truncation="only_second", max_length=goal.max_length, stride=7,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
    )  # fmt: skip
    assert len(encoded) > len(rows) and not encoded.cut
    assert encoded.owners == found["overflow_to_sample_mapping"]
    assert [e["input_ids"].tolist() for e in encoded] == found["input_ids"]
    if family == "bert":
        assert [e["token_type_ids"].tolist() for e in encoded] == found["token_type_ids"]
    kinds = set()
    for k, example in enumerate(encoded):
        answers = rows[encoded.owners[k]]["answers"]
        span = None
        if answers["text"]:
            start = answers["answer_start"][0]
            span = (start, start + len(answers["text"][0]))
        # A token of byte-level BPE begins with its blank, which is not part of the context's words here.
        assert example["labels"].tolist() == recipe_targets(found, k, span)
        kinds.add((span is None, not example["labels"].any()))
    assert kinds == {(True, True), (False, True), (False, False)}


def test_real_windows_are_those_of_transformers(data_sets: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = read_table(data_sets / "xquad_en" / "xquad.en.json")
    source = source.take(range(0, len(source), 6))
    words = Tokenizer.from_directory(data_sets / "tokenizer_vocabs" / "bert-base-uncased")
    model = build(
        "bert", None, tokenizer=words, head="question-answering",
        num_layers=1, hidden_size=8, num_heads=1, intermediate_size=8, max_positions=192,
    )  # fmt: skip
    goal = QuestionAnswering(model)
    assert goal.stride == 48
    encoded = goal.encode(source)
    words.save(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)(
        source.columns["question"], source.columns["context"], truncation="only_second", max_length=192,
        stride=48, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert [e["input_ids"].tolist() for e in encoded] == found["input_ids"]
    assert len(encoded) > len(source) and not encoded.dropped
    answered = set()
    for k, (example, owner) in enumerate(zip(encoded, encoded.owners, strict=True)):
        answers = source.columns["answers"][owner]
        start = answers["answer_start"][0]
        assert example["labels"].tolist() == recipe_targets(
            found, k, (start, start + len(answers["text"][0]))
        )
        first, last = example["labels"]
        if first:
            answered.add(owner)
            context, starts, ends = encoded.info[k]
            said = context[starts[first] : ends[last]]
            assert answers["text"][0] in said  # an answer may end inside a word
    assert len(answered) == len(source)


def test_offsets_leave_blanks_out_and_show_marks_the_answer() -> None:
    goal = task("gpt2")
    rows = rows_of(3)
    encoded = goal.encode(table(rows))
    for example, (context, starts, ends), row in zip(encoded, encoded.info, rows, strict=True):
        pieces = [context[a:b] for a, b in zip(starts, ends, strict=True) if b > a]
        assert all(piece == piece.strip() for piece in pieces)
        assert "".join(pieces).startswith(context.replace(" ", "")[:4])
        marked = "".join(text for text, mark in goal.show(example) if mark)
        assert marked.strip() == row["answers"]["text"][0]


@pytest.mark.parametrize("rule", [None, "NFC", "NFD", "NFKC", "Bert"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_offsets_count_the_characters_of_the_text_whatever_a_tokenizer_normalizes(
    rule: str | None, form: str
) -> None:
    """Composed and decomposed accents, half-width kana, ligatures, characters of two code units."""
    rows = []
    for answer in ("café", "Zürich", "ｶﾞ東京", "oﬃce", "né😀"):
        context = unicodedata.normalize(form, f"À Malmö 😀 est {answer} où l'été ﬁnit.")
        text = unicodedata.normalize(form, answer)
        answers = {"text": [text], "answer_start": [context.index(text)]}
        rows.append({"question": "Où?", "context": context, "answers": answers})
    kind = "wordpiece" if rule == "Bert" else "bpe"
    texts = [row["context"] for row in rows] * 3
    made = train_from_texts(texts, kind, vocab_size=400, lowercase=rule == "Bert")
    if rule not in (None, "Bert"):
        made.backend.normalizer = getattr(normalizers, rule)()
        made = Tokenizer(made.backend, made.roles)
    goal = task("bert", kind)
    goal.model.tokenizer = made
    encoded = goal.encode(table(rows))
    assert not encoded.dropped and len(encoded) == len(rows)
    for example, (context, starts, ends), row in zip(encoded, encoded.info, rows, strict=True):
        assert context == row["context"]
        first, last = example["labels"].reshape(-1).tolist()
        found = context[starts[first] : ends[last]]
        # A token of bytes may hold a part of a neighbouring character, and then reaches to its end.
        answer = row["answers"]["text"][0]
        assert answer in found and len(found) <= len(answer) + 2, (found, answer)


@pytest.mark.parametrize("around", ["{}", "{} cat", "cat {}", "cat {} cat"])
@pytest.mark.parametrize(
    ("given", "seen"),
    [("में", "में"), ("cafe\u0301", "cafe\u0301"), ("ക\u0d4d\u200d", "ക\u0d4d\u200d"), ("دُ", "دُ"), ("❤\ufe0f", "❤\ufe0f"),
     (" cat\n", "cat"), ("\ufeffcat", "cat"), ("cat\u200b", "cat"), ("\x00", None)],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["Bert", "NFC"])
def test_characters_that_belong_to_no_token_spoil_no_answer(
    rule: str, given: str, seen: str | None, around: str
) -> None:
    """Marks stay with the character that they are written on; blanks and invisible characters are left out."""
    goal = task("bert", "wordpiece" if rule == "Bert" else "char")
    assert goal.model.tokenizer is not None
    made = train_from_texts(
        ["cat cafe में ക د é"], goal.model.tokenizer.kind, vocab_size=90, lowercase=True
    )
    if rule == "NFC":
        made.backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex("[\ufeff\u200b\x00]"), "")]
        )
    goal.encoder.tokenizer = Tokenizer(made.backend, made.roles)
    context = around.format(given)
    answers = {"text": [given], "answer_start": [around.index("{")]}
    encoded = goal.encode(table([{"question": "q", "context": context, "answers": answers}]))
    assert not encoded.cut
    if seen is None:
        assert encoded.dropped == {"answer of characters that the tokenizer drops": [0]}
        return
    first, last = encoded[0]["labels"]
    assert context[encoded[0]["starts"][first] : encoded[0]["ends"][last]] == seen


def test_long_questions_are_cut_and_told() -> None:
    goal = task(max_length=32)
    row = rows_of(1)[0]
    long = row | {"question": "Where does Anna live and " * 12}
    encoded = goal.encode(table([row, long]))
    assert encoded.cut == [1] and encoded.longest <= 32
    assert set(encoded.owners) == {0, 1}
    for family in ("gpt2", "roberta"):
        other = task(family, max_length=12, stride=3)
        assert other.encode(table([long])).longest <= 12


@settings(max_examples=25, deadline=None)
@given(st.integers(12, 40), st.integers(0, 9), st.integers(0, 60), st.integers(0, 80))
def test_any_lengths_fit(max_length: int, stride: int, asked: int, told: int) -> None:
    goal = narrow()
    goal.max_length, goal.stride = max_length, stride
    goal.question_room = min(max_length // 2, max_length - 3 - stride - 1)
    if goal.question_room < 1:
        return
    goal.__dict__.pop("encoder", None)
    rows = [
        {"question": "Anna " * asked + "x", "context": "y " + "Oslo. " * told, "answers": ["y"]}
    ]
    encoded = goal.encode(table(rows))
    assert encoded.longest <= max_length
    seen = {
        a for _, starts, ends in encoded.info for a, b in zip(starts, ends, strict=True) if b > a
    }
    context = rows[0]["context"]
    assert max(seen) >= len(context.rstrip()) - 2 and 0 in seen


@functools.cache
def narrow() -> QuestionAnswering:
    return task()


# ------------------------------------------------------------------ answers in the rows


def test_answers_come_in_several_shapes() -> None:
    context = "Anna lives in Oslo. Bert lives in Turin."
    cells: list[Any] = [
        {"text": ["Turin"], "answer_start": [34]}, "Turin", ["Turin", "Oslo"], {"text": "Turin", "answer_start": 34},
        [{"text": "Turin", "answer_start": 34}], {"text": [], "answer_start": []}, None, "", [""],
    ]  # fmt: skip
    found = find_answers(Table("x", {"context": [context] * 9, "answers": cells}))
    assert found.spans == [(34, 39)] * 5 + [None] * 4
    assert found.texts == [["Turin"]] * 2 + [["Turin", "Oslo"]] + [["Turin"]] * 2 + [[]] * 4
    assert not found.bad and not found.repaired
    flat = Table(
        "x", {"context": [context] * 2, "answers": ["lives", "lives"], "answer_start": [25, "5"]}
    )
    assert find_answers(flat).spans == [(25, 30), (5, 10)]
    starts: list[Any] = ["25.0", " 25", 25.0, "", " ", math.nan, None]
    columns = {"context": [context] * 7, "answers": ["lives"] * 7, "answer_start": starts}
    found = find_answers(Table("x", columns))
    assert found.spans == [(25, 30)] * 3 + [(5, 10)] * 4 and found.first == 4
    for wrong in ("2.5", 0.5, "x", True, "1_0"):
        one = Table("x", {"context": [context], "answers": ["lives"], "answer_start": [wrong]})
        with pytest.raises(DataError, match="answer_start is .*counts characters"):
            find_answers(one)


def test_one_start_beside_several_answers_is_that_of_one_of_them() -> None:
    context = "Anna lives in Oslo. Bert lives in Turin."
    rows = {"context": [context], "answers": [["Oslo", "lives"]], "answer_start": [25]}
    found = find_answers(Table("x", rows))
    assert found.spans == [(25, 30)] and not found.repaired
    assert found.texts == [["Oslo", "lives"]]
    rows["answer_start"] = [[13, 25]]  # the first has one of its own, which is wrong by a letter
    found = find_answers(Table("x", rows))
    assert found.spans == [(14, 18)] and found.repaired == 1


def test_columns_that_the_datasets_library_flattened() -> None:
    rows = [
        {"question": "who", "context": "a b a", "answers.text": ["a"], "answers.answer_start": [4]}
    ]
    chosen = choose_columns(read_table(rows), QuestionAnswering.roles, {}, quiet=True)
    assert find_answers(roles_table(read_table(rows), chosen)).spans == [(4, 5)]


def test_answers_are_read_as_a_text_file_prints_them() -> None:
    context = 'Anna lives in Oslo. It\'s ["there"] that Bert lives.'
    first, last = context.index("lives"), context.rindex("lives")
    one: list[Any] = [
        {"text": ["lives"], "answer_start": [last]}, [{"text": "lives", "answer_start": last}],
        {"text": np.array(["lives"], dtype=object), "answer_start": np.array([last], dtype=np.int32)},
        {"text": [np.str_("lives")], "answer_start": [np.int64(last)]},
    ]  # fmt: skip
    cells = [*map(repr, one), *map(json.dumps, one[:2])]
    found = find_answers(Table("x", {"context": [context] * len(cells), "answers": cells}))
    assert found.texts == [["lives"]] * len(cells) and set(found.spans) == {(last, last + 5)}
    others = {
        "['Oslo', 'Anna']": ["Oslo", "Anna"], "['Oslo' 'Anna']": ["Oslo", "Anna"], '["It\'s"]': ["It's"],
        str(["It's"]): ["It's"], str({"text": ["It's"]}): ["It's"],
        str({"text": [], "answer_start": []}): [], "[]": [],
        '["there"]': ['["there"]'], "[Oslo, Anna]": ["[Oslo, Anna]"], "{Oslo": ["{Oslo"], "{'Oslo'}": ["{'Oslo'}"],
    }  # fmt: skip
    table = Table("x", {"context": [context] * len(others), "answers": list(others)})
    assert find_answers(table).texts == list(others.values())
    flat = {
        "context": [context] * 3,
        "answers": ["['lives']"] * 3,
        "answer_start": ["[45]", "[ 5]", "45"],
    }
    spans = find_answers(Table("x", flat)).spans
    assert spans == [(place, place + 5) for place in (last, first, last)]


def test_misplaced_answers_are_repaired_where_they_occur_once() -> None:
    rows = rows_of(4)
    rows[1]["answers"]["answer_start"][0] += 1
    rows[2]["answers"]["text"][0] += " "
    learned = QuestionAnswering.learn(table(rows), {})
    assert learned.notes and learned.notes[0].startswith(
        "2 answers were not where answer_start says"
    )
    assert learned.options == {"allow_no_answer": False} and learned.strata is None
    fixed = rows_of(4)
    assert [e["labels"].tolist() for e in task().encode(table(rows))] == [
        e["labels"].tolist() for e in task().encode(table(fixed))
    ]
    plain = [row | {"answers": "lives"} for row in rows_of(2)]
    assert "several times" in QuestionAnswering.learn(table(plain), {}).notes[0]


def test_answers_that_are_not_in_the_context_are_named_or_dropped() -> None:
    rows = rows_of(6)
    for i in (1, 2, 3, 5):
        rows[i]["answers"] = {"text": ["Rome"], "answer_start": [3]}
    rows[4]["answers"] = {"text": ["lives"], "answer_start": [0]}  # twice, and not there
    for call in (
        lambda: QuestionAnswering.learn(table(rows), {}),
        lambda: task().encode(table(rows)),
    ):
        with pytest.raises(
            DataError,
            match=r"5 of 6 rows .*row 2 .*'Rome'.*row 3 .*row 4 .*; \.\.\..*bad_answers=.drop",
        ):
            call()
    encoded = task(bad_answers="drop").encode(table(rows))
    assert encoded.owners == [0] and encoded.dropped == {
        "answer not in its context": [1, 2, 3, 4, 5]
    }
    learned = QuestionAnswering.learn(table(rows), {"bad_answers": "drop"})
    assert "5 of 6 rows are dropped" in learned.notes[-1]


def test_unanswerable_rows_are_learned_and_point_at_the_first_token() -> None:
    rows = rows_of(10, unanswerable=True)
    learned = QuestionAnswering.learn(table(rows), {})
    assert learned.options == {"allow_no_answer": True}
    assert learned.strata == [bool(row["answers"]["text"]) for row in rows]
    for row, example in zip(rows, task().encode(table(rows)), strict=True):
        assert bool(example["labels"].any()) == bool(row["answers"]["text"])
    with pytest.raises(DataError, match="No row .* has an answer"):
        QuestionAnswering.learn(table([row | {"answers": []} for row in rows]), {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": 3}, "row 2 .*the question is int"),
        ({"context": ["a"]}, "row 2 .*the context is list"),
        ({"answers": 7}, "row 2 .*an answer is int"),
        ({"answers": [7]}, "row 2 .*an answer is int"),
        ({"answers": {"text": ["Oslo"], "answer_start": [1, 2]}}, "1 answers and 2 values"),
        ({"answers": {"text": ["Oslo"], "answer_start": ["x"]}}, "answer_start is 'x'"),
    ],
)
def test_bad_rows_are_named(change: dict[str, Any], said: str) -> None:
    good, bad = rows_of(2)
    with pytest.raises(DataError, match=said):
        task().encode(table([good, bad | change]))


def test_empty_texts_are_dropped_and_options_checked() -> None:
    good, bad = rows_of(2)
    rows = [bad | {"context": " ", "answers": []}, good, bad | {"question": None}]
    encoded = task().encode(table(rows))
    assert encoded.dropped == {"empty text": [0, 2]} and encoded.owners == [1]
    assert next(iter(task().predict(table(rows)))) == {}
    for options in ({"stride": 60}, {"stride": -1}, {"n_best": 0}, {"max_answer_tokens": 0},
                    {"bad_answers": "keep"}, {"null_threshold": math.nan}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(options))):
            task(**options)


# ------------------------------------------------------------------ loss


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family: str) -> None:
    goal = shaken(task(family)).eval()
    examples = list(goal.encode(table(rows_of(9, unanswerable=True))))
    packed = goal.collate(examples, rngs(9), evaluation=True)
    assert packed["document_ids"].max() > 1
    together, said = goal(packed), goal.outputs(packed)
    goal.pack, total = False, 0.0
    for i, example in enumerate(examples):
        alone = goal.collate([example], rngs(1), evaluation=True)
        total += float(goal(alone).total.detach())
        [(found, null)] = goal.outputs(alone)
        count = min(len(found), len(said[i][0]))
        np.testing.assert_allclose(found[:count, 0], said[i][0][:count, 0], atol=1e-4)
        near = np.abs(said[i][0][:count, 0] - found[0, 0]) < 1e-4  # equal scores may change places
        assert any(np.array_equal(found[0, 1:], p) for p in said[i][0][:count][near][:, 1:])
        assert abs(null - said[i][1]) < 1e-4
    assert abs(total - float(together.total.detach())) < 1e-3
    assert int(together.count) == 9


def test_loss_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    for family in ("bert", "gpt2"):
        goal = shaken(task(family)).eval()
        goal.model.save(tmp_path / family)
        other = AutoModelForQuestionAnswering.from_pretrained(tmp_path / family).eval()
        examples = list(goal.encode(table(rows_of(6, unanswerable=True))))
        total = 0.0
        for example in examples:
            keys = {
                k: torch.from_numpy(example[k])[None]
                for k in ("input_ids", "token_type_ids")
                if k in example
            }
            start, end = torch.from_numpy(example["labels"])[:, None]
            with torch.no_grad():
                total += float(other(**keys, start_positions=start, end_positions=end).loss)
        ours = goal(goal.collate(examples, rngs(6)))
        assert abs(float(ours.total.detach()) - total) < 1e-4 * len(examples)


# ------------------------------------------------------------------ answers


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12), st.integers(1, 7))
def test_best_spans_are_all_compared(seed: int, size: int, longest: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(size=(2, size, 2)))
    allowed = torch.from_numpy(rng.random((2, size)) < 0.7)
    values, first, last = best_spans(scores, allowed, longest, count)
    for n in range(2):
        places = [
            (float(scores[n, a, 0] + scores[n, b, 1]), a, b)
            for a in range(size) for b in range(a, min(size, a + longest)) if allowed[n, a] and allowed[n, b]
        ]  # fmt: skip
        wanted = sorted(places, reverse=True)[:count]
        real = values[n] > -math.inf
        found = list(
            zip(
                values[n][real].tolist(),
                first[n][real].tolist(),
                last[n][real].tolist(),
                strict=True,
            )
        )
        assert found == wanted[: len(found)] and len(found) == len(wanted)


def reference_answer(
    goal: QuestionAnswering, other: Any, encode: Any, row: dict[str, Any]
) -> tuple[str, float]:
    """The usual post-processing for SQuAD 2 on the outputs of transformers, over all windows of a row."""
    found = encode(
        row["question"], row["context"], truncation="only_second", max_length=goal.max_length, stride=goal.stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_token_type_ids=True,
    )  # fmt: skip
    candidates, null = [], math.inf
    for k, ids in enumerate(found["input_ids"]):
        keys = {"input_ids": torch.tensor([ids])}
        if getattr(other.config, "type_vocab_size", 1) > 1:
            keys["token_type_ids"] = torch.tensor([found["token_type_ids"][k]])
        with torch.no_grad():
            out = other(**keys)
        start, end = out.start_logits[0].numpy(), out.end_logits[0].numpy()
        null = min(null, float(start[0] + end[0]))
        inside = [t for t, s in enumerate(found.sequence_ids(k)) if s == 1]
        for a in inside:
            for b in inside:
                if a <= b < a + goal.max_answer_tokens:
                    left, right = found["offset_mapping"][k][a][0], found["offset_mapping"][k][b][1]
                    candidates.append(
                        (float(start[a] + end[b]), row["context"][left:right].strip())
                    )
    best = max(candidates)
    if goal.allow_no_answer and null - best[0] > goal.null_threshold:
        return "", null
    return best[1], best[0]


@pytest.mark.parametrize(("family", "max_length"), [("bert", 64), ("bert", 32), ("gpt2", 64)])
def test_answers_are_those_of_transformers(tmp_path: Path, family: str, max_length: int) -> None:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    rows = rows_of(8, seed=4, sentences=4)
    for seed, allow in ((1, False), (2, True)):
        goal = shaken(
            task(family, max_length=max_length, allow_no_answer=allow, max_answer_tokens=6), seed
        )
        folder = tmp_path / str(seed)
        goal.model.save(folder)
        other = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
        encode = AutoTokenizer.from_pretrained(folder)
        for row, answer in zip(rows, goal.predict(table(rows)), strict=True):
            assert answer["answer"] == reference_answer(goal, other, encode, row)[0]
            assert 0 <= answer["score"] <= 1 and 0 <= answer["no_answer_score"] <= 1
            if answer["start"] is not None:
                assert row["context"][answer["start"] : answer["end"]] == answer["answer"]


def test_no_answer_needs_leave_and_a_margin() -> None:
    said = (np.array([[2.0, 0, 4], [1.0, 5, 9]]), 3.0)
    info = [("Oslo Turin", None, None)]
    assert task().decode([said], info)["answer"] == "Oslo"
    none = task(allow_no_answer=True).decode([said], info)
    assert (none["answer"], none["start"], none["end"]) == ("", None, None)
    assert (
        none["score"]
        == none["no_answer_score"]
        == pytest.approx(1 / (1 + math.exp(-1) + math.exp(-2)))
    )
    assert task(allow_no_answer=True, null_threshold=1.5).decode([said], info)["answer"] == "Oslo"
    # All windows must say so, and a stretch that two windows share competes once.
    twice = task(allow_no_answer=True).decode([said, (said[0], 1.0)], info * 2)
    assert twice["answer"] == "Oslo"
    assert twice["score"] == pytest.approx(1 / (1 + 2 * math.exp(-1)))


@pytest.mark.parametrize("max_length", [64, 32])
def test_figures_are_squads_over_the_predictions(max_length: int) -> None:
    goal = shaken(task(max_length=max_length, allow_no_answer=True, null_threshold=-0.7), 1)
    rows = rows_of(20, sentences=4, unanswerable=True)
    for row in rows[::3]:
        if row["answers"]["text"]:
            row["answers"]["text"].append("in " + row["answers"]["text"][0])
            row["answers"]["answer_start"].append(row["answers"]["answer_start"][0] - 3)
    encoded = goal.encode(table(rows))
    found = figures(goal, encoded)
    said = [answer["answer"] for answer in goal.predict(table(rows))]
    gold = [row["answers"]["text"] for row in rows]
    assert "" in said and any(said)
    exact = np.mean([metrics.exact_match(a, b) for a, b in zip(said, gold, strict=True)])
    f1 = np.mean([metrics.token_f1(a, b) for a, b in zip(said, gold, strict=True)])
    assert 0 < f1 < 1 and abs(found["exact_match"] - exact) < 1e-9 and abs(found["f1"] - f1) < 1e-9
    assert found["targets"] == len(encoded)


# ------------------------------------------------------------------ learning


@pytest.mark.slow
def test_learns(tmp_path: Path) -> None:
    goal = task()
    held_out = goal.encode(table(rows_of(40, seed=9)))
    trainer(
        tmp_path, goal, goal.encode(table(rows_of(800, seed=1))), limit="500 steps", batch_rows=16,
        eval_rows=held_out, optim={"lr": 1e-2},
    ).fit()  # fmt: skip
    # Half of the contexts' two cities would be right by chance.
    assert figures(goal, held_out)["exact_match"] > 0.75


def test_contract(tmp_path: Path) -> None:
    groups: dict[int, list[Any]] = {}
    for example in task().encode(table(rows_of(60))):
        groups.setdefault(len(example["input_ids"]), []).append(example)
    alike = max(groups.values(), key=len)  # of one length: rows can then be compared
    check_objective(lambda: Placeless(task().model, pack=False), (alike * 16)[:16], tmp_path)


class Placeless(QuestionAnswering):
    """Without the places of windows in the flattened batch, which say where a row is and so differ by row."""

    def collate(self, examples: Any, rngs: Any, *, evaluation: bool = False) -> Any:
        batch = super().collate(examples, rngs, evaluation=evaluation)
        if len(examples) == 1:
            del batch["window_index"]
        return batch


def test_the_most_frequent_answer_is_the_trivial_one() -> None:
    """Where most questions have no answer, saying nothing scores their share."""
    rows = [
        {"question": "q", "context": "the red cat", "answers": {"text": [], "answer_start": []}}
    ]
    one = {
        "question": "q",
        "context": "the red cat",
        "answers": {"text": ["red cat"], "answer_start": [4]},
    }
    table = read_table([*rows * 3, one])
    task = QuestionAnswering.trivial
    assert task(None, table, table) == {"exact_match": 0.75, "f1": 0.75}  # type: ignore[arg-type]
    answered = read_table([one, one, {**one, "answers": {"text": ["cat"], "answer_start": [8]}}])
    found = task(None, answered, answered)  # type: ignore[arg-type]
    assert found["exact_match"] == pytest.approx(2 / 3) and found["f1"] == pytest.approx(8 / 9)
