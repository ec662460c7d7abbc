"""The generated tables of the documentation: complete, from the code, and each on the page where a reader looks."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import settings_table

import pretrain
from pretrain.config import RunConfig, fields
from pretrain.finetuning.settings import TuneConfig
from pretrain.models import FAMILIES, own_family
from pretrain.objectives import TASKS, task_class

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "settings": "configuration",
    "names": "configuration",
    "tune_settings": "finetuning",
    "task_options": "finetuning",
    "model_fields": "models",
    "sizes": "models",
}


def rows(text: str) -> dict[str, dict[str, list[str]]]:
    """Heading -> first cell -> the other cells of every row of the tables."""
    found: dict[str, dict[str, list[str]]] = {}
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| `")]
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        found[part.splitlines()[0]] = {row[0].strip("`"): row[1:] for row in cells}
    return found


def test_every_table_is_included_once_and_written_as_it_is_generated(tmp_path: Path) -> None:
    assert set(settings_table.TABLES) == set(PAGES)
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        included = re.findall(r"^```\{include\} _generated/(\w+)\.md$", text, re.M)
        wanted = [name for name, stem in PAGES.items() if stem == page.stem]
        assert sorted(included) == sorted(wanted), page.name
    settings_table.write(tmp_path)
    for name, table in settings_table.TABLES.items():
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == table(), name


@pytest.mark.slow  # .ci/run builds the documentation
def test_the_build_and_one_command_write_them(tmp_path: Path) -> None:
    script = tmp_path / "docs" / "settings_table.py"
    script.parent.mkdir()
    script.write_text((ROOT / "docs" / "settings_table.py").read_text(encoding="utf-8"))
    subprocess.run([sys.executable, script], env={"PYTHONPATH": str(ROOT / "src")}, check=True)
    made = {path.stem for path in (tmp_path / "docs" / "_generated").glob("*.md")}
    assert made == set(PAGES)
    conf = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    assert 'settings_table.write(HERE / "_generated")' in conf


@pytest.mark.parametrize("kind", [RunConfig, TuneConfig])
def test_every_setting_has_a_row(kind: Any) -> None:
    table = rows(settings_table.settings(kind))
    assert list(table) == list(kind.SECTIONS)
    for name, section in kind.SECTIONS.items():
        known = {f"{name}.{field.name}": field.help for field in fields(section)}
        assert {key: row[-1].replace("\\|", "|") for key, row in table[name].items()} == known
        assert all(known.values())


def test_every_option_of_every_task_has_a_row() -> None:
    table = rows(settings_table.task_options())
    assert list(table) == list(TASKS)
    for name, options in table.items():
        cls = task_class(name)
        parameters = inspect.signature(cls.__init__).parameters
        wanted = {key for key in parameters if key not in ("self", "model", "max_length")}
        own = {key for key in options if key in cls.row_options}
        assert {key.removesuffix(", ...") for key in options} - own == wanted, name
        assert set(cls.row_options) - {"labels"} <= own, name
        if cls.head_kind and not cls.head_kind.endswith(("lm", "answering")):
            assert ("labels" in own) == (name != "regression"), name
        for key, row in options.items():
            assert len(row[-1]) > 10 and "see ``Task``" not in row[-1], (name, key)
            if key in parameters and parameters[key].default not in (None, ""):
                assert row[1] == f"`{parameters[key].default}`", (name, key)


def test_every_field_of_every_family_is_told() -> None:
    table = rows(settings_table.model_fields())
    shared = table.pop("All families")
    assert list(table) == list(FAMILIES)
    for name, own in table.items():
        for spec in dataclasses.fields(own_family(name).config_class):
            row = own.get(spec.name) or shared[spec.name]
            default = "not given" if spec.default is None else f"`{spec.default}`"
            assert row[1] == default and len(row[-1]) > 10, (name, spec.name)


def test_sizes_are_those_of_the_package() -> None:
    table = rows(settings_table.size_tables())
    assert "qwen3" in table and "bert" in table and "vit" not in table
    for name, of_family in table.items():
        for size in pretrain.sizes(name).rows:
            row = of_family[size.name]
            assert row[0] == f"{size.layers} x {size.width}"
            assert row[2] == f"{size.parameters / 1e6:,.1f} M"
            assert row[5] == ("" if size.loss is None else f"{size.loss:.2f}")


def test_a_meaning_that_is_nowhere_is_an_error() -> None:
    class Silent(task_class("classification")):  # type: ignore[misc]
        """Nothing is described here."""

    assert settings_table._meaning(Silent, "threshold", "Args").startswith("Probability")
    with pytest.raises(LookupError, match="do not describe secret"):
        settings_table._meaning(Silent, "secret", "Args")
