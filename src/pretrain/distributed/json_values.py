"""JSON encoding of tensors, arrays, tuples and mappings for exchange between processes; safe to parse."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["from_plain", "to_plain"]


def to_plain(value: Any) -> Any:
    """Encode tensors, arrays, strings, numbers, lists, tuples and dicts as JSON values; numbers keep every bit.

    Raises:
        TypeError: the value holds another type.
    """
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = (flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)).numpy()
        kind = str(value.dtype).removeprefix("torch.")
        return {"$tensor": [kind, list(value.shape), base64.b64encode(data.tobytes()).decode()]}
    if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "biuf":
        text = base64.b64encode(value.tobytes()).decode()
        return {"$array": [value.dtype.str, list(value.shape), text]}
    if isinstance(value, tuple):
        return {"$tuple": [to_plain(item) for item in value]}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {"$dict": [[to_plain(k), to_plain(v)] for k, v in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray) and not value.ndim:  # a NumPy scalar
        return to_plain(value.item())
    raise TypeError(f"a {type(value).__name__} cannot be sent to another process")


def from_plain(value: Any) -> Any:
    """Decode a value of ``to_plain``."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        kind, shape, data = value["$tensor"]
        read = bytearray(base64.b64decode(data))
        flat = torch.frombuffer(read, dtype=torch.uint8) if read else torch.empty(0).byte()
        return flat.view(getattr(torch, kind)).reshape(shape)
    if "$array" in value:
        kind, shape, data = value["$array"]
        return np.frombuffer(bytearray(base64.b64decode(data)), np.dtype(kind)).reshape(shape)
    if "$tuple" in value:
        return tuple(from_plain(item) for item in value["$tuple"])
    return {from_plain(k): from_plain(v) for k, v in value["$dict"]}
