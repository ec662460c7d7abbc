"""Command-line parsing with argparse, with the same values and errors as in YAML files.

Values are read by `pretrain.config.strict_yaml`, so that ``2e-5``, ``010`` and ``on`` mean the same in a file and on
the command line; an option that takes text gets it as it was typed. Settings of ``train`` and ``finetune`` are checked
by the code that checks the YAML, other options by their annotations.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from pretrain.config.aliases import find, main_setting
from pretrain.config.spelling import Interface
from pretrain.errors import ConfigError, nearest

__all__ = [
    "DEVICE", "JSON", "QUIET", "READING", "Option", "Parser", "checkpoint", "interface", "make_parser", "read_settings",
    "sampling", "settings_class",
]  # fmt: skip

# Name, annotation of the value (None: it has none, and is false if not given), help, and perhaps the default (... if it
# must be given) and further arguments of argparse: see `Parser.declare`.
Option = tuple[Any, ...]

# Commands whose options are the fields of a settings class; only those given are returned.
_SETTINGS = ("train", "lr-range", "bench", "finetune")
_NULLS = ("null", "Null", "NULL", "~")
_WRITTEN = ("--out", "--plot")  # options that name what a command writes
_WIDTH = 80
_ARCHITECTURE = (
    "FAMILY or FAMILY:SIZE, e.g. gpt2:small (gpt2:? lists the sizes), or the directory of a "
    "checkpoint to start from"
)
_OWN_OBJECTIVE = "next-token, masked-lm, or package.module:Class of an objective of your own"


@dataclass(frozen=True)
class _Entry:
    """One option, as the help shows it."""

    names: tuple[str, ...]
    value: str  # type and default in words
    help: str
    group: tuple[str, str]  # title and description
    required: bool = False
    nargs: str | None = None

    def lines(self) -> list[str]:
        value = f"  {self.value}" if self.value else ""
        head = textwrap.wrap(
            f"{', '.join(reversed(self.names))}{value}", _WIDTH - 2, subsequent_indent="    "
        )
        text = textwrap.wrap(self.help, _WIDTH - 6) if self.help else []
        return [f"  {line}" for line in head] + [f"      {line}" for line in text]


class Parser(argparse.ArgumentParser):
    """The parser of one command.

    The ``type`` of an option is an annotation, such as ``int | None``. Items of an option that takes a mapping may be
    given one by one: ``--columns.text review``; an option that is yes or no means yes without a value. All errors are
    `ConfigError`.

    ``common`` are the options that the short help shows, in this order; all if empty.
    """

    def __init__(self, name: str, summary: str, example: str, common: Sequence[str] = ()) -> None:
        self.name = name
        self.example, self.common = example, common
        self.entries: list[_Entry] = []
        self.takes_value: dict[str, bool] = {}
        self.switches: set[str] = set()
        self.mappings: dict[str, tuple[str, Any, bool]] = {}
        # (mapping, key, ...) -> the option that gave it.
        self.items: dict[tuple[Any, ...], str] = {}
        super().__init__(prog=f"pretrain {name}", description=summary, allow_abbrev=False)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Declare an option.

        Args:
            *names: as in argparse.
            **options: as in argparse, except for ``type``, an annotation, ``shown``, the default that the help shows,
                ``group``, the title and the description of the part of the help, and ``check=False``, which leaves the
                check of the value to the caller.
        """
        group = options.pop("group", ("", ""))
        hint, check = options.pop("type", None), options.pop("check", True)
        shown = options.pop("shown", options.get("default"))
        text, value = options.get("help") or "", ""
        if hint is not None:
            from pretrain.config.check import type_in_words

            options["type"] = partial(_checked if check else _value, names[0], hint)
            one_by_one = f", or {names[-1]}.KEY VALUE" * (get_origin(hint) is dict)
            value = type_in_words(hint) + one_by_one + _default(shown)
            if any(get_origin(kind) is dict for kind in _kinds(hint)):
                options.setdefault("action", _Items)
        action: argparse.Action = super().add_argument(*names, **options)
        if get_origin(hint) is dict:
            self.mappings |= {name: (action.dest, get_args(hint)[1], check) for name in names}
        if bool in (hint, *get_args(hint)):
            self.switches |= set(names)
        if text and text != argparse.SUPPRESS and "--help" not in names:
            required = bool(action.required and action.option_strings)
            self.entries.append(_Entry(names, value, text, group, required, options.get("nargs")))
        self.takes_value |= dict.fromkeys(action.option_strings, action.nargs != 0)
        return action

    def declare(
        self,
        name: str,
        kind: Any,
        text: str,
        default: Any = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Declare an option of a table, see ``Option``."""
        options: dict[str, Any] = {"help": text, **(more or {})}
        options |= {"action": "store_true"} if kind is None else {"type": kind}
        if default is ...:
            options["required"] = True
        elif default is not None:
            options["default"] = default
        self.add_argument(name, **options)

    def help(self, *, everything: bool = False) -> str:
        """Return the help: the common options and an example, or all options by section."""
        known = {name: entry for entry in self.entries for name in entry.names}
        chosen = self.entries if everything or not self.common else [known[n] for n in self.common]
        lines = [self._usage(), "", *textwrap.wrap(str(self.description), _WIDTH)]
        group = None
        for entry in chosen:
            if group is None or (everything and entry.group != group):
                group = entry.group
                title, about = group if everything else ("", "")
                lines += ["", *([f"{title}: {about}"] if title else [])]
            lines += entry.lines()
        lines += ["", "example:", f"  {self.example}"]
        if len(chosen) < len(self.entries):
            lines += ["", f"{self.prog} --help all shows all {len(self.entries)} options."]
        elif self.name in _SETTINGS:
            lines += [
                "",
                "Settings are also the keys of a --config file. Names of other libraries, such as",
                "learning_rate, batch_size or max_steps, are understood: see docs/configuration.md.",
            ]
        return "\n".join(lines)

    @property
    def others(self) -> list[str]:
        """Options that are no settings."""
        return [
            entry.names[0]
            for entry in self.entries
            if entry.names[0].startswith("--") and not entry.group[0]
        ]

    def _usage(self) -> str:
        shapes = {None: "{}", "?": "[{}]", "*": "[{} ...]"}
        places = [e for e in self.entries if not e.names[0].startswith("-")]
        words = [shapes[entry.nargs].format(entry.names[0].upper()) for entry in places]
        words += [f"{entry.names[0]} VALUE" for entry in self.entries if entry.required]
        return " ".join(["usage:", self.prog, *words, "[options]"])

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Parse the arguments after the command; of settings only those given are returned, without defaults.

        Raises:
            ConfigError: an unknown option (the nearest is named), a wrong type, a missing argument.
        """
        end = words.index("--") if "--" in words else len(words)
        glued, place = [], 0
        named: dict[str, str] = {}  # setting, or another option -> the name by which it was given
        self.items = {}
        while place < end:
            word = words[place]
            place += 1
            option, equals, given = word.partition("=")
            if option.startswith("--"):
                value = given if equals else words[place] if place < end else None
                self._know(option, value)
                action = self._option_string_actions[option]
                if option in _WRITTEN and value == "":
                    raise ConfigError(
                        f"{option} is empty; it names what the command writes. Give a path, or leave {option} out."
                    )
                if not isinstance(action, _Items):
                    _check_one_name(named.setdefault(action.dest, option), option, action.dest)
                # argparse takes a separate value that starts with a dash, such as -1e-3, for an option.
                if self.takes_value[option] and not equals:
                    missing = value is None or value.partition("=")[0] in self.takes_value
                    if option in self.switches and (missing or str(value).startswith("--")):
                        word = f"{option}=true"
                    elif missing:
                        raise ConfigError(f"{option} needs a value. See {self.prog} --help.")
                    else:
                        word, place = f"{option}={value}", place + 1
            elif word[:1] == "-" and word[1:2].isalpha() and " " not in word:
                raise ConfigError(
                    f"{self.prog} has no option {word}. If it is a file or a text, write -- before it."
                )
            glued.append(word)
        return self.parse_args(glued + words[end:])

    def error(self, message: str) -> NoReturn:
        """Raise an error of argparse as a `ConfigError`."""
        raise ConfigError(f"{self.prog}: {message}. See {self.prog} --help.")

    def _know(self, option: str, value: str | None) -> None:
        """Declare an item of a mapping or another name of a setting on first use; raise for unknown options."""
        if option in self.takes_value:
            return
        for name, (dest, hint, check) in self.mappings.items():
            if option.startswith(f"{name}."):
                self.add_argument(
                    option, dest=dest, type=hint, check=check, default=argparse.SUPPRESS, action=_Items,
                    const=f"{name}.",
                )  # fmt: skip
                return
        word = option.lstrip("-")
        if self.name in _SETTINGS:
            self._know_setting(option, word, value)
            return
        # Without the dashes, which all options share.
        known = {name.lstrip("-"): name for name in self.takes_value if name != "-h"}
        near = nearest(word, known)
        hint = f"Did you mean {known[near]!r}?" if near else f"See {self.prog} --help."
        raise ConfigError(f"{self.prog} has no option {option}. {hint}")

    def _know_setting(self, option: str, word: str, value: str | None) -> None:
        from pretrain.config.check import type_of

        kind = settings_class(self.name)
        try:
            hint = type_of(kind.SECTIONS, word)
        except ConfigError:
            near = difflib.get_close_matches(word, [name[2:] for name in self.others], 1, 0.8)
            if near:
                raise ConfigError(
                    f"{self.prog} has no option {option}. Did you mean '--{near[0]}'?"
                ) from None
            given = None if value is None or value.startswith("--") else value
            kind.load(None, {word: given})  # raises with the value
            raise
        self.add_argument(option, dest=word, type=hint, check=False, default=argparse.SUPPRESS)


class _Items(argparse.Action):
    """Set items of a mapping: one, where further dots name those of mappings inside it, or all of a mapping.

    Those given before stay. An option given again replaces its own items; another option for them is an error.
    """

    def __call__(self, parser: Any, space: Any, value: Any, option: str | None = None) -> None:
        name, dest = str(option), self.dest
        path = name.removeprefix(self.const).split(".") if self.const else []
        whole = getattr(space, dest, None)
        for keys, item in _leaves(value, tuple(path)):
            for other, by in parser.items.items():
                size = min(len(other), len(keys) + 1)
                if other[:size] == (dest, *keys)[:size]:
                    _check_one_name(by, name, ".".join(map(str, (dest, *keys)[:size])))
            parser.items[(dest, *keys)] = name
            whole = _with_item(whole, keys, item)
        is_empty = isinstance(value, Mapping) and not isinstance(whole, Mapping)
        setattr(space, dest, {} if is_empty else whole)


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the items of a mapping, and of those inside it, with the keys that lead to each."""
    if not isinstance(value, Mapping) or (path and not value):
        yield path, value
        return
    for key, item in value.items():
        yield from _leaves(item, (*path, key))


def _with_item(known: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a mapping with the item at a path; what is no mapping on the way is replaced by one."""
    if not path:
        return value
    items = dict(known) if isinstance(known, Mapping) else {}
    items[path[0]] = _with_item(items.get(path[0]), path[1:], value)
    return items


def _check_one_name(other: str, option: str, meant: str) -> None:
    if other != option:
        raise ConfigError(f"{other} and {option} are both {meant}; give one.")


def make_parser(
    name: str, summary: str, example: str, options: Iterable[Option], common: Sequence[str] = ()
) -> Parser:
    """Return the parser of the command ``name``, with the settings of a run if it has them."""
    parser = Parser(name, summary, example, common)
    for option in options:
        parser.declare(*option)
    if name in _SETTINGS:
        add_settings(parser, settings_class(name))
    return parser


JSON: Option = ("--json", None, "print JSON")
QUIET: Option = ("--quiet", None, "no progress bar")
DEVICE: Option = ("--device", str, "auto, cpu, cuda or mps", "auto")
# How the file of examples is read.
READING: tuple[Option, ...] = (
    ("--delimiter", str | None,
     "delimiter of the cells of .csv or .tsv; by default comma or tab, or what the header shows"),
    ("--quoting", bool | None, "whether double quotes enclose cells of .csv or .tsv; by default in .csv they do"),
    ("--encoding", str | None, "encoding of the file, e.g. cp1252; by default UTF-8"),
)  # fmt: skip


def checkpoint(
    name: str = "checkpoint",
    text: str = "run, checkpoint directory, or org/name of a model on the Hugging Face Hub",
) -> tuple[Option, ...]:
    """Return the directory that a command reads, and ``--family`` for the class of its model."""
    family = "package.module:Class of the model, if it is a family of your own"
    return (name, str, text), ("--family", str | None, family)


def sampling(new_tokens: int) -> tuple[Option, ...]:
    """Return the options of the generation of text; ``new_tokens`` is the number without any setting."""
    return (
        ("--max_new_tokens", int | None,
         f"maximum number of new tokens; by default that of generation_config.json, or {new_tokens}"),
        ("--temperature", float | None,
         "0 takes the likeliest token; by default that of generation_config.json, or 1 with --top_k, --top_p, "
         "--min_p or --seed, else 0"),
        ("--top_k", int | None, "sample from the k likeliest tokens"),
        ("--top_p", float | None, "sample from the likeliest tokens whose probabilities sum to this"),
        ("--min_p", float | None, "drop tokens below this share of the likeliest one's probability"),
        ("--repetition_penalty", float | None, "above 1 makes tokens that occurred less likely"),
        ("--stop", list[str] | str | None, "text, or [list, of, texts], at which to stop"),
        ("--seed", int | None, "the same seed gives the same text"),
    )  # fmt: skip


def add_settings(parser: Parser, kind: Any) -> None:
    """Declare ``--config``, ``--show_config`` and every field of the sections of ``kind``.

    A setting is also named without its section where only one section has it, and by its section where it is the main
    one there: ``--data``, ``--model``, ``--objective``, ``--task``.
    """
    from pretrain.config import fields

    add = parser.add_argument
    add(
        "--config",
        type=str | None,
        action="append",
        help="YAML file of settings; of several, each replaces settings of those before it",
    )
    add("--show_config", action="store_true", help="print the settings as YAML and exit")
    names = {
        section: {spec.name: spec for spec in fields(of)} for section, of in kind.SECTIONS.items()
    }
    if "size" in names["model"]:
        add("--model", type=str, check=False, default=argparse.SUPPRESS, help=_ARCHITECTURE)
    for section, of in kind.SECTIONS.items():
        for spec in names[section].values():
            setting = f"{section}.{spec.name}"
            options = [f"--{setting}"]
            is_main = main_setting(section) == spec.name and section != "optim"
            if is_main and f"--{section}" not in parser.takes_value:
                options.append(f"--{section}")
            elif (found := find(spec.name, names)) is not None and found[0] == setting:
                options.append(f"--{spec.name}")
            add(
                *options,
                group=(section, of.__doc__),
                type=spec.type,
                check=False,
                default=argparse.SUPPRESS,
                shown=spec.default,
                help=_OWN_OBJECTIVE if spec.name == "class_path" else spec.help,
            )


def read_settings(
    kind: Any, args: argparse.Namespace, options: Iterable[Option]
) -> tuple[Any, dict[str, Any]]:
    """Return the settings of ``--config`` and the given settings, and the command's own ``options``.

    With ``--show_config`` the settings are printed, and None is returned for them.
    """
    own = {"config", "show_config", *(name.lstrip("-") for name, *_ in options)}
    given = {key: value for key, value in vars(args).items() if key not in own}
    others = {key: value for key, value in vars(args).items() if key in own}
    settings = kind.load(others.pop("config", None), given)
    if others.pop("show_config"):
        print(settings.to_yaml(), end="")
        return None, others
    return settings, others


def interface(name: str, options: Collection[str] = ()) -> Interface:
    """Return how messages spell the options of the command ``name``; ``options`` are those of its parser."""
    if name not in _SETTINGS:
        columns = "columns." if name in ("predict", "evaluate", "probe") else ""
        reading = {word.lstrip("-") for word in options}
        trains = name not in ("predict", "evaluate", "probe")
        if name == "probe":  # how rows are read is said in the same mapping as their columns
            places = {word: word for word in reading}
            return Interface(True, places, columns, columns, reading=reading, trains=trains)
        return Interface(True, columns=columns, reading=reading, trains=trains)
    sections = settings_class(name).SECTIONS
    places = {
        spec.name: f"{section}.{spec.name}"
        for section, kind in reversed(sections.items())
        for spec in dataclasses.fields(kind)
        if spec.init
    }
    # These options are also keywords of the Python function, as are those that are no settings.
    places |= {
        section: section
        for section in sections
        if section in ("model", "data", "task", "objective")
    }
    plain = {word.lstrip("-"): word.lstrip("-") for word in options if "." not in word}
    places = plain | places
    columns, others = ("data.columns.", "task.options.") if name == "finetune" else ("data.", "")
    return Interface(True, places, columns, others, reading=places)


def settings_class(name: str) -> Any:
    """Return ``TuneConfig`` for ``finetune``, else ``RunConfig``."""
    if name != "finetune":
        from pretrain.config import RunConfig

        return RunConfig
    from pretrain.finetuning.settings import TuneConfig

    return TuneConfig


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _value(name: str, hint: Any, text: str) -> Any:
    """Read a value as YAML, or keep it as it was typed where ``hint`` allows text and no other type fits."""
    from pretrain.config.check import check_value
    from pretrain.config.strict_yaml import parse

    kinds = _kinds(hint)
    as_text = str in kinds or hint is Any
    if bool in kinds and text in ("yes", "no"):
        return text == "yes"
    try:
        value = parse(text, name)[0]
    except ConfigError:
        if as_text:
            return text
        raise
    if not as_text:
        return value
    if isinstance(value, str) or (value is None and text not in _NULLS):
        return text
    for kind in kinds:
        if kind is not str:
            with contextlib.suppress(ConfigError):
                return check_value(name, value, kind)
    return text


def _checked(name: str, hint: Any, text: str) -> Any:
    from pretrain.config.check import check_value

    return check_value(name, _value(name, hint, text), hint)


def _default(value: Any) -> str:
    """Return the default in words; an empty one is described by the help text."""
    if value in (None, "", [], {}, argparse.SUPPRESS):
        return ""
    shown = list(value) if isinstance(value, tuple) else value
    return f" (default: {['no', 'yes'][shown] if isinstance(shown, bool) else shown})"
