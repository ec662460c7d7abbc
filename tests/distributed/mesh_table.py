"""The tables of docs/distributed.md on meshes: how far the losses of ten steps are from those of one device.

    PYTHONPATH=src:tests python tests/distributed/mesh_table.py FOLDER

FOLDER is made, or holds what an earlier call left there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distributed.test_meshes import EVERYTHING, FAMILIES, MESHES, _worst, run_all

EXTRAS = ("bf16", "muon", "ema", "layers", "full", "selective", "compiled", "async", "from")
WHAT = {
    "bf16": "bf16 compute",
    "muon": "Muon",
    "ema": "moving average of the weights",
    "layers": "layer-wise rates, gradual unfreezing, L2-SP",
    "full": "activation_checkpointing: full",
    "selective": "activation_checkpointing: selective",
    "compiled": "compile, activation_checkpointing: selective",
    "async": "async_save",
    "from": "started from a checkpoint",
}


def _seen(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "result.json").exists():
        run_all(folder, *EVERYTHING)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main() -> None:
    seen = _seen(Path(sys.argv[1]))
    rows = []
    for family in FAMILIES:
        for accumulate in (1, 3):
            one = seen[f"1|{family}|{accumulate}"]["losses"]
            found = [
                f"{_worst(one, seen[f'{mesh}|{family}|{accumulate}']['losses']):.1e}"
                for mesh in MESHES[1:]
            ]
            batches = "micro-batch" if accumulate == 1 else "micro-batches"
            rows.append([f"{family}, {accumulate} {batches}", *found])
    print(_table(["largest relative difference", *MESHES[1:]], rows), end="\n\n")
    whole = seen["1|llama|1"]["losses"]
    rows = [
        [before, *(f"{_worst(seen[f'{before}|{after}']['losses'], whole):.1e}" for after in MESHES)]
        for before in MESHES
    ]
    print(_table(["", *MESHES], rows), end="\n\n")
    rows = [
        [
            WHAT[name],
            *(
                f"{_worst(seen[f'1|{name}']['losses'], seen[f'{mesh}|{name}']['losses']):.1e}"
                for mesh in MESHES[1:]
            ),
        ]
        for name in EXTRAS
    ]
    print(_table(["llama", *MESHES[1:]], rows))


if __name__ == "__main__":
    main()
