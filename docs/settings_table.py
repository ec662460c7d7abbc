"""Make the tables of settings, task options, model fields and sizes from the code: pages cannot drift from it.

    python docs/settings_table.py    # writes docs/_generated, as every build of the documentation does

Meanings are the docstrings of the settings, and the sections Args and Attributes of those of tasks and configurations.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig, fields
from pretrain.config.aliases import NAMES, VALUES, Advice
from pretrain.finetuning.settings import TuneConfig
from pretrain.models import FAMILIES, own_family
from pretrain.models.config import BackboneConfig
from pretrain.objectives import TASKS, task_class
from pretrain.training.sizes import sizes

_HEAD = ("| {} | type | default | meaning |", "|---|---|---|---|")


def settings(kind: Any) -> str:
    """All sections of ``RunConfig`` or ``TuneConfig`` as Markdown."""
    parts = []
    for name, section in kind.SECTIONS.items():
        parts += [f"### {name}", "", (section.__doc__ or "").strip(), "", *_head("key")]
        kinds = {spec.name: spec.type for spec in dataclasses.fields(section)}
        for field in fields(section):
            parts.append(_row(f"{name}.{field.name}", kinds[field.name], field.default, field.help))
        parts.append("")
    return "\n".join(parts)


def task_options() -> str:
    """The options of every task as Markdown: the arguments of its class, and what it reads from rows only."""
    parts = []
    for name in TASKS:
        cls = task_class(name)
        parts += [f"### {name}", "", (cls.__doc__ or "").splitlines()[0], "", *_head("option")]
        for key, parameter in inspect.signature(cls.__init__).parameters.items():
            if key not in ("self", "model", "max_length"):  # max_length is data.max_length
                shown = f"{key}, ..." if parameter.kind is parameter.VAR_KEYWORD else key
                meaning = _meaning(cls, key, "Args")
                parts.append(_row(shown, parameter.annotation, parameter.default, meaning))
        read = {key: text for of in reversed(cls.__mro__) for key, text in _row_options(of).items()}
        for key, text in read.items():
            parts.append(_row(key, _type(cls.row_options[key]), None, text))
        parts.append("")
    return "\n".join(parts)


def model_fields() -> str:
    """The fields of the configurations as Markdown: of all families, then what each family adds or sets otherwise."""
    shared = {spec.name: spec for spec in dataclasses.fields(BackboneConfig)}
    parts = ["### All families", "", *_head("field")]
    parts += [_field(BackboneConfig, spec) for spec in shared.values()]
    for name in FAMILIES:
        cls = own_family(name).config_class
        own = [
            spec
            for spec in dataclasses.fields(cls)
            if spec.name not in shared or spec.default != shared[spec.name].default
        ]
        parts += ["", f"### {name}", "", *_head("field"), *(_field(cls, spec) for spec in own)]
    return "\n".join([*parts, ""])


@functools.cache
def size_tables() -> str:
    """The sizes of the families of texts as Markdown: what they cost and, where it was measured, what they reach."""
    parts: list[str] = []
    for name in FAMILIES:
        if own_family(name).processor_class is not None:
            continue
        table = sizes(name)
        if not parts:
            parts = [f"{table.assumed[0].upper()}{table.assumed[1:]} {table.measured}", ""]
        head = ("size", "layers x width", "heads", "parameters", "memory", "s / M tokens", "loss")
        parts += [f"### {name}", "", f"| {' | '.join(head)} |", "|---" + "|---:" * 6 + "|"]
        for row in table.rows:
            cells = [
                f"`{row.name}`",
                f"{row.layers} x {row.width}",
                str(row.heads),
                f"{row.parameters / 1e6:,.1f} M",
                f"{row.memory / 2**30:,.1f} GiB",
                "" if row.seconds is None else f"{row.seconds:,.0f}",
                "" if row.loss is None else f"{row.loss:.2f}",
            ]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def names() -> str:
    """Names that other libraries use, as Markdown: accepted ones, answered ones, and those of values."""
    parts = ["| name | setting | value |", "|---|---|---|"]
    for entry in NAMES:
        if not entry.advice:
            parts.append(f"| {_listed(entry.names)} | `{entry.setting}` | {entry.means} |")
    parts += ["", "These mean something else, and are answered with the setting that does it:", ""]
    parts += ["| name | answer |", "|---|---|"]
    for entry in NAMES:
        if entry.advice:
            text = entry.advice.format(value="...")
            parts.append(f"| {_listed(entry.names)} | {text[0].upper()}{text[1:]} |")
    parts += ["", "Names of values:", "", "| setting | name | value or answer |", "|---|---|---|"]
    for setting, words in VALUES.items():
        means = {
            name: value.text if isinstance(value, Advice) else f"`{value}`"
            for name, value in words.items()
        }
        for value in dict.fromkeys(means.values()):
            of = [name for name in means if means[name] == value]
            parts.append(f"| `{setting}` | {_listed(of)} | {value} |")
    return "\n".join([*parts, ""])


def _head(first: str) -> list[str]:
    return [line.format(first) for line in _HEAD]


def _row(name: str, kind: Any, default: Any, meaning: str) -> str:
    kind = re.sub(r"\b(Literal|Mapping|Sequence)\b", lambda m: _SHORT[m[1]], str(kind))
    absent = default is None or default is inspect.Parameter.empty
    shown = "not given" if absent else '`""`' if default == "" else f"`{default}`"
    cells = [f"`{name}`", f"`{kind}`", shown, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_SHORT = {"Literal": "", "Mapping": "dict", "Sequence": "list"}


def _type(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _field(cls: type, spec: dataclasses.Field[Any]) -> str:
    return _row(spec.name, spec.type, spec.default, _meaning(cls, spec.name, "Attributes"))


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def described(cls: type, section: str) -> dict[str, str]:
    """Return name -> meaning from a section (Args, Attributes) of the docstring of a class."""
    text = inspect.cleandoc(vars(cls).get("__doc__") or "")
    found = re.search(rf"^{section}:\n((?:[ ]{{4}}.*\n?|\n)*)", text, re.M)
    meanings: dict[str, str] = {}
    for names, meaning in re.findall(
        r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", found[1] if found else "", re.M
    ):
        meanings |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return meanings


def _meaning(cls: type, name: str, section: str) -> str:
    """Return the meaning of an argument or field; one that is said elsewhere ("see ``Task``") is taken from there.

    Raises:
        LookupError: no docstring of the class and its bases says it.
    """
    for of in cls.__mro__:
        text = described(of, section).get(name, "")
        if said := re.match(r"see ``(\w+)``[.;]?", text):
            known = vars(sys.modules[of.__module__]) | {base.__name__: base for base in cls.__mro__}
            other = known[said[1]]
            more = text[said.end() :].strip()
            text = _meaning(other, name, section).rstrip(".")
            text += f"{'. ' if more[:1].isupper() else '; ' * bool(more)}{more}"
        if text:
            return text[0].upper() + text[1:].rstrip(".") + "."
    raise LookupError(f"{section} of {cls.__name__} do not describe {name}.")


def _row_options(cls: type) -> Mapping[str, str]:
    text = inspect.cleandoc(vars(cls).get("__doc__") or "")
    found = re.search(r"^Row options: (.*?)(\n\n|\Z)", text, re.M | re.S)
    pairs = re.findall(r"``(\w+)``, (.*?)(?=; ``|\Z)", " ".join(found[1].split()) if found else "")
    return {name: text[0].upper() + text[1:].rstrip(".") + "." for name, text in pairs}


TABLES = {
    "settings": lambda: settings(RunConfig),
    "tune_settings": lambda: settings(TuneConfig),
    "task_options": task_options,
    "model_fields": model_fields,
    "sizes": size_tables,
    "names": names,
}


def write(folder: Path) -> None:
    """Write the tables where the pages include them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in TABLES.items():
        (folder / f"{name}.md").write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent / "_generated")
