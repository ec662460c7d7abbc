"""The command ``doctor``: its options and the function that it calls."""

from __future__ import annotations

from typing import Any

from pretrain.cli.arguments import add_device

__all__ = ["add_doctor", "doctor"]


def add_doctor(parser: Any) -> None:
    """Declare the options of ``pretrain doctor``."""
    add = parser.add_argument
    add_device(parser)
    add("--out", type=str | None, default=None, help="run directory that all processes must see")
    add("--timeout", type=float, default=60.0, help="seconds for each attempt to connect")
    add("--json", action="store_true", help="print JSON")


def doctor(args: Any) -> int:
    """Examine the machine, print the findings, and return an exit code that is nonzero if something is wrong."""
    from pretrain.distributed.doctor import doctor as examine

    return examine(args.device, out=args.out, as_json=args.json, seconds=args.timeout)
