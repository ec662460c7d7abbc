"""JSON schema of settings, by which editors complete and check a YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pretrain.config.aliases import NAMES, find, main_setting
from pretrain.config.run import fields

__all__ = ["schema"]

_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", NoneType: "null"}
_TYPES |= {list: "array", tuple: "array", dict: "object"}


def schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema (draft 7) of ``RunConfig`` or ``TuneConfig``.

    It holds names, types, choices and ranges; what several settings mean together is checked by ``load`` only. Other
    names of settings are patterns, because an editor completes properties.
    """
    sections: dict[str, Any] = {}
    known = {
        section: {spec.name: spec for spec in fields(of)} for section, of in kind.SECTIONS.items()
    }
    words = {name for entry in NAMES for name in entry.names} | {
        n for of in known.values() for n in of
    }
    places = {word: found[0] for word in sorted(words) if (found := _accepted(word, known))}
    for section, of in kind.SECTIONS.items():
        inside = [word for word, place in places.items() if place.startswith(f"{section}.")]
        settings = {
            spec.name: {
                "description": spec.help,
                "default": spec.default,
                **_type(spec.type, spec.metadata),
            }
            for spec in fields(of)
        }
        sections[section] = {
            "description": of.__doc__,
            # A section with a main setting may be given by its value alone.
            "type": ["object", "null", *(["string"] if main_setting(section) else [])],
            "properties": settings,
            "patternProperties": {rf"^({'|'.join(inside)})$": {}},
            "additionalProperties": False,
        }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": kind.__doc__,
        "type": "object",
        "properties": sections,
        # dotted keys, optim.lr, and names without a section
        "patternProperties": {rf"^(({'|'.join(sections)})\.|({'|'.join(places)})$)": {}},
        "additionalProperties": False,
    }


def _accepted(word: str, known: Any) -> tuple[str, Any] | None:
    found = find(word, known)
    return None if found is None or (found[1] is not None and found[1].advice) else found


def _type(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    args = get_args(hint)
    if hint is Any:
        return {}
    if get_origin(hint) in (Union, UnionType):
        return {"anyOf": [_type(part, metadata) for part in args]}
    if get_origin(hint) is Literal:
        return {"enum": [*args, *metadata.get("flag", ())]}
    found: dict[str, Any] = {"type": _TYPES[get_origin(hint) or hint]}
    if found["type"] == "string" and metadata.get("unit"):
        return {"type": ["string", "number"]}
    if found["type"] == "array":
        found["items"] = _type(args[0], metadata)
    if get_origin(hint) is tuple:
        found |= {"minItems": len(args), "maxItems": len(args)}
    if hint in (int, float):
        ends = {"minimum": metadata.get("low"), "maximum": metadata.get("high")}
        found |= {key: end for key, end in ends.items() if end is not None and math.isfinite(end)}
    return found
