"""Structured columns of tasks: words with their tags, and answers with their positions in a context (SQuAD)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pretrain.data.labels import is_missing, listed, number_in, printed_list, printed_mapping
from pretrain.data.tables import Table, shortened
from pretrain.errors import DataError
from pretrain.utils.files import note

__all__ = ["Answers", "find_answers", "gathered_words", "read_tags", "read_words"]

Given = tuple[str, int | None]
# Names of the column that numbers the sentences of rows with one word each, without case and what is no letter.
_SENTENCE = {"sentence", "sentenceid", "sentenceidx", "sentencenumber", "sentid", "sentidx"}
_DOCUMENT = {"doc", "docid", "document", "documentid"}  # likewise, of what a sentence is from


def read_words(table: Table) -> list[list[str]]:
    """Return the words of each row of the column ``tokens``; printed lists are parsed, other text is split at spaces.

    Raises:
        DataError: a cell is not a list of strings.
    """
    found = []
    for i in range(len(table)):
        words = _listed(table, i, "tokens", "words")
        for word in words:
            if not isinstance(word, str):
                raise DataError(
                    f"{table.where(i)}: the word {word!r} is {type(word).__name__}, not a text. Name the column that "
                    "holds lists of words."
                )
        found.append(words)
    return found


def gathered_words(table: Table, words: str | None, tags: str | None) -> Table:
    """Return a table with one row for each sentence, from one with one word in a row; any other as it is.

    A sentence is a run of rows with one value in the column that numbers them, and in those that name its document; an
    empty cell goes on with that above. ``words`` and ``tags`` are the names of these columns, if there are such.

    Raises:
        DataError: two columns may number the sentences and part them differently, or a number comes back after another
            one, in the same document.
    """
    if words is None or not all(map(_is_word, table.columns[tags or words])):
        return table
    free = [name for name in table.names if name not in (words, tags)]
    letters = {name: "".join(filter(str.isalpha, name.casefold())) for name in free}
    columns = [name for name in free if letters[name] in _SENTENCE]
    documents = [name for name in free if letters[name] in _DOCUMENT]
    if not columns or not all(isinstance(word, str) for word in table.columns[words]):
        return table
    of = [_filled(table.columns[name]) for name in documents]
    keys = {name: list(zip(*of, _filled(table.columns[name]), strict=True)) for name in columns}
    # A sentence's text may come back where its number does not.
    column = max(columns, key=lambda name: len(set(keys[name])))
    numbers = keys[column]
    starts = _starts(numbers)
    if any(_starts(keys[name]) != starts for name in columns):
        raise DataError(
            f"{table.name} has one word in a row, and {' and '.join(map(repr, columns))} may both number its "
            "sentences, but part them differently. Rename or remove all but one."
        )
    if len(starts) == len(table):
        return table
    first: dict[tuple[str, ...], int] = {}
    for i in starts:
        if (before := first.setdefault(numbers[i], i)) != i:
            raise DataError(
                f"{table.where(i)}: the column {column!r} holds {numbers[i][-1]} again, after other sentences "
                f"({table.where(before)}). Put the words of each sentence behind each other, and give every sentence a "
                "number of its own."
            )
    note(
        f"{table.name}: {len(table):,} rows with one word each are gathered into {len(starts):,} sentences by "
        f"{' and '.join(map(repr, [*documents, column]))}"
    )
    ends = [*starts[1:], len(table)]
    lists = {
        name: [table.columns[name][a:b] for a, b in zip(starts, ends, strict=True)]
        for name in (words, tags)
        if name is not None
    }
    firsts = table.take(starts)
    return firsts.with_columns({**firsts.columns, **lists}, table.label_names)


def _filled(cells: Sequence[Any]) -> list[str]:
    """Return the cells of a column as Python prints them, with that above in place of an empty one."""
    found: list[str] = []
    for cell in cells:
        found.append(found[-1] if found and is_missing(cell) else repr(cell))
    return found


def _starts(keys: Sequence[tuple[str, ...]]) -> list[int]:
    """Return where a run of equal keys begins."""
    return [i for i, key in enumerate(keys) if not i or key != keys[i - 1]]


def _is_word(value: Any) -> bool:
    """Whether a cell holds one word or one tag, and no list of them."""
    if not isinstance(value, str):
        return type(value) is int
    return len(value.split()) == 1 and printed_list(value) is None


def read_tags(table: Table, sentences: Sequence[Sequence[str]]) -> list[list[Any]]:
    """Return the tags of each row of the column ``label``, as spelt in the source.

    Raises:
        DataError: a row has more or fewer tags than words; names the first three.
    """
    found, wrong = [], []
    for i, words in enumerate(sentences):
        tags = _listed(table, i, "label", "tags", len(words))
        if len(tags) != len(words):
            wrong.append(f"{table.where(i)}: {len(words)} words, {len(tags)} tags")
        found.append(tags)
    _check_words(table, sentences, found)
    if wrong:
        raise DataError(
            f"{len(wrong)} rows have more or fewer tags than words: {'; '.join(wrong[:3])}{'; ...' * (len(wrong) > 3)}."
            " Correct or remove them; tags belong to words, not to sub-word tokens."
        )
    return found


def _check_words(
    table: Table, sentences: Sequence[Sequence[str]], tags: Sequence[Sequence[Any]]
) -> None:
    """Refuse texts of words that are lists without quotes, or have another mark than blanks between the words.

    Raises:
        DataError: the words or tags of the rows are written so; names the first of them.
    """
    cells = table.columns["tokens"]
    for i, cell in enumerate(cells):
        printed = isinstance(cell, str) and str(table.columns["label"][i]).strip()[:1] in ("[", "{")
        items = printed_list(cell, lone=True) if printed and cell.split() == sentences[i] else None
        if items is not None and sentences[i][0] not in ("[", "{") and len(items) == len(tags[i]):
            raise DataError(
                f"{table.where(i)}: the words {shortened(cell)} stand in brackets, as the tags do, but without quotes. "
                """Write them as JSON, ["the", "cat"], or with blanks between and no brackets."""
            )
    for mark in ("|", ",", ";", "\t", "/"):
        joined = [_joined(mark, words, found) for words, found in zip(sentences, tags, strict=True)]
        if None not in joined and any(joined):
            i = joined.index(True)
            raise DataError(
                f"{table.where(i)}: {mark!r} stands between the words of {shortened(cells[i])} and between their tags. "
                "Put blanks there, or give lists."
            )


def _joined(mark: str, words: Sequence[str], tags: Sequence[Any]) -> bool | None:
    """Whether one word and one tag are as many, with a mark between; None if that is impossible."""
    if len(words) != 1 or len(tags) != 1 or not isinstance(tags[0], str):
        return None
    several, theirs = words[0].split(mark), tags[0].split(mark)
    return len(several) > 1 if len(several) == len(theirs) and all([*several, *theirs]) else None


def _listed(table: Table, i: int, role: str, what: str, words: int | None = None) -> list[Any]:
    value = table.columns[role][i]
    if isinstance(value, str):
        plain = value.split()
        parsed = _parsed(table, i, role, plain)
        # Tags of words that are brackets may be these brackets.
        apart = plain and plain[0] + plain[-1] in ("[]", "()", "{}") and len(plain) == words
        return plain if parsed is None or (apart and len(parsed) != words) else parsed
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{table.where(i)}: the {what} are {type(value).__name__} {shortened(value)}, not a list. Give a list "
            "with one item for each word."
        )
    return list(value)


def _parsed(table: Table, i: int, role: str, plain: Sequence[str]) -> list[Any] | None:
    """Return the words or tags that a cell prints as a list, or None.

    In parentheses stand words of a text too, so that they are a list only beside a printed list of tags.
    """
    text = table.columns[role][i].strip()
    tags = table.columns["label"][i] if "label" in table.columns else None
    if role == "label":
        listed = text.startswith(("[", "{", "array(", "('", '("'))
    else:
        beside = isinstance(tags, str) and printed_list(tags, lone=True) is not None
        listed = re.match(r"""(array\()?[\[(]['"]""" if beside else r"""\[['"]""", text) is not None
    return printed_list(text, lone=role == "label" and len(plain) == 1) if listed else None


@dataclass
class Answers:
    """The answers of all rows of a table.

    Attributes:
        texts: all answers of each row; an empty list if the question is unanswerable.
        spans: first and last character (exclusive) of the first answer that is found in the context, or None.
        bad: rows with answers of which none is found in the context.
        repaired: number of answers that are not at their ``answer_start``, or only match after stripping whitespace,
            but occur exactly once.
        first: number of answers without ``answer_start`` that occur more than once; the first occurrence is used.
    """

    texts: list[list[str]] = field(default_factory=list)
    spans: list[tuple[int, int] | None] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    repaired: int = 0
    first: int = 0

    def check(self, table: Table) -> None:
        """Check that at least one answer of every row with answers is in the context.

        Raises:
            DataError: some rows have none; names the first three of them.
        """
        if self.bad:
            rows = [
                f"{table.where(i)}: {shortened(self.texts[i][0])} in {shortened(table.columns['context'][i])}"
                for i in self.bad[:3]
            ]
            raise DataError(
                f"The answers of {len(self.bad):,} of {len(self.texts):,} rows do not occur in their context, or "
                "occur there several times but not at answer_start: "
                f"{'; '.join(rows)}{'; ...' * (len(self.bad) > 3)}. "
                "Answers must be copied from the context letter by letter, and answer_start counts characters from 0. "
                'Correct the rows, or leave them out with bad_answers="drop".'
            )


def find_answers(table: Table) -> Answers:
    """Read the columns ``answers`` and ``answer_start`` (optional), and locate the answers in ``context``.

    A cell contains SQuAD's ``{"text": [...], "answer_start": [...]}``, a string, a list of strings, a list of
    ``{"text", "answer_start"}``, or a printed form of these that does not stand in the context. An empty cell, or one
    with only empty strings, is an unanswerable question.

    Raises:
        DataError: a cell is of another form; names the row.
    """
    found = Answers()
    for i in range(len(table)):
        given = [(text, start) for text, start in _given(table, i) if text.strip()]
        cell = table.columns["context"][i]
        context = cell if isinstance(cell, str) else ""
        # One answer_start for several answers is that of one of them; otherwise each has its own, and the first counts.
        one = len({start for _, start in given}) == 1
        likely = sorted(given, key=lambda pair: one and not _is_at(context, *pair))
        span = None
        for text, start in likely:
            span = span or _place(context, text, start, found)
        found.texts.append([text for text, _ in given])
        found.spans.append(span)
        if given and span is None:
            found.bad.append(i)
    return found


def _is_at(context: str, text: str, start: int | None) -> bool:
    return start is not None and start >= 0 and context.startswith(text, start)


def _place(context: str, text: str, start: int | None, found: Answers) -> tuple[int, int] | None:
    if start is not None and _is_at(context, text, start):
        return start, start + len(text)
    for form in dict.fromkeys((text, text.strip())):
        times, place = context.count(form), context.find(form)
        if times == 1:
            found.repaired += start is not None or form != text
            return place, place + len(form)
        if times > 1 and start is None:
            found.first += 1
            return place, place + len(form)
    return None


def _given(table: Table, i: int) -> list[Given]:
    value = table.columns["answers"][i]
    starts = table.columns["answer_start"][i] if "answer_start" in table.names else None
    if is_missing(value):
        return []
    if isinstance(value, str) and value not in str(table.columns["context"][i]):
        value = _unprinted(value)
    if isinstance(starts, str):
        starts = printed_list(starts) or starts
    if isinstance(value, Mapping):
        starts = value.get("answer_start", starts)
        value = value.get("text")
        value = [] if value is None else value
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise _strange(table, i, items)
    places = starts if isinstance(starts, list | tuple) else [starts] * len(items)
    if len(places) != len(items):
        raise DataError(
            f"{table.where(i)}: {len(items)} answers and {len(places)} values of answer_start. Give one for each."
        )
    pairs: list[Given] = []
    for item, place in zip(items, places, strict=True):
        if isinstance(item, Mapping):
            place = item.get("answer_start", place)
            item = item.get("text")
        if not isinstance(item, str):
            raise _strange(table, i, item)
        number = None if is_missing(place) else number_in(str(place))
        if not is_missing(place) and (number is None or not number.is_integer()):
            raise DataError(
                f"{table.where(i)}: answer_start is {place!r}. It counts characters of the context from 0."
            )
        pairs.append((item, None if number is None else int(number)))
    return pairs


def _unprinted(text: str) -> Any:
    """Return the mapping or the list that a text prints, as in a CSV file; or the text."""
    if (answers := printed_mapping(text)) is not None:
        return answers
    return [] if text.strip() == "[]" else listed(text)


def _strange(table: Table, i: int, value: Any) -> DataError:
    return DataError(
        f"{table.where(i)}: an answer is {type(value).__name__} {shortened(value)}. Give a text, a list of texts, or "
        '{"text": [...], "answer_start": [...]} as SQuAD does.'
    )
