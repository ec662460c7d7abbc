"""Strict parsing and writing of JSON as untrusted input.

NaN, duplicate keys and unlimited depth, which Python's parser accepts, are errors here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

from pretrain.errors import CheckpointCorrupt
from pretrain.utils.files import known_as

__all__ = ["as_json", "names_only", "parse_json", "sealed", "to_json", "unsealed", "without_nan"]

JSON_LIMIT = 64 << 20  # bytes
JSON_DEPTH = 64


def parse_json(data: bytes, name: object, *, limit: int = JSON_LIMIT) -> Any:
    """Parse strict JSON: UTF-8, no NaN or Infinity, no duplicate keys, bounded size and depth.

    Raises:
        CheckpointCorrupt: the data are invalid; the error names the file and the problem.
    """
    if len(data) > limit:
        raise CheckpointCorrupt(name, f"at most {limit:,} bytes of JSON", f"{len(data):,} bytes")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            twice = next(
                key for key, count in Counter(key for key, _ in items).items() if count > 1
            )
            raise CheckpointCorrupt(name, "every key once", f"key {twice[:80]!r} twice")
        return found

    def constant(word: str) -> NoReturn:
        raise CheckpointCorrupt(name, "finite numbers", word)

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else constant(digits[:40])

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_float=number,
        )
        if _too_deep(value, JSON_DEPTH):
            raise CheckpointCorrupt(name, f"at most {JSON_DEPTH} levels", "a deeper nesting")
    # JSONDecodeError and UnicodeDecodeError are ValueErrors.
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(
            name, "valid JSON in UTF-8", f"{type(error).__name__}: {error}", known_as(data[:64])
        ) from None
    return value


def _too_deep(value: Any, left: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return left == 0 or any(_too_deep(item, left - 1) for item in inner)


def to_json(value: Any) -> bytes:
    """Encode JSON in the format of all checkpoint files: sorted keys, two spaces of indentation, no NaN or Infinity."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def as_json(value: Any) -> Any:
    """Copy a value as JSON can express it: keys, and what JSON has no form of (a path, NaN), become text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    finite = isinstance(value, float) and math.isfinite(value)
    return value if finite or value is None or isinstance(value, str | int) else str(value)


def without_nan(value: Any) -> Any:
    """Copy JSON data with None for every number that is not finite, which JSON cannot express; keys become text."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sealed(body: Mapping[str, Any]) -> bytes:
    """Encode an object together with its digest, which `unsealed` checks."""
    return to_json({**body, "digest": _digest(body)})


def unsealed(
    data: bytes, name: object, *, limit: int = JSON_LIMIT, hint: str = ""
) -> dict[str, Any]:
    """Parse the output of `sealed`, verify every byte of it and return the object without its digest.

    Raises:
        CheckpointCorrupt: the error names the file and the problem; ``hint`` is added if the content was changed.
    """
    body = parse_json(data, name, limit=limit)
    if not isinstance(body, dict) or not isinstance(digest := body.pop("digest", None), str):
        raise CheckpointCorrupt(name, "an object with its digest", "none")
    try:
        holds = _digest(body) == digest and to_json({**body, "digest": digest}) == data
    except UnicodeEncodeError:  # a lone surrogate, which `sealed` never writes
        holds = False
    if not holds:
        raise CheckpointCorrupt(
            name, f"content with digest {digest[:16]}...", "other content", hint
        )
    return body


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(body)).hexdigest()


def names_only(value: Any) -> Any:
    """Copy JSON data with every absolute path reduced to its last component, so that no local paths are stored."""
    if isinstance(value, str):
        absolute = value.startswith(("/", "~/", "\\\\", "file:/")) or re.match(
            r"^[A-Za-z]:[\\/]", value
        )
        name = re.split(r"[\\/]", value.rstrip("\\/"))[-1]
        return name if absolute and name.strip() else value  # a lone slash names nothing
    if isinstance(value, Mapping):
        return {names_only(key): names_only(item) for key, item in value.items()}
    return [names_only(item) for item in value] if isinstance(value, list | tuple) else value
