"""The suggestion for a name that is not known."""

from __future__ import annotations

import pytest

from pretrain.errors import did_you_mean, nearest


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("trian", ["train", "brain"], "train"),
        ("adm", ["muon", "adamw"], "adamw"),
        ("batch", ["data.cache", "cache", "batch_rows"], "batch_rows"),
        ("cosine_with_restarts", ["constant", "cosine", "linear"], "cosine"),
        ("topic", ["kto", "topic-classification"], "topic-classification"),
        ("foo", ["orpo"], None),
        ("problem", ["parallel.reproducible", "reproducible"], None),
        ("reranking", ["chunking"], None),
        ("l", ["labels"], None),
    ],
)
def test_a_suggestion_is_near(name: str, known: list[str], near: str | None) -> None:
    assert nearest(name, known) == near


def test_without_a_near_name_all_are_listed() -> None:
    assert did_you_mean("foo", ["b", "a"]) == " Known: a, b."
    assert did_you_mean("foo", []) == ""
