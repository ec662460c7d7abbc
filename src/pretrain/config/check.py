"""Strict reading of settings into dataclasses: files, merging, types, ranges, named errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import numbers
import os
import re
import stat
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pretrain.config.aliases import (
    NAMES,
    SettingAlias,
    find,
    main_setting,
    section_value,
    use_value,
)
from pretrain.config.spelling import either
from pretrain.config.strict_yaml import MAX_BYTES, parse
from pretrain.errors import ConfigError, nearest, suggestion
from pretrain.utils.files import note, replace_file

__all__ = [
    "check_count",
    "check_value",
    "name_change",
    "place_in",
    "read_file",
    "read_sections",
    "settings_in",
    "type_in_words",
    "type_of",
    "types_of",
    "with_digest",
    "with_place",
    "write_text",
]

_OPEN = {
    "model": "Fields of the family's own config belong under model.overrides.",
    "objective": "Arguments of the objective belong under objective.init_args.",
}

_OWN = {
    "task": "task.options",
    "objective": "objective.init_args",
}  # section -> place of its own options


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a YAML file; return its sections and the place of every key, as ``FILE:LINE``.

    Raises:
        ConfigError: the file is missing, not a regular file, too large, not UTF-8, not YAML, or has no sections.
    """
    try:
        kind = path.stat()
        if not stat.S_ISREG(kind.st_mode):
            what = "a directory" if stat.S_ISDIR(kind.st_mode) else "not a regular file"
            raise ConfigError(f"The config {path} is {what}; give a YAML file.")
        if kind.st_size > MAX_BYTES:
            raise ConfigError(
                f"The config {path} has {kind.st_size:,} bytes; at most {MAX_BYTES:,} are read."
            )
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"There is no config file {path}.{suggestion(path.name, _neighbours(path))}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The config {path} is not UTF-8 text (byte {error.start}); is it a YAML file?"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"The config {path} cannot be read: {error}.") from None
    name_change(path, text)
    value, lines = parse(text, str(path))
    if value is None:
        return {}, {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: a config is a mapping of sections (data: ..., model: ...), found {_show(value)}."
        )
    return value, {".".join(key): f"{path}:{line}" for key, line in lines.items()}


def _neighbours(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [
            item.name
            for item in sorted(path.parent.iterdir())[:1000]
            if item.suffix in (".yaml", ".yml")
        ]
    return []


def read_sections(
    sections: Mapping[str, type],
    source: Any,
    overrides: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge ``source`` and ``overrides`` and build one checked dataclass per section; see `Sections.load`.

    Also returns the places, as ``FILE:LINE``, of those items of mappings (``task.options.x``) that a file gave last.
    """
    layers = list(source) if isinstance(source, list | tuple) else [source]
    merged: dict[str, dict[str, Any]] = {}
    checker, origins = _Checker(sections), dict[str, str]()
    for layer in (*layers, overrides):
        raw, places = _opened(layer, sections)
        late = _Checker(sections, places)
        for section, values in late.nested(raw).items():
            checker.merge(merged.setdefault(section, {}), values, section)
            checker.replaced({f"{section}.{key}" for key in values}, in_file=bool(places))
            mappings = {key: value for key, value in values.items() if isinstance(value, Mapping)}
            items = {f"{section}.{key}.{name}" for key, held in mappings.items() for name in held}
            origins = {key: place for key, place in origins.items() if key not in items}
            origins |= {key: places[key] for key in items & places.keys()}
        checker.words |= late.words
        checker.places |= places
    found = {section: checker.section(section, merged.get(section, {})) for section in sections}
    return found, origins


def _opened(layer: Any, sections: Mapping[str, type]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Return the settings of one source as they are written, and the places of the keys of a file."""
    if layer is None:
        return {}, {}
    if dataclasses.is_dataclass(layer) and not isinstance(layer, type):
        return {key: vars(getattr(layer, key)) for key in sections}, getattr(layer, "origins", {})
    if isinstance(layer, Mapping):
        return layer, {}
    if isinstance(layer, str | os.PathLike):
        return read_file(Path(os.path.expanduser(layer)))
    raise ConfigError(f"A config is a YAML file or a dict of sections, not {_show(layer)}.")


def settings_in(raw: Mapping[str, Any], sections: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """Return the settings of these sections that are given under any of their names; all else is left out."""
    checker = _Checker(sections)
    found: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for key, value in raw.items():
        inside = value if key in sections and isinstance(value, Mapping) else None
        pairs = {key: value} if inside is None else {f"{key}.{k}": v for k, v in inside.items()}
        for word, given in pairs.items():
            with contextlib.suppress(ConfigError):
                for section, values in checker.nested({word: given}).items():
                    found[section] |= values
    return found


@functools.cache
def types_of(section: type) -> dict[str, Any]:
    """Return the type of every field of a section."""
    return get_type_hints(section)


class _Checker:
    """Checks values against the fields of the sections; errors carry file and line where known."""

    def __init__(
        self, sections: Mapping[str, type], places: Mapping[str, str] | None = None
    ) -> None:
        self.sections, self.places = sections, dict(places or {})
        self.hints = {section: types_of(kind) for section, kind in sections.items()}
        self.fields = {
            key: {f.name: f for f in dataclasses.fields(kind) if f.init}
            for key, kind in sections.items()
        }
        self.touched: set[str] = set()  # settings whose value is of no file
        self.words: dict[str, str] = {}  # setting -> the other name under which it was given

    def fail(self, key: str, message: str) -> ConfigError:
        word = self.words.get(key, key)
        place = self.places.get(word) if key not in self.touched else None
        if word != key and word.rpartition(".")[2] not in message:
            message += f" It was given as {word}."
        return ConfigError(f"{place}: {message}" if place else message)

    def replaced(self, keys: set[str], *, in_file: bool) -> None:
        """Forget how and where these settings were given before."""
        self.touched = self.touched - keys if in_file else self.touched | keys
        self.words = {key: word for key, word in self.words.items() if key not in keys}

    def nested(self, raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Convert sections, dotted keys and other names of settings to nested dicts; raise for unknown names."""
        found: dict[str, dict[str, Any]] = {}
        written: dict[str, str] = {}
        for key, value in raw.items():
            head, _, rest = str(key).partition(".")
            words = {str(key): value}
            if head in self.sections:
                inside = {rest: value} if rest else self.inside(head, value)
                words = {f"{head}.{name}": item for name, item in inside.items()}
            for word, given in words.items():
                # A section that is given as a single value is spelled as the user wrote it.
                spelling = str(key) if self.words.get(word) == key else word
                setting, item = self.setting(word, given)
                section, name, *path = setting.split(".", 2)
                into, item = found.setdefault(section, {}), {path[0]: item} if path else item
                whole = f"{section}.{name}"  # its items may be given apart from each other
                parts = (
                    [f"{whole}.{part}" for part in item] if isinstance(item, Mapping) else [whole]
                )
                for part, other in itertools.product(parts, written):
                    if f"{part}.".startswith(f"{other}.") or f"{other}.".startswith(f"{part}."):
                        raise self.twice(word, setting, written[other], spelling)
                written |= dict.fromkeys(parts, spelling)
                if isinstance(item, Mapping):
                    item = {**into.get(name, {}), **item}
                into[name] = item
        return found

    def twice(self, word: str, setting: str, first: str, second: str) -> ConfigError:
        if first == second:
            how = f"in the section {setting.partition('.')[0]} and by its full name"
            return self.fail(word, f"{first} is given twice, {how}; remove one of them.")
        dashes = "" if self.places else either("--", "")
        both = f"{dashes}{first} and {dashes}{second}"
        return self.fail(word, f"{both} are both {setting}; give one.")

    def inside(self, section: str, value: Any) -> Mapping[str, Any]:
        """Return the settings of a section, which may be given as its main setting alone."""
        is_data = hasattr(value, "path")  # prepared data, which may be a dataclass
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and not is_data:
            return vars(value)
        if value is None or isinstance(value, Mapping):
            return value or {}
        several = is_data or isinstance(value, list | tuple)
        if main_setting(section) is None or not (
            isinstance(value, str | os.PathLike) or (several and section == "data")
        ):
            message = f"{section} must be a section of settings, found {_show(value)}."
            raise self.fail(section, message)
        found = section_value(section, value, self.fields[section])
        self.words |= {f"{section}.{name}": section for name in found}
        return found

    def setting(self, word: str, value: Any) -> tuple[str, Any]:
        """Return the setting and the value that are meant; raise for unknown names."""
        found = self.resolve(word)
        if found is None:
            raise self.fail(word, f"{word!r} is not a setting.{self.suggest(word)}")
        setting, entry = found
        if setting != word:
            self.words[setting] = word
        if entry is not None and entry.type is not None and not entry.advice:
            value = self.value(word, value, entry.type)
        try:
            if entry is not None and entry.advice:
                shown = "..." if value is None else value
                raise ConfigError(f"{word!r} is not a setting: {entry.advice.format(value=shown)}")
            if entry is not None and entry.convert is not None:
                value = entry.convert(value)
            return setting, use_value(setting, value)
        except ConfigError as error:
            raise self.fail(word, str(error)) from None

    def resolve(self, word: str) -> tuple[str, SettingAlias | None] | None:
        """Return the setting that a name means, with or without its section, and its entry in the table of names."""
        head, _, name = word.partition(".")
        if head not in self.sections:
            return find(word, self.fields)
        if name.partition(".")[0] in self.fields[head]:
            return word, None
        found = find(name, self.fields)
        return found if found is not None and found[0].startswith(f"{head}.") else None

    def merge(self, into: dict[str, Any], values: dict[str, Any], section: str) -> None:
        """Replace values of a section; items of mappings of any names are replaced one by one."""
        current = into.get("class_path", "NextToken")
        if section == "objective" and values.get("class_path", current) != current:
            into.pop("init_args", None)  # they belong to another objective
        for key, value in values.items():
            old, is_open = into.get(key), get_origin(self.hints[section][key]) is dict
            if is_open and isinstance(old, Mapping) and isinstance(value, Mapping):
                value = {**old, **value}
            into[key] = value

    def suggest(self, dotted: str) -> str:
        """Return a hint: the setting that the name means, else the nearest one, else all settings of its section."""
        head, _, name = dotted.rpartition(".")
        bare = name or head
        if (found := find(bare, self.fields)) is not None:
            setting, entry = found
            advice = entry.advice.format(value="...") if entry is not None else ""
            return f" {advice[0].upper()}{advice[1:]}" if advice else f" Did you mean {setting!r}?"
        if (entry := next((e for e in NAMES if bare in e.names), None)) is not None:
            command = "train" if "task" in self.sections else "finetune"
            return f" It is {entry.setting} of pretrain {command}, and not a setting here."
        if near := nearest(name, self.fields.get(head, ())):
            return f" Did you mean '{head}.{near}'?"
        if head in _OPEN:
            return f" {_OPEN[head]}"
        known = [f"{section}.{key}" for section, names in self.fields.items() for key in names]
        same = [key for key in known if key.rpartition(".")[2] == bare]
        if same:
            return f" Did you mean {' or '.join(map(repr, same))}?"
        words = {
            w: e.setting for e in NAMES if not e.advice and e.fits(self.fields) for w in e.names
        }
        words |= {key.rpartition(".")[2]: key for key in [*known, *self.sections]}
        inside = [key for key in known if key.startswith(f"{head}.")]
        own = [k for k in _OWN if k in self.sections and head.partition(".")[0] in ("", k)]
        spelled = bare.replace("-", "_")
        beside = "".join(
            f" If it is an option of the {kind}, write {_OWN[kind]}.{spelled}." for kind in own
        )
        if close := nearest(bare, words):
            which = f", which is {words[close]!r}" * (words[close] != close)
            return f" Did you mean {close!r}{which}?{beside}"
        return f" Known: {', '.join(sorted(inside) or self.sections)}.{beside}"

    def section(self, section: str, values: Mapping[str, Any]) -> Any:
        checked = {}
        for name, value in values.items():
            key = f"{section}.{name}"
            spec, value = self.fields[section][name], _of_python(value)
            if isinstance(value, bool):  # choices that used to be true or false
                value = spec.metadata.get("flag", {}).get(value, value)
            elif spec.metadata.get("unit") and _is_number(value):  # a number alone is one of steps
                value = f"{value} {spec.metadata['unit']}"
            value = self.value(key, value, self.hints[section][name])
            if value is not None and spec.metadata.get("path"):
                value = os.path.expanduser(value)
            low, high = spec.metadata.get("low", -math.inf), spec.metadata.get("high", math.inf)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not low <= number <= high:
                    limits = f"{low:,} and {high:,}"
                    raise self.fail(key, f"{key} is {number:,}; it must lie between {limits}.")
            checked[name] = value
        return self.sections[section](**checked)

    def value(self, key: str, value: Any, hint: Any) -> Any:
        """Return ``value`` as the type ``hint``, without lenient conversions."""
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            kinds = [arg for arg in args if arg is not type(None)]
            if len(kinds) < len(args) and value is None:
                return None
            if len(kinds) == 1:
                return self.value(key, value, kinds[0])
            if float in kinds and isinstance(value, float):  # the error says what is wrong with it
                return self.value(key, value, float)
            for kind in sorted(kinds, key=lambda kind: kind is not str):  # text stays text
                with contextlib.suppress(ConfigError):
                    return self.value(key, value, kind)
            raise self.wrong(key, value, type_in_words(hint))
        if origin is Literal:
            if value in args and type(value) in map(type, args):
                return value
            if not isinstance(value, str):
                raise self.wrong(key, value, type_in_words(hint))
            near = suggestion(value, list(map(str, args)))
            raise self.fail(key, f"{key} is {value!r}; it must be {type_in_words(hint)}.{near}")
        if hint in (list, tuple, dict):
            if isinstance(value, dict if hint is dict else list | tuple):
                return value
            raise self.wrong(key, value, type_in_words(hint))
        if origin is list:
            if not isinstance(value, list | tuple):
                raise self.wrong(key, value, f"a list, e.g. [{_example(args[0])}]")
            return [self.value(f"{key}.{i}", item, args[0]) for i, item in enumerate(value)]
        if origin is tuple:
            if not isinstance(value, list | tuple) or len(value) != len(args):
                raise self.wrong(key, value, f"a list of {len(args)} numbers")
            return tuple(self.value(key, item, arg) for item, arg in zip(value, args, strict=True))
        if origin is dict:
            if not isinstance(value, Mapping):
                raise self.wrong(key, value, "a mapping, e.g. {name: value}")
            return {
                self.word(key, name): self.plain(f"{key}.{name}", item)
                for name, item in value.items()
            }
        if hint is Any:
            return self.sources(key, value)
        return self.scalar(key, value, hint)

    def scalar(self, key: str, value: Any, hint: Any) -> Any:
        value = _of_python(value)
        if hint is bool and isinstance(value, str) and self.sections:  # no JSON of others
            value = {"yes": True, "no": False}.get(value, value)
        if isinstance(value, bool | None) and type(value) is hint:
            return value
        if hint is int and isinstance(value, int) and not isinstance(value, bool):
            return int(value)
        if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value) or abs(value) > 1e300:
                raise self.fail(key, f"{key} is {value}; it must be a finite number.")
            return float(value)
        if hint is str and isinstance(value, str | os.PathLike):
            text = os.fspath(value)
            if isinstance(text, str) and "\0" not in text and _is_unicode(text):
                return str(text)
            raise self.fail(key, f"{key} is {text!r:.80}, which is not text.")
        raise self.wrong(key, value, type_in_words(hint))

    def word(self, key: str, name: Any) -> str:
        if not isinstance(name, str):
            raise self.wrong(key, name, "a mapping with text keys")
        return name

    def plain(self, key: str, value: Any, depth: int = 0) -> Any:
        """Return a value of an open mapping, which may be any plain data."""
        if depth > 16:
            raise self.fail(key, f"{key} is nested too deeply.")
        value = _of_python(value)
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int | float):
            if not math.isfinite(value) or abs(value) >= 1 << 63:
                raise self.fail(key, f"{key} is {value:.6g}; it must be finite and below 2^63.")
            return value
        if isinstance(value, list | tuple):
            return [self.plain(f"{key}.{i}", item, depth + 1) for i, item in enumerate(value)]
        if isinstance(value, Mapping):
            return {
                self.word(key, k): self.plain(f"{key}.{k}", v, depth + 1) for k, v in value.items()
            }
        raise self.wrong(key, value, "plain data (a word, a number, a list or a mapping)")

    def sources(self, key: str, value: Any) -> Any:
        """Return checked sources: one, several, or {source: weight}; prepared data are replaced by their path."""
        kept = getattr(value, "path", None)
        if kept is not None and isinstance(kept, str | os.PathLike):
            value = kept
        if isinstance(value, str | os.PathLike) and os.fspath(value):
            return self.scalar(key, value, str)
        rows = isinstance(value, list | tuple) and value and isinstance(value[0], Mapping)
        if isinstance(value, list | tuple) and value and not rows:
            return [self.scalar(f"{key}.{i}", item, str) for i, item in enumerate(value)]
        if isinstance(value, Mapping) and value:
            weights = {
                self.scalar(key, k, str): self.scalar(f"{key}.{k}", v, float)
                for k, v in value.items()
            }
            if (least := min(weights.values())) <= 0:
                raise self.fail(key, f"{key}: a source's weight must be above 0, found {least}.")
            return weights
        plain = isinstance(value, str | int | float | list | dict | None) and not rows
        hint = "" if plain else " Prepare it first: pretrain.prepare(...)."
        expected = "a prepared directory, a source, a list of sources or {source: weight}"
        raise self.fail(key, f"{key} must be {expected}, found {_show(value)}.{hint}")

    def wrong(self, key: str, value: Any, expected: str) -> ConfigError:
        return self.fail(key, f"{key} must be {expected}, found {_show(value)}.")


def type_of(sections: Mapping[str, type], word: str) -> Any:
    """Return the type of the values of a setting under any of its names.

    Raises:
        ConfigError: no setting has this name, or it means something else here.
    """
    checker = _Checker(sections)
    found = checker.resolve(word)
    if found is None or (found[1] is not None and found[1].advice):
        raise checker.fail(word, f"{word!r} is not a setting.{checker.suggest(word)}")
    setting, entry = found
    if entry is not None and entry.type is not None:
        return entry.type
    section, name, *item = setting.split(".", 2)
    return Any if item else checker.hints[section][name]


_PLAIN = (int, float, bool, str, type(None), list, dict, tuple)


def check_value(key: str, value: Any, hint: Any) -> Any:
    """Return a value as a plain type: a number, text, or lists, mappings, choices or unions of them.

    Other types are not checked.

    Raises:
        ConfigError: the value is of another type.
    """

    def plain(part: Any) -> bool:
        if part in _PLAIN or get_origin(part) is Literal:
            return True
        known = get_origin(part) in (Union, types.UnionType, list, dict)
        return known and all(map(plain, get_args(part)))

    if hint is None or not plain(hint):
        return value
    return _Checker({}).value(key, value, hint)


def check_count(name: str, value: Any, least: int | None = 1) -> int:
    """Return a value that is a whole number of at least ``least`` (None: any); one of numpy becomes one of Python.

    Raises:
        ConfigError: the value is anything else.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ConfigError(f"{name} is {value!r}; it must be a whole number{bound}.")
    return int(value)


def _of_python(value: Any) -> Any:
    """Return a scalar of numpy as the number or truth value of Python that it holds, and anything else as it is."""
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()
    return value.item() if is_scalar else value


def _is_number(value: Any) -> bool:
    if isinstance(value, int | float):
        return -1e18 < value < 1e18
    return isinstance(value, str) and (re.fullmatch(r"\s*[0-9][0-9_]*\s*", value) is not None)


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode() == text


def type_in_words(hint: Any) -> str:
    """Return a type as a phrase: "a whole number", "yes or no", "one of adamw, muon"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(type_in_words(kind) for kind in args if kind is not types.NoneType)
    if origin is list and get_origin(args[0]) is Literal:
        return f"a list of {', '.join(map(str, get_args(args[0])))}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "yes or no",
        str: "text",
        list: "a list",
        tuple: "a list",
        dict: "a mapping",
        Any: "text, a list or a mapping",
    }
    return names.get(origin or hint, str(hint))


def _example(hint: Any) -> str:
    examples = {int: "1, 2", float: "0.1, 0.2", str: "a, b"}
    return examples.get(hint) or str((get_args(hint) or ("...",))[0])


def _show(value: Any) -> str:
    """Return the value and its type, shortened."""
    if value is None:
        return "nothing"
    text = repr(value) if isinstance(value, str | int | float | bool | list | tuple | dict) else ""
    kinds = {str: "text", dict: "mapping", float: "number", int: "whole number", bool: "true/false"}
    kind = kinds.get(type(value), type(value).__name__)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({kind})" if text else f"a {kind}"


_DIGEST = re.compile(r"# digest ([0-9a-f]{16}) of the lines below\n")
_named: set[tuple[str, str]] = set()


def with_digest(text: str) -> str:
    """Return YAML text with its digest in a leading comment, by which `name_change` detects later changes."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"# digest {digest} of the lines below\n{text}"


_STARTED = re.compile(r"# started in (.+)\n")


def with_place(text: str) -> str:
    """Return YAML text with the current directory in a leading comment, from which its relative paths lead."""
    place = os.getcwd()
    return f"# started in {place}\n{text}" if _is_unicode(place) and place.isprintable() else text


def place_in(text: str) -> Path | None:
    """Return the directory that `with_place` wrote into a text, also behind a digest; None if there is none."""
    digest = _DIGEST.match(text)
    found = _STARTED.match(text, digest.end() if digest else 0)
    return Path(found[1]) if found else None


def name_change(path: Path, text: str) -> None:
    """Print one note if a file written `with_digest` was edited or damaged since."""
    match = _DIGEST.match(text)
    if match is None or with_digest(text[match.end() :]) == text:
        return
    key = (str(path), hashlib.sha256(text.encode()).hexdigest())
    if key not in _named:
        _named.add(key)
        note(
            f"{path} was edited or damaged after it was written; its settings are used as they are."
        )


def write_text(path: Path, text: str) -> Path:
    """Write a small file atomically.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from None
    return path
