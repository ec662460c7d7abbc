"""Entry point of ``pretrain COMMAND`` and of ``python -m pretrain COMMAND``."""

from __future__ import annotations

import sys

from pretrain import cli

__all__ = ["main"]


def main() -> int:
    """Run one command, see ``pretrain.cli.main``; Ctrl-C while that is imported, on its first use, is one line, too."""
    try:
        run = cli.main.main
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
