"""Command-line parsing with argparse, with the same values and errors as in YAML files.

Values are read by `pretrain.config.strict_yaml`, so that ``2e-5``, ``010`` and ``on`` mean the same in a file and on
the command line; an option that takes text gets it as it was typed. Settings of ``train`` and ``finetune`` are checked
by the code that checks the YAML, other options by their annotations.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from pretrain.config.spelling import Interface
from pretrain.errors import ConfigError, did_you_mean

__all__ = [
    "Parser", "add_checkpoint", "add_settings", "interface", "make_parser", "read_settings", "settings_class",
]  # fmt: skip

# Commands whose options are the fields of a settings class; only those given are returned.
_SETTINGS = ("train", "lr-range", "bench", "finetune")
_NULLS = ("null", "Null", "NULL", "~")
_METAVARS: dict[Any, str] = {int: "INT", float: "NUMBER", bool: "{true,false}", str: "TEXT"}
_METAVARS |= {list: "LIST", tuple: "LIST", dict: "MAPPING"}


class Parser(argparse.ArgumentParser):
    """The parser of one command.

    The ``type`` of an option is an annotation, such as ``int | None``. Items of an option that takes a mapping may be
    given one by one: ``--columns.text review``. All errors are `ConfigError`.
    """

    def __init__(self, name: str, summary: str, example: str) -> None:
        self.name = name
        self.takes_value: dict[str, bool] = {}
        self.mappings: dict[str, tuple[Any, bool]] = {}
        super().__init__(
            prog=f"pretrain {name}",
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Declare an option.

        Args:
            *names: as in argparse.
            **options: as in argparse, except for ``type``, an annotation, ``group``, the group of the help, and
                ``check=False``, which leaves the check of the value to the caller.
        """
        container = options.pop("group", None)
        hint, check = options.pop("type", None), options.pop("check", True)
        text = options.get("help") or ""
        if hint is not None:
            options["type"] = partial(_checked if check else _value, names[0], hint)
            if names[0].startswith("-"):
                options["metavar"] = _metavar(hint)
            if get_origin(hint) is dict:
                self.mappings[names[0]] = (get_args(hint)[1], check)
            text += _default(options.get("default"))
        if text != argparse.SUPPRESS:
            options["help"] = text.replace("%", "%%")
        add = super().add_argument if container is None else container.add_argument
        action: argparse.Action = add(*names, **options)
        self.takes_value |= dict.fromkeys(action.option_strings, action.nargs != 0)
        return action

    def parse(self, words: list[str]) -> argparse.Namespace:
        """Parse the arguments after the command; of settings only those given are returned, without defaults.

        Raises:
            ConfigError: an unknown option (the nearest is named), a wrong type, a missing argument.
        """
        end = words.index("--") if "--" in words else len(words)
        glued, rest = [], iter(words[:end])
        for word in rest:
            option, equals, _ = word.partition("=")
            if option.startswith("--"):
                self._know(option)
                # argparse takes a separate value that starts with a dash, such as -1e-3, for an option.
                if self.takes_value[option] and not equals:
                    value = next(rest, None)
                    if value is None or value.partition("=")[0] in self.takes_value:
                        raise ConfigError(f"{option} needs a value. See {self.prog} --help.")
                    word = f"{option}={value}"
            elif word[:1] == "-" and word[1:2].isalpha() and " " not in word:
                raise ConfigError(
                    f"{self.prog} has no option {word}. If it is a file or a text, write -- before it."
                )
            glued.append(word)
        return self.parse_args(glued + words[end:])

    def error(self, message: str) -> NoReturn:
        """Raise an error of argparse as a `ConfigError`."""
        raise ConfigError(f"{self.prog}: {message}. See {self.prog} --help.")

    def _know(self, option: str) -> None:
        """Declare an item of a mapping when it is first used; raise for an unknown option."""
        if option in self.takes_value:
            return
        for name, (hint, check) in self.mappings.items():
            if option.startswith(f"{name}."):
                dest, default = name.lstrip("-"), argparse.SUPPRESS
                self.add_argument(
                    option, dest=dest, type=hint, check=check, default=default, action=_Item
                )
                return
        plain = [known.lstrip("-") for known in self.takes_value if "." not in known]
        near = did_you_mean(option.lstrip("-"), plain)
        if self.name in _SETTINGS and ("." in option or "mean" not in near):
            settings_class(self.name).load(None, {option.lstrip("-"): None})
        near = did_you_mean(option, [known for known in self.takes_value if known != "-h"])
        raise ConfigError(f"{self.prog} has no option {option}.{near}")


class _Item(argparse.Action):
    """Set one item of a mapping; further dots name items of mappings inside it."""

    def __call__(self, parser: Any, space: Any, value: Any, option: str | None = None) -> None:
        *path, last = str(option).removeprefix(f"--{self.dest}.").split(".")
        known = getattr(space, self.dest, None)
        whole = place = dict(known) if isinstance(known, Mapping) else {}
        for part in path:
            inner = place.get(part)
            place[part] = dict(inner) if isinstance(inner, Mapping) else {}
            place = place[part]
        place[last] = value
        setattr(space, self.dest, whole)


def make_parser(name: str, summary: str, example: str, add: Callable[[Any], None]) -> Parser:
    """Return the parser of the command ``name``; ``add`` declares its options."""
    parser = Parser(name, summary, example)
    add(parser)
    return parser


def add_checkpoint(
    parser: Any, name: str = "checkpoint", text: str = "run or checkpoint directory"
) -> None:
    """Declare the directory that a command reads, and ``--family`` for the class of its model."""
    parser.add_argument(name, type=str, help=text)
    parser.add_argument(
        "--family",
        type=str | None,
        help="package.module:Class of the model, if it is a family of your own",
    )


def add_settings(parser: Parser, kind: Any, short: Mapping[str, str]) -> None:
    """Declare ``--config``, ``--show_config`` and every field of the sections of ``kind``.

    Args:
        parser: parser of the command.
        kind: ``RunConfig`` or ``TuneConfig``.
        short: setting -> a shorter option for it.
    """
    from pretrain.config import fields

    parser.usage = f"{parser.prog} [--config FILE] [--SECTION.SETTING VALUE ...] [options]"
    add = parser.add_argument
    add("--config", type=str | None, help="YAML file of settings")
    add("--show_config", action="store_true", help="print the settings as YAML and exit")
    for section, of in kind.SECTIONS.items():
        group = parser.add_argument_group(section, of.__doc__)
        for spec in fields(of):
            name = f"--{section}.{spec.name}"
            names = (name, short[name]) if name in short else (name,)
            text = spec.help + _default(spec.default)
            add(
                *names,
                group=group,
                type=spec.type,
                check=False,
                default=argparse.SUPPRESS,
                help=text,
            )


def read_settings(kind: Any, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the settings of ``--config`` and the given fields, and the other options.

    With ``--show_config`` the settings are printed, and None is returned for them.
    """
    sections: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {}
    for key, value in vars(args).items():
        section, dot, name = key.partition(".")
        (sections.setdefault(section, {}) if dot else others)[name or key] = value
    settings = kind.load(others.pop("config", None), sections)
    if others.pop("show_config"):
        print(settings.to_yaml(), end="")
        return None, others
    return settings, others


def interface(name: str, short: Mapping[str, str]) -> Interface:
    """Return how messages spell the options of the command ``name``."""
    if name not in _SETTINGS:
        return Interface(
            command=True, columns="columns." if name in ("predict", "evaluate") else ""
        )
    sections = settings_class(name).SECTIONS
    places = {
        spec.name: f"{section}.{spec.name}"
        for section, kind in reversed(sections.items())
        for spec in dataclasses.fields(kind)
        if spec.init
    }
    # The short options are also keywords of the Python function.
    places |= {option.lstrip("-"): option.lstrip("-") for option in short.values()}
    columns, others = ("data.columns.", "task.options.") if name == "finetune" else ("data.", "")
    return Interface(True, places, columns, others)


def settings_class(name: str) -> Any:
    """Return ``TuneConfig`` for ``finetune``, else ``RunConfig``."""
    if name != "finetune":
        from pretrain.config import RunConfig

        return RunConfig
    from pretrain.finetuning.settings import TuneConfig

    return TuneConfig


def _value(name: str, hint: Any, text: str) -> Any:
    """Read a value as YAML, or keep it as it was typed where ``hint`` allows text and no other type fits."""
    from pretrain.config.check import check_value
    from pretrain.config.strict_yaml import parse

    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    as_text = str in kinds or hint is Any
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


def _metavar(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return "|".join(_metavar(kind) for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    return _METAVARS.get(get_origin(hint) or hint, "VALUE")


def _default(value: Any) -> str:
    """Return the end of a help text; an empty default is described by the text itself."""
    if value in (None, "", [], {}, argparse.SUPPRESS):
        return ""
    shown = list(value) if isinstance(value, tuple) else value
    return f" (default: {str(shown).lower() if isinstance(shown, bool) else shown})"
