"""Evaluation of sentence vectors without training: semantic similarity and retrieval.

The figures are those of MTEB (Muennighoff et al., 2023, arXiv 2210.07316): correlation of the cosine with a score of
people, and nDCG, recall and reciprocal rank of an exact search (BEIR, Thakur et al., 2021, arXiv 2104.08663).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.nn.functional import cosine_similarity

from pretrain import metrics
from pretrain.data.labelled import Role, choose_columns, roles_table
from pretrain.data.labels import finite_numbers, is_on, spelled
from pretrain.data.tables import Table, read_table
from pretrain.data.task_rows import TaskRows
from pretrain.errors import DataError
from pretrain.inference.fill import embed
from pretrain.inference.vectors import search
from pretrain.objectives.tasks import read_texts
from pretrain.utils.files import note

if TYPE_CHECKING:
    from pretrain.models.base import Model

__all__ = ["retrieval", "rows_with_texts", "sts"]

_AT, _DEEP = 10, 100  # ranks at which a search is measured
# Names of prompts of documents, in the order of sentence-transformers.
_OF_DOCUMENTS = ("document", "passage", "corpus")
_DIGITS = 6  # significant decimals of a cosine of fp32 vectors

_PAIR = (
    Role("sentence1", ("sentence1", "sentence_a", "text1", "anchor", "premise"), help="a text"),
    Role("sentence2", ("sentence2", "sentence_b", "text2", "positive", "hypothesis"), help="the text to compare"),
    Role("score", ("score", "similarity", "relatedness_score", "label"), help="how alike they are, a number"),
)  # fmt: skip
_QUERY = (
    Role("id", ("_id", "id", "qid", "query_id"), help="the name of the query"),
    Role("text", ("text", "query", "question"), help="the query"),
)
_DOCUMENT = (
    Role("id", ("_id", "id", "docid", "corpus_id"), help="the name of the document"),
    Role("text", ("text", "document", "passage", "content"), help="the document"),
    Role("title", ("title",), False, "its title, put before the text"),
)
_RELEVANCE = (
    Role("query", ("query-id", "query_id", "qid", "query"), help="the name of a query"),
    Role("document", ("corpus-id", "corpus_id", "docid", "document_id", "document"), help="the name of a document"),
    Role("relevance", ("score", "relevance", "label"), False, "0 or more; by default 1"),
)  # fmt: skip
_FOUND = (
    Role("query", ("query", "question", "anchor", "sentence1"), help="a query"),
    Role("document", ("document", "passage", "answer", "positive", "context", "text"), help="a text that answers it"),
    Role("relevance", ("relevance",), False, "0 or more; by default 1"),
)  # fmt: skip


def rows_with_texts(
    source: Any,
    roles: Sequence[Role],
    columns: Mapping[str, str],
    texts: Sequence[str],
    limit: int = 0,
    name: str = "data",
) -> Table:
    """Read rows with columns named by role, without those that lack a text, whose number is printed.

    ``texts`` are the roles that must hold a text; of more rows than ``limit``, some are taken, spread evenly (0
    takes all).

    Raises:
        DataError: no rows, a missing column, or no row has its texts.
    """
    table = read_table(source, name=name)
    table = roles_table(table, choose_columns(table, roles, columns))
    kept = read_texts(table, texts, TaskRows())
    if not kept:
        raise DataError(f"{table.name}: no row has a text in {' and '.join(texts)}.")
    if empty := len(table) - len(kept):
        note(f"{table.name}: {empty:,} of {len(table):,} rows are left out, which lack a text")
    if limit and limit < len(kept):
        kept = [kept[i * len(kept) // limit] for i in range(limit)]
    return table.take(kept)


def sts(
    model: Model, data: Any, columns: Mapping[str, str], batch_rows: int, limit: int
) -> dict[str, float]:
    """Correlate the cosines of pairs of texts with scores of people.

    Args:
        model: any model with a tokenizer; its vectors are those of ``embed``.
        data: rows with ``sentence1``, ``sentence2`` and ``score``, as for ``read_table``. Rows without one of the texts
            are left out and counted in a printed line; a score that is no finite number is an error.
        columns: role -> column.
        batch_rows: texts in one forward pass.
        limit: maximum number of rows; 0 takes all.

    Returns:
        ``spearman`` and ``pearson`` of cosine and score, and ``targets``, the number of pairs. Cosines are
        rounded to six decimals; ties share their average rank. If all cosines or all scores are equal, both figures
        are nan.
    """
    table = rows_with_texts(data, _PAIR, columns, ("sentence1", "sentence2"), limit)
    wanted = finite_numbers(
        table.columns["score"], table.where, what="scores", cure="Correct or remove these rows."
    )
    pairs = [table.columns[name] for name in ("sentence1", "sentence2")]
    texts = list(dict.fromkeys([*pairs[0], *pairs[1]]))  # each text is embedded once
    place = {text: i for i, text in enumerate(texts)}
    default = None if model.sentences is None else model.sentences.config.get("default_prompt_name")
    _say({"texts": _prompt(model, default)}, model)
    vectors = embed(model, texts, batch_size=batch_rows)
    a, b = (vectors[[place[text] for text in side]].double() for side in pairs)
    # Rounding errors of fp32 vectors must not decide the order of pairs that are equal, such as a text and itself.
    cosines = np.round(cosine_similarity(a, b, dim=-1).numpy(), _DIGITS)
    return {
        "spearman": metrics.spearman(wanted, cosines),
        "pearson": metrics.pearson(wanted, cosines),
        "targets": float(len(table)),
    }


def retrieval(
    model: Model, data: Any, columns: Mapping[str, str], batch_rows: int, limit: int
) -> dict[str, float]:
    """Search the documents that answer queries, and measure the ranks of the relevant ones.

    Args:
        model: any model with a tokenizer; its vectors are those of ``embed``.
        data: a folder or a dict with ``queries``, ``corpus`` and ``relevance`` (in a folder ``queries.jsonl``,
            ``corpus.jsonl`` and ``qrels.tsv`` or ``qrels/test.tsv``, as in BEIR); or rows of pairs, ``query`` and
            ``document``, where the corpus is all documents and those that stand beside a query are its relevant ones,
            as far as ``relevance`` says if it is there, or ``label`` or ``score`` if it holds both 0 and 1 and nothing
            else. Of relevances that are given for the same query and document the highest counts.
        columns: role -> column of pairs.
        batch_rows: texts in one forward pass.
        limit: maximum number of queries, spread evenly; 0 takes all. The corpus is always searched whole.

    Returns:
        The means over the queries that have a relevant document of ``ndcg@10``, ``recall@10``, ``recall@100`` and
        ``mrr@10`` (see `pretrain.metrics.ranking`), ``targets``, the number of these queries, and ``documents``.
        Of a sentence-transformers directory, queries get the prompt ``query`` and documents the first of ``document``,
        ``passage`` and ``corpus``; a line names them. Without such a prompt they get none, not the default one.
        Queries and documents without a text, and queries without a relevant document, are left out and counted in a
        printed line; of documents with equal scores the earlier one comes first.

    Raises:
        DataError: a part or a column is missing, a relevance is no finite number, a name occurs twice, or no query has
            a relevant document.
    """
    queries, documents, relevant = _read(data, columns)
    asked = [query for query in queries if any(value > 0 for value in relevant[query].values())]
    if lost := len(queries) - len(asked):
        note(f"{lost:,} of {len(queries):,} queries are left out, which have no relevant document")
    if not asked:
        raise DataError(
            "No query has a relevant document. Check that the names of queries and documents agree."
        )
    if limit and limit < len(asked):
        asked = [asked[i * len(asked) // limit] for i in range(limit)]
    names, texts = list(documents), list(documents.values())
    of_queries, of_documents = _prompt(model, "query"), _prompt(model, *_OF_DOCUMENTS)
    _say({"queries": of_queries, "documents": of_documents}, model)
    stored: Mapping[Any, Any] = {} if model.sentences is None else model.sentences.prompts
    found = search(
        model,
        [queries[query] for query in asked],
        texts,
        _DEEP,
        prompt=stored.get(of_queries, ""),
        text_prompt=stored.get(of_documents, ""),
        batch_size=batch_rows,
    )
    ranked = [
        metrics.ranking([names[hit.index] for hit in hits], relevant[query], _AT, _DEEP)
        for query, hits in zip(asked, found, strict=True)
    ]
    means = {key: float(np.mean([one[key] for one in ranked])) for key in ranked[0]}
    return means | {"targets": float(len(asked)), "documents": float(len(documents))}


def _prompt(model: Model, *names: str | None) -> str | None:
    """Return the first of these names that the directory of the model has a prompt for, which is not empty."""
    stored = model.sentences
    return next((name for name in names if stored and name and stored.prompts.get(name)), None)


def _say(prompts: Mapping[str, str | None], model: Model) -> None:
    """Print the prompts that are used, and the measure of similarity that the directory asks for and is not used."""
    if used := [f"{what} get the prompt {name!r}" for what, name in prompts.items() if name]:
        note(f"{' and '.join(used)} of the model's directory")
    settings = {} if model.sentences is None else model.sentences.config
    similarity = settings.get("similarity_fn_name")
    if similarity not in (None, "cosine"):
        note(
            f"the model's directory asks for the similarity {similarity!r}; the figures here are those of the cosine"
        )


_Texts = dict[str, str]


def _read(
    data: Any, columns: Mapping[str, str]
) -> tuple[_Texts, _Texts, dict[str, dict[str, float]]]:
    """Return the texts of queries and documents by name, and query -> document -> relevance."""
    parts = _parts(data)
    if parts is None:
        table = read_table(data)
        roles = [*_FOUND[:-1], replace(_FOUND[-1], known=("relevance", *_marks(table)))]
        table = rows_with_texts(table, roles, columns, ("query", "document"))
        pairs = list(zip(table.columns["query"], table.columns["document"], strict=True))
        relevant: dict[str, dict[str, float]] = {query: {} for query, _ in pairs}
        for (query, document), number in zip(pairs, _relevances(table), strict=True):
            _add(relevant[query], document, number)
        if not any(number > 0 for found in relevant.values() for number in found.values()):
            raise DataError(
                f"No query has a relevant document: all relevances of {table.name} are 0 or less. Give 1 or more where "
                "the document answers the query, or rename the column if it says something else."
            )
        return {q: q for q, _ in pairs}, {d: d for _, d in pairs}, relevant
    if columns:
        raise DataError(
            "Columns can be named for pairs of texts only; rename those of queries, corpus and relevance."
        )
    queries = _named(rows_with_texts(parts["queries"], _QUERY, {}, ["text"], name="queries"))
    documents = _named(rows_with_texts(parts["corpus"], _DOCUMENT, {}, ["text"], name="corpus"))
    table = read_table(parts["relevance"], name="relevance")
    table = roles_table(table, choose_columns(table, _RELEVANCE, {}))
    relevant = {query: {} for query in queries}
    rows = zip(table.columns["query"], table.columns["document"], _relevances(table), strict=True)
    unknown = 0
    for query, document, number in rows:
        if (name := spelled(query)) in queries and spelled(document) in documents:
            _add(relevant[name], spelled(document), number)
        else:
            unknown += 1
    if unknown:
        note(f"{unknown:,} of {len(table):,} relevances name a query or document that is not there")
    return queries, documents, relevant


def _add(found: dict[str, float], document: str, relevance: float) -> None:
    found[document] = max(relevance, found.get(document, relevance))


def _marks(table: Table) -> list[str]:
    """Columns whose name alone does not say that they hold relevances, but that mark some of the rows with 1."""
    return [
        name
        for name, cells in table.columns.items()
        if name.strip().casefold() in ("label", "score") and {*map(is_on, cells)} == {False, True}
    ]


def _relevances(table: Table) -> list[float]:
    """Return the relevance of the document of each row to its query; 1 without a column of relevances."""
    values = table.columns.get("relevance", [1.0] * len(table))
    cure = "Correct or remove these rows, or rename the column if it says something else."
    values = [value if (on := is_on(value)) is None else float(on) for value in values]
    return finite_numbers(values, table.where, what="relevances", cure=cure)


def _parts(data: Any) -> dict[str, Any] | None:
    """Return the three tables of a dict or a folder; None for anything else, which holds pairs."""
    needed = ("queries", "corpus", "relevance")
    if isinstance(data, Mapping) and set(needed) <= set(data):
        return {name: data[name] for name in needed}
    if not isinstance(data, str | os.PathLike) or not os.path.isdir(data):
        return None
    folder, found = Path(data), {}
    for name, spellings in (
        ("queries", ("queries.jsonl",)),
        ("corpus", ("corpus.jsonl",)),
        ("relevance", ("qrels.tsv", "qrels/test.tsv")),
    ):
        files = [folder / s for s in spellings if (folder / s).is_file()]
        if not files:
            raise DataError(
                f"{folder} has no {' or '.join(spellings)}; a folder for retrieval has all three parts."
            )
        found[name] = files[0]
    return found


def _named(table: Table) -> _Texts:
    """Return name -> text, with the title before it."""
    titles = table.columns.get("title", [None] * len(table))
    found: _Texts = {}
    rows = zip(table.columns["id"], table.columns["text"], titles, strict=True)
    for i, (name, text, title) in enumerate(rows):
        if spelled(name) in found:
            raise DataError(
                f"{table.where(i)}: the name {spelled(name)!r} occurs twice. Names must differ."
            )
        found[spelled(name)] = f"{title} {text}" if title else text
    return found
