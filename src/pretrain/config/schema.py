"""JSON schema of settings, by which editors complete and check a YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pretrain.config.run import fields

__all__ = ["schema"]

_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", NoneType: "null"}
_TYPES |= {list: "array", tuple: "array", dict: "object"}


def schema(kind: Any) -> dict[str, Any]:
    """Return the JSON schema (draft 7) of ``RunConfig`` or ``TuneConfig``.

    It holds names, types, choices and ranges; what several settings mean together is checked by ``load`` only.
    """
    sections: dict[str, Any] = {}
    for section, of in kind.SECTIONS.items():
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
            # The objective may be given by its name alone.
            "type": ["object", "null", *(["string"] if "class_path" in settings else [])],
            "properties": settings,
            "additionalProperties": False,
        }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": kind.__doc__,
        "type": "object",
        "properties": sections,
        "patternProperties": {rf"^({'|'.join(sections)})\.": {}},  # dotted keys: optim.lr
        "additionalProperties": False,
    }


def _type(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    args = get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, UnionType):
        return {"anyOf": [_type(part, metadata) for part in args]}
    if get_origin(hint) is Literal:
        return {"enum": [*args, *metadata.get("flag", ())]}
    found: dict[str, Any] = {"type": _TYPES[get_origin(hint) or hint]}
    if found["type"] == "array":
        found["items"] = _type(args[0], metadata)
    if get_origin(hint) is tuple:
        found |= {"minItems": len(args), "maxItems": len(args)}
    if hint in (int, float):
        ends = {"minimum": metadata.get("low"), "maximum": metadata.get("high")}
        found |= {key: end for key, end in ends.items() if end is not None and math.isfinite(end)}
    return found
