"""Spelling of options in messages: keywords in Python, ``--data.text`` on the command line.

Messages name options by `option` or `column`, so that they match the interface that the user works with. Public
functions and commands set the interface with `using`; Python's is the default.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "EVALUATE",
    "FINETUNE",
    "PREDICT",
    "PROBE",
    "SEARCH",
    "STREAM",
    "TRAIN",
    "Interface",
    "column",
    "columns",
    "either",
    "option",
    "option_name",
    "reads_with",
    "smaller_batch",
    "trains",
    "using",
    "within",
]


@dataclass(frozen=True)
class Interface:
    """How options are written: on the command line, or as keywords of a Python function.

    Args:
        command: command line instead of Python.
        places: option -> its dotted path (``format`` -> ``data.format``), where that differs from the name.
        columns: prefix of the role of a column: ``data.columns.``.
        others: prefix of options that are not in ``places``: ``task.options.``.
        reading: options that it has, of those with which files are read (format, names, delimiter, quoting, encoding);
            None for all of them.
        trains: it trains a model, so that it can be told the classes.
    """

    command: bool = False
    places: Mapping[str, str] = field(default_factory=dict)
    columns: str = ""
    others: str = ""
    reading: Collection[str] | None = None
    trains: bool = True

    def spell(self, path: str, value: Any) -> str:
        """Return the option at a dotted path with its value, as written in this interface."""
        if self.command:
            return f"--{path} {_argument(value)}"
        section, _, name = path.rpartition(".")
        return (
            f"{section}={{{name!r}: {_literal(value)}}}" if section else f"{name}={_literal(value)}"
        )


# The column names of a file without a header are called `columns` in read_table and `names` in finetune.
READ = Interface(places={"names": "columns"})
FINETUNE = Interface()
STREAM = Interface(reading=("delimiter", "quoting", "encoding"))
PREDICT = Interface(columns="columns.", reading=STREAM.reading, trains=False)
EVALUATE = Interface(columns="columns.", reading=("encoding",), trains=False)
PROBE = Interface(columns="columns.", reading=(), trains=False)
SEARCH = Interface(reading=())
TRAIN = Interface(
    places={
        "out": "train.out",
        "device": "parallel.device",
        "objective": "objective",
        "lr": "optim.lr",
        "muon_lr": "optim.muon_lr",
        **{name: name for name in ("lowest", "highest", "steps")},  # of a range test
    },
    columns="data.",
    others="data.",
)

_current = READ


@contextlib.contextmanager
def _spelling(interface: Interface) -> Iterator[None]:
    global _current
    before, _current = _current, interface
    try:
        yield
    finally:
        _current = before


@contextlib.contextmanager
def using(interface: Interface) -> Iterator[None]:
    """Spell options for an interface within the context; inside a command, the interface of the command stays."""
    with _spelling(_current if _current.command else interface):
        yield


@contextlib.contextmanager
def within(section: str) -> Iterator[None]:
    """Spell all options as entries of a section of settings within the context, in the interface that is set."""
    prefix = f"{section}."
    with _spelling(Interface(_current.command, columns=prefix, others=prefix, reading=())):
        yield


def option(name: str, value: Any = ...) -> str:
    """Return an option with a value, as the user would write it: ``format='tsv'`` or ``--data.format tsv``.

    Args:
        name: the option as a Python keyword.
        value: a string, a number, a list or a mapping; an ellipsis, also inside of these, is for the user to fill in.
    """
    return _current.spell(_current.places.get(name, _current.others + name), value)


def option_name(name: str) -> str:
    """Return the name of an option: ``format`` or ``--data.format``."""
    path = _current.places.get(name, _current.others + name)
    return f"--{path}" if _current.command else path


def reads_with(name: str) -> bool:
    """Whether files can be read with the option ``name`` here, so that a message may advise it."""
    return _current.reading is None or name in _current.reading


def trains() -> bool:
    """Return whether the interface trains a model, so that options may name its classes."""
    return _current.trains


def either(command: str, python: str) -> str:
    """Return the first on the command line, the second in Python."""
    return command if _current.command else python


def column(role: str, name: Any = ...) -> str:
    """Return the option that names the column of a role: ``text='review'`` or ``--data.columns.text review``."""
    return _current.spell(_current.columns + role, name)


def columns(chosen: Mapping[str, Any]) -> str:
    """Return the options that name the columns of several roles, written together: ``columns={'text': ..., ...}``."""
    section = _current.columns.removesuffix(".")
    if section and not _current.command:
        return f"{section}={_literal(chosen)}"
    return (" " if _current.command else ", ").join(column(*pair) for pair in chosen.items())


def _literal(value: Any) -> str:
    """Return a value as Python code, with ``...`` for an ellipsis."""
    if value is ...:
        return "..."
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(_pair(key, item, _literal) for key, item in value.items())}}}"
    return repr(value)


def _argument(value: Any) -> str:
    """Return a value as a shell argument; lists and mappings are written in YAML syntax."""
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


def smaller_batch(batch_rows: int) -> str:
    """Return the advice for a batch that does not fit into memory."""
    if batch_rows == 1:
        return "One row alone does not fit: use a machine with more memory, or shorter texts."
    return f"Take fewer rows at a time: {option('batch_rows', max(1, batch_rows // 4))}."
