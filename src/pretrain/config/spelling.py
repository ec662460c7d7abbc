"""Options as the user writes them: keywords in Python, ``--data.text`` on the command line.

Code that tells the user to set an option names it with `option` or `column`, and the message then fits the interface
that was used. An interface is entered where a public function or a command begins; Python's is the default.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "EVALUATE",
    "FINETUNE",
    "PREDICT",
    "TRAIN",
    "Interface",
    "column",
    "option",
    "option_name",
    "using",
]


@dataclass(frozen=True)
class Interface:
    """Where options are written.

    Args:
        command: on a command line; else as keywords in Python.
        places: option -> its dotted path (``format`` -> ``data.format``), where that is not the name itself.
        columns: what stands before the role of a column: ``data.columns.``.
        others: what stands before an option without a place: ``task.options.``.
    """

    command: bool = False
    places: Mapping[str, str] = field(default_factory=dict)
    columns: str = ""
    others: str = ""

    def spell(self, path: str, value: Any) -> str:
        """An option at a dotted path with its value, as it is written here."""
        if self.command:
            return f"--{path} {_argument(value)}"
        section, _, name = path.rpartition(".")
        return (
            f"{section}={{{name!r}: {_literal(value)}}}" if section else f"{name}={_literal(value)}"
        )


# A file without a header: the names of its columns are `columns` of read_table and `names` of finetune.
READ = Interface(places={"names": "columns"})
FINETUNE = Interface()
PREDICT = Interface(columns="columns.")
EVALUATE = PREDICT
TRAIN = Interface(places={"out": "train.out"}, columns="data.", others="data.")

_current = READ


@contextlib.contextmanager
def using(interface: Interface) -> Iterator[None]:
    """Spell options for an interface; a command that has been entered stays, whatever it calls."""
    global _current
    before = _current
    if not before.command:
        _current = interface
    try:
        yield
    finally:
        _current = before


def option(name: str, value: Any = ...) -> str:
    """An option with a value, as the user would write it: ``format='tsv'`` or ``--data.format tsv``.

    Args:
        name: of the option, as a keyword of Python.
        value: a word, a number, a list or a mapping; an ellipsis, also inside of these, stands for what the user knows.
    """
    return _current.spell(_current.places.get(name, _current.others + name), value)


def option_name(name: str) -> str:
    """An option without a value: ``format`` or ``--data.format``."""
    path = _current.places.get(name, _current.others + name)
    return f"--{path}" if _current.command else path


def column(role: str, name: Any = ...) -> str:
    """The option that names the column of a role: ``text='review'`` or ``--data.columns.text review``."""
    return _current.spell(_current.columns + role, name)


def _literal(value: Any) -> str:
    """A value as Python code, with ``...`` for an ellipsis."""
    if value is ...:
        return "..."
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(_pair(key, item, _literal) for key, item in value.items())}}}"
    return repr(value)


def _argument(value: Any) -> str:
    """A value as a word of a shell, which reads lists and mappings as YAML does."""
    text = _yaml(value)
    return text if value is ... else shlex.quote(text)


def _yaml(value: Any, inside: bool = False) -> str:
    if value is ...:
        return "..."
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_yaml(item, True) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(_pair(key, item, lambda v: _yaml(v, True)) for key, item in value.items())}}}"
    text = str(value)
    if not inside or not isinstance(value, str):
        return text
    plain = re.fullmatch(r"[^\W\d]\w*([ ./-]\w+)*", text) and text not in ("true", "false", "null")
    return text if plain else json.dumps(text, ensure_ascii=False)


def _pair(key: Any, value: Any, spell: Any) -> str:
    return "..." if key is ... else f"{spell(key)}: {spell(value)}"
