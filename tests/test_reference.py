"""The reference of the documentation: every public name once, as a user types it."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import pretrain
import pretrain.errors

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted((DOCS / "reference").glob("*.md"))
NAMED = re.compile(r"^\.\. (?:auto\w+|py:function):: pretrain\.([\w.]+)", re.M)


def documented() -> Counter[str]:
    texts = [path.read_text(encoding="utf-8") for path in (DOCS / "reference.md", *PAGES)]
    return Counter(name for text in texts for name in NAMED.findall(text))


def resolved(name: str) -> Any:
    *path, last = name.split(".")
    return getattr(importlib.import_module(".".join(["pretrain", *path])), last)


def test_every_public_name_is_there_once() -> None:
    names = documented()
    assert {name: names[name] for name in pretrain.__all__} == dict.fromkeys(pretrain.__all__, 1)
    assert [name for name, count in names.items() if count > 1] == []


def test_no_public_name_stands_under_another_path() -> None:
    public = {id(getattr(pretrain, name)) for name in pretrain.__all__}
    for name in documented():
        assert "." not in name or id(resolved(name)) not in public, name


def test_what_is_returned_is_there_too() -> None:
    shown = {name.rpartition(".")[2] for name in documented()}
    assert {
        "LrRange",
        "Plot",
        "Confusion",
        "Finetuned",
        "Run",
        "Sizes",
        "Task",
        "Backbone",
    } <= shown
    errors = {
        name
        for name in pretrain.errors.__all__
        if isinstance(kind := getattr(pretrain.errors, name), type)
        and issubclass(kind, pretrain.PretrainError | pretrain.errors.Interrupted)
    }
    assert errors <= shown


def test_every_page_is_in_the_contents() -> None:
    listed = re.findall(r"^reference/(\w+)$", (DOCS / "reference.md").read_text(), re.M)
    assert sorted(listed) == [path.stem for path in PAGES]


@pytest.mark.parametrize("name", sorted(path.stem for path in DOCS.glob("*.py")))
def test_what_a_script_of_the_documentation_imports_is_there(name: str) -> None:
    if name != "conf":  # settings of Sphinx
        importlib.import_module(name)
