"""YAML as data: a small, strict reading of YAML 1.2, and a writer that it reads back exactly.

PyYAML's safe loader follows YAML 1.1, where ``2e-5`` is a string, ``010`` is eight, ``12:30`` is
750 and ``on`` is a boolean, where a repeated key silently wins, and where a short file of aliases grows
without bound. Here values are built from the parser's events, with the core schema of YAML 1.2
(section 10.3.2): no tags, no anchors, no duplicate keys, bounded size and depth.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from pretrain.errors import ConfigError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "Key", "dump", "parse", "scalar"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_MAX_DIGITS = 100

Key = tuple[str, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(inf|Inf|INF)")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WORDS |= {".nan": float("nan"), ".NaN": float("nan"), ".NAN": float("nan")}


def scalar(text: str) -> Any:
    """Return the value that unquoted ``text`` stands for in the core schema of YAML 1.2.

    Raises:
        ConfigError: a number of absurd length.
    """
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789":
        return text
    if _INT.fullmatch(text) or _BASED.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            raise ConfigError(
                f"the number {text[:20]}... has {len(text)} digits; no setting needs that."
            )
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text) or _INF.fullmatch(text):
        return float(text.replace(".", "", 1) if _INF.fullmatch(text) else text)
    return text


class _Builder:
    """Turns parser events into plain values and remembers the line of every key."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Key, int] = {}

    def fail(self, mark: Any, message: str) -> ConfigError:
        place = f"{self.name}:{mark.line + 1}" if mark is not None else self.name
        return ConfigError(f"{place}: {message}")

    def build(self, events: Any) -> Any:
        for event in events:
            if isinstance(event, yaml.StreamStartEvent | yaml.DocumentStartEvent):
                if getattr(event, "tags", None):
                    raise self.fail(event.start_mark, "%TAG directives are not allowed.")
                continue
            if isinstance(event, yaml.StreamEndEvent):
                return None
            value = self.node(event, events, (), 0)
            rest = [item for item in events if not isinstance(item, yaml.DocumentEndEvent)]
            if not isinstance(rest[0], yaml.StreamEndEvent):
                raise self.fail(
                    rest[0].start_mark,
                    "a config is one document; remove the second '---'.",
                )
            return value
        return None

    def node(self, event: Any, events: Any, key: Key, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise self.fail(
                event.start_mark,
                "anchors (&) and aliases (*) are not allowed.",
            )
        if event.tag is not None and event.tag != "!":
            raise self.fail(
                event.start_mark, f"the tag {event.tag!r} is not allowed; a config is data."
            )
        if depth > MAX_DEPTH:
            raise self.fail(event.start_mark, f"nested deeper than {MAX_DEPTH} levels.")
        if isinstance(event, yaml.ScalarEvent):
            if not event.implicit[0]:
                return event.value
            try:
                return scalar(event.value)
            except ConfigError as error:
                raise self.fail(event.start_mark, str(error)) from None
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                items.append(self.node(item, events, (*key, str(len(items))), depth + 1))
            return items
        return self.mapping(events, key, depth)

    def mapping(self, events: Any, key: Key, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            name = self.node(event, events, key, depth + 1)
            if isinstance(name, bool | int | float):
                name = event.value
            if not isinstance(name, str):
                raise self.fail(event.start_mark, "a key must be a word.")
            if name in found:
                raise self.fail(
                    event.start_mark, f"the key {name!r} stands twice; remove one of them."
                )
            path = (*key, name)
            self.lines[path] = event.start_mark.line + 1
            found[name] = self.node(next(events), events, path, depth + 1)
        return found


def parse(text: str, name: str = "settings") -> tuple[Any, dict[Key, int]]:
    """Read one YAML document.

    Args:
        text: the document.
        name: what errors call it, usually the path.

    Returns:
        The value (dict, list, str, int, float, bool or None) and the line of every key.

    Raises:
        ConfigError: not YAML, or YAML that does more than state data.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES >> 20} MB; is it a config?")
    builder = _Builder(name)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return builder.build(iter(yaml.parse(text, Loader=loader))), builder.lines
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise builder.fail(mark, f"not valid YAML: {problem}.") from None


# Writes what `parse` reads: strings that look like numbers are quoted, nothing is shared.
_Dumper: Any = type("_Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text.isprintable() and text.strip() == text and isinstance(scalar(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value) if value == value and abs(value) != float("inf") else ""
    if not text:
        raise ConfigError(f"{value} cannot be written as a setting.")
    if "." not in text:
        text = text.replace("e", ".0e")  # other readers of YAML know a float by its point
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(float, _represent_float)


def dump(value: Any) -> str:
    """Write ``value`` as YAML that `parse` reads back to an equal value.

    Raises:
        ConfigError: the value holds something that is not plain data.
    """
    try:
        text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    except yaml.YAMLError as error:
        raise ConfigError(f"These settings are not plain data: {error}.") from None
    return text
