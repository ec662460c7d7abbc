"""Strict YAML 1.2 reader based on PyYAML, and a writer whose output it reads back exactly.

PyYAML follows YAML 1.1, where ``2e-5`` is a string, ``010`` is eight, ``12:30`` is 750 and ``on`` is a boolean, and
where the last of duplicate keys silently wins. The loader here resolves scalars by the core schema of YAML 1.2 (section
10.3.2) and rejects tags, anchors (which let a short file expand without bound), duplicate keys and excessive sizes.
PyYAML is imported when the first document is read or written, because most programs do neither.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from pretrain.errors import ConfigError

if TYPE_CHECKING:
    import yaml

__all__ = ["MAX_BYTES", "Key", "dump", "parse"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_MAX_DIGITS = 100

Key = tuple[str, ...]

_TAG = "tag:yaml.org,2002:"
# Each pattern with its possible first characters, by which PyYAML looks it up.
_CORE_SCHEMA = (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", list("-+.")),
)


@cache
def _classes() -> tuple[Any, Any]:
    """Return a safe loader that resolves scalars by the core schema of YAML 1.2, and a safe dumper.

    The dumper quotes strings which YAML 1.1 or 1.2 would read as another type, and writes no aliases.
    """
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    for name, pattern, first in _CORE_SCHEMA:
        for kind in (Loader, Dumper):
            kind.add_implicit_resolver(_TAG + name, re.compile(pattern), first)
    Loader.add_constructor(_TAG + "int", _construct_int)
    Dumper.add_representer(str, _represent_str)
    Dumper.add_representer(float, _represent_float)
    return Loader, Dumper


def _construct_int(loader: Any, node: yaml.ScalarNode) -> int:
    return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = text.isprintable() and text.strip() == text
    return dumper.represent_scalar(_TAG + "str", text, style=None if plain else '"')


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    if not math.isfinite(value):
        raise ConfigError(f"{value} cannot be a setting; use a finite number.")
    return dumper.represent_float(value)


def parse(text: str, name: str = "settings") -> tuple[Any, dict[Key, int]]:
    """Read one YAML document.

    Args:
        text: the document.
        name: name of the document in errors, usually the path.

    Returns:
        The value (dict, list, str, int, float, bool or None) and the line of every key.

    Raises:
        ConfigError: the text is not YAML, or uses YAML features beyond plain data.
    """
    import yaml

    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES >> 20} MB; is it a config?")
    lines: dict[Key, int] = {}
    try:
        _check_events(text, name)
        loader = _classes()[0](text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _check_node(node, (), lines, name)
        return loader.construct_document(node), lines
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise _error(name, mark, f"not valid YAML: {problem}.") from None


def _error(name: str, mark: Any, message: str) -> ConfigError:
    place = f"{name}:{mark.line + 1}" if mark is not None else name
    return ConfigError(f"{place}: {message}")


def _check_events(text: str, name: str) -> None:
    """Reject anything but plain data in the event stream, before nodes and values take memory."""
    import yaml

    depth = num_documents = 0
    for event in yaml.parse(text, Loader=_classes()[0]):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        num_documents += isinstance(event, yaml.DocumentStartEvent)
        tag = getattr(event, "tag", None)
        message = ""
        if getattr(event, "anchor", None):
            message = "anchors (&) and aliases (*) are not allowed."
        elif tag not in (None, "!"):
            message = f"the tag {tag!r} is not allowed; a config is plain data."
        elif getattr(event, "tags", None):
            message = "%TAG directives are not allowed."
        elif depth > MAX_DEPTH:
            message = f"nested deeper than {MAX_DEPTH} levels."
        elif num_documents > 1:
            message = "a config is one document; remove the second '---'."
        if message:
            raise _error(name, event.start_mark, message)


def _check_node(node: yaml.Node, path: Key, lines: dict[Key, int], name: str) -> None:
    """Reject duplicate keys, invalid keys and excessive numbers; make every key a string and record its line."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _check_node(item, (*path, str(i)), lines, name)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _TAG + "null":
                raise _error(
                    name,
                    key.start_mark,
                    "a key must be a word or a number, not a list, a mapping or null.",
                )
            key.tag = _TAG + "str"
            key_path = (*path, key.value)
            if key_path in lines:
                message = f"the key {key.value!r} is given twice; remove one of them."
                raise _error(name, key.start_mark, message)
            lines[key_path] = key.start_mark.line + 1
            _check_node(value, key_path, lines, name)
    elif node.tag == _TAG + "int" and len(node.value) > _MAX_DIGITS:
        message = (
            f"the number {node.value[:20]}... has {len(node.value)} digits; no setting needs that."
        )
        raise _error(name, node.start_mark, message)


def dump(value: Any) -> str:
    """Write ``value`` as YAML that `parse` reads back to an equal value.

    Raises:
        ConfigError: the value contains something other than plain data.
    """
    import yaml

    try:
        text: str = yaml.dump(
            value, Dumper=_classes()[1], sort_keys=False, allow_unicode=True, width=100
        )
    except yaml.YAMLError as error:
        raise ConfigError(f"These settings are not plain data: {error}.") from None
    return text
