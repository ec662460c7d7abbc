"""Comparison of golden runs: byte for byte on one machine, within a tolerance between machines.

`differences` yields sentences; there are none where two records agree. `portable` leaves out what another processor
may change beyond measure: hashes of weights, generated texts, and the states of optimizers. Of the rest names, shapes,
types and counts must be equal, and figures as near as `TOLERANCES` says. These hold between processors with AVX-512,
with AVX2 and with neither (``ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2``).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).with_name("expected.json")
# Relative and absolute.
TOLERANCES = {"fp32": (1e-4, 1e-6), "bf16": (2e-2, 1e-3)}
# Norms add up what rounding does to single weights; correlations of a model that has hardly learned divide by little.
WIDER = {
    "norm": (1e-3, 2e-3),
    "grad_norm": (1e-3, 1e-5),
    "pearson": (0.0, 2e-2),
    "spearman": (0.0, 2e-2),
}
# A softmax does not change with these weights, so that their gradients are nothing but rounding.
INDIFFERENT = (
    "attention.self.key.bias",
    "encoder.layers.0.self_attn.k_proj.bias",
    "qa_outputs.bias",
)
_DIGITS = 8


def portable(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that other machines can be compared with."""
    log = [{k: v for k, v in line.items() if k != "samples"} for line in record["log"]]
    tensors = {}
    for name, tensor in record["tensors"].items():
        dropped = ("sha256", "norm") if name.endswith(INDIFFERENT) else ("sha256",)
        tensors[name] = {k: v for k, v in tensor.items() if k not in dropped}
    config = copy.deepcopy(record["config"])
    config["pretrain"].get("adapter", {}).pop("base_sample", None)  # a hash of weights
    found = {"log": log, "tensors": tensors, "config": config}
    found |= {key: record[key] for key in ("files", "inspect")}
    return {key: _rounded(value) for key, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def differences(
    expected: Any, found: Any, precision: str | None = None, place: str = ""
) -> Iterator[str]:
    """Say where two records differ.

    Args:
        expected: what was recorded.
        found: what there is now.
        precision: key of `TOLERANCES`; None asks for equality.
        place: of these two values, for the sentences.
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in expected:
            if key not in found:
                yield f"{place}/{key} is missing"
            else:
                yield from differences(expected[key], found[key], precision, f"{place}/{key}")
        yield from (f"{place}/{key} is new" for key in found if key not in expected)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, precision, f"{place}/{number}")
    elif precision is not None and isinstance(expected, float) and isinstance(found, float):
        relative, absolute = map(
            max, TOLERANCES[precision], WIDER.get(place.rpartition("/")[2], (0.0, 0.0))
        )
        if not math.isclose(expected, found, rel_tol=relative, abs_tol=absolute):
            yield f"{place} is {found!r}, expected {expected!r} within {relative:g} of it or {absolute:g}"
    elif type(expected) is not type(found) or expected != found:
        yield f"{place} is {_short(found)}, expected {_short(expected)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def read_expected() -> dict[str, Any]:
    """The portable records kept beside this file, by the name of the run."""
    expected: dict[str, Any] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return expected


def write_expected(records: Mapping[str, Any]) -> None:
    """Keep the portable part of these records, every line of a log and every tensor on a line of its own.

    Runs that are not among them stay as they are kept.
    """
    runs = read_expected() | {name: portable(record) for name, record in records.items()}
    EXPECTED.write_text(as_lines(runs, 3) + "\n", encoding="utf-8")


def as_lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON with a line for each entry down to a depth."""
    if depth == 0 or not isinstance(value, dict | list) or not value:
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, list):
        parts = [as_lines(part, depth - 1, inner) for part in value]
    else:
        parts = [
            f"{json.dumps(key)}: {as_lines(part, depth - 1, inner)}" for key, part in value.items()
        ]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return f"{opening}\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}{closing}"
