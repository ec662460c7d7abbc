"""Command-line parsing with jsonargparse, with the same values and errors as in YAML files.

Values are read by `pretrain.config.strict_yaml`, so that ``2e-5``, ``010`` and ``on`` mean the same in a file and on
the command line. Errors in settings of ``train`` and ``finetune`` are raised by the code that checks the YAML.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pretrain.config.spelling import Interface
from pretrain.errors import ConfigError, did_you_mean

__all__ = ["add_checkpoint", "add_settings", "interface", "make_parser", "parse"]

# Commands whose options are the fields of a settings class; only those given are returned.
_SETTINGS = ("train", "finetune")
# Prefixes of options that set an item of a mapping: any name may follow.
_OPEN = {
    "train": ("--model.overrides.", "--objective.init_args."),
    "finetune": ("--data.columns.", "--task.options."),
    "predict": ("--columns.",),
    "evaluate": ("--columns.",),
}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def make_parser(name: str, summary: str, example: str, add: Callable[[Any], None]) -> Any:
    """Return the jsonargparse parser of the command ``name``; ``add`` declares its options."""
    from jsonargparse import ArgumentParser, set_loader

    set_loader("strict", _value, exceptions=(ConfigError,))
    parser = ArgumentParser(
        prog=f"pretrain {name}",
        description=summary,
        epilog=f"example: {example}",
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
        parser_mode="strict",
    )
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
        default=None,
        help="package.module:Class of the model, if it is a family of your own",
    )


def interface(name: str, short: Mapping[str, str]) -> Interface:
    """Return how messages spell the options of the command ``name``."""
    if name not in _SETTINGS:
        return Interface(
            command=True, columns="columns." if name in ("predict", "evaluate") else ""
        )
    sections = _settings(name).SECTIONS
    places = {
        spec.name: f"{section}.{spec.name}"
        for section, kind in reversed(sections.items())
        for spec in dataclasses.fields(kind)
    }
    # The short options are also keywords of the Python function.
    places |= {option.lstrip("-"): option.lstrip("-") for option in short}
    columns, others = ("data.columns.", "task.options.") if name == "finetune" else ("data.", "")
    return Interface(True, places, columns, others)


def add_settings(parser: Any, sections: Mapping[str, type], short: Mapping[str, str]) -> None:
    """Declare ``--config``, ``--show_config`` and every field of the sections; the help names the short options."""
    from pretrain.config import fields

    parser.add_argument("--config", type=str | None, default=None, help="YAML file of settings")
    parser.add_argument("--show_config", action="store_true", help="show the settings and leave")
    other = {setting: option for option, setting in short.items()}
    for section, kind in sections.items():
        group = parser.add_argument_group(f"{section}: {(kind.__doc__ or '').rstrip('.')}")
        for spec in fields(kind):
            name = f"--{section}.{spec.name}"
            also = f"(also {other[name]}) " if name in other else ""
            group.add_argument(name, type=spec.type, default=spec.default, help=also + spec.help)


def _value(text: str) -> Any:
    from pretrain.config.strict_yaml import parse

    return parse(text, "command line")[0]


def parse(parser: Any, name: str, words: list[str], short: Mapping[str, str] | None = None) -> Any:
    """Parse the arguments after the command; of settings only those given are returned, without defaults.

    Args:
        parser: parser from `make_parser`.
        name: name of the command.
        words: arguments after it.
        short: short option -> the setting that it stands for (``{"--model": "--model.checkpoint"}``).

    Raises:
        ConfigError: an unknown option (the nearest is named), a wrong type, a missing argument.
    """
    from argparse import ArgumentError

    words = _spelled_out(words, short or {})
    options = [option for action in parser._actions for option in action.option_strings]
    for word in words:
        if word == "--":
            break
        option = word.partition("=")[0]
        if option.startswith("--") and not _known(option, options, name):
            raise _unknown(option, options, name)
    try:
        return parser.parse_args(words, defaults=name not in _SETTINGS)
    except ArgumentError as error:
        raise _wrong(error, name, words) from None


def _settings(name: str) -> Any:
    if name == "train":
        from pretrain.config import RunConfig

        return RunConfig
    from pretrain.finetuning.settings import TuneConfig

    return TuneConfig


def _spelled_out(words: list[str], short: Mapping[str, str]) -> list[str]:
    """Replace short options by their settings, up to a lone ``--``."""
    end = words.index("--") if "--" in words else len(words)
    whole = []
    for word in words[:end]:
        option, equals, value = word.partition("=")
        whole.append(short.get(option, option) + equals + value)
    return whole + words[end:]


def _known(option: str, options: Iterable[str], name: str) -> bool:
    return option in options or option.startswith(_OPEN.get(name, ()))


def _unknown(option: str, options: Iterable[str], name: str) -> ConfigError:
    plain = [known.lstrip("-") for known in options if "." not in known]
    near = did_you_mean(option.lstrip("-"), plain)
    if name in _SETTINGS and ("." in option or "mean" not in near):
        try:
            _settings(name).load(None, {option.lstrip("-"): None})
        except ConfigError as error:
            return error
    return ConfigError(f"pretrain {name} has no option {option}.{did_you_mean(option, options)}")


def _wrong(error: Exception, name: str, words: list[str]) -> ConfigError:
    """Turn an error of the parser into the error that the same mistake gets in a YAML file."""
    text = " ".join(str(error).split())
    found = re.search(r'[Pp]arser key "([^"]+)"|argument --([\w.]+)', text)
    option = (found[1] or found[2]) if found else ""
    given = _given(option, words)
    if given is None and option:
        return ConfigError(f"--{option} needs a value. See pretrain {name} --help.")
    if name in _SETTINGS and "." in option and given is not None:
        try:
            _settings(name).load(None, {option: _value(given)})
        except ConfigError as same:
            return same
    if "Expected a" in text and given is not None:
        kind = re.search(r"Expected a .*?\b(int|float|bool)\b", text.partition("Got value")[0])
        wanted = _KINDS.get(kind[1] if kind else "", "of another type")
        return ConfigError(f"--{option} must be {wanted}, found {given!r}.")
    return ConfigError(
        f"pretrain {name}: {text[:1].lower()}{text[1:]}. See pretrain {name} --help."
    )


def _given(dotted: str, words: list[str]) -> str | None:
    """Return the value given for an option on the command line; None if there is none."""
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.lstrip("-").rstrip("+") == dotted and option.startswith("-"):
            return value if equals else (words[i + 1] if i + 1 < len(words) else None)
    return None
