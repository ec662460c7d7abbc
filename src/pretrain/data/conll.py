"""Files with one word per line: CoNLL columns (Tjong Kim Sang and De Meulder 2003) and CoNLL-U (Nivre et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pretrain.config.spelling import option
from pretrain.data.readers import decode_line, lines
from pretrain.errors import DataError

__all__ = ["Sentence", "conll_sentences", "conllu_sentences"]

Sentence = tuple[int, list[str], list[str]]  # first line, words, tags

_CONLLU_COLUMNS = 10


def conll_sentences(path: Path, encoding: str | None = None) -> Iterator[Sentence]:
    """Yield the sentences of a file with one word and its tag on each line, a blank line between sentences.

    Columns are separated by tabs if the first line has a tab, and by whitespace otherwise. The first is the word and
    the last its tag; columns in between (part of speech, chunk) are ignored. ``-DOCSTART-`` lines, which begin a
    document, are skipped.

    Raises:
        DataError: a line has another number of columns than the first one, or an empty word or tag; names the line.
    """
    width, tabs = 0, True
    for start, rows in _blocks(path, encoding):
        words: list[str] = []
        tags: list[str] = []
        for number, line in rows:
            if not width:
                tabs = "\t" in line
            cells = line.split("\t") if tabs else line.split()
            if cells[:1] == ["-DOCSTART-"]:
                continue
            if len(cells) < 2:
                raise DataError(
                    f"{path}:{number} holds {line[:60]!r}, which has no tag. Each line is a word, a tab and its tag; a "
                    "blank line ends the sentence."
                )
            width = width or len(cells)
            if len(cells) != width:
                raise DataError(
                    f"{path}:{number} has {len(cells)} columns, but the lines before it have {width}: {line[:60]!r}. "
                    "Write the word first and its tag last, with a tab between."
                )
            if not cells[0].strip() or not cells[-1].strip():
                raise DataError(
                    f"{path}:{number} has an empty {'tag' if cells[0].strip() else 'word'}: {line[:60]!r}. Correct "
                    "this line, or leave it blank to end the sentence."
                )
            words.append(cells[0])
            tags.append(cells[-1].strip())
        if words:
            yield start, words, tags


def conllu_sentences(path: Path, encoding: str | None = None) -> Iterator[Sentence]:
    """Yield the sentences of a CoNLL-U file: word forms and universal part-of-speech tags (column UPOS).

    Comment lines, multiword tokens (``1-2``) and empty nodes (``8.1``) are skipped.

    Raises:
        DataError: a line does not have ten columns; names the line.
    """
    for start, rows in _blocks(path, encoding):
        words: list[str] = []
        tags: list[str] = []
        for number, line in rows:
            if line.startswith("#") and not words:
                continue
            cells = line.split("\t")
            if len(cells) != _CONLLU_COLUMNS:
                raise DataError(
                    f"{path}:{number} has {len(cells)} columns, but CoNLL-U has {_CONLLU_COLUMNS}, with tabs between: "
                    f"{line[:60]!r}. Files of two columns are read with {option('format', 'conll')}."
                )
            if "-" in cells[0] or "." in cells[0]:
                continue
            words.append(cells[1])
            tags.append(cells[3])
        if words:
            yield start, words, tags


def _blocks(path: Path, encoding: str | None) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield (first line, lines with their numbers) of each block between blank lines."""
    rows: list[tuple[int, str]] = []
    for number, raw in lines(path, encoding):
        line = decode_line(path, number, raw, encoding).removesuffix("\n").removesuffix("\r")
        if line.strip(" \t"):
            rows.append((number, line))
        elif rows:
            yield rows[0][0], rows
            rows = []
    if rows:
        yield rows[0][0], rows
